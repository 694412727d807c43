"""Tests of paper.benchmark, paper.gradient_noise, paper.idea and paper.sheet."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox
from PIL import Image
from torch import nn

import common
import harness
import rae
import uae
import ut_vae
from common import UserError
from paper import agreement, benchmark, gradient_noise, idea, sheet

TINY = ["--epochs", "1", "--limit-train", "96", "--limit-eval", "30", "--batch-size", "32", "--width", "0.02"]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, from the same seed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_the_plain_path_is_the_same_function_with_the_same_gradients_and_penalty():
    n, found = 3, []
    decoder, plain = (kind(n, 3, 32, 0.01).double().eval() for kind in (common.Decoder, benchmark.StockDecoder))
    decoder.first.weight.data.mul_(4)  # so that the tanh bends
    plain.load_state_dict(decoder.state_dict())
    for net in (decoder, plain):
        z = torch.linspace(-1, 1, 30).double().view(10, n).requires_grad_()
        assert (net.fold(z) is None) == (net is plain)
        images = net(z, net.fold(z))
        weights = torch.linspace(-1, 1, images.numel()).double().view_as(images)
        found.append([images, *torch.autograd.grad((images * weights).sum(), [z, *net.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    mu, units = torch.randn(2, n).double(), torch.eye(2 * n).double().view(-1, 2, n)
    for training in (True, False):  # by sums: the plain path splits the batch's by columns
        exact = sum(decoder.train(training).jvp(mu, u).square().sum() for u in units)
        draws = torch.stack([common.gradient_penalty(plain.train(training), mu).sum().detach() for _ in range(300)])
        assert (draws.mean() - exact).abs() < 4 * draws.std() / 300**0.5 and draws.std() < exact


def test_the_benchmark_prints_what_it_measured_and_writes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_peak", lambda *_: 1e12)
    shape = "--dataset cifar10 --latent-dim 8 --width 0.02 --batch-size 8"
    command = ["uae.py", *shape.split(), "--steps", "1"]
    measured, output = benchmark.main(command), capsys.readouterr().out
    for words in ("uae.py on cpu", "points/s", "ms a step", "TFLOP/s", "peak memory of the process so far"):
        assert words in output
    assert min(measured.values()) > 0 and "plain path" not in output
    seconds = iter([1, 5, 6, 7, 2, 1, 5, 6, 7, 4, 2, 5, 6, 7, 4])  # this code, without each, the plain path, and again
    measure, found = benchmark.measure, []
    monkeypatch.setattr(benchmark, "measure", lambda *a: found.append(measure(*a) | {"ms": next(seconds)}) or found[-1])
    benchmark.main([*command, "--stock", "3"])
    output = capsys.readouterr().out
    folded, unfolded, twice, contiguous, plain = (result["tflop"] for result in found[:5])
    assert folded < min(unfolded, twice) and max(unfolded, twice) < plain and folded == contiguous
    assert re.findall(r" (\d.0) ms a", output) == ["1.0", "5.0", "6.0", "7.0", "4.0"]  # medians
    rates = [result["images_per_s"] for result in found[::5]]
    assert f"this code: {np.mean(rates):.2f} ± {np.std(rates, ddof=1):.2f} images/s" in output
    assert "the plain path: 2.67 ± 1.15 times as long (3 times in alternation)" in output
    assert "without folding: 4.17 ± 1.44 times" in output and "without channels last: 5.83 ± 2.02" in output
    assert uae.Decoder is common.Decoder and uae.gradient_penalty is common.gradient_penalty
    assert not list(Path().iterdir())
    for arguments, message in (
        (["nosuch.py"], "nosuch.py"), (["uae.py", "--steps", "0"], "--steps 0"), ([], "script"),
        (["uae.py", "--stock", "2"], "--stock 2: give 3"), (["uae.py", "--batch-size", "1"], "--batch-size 1: give 2"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            benchmark.main(arguments)
        assert re.fullmatch(f"paper.benchmark: error: .*{message}.*\n", capsys.readouterr().err)


def constant(mu, sigma):
    """An encoder whose posterior is always the same."""
    encoder = nn.Module()
    encoder.forward = lambda x: (mu, sigma)
    return encoder


def test_gradient_noise_of_a_linear_decoder_is_that_by_hand():
    n, pixels, sigma, copies = 3, 4, 0.5, 900
    decoder = nn.Sequential(nn.Linear(n, pixels), nn.Unflatten(1, (1, 2, 2))).double()
    weight = decoder[0].weight.data = torch.linspace(-1, 1, n * pixels).double().view(pixels, n)
    mu = torch.tensor([[1.0, -2.0, 0.7]]).double()
    means, x = mu.expand(copies, n), decoder(mu).detach() + torch.tensor([0.3, -0.3, 0.2, -0.2]).view(1, 1, 2, 2)
    encoder = constant(means, sigma * torch.ones_like(means))
    noise = gradient_noise.gradient_noise(encoder, decoder, x.expand(copies, 1, 2, 2))
    assert noise["pair_cv"] < 1e-9  # μ ± a column: their mean image is D(μ), their mean gradient that at μ
    # two samples: z̄ ~ N(μ, σ²/2), so E[(x - D(z̄)) z̄ᵀ] = (x - D(μ)) μᵀ - W σ²/2, and for the bias x - D(μ)
    residual = (x - decoder(mu)).flatten().detach()
    at_mu = torch.cat([(residual[:, None] * mu).flatten(), residual])
    true = torch.cat([(residual[:, None] * mu - weight * sigma**2 / 2).flatten(), residual])
    expected = ((at_mu - true).abs() / true.abs()).median().item()
    assert expected > 0.05 and abs(noise["gradient_bias"] - expected) < 0.3 * expected
    z = mu + sigma * torch.randn(20_000, 2, n).double().mean(1)
    residuals = x.flatten() - decoder(z).flatten(1).detach()
    gradients = torch.cat([(residuals.unsqueeze(2) * z.unsqueeze(1)).flatten(1), residuals], dim=1)
    expected = (gradients.std(0) / gradients.mean(0).abs()).median().item() / math.sqrt(copies)
    assert abs(noise["samples_cv"] - expected) < 0.15 * expected


class Squares(nn.Linear):
    def forward(self, z):
        return super().forward(z.square()).view(-1, 1, 1, 1)


def test_gradient_noise_is_of_the_radius_that_is_asked_for(monkeypatch):
    """Of D(z) = w z² a pair's mean image is w (μ² + (κ + 1) σ²), that of samples w (μ² + σ²)."""
    monkeypatch.setattr(gradient_noise, "SAMPLES", 500)
    encoder, x = constant(torch.ones(50, 1), torch.full((50, 1), 0.5)), torch.zeros(50, 1, 1, 1)
    for kappa in (0, 3):
        noise = gradient_noise.gradient_noise(encoder, Squares(1, 1, bias=False), x, kappa)
        assert noise["image_bias"] == pytest.approx(kappa * 0.5**2 / (1 + 0.5**2), abs=0.05)


