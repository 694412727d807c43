"""What the six scripts share: sigma points, posterior terms, nets, data sets; then arguments, ranks, a run, own images.

The first four parts are the method and read as one text; the last four are plumbing. Equation, table and appendix
numbers are those of the paper: Janjoš, Rosenbaum, Dolgov, Zöllner, "Unscented Autoencoder", ICML 2023.

Axes: B batch, K samples or sigma points, M = B·K decoded points, n latent dimension, [C,H,W] image.
`scale` is the square root of the covariance Σ: standard deviations [B,n] (diagonal) or a lower-triangular L [B,n,n]
(full), Σ = L Lᵀ.
"""

import argparse
import csv
import ctypes
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as image_ops
from tqdm import tqdm

HEURISTICS = ("random", "pairs", "largest")
LOGVAR_LIMIT = 20.0  # |log σ²| beyond this is no posterior, only an overflow of exp at the paper's learning rate


class UserError(ValueError):
    """A mistake that the user can mend: `cli` shows it as one line and exits with code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Sigma points and samples of the posterior (Sec. 4)


def check_sigma_points(k: int, n: int, kappa: float) -> None:
    """Raise ValueError unless 1 <= k <= 2n+1 and kappa > -n (Eq. 5)."""
    if not 1 <= k <= 2 * n + 1:
        raise UserError(f"k = {k} sigma points: a latent space of {n} dimensions has 1 to {2 * n + 1} (2n+1)")
    if not kappa > -n:
        raise UserError(f"kappa = {kappa}: the radius sqrt(kappa + n) needs kappa > -n = {-n}")


def sigma_points(mu: Tensor, scale: Tensor, kappa: float = 0.5) -> Tensor:
    """All sigma points of N(mu, Σ), Eq. 5: the mean, then mean + columns, then mean - columns of sqrt(kappa + n)·L.

    mu [B,n], scale [B,n] or L [B,n,n] -> [B,2n+1,n]. Their mean (Eq. 6) is mu; their covariance (Eq. 7) is
    2(kappa+n)/(2n+1)·Σ, which is Σ for kappa = 1/2. Raises ValueError for kappa <= -n.
    """
    n = mu.shape[-1]
    check_sigma_points(1, n, kappa)
    columns = torch.diag_embed(scale) if scale.dim() == 2 else scale.mT  # [B,n,n], row i is column i of L
    offsets = math.sqrt(kappa + n) * columns
    mu = mu.unsqueeze(1)
    return torch.cat([mu, mu + offsets, mu - offsets], dim=1)  # [B,2n+1,n]


def sample_sigma_points(
    mu: Tensor,
    scale: Tensor,
    k: int,
    heuristic: str = "random",
    kappa: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """K of the 2n+1 sigma points, drawn without replacement and independently for each image (Eq. 9, Appendix C).

    mu [B,n], scale [B,n] or L [B,n,n] -> [B,K,n]; only the K points asked for are built. heuristic:
    `random`: any of the 2n+1; `pairs`: both points of random axes; `largest`: both points of the axes with the largest
    diagonal entries of Σ. The last two add the mean if K is odd. Raises ValueError for K outside 1..2n+1,
    kappa <= -n, or an unknown heuristic.
    """
    B, n = mu.shape
    check_sigma_points(k, n, kappa)
    if heuristic == "random":  # the K largest of 2n+1 uniform numbers are K places without replacement
        place = torch.rand(B, 2 * n + 1, device=mu.device, generator=generator).topk(k).indices  # [B,K] in 0..2n
        axis = (place - 1) % n
        sign = (place > 0).to(mu.dtype) - 2 * (place > n).to(mu.dtype)  # 0 for the mean, +1 or -1 for the columns
    elif heuristic in HEURISTICS:
        score = variances(scale) if heuristic == "largest" else torch.rand(B, n, device=mu.device, generator=generator)
        axis = score.topk(k // 2).indices.repeat(1, 2)
        sign = torch.ones_like(axis, dtype=mu.dtype)
        sign[:, k // 2 :] = -1
        if k % 2:
            axis, sign = F.pad(axis, (1, 0)), F.pad(sign, (1, 0))  # a sign of 0 is the mean
    else:
        raise UserError(f"heuristic {heuristic!r}: choose from {', '.join(HEURISTICS)}")
    step = math.sqrt(kappa + n) * sign  # [B,K]
    if scale.dim() == 2:  # column i of a diagonal L has one entry
        offsets = mu.new_zeros(B, k, n).scatter(2, axis.unsqueeze(2), (step * scale.gather(1, axis)).unsqueeze(2))
    else:
        offsets = step.unsqueeze(2) * scale.mT.gather(1, axis.unsqueeze(2).expand(-1, -1, n))
    return mu.unsqueeze(1) + offsets  # [B,K,n]


def sample_gaussian(mu: Tensor, scale: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """K reparameterised samples z = mu + L ε, ε ~ N(0, I) (Eq. 4): mu [B,n], scale [B,n] or L [B,n,n] -> [B,K,n]."""
    noise = torch.randn(mu.shape[0], k, mu.shape[1], device=mu.device, dtype=mu.dtype, generator=generator)
    return mu.unsqueeze(1) + (noise * scale.unsqueeze(1) if scale.dim() == 2 else noise @ scale.mT)  # [B,K,n]


# ---------------------------------------------------------------------------------------------------------------------
# Posterior and decoder terms of the losses (Eq. 10-20)


def variances(scale: Tensor) -> Tensor:
    """The diagonal of Σ: scale [B,n] or L [B,n,n] -> [B,n]."""
    return scale.square() if scale.dim() == 2 else scale.square().sum(-1)


def kl_divergence(mu: Tensor, scale: Tensor) -> Tensor:
    """KL(N(mu, Σ) || N(0, I)) in nats, with the ½ of footnote 4 (Eq. 10 and 18 leave it out): -> [B]."""
    diagonal = scale if scale.dim() == 2 else scale.diagonal(dim1=1, dim2=2)  # L_ii
    trace = scale.square().flatten(1).sum(1)  # tr Σ = ‖L‖²_F
    return 0.5 * (mu.square().sum(1) + trace - mu.shape[1] - 2 * diagonal.log().sum(1))


def wasserstein2(mu: Tensor, scale: Tensor, squared: bool = False) -> Tensor:
    """2-Wasserstein metric from N(mu, Σ) to N(0, I), W₂² = ‖mu‖² + ‖L - I‖²_F (Eq. 11, 19, 20): -> [B].

    `squared` returns W₂². For a diagonal Σ this is exact. For a full L it is the paper's surrogate, since Eq. 19
    takes tr(L) for tr(Σ^½). The gradient at W₂ = 0 is 0.
    """
    identity = 1.0 if scale.dim() == 2 else torch.eye(mu.shape[1], device=mu.device, dtype=mu.dtype)
    difference = torch.cat([mu, (scale - identity).flatten(1)], dim=1)
    return difference.square().sum(1) if squared else torch.linalg.vector_norm(difference, dim=1)


def wasserstein2_norms(mu: Tensor, scale: Tensor) -> Tensor:
    """‖mu‖ + ‖L - I‖_F, the sum of two norms that the authors' published code minimises in place of W₂: -> [B].

    Not in the paper. It saturates as W₂ does; the gradient of a norm at 0 is 0.
    """
    identity = 1.0 if scale.dim() == 2 else torch.eye(mu.shape[1], device=mu.device, dtype=mu.dtype)
    return torch.linalg.vector_norm(mu, dim=1) + torch.linalg.vector_norm((scale - identity).flatten(1), dim=1)


def largest_variance(scale: Tensor) -> Tensor:
    """λ_max(Σ), taken as the largest diagonal entry of Σ (below Eq. 12; exact for a diagonal Σ): -> [B]."""
    return variances(scale).amax(1)


def gradient_penalty(
    decoder: nn.Module, mu: Tensor, generator: torch.Generator | None = None, fold: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Unbiased one-draw estimate of the squared Frobenius norm of the decoder's Jacobian at mu (Eq. 12, 16).

    mu [B,n] -> [B]: E‖J u‖² = ‖J‖²_F for u ~ N(0, I) over latents (Hutchinson), by forward-mode differentiation; any
    decoder will do, `fold` is for this file's. Batch norm uses its running statistics and leaves them alone, so J is
    the Jacobian of a single image's decoding.
    """
    u = torch.randn(mu.shape, device=mu.device, dtype=mu.dtype, generator=generator)
    with eval_mode(decoder):
        if isinstance(decoder, Decoder):
            derivative = decoder.jvp(mu, u, fold)  # J u [B,C,H,W]
        else:
            derivative = torch.func.jvp(decoder, (mu,), (u,))[1]
    return derivative.square().sum((1, 2, 3))


