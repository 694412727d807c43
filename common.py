"""What the six scripts share: sigma points, posterior terms, nets, data sets, and the plumbing of a run.

    python common.py runs/        # one Markdown table of every results.json below runs/

The first half is the method and the nets, the second half is plumbing that teaches nothing. Equation, table and
appendix numbers are those of the paper: Janjoš, Rosenbaum, Dolgov, Zöllner, "Unscented Autoencoder", ICML 2023.

Axes: B batch, K samples or sigma points, M = B·K decoded points, n latent dimension, [C,H,W] image.
`scale` is the square root of the covariance Σ: standard deviations [B,n] (diagonal) or a lower-triangular L [B,n,n]
(full), Σ = L Lᵀ.
"""

import argparse
import csv
import ctypes
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
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
        diagonal = scale.square() if scale.dim() == 2 else scale.square().sum(-1)  # Σ_ii [B,n]
        score = diagonal if heuristic == "largest" else torch.rand(B, n, device=mu.device, generator=generator)
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


def largest_variance(scale: Tensor) -> Tensor:
    """λ_max(Σ), taken as the largest diagonal entry of Σ (below Eq. 12; exact for a diagonal Σ): -> [B]."""
    return (scale.square() if scale.dim() == 2 else scale.square().sum(-1)).amax(1)


def gradient_penalty(
    decoder: nn.Module, mu: Tensor, generator: torch.Generator | None = None, fold: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Unbiased one-draw estimate of the squared Frobenius norm of the decoder's Jacobian at mu (Eq. 12, 16).

    mu [B,n] -> [B]. With this file's `Decoder` it is E‖J u‖², u ~ N(0, I) over latents, by `Decoder.jvp` (README,
    Speed). With `stock`, or any other decoder, it is E‖Jᵀ v‖² (Hutchinson), v = ±1 over pixels, by double backward.
    Batch norm uses its running statistics and leaves them alone, so J is the Jacobian of a single image's decoding.
    Works under no_grad too.
    """
    create_graph = torch.is_grad_enabled()
    with eval_mode(decoder):
        if isinstance(decoder, Decoder) and not decoder.stock:
            u = torch.randn(mu.shape, device=mu.device, dtype=mu.dtype, generator=generator)
            return decoder.jvp(mu, u, fold).square().sum((1, 2, 3))
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            mu = mu if mu.requires_grad else mu.detach().requires_grad_()
            images = decoder(mu)
            v = torch.rand(images.shape, device=mu.device, generator=generator).lt(0.5).to(images.dtype) * 2 - 1
            (gradient,) = torch.autograd.grad(images, mu, v, create_graph=create_graph)  # Jᵀ v [B,n]
        return gradient.square().sum(1)


def slerp(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Spherical interpolation between a and b [...,n] (Appendix A); linear where they are (anti)parallel."""
    cosine = F.cosine_similarity(a, b, dim=-1).clamp(-1, 1).unsqueeze(-1)
    omega, sine = cosine.acos(), (1 - cosine.square()).sqrt()
    spherical = (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / sine.clamp_min(1e-6)
    return torch.where(sine > 1e-4, spherical, (1 - t) * a + t * b)


# ---------------------------------------------------------------------------------------------------------------------
# Nets (Table 4)


def channels_at(width: float, *channels: int) -> list[int]:
    """Hidden channels at a width multiplier, never fewer than 1."""
    return [max(1, round(width * c)) for c in channels]


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
        hidden = channels_at(width, 32, 64, 128, 256, 512, 1024)
        layers = []
        for c_in, c_out in zip([channels, *hidden], hidden, strict=False):
            convolution = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)  # batch norm has the bias
            layers += [convolution, nn.BatchNorm2d(c_out), nn.LeakyReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.features = hidden[-1] * math.ceil(image_size / 64) ** 2

    def forward(self, x: Tensor) -> Tensor:
        with precision(self, x):
            return self.layers(x).flatten(1).to(x.dtype)  # the heads and losses stay in float32


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
    same up to rounding. `stock = True` switches this off, and `jvp` in the gradient penalty.
    """

    bf16 = False
    stock = False

    def __init__(self, latent_dim: int, channels: int, image_size: int, width: float = 1.0) -> None:
        super().__init__()
        check_image_size(image_size)
        stages = 2 if image_size == 32 else 3
        hidden = channels_at(width, 1024, 512, 256, 128)[: stages + 1]
        self.linear = nn.Linear(latent_dim, hidden[0] * 8 * 8)
        self.first = nn.ConvTranspose2d(hidden[0], hidden[1], 4, stride=2, padding=1, bias=False)
        layers = [nn.BatchNorm2d(hidden[1]), nn.LeakyReLU(inplace=True)]
        for c_in, c_out in itertools.pairwise(hidden[1:]):
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c_out), nn.LeakyReLU(inplace=True)]
        self.rest = nn.Sequential(*layers, nn.ConvTranspose2d(hidden[-1], channels, 3, padding=1))

    def fold(self, points: int) -> tuple[Tensor, Tensor] | None:
        """A [n, 16·16·hidden] and a [16·16·hidden] of the affine map, or None where `points` are too few to pay."""
        if self.stock or points <= self.linear.in_features + 1:
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
            fold = self.fold(len(z)) if fold is None else fold
            return torch.tanh(self.rest(self.affine(z, fold)).to(z.dtype))

    def jvp(self, z: Tensor, u: Tensor, fold: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """J(z) u [M,C,H,W] for u [M,n], J the Jacobian at z (forward-mode differentiation); in evaluation mode only.

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
            fold = self.fold(2 * len(z)) if fold is None else fold
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

# Defaults of flags that are not given, by data set (Appendix A, Table 2; those of digits and of folders are ours)
_PAPER = {"channels": 3, "image_size": 32, "width": 1.0, "epochs": 100, "sigma_points": "random", "flip": False}
DEFAULTS = {
    "digits": _PAPER | {"channels": 1, "latent_dim": 16, "width": 1 / 16, "epochs": 40},
    "fashion_mnist": _PAPER | {"channels": 1, "latent_dim": 64},
    "cifar10": _PAPER | {"latent_dim": 128, "sigma_points": "largest", "flip": True},
    "celeba": _PAPER | {"latent_dim": 64, "image_size": 64},
    "folder": _PAPER | {"latent_dim": 128},
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
CELEBA_SPLITS = {"train": 162770, "val": 19867, "test": 19962}  # in the order of the file names


@dataclass(frozen=True)
class Dataset:
    """Three uint8 tensors [N,C,H,W] on one device, and the defaults that the paper has for this data set."""

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    latent_dim: int
    flip: bool  # random horizontal flip in training
    width: float
    epochs: int
    sigma_points: str
    preprocessing: str  # in words, for results.json and the key of cached statistics


def defaults_of(name: str, image_size: int | None = None) -> dict:
    """The defaults of a data set by name; any other name must be a folder of images. Raises UserError."""
    if name in DEFAULTS and name != "folder":
        return DEFAULTS[name]
    if not Path(name).is_dir():
        known = ", ".join(sorted(DEFAULTS.keys() - {"folder"}))
        raise UserError(f"--dataset {name!r} is neither one of {known} nor a folder that is there")
    return DEFAULTS["folder"] | ({"latent_dim": DEFAULTS["celeba"]["latent_dim"]} if image_size == 64 else {})


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    device: str | torch.device = "cpu",
    image_size: int | None = None,
    limit_train: int | None = None,
) -> Dataset:
    """Load `digits`, `fashion_mnist`, `cifar10`, `celeba`, or a folder of images, as uint8 on `device`.

    image_size (32 or 64) resizes to another size than the data set's own; limit_train keeps the first training images.
    Raises UserError, with what to put where, if anything is missing or cannot be read.
    """
    defaults = defaults_of(name, image_size)
    size = image_size or defaults["image_size"]
    loaders = {"digits": _digits, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10, "celeba": _celeba}
    if name in loaders:
        splits, preprocessing = loaders[name](Path(data_dir))
        if splits[0].shape[-1] != size:
            splits = [image_ops.resize(split, [size, size], antialias=True) for split in splits]
            preprocessing += f", resized to {size}"
    else:
        splits, preprocessing = _folder(Path(name), size)
    train, val, test = splits
    return Dataset(
        name=name if name in loaders else f"folder-{Path(name).resolve().name}",
        train=train[:limit_train].to(device),
        val=val.to(device),
        test=test.to(device),
        preprocessing=preprocessing,
        **{key: defaults[key] for key in ("latent_dim", "flip", "width", "epochs", "sigma_points")},
    )


def load_data(args: argparse.Namespace, device: torch.device) -> Dataset:
    """The data set of a run's arguments, rank 0 first. Raises UserError if it has too few images for a batch."""
    with rank_zero_first():
        data = load_dataset(args.dataset, args.data_dir, device, args.image_size, args.limit_train)
    if len(data.train) < args.batch_size * world_size():
        ranks = f" on each of {world_size()} ranks" if world_size() > 1 else ""
        raise UserError(f"--batch-size {args.batch_size}{ranks}: there are only {len(data.train)} training images")
    if len(data.val) < world_size():
        raise UserError(f"{len(data.val)} validation images are too few for {world_size()} ranks")
    return data


def _digits(_data_dir: Path) -> tuple[list[Tensor], str]:
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16  # [1797,1,8,8] in [0,1]
    images = F.interpolate(images, size=(32, 32), mode="bilinear").mul(255).round().to(torch.uint8)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]  # they come by writer
    return list(images.split([1197, 300, 300])), "8x8 to 32x32 bilinear"


