"""What the six scripts share: sigma points, posterior terms, nets, data sets; then own images, arguments, ranks, a run.

The first four parts are the method and read as one text; the last four are plumbing. Equation, table and appendix
numbers are those of the paper: Janjoš, Rosenbaum, Dolgov, Zöllner, "Unscented Autoencoder", ICML 2023.

Axes: B batch, K samples or sigma points, M = B·K decoded points, n latent dimension, [C,H,W] image.
`scale` is the square root of the covariance Σ: standard deviations [B,n] (diagonal) or a lower-triangular L [B,n,n]
(full), Σ = L Lᵀ.
"""

import argparse
import copy
import csv
import ctypes
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import datasets
from torchvision.transforms.v2 import functional as image_ops
from tqdm import tqdm

HEURISTICS = ("random", "pairs", "largest")
# Whether torchrun started this process (WORLD_SIZE alone says nothing: clusters export it everywhere)
LAUNCHED = dist.is_available() and dist.is_torchelastic_launched()
RANK, WORLD_SIZE = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if LAUNCHED else (0, 1)
LOGVAR_LIMIT = 20.0  # |log σ²| beyond this is no posterior, only an overflow of exp at the paper's learning rate


class UserError(ValueError):
    """A mistake that the user can mend: `cli` shows it as one line and exits with code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Sigma points and samples of the posterior (Sec. 4)


def check_sigma_points(k: int, n: int, kappa: float) -> None:
    """Raise ValueError unless 1 <= k <= 2n+1 and kappa > -n (Eq. 5)."""
    if not 1 <= k <= 2 * n + 1:
        raise UserError(f"k = {k} sigma points: a latent space of {n} dimensions has 1 to {2 * n + 1} (2n+1)")
    if not -n < kappa < math.inf:
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
    mu: Tensor, scale: Tensor, k: int, heuristic: str = "random", kappa: float = 0.5, generator: Generator | None = None
) -> Tensor:
    """K of the 2n+1 sigma points, drawn without replacement and independently for each image (Eq. 9, Appendix C).

    mu [B,n], standard deviations [B,n] or L [B,n,n] -> [B,K,n]; only the K points asked for are built. heuristic:
    `random`: any of the 2n+1; `pairs`: both points of random axes; `largest`: both points of the axes with the longest
    columns of L, for a diagonal Σ its largest entries. The last two add the mean if K is odd. Raises ValueError for K
    outside 1..2n+1, kappa <= -n, or an unknown heuristic.
    """
    B, n = mu.shape
    check_sigma_points(k, n, kappa)
    # place [B,K] in the order of `sigma_points`: 0 is the mean, i is mean + column i, n+i is mean - column i
    if heuristic == "random":  # the K largest of 2n+1 uniform numbers are K places without replacement
        place = torch.rand(B, 2 * n + 1, device=mu.device, generator=generator).topk(k).indices
    elif heuristic in HEURISTICS:
        lengths = scale if scale.dim() == 2 else scale.norm(dim=1)  # of the columns of L [B,n]
        score = lengths if heuristic == "largest" else torch.rand(B, n, device=mu.device, generator=generator)
        plus = 1 + score.topk(k // 2).indices
        place = F.pad(torch.cat([plus, plus + n], dim=1), (k % 2, 0))
    else:
        raise UserError(f"heuristic {heuristic!r}: choose from {', '.join(HEURISTICS)}")
    axis, sign = (place - 1) % n, (place > 0).to(mu.dtype) - 2 * (place > n).to(mu.dtype)  # the mean's sign is 0
    step = math.sqrt(kappa + n) * sign  # [B,K]
    if scale.dim() == 2:  # column i of a diagonal L has one entry
        lengths = (step * scale.gather(1, axis)).unsqueeze(2)  # of mu's and scale's common type
        offsets = lengths.new_zeros(B, k, n).scatter(2, axis.unsqueeze(2), lengths)
    else:
        offsets = step.unsqueeze(2) * scale.mT.gather(1, axis.unsqueeze(2).expand(-1, -1, n))
    return mu.unsqueeze(1) + offsets  # [B,K,n]


def sample_gaussian(mu: Tensor, scale: Tensor, k: int, generator: Generator | None = None) -> Tensor:
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

    mu [B,n], scale the standard deviations [B,n] or L [B,n,n]. `squared` returns W₂². For a diagonal Σ this is exact.
    For a full L it is the paper's surrogate, since Eq. 19 takes tr(L) for tr(Σ^½). The gradient at W₂ = 0 is 0.
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
    decoder: nn.Module, mu: Tensor, generator: Generator | None = None, fold: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Unbiased one-draw estimate of the squared Frobenius norm of the decoder's Jacobian J at mu (Eq. 12, 16).

    mu [B,n] -> [B]. Of `Decoder` E‖J u‖² = ‖J‖²_F, u ~ N(0, I) over latents, by forward-mode differentiation (`fold`);
    of any other module from z to images [B,C,H,W] E‖Jᵀ v‖² = ‖J‖²_F, v = ±1 over pixels, by double backward, its flag
    `bf16` put off (Hutchinson).

    In training mode batch norm takes the statistics of this batch of means, which depend on mu and are differentiated
    through, in evaluation mode its running ones; it changes neither. By the batch's statistics an image depends on all
    latents: value i then estimates the rows of the batch's J that belong to image i (of other modules the columns that
    belong to mu_i), and the expectation of the sum is ‖J‖²_F. In training the loss beside it normalises B·K points, the
    penalty B means, in validation both by the running statistics: `train_gp` and `val_gp` are two measures.
    """
    if type(decoder) is Decoder and repr(decoder) == decoder.built:  # no layer was changed
        u = torch.randn(mu.shape, device=mu.device, dtype=mu.dtype, generator=generator)
        return decoder.jvp(mu, u, fold).square().sum((1, 2, 3))  # J u [B,C,H,W]
    eager, attention = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)  # others know no double
    with batch_statistics(decoder), eager, attention, torch.enable_grad():
        mu = mu if mu.requires_grad else mu.detach().requires_grad_()
        images = decoder(mu)
        v = torch.randint(2, images.shape, device=mu.device, dtype=images.dtype, generator=generator) * 2 - 1
        (gradient,) = torch.autograd.grad(images, mu, v, create_graph=True)  # Jᵀ v [B,n]
    return gradient.square().sum(1)