def slerp(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Spherical interpolation between a and b [...,n] (Appendix A); linear where they are (anti)parallel."""
    cosine = F.cosine_similarity(a, b, dim=-1).clamp(-1, 1).unsqueeze(-1)
    omega, sine = cosine.acos(), (1 - cosine.square()).sqrt()
    spherical = (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / sine.clamp_min(1e-6)
    return torch.where(sine > 1e-4, spherical, (1 - t) * a + t * b)


# ---------------------------------------------------------------------------------------------------------------------
# Nets (Table 4)


def check_image_size(image_size: int) -> None:
    """Raise ValueError unless the nets of Table 4 have a version for this size."""
    if image_size not in (32, 64):
        raise UserError(f"image_size = {image_size}: these nets are made for images of 32x32 and 64x64 pixels")


def precision(net: nn.Module, x: Tensor):
    """A context with autocast to bfloat16 on x's device if the net's flag `bf16` is set; else nothing changes."""
    return torch.autocast(x.device.type, torch.bfloat16) if net.bf16 else nullcontext()


class Encoder(nn.Module):
    """x [B,C,H,W] in [-1,1] -> features [B, self.features]: six 3×3 stride-2 convolutions (Table 4)."""

    bf16 = False  # run the convolutions in bfloat16, by autocast

    def __init__(self, channels: int, image_size: int, width: float = 1.0) -> None:
        super().__init__()
        check_image_size(image_size)
        hidden = [max(1, round(width * c)) for c in (32, 64, 128, 256, 512, 1024)]
        layers = []
        for c_in, c_out in zip([channels, *hidden], hidden, strict=False):
            convolution = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)  # batch norm has the bias
            layers += [convolution, nn.BatchNorm2d(c_out), nn.LeakyReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.features = hidden[-1] * math.ceil(image_size / 64) ** 2

    def forward(self, x: Tensor) -> Tensor:
        with precision(self, x):
            h = self.layers[:-3](x)
        # The last convolution is float32, as heads and losses are: on CPUs with AMX oneDNN (torch 2.15) leaves a part
        # of its bfloat16 gradient unwritten where its input is 1×1
        return self.layers[-3:](h.to(x.dtype)).flatten(1)


class GaussianHead(nn.Module):
    """Features [B,features] -> mu [B,n] and scale, σ [B,n] or with full covariance L [B,n,n] (Table 4, footnote 7)."""

    def __init__(self, features: int, latent_dim: int, covariance: str = "diagonal") -> None:
        super().__init__()
        self.mu = nn.Linear(features, latent_dim)
        self.logvar = nn.Linear(features, latent_dim)  # log σ²
        self.correlation = None
        if covariance == "full":
            self.correlation = nn.Linear(features, latent_dim * (latent_dim - 1) // 2)
            self.register_buffer("below", torch.tril_indices(latent_dim, latent_dim, -1), persistent=False)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mu = self.mu(features)
        sigma = (0.5 * self.logvar(features).clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)).exp()
        if self.correlation is None:
            return mu, sigma
        row, column = self.below  # row-major lower triangle
        L = torch.diag_embed(sigma)
        L[:, row, column] = torch.tanh(self.correlation(features)) * sigma[:, row] * sigma[:, column]  # footnote 7
        return mu, L


class Decoder(nn.Module):
    """z [M,n] -> images [M,C,H,W] in (-1,1): linear to 8×8, 4×4 stride-2 transposed convolutions, tanh (Table 4).

    Nothing non-linear stands between the linear layer and the first transposed convolution: together they are one
    affine map z -> z A + a. `fold` multiplies it out, at the cost of n+1 transposed convolutions, and each of the M
    points then costs one small matrix product in place of the largest layer. The function and its gradients are the
    same up to rounding.
    """

    bf16 = False

    def __init__(self, latent_dim: int, channels: int, image_size: int, width: float = 1.0) -> None:
        super().__init__()
        check_image_size(image_size)
        stages = 2 if image_size == 32 else 3
        hidden = [max(1, round(width * c)) for c in (1024, 512, 256, 128)[: stages + 1]]
        self.linear = nn.Linear(latent_dim, hidden[0] * 8 * 8)
        self.first = nn.ConvTranspose2d(hidden[0], hidden[1], 4, stride=2, padding=1, bias=False)
        layers = [nn.BatchNorm2d(hidden[1]), nn.LeakyReLU(inplace=True)]
        for c_in, c_out in itertools.pairwise(hidden[1:]):
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c_out), nn.LeakyReLU(inplace=True)]
        self.rest = nn.Sequential(*layers, nn.ConvTranspose2d(hidden[-1], channels, 3, padding=1))

    def fold(self, z: Tensor, penalty: bool = False) -> tuple[Tensor, Tensor] | None:
        """A [n, 16·16·hidden] and a [16·16·hidden] of the affine map, or None where that would not pay.

        z [B,...,n]: all points that are to be decoded; `penalty`: `gradient_penalty` takes two more for each of the B.
        """
        n = z.shape[-1]
        if z.numel() // n + 2 * len(z) * penalty <= n + 1:
            return None
        columns = torch.cat([self.linear.weight.T, self.linear.bias.unsqueeze(0)])  # [n+1, 1024·8·8]
        with precision(self, columns):
            columns = self.first(columns.unflatten(1, (-1, 8, 8)))  # [n+1, 512, 16, 16]
        columns = columns.permute(0, 2, 3, 1).flatten(1)  # [n+1, 16·16·512]: channels last
        return columns[:-1], columns[-1]

    def affine(self, z: Tensor, fold: tuple[Tensor, Tensor] | None, bias: bool = True) -> Tensor:
        """z [M,n] -> z A + a, or without the bias z A, as [M,512,16,16]."""
        if fold is None:
            h = F.linear(z, self.linear.weight, self.linear.bias if bias else None)
            return self.first(h.unflatten(1, (-1, 8, 8)))
        h = torch.addmm(fold[1], z, fold[0]) if bias else z @ fold[0]
        return h.unflatten(1, (16, 16, -1)).permute(0, 3, 1, 2)

    def forward(self, z: Tensor, fold: tuple[Tensor, Tensor] | None = None) -> Tensor:
        with precision(self, z):
            fold = self.fold(z) if fold is None else fold
            return torch.tanh(self.rest(self.affine(z, fold)).to(z.dtype))

    def jvp(self, z: Tensor, u: Tensor, fold: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """J(z) u [M,C,H,W] for u [M,n], J the Jacobian at z (forward-mode differentiation), in evaluation mode.

        torch's own forward mode would convolve every layer's input with a derivative of the weights that is zero, and
        fails in batch norm under autocast. It serves a subclass with a `forward` of its own or with other layers.
        Raises ValueError in training mode.
        """
        if self.training:
            raise ValueError("Decoder.jvp is the derivative in evaluation mode: call decoder.eval() first")
        known = nn.BatchNorm2d | nn.LeakyReLU | nn.ConvTranspose2d
        if type(self).forward is not Decoder.forward or not all(isinstance(layer, known) for layer in self.rest):
            return torch.func.jvp(self, (z,), (u,))[1]
        with precision(self, z):
            h, t = self.affine(z, fold), self.affine(u, fold, bias=False)  # value and tangent
            for layer in self.rest:
                h = layer(h)
                if isinstance(layer, nn.BatchNorm2d):
                    t = t * (layer.weight * (layer.running_var + layer.eps).rsqrt()).to(t.dtype)[:, None, None]
                elif isinstance(layer, nn.LeakyReLU):
                    t = torch.where(h > 0, t, layer.negative_slope * t)
                else:
                    sizes = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
                    t = F.conv_transpose2d(t, layer.weight, None, *sizes)
            return (1 - torch.tanh(h.to(z.dtype)).square()) * t.to(z.dtype)


@contextmanager
def eval_mode(module: nn.Module):
    """The module in evaluation mode for a while (batch norm: running statistics, used and not updated)."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: every image is held as uint8 on the training device, batches are cut from there without workers

# Defaults of flags that are not given, by data set (Appendix A, Table 2; those of digits and of own images are ours)
_PAPER = {
    "channels": 3, "image_size": 32, "latent_dim": 128, "width": 1.0, "epochs": 100, "sigma_points": "random",
    "flip": False, "fid": "imagenet",
}  # fmt: skip
DEFAULTS = {
    "digits": _PAPER | {"channels": 1, "latent_dim": 16, "width": 1 / 16, "epochs": 40, "fid": "digits"},
    "fashion_mnist": _PAPER | {"channels": 1, "latent_dim": 64},
    "cifar10": _PAPER | {"sigma_points": "largest", "flip": True},  # flip: mirror half of the training images
    "celeba": _PAPER | {"latent_dim": 64, "image_size": 64},
}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
FASHION_MNIST_MD5 = {  # of the uncompressed files
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
}
CELEBA_SPLITS = (162770, 19867, 19962)  # training, validation, test, in the order of the file names


@dataclass(frozen=True)
class Dataset:
    """Three uint8 tensors [N,C,H,W] on one device."""

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    preprocessing: str  # in words, for results.json; resizing is bilinear and antialiased


def defaults_of(name: str, image_size: int | None = None) -> dict:
    """The defaults of a data set by name; any other name must be a folder or a file of images. Raises UserError."""
    if name in DEFAULTS:  # FDD, the digits' distance, is for their own size
        return DEFAULTS[name] | ({"fid": "imagenet"} if name == "digits" and image_size == 64 else {})
    own = _PAPER | ({"latent_dim": DEFAULTS["celeba"]["latent_dim"]} if image_size == 64 else {})
    if Path(name).suffix in (".npy", ".npz") and Path(name).is_file():
        return own | {"channels": read_arrays(Path(name))["train"].shape[1]}
    if not Path(name).is_dir():
        others = "a folder, .npy or .npz that is there (for a hub's data set see README, Data)"
        raise UserError(f"--dataset {name!r} is neither one of {', '.join(DEFAULTS)} nor {others}")
    return own


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    device: str | torch.device = "cpu",
    image_size: int | None = None,
    limit_train: int | None = None,
    limit_eval: int | None = None,
) -> Dataset:
    """Load `digits`, `fashion_mnist`, `cifar10`, `celeba`, or images in a folder, .npy or .npz, as uint8 on `device`.

    image_size (32 or 64) resizes to another size than the data set's own; limit_train keeps the first training
    images, limit_eval the first validation and test images.
    Raises UserError, with what to put where, if anything is missing or cannot be read.
    """
    size = image_size or defaults_of(name)["image_size"]
    loaders = {"digits": _digits, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10, "celeba": _celeba}
    if name in loaders:
        splits, preprocessing = loaders[name](Path(data_dir))
    elif Path(name).is_file():
        splits, preprocessing = hold_out(read_arrays(Path(name)), name), "centre crop"
    else:
        images = read_folder(Path(name), Path(data_dir), size)
        splits, preprocessing = hold_out(images, name), f"centre crop, to {size}x{size}"
    splits = [split[:limit] for split, limit in zip(splits, (limit_train, limit_eval, limit_eval), strict=True)]
    if any(split.shape[-2:] != (size, size) for split in splits):
        splits = [crop_and_resize(split, size) for split in splits]
        preprocessing += f", to {size}x{size}"
    splits = [split.to(device) for split in splits]
    return Dataset(name if name in loaders else own_name(name), *splits, preprocessing)