def _fashion_mnist(data_dir: Path) -> tuple[list[Tensor], str]:
    train, test = _torchvision("FashionMNIST", data_dir, "the four *-ubyte.gz files", data_dir / "FashionMNIST" / "raw")
    images = [torch.as_tensor(split.data).unsqueeze(1) for split in (train, test)]
    train, test = (image_ops.resize(split, [32, 32], antialias=True) for split in images)
    validation = len(train) // 6  # 50k + 10k of the 60k
    return [train[:-validation], train[-validation:], test], "28x28 to 32x32 bilinear antialiased"


def _cifar10(data_dir: Path) -> tuple[list[Tensor], str]:
    train, test = _torchvision("CIFAR10", data_dir, "cifar-10-python.tar.gz", data_dir)
    train, test = (torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in (train, test))
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot get {name} ({reason}): check the network, or put {files} into {place}/") from None


def _celeba(data_dir: Path) -> tuple[list[Tensor], str]:
    root, n = data_dir / "celeba", CELEBA_SPLITS
    folder, partition = root / "img_align_celeba", root / "list_eval_partition.txt"
    if not folder.is_dir():
        raise UserError(f"CelebA is not in {root}/: put the folder img_align_celeba/ and list_eval_partition.txt there")
    if partition.is_file():
        splits = [[], [], []]
        for line in partition.read_text().splitlines():
            file, _, split = line.strip().rpartition(" ")
            if split not in ("0", "1", "2") or not file:
                raise UserError(f"{partition}: {line!r} is not '<file name> <0|1|2>'")
            splits[int(split)].append(folder / file.strip())
    else:
        files = sorted(folder.glob("*.jpg"))
        if len(files) != sum(n.values()):
            raise UserError(
                f"{folder}/ has {len(files)} of the {sum(n.values())} images: complete it, or add {partition}"
            )
        splits = [files[: n["train"]], files[n["train"] : -n["test"]], files[-n["test"] :]]
    missing = [file for split in splits for file in split if not file.is_file()]
    if missing or not all(splits):
        what = f"{len(missing)} files are missing, the first is {missing[0]}" if missing else "an empty split"
        raise UserError(f"CelebA by {partition}: {what}")
    files = [file for split in splits for file in split]
    key = hashlib.sha256("/".join(["148 to 64", *(file.name for file in files)]).encode()).hexdigest()
    images = decode_images(files, 64, crop=148, cache=root / "celeba-64.npy", key=key)
    return list(images.split([len(split) for split in splits])), "centre crop 148, resized to 64 bilinear antialiased"


SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # folder: split


def _folder(root: Path, size: int) -> tuple[list[Tensor], str]:
    files = image_files(root)
    folders = sorted(child.name for child in root.iterdir() if child.is_dir())
    given = {folder: SPLITS[folder.lower()] for folder in folders if folder.lower() in SPLITS}
    splits = {split: [] for split in given.values()}
    if not given:
        splits["train"] = files
    elif sorted(splits) not in (["train"], ["test", "train"], ["test", "train", "val"]) or len(splits) < len(given):
        found = " and ".join(f"{folder}/" for folder in given)
        raise UserError(f"{root}/ has {found}: give train/ val/ test/, train/ test/, train/, or none of these")
    for file in files if given else ():
        folder = file.relative_to(root).parts[0]
        if folder not in given:
            where = f"{file} lies" if file.parent == root else f"the images in {root / folder}/ lie"
            raise UserError(f"{where} beside {'/, '.join(given)}/ and would not be used: move them")
        splits[given[folder]].append(file)
    for folder, split in given.items():
        if not splits[split]:
            raise UserError(f"{root / folder}/ has no images")
    images = {split: decode_images(files, size) for split, files in splits.items()}
    shuffle = torch.randperm(len(images["train"]), generator=torch.Generator().manual_seed(0))
    if "val" not in images:  # a fixed split, the same on every machine, for files of the same names
        train = images["train"][shuffle]
        held_out = len(train) // 5
        if "test" in images:
            held_out = min(held_out, len(images["test"]))
            images["train"], images["val"] = train[held_out:], train[:held_out]
        else:
            images["val"], images["test"], images["train"] = train.tensor_split([held_out // 2, held_out])
    if min(len(split) for split in images.values()) == 0:
        raise UserError(f"{root}/: {len(shuffle)} images are too few to hold out validation and test images")
    return [images[name] for name in ("train", "val", "test")], f"centre crop, resized to {size} bilinear antialiased"


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, sorted by name. Raises UserError if there are none or a folder cannot be read."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    found = []
    for top, _, files in os.walk(folder, onerror=fail, followlinks=True):
        if any(os.path.samefile(top, parent) for parent in Path(top).parents if parent.is_relative_to(folder)):
            raise UserError(f"{top} is a symbolic link to a folder above it: remove it")
        found += [Path(top, file) for file in files]
    others = [file for file in found if file.suffix.lower() not in IMAGE_SUFFIXES]
    if others and rank() == 0:
        print(f"{folder}/: left out {len(others)} files that are no images by name, as {others[0]}", file=sys.stderr)
    files = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))
    if not files:
        raise UserError(f"{folder}/ has no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def read_image(file: Path) -> Tensor:
    """One image file of any mode as RGB uint8 [3,H,W]; transparency over white. Raises UserError naming the file."""
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(Image.open(file))
        if image.mode.startswith("I"):  # 16 bits a pixel: PIL would clip to 8
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {file}: {error or type(error).__name__}") from None


def decode_images(files: list[Path], size: int, crop: int = 0, cache: Path | None = None, key: str = "") -> Tensor:
    """Image files, centre-cropped (to `crop` pixels, or to a square) and resized: uint8 [N,3,size,size].

    With `cache` the array is written there once, beside its `key`, and memory-mapped ever after; an incomplete or
    foreign cache file is decoded anew. Raises UserError naming the file that cannot be read or written.
    """
    shape = (len(files), 3, size, size)
    header = cache and cache.with_suffix(".json")
    if cache and cache.is_file():
        try:
            images = np.load(cache, mmap_mode="c", allow_pickle=False)
            if images.shape == shape and images.dtype == np.uint8 and header.read_text() == key:
                return torch.from_numpy(images)
        except (OSError, ValueError, EOFError):
            pass  # half-written or not ours: decode anew

    images = np.empty(shape, np.uint8)

    def decode(i: int) -> None:
        image = read_image(files[i])
        image = image_ops.center_crop(image, [crop or min(image.shape[1:])] * 2)
        images[i] = image_ops.resize(image, [size, size], antialias=True)

    with ThreadPoolExecutor() as pool, tqdm(total=len(files), desc="decoding images", disable=rank() > 0) as bar:
        for _ in pool.map(decode, range(len(files))):
            bar.update()
    if cache:
        write_file(cache, lambda file: np.save(file, images))
        write_file(header, key)
    return torch.from_numpy(images)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1,1], the range of the decoder's tanh."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1,1] -> uint8, rounded and clamped as an 8-bit image file would be."""
    return ((images + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def epoch_batches(images: Tensor, batch_size: int, seed: int, flip: bool = False):
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


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and errors

CHANGEABLE = {"epochs", "device", "data_dir", "fid", "fid_method", "compile", "resume", "eval_only"}  # on a saved run
UNNAMED = CHANGEABLE - {"epochs"} | {"dataset", "out", "seed", "benchmark"}  # flags that are not in a folder's name


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An argparse type: a finite int or float in [low, high], or in (low, high] with `above`."""

    def parse(text: str):
        try:
            value = kind(text)
            good = math.isfinite(value) and low <= value <= high and not (above and value == low)
        except (ValueError, OverflowError):
            good = False
        if not good:
            limits = f"{'above' if above else 'of at least'} {low:g}" + (
                f", at most {high:g}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number {limits}")
        return value

    return parse


def argument_parser(script: str, description: str, beta: float = 2.5e-4, beta_flags=("--beta",)) -> Parser:
    """The flags that every script has; `script` is its __file__, beta the default weight of its latent term."""
    parser = Parser(prog=Path(script).name, description=description, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    by_data = "default: by data set"
    add("--dataset", default="digits", help="digits, fashion_mnist, cifar10, celeba, or a folder of images")
    add("--data-dir", default="data", help="where data sets are looked for, downloaded to and cached")
    add("--image-size", type=int, choices=(32, 64), help=f"pixels, height and width ({by_data})")
    add("--limit-train", type=number(int, 1), help="use only this many training images")
    add("--out", default="runs", help="folder that gets one folder for each run")
    add("--epochs", type=number(int, 0), help=f"passes over the training images; 0: the untrained net ({by_data})")
    add("--batch-size", type=number(int, 2), default=64, help="images a step (on each rank, under torchrun)")
    add("--lr", type=number(float, 0, 10, above=True), default=0.005, help="Adam's first learning rate")
    add(*beta_flags, dest="beta", type=number(float, 0), default=beta, help="weight of the latent term")
    add("--latent-dim", type=number(int, 2, 4096), help=f"n, dimensions of the latent space ({by_data})")
    add("--width", type=number(float, 0, 8, above=True), help=f"multiplies all hidden channels ({by_data})")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of weights, shuffling, noise and evaluation")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu; auto: the first that is there")
    add(
        "--precision",
        choices=("fp32", "tf32", "bf16"),
        help="of the nets (default: bf16 on CUDA that has it, else fp32)",
    )
    add("--compile", action="store_true", help="torch.compile the nets")
    add("--stock", action="store_true", help="without this code's exact speed-ups, to compare with (README, Speed)")
    add(
        "--fid",
        help="features: imagenet, tf, digits, none, or a state dict on disk (default: digits on digits, else imagenet)",
    )
    add("--fid-method", choices=("sqrtm", "eigh"), default="sqrtm", help="matrix square root of the Fréchet distance")
    add(
        "--resume",
        metavar="DIR",
        help="continue the run in this folder, with its arguments; auto: the unfinished run of these arguments below "
        "--out if there is one, else start",
    )
    add("--eval-only", metavar="DIR", help="evaluate the best checkpoint of the run in this folder")
    add(
        "--benchmark",
        type=number(int, 1),
        metavar="STEPS",
        help="time this many steps on random images; trains nothing",
    )
    return parser


def parse_args(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, fill in the data set's defaults, read back a saved run's arguments. Raises UserError or exits with 2."""
    args = parser.parse_args(argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args), parser))
    given = {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value is not parser}
    if args.dataset not in DEFAULTS:  # a folder, to be found from anywhere
        args.dataset = str(Path(args.dataset).resolve())
        given |= {"dataset": args.dataset} if "dataset" in given else {}
    args.script = Path(parser.prog).stem
    if args.resume and args.eval_only:
        raise UserError("--resume and --eval-only: give one of the two")
    automatic = args.resume == "auto"
    if automatic:
        args.resume = None
    folder = args.resume or args.eval_only
    if folder:
        saved = load_json(Path(folder) / "args.json")
        if saved.get("script") != args.script:
            raise UserError(f"{folder} is a run of {saved.get('script')}.py, not of {args.script}.py")
        changeable = CHANGEABLE | ({"precision"} if args.eval_only else set())
        changed = [name for name in given if name not in changeable and given[name] != saved.get(name)]
        if changed:
            differ = ", ".join(f"--{n.replace('_', '-')} is {saved.get(n)!r}, not {given[n]!r}" for n in changed)
            raise UserError(f"{folder} cannot go on with other arguments: {differ}")
        vars(args).update(saved)
        vars(args).update({name: given.get(name) for name in ("resume", "eval_only")})
        vars(args).update({name: given[name] for name in given.keys() & changeable})
        if args.eval_only and "epochs" in given:
            raise UserError(f"--epochs {args.epochs} changes nothing with --eval-only: use --resume {folder}")
    else:
        defaults = defaults_of(args.dataset, args.image_size)
        has_digits = args.dataset == "digits" and args.image_size in (None, 32)
        defaults = defaults | {"fid": "digits" if has_digits else "imagenet"}
        for name, value in defaults.items():
            if getattr(args, name, None) is None and (name != "sigma_points" or hasattr(args, name)):
                setattr(args, name, value)
        named = [f"{n.replace('_', '')}{'' if v is True else v}" for n, v in given.items() if n not in UNNAMED]
        data = args.dataset if args.dataset in DEFAULTS else f"folder-{Path(args.dataset).name}"
        args.name = "-".join([args.script, data, *named, f"seed{args.seed}"]).replace("/", "_")[:150]
    device = resolve_device(args.device)
    if args.precision is None:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if native else "fp32"
    if args.precision == "tf32" and device.type != "cuda" or args.precision == "bf16" and device.type == "mps":
        raise UserError(f"--precision {args.precision} does not exist on {device.type}: use fp32")
    if device.type == "mps" and "WORLD_SIZE" in os.environ:
        raise UserError("torchrun has no backend for MPS: add --device cpu, or start one process without torchrun")
    args.world_size = saved.get("world_size") if args.eval_only else int(os.environ.get("WORLD_SIZE", 1))
    if args.resume and args.world_size != saved.get("world_size"):
        raise UserError(f"{folder} ran on {saved.get('world_size')} ranks and cannot go on with {args.world_size}")
    if automatic and (folder := find_run(args)):
        return parse_args(parser, [*(sys.argv[1:] if argv is None else argv), "--resume", str(folder)])
    return args


