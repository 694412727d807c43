"""The method's parts, which the six scripts share. In this order:

    sigma points and samples of the posterior             `sigma_points`, `sample_sigma_points`, `sample_gaussian`
    terms of the losses                                   `kl_divergence`, `wasserstein2`, `gradient_penalty`; `slerp`
    nets (Table 4)                                        `Encoder`, `GaussianHead`, `Decoder`
    data sets and their batches                           `load_dataset`, `epoch_batches`
    your own images                                       `read_folder`, `read_image`, `read_arrays`
    what loading needs                                    `UserError`, `explained`, `replacing`, `note`, `progress`

Arguments, ranks and checkpoints are in harness.py. Equation, table and appendix numbers are those of the paper: Janjoš,
Rosenbaum, Dolgov, Zöllner, "Unscented Autoencoder", ICML 2023.

Axes: B batch, K samples or sigma points, M = B·K decoded points, n latent dimension, [C,H,W] image.
`scale` is a factor of the covariance, Σ = L Lᵀ: standard deviations [B,n] (diagonal) or a lower-triangular L [B,n,n].
"""

import functools
import gzip
import hashlib
import itertools
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
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
LOGVAR_LIMIT = 20.0  # log σ² is clamped to ±20: at the paper's learning rate it runs away early, and exp overflows


class UserError(ValueError):
    """A mistake that the user can mend: `cli` shows it as one line and exits with code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Sigma points and samples of the posterior (Sec. 4)


def check_sigma_points(k: int, n: int, kappa: float) -> None:
    """Raise UserError unless 1 <= k <= 2n+1 and kappa > -n, finite (Eq. 5)."""
    if not 1 <= k <= 2 * n + 1:
        raise UserError(f"k = {k} sigma points: a latent space of {n} dimensions has 1 to {2 * n + 1} (2n+1)")
    if not -n < kappa < math.inf:
        raise UserError(f"kappa = {kappa}: the radius sqrt(kappa + n) needs kappa > -n = {-n}")


def sigma_points(mu: Tensor, scale: Tensor, kappa: float = 0.5) -> Tensor:
    """All sigma points of N(mu, Σ), Eq. 5: the mean, then mean + columns, then mean - columns of sqrt(kappa + n)·L.

    mu [B,n], scale [B,n] or L [B,n,n] -> [B,2n+1,n]. Their mean (Eq. 6) is mu; their covariance (Eq. 7) is
    2(kappa+n)/(2n+1)·Σ, which is Σ for kappa = 1/2 alone. Raises UserError for kappa <= -n.
    """
    n = mu.shape[-1]
    check_sigma_points(1, n, kappa)
    columns = torch.diag_embed(scale) if scale.dim() == 2 else scale.mT  # [B,n,n], row i is column i of L
    radius = math.sqrt(kappa + n)
    mu = mu.unsqueeze(1)
    return torch.cat([mu, mu + radius * columns, mu - radius * columns], dim=1)  # [B,2n+1,n]


def sample_sigma_points(
    mu: Tensor, scale: Tensor, k: int, heuristic: str = "random", kappa: float = 0.5, generator: Generator | None = None
) -> Tensor:
    """K of the 2n+1 sigma points, chosen for each image by itself and without replacement (Eq. 9, Appendix C).

    mu [B,n], standard deviations [B,n] or L [B,n,n] -> [B,K,n]. heuristic: `random`: any of the 2n+1; `pairs`: both
    points of random axes; `largest`, without chance: both points of the axes with the longest columns of L, for a
    diagonal Σ its largest eigenvalues. The last two add the mean if K is odd. Raises UserError for K outside 1..2n+1,
    kappa <= -n, or an unknown heuristic.
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
        place = F.pad(torch.cat([plus, plus + n], dim=1), (k % 2, 0))  # odd K: 0 in front, the mean
    else:
        raise UserError(f"heuristic {heuristic!r}: choose from {', '.join(HEURISTICS)}")
    around_zero = sigma_points(torch.zeros_like(mu), scale, kappa)  # mu's gradient is of K points alone
    return mu.unsqueeze(1) + around_zero.gather(1, place.unsqueeze(2).expand(-1, -1, n))  # [B,K,n]


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
    """2-Wasserstein metric from N(mu, Σ) to N(0, I), the root of ‖mu‖² + ‖L - I‖²_F, which Eq. 19 calls W₂: -> [B].

    mu [B,n], scale the standard deviations [B,n] or L [B,n,n]. `squared` returns the sum itself. For a diagonal Σ this
    is the true metric (Eq. 20), for a full L the paper's surrogate: Eq. 19 takes tr(L) for tr(Σ^½). Its gradient at 0
    is 0.
    """
    identity = 1.0 if scale.dim() == 2 else torch.eye(mu.shape[1], device=mu.device, dtype=mu.dtype)
    difference = torch.cat([mu, (scale - identity).flatten(1)], dim=1)
    return difference.square().sum(1) if squared else torch.linalg.vector_norm(difference, dim=1)