def crop_and_resize(images: Tensor, size: int, crop: int = 0) -> Tensor:
    """The centred square of images [...,H,W], of `crop` pixels or as large as it goes, resized with antialiasing."""
    square = image_ops.center_crop(images, [crop or min(images.shape[-2:])] * 2)
    return image_ops.resize(square, [size, size], antialias=True)


def _digits(_data_dir: Path) -> tuple[list[Tensor], str]:
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16  # [1797,1,8,8] in [0,1]
    images = F.interpolate(images, size=(32, 32), mode="bilinear").mul(255).round().to(torch.uint8)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]  # they come by writer
    return list(images.split([1197, 300, 300])), "8x8, bilinear to 32x32"


def _fashion_mnist(data_dir: Path) -> tuple[list[Tensor], str]:
    raw = data_dir / "FashionMNIST" / "raw"

    def find(name: str) -> Path | None:
        files = (folder / (name + suffix) for folder in (raw, DEBIAN_FASHION_MNIST) for suffix in ("", ".gz"))
        return next((file for file in files if file.is_file()), None)

    if not any(map(find, FASHION_MNIST_MD5)):
        _torchvision("FashionMNIST", data_dir, "train-images-idx3-ubyte.gz and t10k-images-idx3-ubyte.gz", raw)
    train, test = (read_idx(find(name) or raw / f"{name}.gz", md5) for name, md5 in FASHION_MNIST_MD5.items())
    validation = len(train) // 6  # 50k + 10k of the 60k
    return [train[:-validation], train[-validation:], test], "28x28"