def find_run(args: argparse.Namespace) -> Path | None:
    """The unfinished run of these arguments below --out, or None if there is none; exits with 0 if it is finished."""
    ignored = CHANGEABLE - {"epochs"} | {"out", "world_size"}
    finished = None
    for checkpoint in sorted(Path(args.out).glob("*/last.pt")):
        folder = checkpoint.parent
        saved = load_json(folder / "args.json") if (folder / "args.json").is_file() else {}
        if any(saved.get(name) != value for name, value in vars(args).items() if name not in ignored):
            continue
        results = load_json(folder / "results.json") if (folder / "results.json").is_file() else None
        if not results or results["args"]["epochs"] < args.epochs:
            return folder
        finished = folder
    if finished:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"this run is finished: {finished}/results.json")
        sys.exit(0)
    return None


def resolve_device(name: str) -> torch.device:
    """The device by name; `auto` is CUDA, else Apple's MPS, else the CPU. Raises UserError if it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    try:
        device = torch.device(("cuda" if cuda else "mps" if mps else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device: choose auto, cuda, mps or cpu") from None
    here = {"cuda": cuda and (device.index or 0) < torch.cuda.device_count(), "mps": mps, "cpu": True}
    if not here.get(device.type):
        raise UserError(f"--device {name}: there is none on this machine, choose auto or cpu")
    return device


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send before they kill."""


