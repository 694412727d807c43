"""Tests of paper.benchmark and paper.gradient_noise."""

import csv
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
import ut_vae
from common import UserError
from paper import benchmark, gradient_noise

HERE = Path(__file__).parent.parent
TINY = ["--limit-train", "96", "--limit-eval", "80", "--batch-size", "32", "--width", "0.02"]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, from the same seed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark


def trained_decoder(kind, n=3):
    decoder = kind(n, 3, 32, 0.01).double().eval()
    for buffer in (b for name, b in decoder.named_buffers() if "running" in name):
        buffer.uniform_(0.5, 1.5)
    with torch.no_grad():
        decoder.first.weight.mul_(4)  # so that the tanh bends
    return decoder


def test_the_plain_path_is_the_same_function_with_the_same_gradients():
    decoder = trained_decoder(common.Decoder)
    plain = benchmark.StockDecoder(3, 3, 32, 0.01).double().eval()
    plain.load_state_dict(decoder.state_dict())
    found = []
    for net in (decoder, plain):
        z = torch.linspace(-1, 1, 30).double().view(10, 3).requires_grad_()
        assert (net.fold(z) is None) == (net is plain)
        images = net(z, net.fold(z))
        weights = torch.linspace(-1, 1, images.numel()).double().view_as(images)
        found.append([images, *torch.autograd.grad((images * weights).sum(), [z, *net.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_plain_penalty_is_the_jacobians_norm_on_average():
    decoder = trained_decoder(common.Decoder)
    mu = torch.randn(2, 3).double().requires_grad_()
    columns = [torch.autograd.functional.jvp(decoder, mu, u.expand_as(mu).double())[1] for u in torch.eye(3)]
    exact = sum(column.flatten(1).square().sum(1) for column in columns)
    draws = benchmark.stock_penalty(decoder, mu.repeat(2000, 1)).detach().view(2000, 2)
    error = draws.std(0) / math.sqrt(2000)
    assert ((draws.mean(0) - exact).abs() < 4 * error).all() and (error < 0.05 * exact).all()
    penalty = benchmark.stock_penalty(decoder, mu.detach().requires_grad_())
    assert torch.autograd.grad(penalty.sum(), decoder.linear.weight)[0].abs().sum() > 0


@pytest.mark.parametrize("name", benchmark.SCRIPTS)
def test_the_benchmark_prints_what_it_measured_and_writes_nothing(name, capsys, monkeypatch):
    script = importlib.import_module(name)
    monkeypatch.setattr(benchmark, "measure_loader", lambda *_: dict.fromkeys(LOADER, 1.0))
    keep_memory = common.keep_memory
    monkeypatch.setattr(common, "keep_memory", keep_memory)  # put back what `stock` replaces
    for part in ("Decoder", "gradient_penalty"):
        if hasattr(script, part):
            monkeypatch.setattr(script, part, getattr(script, part))
    monkeypatch.setattr(benchmark, "matmul_peak", lambda *_: 1e12)
    shape = ["--dataset", "cifar10", "--latent-dim", "8", "--width", "0.02", "--batch-size", "8"]
    results = benchmark.main([f"{name}.py", *shape, "--steps", "2"])
    output = capsys.readouterr().out
    for words in (f"{name}.py on cpu", "images/s", "points/s", "ms a step", "TFLOP/s", "peak memory", "[3, 32, 32]"):
        assert words in output
    assert all(value > 0 for value in results.values())
    stock = benchmark.main([f"{name}.py", *shape, "--steps", "1", "--stock"])
    assert f"{name}.py --stock" in capsys.readouterr().out
    assert script.Decoder is benchmark.StockDecoder
    assert common.keep_memory is not keep_memory
    folded = name not in ("rae", "wae_mmd")  # 8 points are too few to fold
    assert (results["tflop"] < stock["tflop"]) == folded
    assert not list(Path().iterdir())


LOADER = ("loader_images_per_s", "dataloader_images_per_s", "loader_ratio")


def test_the_loaders_are_measured(monkeypatch):
    args = ut_vae.arguments(["--dataset", "cifar10", "--batch-size", "8"])
    results = benchmark.measure_loader(args, torch.device("cpu"))
    assert set(results) == set(LOADER) and all(value > 0 for value in results.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nosuch.py"], "nosuch.py"), (["uae.py", "--steps", "0"], "0 is not at least 1"),
     (["uae.py", "--nosuch"], "--nosuch"), ([], "script")],
)  # fmt: skip
def test_a_wrong_command_of_the_benchmark_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_the_command_of_the_readme_runs():
    command = ["-m", "paper.benchmark", "uae.py", "--dataset", "cifar10", "--k", "2", "--steps", "1", "--width", "0.02"]
    command += ["--batch-size", "8"]
    done = subprocess.run([sys.executable, *command, "--stock"], capture_output=True, text=True, cwd=HERE, check=True)
    assert "images/s" in done.stdout and "loader" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Fig. 4


class Constant(nn.Module):
    """An encoder whose posterior is always the same."""

    def __init__(self, mu, sigma):
        super().__init__()
        self.posterior = mu, sigma

    def forward(self, x):
        return self.posterior


def test_gradient_noise_of_a_linear_decoder_is_that_by_hand():
    n, pixels, sigma, copies = 3, 4, 0.5, 900
    decoder = nn.Sequential(nn.Linear(n, pixels), nn.Unflatten(1, (1, 2, 2))).double()
    decoder[0].weight.data = torch.linspace(-1, 1, n * pixels).double().view(pixels, n)
    mu = torch.tensor([[1.0, -2.0, 0.7]]).double()
    means, x = mu.expand(copies, n), decoder(mu).detach() + torch.tensor([0.3, -0.3, 0.2, -0.2]).view(1, 1, 2, 2)
    encoder = Constant(means, sigma * torch.ones_like(means))
    noise = gradient_noise.gradient_noise(encoder, decoder, x.expand(copies, 1, 2, 2))
    assert noise["pair_cv"] < 1e-9  # μ ± a column: their mean image is D(μ), their mean gradient that at μ
    # two samples: z̄ ~ N(μ, σ²/2), so E[(x - D(z̄)) z̄ᵀ] = (x - D(μ)) μᵀ - W σ²/2, and for the bias x - D(μ)
    residual, weight = x.flatten() - decoder(mu).flatten(), decoder[0].weight
    at_mu = torch.cat([(residual[:, None] * mu).flatten(), residual])
    true = torch.cat([(residual[:, None] * mu - weight * sigma**2 / 2).flatten(), residual])
    expected = ((at_mu - true).abs() / true.abs()).median().item()
    assert expected > 0.05 and abs(noise["gradient_bias"] - expected) < 0.3 * expected
    z = mu + sigma * torch.randn(20_000, 2, n).double().mean(1)
    residuals = x.flatten() - decoder(z).flatten(1)
    gradients = torch.cat([(residuals.unsqueeze(2) * z.unsqueeze(1)).flatten(1), residuals], dim=1)
    expected = (gradients.std(0) / gradients.mean(0).abs()).median().item() / math.sqrt(copies)
    assert abs(noise["samples_cv"] - expected) < 0.15 * expected


def test_image_bias_of_a_quadratic_decoder_is_that_by_hand():
    """D(z) = z² at N(0, σ²): a pair on axis i gives (κ+n) σ_i² in pixel i, on average (κ+n)/n σ_i²; true is σ_i²."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1).double())

        def forward(self, z):
            return self.gain * z.square().view(-1, 1, 2, 2)

    n, kappa, images = 4, 3.0, 2000
    sigma = torch.tensor([[1.0, 0.5, 2.0, 1.5]]).double().expand(images, n)
    x = torch.zeros(images, 1, 2, 2).double()
    noise = gradient_noise.gradient_noise(Constant(torch.zeros_like(sigma), sigma), Square(), x, kappa)
    # an image's own error is that of 50 draws of a pair: (κ+n) · Binomial(50, 1/n)/50, against 200 draws of two samples
    pair = (kappa + n) * torch.distributions.Binomial(50, torch.full((100_000,), 1 / n)).sample() / 50
    true = torch.distributions.Chi2(torch.tensor(400.0)).sample((100_000,)) / 400
    expected = ((pair - true).abs() / true).median().item()
    assert expected > 0.5 and abs(noise["image_bias"] - expected) < 0.05 * expected


def test_gradient_noise_leaves_nets_and_random_stream_as_they_were():
    args = ut_vae.arguments(["--width", "0.02"])
    model = common.prepare(ut_vae.nets(args), args, torch.device("cpu"))
    model["encoder"].eval()
    x = torch.rand(4, 1, 32, 32) * 2 - 1
    before, stream = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    noise = gradient_noise.gradient_noise(*model.values(), x)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(0 < value < math.inf for value in noise.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model["encoder"].training, model["decoder"].training) == (False, True)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fig_4_is_one_command_beside_the_training_of_ut_vae(monkeypatch):
    monkeypatch.setattr(gradient_noise, "PAIRS", 4)
    monkeypatch.setattr(gradient_noise, "SAMPLES", 6)
    trained, prepare, measured = {}, common.prepare, None
    for script, extra in (
        (gradient_noise, ["--seeds", "0", "1"]),
        (ut_vae, ["--k", "2", "--sigma-points", "pairs", "--fid", "none"]),
    ):
        spy = lambda nets, args, *a, key=script: trained.setdefault((key, args.seed), prepare(nets, args, *a))  # noqa: E731
        monkeypatch.setattr(common, "prepare", spy)
        results = script.main([*TINY, "--epochs", "2", *extra])
        measured = results if script is gradient_noise else measured
    (folder,) = Path("runs").glob("gradient_noise-*")
    with open(folder / "gradient_noise.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["epoch"]) for row in rows] == [("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")]
    assert list(rows[0])[2:] == ["pair_cv", "samples_cv", "gradient_bias", "image_bias"]
    assert all(0 < float(row[name]) < math.inf for row in rows for name in list(row)[1:])
    assert rows[0]["pair_cv"] != rows[2]["pair_cv"]
    ratios = sorted(float(row["pair_cv"]) / float(row["samples_cv"]) for row in rows)
    assert f"is {ratios[0]:.2f} to {ratios[-1]:.2f} times that of two" in gradient_noise.summary(measured)
    assert np.asarray(Image.open(folder / "gradient_noise.png")).std() > 1
    (run,) = Path("runs").glob("ut_vae-*")
    last = torch.load(run / "last.pt", weights_only=True)["model"]
    ours = trained[gradient_noise, 0].state_dict()
    assert all(torch.equal(ours[name], value) for name, value in last.items())  # the training is the same
    assert json.loads((run / "args.json").read_text())["sigma_points"] == "pairs"
    for flags, why in (
        (["--seed=1"], "give --seeds"),
        (["--resume", str(run)], "anew"),
        (["--fid", "tf"], "not images"),
    ):
        with pytest.raises(UserError, match=f"^{flags[0].partition('=')[0]} is not for paper.gradient_noise: .*{why}"):
            gradient_noise.main(flags)