def wasserstein2_norms(mu: Tensor, scale: Tensor) -> Tensor:
    """‖mu‖ + ‖L - I‖_F, the sum of two norms that the authors' published code has in place of W₂: -> [B].

    Not in the paper. As W₂'s, its gradient does not fade near the prior; at 0 it is 0.
    """
    identity = 1.0 if scale.dim() == 2 else torch.eye(mu.shape[1], device=mu.device, dtype=mu.dtype)
    return torch.linalg.vector_norm(mu, dim=1) + torch.linalg.vector_norm((scale - identity).flatten(1), dim=1)


def largest_variance(scale: Tensor) -> Tensor:
    """λ_max(Σ), taken as the largest diagonal entry of Σ (below Eq. 12; exact for a diagonal Σ): -> [B]."""
    return variances(scale).amax(1)


def gradient_penalty(
    decoder: nn.Module, mu: Tensor, generator: Generator | None = None, fold: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Unbiased one-draw estimate of ‖J‖²_F, a sum over pixels, J the decoder's Jacobian at mu (Eq. 12, 16): -> [B].

    mu [B,n]. Of a `Decoder` as it was built E‖J u‖² = ‖J‖²_F, u ~ N(0, I) over latents, by forward-mode differentiation
    (Hutchinson); `fold` is what `decoder.fold` gave for mu's batch. Of any other module, z -> images [B,C,H,W],
    E‖Jᵀ v‖² = ‖J‖²_F, v = ±1 over pixels, by double backward, without dropout or a caller's autocast.

    In training mode batch norm takes the statistics of these B means, which depend on mu and are differentiated
    through, in evaluation mode the running ones; the latter are never changed. By the batch's statistics an image
    depends on all latents: value i is then of the squared norm of those rows of the batch's J that belong to image i
    (of other modules, of the columns that belong to mu_i), and the expectation of the sum is ‖J‖²_F. In training the
    loss beside it normalises B·K points and the penalty B means, in validation both by the running statistics:
    `train_gp` and `val_gp` are two measures.
    """
    mu = mu.to(torch.promote_types(mu.dtype, torch.float32))  # a head under a caller's autocast gives bfloat16
    if type(decoder) is Decoder and repr(decoder) == decoder.built:  # repr lists all layers and their settings
        u = torch.randn(mu.shape, device=mu.device, dtype=mu.dtype, generator=generator)
        return decoder.jvp(mu, u, fold).square().sum((1, 2, 3))  # J u [B,C,H,W]
    fp32 = torch.autocast(mu.device.type, enabled=False)
    eager = torch.compiler.set_stance("force_eager")
    attention = sdpa_kernel(SDPBackend.MATH)  # fused attention, like compiled code, cannot be differentiated twice
    with batch_statistics(decoder), fp32, eager, attention, torch.enable_grad():
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


def autocast(net: nn.Module, device: torch.device):
    """bfloat16 where the net's flag `bf16` says so; else whatever autocast the caller has in force."""
    return torch.autocast(device.type, torch.bfloat16) if net.bf16 else nullcontext()


class Encoder(nn.Module):
    """x [B,C,H,W] in [-1,1] -> features [B, self.features]: the five 3×3 stride-2 convolutions of Table 4 behind one
    from C to 32 channels."""

    bf16 = False  # run the convolutions in bfloat16

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
        with autocast(self, x.device):
            h = self.layers[:-3](x)  # [B,512,1,1], of 64×64 images [B,512,2,2]
            if self.bf16:  # as a matrix product of the taps in the image (paper/README.md, Speed)
                side = h.shape[-1]
                taps = self.layers[-3].weight[..., 1 : 1 + side, 1 : 1 + side]
                h = F.linear(h.flatten(1), taps.flatten(1))[..., None, None]
            else:
                h = self.layers[-3](h)
        return self.layers[-2:](h.to(x.dtype)).flatten(1)


class GaussianHead(nn.Module):
    """Features [B,features] -> mu [B,n] and scale: σ [B,n], or with full covariance L [B,n,n], whose diagonal σ is then
    (Table 4, footnote 7)."""

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
        self.built = repr(self)  # `jvp` is of these layers and this `forward`: change both, or derive a class

    def forward(self, z: Tensor, fold: tuple[Tensor, Tensor] | None = None) -> Tensor:
        with autocast(self, z.device):
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
        with autocast(self, z.device):
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
        with autocast(self, z.device):
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
    """Value h and tangent t [M,C,H,W] behind a batch norm, whose buffers stay: in training mode by the batch's
    statistics (in float32 at least), whose own tangents are part of t, in evaluation mode by the running ones."""
    if not layer.training:
        return layer(h), t * (layer.weight * (layer.running_var + layer.eps).rsqrt()).to(t.dtype)[:, None, None]
    dtype = h.dtype
    over = {"dim": (0, 2, 3), "keepdim": True}
    h, t = (x.to(torch.promote_types(dtype, torch.float32)) for x in (h, t))
    s = (h.var(correction=0, **over) + layer.eps).sqrt()
    h = F.batch_norm(h, None, None, training=True, eps=layer.eps)  # normalised
    weight, bias = layer.weight[:, None, None], layer.bias[:, None, None]
    t = (t - t.mean(**over) - h * (h * t).mean(**over)) * (weight / s)
    return (weight * h + bias).to(dtype), t.to(dtype)


@contextmanager
def batch_statistics(module: nn.Module):
    """Evaluation mode for a while, but batch norms that are in training mode take the batch's statistics; no buffer is
    changed. For double backward: the gradient of torch's forward mode has the statistics of norms constant."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    running = [(norm.running_mean, norm.running_var) for norm in norms]
    with eval_mode(module):
        for norm in norms:
            norm.running_mean = norm.running_var = None  # without them evaluation mode takes the batch's
        try:
            yield
        finally:
            for norm, (mean, variance) in zip(norms, running, strict=True):
                norm.running_mean, norm.running_var = mean, variance


@contextmanager
def eval_mode(module: nn.Module):
    """The module in evaluation mode for a while: batch norm uses its running statistics and leaves them alone."""
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, before in training:
            part.training = before


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
    return load_identified(name, data_dir, image_size)[0]


def load_identified(name: str, data_dir: str | Path, image_size: int | None) -> tuple[Dataset, str]:
    """`load_dataset`, and the digest by which a run knows its own images again ("" of the data sets with a name)."""
    size = image_size or DEFAULTS.get(name, OWN)["image_size"]
    data_dir, digest = Path(data_dir), ""
    if name in DEFAULTS:
        splits, _ = LOADERS[name](data_dir, size)
    else:
        own = own_images(name)
        images, digest = read_folder(own, data_dir, size) if own.is_dir() else read_arrays(own)
        splits = hold_out(images)
    data = Dataset(*(crop_and_resize(split, size) for split in splits))
    values = [int(value) for split in data if digest and len(split) for value in split.aminmax()]
    if values and max(values) - min(values) < LEVELS:
        raise UserError(f"{name}: all images are from {min(values)} to {max(values)} of 255, scale them to 0 to 255")
    return data, digest


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
    folder = data_dir / "celeba" / "img_align_celeba"
    partition = folder.with_name("list_eval_partition.txt")
    if not folder.is_dir() or not partition.is_file():
        raise UserError(f"CelebA: put the folder img_align_celeba/ and list_eval_partition.txt into {folder.parent}/")
    splits = [[], [], []]
    with explained(f"{partition} needs lines '<file name> <0|1|2>'"):
        for line in partition.read_text().splitlines():
            name, split = line.split()
            splits[int(split)].append(folder / name)
        if not all(splits):
            raise UserError("one of 0 (training), 1 (validation), 2 (test) has no images")
    # Not 1.4 GB of bytes at each start: the set is fixed, and no other 200,000 JPEG files have these names and sizes
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for split in splits for file in split]
    return decode_images(splits, size, data_dir, repr(stats), crop=148), None


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

SPLIT_WORDS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
LEVELS = 32  # of 256: in fewer lie masks of 0 and 1, or 12 of 16 bits, whose images would be black


def own_images(name: str) -> Path:
    """The folder, .npy or .npz that a data set's name is the path of. Raises UserError."""
    path = Path(name).expanduser()
    if not path.is_dir() and not (path.suffix in (".npy", ".npz") and path.is_file()):
        raise UserError(f"--dataset {name}: neither {', '.join(DEFAULTS)} nor a folder, .npy or .npz that is there")
    return path


def split_words(name: str) -> set[str]:
    """Words of a folder's name that call it a split: of seg_train, Testing, val2017, testB; none of valley, contest."""
    return SPLIT_WORDS & {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def read_folder(root: Path, data_dir: Path, size: int) -> tuple[dict[str, Tensor], str]:
    """The images below a folder as `train`, or by its folders train/ val/ test/: uint8 [N,3,size,size] each; and the
    digest of all files. Raises UserError for what would be left out or pooled."""
    files = image_files(root, pool=False)
    children = [child for child in sorted(root.iterdir()) if child.is_dir() or is_image(child)]
    splits = [name for name in ("train", "val", "test") if root / name in children]
    if splits not in ([], ["train"], ["train", "test"], ["train", "val", "test"]):
        found = "/ and ".join(splits)
        raise UserError(f"{root}/ has {found}/ alone: rename them train/ test/ (val/ to test/) or train/ val/ test/")
    for child in children:
        like_a_split = child.is_dir() and split_words(child.name)
        if child.name not in splits and not child.name.startswith(".") and (splits or like_a_split):
            raise UserError(f"{child} is none of train/ val/ test/: rename or move it (it would be left out or pooled)")
    parts = [[file for file in files if file.relative_to(root).parts[0] == name] for name in splits] or [files]
    if not all(parts):
        raise UserError(f"{root}/ has no images in one of {'/ '.join(splits)}/ (links to another's do not count)")
    digest = digest_files(root, files)
    return dict(zip(splits or ["train"], decode_images(parts, size, data_dir, digest), strict=True)), digest


def is_image(file: Path) -> bool:
    """Whether PIL opens files of this name."""
    return Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN


def image_files(folder: Path, pool: bool = True) -> list[Path]:
    """All image files below a folder, sorted by name, without hidden ones; links are followed, but a real folder or
    file comes once. Notes other files. Raises UserError if there are none or a folder cannot be listed, without `pool`
    also if folders side by side in one below it name two splits."""
    seen, folders, images, others = set(), [folder], [], []
    for top in folders:  # which grow meanwhile
        with explained(f"cannot list {top}/"):
            found = sorted((x.name, x.is_dir(), Path(x)) for x in os.scandir(top) if not x.name.startswith("."))
        splits = {word for name, is_dir, _ in found if is_dir for word in split_words(name)}
        if not pool and top != folder and len(splits) > 1:
            raise UserError(f"{top}/ has {' and '.join(sorted(splits))}, to be pooled: give it as --dataset, or rename")
        for name, is_dir, path in found:
            if not is_dir and not is_image(path):
                others.append(name)
            elif (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                (folders if is_dir else images).append(path)
    if not images:
        raise UserError(f"{folder}/ has no images that PIL opens (of a hub's tables make an .npz: README, Data)")
    if others:
        note(f"left out below {folder}/, PIL opens no such images: {others[0]} ({len(others)} in all)")
    return sorted(images)


def digest_files(root: Path, files: list[Path]) -> str:
    """A sha256 of names below root and bytes: sizes and times tell no data sets apart, pixels differ by processor."""

    def digest(file: Path) -> tuple[str, str]:
        found = hashlib.sha256()
        with explained(f"cannot read {file}"), open(file, "rb") as content:
            while block := content.read(1 << 20):
                found.update(block)
        return file.relative_to(root).as_posix(), found.hexdigest()

    with ThreadPoolExecutor() as pool:
        known = list(progress("reading images", len(files), pool.map(digest, files)))
    return hashlib.sha256(repr(known).encode()).hexdigest()


def read_image(file: Path) -> Tensor:
    """One image file as RGB uint8 [3,H,W]; transparency over white, 16-bit grey scaled. Raises UserError naming it."""
    with explained(f"cannot read {file}"):
        image = Image.open(file)
        tags = image.tag_v2 if image.format == "TIFF" else {}
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format not in ("MPO", "PSD"):  # a phone's photo with its preview; layers
            raise UserError(f"{frames} frames or pages, save each as a file")
        deep = max(tags.get(258, (8,))) > 8 or ";16B" in str(image.tile)  # TIFF's BitsPerSample, PNG's raw mode
        if deep and image.mode[0] not in "IF":
            raise UserError("more than 8 bits in colour, of which the lower would be lost, scale them to 8")
        if tags.get(262) == 2 and tags.get(277) > 3 and tags.get(338) not in ((1,), (2,)):  # RGB, ExtraSamples
            raise UserError(f"RGB with {tags[277]} bands, and none is said to be alpha, save three")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.mode in ("I", "F"):
            raise UserError(f"mode {image.mode} has no fixed range, save 8 bits a channel")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def decode_images(splits: list[list[Path]], size: int, data_dir: Path, known: str, crop: int = 0) -> list[Tensor]:
    """Splits of image files, centre-cropped (to `crop` pixels, or to a square) and resized: uint8 [N,3,size,size] each,
    decoded once into a file named after what is `known` of them, and memory-mapped ever after. When all have been
    tried, raises UserError for those that cannot be read."""

    def decoded(file: Path) -> Tensor | UserError:
        try:
            return crop_and_resize(read_image(file), size, crop)
        except UserError as error:
            return error

    files = [file for split in splits for file in split]
    top = Path(os.path.commonpath([file.parent for file in files])).resolve()
    key = hashlib.sha256(repr((known, crop, "v3")).encode()).hexdigest()[:16]  # v3: of read_image
    cache = data_dir / "decoded" / f"{top.name[:40]}-{size}-{key}.npy"
    if not cache.exists():
        with replacing(cache) as temporary, ThreadPoolExecutor() as pool:
            temporary.touch()  # can it be written there?
            for leftover in cache.parent.glob(f".tmp-*@{platform.node()}@*"):  # of this host
                with suppress(PermissionError):  # lives, of another user
                    try:
                        os.kill(int(leftover.name[5:].split("@")[0]), 0)  # asks whether it lives
                    except ProcessLookupError:
                        leftover.unlink(missing_ok=True)
            squares = list(progress("decoding images", len(files), pool.map(decoded, files)))
            failed = [str(square) for square in squares if isinstance(square, UserError)]
            if failed:
                raise UserError(f"{'; '.join(failed[:10])} ({len(failed)} of {len(files)} images)")
            np.save(temporary, torch.stack(squares).numpy())
    with explained(f"cannot read {cache}, remove it"):
        return list(torch.from_numpy(np.load(cache, mmap_mode="c")).split([len(split) for split in splits]))


def read_arrays(file: Path) -> tuple[dict[str, Tensor], str]:
    """As `read_folder`, of an .npy, or of an .npz with `train`, `train test` or `train val test`: uint8 [N,3,H,W]."""
    with explained(f"cannot read {file}"):
        loaded = np.load(file)
        arrays = {"train": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        if sorted(arrays) not in (["train"], ["test", "train"], ["test", "train", "val"]):
            raise UserError(f"name its arrays train, train test or train val test, not {' '.join(arrays)}")
        return {name: to_images(array) for name, array in arrays.items()}, digest_files(file, [file])


def to_images(x: np.ndarray) -> Tensor:
    """uint8 [N,H,W] or [N,H,W,1 or 3] -> RGB [N,3,H,W]. Raises UserError with what makes it of others."""
    channels = x.shape[3] if x.ndim == 4 else 1
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or channels not in (1, 3):
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
# What loading needs: errors of one line, files that are never half-written, a note, a progress bar


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
    temporary = path.with_name(f".tmp-{os.getpid()}@{platform.node()}@{path.name}")
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


@functools.cache
def note(text: str) -> None:
    """Print a warning, once."""
    print(f"note: {text}", file=sys.stderr)


def progress(description: str, total: int, items=None) -> tqdm:
    """A progress bar over images, on rank 0 and on a terminal only."""
    return tqdm(items, desc=description, total=total, unit="img", leave=False, disable=RANK > 0 or None)