def cli(main) -> None:
    """Run a script's main: a user's mistake is one line and exit code 2; Ctrl-C (130) and SIGTERM (143) tell how to go
    on."""

    def terminate(_signal, _frame) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        who = f"{Path(sys.argv[0]).name}{f' (rank {rank()})' if rank() else ''}"
        print(f"{who}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        run = Run.current
        if run and rank() == 0:
            print(f"\nstopped; the last checkpoint is {run.dir / 'last.pt'}", file=sys.stderr)
            print(f"go on with: {run.resume_command()}", file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)


def load_json(path: Path) -> dict:
    """A JSON object from a file. Raises UserError naming the file."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        reason = "not a JSON object"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
    raise UserError(f"cannot read {path}: {reason}")


def write_file(path: Path, content) -> None:
    """Replace a file atomically by text, bytes, or what `content(file)` writes. On UserError the old file stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks (torchrun), device, precision


def rank() -> int:
    """This process's number under torchrun, else 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes torchrun started, else 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(args: argparse.Namespace) -> torch.device:
    """Join the other ranks under torchrun, set precision and seed, return this rank's device."""
    device = resolve_device(args.device)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cpu" and not args.stock:
        keep_memory()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if ranks > 1 else device.index or 0)
        torch.cuda.set_device(device)
    if ranks > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # as long as a slow download may take
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.manual_seed(stream_seed(args.seed, "weights"))
    return device


def keep_memory() -> None:
    """On Linux, make the process keep the memory that it frees, in huge pages.

    By default glibc gives every large block back to the system, and each step pays again for clearing its gigabytes of
    activations page by page (README, Speed).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch when it makes its first tensor
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never given back


STREAMS = ("weights", "noise", "shuffle", "validation", "mixture", "pairs")


def stream_seed(seed: int, purpose: str, rank: int = 0, epoch: int = 0) -> int:
    """The seed of a run's random stream for one of STREAMS: other arguments give an independent stream."""
    return int(np.random.SeedSequence([seed, STREAMS.index(purpose), rank, epoch]).generate_state(1)[0])


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


def gather(x: Tensor) -> Tensor:
    """In training the rows of x [B,...] of all ranks, [B·ranks,...], differentiable; elsewhere x itself."""
    if world_size() == 1 or not torch.is_grad_enabled():
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