def test_fig_4_is_one_command_beside_the_training_of_ut_vae(monkeypatch):
    monkeypatch.setattr(gradient_noise, "PAIRS", 4)
    monkeypatch.setattr(gradient_noise, "SAMPLES", 6)
    trained, prepare = [], harness.prepare
    monkeypatch.setattr(harness, "prepare", lambda *a: trained.append(prepare(*a)) or trained[-1])
    monkeypatch.setitem(common.DEFAULTS["digits"], "flip", True)
    losses, step, kappas, noise = [], harness.Linear.step, set(), gradient_noise.gradient_noise
    monkeypatch.setattr(harness.Linear, "step", lambda *a: losses.extend(a[1:]) or step(*a))
    monkeypatch.setattr(gradient_noise, "gradient_noise", lambda *a: kappas.add(a[3]) or noise(*a))
    argv = [*TINY, "--epochs", "2", "--kappa", "2", "--limit-eval", "45"]  # of validation a batch of 32 and one of 13
    ut_vae.main([*argv, "--k", "2", "--sigma-points", "pairs", "--fid", "none"])
    measured = gradient_noise.main([*argv, "--seeds", "0", "1"])
    (folder,), (run,) = Path("runs").glob("gradient_noise-*"), Path("runs").glob("ut_vae-*")
    rows = np.genfromtxt(folder / "gradient_noise.csv", delimiter=",", names=True)
    assert [*rows["seed"]] == [0, 0, 1, 1] and [*rows["epoch"]] == [1, 2, 1, 2]
    ratios = sorted(rows["pair_cv"] / rows["samples_cv"])
    assert f"is {ratios[0]:.2f} to {ratios[-1]:.2f} times that of two" in gradient_noise.summary(measured)
    assert np.asarray(Image.open(folder / "gradient_noise.png")).std() > 1
    last = torch.load(run / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(trained[1].state_dict()[name], value) for name, value in last.items())  # the same training
    assert losses[2:4] == pytest.approx(losses[:2], rel=1e-6) and len(losses) == 6 and kappas == {2}
    for flag, why in (
        ("--seed=1", "give --seeds"), ("--resume", "new trainings"), ("--k=8", "K = 2"), ("--epochs=0", "1 or m"),
        ("--epochs=2", "is there: remov"), ("--sigma-points=largest", "K = 2"), ("--fid=lite0", "no images"),
        ("--fid-method=eigh", "no images"), ("--save-images", "no images"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            gradient_noise.main([*argv, flag])
    with pytest.raises(UserError, match="not finite after epoch 1, seed 0: lower --lr"):
        gradient_noise.main([*argv, "--lr", "1e30"])


def test_the_idea_shows_what_points_decode_to_where_they_lie_and_how_far_their_mean_images_are_off(monkeypatch, capsys):
    monkeypatch.setattr(idea, "TRAINING", f"{idea.TRAINING} --limit-train 96 --width 0.02")
    monkeypatch.setattr(idea, "SCALES", (0, 99))
    monkeypatch.setattr(idea, "DRAWS", 40)
    examples = idea.main(["--epochs", "1", "--out", "pictures/idea.png"])
    assert capsys.readouterr().out.startswith("wrote pictures/idea.png: ")
    assert np.asarray(Image.open("pictures/idea.png")).std() > 1 and len(examples) == 3 and not Path("runs").exists()
    e = examples[0]
    assert torch.equal(e.points[0], common.sigma_points(e.mu[None], e.scale[None], 0.5)[0])
    for which in (0, 1):
        axes = Figure().subplots()
        idea.draw_plane(axes, e, which, torch.zeros(7, 2))
        boxes = [each for each in axes.get_children() if isinstance(each, AnnotationBbox)]
        assert np.allclose([box.xy for box in boxes], e.points[which])
        assert all(np.array_equal(box.offsetbox.get_data(), x) for box, x in zip(boxes, e.images[which], strict=True))
        ellipse = torch.tensor(axes.lines[0].get_xydata())  # (z - μ)ᵀ Σ⁻¹ (z - μ) = 1
        assert torch.allclose(((ellipse - e.mu) ** 2 / e.scale**2).sum(1), torch.ones(200).double(), rtol=1e-4)
    figure = Figure()
    idea.draw_means(figure, e, 9)
    figure.draw_without_rendering()
    above, below = (figure.axes[i].get_position() for i in (2, 8))
    assert 0 < above.y0 - below.y1 < above.height  # a difference stands right below its image
    assert [panel.get_title() for panel in figure.axes[2:4]] == ["5 σ points", "5 samples"]
    shown = [panel.images[0].get_array() for panel in figure.axes if panel.images]
    means = [e.images[0].mean(0), e.images[1].mean(0)]
    assert len(shown) == 10 and np.allclose(shown[0], e.x) and np.allclose(shown[1], e.whole, atol=1e-5)
    assert all(np.allclose(shown[i], x, atol=1e-5) for i, x in zip((2, 3), means, strict=True))
    assert all(np.allclose(shown[i], x - e.whole, atol=1e-5) for i, x in zip((6, 7), means, strict=True))
    words = [panel.get_xlabel() for panel in figure.axes if panel.get_xlabel()]
    assert words[0] == f"off by {(means[0] - e.whole).square().mean().sqrt():.3f}" and len(words) == 4


def test_the_ideas_images_are_chosen_by_their_posteriors(monkeypatch):
    """The widest within the bounds, then twice the farthest; number 4 is too narrow and 5 too wide in one dimension."""
    scale = torch.tensor([[0.2, 0.2], [0.5, 0.5], [0.2, 0.5], [0.3, 0.2], [0.1, 0.5], [0.5, 0.9]])
    mu = torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-3.5, 0.0], [50.0, 50.0], [-50.0, -50.0]])
    assert idea.choose(mu, scale) == [1, 3, 0]  # 4.5 and 4 away, then 0, 4 away from 1 and 8.5 from 3
    with pytest.raises(UserError, match="2 test images have standard deviations within"):
        idea.choose(mu[2:5], torch.tensor([[0.2, 0.5], [0.3, 0.2], [0.1, 0.5]]))