def read_idx(file: Path, md5: str) -> Tensor:
    """The images of an IDX file, gzipped or not, whose content has this checksum: uint8 [N,1,H,W]. Raises UserError."""
    with reading(file):
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if hashlib.md5(content).hexdigest() != md5:
        raise UserError(f"{file} is not the published file (its checksum differs): remove it")
    shape = np.frombuffer(content, ">u4", 3, offset=4).tolist()  # after the magic number: images, rows, columns
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=16).reshape(shape).copy()).unsqueeze(1)


def _cifar10(data_dir: Path) -> tuple[list[Tensor], str]:
    splits = _torchvision("CIFAR10", data_dir, "cifar-10-python.tar.gz", data_dir)
    train, test = (torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in splits)
    validation = len(train) // 5  # 40k + 10k of the 50k
    return [train[:-validation], train[-validation:], test], "as published"


def _torchvision(name: str, data_dir: Path, files: str, place: Path) -> list:
    from torchvision import datasets

    existed = data_dir.exists()
    try:
        return [getattr(datasets, name)(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, ValueError, AssertionError) as error:  # URLError is an OSError
        if not existed:
            shutil.rmtree(data_dir, ignore_errors=True)  # what the failed download made
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot get {name} ({why}): check the network, or put {files} into {place}/") from None


def _celeba(data_dir: Path) -> tuple[list[Tensor], str]:
    root = data_dir / "celeba"
    folder, partition = root / "img_align_celeba", root / "list_eval_partition.txt"
    if not folder.is_dir():
        raise UserError(f"CelebA is not in {root}/: put the folder img_align_celeba/ and list_eval_partition.txt there")
    if partition.is_file():
        lines = partition.read_text().splitlines()
        if wrong := [line for line in lines if not re.fullmatch(r"\S+\s+[012]\s*", line)]:
            raise UserError(f"{partition}: {wrong[0]!r} is not '<file name> <0|1|2>'")
        splits = [[folder / line.split()[0] for line in lines if line.split()[1] == split] for split in "012"]
    else:
        files, last = sorted(folder.glob("*.jpg")), list(itertools.accumulate(CELEBA_SPLITS))
        if len(files) != last[-1]:
            raise UserError(f"{folder}/ has {len(files)} of the {last[-1]} images: complete it, or add {partition}")
        splits = [files[: last[0]], files[last[0] : last[1]], files[last[1] :]]
    if not all(splits):
        raise UserError(f"{partition} has no images for one of 0 (training), 1 (validation), 2 (test)")
    return decode_images(splits, 64, data_dir, crop=148), "centre crop 148, to 64x64"


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1,1], the range of the decoder's tanh."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1,1] -> uint8, rounded and clamped as an 8-bit image file would be."""
    return ((images + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def epoch_batches(images: Tensor, batch_size: int, seed: int, flip: bool = False) -> Iterator[Tensor]:
    """One epoch of float batches [B,C,H,W] in [-1,1] from uint8 images, shuffled by `seed`, the last short one dropped.

    Shuffling, flipping and scaling happen on the images' device. Under torchrun every rank takes its own part of one
    common permutation.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[rank() :: world_size()]
    order = order[: len(images) // world_size()].to(images.device)
    for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
        x = images.index_select(0, batch)  # on a CPU many times as fast as images[batch]
        if flip:  # one of each image and its mirror image
            coins = torch.randint(2, (len(x),), device=x.device)
            either = torch.stack([x, x.flip(-1)], dim=1).flatten(0, 1)  # [2B,C,H,W]
            x = either.index_select(0, torch.arange(0, 2 * len(x), 2, device=x.device) + coins)
        yield to_float(x)


def validation_batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    """This rank's part of the images in float batches, in order, the last short one included."""
    for batch in images[rank() :: world_size()].split(batch_size):
        yield to_float(batch)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments, errors, files

CHANGEABLE = {"device", "data_dir", "fid", "fid_method", "compile", "save_images", "resume", "eval_only"}
UNNAMED = CHANGEABLE | {"dataset", "out", "seed"}  # flags that are not in a folder's name


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


def number(kind: type, low: float, high: float = sys.float_info.max):
    """An argparse type: a finite int or float in [low, high]."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            limits = f"at least {low:g}" + (f" and at most {high:g}" if high < sys.float_info.max else "")
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse's message for what is no number names it
    return parse


def argument_parser(script: str, description: str, beta: float = 2.5e-4, beta_flags=("--beta",)) -> Parser:
    """The flags that every script has; `script` is its __file__, beta the default weight of its latent term."""
    parser = Parser(prog=Path(script).name, description=description, formatter_class=Help, allow_abbrev=False)
    add, by_data, known = parser.add_argument, "(default: by data set)", ", ".join(DEFAULTS)
    add("--dataset", type=dataset_name, default="digits", help=f"{known}, or a folder, .npy or .npz of images")
    add("--data-dir", default="data", help="where data sets are looked for, downloaded to and cached")
    add("--image-size", type=int, choices=(32, 64), help=f"pixels, height and width {by_data}")
    add("--limit-train", type=number(int, 1), help="use only this many training images")
    add("--limit-eval", type=number(int, 1), help="use only this many validation and as many test images")
    add("--out", default="runs", help="folder that gets one folder for each run")
    add("--epochs", type=number(int, 0), help=f"passes over the training images; 0: the untrained net {by_data}")
    add("--batch-size", type=number(int, 2), default=64, help="images a step (on each rank, under torchrun)")
    add("--lr", type=number(float, 1e-9, 10), default=0.005, help="Adam's first learning rate")
    add(*beta_flags, dest="beta", type=number(float, 0), default=beta, help="weight of the latent term")
    add("--latent-dim", type=number(int, 2, 4096), help=f"n, dimensions of the latent space {by_data}")
    add("--width", type=number(float, 1e-3, 8), help=f"multiplies all hidden channels {by_data}")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of weights, shuffling, noise and evaluation")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu; auto: the first that is there")
    add("--precision", choices=("fp32", "tf32", "bf16"), help="of the nets (default: bf16 on CUDA that has it)")
    add("--compile", action="store_true", help="torch.compile the nets")
    add("--fid", help=f"features: imagenet, tf, lite0, digits, none, or a state dict on disk {by_data}")
    add("--fid-method", choices=("sqrtm", "eigh"), default="sqrtm", help="matrix square root of the Fréchet distance")
    add("--save-images", action="store_true", help="write the evaluated images too, as .npz")
    resume = "go on with the run in this folder; auto: with the unfinished run of these arguments in --out, else start"
    add("--resume", metavar="DIR", help=resume)
    add("--eval-only", metavar="DIR", help="evaluate the best checkpoint of the run in this folder")
    return parser


def dataset_name(text: str) -> str:
    """A known data set's name as it is; a folder by its whole path, so that it is found from anywhere."""
    return text if text in DEFAULTS else str(Path(text).resolve())


def parse_args(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse; what is not given is filled in from the run to resume or from the data set's defaults.

    Raises UserError for arguments that do not go together, or exits with 2.
    """
    args = parser.parse_args(argv)
    if args.resume and args.eval_only:
        raise UserError("--resume and --eval-only: give one of the two")
    script, folder, automatic = Path(parser.prog).stem, args.eval_only or args.resume, args.resume == "auto"
    if new := not folder or automatic:
        saved = defaults_of(args.dataset, args.image_size)
        saved = {name: value for name, value in saved.items() if name != "sigma_points" or name in args}
    else:
        saved = load_json(Path(folder) / "args.json")
        if saved.get("script") != script:
            raise UserError(f"{folder} is a run of {saved.get('script')}.py, not of {script}.py")
        saved = {name: value for name, value in saved.items() if name not in ("resume", "eval_only")}
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)  # again: what is given wins
    if new:
        args.resume, args.script, args.name = None, script, run_name(script, args, parser)
    if not args.eval_only:
        args.world_size = int(os.environ.get("WORLD_SIZE", 1))
    if not new:
        changed = differences(args, saved, CHANGEABLE | {"precision" if args.eval_only else "epochs"})
        if changed == ["world_size"]:
            raise UserError(f"{folder} ran on {saved['world_size']} ranks and cannot go on with {args.world_size}")
        if differ := ", ".join(f"--{n.replace('_', '-')} is {saved[n]!r}, not {getattr(args, n)!r}" for n in changed):
            raise UserError(f"{folder} cannot go on with other arguments: {differ}")
    check_precision(args)
    if automatic and (unfinished := find_run(args)):
        return parse_args(parser, [*(sys.argv[1:] if argv is None else argv), "--resume", str(unfinished)])
    return args


def differences(args: argparse.Namespace, saved: dict, ignored: set[str]) -> list[str]:
    """The names of a saved run's arguments that are others here."""
    return [name for name, value in saved.items() if name not in ignored and getattr(args, name, None) != value]


def find_run(args: argparse.Namespace) -> Path | None:
    """The unfinished run of these arguments below --out, or None if there is none; exits with 0 if it is finished."""
    ignored, finished = CHANGEABLE | {"out", "world_size", "label"}, None
    for folder in (file.parent for file in sorted(Path(args.out).glob("*/args.json"))):
        if (folder / "last.pt").is_file() and not differences(args, load_json(folder / "args.json"), ignored):
            rows = folder / "metrics.csv"
            done = len(rows.read_text().splitlines()) - 1 if rows.is_file() else 0
            if done < args.epochs or not (folder / "results.json").is_file():
                return folder
            finished = folder / "results.json"
    if finished:
        if os.environ.get("RANK", "0") == "0":
            print(f"this run is finished: {finished}")
        sys.exit(0)
    return None


def run_name(script: str, args: argparse.Namespace, parser: Parser) -> str:
    """<script>-<data set>-<flags that are not the default>-seed<N>, the name of a run's folder (255 bytes at most)."""
    data = args.dataset if args.dataset in DEFAULTS else own_name(args.dataset)
    given = [(n, v) for n, v in vars(args).items() if n not in UNNAMED and v != parser.get_default(n)]
    named = [f"{name.replace('_', '')}{'' if value is True else value}" for name, value in given]
    name = "-".join([script, data, *named]).replace("/", "_").encode()[:200].decode(errors="ignore")
    return f"{name}-seed{args.seed}"


def check_precision(args: argparse.Namespace) -> None:
    """Fill in the device's precision if none is given. Raises UserError for a device or precision that is not there."""
    device = resolve_device(args.device)
    if args.precision is None:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if native else "fp32"
    if args.precision == "tf32" and device.type != "cuda" or args.precision == "bf16" and device.type == "mps":
        raise UserError(f"--precision {args.precision} does not exist on {device.type}: use fp32")
    if device.type == "mps" and "WORLD_SIZE" in os.environ:
        raise UserError("torchrun has no backend for MPS: add --device cpu, or start one process without torchrun")


def resolve_device(name: str) -> torch.device:
    """The device by name; `auto` is CUDA, else Apple's MPS, else the CPU; under torchrun each rank has its own GPU.

    Raises UserError if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if torch.device(name).type in ("cuda", "mps", "cpu"):
            return torch.empty(0, device=name).device
        why = "not supported"
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
    raise UserError(f"--device {name!r} cannot be used ({why}): choose auto, cuda, mps or cpu")


def cli(main) -> None:
    """Run a script's main: a user's mistake, or a path that cannot be reached, is one line and exit code 2; Ctrl-C and
    SIGTERM, which schedulers send before they kill, name the last checkpoint and end with 130 and 143."""

    def stop(number: int, _frame) -> None:
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        who = f"{Path(sys.argv[0]).name}{f' (rank {rank()})' if rank() else ''}"
        print(f"{who}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        if Run.current and rank() == 0:
            print(f"\nstopped; the last checkpoint is {Run.current.dir / 'last.pt'}", file=sys.stderr)
            print(f"go on with: {Run.current.resume_command()}", file=sys.stderr)
        sys.exit(128 + (stopped.args or (signal.SIGINT,))[0])


def reason(error: Exception) -> str:
    """What went wrong, in a few words on one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def reading(path: str | Path):
    """Whatever goes wrong with a file becomes a UserError that names it: a damaged one raises almost anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error


def load_json(path: Path) -> dict:
    """A JSON object from a file. Raises UserError naming the file."""
    with reading(path):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content


def write_file(path: Path, content) -> None:
    """Replace a file atomically by text, or by what `content(file)` writes. On UserError the old file stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(f"cannot write {path}: {reason(error)}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV, floats at full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


# ---------------------------------------------------------------------------------------------------------------------
# Ranks (torchrun), device, precision, random streams

STREAMS = ("weights", "noise", "shuffle", "validation", "mixture", "pairs")


def stream_seed(seed: int, purpose: str, rank: int = 0, epoch: int = 0) -> int:
    """The seed of a run's random stream for one of STREAMS: other arguments give an independent stream."""
    return int(np.random.SeedSequence([seed, STREAMS.index(purpose), rank, epoch]).generate_state(1)[0])


def rank() -> int:
    """This process's number under torchrun, else 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes torchrun started, else 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(args: argparse.Namespace) -> torch.device:
    """Join the other ranks under torchrun, set precision and the weights' seed, return this rank's device."""
    device, ranks = resolve_device(args.device), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cpu":
        keep_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # as long as a slow download may take
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.manual_seed(stream_seed(args.seed, "weights"))
    return device


def keep_memory() -> None:
    """On Linux, make the process keep the memory that it frees, in huge pages: by default glibc gives large blocks back
    to the system, and each step pays again for clearing its gigabytes of activations (paper/README.md, Speed)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch when it makes its first tensor
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never given back


def prepare(nets: tuple[nn.Module, nn.Module], args: argparse.Namespace, device: torch.device) -> nn.ModuleDict:
    """Encoder and decoder as one model on the device, alike on all ranks, with the precision and compilation asked for;
    from here on each rank has its own noise."""
    model = nn.ModuleDict(dict(zip(("encoder", "decoder"), nets, strict=True))).to(device)
    if world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    model.to(memory_format=torch.channels_last)
    for net in model.modules():
        if hasattr(net, "bf16"):
            net.bf16 = args.precision == "bf16"  # the nets only: heads, posterior terms and losses stay in float32
    if args.compile:
        model["encoder"].compile()
        model["decoder"].compile()
    torch.manual_seed(stream_seed(args.seed, "noise", rank()))
    return model


def load_data(args: argparse.Namespace, device: torch.device) -> Dataset:
    """The data set of a run's arguments, rank 0 first. Raises UserError if it has too few images for a batch."""
    with rank_zero_first():
        limits = args.limit_train, args.limit_eval
        data = load_dataset(args.dataset, args.data_dir, device, args.image_size, *limits)
    if len(data.train) < args.batch_size * world_size():
        ranks = f" on each of {world_size()} ranks" if world_size() > 1 else ""
        raise UserError(f"--batch-size {args.batch_size}{ranks}: there are only {len(data.train)} training images")
    if len(data.val) < world_size():
        raise UserError(f"{len(data.val)} validation images are too few for {world_size()} ranks")
    return data


@contextmanager
def rank_zero_first():
    """Rank 0 goes through the block (downloading, caching) before the others do."""
    if rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank() == 0:
        dist.barrier()


def from_rank_zero(function):
    """What `function()` returns on rank 0, sent to all ranks."""
    result = [function() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


@torch.no_grad()
def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace tensors of one dtype by their mean over the ranks, in one all-reduce."""
    if world_size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, flat.div_(world_size()).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def average_gradients(model: nn.Module) -> None:
    """After backward(): the mean of the ranks' gradients, so that the global batch is --batch-size × ranks."""
    average_over_ranks([p.grad for p in model.parameters() if p.grad is not None])


def progress(description: str, total: int) -> tqdm:
    """A progress bar over images, on rank 0 and on a terminal only."""
    return tqdm(desc=description, total=total, unit="img", leave=False, disable=rank() > 0 or None)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators of the CPU and of the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Put back what `random_states` took; a device that is not here any more is passed over."""
    torch.set_rng_state(states["cpu"])
    for name in states.keys() - {"cpu"}:
        if getattr(torch, name).is_available():
            getattr(torch, name).set_rng_state(states[name])


@contextmanager
def validating(model: nn.Module, device: torch.device, seed: int):
    """Evaluation mode, no gradients, and the same noise every time, without touching the training's random stream."""
    average_over_ranks([buffer for buffer in model.buffers() if buffer.is_floating_point()])  # batch norm's statistics
    states = random_states(device)
    torch.manual_seed(stream_seed(seed, "validation", rank()))
    with eval_mode(model), torch.no_grad():
        yield
    set_random_states(states)


# ---------------------------------------------------------------------------------------------------------------------
# A run: its folder, its checkpoints, its metrics


def load_checkpoint(path: Path) -> dict:
    """A checkpoint on the CPU, without executing code from it: a dict (see `Run`). Raises UserError naming the file."""
    with reading(f"{path} as a checkpoint"):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_trained(
    folder: str | Path, nets, device: str | torch.device = "cpu"
) -> tuple[nn.Module, nn.Module, argparse.Namespace]:
    """Encoder, decoder and arguments of the run in `folder`: its best checkpoint in float32, in evaluation mode.

    nets: the script's function that builds them, for example uae.nets. Raises UserError if the folder is no run or
    its files are damaged.
    """
    args = argparse.Namespace(**load_json(Path(folder) / "args.json"))
    with reading(f"{folder} as a run of the script whose nets were given"):
        model = nn.ModuleDict(dict(zip(("encoder", "decoder"), nets(args), strict=True)))
        model.load_state_dict(load_checkpoint(Path(folder) / "best.pt")["model"])
    model.to(device).eval().requires_grad_(False)
    return model["encoder"], model["decoder"], args


def new_folder(args: argparse.Namespace) -> Path:
    """Make the folder of a new run: <out>/<name>, or if that is taken <name>-2, -3, … Raises UserError if it cannot."""
    for copy in range(1, 1000):
        folder = Path(args.out) / (args.name + (f"-{copy}" if copy > 1 else ""))
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not folder.is_dir():
                raise UserError(f"--out {args.out}: cannot make {folder}: {error.strerror}") from None
    raise UserError(f"--out {args.out}: there are 999 runs named {args.name}, remove some")


class Run:
    """A run's folder: args.json, metrics.csv and the checkpoints.

    `best.pt` (best validation loss) and `last.pt` are dicts: `model` with the keys `encoder.…` and `decoder.…`,
    `optimizer`, `scheduler`, `epoch`, `best` (validation loss), `history` (rows of metrics.csv), `random` (generator
    states of each rank), `args`.
    """

    current = None  # the one that Ctrl-C stops

    def __init__(self, args, model: nn.Module, optimizer, scheduler, data: Dataset) -> None:
        self.args, self.model, self.optimizer, self.scheduler, self.data = args, model, optimizer, scheduler, data
        self.epoch, self.best, self.history = 0, math.inf, []  # epochs done, best validation loss, rows of metrics.csv
        self.logged = []  # [(parts of the loss, images)] since the last call of `means`
        self.started, self.speed = time.perf_counter(), 0.0  # of the epoch; training images/s
        self.device = data.train.device
        folder = args.resume or args.eval_only
        self.dir = Path(folder) if folder else from_rank_zero(lambda: new_folder(args))
        if args.resume:
            self._restore()
        if not args.eval_only and rank() == 0:
            write_file(self.dir / "args.json", json.dumps(vars(args), indent=1))
        if not folder:
            self.save()  # from here on there is always a checkpoint to resume from
        if rank() == 0:
            ranks = f" on {world_size()} ranks" if world_size() > 1 else ""
            counts = f"{len(data.train)} training, {len(data.val)} validation and {len(data.test)} test images"
            print(f"{data.name}: {counts}, {data.preprocessing}")
            print(f"{args.script}.py on {self.device}{ranks}, {args.precision}, in {self.dir}/")
            if not args.eval_only:
                print(f"stopped, it goes on by: {self.resume_command()}", flush=True)
        Run.current = self

    def _restore(self) -> None:
        state = load_checkpoint(self.dir / "last.pt")
        with reading(self.dir / "last.pt"):
            for name in ("model", "optimizer", "scheduler"):
                getattr(self, name).load_state_dict(state[name])
            self.epoch, self.best, self.history = state["epoch"], state["best"], state["history"]
            set_random_states(state["random"][rank()])
        for leftover in self.dir.glob(".*.tmp") if rank() == 0 else ():  # of a killed run
            leftover.unlink(missing_ok=True)

    def resume_command(self) -> str:
        """The command that goes on with the run."""
        launcher = f"torchrun --nproc-per-node {world_size()}" if world_size() > 1 else "python"
        return f"{launcher} {self.args.script}.py --resume {self.dir}"

    def batches(self) -> Iterator[Tensor]:
        """An epoch of this rank's training batches, under a progress bar that shows the images/s of all ranks."""
        args, images = self.args, self.data.train
        shuffle = stream_seed(args.seed, "shuffle", epoch=self.epoch)  # the same on all ranks
        start, done = time.perf_counter(), 0
        with progress(f"epoch {self.epoch + 1}/{args.epochs}", len(images)) as bar:
            for x in epoch_batches(images, args.batch_size, shuffle, args.flip):
                yield x
                done += len(x) * world_size()
                bar.update(len(x) * world_size())
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        self.speed = done / (time.perf_counter() - start)

    def log(self, parts: dict[str, Tensor], images: int) -> None:
        """Keep a step's losses, on the device."""
        self.logged.append(({name: part.detach() for name, part in parts.items()}, images))

    def means(self) -> dict[str, float]:
        """The image-weighted means over all ranks of what was logged since the last call. Raises UserError for NaN."""
        names = list(self.logged[0][0])
        values = torch.stack([torch.stack(list(parts.values())) for parts, _ in self.logged]).cpu().double()
        weights = torch.tensor([images for _, images in self.logged], dtype=torch.float64)
        self.logged = []
        if not values.isfinite().all():  # [steps, parts]
            step = int(values.isfinite().all(1).long().argmin())
            parts = ", ".join(f"{name} {value:g}" for name, value in zip(names, values[step].tolist(), strict=True))
            raise UserError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {step + 1} ({parts}): "
                f"lower --lr; {self.dir / 'last.pt'} is the last good checkpoint"
            )
        sums = torch.cat([(values * weights[:, None]).sum(0), weights.sum()[None]])
        if dist.is_initialized():
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True))

    def end_epoch(self, lr: float, train: dict[str, float], validation: dict[str, float]) -> None:
        """Count the epoch, keep its row of metrics.csv, print it, and write the checkpoints."""
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        self.epoch += 1
        row = {"epoch": self.epoch, "lr": lr}
        row |= {f"train_{name}": value for name, value in train.items()}
        row |= {f"val_{name}": value for name, value in validation.items()}
        self.history.append(row | {"seconds": seconds, "images_per_s": self.speed})
        if rank() == 0:
            left = (self.args.epochs - self.epoch) * statistics.median(row["seconds"] for row in self.history)
            print(
                f"epoch {self.epoch}/{self.args.epochs}  train {train['loss']:.5f}  validation {validation['loss']:.5f}"
                f"  lr {lr:.2g}  {self.speed:.0f} images/s  about {duration(left)} left",
                flush=True,
            )
        improved = validation["loss"] < self.best
        self.best = min(self.best, validation["loss"])
        self.save(improved)

    def save(self, improved: bool = True) -> None:
        """Write metrics.csv, best.pt if the epoch was the best, and last.pt, each atomically; last.pt, from which the
        others can be made again, comes last. All ranks wait until the files are there."""
        states = random_states(self.device)
        every = [states] * world_size()
        if dist.is_initialized():
            dist.all_gather_object(every, states)
        if rank() == 0:
            state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")}
            state |= {"epoch": self.epoch, "best": self.best, "history": self.history}
            state |= {"random": every, "args": vars(self.args)}

            def save(file) -> None:
                torch.save(state, file.name)  # by name: an interrupt in a write to `file` would be a RuntimeError

            if self.history:
                write_file(self.dir / "metrics.csv", csv_text(self.history))
            if improved:
                write_file(self.dir / "best.pt", save)
            write_file(self.dir / "last.pt", save)
        if dist.is_initialized():
            dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Own images: folders and arrays

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SPLIT_SETS = (["train"], ["test", "train"], ["test", "train", "val"])  # what may be given; the rest is held out
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # of folders by name


def own_name(path: str) -> str:
    """What a folder or file of images is called in a run's name and results."""
    array = Path(path).suffix in (".npy", ".npz")
    return f"array-{Path(path).stem}" if array else f"folder-{Path(path).name}"


def read_folder(root: Path, data_dir: Path, size: int) -> dict[str, Tensor]:
    """The images below a folder as `train`, or by its folders train/ val/ test/: uint8 [N,3,size,size] each.

    Raises UserError if some would be left out or pooled.
    """
    files = image_files(root)
    folders = sorted(child.name for child in root.iterdir() if child.is_dir() and child.name.lower() in SPLITS)
    splits = {SPLITS[name.lower()]: [file for file in files if file.is_relative_to(root / name)] for name in folders}
    whole = sorted(splits) in SPLIT_SETS and all(splits.values()) and len(splits) == len(folders)
    if folders and not whole:
        found = " and ".join(f"{name}/" for name in folders)
        raise UserError(f"{root}/ has {found}: give images in train/ val/ test/, train/ test/, train/, or none of them")
    outside = set(files).difference(*splits.values()) if folders else ()
    if outside:
        raise UserError(f"{min(outside)} lies beside {'/ '.join(folders)}/ and would not be used: move or remove it")
    splits = splits or {"train": files}
    return dict(zip(splits, decode_images(list(splits.values()), size, data_dir), strict=True))


def read_arrays(file: Path) -> dict[str, Tensor]:
    """The images of an .npy, or of an .npz with `train`, or `train` and `test`, or all three: uint8 [N,C,H,W] each.

    Arrays are uint8, or float in [0,1], [N,H,W], [N,H,W,C] or [N,C,H,W] with C = 1 or 3. Raises UserError.
    """
    with reading(file):
        loaded = np.load(file, allow_pickle=False)
        arrays = {"train": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    if sorted(arrays) not in SPLIT_SETS:
        names = ", ".join(arrays)
        raise UserError(f"{file} has the arrays {names}: name them train, train and test, or train, val, test")
    for name, a in arrays.items():
        a = a[..., None] if a.ndim == 3 else a
        first, last = (a.ndim == 4 and a.shape[axis] in (1, 3) for axis in (1, 3))
        numbers = a.dtype.kind in "iuf" and a.size
        if a.dtype.kind == "f" and numbers and a.min() >= 0 and a.max() <= 1:
            a = (a * 255).round().astype(np.uint8)
        if a.dtype != np.uint8 or first == last:
            found = f"{a.dtype} {list(arrays[name].shape)}" + (f" from {a.min()} to {a.max()}" if numbers else "")
            needed = "uint8, or float in [0,1], [N,H,W], [N,H,W,C] or [N,C,H,W] with C = 1 or 3"
            either = "; both are possible: let H and W be above 3" if first and last else ""
            raise UserError(f"{file}: {name} is {found}, but must be {needed}{either}")
        arrays[name] = torch.from_numpy(np.ascontiguousarray(a if first else a.transpose(0, 3, 1, 2)))
    if len({images.shape[1] for images in arrays.values()}) > 1:
        raise UserError(f"{file}: some arrays are grey, others have three channels")
    return arrays


def hold_out(images: dict[str, Tensor], source: str | Path) -> list[Tensor]:
    """Training, validation and test images; those not given are held out by a fixed split, the same on every machine.

    Raises UserError if there are too few.
    """
    train = images["train"]
    if "val" not in images:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
        held_out = len(train) // 5
        if "test" in images:
            images["val"], images["train"] = train.tensor_split([min(held_out, len(images["test"]))])
        else:
            images["val"], images["test"], images["train"] = train.tensor_split([held_out // 2, held_out])
    if min(len(split) for split in images.values()) == 0:
        raise UserError(f"{source}: {len(train)} images are too few to hold out validation and test images")
    return [images[name] for name in ("train", "val", "test")]


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, links followed, sorted by name, hidden ones left out.

    Raises UserError if there are none, a folder cannot be read, or is there twice through a link.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    found, seen = [], set()
    for top, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        state = os.stat(top)
        if (state.st_dev, state.st_ino) in seen:
            raise UserError(f"{top}/ is a link to a folder that is there already: remove it")
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(top, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES)
    others = sorted(set(found).difference(files))
    if not files and any(file.suffix in (".parquet", ".arrow") for file in others):
        raise UserError(f"{folder}/ has tables, not images: save their images as .npz (README, Data)")
    if not files:
        raise UserError(f"{folder}/ has no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    if others and rank() == 0:
        print(f"{folder}/: left out {len(others)} files that are no images by name, as {others[0]}", file=sys.stderr)
    return files


def read_image(file: Path) -> Tensor:
    """One image file of any mode as RGB uint8 [3,H,W]; transparency over white. Raises UserError naming the file."""
    from PIL import Image, ImageOps

    with reading(file):
        image = ImageOps.exif_transpose(Image.open(file))
        if image.mode.startswith("I"):  # 16 bits a pixel: PIL would clip to 8
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def decode_images(splits: list[list[Path]], size: int, data_dir: Path, crop: int = 0) -> list[Tensor]:
    """Splits of image files, centre-cropped (to `crop` pixels, or to a square) and resized: uint8 [N,3,size,size] each.

    They are decoded once, into a file below data_dir/decoded/ that is named after the files' names, sizes, times and
    the preprocessing, and memory-mapped ever after. Raises UserError naming the file that cannot be read.
    """
    files = [file for split in splits for file in split]
    top, known = os.path.commonpath([file.parent for file in files]), []
    for file in files:
        with reading(file):
            state = file.stat()
            known.append((os.path.relpath(file, top), state.st_size, state.st_mtime_ns))
    key = hashlib.sha256(repr((known, size, crop)).encode()).hexdigest()[:16]
    cache = data_dir / "decoded" / f"{Path(top).resolve().name[:40]}-{size}-{key}.npy"
    try:
        images = np.load(cache, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # not there, or damaged
        images = np.empty(0, np.uint8)
    if images.shape != (len(files), 3, size, size) or images.dtype != np.uint8:
        images = np.empty((len(files), 3, size, size), np.uint8)

        def decode(i: int) -> None:
            images[i] = crop_and_resize(read_image(files[i]), size, crop)

        with ThreadPoolExecutor() as pool, progress("decoding images", len(files)) as bar:
            for _ in pool.map(decode, range(len(files))):
                bar.update()
        try:
            write_file(cache, lambda file: np.save(file, images))
        except UserError as error:
            print(f"the decoded images are not kept for the next time: {error}", file=sys.stderr)
    return list(torch.from_numpy(images).split([len(split) for split in splits]))