def prepare(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Move a model to the device, alike on all ranks, with the precision, memory format and compilation asked for."""
    model.to(device)
    if world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    model.to(memory_format=torch.contiguous_format if args.stock else torch.channels_last)
    for net in model.modules():
        if isinstance(net, Decoder):
            net.stock = args.stock
        if isinstance(net, Encoder | Decoder):
            net.bf16 = args.precision == "bf16"  # the nets only: heads, posterior terms and losses stay in float32
            if args.compile:
                net.compile()
    torch.manual_seed(stream_seed(args.seed, "noise", rank()))  # from here on each rank has its own
    return model


# ---------------------------------------------------------------------------------------------------------------------
# A run: its folder, its checkpoints, its metrics


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


def validation_batches(images: Tensor, batch_size: int):
    """This rank's part of the images in float batches, in order, the last short one included."""
    for batch in images[rank() :: world_size()].split(batch_size):
        yield to_float(batch)


class Run:
    """A run's folder: arguments, checkpoints (`last.pt`, `best.pt`), `metrics.csv`, and the meters between them."""

    current = None  # the run that Ctrl-C stops

    def __init__(self, args, model, optimizer, scheduler, data: Dataset, device) -> None:
        self.args, self.model, self.optimizer, self.scheduler, self.device = args, model, optimizer, scheduler, device
        self.epoch, self.best, self.history = 0, math.inf, []  # epochs done, best validation loss, rows of metrics.csv
        self.bar, self.names, self.pending, self.logged = None, [], [], []
        folder = args.resume or args.eval_only
        self.dir = Path(folder) if folder else Path(from_rank_zero(self._new_folder))
        if args.resume:
            for leftover in self.dir.glob(".*.tmp") if rank() == 0 else ():  # of a killed run
                leftover.unlink(missing_ok=True)
            self.load(self.dir / "last.pt", self._restore)
        if rank() == 0 and not args.eval_only:
            write_file(self.dir / "args.json", json.dumps(vars(args), indent=1))
        Run.current = self
        if self.epoch == 0 and not args.eval_only:
            self.save()  # from here on there is always a checkpoint to resume from
        if rank() == 0:
            counts = f"{len(data.train)} training, {len(data.val)} validation and {len(data.test)} test images"
            ranks = f" on {world_size()} ranks" if world_size() > 1 else ""
            print(f"{data.name}: {counts}, {data.preprocessing}")
            print(f"{args.script}.py on {device}{ranks}, {args.precision}, in {self.dir}/")
            if not args.eval_only:
                print(f"stopped, it goes on by: {self.resume_command()}", flush=True)

    def resume_command(self) -> str:
        launcher = f"torchrun --nproc-per-node {world_size()}" if world_size() > 1 else "python"
        return f"{launcher} {self.args.script}.py --resume {self.dir}"

    def _new_folder(self) -> str:
        for copy in range(1, 1000):
            folder = Path(self.args.out) / (self.args.name + (f"-{copy}" if copy > 1 else ""))
            try:
                folder.mkdir(parents=True)
                return str(folder)
            except FileExistsError:
                if not folder.is_dir():
                    raise UserError(f"--out {self.args.out}: {folder} is in the way") from None
            except OSError as error:
                raise UserError(f"--out {self.args.out}: cannot make {folder}: {error.strerror}") from None
        raise UserError(f"--out {self.args.out}: there are 999 runs named {self.args.name}, remove some")

    def load(self, path: Path, restore) -> dict:
        """restore(checkpoint), loaded without executing code from it. Raises UserError naming the file."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            restore(state)
            return state
        except Exception as error:  # a damaged or foreign file raises almost anything
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(f"cannot load the checkpoint {path}: {reason}") from None

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.best, self.history = state["epoch"], state["best"], state["history"]
        set_random_states(state["random"][rank()])

    def load_best(self) -> dict:
        """Put the weights with the best validation loss into the model, return their checkpoint."""
        return self.load(self.dir / "best.pt", lambda state: self.model.load_state_dict(state["model"]))

    def batches(self, images: Tensor):
        """An epoch of training batches under a progress bar that shows the loss and the images/s of all ranks."""
        args, self.images, self.started = self.args, 0, time.perf_counter()
        self.flushed, self.lr = self.started, self.optimizer.param_groups[0]["lr"]
        description, total = f"epoch {self.epoch + 1}/{args.epochs}", len(images)
        with tqdm(total=total, desc=description, unit="img", disable=rank() > 0, leave=False) as self.bar:
            shuffle = stream_seed(args.seed, "shuffle", epoch=self.epoch)  # the same on all ranks
            for x in epoch_batches(images, args.batch_size, shuffle, args.flip):
                yield x
                self.last_batch = x
                self.images += len(x) * world_size()
                self.bar.update(len(x) * world_size())

    def log(self, parts: dict[str, Tensor], images: int) -> None:
        """Keep a step's losses on the device; about once a second fetch, show and check them for NaN and infinity."""
        self.names = list(parts)
        self.pending.append((torch.stack(list(parts.values())).detach(), images))
        if time.perf_counter() - self.flushed > 1:
            self._flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        values = torch.stack([value for value, _ in self.pending]).cpu().double()  # [steps, parts]
        finite = values.isfinite().all(1)
        if not finite.all():
            bad = int(finite.long().argmin())
            parts = ", ".join(f"{name} {v:g}" for name, v in zip(self.names, values[bad].tolist(), strict=True))
            raise UserError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {len(self.logged) + bad + 1} ({parts}): "
                f"lower --lr; {self.dir / 'last.pt'} is the last good checkpoint"
            )
        self.logged += [(value, images) for value, (_, images) in zip(values, self.pending, strict=True)]
        self.pending, self.flushed = [], time.perf_counter()
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{values[-1, 0].item():.5f}", refresh=False)

    def means(self) -> dict[str, float]:
        """The image-weighted means over all ranks of what was logged since the last call."""
        self._flush()
        weights = torch.tensor([images for _, images in self.logged], dtype=torch.float64)
        sums = torch.cat([(torch.stack([v for v, _ in self.logged]) * weights[:, None]).sum(0), weights.sum()[None]])
        sums = sums.float() if self.device.type == "mps" else sums
        if dist.is_initialized():
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        self.logged = []
        if self.bar is not None:  # the training part of the epoch is done
            self.bar, self.train_seconds = None, time.perf_counter() - self.started
        return dict(zip(self.names, (sums[:-1] / sums[-1]).tolist(), strict=True))

    def end_epoch(self, train: dict[str, float], validation: dict[str, float]) -> None:
        """Count the epoch, keep its row of metrics.csv, and write the checkpoints."""
        self.epoch += 1
        speed = self.images / self.train_seconds
        row = {"epoch": self.epoch, "lr": self.lr}  # the epoch's own rate
        row |= {f"train_{name}": value for name, value in train.items()}
        row |= {f"val_{name}": value for name, value in validation.items()}
        if getattr(self.args, "gradient_noise", False):
            row |= gradient_noise(self.model["encoder"], self.model["decoder"], self.last_batch, self.args.kappa)
        self.history.append(row | {"seconds": time.perf_counter() - self.started, "images_per_s": speed})
        if rank() == 0:
            tqdm.write(
                f"epoch {self.epoch:3d}  train {train['loss']:.5f}  validation {validation['loss']:.5f}"
                f"  lr {row['lr']:.2g}  {speed:.0f} images/s"
            )
        improved = validation["loss"] < self.best
        self.best = min(self.best, validation["loss"])
        self.save(improved)

    def save(self, improved: bool = True) -> None:
        """Write metrics.csv, best.pt if the epoch was the best, and last.pt, each atomically; last.pt, from which the
        others can be made again, comes last."""
        states = random_states(self.device)
        every = [states] * world_size()
        if dist.is_initialized():
            dist.all_gather_object(every, states)
        if rank() == 0:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "epoch": self.epoch,
                "best": self.best,
                "history": self.history,
                "random": every,
                "args": vars(self.args),
            }
            if self.history:
                write_file(self.dir / "metrics.csv", csv_text(self.history))
            if improved:
                write_file(self.dir / "best.pt", lambda file: torch.save(state, file))
            write_file(self.dir / "last.pt", lambda file: torch.save(state, file))
        if dist.is_initialized():
            dist.barrier()  # every rank reads best.pt next


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV, floats at full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation in batches, pictures, benchmark, table


def map_batches(function, inputs: Tensor, description: str, batch_size: int = 512) -> Tensor:
    """function(batch) over inputs [N,...] in inference mode: all outputs [N,...], on the CPU.

    Each rank does a part, and every rank gets the whole.
    """
    share = math.ceil(len(inputs) / world_size())
    mine = inputs[rank() * share : (rank() + 1) * share]
    outputs = []
    with (
        torch.inference_mode(),
        tqdm(total=len(mine), desc=description, unit="img", disable=rank() > 0, leave=False) as bar,
    ):
        for batch in mine.split(batch_size) if len(mine) else ():
            outputs.append(function(batch).cpu())
            bar.update(len(batch))
    if dist.is_initialized():
        every = [None] * world_size()
        dist.all_gather_object(every, outputs)
        outputs = [output for part in every for output in part]
    return torch.cat(outputs)