def test_the_mean_image_of_sigma_points_is_exact_for_a_linear_decoder():
    """Theirs is D(μ), which is the posterior's; five samples are off by σ √(2/5)."""
    encoder, x = constant(torch.zeros(1, 2), torch.full((1, 2), 0.3)), torch.zeros(1, 1, 2, 2)
    e = idea.example(encoder, lambda z: z.sum(1).view(-1, 1, 1, 1).expand(-1, *x.shape[1:]), x, torch.Generator())
    assert e.off(e.mean) < 0.03 and e.off(e.means).square().mean().sqrt() == pytest.approx(
        0.3 * (2 / 5) ** 0.5, rel=0.1
    )


def test_a_sheet_shows_the_runs_images_and_counts(capsys):
    rae.main([*TINY, "--fid", "none"])
    results = uae.main([*TINY, "--k", "2", "--lr", "0.05"])
    shutil.copytree(next(Path("runs").glob("rae*")), "runs/killed")
    for file in ("results.json", "mixture.npz"):  # which come after training
        Path("runs/killed", file).unlink()
    none, row = sheet.main(["runs"])
    assert (none.label, row.label) == ("RAE-no-reg, lr 0.005", "UAE 2x random, lr 0.05") and none.posterior is None
    assert row.collapsed() == f"{results['collapsed_dimensions']} of 16 collapsed"
    assert row.variances().mean() == pytest.approx(results["mean_variance"], rel=1e-5)
    folder = next(Path("runs").glob("uae*"))
    encoder, decoder, _ = harness.load_trained(folder, uae.nets)
    test = common.load_dataset("digits").test
    means = encoder(common.to_float(test[:16]))[0]
    decoded = (decoder(torch.cat([means, common.slerp(means[8:9], means[10:11])]))[:, 0] + 1) / 2
    shown, halves = [test[5, 0] / 255, decoded[5], decoded[11], decoded[16]], ["reconstructions", "interpolations"]
    for name, i, j, image in zip(np.repeat(halves, 2), (0, 1, 1, 0), (5, 5, 6, 3), shown, strict=True):
        tile = row.grids[name][0, 33 * i + 1 :, 33 * j + 1 :][:32, :32]
        torch.testing.assert_close(tile, image, rtol=0, atol=1e-5)
    figure = Figure()
    sheet.draw_posterior(figure, row)
    assert len(figure.axes) == 32 and figure.axes[17].get_title() == f"z2: var. {row.posterior[1][:, 1].mean():.2f}"
    assert Image.open("runs/sheet.png").width == 1200
    page = Path("runs/sheet.html").read_text()
    assert page.count("<img") == page.count('src="data:image/png;base64,') == 3 + 4 and "http" not in page
    assert f"{results['distances']['digits-mlp']['sample']:.2f} / " in page
    assert "posteriors of 30 validation images" in page
    for seed, n in ((1, 4), (0, 5)):
        uae.main([*TINY, "--k", "2", "--seed", str(seed), "--latent-dim", str(n), "--fid", "none", "--out", "more"])
    few = ["--dataset", "few.npy", "--limit-train", "32"]
    np.save("few.npy", np.random.default_rng(0).integers(0, 256, (110, 32, 32), np.uint8))
    uae.main([*TINY, *few, "--fid", "none", "--out", "few"])
    names = [row.label for row in sheet.main(["more"])]
    assert names == ["UAE 2x random, latent-dim 5, seed 0", "UAE 2x random, latent-dim 4, seed 1"]
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | {"image_size": 64}))
    for argv, message in (
        ("runs", "image size 32 and 64"),
        ("nosuch", "no results.json"),
        ("few", "11 test images"),
    ):
        with pytest.raises(UserError, match=message):
            sheet.main(argv.split())
    for module, *argv in ((sheet, "runs"), (idea,), (agreement, "x.csv")):
        with pytest.raises(SystemExit, match="2"):
            module.main([*argv, "--out", "a.jpg"])
        assert "a.jpg: give a name that ends in .png" in capsys.readouterr().err