def slerp(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Spherical interpolation between a and b [...,n] (Appendix A); linear where they are (anti)parallel."""
    cosine = F.cosine_similarity(a, b, dim=-1).clamp(-1, 1).unsqueeze(-1)
    omega, sine = cosine.acos(), (1 - cosine.square()).sqrt()
    spherical = (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / sine.clamp_min(1e-6)
    return torch.where(sine > 1e-4, spherical, (1 - t) * a + t * b)


# ---------------------------------------------------------------------------------------------------------------------
# Nets (Table 4)


def check_image_size(image_size: int, sizes: tuple[int, ...] = (32, 64)) -> None:
    """Raise ValueError unless a net of Table 4 is made for images of this size."""
    if image_size not in sizes:
        raise UserError(f"images of {image_size} pixels: this net is made for {' or '.join(map(str, sizes))}")


class Encoder(nn.Module):
    """x [B,C,H,W] in [-1,1] -> features [B, self.features]: six 3×3 stride-2 convolutions (Table 4)."""

    bf16 = False  # run the convolutions in bfloat16, by autocast

    def __init__(self, channels: int, image_size: int, width: float = 1.0) -> None:
        super().__init__()
        check_image_size(image_size)
        self.image_size = image_size
        hidden = [max(1, round(width * c)) for c in (32, 64, 128, 256, 512, 1024)]
        layers = []
        for c_in, c_out in zip([channels, *hidden], hidden, strict=False):
            convolution = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)  # batch norm has the bias
            layers += [convolution, nn.BatchNorm2d(c_out), nn.LeakyReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.features = hidden[-1]  # 32×32 and 64×64 images end as 1×1

    def forward(self, x: Tensor) -> Tensor:
        check_image_size(x.shape[-1], (self.image_size,))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            h = self.layers[:-3](x)  # [B,512,1,1], of 64×64 images [B,512,2,2]
            if self.bf16:  # as a matrix product of the taps in the image (paper/README.md, Speed)
                side = h.shape[-1]
                taps = self.layers[-3].weight[..., 1 : 1 + side, 1 : 1 + side]
                h = F.linear(h.flatten(1), taps.flatten(1))[..., None, None]
            else:
                h = self.layers[-3](h)
        return self.layers[-2:](h.to(x.dtype)).flatten(1)


class GaussianHead(nn.Module):
    """Features [B,features] -> mu [B,n] and scale, σ [B,n] or with full covariance L [B,n,n] (Table 4, footnote 7)."""

    def __init__(self, features: int, latent_dim: int, covariance: str = "diagonal") -> None:
        super().__init__()
        self.mu = nn.Linear(features, latent_dim)
        self.logvar = nn.Linear(features, latent_dim)  # log σ²
        self.correlation = nn.Linear(features, latent_dim * (latent_dim - 1) // 2) if covariance == "full" else None

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mu = self.mu(features)
        sigma = (0.5 * self.logvar(features).clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)).exp()
        if self.correlation is None:
            return mu, sigma
        row, column = torch.tril_indices(mu.shape[1], mu.shape[1], -1, device=mu.device)  # row-major lower triangle
        L = torch.diag_embed(sigma)
        L[:, row, column] = torch.tanh(self.correlation(features)) * sigma[:, row] * sigma[:, column]  # footnote 7
        return mu, L


class Decoder(nn.Module):
    """z [M,n] -> images [M,C,H,W] in (-1,1): linear to 8×8, stride-2 transposed convolutions, a 3×3, tanh (Table 4).

    Nothing non-linear stands between the linear layer and the first transposed convolution: together they are one
    affine map z -> z A + a. `fold` multiplies it out, at the cost of n+1 transposed convolutions, and each of the M
    points then costs one small matrix product in place of the largest layer. The function and its gradients are the
    same up to rounding.
    """

    bf16 = False

    def __init__(self, latent_dim: int, channels: int, image_size: int, width: float = 1.0) -> None:
        super().__init__()
        check_image_size(image_size)
        hidden = [max(1, round(width * c)) for c in (1024, 512, 256, 128)[: 3 if image_size == 32 else 4]]
        self.linear = nn.Linear(latent_dim, hidden[0] * 8 * 8)
        self.first = nn.ConvTranspose2d(hidden[0], hidden[1], 4, stride=2, padding=1, bias=False)
        layers = [nn.BatchNorm2d(hidden[1]), nn.LeakyReLU(inplace=True)]
        for c_in, c_out in itertools.pairwise(hidden[1:]):
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c_out), nn.LeakyReLU(inplace=True)]
        self.rest = nn.Sequential(*layers, nn.ConvTranspose2d(hidden[-1], channels, 3, padding=1))
        self.built = repr(self)  # `jvp` knows these layers and `forward` alone: change both, or derive a class

    def forward(self, z: Tensor, fold: tuple[Tensor, Tensor] | None = None) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            fold = self.fold(z) if fold is None else fold
            return torch.tanh(self.rest(self.affine(z, fold)).to(z.dtype))

    # The same, faster

    def fold(self, z: Tensor, penalty: bool = False) -> tuple[Tensor, Tensor] | None:
        """A [n, 16·16·hidden] and a [16·16·hidden] of the affine map, or None where that would not pay.

        z [B,...,n]: all points that are to be decoded; `penalty`: `gradient_penalty` takes two more for each of the B.
        """
        n = z.shape[-1]
        if torch.compiler.is_exporting() or z.numel() // n + 2 * len(z) * penalty <= n + 1:
            return None  # an export compares no sizes: they would be constants in it
        columns = torch.cat([self.linear.weight.T, self.linear.bias.unsqueeze(0)])  # [n+1, 1024·8·8]
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
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

    def jvp(self, z: Tensor, u: Tensor, fold: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """J(z) u [M,C,H,W] for u [M,n], J the Jacobian at z of all M images (forward-mode differentiation).

        torch's own forward mode would convolve every layer's input with a derivative of the weights that is zero, and
        fails in batch norm under autocast.
        """
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            h, t = self.affine(z, fold), self.affine(u, fold, bias=False)  # value and tangent
            for layer in self.rest:
                if isinstance(layer, nn.BatchNorm2d):
                    h, t = batch_norm_jvp(layer, h, t)
                    continue
                h = layer(h)
                if isinstance(layer, nn.LeakyReLU):
                    t = torch.where(h > 0, t, layer.negative_slope * t)
                else:
                    t = F.conv_transpose2d(t, layer.weight, None, layer.stride, layer.padding)
            return (1 - torch.tanh(h.to(z.dtype)).square()) * t.to(z.dtype)


def batch_norm_jvp(layer: nn.BatchNorm2d, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Value h and tangent t [M,C,H,W] behind a batch norm, which stays as it is: in training mode by the batch's
    statistics (in float32 at least), whose tangents are in t, in evaluation mode by the running ones."""
    if not layer.training:
        return layer(h), t * (layer.weight * (layer.running_var + layer.eps).rsqrt()).to(t.dtype)[:, None, None]
    dtype, over = h.dtype, {"dim": (0, 2, 3), "keepdim": True}
    h, t = (x.to(torch.promote_types(dtype, torch.float32)) for x in (h, t))
    s = (h.var(correction=0, **over) + layer.eps).sqrt()
    h = F.batch_norm(h, None, None, training=True, eps=layer.eps)  # normalised
    weight, bias = layer.weight[:, None, None], layer.bias[:, None, None]
    t = (t - t.mean(**over) - h * (h * t).mean(**over)) * (weight / s)
    return (weight * h + bias).to(dtype), t.to(dtype)


@contextmanager
def batch_statistics(module: nn.Module):
    """Evaluation mode in float32 for a while, but batch norms that are in training mode take the batch's statistics;
    no buffer is changed. Differentiated twice (torch's forward mode has them constant in its gradient)."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    running = [(norm.running_mean, norm.running_var) for norm in norms]
    with eval_mode(module, bf16=False):
        for norm in norms:
            norm.running_mean = norm.running_var = None  # without them evaluation mode takes the batch's
        try:
            yield
        finally:
            for norm, (mean, variance) in zip(norms, running, strict=True):
                norm.running_mean, norm.running_var = mean, variance


@contextmanager
def eval_mode(module: nn.Module, bf16: bool = True):
    """The module in evaluation mode for a while: batch norm uses its running statistics and leaves them alone."""
    training = [(part, part.training) for part in module.modules()]
    nets = [net for net in module.modules() if getattr(net, "bf16", False)]
    module.eval()
    for net in nets:
        net.bf16 = bf16
    try:
        yield
    finally:
        for part, before in training:
            part.training = before
        for net in nets:
            net.bf16 = True


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: every image is held as uint8 on the training device, batches are cut from there without workers

# Defaults of flags that are not given, by data set (Appendix A, Table 2; those of digits and of own images are ours)
_PAPER = {
    "channels": 3, "image_size": 32, "latent_dim": 128, "width": 1.0, "epochs": 100, "schedule": "plateau",
    "sigma_points": "random", "flip": False, "fid": ["imagenet"],
}  # fmt: skip
_DIGITS = {"channels": 1, "latent_dim": 16, "width": 1 / 16, "epochs": 30, "schedule": "linear", "fid": ["classifier"]}
DEFAULTS = {
    "digits": _PAPER | _DIGITS,
    "fashion_mnist": _PAPER | {"channels": 1, "latent_dim": 64},
    "cifar10": _PAPER | {"sigma_points": "largest", "flip": True},  # flip: mirror half of the training images
    "celeba": _PAPER | {"latent_dim": 64, "image_size": 64},
}
OWN = _PAPER | {"schedule": "linear"}  # of a folder or file of images
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


class Dataset(NamedTuple):
    """Three uint8 tensors [N,C,H,W]."""

    train: Tensor
    val: Tensor
    test: Tensor


def load_dataset(name: str, data_dir: str | Path = "data", image_size: int | None = None) -> Dataset:
    """Load `digits`, `fashion_mnist`, `cifar10`, `celeba`, or the images in a folder, .npy or .npz; image_size
    for another size than the data set's own. Raises UserError, with what to put where, if anything is missing."""
    size, data_dir = image_size or DEFAULTS.get(name, OWN)["image_size"], Path(data_dir)
    if name in DEFAULTS:
        splits, _ = LOADERS[name](data_dir, size)
    else:
        own = own_images(name)
        splits = hold_out(read_folder(own, data_dir, size) if own.is_dir() else read_arrays(own))
    return Dataset(*(crop_and_resize(split, size) for split in splits))


def crop_and_resize(images: Tensor, size: int, crop: int = 0) -> Tensor:
    """The centred square of images [...,H,W], of `crop` pixels or as large as it goes, resized with antialiasing."""
    square = image_ops.center_crop(images, [crop or min(images.shape[-2:])] * 2)
    return image_ops.resize(square, [size, size], antialias=True)


def _digits(_data_dir: Path, _size: int = 32) -> tuple[tuple[Tensor, ...], Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # [1797,1,8,8] in [0,1]
    images = F.interpolate(images, size=(32, 32), mode="bilinear").mul(255).round().to(torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # they come by writer
    return images[order].split([1197, 300, 300]), torch.from_numpy(digits.target)[order][:1197]


def _fashion_mnist(data_dir: Path, _size: int = 32) -> tuple[tuple[Tensor, ...], Tensor]:
    for packed in DEBIAN_FASHION_MNIST.glob("*-ubyte.gz"):  # to where torchvision looks
        file = data_dir / "FashionMNIST" / "raw" / packed.stem
        if not file.exists():
            with explained(f"cannot unpack {packed}"):
                content = gzip.decompress(packed.read_bytes())
            with replacing(file) as temporary:
                temporary.write_bytes(content)
    train, test = _torchvision(datasets.FashionMNIST, data_dir, "FashionMNIST/raw/ with its four -ubyte.gz")
    splits = (*train.data.unsqueeze(1).split([50_000, 10_000]), test.data.unsqueeze(1))  # of 60,000
    return splits, train.targets[:50_000]


def _cifar10(data_dir: Path, _size: int = 32) -> tuple[tuple[Tensor, ...], None]:
    found = _torchvision(datasets.CIFAR10, data_dir, "cifar-10-python.tar.gz")
    images, test_images = (torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in found)
    return (*images.split([40_000, 10_000]), test_images), None


def _torchvision(kind: type, data_dir: Path, files: str) -> list:
    """Training and test part of one of torchvision's data sets, downloaded if they are not in data_dir."""
    with explained(f"cannot get {kind.__name__} (check the network, or put {files} into {data_dir}/)"):
        return [kind(data_dir, train=train, download=True) for train in (True, False)]


def _celeba(data_dir: Path, size: int = 64) -> tuple[list[Tensor], None]:
    folder, partition = data_dir / "celeba" / "img_align_celeba", data_dir / "celeba" / "list_eval_partition.txt"
    if not folder.is_dir() or not partition.is_file():
        raise UserError(f"CelebA: put the folder img_align_celeba/ and list_eval_partition.txt into {folder.parent}/")
    splits = [[], [], []]
    with explained(f"{partition} needs lines '<file name> <0|1|2>'"):
        for line in partition.read_text().splitlines():
            name, split = line.split()
            splits[int(split)].append(folder / name)
        if not all(splits):
            raise UserError("one of 0 (training), 1 (validation), 2 (test) has no images")
    return decode_images(splits, size, data_dir, crop=148), None


LOADERS = {"digits": _digits, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10, "celeba": _celeba}


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1,1], the range of the decoder's tanh."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1,1] -> uint8, rounded and clamped as an 8-bit image file would be."""
    return ((images + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def epoch_batches(images: Tensor, batch_size: int, seed: int, flip: bool = False) -> Iterator[Tensor]:
    """One epoch of float batches [B,C,H,W] in [-1,1] from uint8 images, shuffled by `seed`, the last short one dropped;
    under torchrun every rank's own part of one permutation."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[RANK::WORLD_SIZE]
    order = order[: len(images) // WORLD_SIZE].to(images.device)
    for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
        x = images.index_select(0, batch)  # on a CPU many times as fast as images[batch]
        if flip:
            mirrored = torch.randint(2, (len(x), 1, 1, 1), device=x.device) == 1
            x = torch.where(mirrored, x.flip(-1), x)
        yield to_float(x)


def validation_batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    """This rank's part of the images in float batches, in order, the last short one included."""
    return map(to_float, images[RANK::WORLD_SIZE].split(batch_size))


# ---------------------------------------------------------------------------------------------------------------------
# Own images: folders and arrays, always with three channels

LIKE_A_SPLIT = r"(train(ing)?|test(ing)?|val(id(ation)?)?|dev)(?![a-z])"


def own_images(name: str) -> Path:
    """The folder, .npy or .npz that a data set's name is the path of. Raises UserError."""
    path = Path(name).expanduser()
    if not path.is_dir() and not (path.suffix in (".npy", ".npz") and path.is_file()):
        raise UserError(f"--dataset {name}: neither {', '.join(DEFAULTS)} nor a folder, .npy or .npz that is there")
    return path


def read_folder(root: Path, data_dir: Path, size: int) -> dict[str, Tensor]:
    """The images below a folder as `train`, or by its folders train/ val/ test/: uint8 [N,3,size,size] each. Raises
    UserError for what would be left out or pooled."""
    children = [child for child in sorted(root.iterdir()) if child.is_dir() or is_image(child)]
    splits = [name for name in ("train", "val", "test") if root / name in children]
    if splits not in ([], ["train"], ["train", "test"], ["train", "val", "test"]):
        found = "/ and ".join(splits)
        raise UserError(f"{root}/ has {found}/ alone: rename them train/ test/ (val/ to test/) or train/ val/ test/")
    for child in children:
        like_a_split = child.is_dir() and re.match(LIKE_A_SPLIT, child.name.lower())
        if child.name not in splits and not child.name.startswith(".") and (splits or like_a_split):
            raise UserError(
                f"{child} is none of train/ val/ test/: rename or move it, or it would be left out or pooled"
            )
    images = decode_images([image_files(root / split) for split in splits or ["."]], size, data_dir)
    return dict(zip(splits or ["train"], images, strict=True))


def is_image(file: Path) -> bool:
    """Whether PIL opens files of this name."""
    return Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, sorted by name, without hidden ones; notes other files. Raises UserError if there
    are none."""
    files = sorted(map(Path, glob.iglob(f"{glob.escape(str(folder))}/**/*", recursive=True)))  # links are followed
    images = [file for file in files if is_image(file)]
    others = [file.name for file in files if not is_image(file) and not file.is_dir()]
    if not images:
        raise UserError(f"{folder}/ has no images that PIL opens (of a hub's tables make an .npz: README, Data)")
    if others:
        note(f"left out below {folder}/, PIL opens no such images: {others[0]} ({len(others)} in all)")
    return images


def read_image(file: Path) -> Tensor:
    """One image file as RGB uint8 [3,H,W]; transparency over white, 16-bit grey scaled. Raises UserError naming it."""
    with explained(f"cannot read {file}"):
        image = Image.open(file)
        if image.format == "TIFF" and image.n_frames > 1:
            raise UserError(f"{image.n_frames} pages, save each as a file")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            grey = np.asarray(image)
            if 0 < grey.max() < 4096:
                raise UserError(f"16-bit grey up to {grey.max()} is nearly black, scale it to 65535")
            image = Image.fromarray((grey / 257).round().astype(np.uint8))
        if image.mode in ("I", "F"):
            raise UserError(f"mode {image.mode} has no fixed range, save 8 bits a channel")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def decode_images(splits: list[list[Path]], size: int, data_dir: Path, crop: int = 0) -> list[Tensor]:
    """Splits of image files, centre-cropped (to `crop` pixels, or to a square) and resized: uint8 [N,3,size,size] each,
    decoded once into a file named after the files' names, sizes and times, and memory-mapped ever after."""
    files = [file for split in splits for file in split]
    top = Path(os.path.commonpath([file.parent for file in files])).resolve()
    known = [(os.path.relpath(file, top), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((known, size, crop, "v2")).encode()).hexdigest()[:16]  # v2: of read_image
    cache = data_dir / "decoded" / f"{top.name[:40]}-{size}-{key}.npy"
    if not cache.exists():
        with ThreadPoolExecutor() as pool:
            squares = pool.map(lambda file: crop_and_resize(read_image(file), size, crop), files)
            images = torch.stack(list(progress("decoding images", len(files), squares)))
        with replacing(cache) as temporary:
            np.save(temporary, images.numpy())
    with explained(f"cannot read {cache}, remove it"):
        return list(torch.from_numpy(np.load(cache, mmap_mode="c")).split([len(split) for split in splits]))


def read_arrays(file: Path) -> dict[str, Tensor]:
    """The images of an .npy, or of an .npz with `train`, `train test` or `train val test`: uint8 [N,3,H,W] each."""
    with explained(f"cannot read {file}"):
        loaded = np.load(file)
        arrays = {"train": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        if sorted(arrays) not in (["train"], ["test", "train"], ["test", "train", "val"]):
            raise UserError(f"name its arrays train, train test or train val test, not {' '.join(arrays)}")
        return {name: to_images(array) for name, array in arrays.items()}


def to_images(x: np.ndarray) -> Tensor:
    """uint8 [N,H,W] or [N,H,W,1 or 3] -> RGB [N,3,H,W]. Raises UserError with what makes it of others."""
    channels = x.shape[3] if x.ndim == 4 else 1
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or channels not in (1, 3) or x.max(initial=0) <= 1:
        raise UserError(
            f"{x.dtype} {list(x.shape)} is not uint8 [N,H,W] or [N,H,W,3] from 0 to 255: save "
            '(x * 255).round().astype("uint8") of values in [0,1], x.transpose(0, 2, 3, 1) of channels first'
        )
    x = np.broadcast_to(x.reshape(*x.shape[:3], channels), (*x.shape[:3], 3))
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def hold_out(images: dict[str, Tensor]) -> list[Tensor]:
    """Training, validation and test images, each in one random order (folders come by class), alike on every machine;
    what is not given is a tenth of the training images."""
    images = {name: x[torch.randperm(len(x), generator=Generator().manual_seed(0))] for name, x in images.items()}
    train, tenth = images["train"], len(images["train"]) // 10
    for name in [name for name in ("val", "test") if name not in images]:
        images[name], train = train.tensor_split([tenth])
    return [train, images["val"], images["test"]]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and files

MAY_BE_ZERO = {"seed", "epochs", "beta", "gamma"}
UNNAMED = {"dataset", "out", "seed", "resume", "device", "data_dir", "fid", "fid_method", "compile", "save_images"}


class Parser(argparse.ArgumentParser):
    """Help that shows the defaults, numbers that are finite and above 0, errors of one line."""

    def __init__(self, prog: str, description: str) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=layout, allow_abbrev=False)

    def add_argument(self, *names, **options):
        if options.get("default") not in (None, "", argparse.SUPPRESS):
            options["help"] = options.get("help", "") + f" (default: {options['default']})"
        return super().add_argument(*names, **options)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        args = super().parse_args(argv)
        for name, x in vars(args).items():
            least = "of at least" if name in MAY_BE_ZERO else "above"
            fits = type(x) not in (int, float) or 0 < x < math.inf or (x == 0 and name in MAY_BE_ZERO)
            if not fits and name != "kappa" and x != self.get_default(name):
                self.error(f"--{name.replace('_', '-')} {x}: give a finite number {least} 0")
        return args

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def by_data(name: str) -> str:
    """The defaults of a flag by data set, for its help."""
    values: dict[str, list[str]] = {}
    for data, defaults in (DEFAULTS | {"own images": OWN}).items():
        values.setdefault(str(defaults[name]).strip("[']"), []).append(data)
    return " (default: " + "; ".join(f"{value} for {', '.join(data)}" for value, data in values.items()) + ")"


def argument_parser(script: str, description: str, beta: float = 2.5e-4, beta_flags=("--beta",)) -> Parser:
    """The flags that every script has; `script` is its __file__, beta the default weight of its latent term."""
    parser = Parser(Path(script).name, description)
    add = parser.add_argument
    add("--dataset", default="digits", help=f"{', '.join(DEFAULTS)}, or a folder, .npy or .npz of images")
    add("--data-dir", default="data", help="where data sets are looked for, downloaded to and cached")
    add("--image-size", type=int, help="32 or 64 pixels, height and width" + by_data("image_size"))
    add("--limit-train", type=int, help="use only the first so many training images")
    add("--limit-eval", type=int, help="use only the first so many validation and test images")
    add("--out", default="runs", help="folder that gets one folder for each run")
    add("--epochs", type=int, help="passes over the training images; 0: the untrained net" + by_data("epochs"))
    add("--batch-size", type=int, default=64, help="images a step (on each rank, under torchrun)")
    add("--lr", type=float, default=0.005, help="Adam's first learning rate")
    rules = "plateau: halved after 5 epochs without a better validation loss; linear: falls after 40%% of the epochs"
    add("--schedule", choices=("plateau", "linear"), help="of the learning rate; " + rules + by_data("schedule"))
    add(*beta_flags, dest="beta", type=float, default=beta, help="weight of the latent term")
    add("--latent-dim", type=int, help="n, dimensions of the latent space" + by_data("latent_dim"))
    add("--width", type=float, help="multiplies all hidden channels" + by_data("width"))
    add("--seed", type=int, default=0, help="of weights, shuffling, noise and evaluation")
    add("--device", default="auto", help="cuda, cuda:1 or cpu; auto: cuda if it is there")
    add("--precision", choices=("fp32", "tf32", "bf16"), help="of the nets (default: bf16 on CUDA that has it)")
    add("--compile", action="store_true", help="torch.compile the nets")
    names = "imagenet, tf (the original FID's), lite0, lite0@PIXELS, classifier, a state dict on disk, or none"
    add("--fid", nargs="+", metavar="FEATURES", help=f"features of the distances: {names}" + by_data("fid"))
    add("--fid-method", choices=("sqrtm", "eigh"), default="sqrtm", help="matrix square root of the Fréchet distance")
    add("--save-images", action="store_true", help="write the evaluated and the test images too, as .npz")
    add("--resume", action="store_true", help="go on with this command's run if there is one, then evaluate (again)")
    return parser


def parse_args(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, and fill in what the data set gives for flags that are not given, and the run's name; `start` adds the
    precision, `load_data` how many images there are."""
    args, script = parser.parse_args(argv), Path(parser.prog).stem
    args.data_dir, args.out = (str(Path(path).expanduser()) for path in (args.data_dir, args.out))
    data, defaults = args.dataset, DEFAULTS.get(args.dataset, OWN)
    if defaults is OWN:
        own = own_images(data).resolve()
        if own in Path(args.out, script).resolve().parents:
            raise UserError(f"--out {args.out} is below {own}/: its pictures would become images, give another folder")
        args.dataset, data = str(own), f"own-{own.name if own.is_dir() else own.stem}"  # found from anywhere
    name = [script, data]
    for flag, value in list(vars(args).items()):
        default = defaults.get(flag, parser.get_default(flag))
        if value is None:
            setattr(args, flag, default)
        elif value != default and flag not in UNNAMED | {"precision"}:  # whose default depends on the device
            name.append(flag.replace("_", "") + ("" if value is True else str(value)))
    args.script, args.data, args.ranks = script, data, WORLD_SIZE
    args.name = "-".join(name).encode()[:200].decode(errors="ignore") + f"-seed{args.seed}"
    args.channels, args.flip = defaults["channels"], defaults["flip"]
    python, file = (sys.orig_argv[0], sys.argv[0]) if argv is None else ("python", parser.prog)  # as it was started
    command = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if LAUNCHED else [python]
    again = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--resume"]
    args.command = shlex.join([*command, file, *again, "--resume"])
    return args


@contextmanager
def explained(beginning: str):
    """Whatever goes wrong becomes a UserError of one line that begins so: a damaged file raises almost anything."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{beginning}: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{beginning}: {why}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which replaces the file when all is written and synced. Raises UserError if the
    disk fails; the old file stays then."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: list[dict], heading: str = "") -> None:
    """Replace a CSV file by these rows, floats at full precision, under a heading; what a row lacks stays empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        file.write(heading)
        writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def locked(path: Path):
    """An open file, by which this process alone has its folder until it is closed. Raises UserError if another does."""
    file = open(path, "w")  # noqa: SIM115
    with suppress(ImportError):
        import fcntl  # not on Windows

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path.parent}/ is in use by another process, wait for it or end it") from error
        except OSError as error:  # a network's file system
            note(f"{path.parent}/ cannot be locked ({error.strerror}): start no second process in it")
    return file


@functools.cache
def note(text: str) -> None:
    """Print a warning, once."""
    print(f"note: {text}", file=sys.stderr)


def cli(main) -> None:
    """Run a script's main: a user's mistake, or a path that cannot be reached, is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Greek letters
    if not torch.cuda.is_available():
        keep_memory()
    try:
        main()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        if isinstance(error, torch.OutOfMemoryError):
            error = "out of memory, lower --batch-size or --k"
        print(f"{Path(sys.argv[0]).name}{f' (rank {RANK})' * (RANK > 0)}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def keep_memory() -> None:
    """On Linux, make the process keep the memory that it frees, in huge pages: by default glibc gives large blocks back
    to the system, and each step pays again for clearing its gigabytes of activations (paper/README.md, Speed)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch when it makes its first tensor
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never given back


# ---------------------------------------------------------------------------------------------------------------------
# Ranks (torchrun), device, precision, random streams

STREAMS = ("weights", "noise", "shuffle", "validation", "mixture", "pairs")


def stream_seed(seed: int, purpose: str, rank: int = 0, epoch: int = 0) -> int:
    """The seed of a run's random stream for one of STREAMS: other arguments give an independent stream."""
    return int(np.random.SeedSequence([seed, STREAMS.index(purpose), rank, epoch]).generate_state(1)[0])


def resolve_device(name: str) -> torch.device:
    """The device by name; `auto` is CUDA if it is there, else the CPU; under torchrun each rank has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and LAUNCHED:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with explained(f"--device {name} cannot be used (choose auto, cuda, cuda:1 or cpu)"):
        device = torch.empty(0, device=name).device
        if device.type not in ("cuda", "cpu"):
            raise ValueError("not supported")
        return device


def start(args: argparse.Namespace) -> torch.device:
    """Join the other ranks under torchrun, set precision and the weights' seed, return this rank's device. Raises
    UserError for a device or a precision that is not there."""
    device = resolve_device(args.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)  # of which the next lines ask
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    args.device, args.precision = str(device), args.precision or ("bf16" if native else "fp32")
    if args.precision == "tf32" and not (cuda and torch.cuda.is_tf32_supported()):
        raise UserError(f"--precision tf32 does not exist on {device}: use fp32")
    if LAUNCHED and not dist.is_initialized():
        backend = dist.get_default_backend_for_device(device)
        wait = timedelta(hours=6)  # as long as a slow download may take
        dist.init_process_group(backend, timeout=wait, device_id=device if cuda else None)
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.manual_seed(stream_seed(args.seed, "weights"))
    return device


def prepare(nets: tuple[nn.Module, nn.Module], args: argparse.Namespace, device: torch.device) -> nn.ModuleDict:
    """Encoder and decoder as one model on the device, alike on all ranks, in the precision asked for."""
    model = nn.ModuleDict(dict(zip(("encoder", "decoder"), nets, strict=True)))
    if any(nn.parameter.is_lazy(tensor) for tensor in model.state_dict().values()):
        raise UserError("nets(args) has a lazy layer that knows no sizes yet: run it once there")
    model.to(device, memory_format=torch.channels_last)
    if LAUNCHED:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    nets = [net for net in model.modules() if hasattr(net, "bf16")]  # heads, terms and losses stay in float32
    if args.precision == "bf16" and not nets:
        args.precision = "fp32"  # own nets
    for net in nets:
        net.bf16 = args.precision == "bf16"
    if args.compile:
        model["encoder"].compile()
        model["decoder"].compile()
    return model


def load_data(args: argparse.Namespace, device: torch.device) -> Dataset:
    """The data set of a run's arguments on the device. Raises UserError if it has too few images."""
    with rank_zero_first():
        data = load_dataset(args.dataset, args.data_dir, args.image_size)
    limits = args.limit_train, args.limit_eval, args.limit_eval
    data = Dataset(*(split[:limit] for split, limit in zip(data, limits, strict=True)))
    args.images = [len(split) for split in data]
    if args.dataset not in DEFAULTS:  # own images may change under their name
        args.images_crc32 = [zlib.crc32(split.contiguous().numpy()) for split in data]
    least = 2 * args.ranks, args.ranks, args.ranks
    if any(found < needed for found, needed in zip(args.images, least, strict=True)):
        text = "{} training, {} validation and {} test images: give {}, {} and {} or more; of 10 a tenth is held out"
        raise UserError(text.format(*args.images, *least))
    data = Dataset(*(split.to(device) for split in data))
    most = len(data.train) // args.ranks
    if not 2 <= args.batch_size <= most:
        raise UserError(f"--batch-size {args.batch_size}: give 2 to {most}, the training images of each rank")
    return data


@contextmanager
def rank_zero_first():
    """Rank 0 goes through the block (downloading, caching) before the others do."""
    if LAUNCHED and RANK > 0:
        dist.barrier()
    yield
    if LAUNCHED and RANK == 0:
        dist.barrier()


@torch.no_grad()
def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace tensors of one dtype by their mean over the ranks, in one all-reduce."""
    if tensors and LAUNCHED:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, flat.div_(WORLD_SIZE).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def average_gradients(model: nn.Module) -> None:
    """After backward(): the mean of the ranks' gradients, so that the global batch is --batch-size × ranks."""
    average_over_ranks([p.grad for p in model.parameters() if p.grad is not None])


@contextmanager
def validating(model: nn.Module, seed: int):
    """Evaluation mode, no gradients, and the same noise every time."""
    average_over_ranks([buffer for buffer in model.buffers() if buffer.is_floating_point()])  # batch norm's statistics
    torch.manual_seed(stream_seed(seed, "validation", RANK))
    with eval_mode(model), torch.no_grad():
        yield


def progress(description: str, total: int, items=None) -> tqdm:
    """A progress bar over images, on rank 0 and on a terminal only."""
    return tqdm(items, desc=description, total=total, unit="img", leave=False, disable=RANK > 0 or None)


# ---------------------------------------------------------------------------------------------------------------------
# A run: its folder, its checkpoints, its metrics


def posterior(encoder: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean [B,n] and scale of an encoder's posterior; of a deterministic encoder z and None. Raises UserError."""
    found = encoder(x)
    if not isinstance(found, Tensor | tuple):
        raise UserError(f"the encoder returns a {type(found).__name__}, not z or the tuple (mean, scale)")
    return found if isinstance(found, tuple) else (found, None)


def check_nets(model: nn.ModuleDict, loss, images: Tensor, args: argparse.Namespace) -> None:
    """Raise UserError unless a few images go through a copy of the nets as training and `fid.evaluate` need it."""
    encoder, decoder = copy.deepcopy(model).values()
    x = to_float(images[:4])
    with explained("the nets fail"), torch.no_grad(), eval_mode(encoder), eval_mode(decoder):
        mean, scale = posterior(encoder, x)
        outputs = decoder(100 * torch.randn_like(mean))  # far out, where an untrained net shows its range
    B, n = len(x), mean.shape[-1]
    if scale is not None:
        smallest = (scale.diagonal(dim1=-2, dim2=-1) if scale.dim() == 3 else scale).min()
        upper = scale.dim() == 3 and bool(scale.triu(1).any())  # Σ itself, or Lᵀ
        if scale.shape not in ((B, n), (B, n, n)) or not smallest > 0 or upper:
            raise UserError(
                f"the encoder's scale is {list(scale.shape)}, its smallest entry {smallest:.3g}: return (mean, scale) "
                f"with standard deviations [{B},{n}], exp(logvar / 2), or a lower Cholesky factor [{B},{n},{n}]"
            )
    sigmoid = 0 <= outputs.min() < outputs.max()  # alike everywhere: a last layer that starts at zero
    if outputs.shape != x.shape or not outputs.abs().max() <= 1 or sigmoid:
        found = f"{list(outputs.shape)} from {outputs.min():.3g} to {outputs.max():.3g}"
        raise UserError(f"the decoder's images are {found}: {list(x.shape)} in [-1,1] are needed, as of a tanh")
    with explained("the nets cannot be trained by this loss (README, Your own nets)"):
        loss(encoder, decoder, x, args)["loss"].backward()
        with torch.no_grad(), eval_mode(encoder), eval_mode(decoder):
            loss(encoder, decoder, x, args)  # as in validation


def learning_rate(optimizer: torch.optim.Optimizer, args: argparse.Namespace):
    """The scheduler that --schedule names; its step takes the validation loss, after each epoch. `linear`, for runs too
    short for the paper's rule: the first rate for S = 0.4 E epochs, then (E - e) / (E - S) of it in epoch e."""
    if args.schedule == "plateau":  # halved after 5 epochs without a better validation loss (Appendix A)
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=4, threshold=0)
    E = max(args.epochs, 1)
    return Linear(optimizer, lambda epoch: min(1, (E - epoch) / (E - 0.4 * E)))


class Linear(torch.optim.lr_scheduler.LambdaLR):
    """LambdaLR with the step of ReduceLROnPlateau."""

    def step(self, _validation_loss: float | None = None) -> None:
        super().step()


def load_checkpoint(path: Path) -> dict:
    """A checkpoint on the CPU, without executing code from it. Raises UserError naming the file."""
    with explained(f"cannot read {path} as a checkpoint"):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_trained(
    folder: str | Path, nets, device: str | torch.device = "cpu"
) -> tuple[nn.Module, nn.Module, argparse.Namespace]:
    """Encoder, decoder and arguments of the run in `folder`: its best checkpoint in float32, in evaluation mode, its
    parameters frozen. nets: the script's function that builds them, for example uae.nets. Raises UserError."""
    state = load_checkpoint(Path(folder).expanduser() / "best.pt")
    with explained(f"{folder} is no run of the script whose nets were given"):
        args = argparse.Namespace(**state["args"])
        model = nn.ModuleDict(dict(zip(("encoder", "decoder"), nets(args), strict=True)))
        model.load_state_dict(state["model"])
    model.to(device).eval().requires_grad_(False)
    return model["encoder"], model["decoder"], args


class Run:
    """A run's folder: args.json, metrics.csv and the checkpoints.
    `best.pt` (best validation loss) is a dict of `model` with the keys `encoder.…` and `decoder.…`, `epoch`, `args` and
    `loss` (the best one); `last.pt` has `optimizer`, `scheduler` and `history` (rows of metrics.csv) beside them.
    """

    lock = None  # of the folder; a process has one run at a time

    def __init__(self, args: argparse.Namespace, model: nn.Module, optimizer, scheduler, data: Dataset) -> None:
        self.args, self.model, self.optimizer, self.scheduler, self.data = args, model, optimizer, scheduler, data
        self.dir, self.device = Path(args.out) / args.name, data.train.device
        self.epoch, self.best, self.history = 0, math.inf, []  # epochs done, best validation loss, rows of metrics.csv
        self.logged = []  # [(parts of the loss, images)] since the last call of `means`
        self.started, self.speed = time.perf_counter(), 0.0  # of the epoch; training images/s
        state = [self._open() if RANK == 0 else None]
        if LAUNCHED:
            dist.broadcast_object_list(state)
        if state[0]:
            with explained(f"{self.dir / 'last.pt'} does not fit these nets, give another --out"):
                for name in ("model", "optimizer", "scheduler"):
                    getattr(self, name).load_state_dict(state[0][name])
            self.epoch, self.best, self.history = (state[0][name] for name in ("epoch", "loss", "history"))
        elif RANK == 0:
            self._save(improved=True)  # from here on there is always a checkpoint to resume from
        if RANK == 0:
            print(f"if it is stopped, it goes on by: {args.command}")
            print("{}: {} training, {} validation and {} test images".format(args.data, *args.images))
            ranks = f" ({args.ranks} ranks)" * (args.ranks > 1)
            begin = f"goes on after epoch {self.epoch}" if state[0] else "a new run"
            print(f"{args.script}.py on {self.device}{ranks}, {args.precision}, in {self.dir}/: {begin}", flush=True)

    def _open(self) -> dict | None:
        """Make the folder this process's own; the last checkpoint in it, or None. Raises UserError for another's."""
        self.dir.mkdir(parents=True, exist_ok=True)
        if Run.lock:
            Run.lock.close()
        Run.lock = locked(self.dir / ".lock")
        for leftover in self.dir.glob(".tmp-*"):  # of a killed run
            leftover.unlink()
        last = self.dir / "last.pt"
        if not last.exists():
            return None
        if not self.args.resume:
            raise UserError(f"{self.dir} is there: --resume goes on with it; --seed or --out give another")
        state = load_checkpoint(last)
        with explained(f"cannot go on with {last}"):
            now, then = vars(self.args), state["args"]
            may_differ = UNNAMED - {"seed"} | {"command"}
            may_differ |= {"precision", "ranks"} if state["epoch"] >= now["epochs"] else set()
            names = [n for n in sorted((now.keys() | then.keys()) - may_differ) if now.get(n) != then.get(n)]
            if names:
                differ = "; ".join(f"{name} is {now.get(name)}, was {then.get(name)}" for name in names)
                raise UserError(f"other arguments ({differ}), give another --out")
        return state

    def batches(self) -> Iterator[Tensor]:
        """An epoch of this rank's training batches, with its own noise, under a progress bar of all ranks' images."""
        args, images = self.args, self.data.train
        torch.manual_seed(stream_seed(args.seed, "noise", RANK, self.epoch))
        shuffle = stream_seed(args.seed, "shuffle", epoch=self.epoch)  # the same on all ranks
        self.started, done = time.perf_counter(), 0
        with progress(f"epoch {self.epoch + 1}/{args.epochs}", len(images)) as bar:
            for x in epoch_batches(images, args.batch_size, shuffle, args.flip):
                yield x
                done += len(x) * args.ranks
                bar.update(len(x) * args.ranks)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.speed = done / (time.perf_counter() - self.started)

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
        if LAUNCHED:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True))

    def end_epoch(self, lr: float, train: dict[str, float], validation: dict[str, float]) -> None:
        """Count the epoch, keep its row of metrics.csv, print it, and write the checkpoints."""
        self.epoch += 1
        row = {"epoch": self.epoch, "lr": lr}
        row |= {f"train_{name}": value for name, value in train.items()}
        row |= {f"val_{name}": value for name, value in validation.items()}
        self.history.append(row | {"seconds": time.perf_counter() - self.started, "images_per_s": self.speed})
        improved = validation["loss"] < self.best
        self.best = min(self.best, validation["loss"])
        if RANK == 0:
            self._save(improved)
            left = (self.args.epochs - self.epoch) * statistics.median(row["seconds"] for row in self.history)
            print(
                f"epoch {self.epoch}/{self.args.epochs}  train {train['loss']:.5f}  validation {validation['loss']:.5f}"
                f"  lr {lr:.2g}  {self.speed:.0f} images/s  {tqdm.format_interval(left)} left",
                flush=True,
            )

    def _save(self, improved: bool) -> None:
        """Write args.json, metrics.csv, best.pt if the epoch was the best, and last.pt; from last.pt, which comes last,
        the others can be made again."""
        best = {"model": self.model.state_dict(), "epoch": self.epoch, "args": vars(self.args), "loss": self.best}
        last = best | {name: getattr(self, name).state_dict() for name in ("optimizer", "scheduler")}
        with replacing(self.dir / "args.json") as temporary:
            temporary.write_text(json.dumps(vars(self.args), indent=1))
        if self.history:
            write_csv(self.dir / "metrics.csv", self.history)
        for name, state in [("best.pt", best)] * improved + [("last.pt", last | {"history": self.history})]:
            content = io.BytesIO()  # torch.save to a full disk is a RuntimeError, as a bug would be
            torch.save(state, content)
            with replacing(self.dir / name) as temporary:
                temporary.write_bytes(content.getbuffer())