def gradient_noise(encoder: nn.Module, decoder: nn.Module, x: Tensor, kappa: float = 0.5) -> dict[str, float]:
    """Fig. 4: noise and bias of the decoder's gradients of ‖x - ½ Σ D(z_k)‖², x [B,C,H,W] (Appendix B, Eq. 21).

    Medians over the decoder's weights j: `pair_cv`, the coefficient of variation σ_j/|m_j| over 50 draws of one random
    pair of sigma points an image; `samples_cv`, the same over 200 draws of two random samples, whose mean m'_j stands
    for the true gradient; `gradient_bias`, |m_j - m'_j|/|m'_j|, which holds the sampling error of both means.
    `image_bias` is that of the mean decoded image, over its pixels. Both nets are in training mode for it, and are left
    as they were, as is the random stream.
    """
    nets = nn.ModuleList([encoder, decoder])
    states, buffers = random_states(x.device), [buffer.clone() for buffer in nets.buffers()]
    training = [net.training for net in nets]
    nets.train()
    with torch.no_grad():
        mu, scale = encoder(x)

    def moments(sampler, draws: int, **options) -> tuple[Tensor, Tensor, Tensor]:
        mean = squares = image = 0.0  # running mean, sum of squared deviations from it (Welford), mean decoded image
        for i in range(1, draws + 1):
            decoded = decoder(sampler(mu, scale, 2, **options).flatten(0, 1)).unflatten(0, (-1, 2)).mean(1)
            gradients = torch.autograd.grad((x - decoded).square().mean(), list(decoder.parameters()))
            gradient = torch.cat([g.flatten() for g in gradients])
            difference = gradient - mean
            mean = mean + difference / i
            squares = squares + difference * (gradient - mean)
            image = image + (decoded.detach() - image) / i
        return mean, (squares / (draws - 1)).sqrt(), image

    def median(a: Tensor, b: Tensor) -> float:
        return (a.abs() / b.abs()).nanmedian().item()  # 0/0 where a weight has no gradient

    m, deviation, image = moments(sample_sigma_points, 50, heuristic="pairs", kappa=kappa)
    true_m, true_deviation, true_image = moments(sample_gaussian, 200)
    for buffer, kept in zip(nets.buffers(), buffers, strict=True):
        buffer.copy_(kept)
    for net, mode in zip(nets, training, strict=True):
        net.train(mode)
    set_random_states(states)
    return {
        "pair_cv": median(deviation, m),
        "samples_cv": median(true_deviation, true_m),
        "gradient_bias": median(m - true_m, true_m),
        "image_bias": median(image - true_image, true_image),
    }


def save_grid(path: Path, images: Tensor, columns: int = 12) -> None:
    """uint8 images [N,C,H,W] as one PNG."""
    from torchvision.utils import save_image

    write_file(path, lambda file: save_image(images.float() / 255, file, format="png", nrow=columns, padding=1))


def save_curves(path: Path, history: list[dict]) -> None:
    """Curves of metrics.csv: a panel for each part of the loss (`train_loss`, `val_loss`), and for Fig. 4a and 4b."""
    from matplotlib.figure import Figure

    panels = {}
    for column in history[0]:
        if column not in ("epoch", "lr", "seconds", "images_per_s"):
            panels.setdefault(column.split("_", 1)[1], []).append(column)
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for (name, columns), axes in zip(panels.items(), figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for column in columns:
            axes.plot([row["epoch"] for row in history], [row[column] for row in history], label=column)
        axes.set(title=name, xlabel="epoch")
        axes.legend()
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=100))


def save_posterior(path: Path, mu: Tensor, variance: Tensor) -> None:
    """Fig. 5: histograms of |mean| (top) and variance (bottom) of 1000 posteriors, the first 16 dimensions."""
    from matplotlib.figure import Figure

    dimensions = min(16, mu.shape[1])
    figure = Figure(figsize=(1.4 * dimensions, 3.2), layout="constrained")
    axes = figure.subplots(2, dimensions, squeeze=False, sharey="row")
    for i in range(dimensions):
        axes[0, i].hist(mu[:1000, i].abs(), bins=30, color="tab:blue")
        axes[1, i].hist(variance[:1000, i], bins=30, range=(0, max(1.2, variance.max().item())), color="tab:orange")
        axes[0, i].set_title(f"z{i + 1}")
    axes[0, 0].set_ylabel("|mean|")
    axes[1, 0].set_ylabel("variance")
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=80))


def benchmark(train_step, model: nn.Module, args: argparse.Namespace, device: torch.device) -> dict:
    """Time `train_step(x)` on random images and print what it costs; nothing is trained that is kept."""
    import resource

    from torch.utils.flop_counter import FlopCounterMode

    def clock() -> float:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter()

    def timed(function, *inputs) -> float:
        start = clock()
        function(*inputs)
        return clock() - start

    def matmul_peak() -> float:  # FLOP/s of the best of a few products, in the precision of the nets
        side = 8192 if device.type == "cuda" else 2048
        a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if args.precision == "bf16" else None)
        image, kernel = a.view(1, 64, -1, side).permute(0, 3, 1, 2), a.view(side, side, 1, 1)
        times = [timed(torch.matmul, a, a) for _ in range(10)]
        times += [timed(F.conv2d, image, kernel) for _ in range(10)]  # the same product by the convolutions' library
        return 2 * side**3 / min(times)

    x = torch.rand(args.batch_size, args.channels, args.image_size, args.image_size, device=device) * 2 - 1
    peak = matmul_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        train_step(x)
    for _ in range(3):  # warm-up: memory, autotuning, compilation
        train_step(x)
    times = [timed(train_step, x) for _ in tqdm(range(args.benchmark), desc="steps", leave=False)]
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:  # of the process
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = max(peak, matmul_peak())
    seconds, flop, points = statistics.median(times), counter.get_total_flops(), args.batch_size * getattr(args, "k", 1)
    results = {
        "ms": seconds * 1e3,
        "images_per_s": args.batch_size / seconds,
        "points_per_s": points / seconds,
        "tflop": flop / 1e12,
        "peak_matmul_tflops": peak / 1e12,
        "memory_gib": memory / 2**30,
    }
    print(
        f"{args.script}.py{' --stock' if args.stock else ''} on {device}, {args.precision}, "
        f"{torch.get_num_threads()} CPU threads, width {args.width:g}: "
        f"{args.batch_size} images {list(x.shape[1:])}, {points} decoded points a step, {args.benchmark} steps\n"
        f"{results['images_per_s']:.2f} images/s, {results['points_per_s']:.1f} points/s, "
        f"{results['ms']:.1f} ms a step ({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f})\n"
        f"{flop / 1e12:.3f} TFLOP a step at {flop / seconds / 1e12:.3f} TFLOP/s, "
        f"{100 * flop / seconds / peak:.0f}% of the matrix product's {peak / 1e12:.3f}; "
        f"peak memory {results['memory_gib']:.2f} GiB"
    )
    return results | _benchmark_loader(args, device, clock)


def _benchmark_loader(args: argparse.Namespace, device: torch.device, clock) -> dict:
    """Images/s of `epoch_batches` and of a DataLoader with torchvision transforms that gives the same batches."""
    from torch.utils.data import DataLoader
    from torch.utils.data import Dataset as TorchDataset
    from torchvision.transforms import v2

    shape = (args.channels, args.image_size, args.image_size)
    images = torch.randint(0, 256, (max(20_000, args.batch_size), *shape), dtype=torch.uint8)
    transform = [v2.RandomHorizontalFlip()] if args.flip else []
    transform += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
    transform = v2.Compose(transform)

    class Images(TorchDataset):  # PIL images, as torchvision's data sets give them
        def __len__(self) -> int:
            return 20 * args.batch_size

        def __getitem__(self, index: int) -> Tensor:
            return transform(image_ops.to_pil_image(images[index % len(images)]))

    def rate(batches) -> float:
        start, count = clock(), 0
        for x in batches:
            count += len(x.to(device))
        return count / (clock() - start)

    resident, ours, theirs = images.to(device), [], []
    for seed in range(5):  # in alternation
        ours.append(rate(epoch_batches(resident, args.batch_size, seed, args.flip)))
        theirs.append(rate(DataLoader(Images(), args.batch_size, shuffle=True, drop_last=True)))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"loader {a:.0f} images/s; DataLoader without workers, same output, {b:.0f} images/s; ratio {ratio:.0f}")
    return {"loader_images_per_s": a, "dataloader_images_per_s": b, "loader_ratio": ratio}


# Rows of Table 2, then those of the other tables: the order of `python common.py runs/`
ORDER = ["VAE", "UT-VAE", "RAE-no-reg", "RAE-GP", "RAE-L2", "RAE-SN", "VAE*", "UT-VAE*", "UAE", "IWAE", "WAE-MMD"]


def results_table(*folders: Path) -> str:
    """One Markdown table of all results.json below the folders, a row per model and data set, mean ± standard deviation
    over seeds; below it what has no row. Raises UserError if runs of one row differ in anything but the seed."""
    ignored = {"seed", "name", "out", "data_dir", "device", "resume", "eval_only", "benchmark", "gradient_noise"}
    rows, left_out = {}, []
    for run in sorted({file.parent for folder in folders for file in folder.rglob("args.json")}):
        if not (run / "results.json").is_file():
            left_out.append(f"{run} is not finished")
    for file in sorted({file for folder in folders for file in folder.rglob("results.json")}):
        result = load_json(file)
        if result.get("metric", "") is None:
            left_out.append(f"{file.parent} has no distances (--fid none)")
            continue
        try:
            key = (result["data"]["name"], result["features"], result["model"])
            result["settings"] = {k: v for k, v in result["args"].items() if k not in ignored}
            result["settings"] |= {name: result[name] for name in ("images", "features_hash")}
            result |= {name: float(result[name]) for name in ("reconstruction", "sample", "interpolation")}
            result["seed"], result["count"] = result["args"]["seed"], result["images"]["test"]
            rows.setdefault(key, []).append((file, result))
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{file} is not a results.json of these scripts") from None
    if not rows:
        where = ", ".join(f"{folder}/" for folder in folders)
        raise UserError("; ".join([f"no results.json with distances below {where}", *left_out]))
    lines = ["| Data set | Model | Features | Images | Rec. | Sample | Interp. | Seeds |", "|" + "---|" * 8]

    def place(key: tuple) -> tuple:
        stem = re.sub("(?<!RAE)-GP|-full|[†²]", "", key[2].split(" ")[0])
        return key[0], key[1], ORDER.index(stem) if stem in ORDER else len(ORDER), key[2]

    for key in sorted(rows, key=place):
        (first, reference), *others = rows[key]
        for file, result in others:
            a, b = reference["settings"], result["settings"]
            differ = [f"{k} ({a.get(k)!r}, {b.get(k)!r})" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
            if differ:
                both = f"{first.parent} and {file.parent} are both {key[2]} on {key[0]}"
                raise UserError(f"{both} but differ in {', '.join(differ)}: remove one")
        results = [result for _, result in rows[key]]
        seeds = {}
        for file, result in rows[key]:
            if (other := seeds.setdefault(result["seed"], file)) != file:
                raise UserError(f"{other.parent} and {file.parent} are one seed of {key[2]} on {key[0]}: remove one")
        cells = []
        for kind in ("reconstruction", "sample", "interpolation"):
            values = [result[kind] for result in results]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"| {key[0]} | {key[2]} | {key[1]} | {reference['count']} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join([*lines, *[f"\nleft out: {what}" for what in left_out]])


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="common.py", description="One Markdown table of every results.json below a folder.")
    parser.add_argument("folders", type=Path, nargs="+", help="for example runs/")
    print(results_table(*parser.parse_args(argv).folders))


if __name__ == "__main__":
    cli(main)
