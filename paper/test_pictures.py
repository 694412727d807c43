"""Tests that what the pictures show are the numbers of the runs: paper/idea.py, paper/sheet.py."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import common
import fid
import rae
import uae
import vae
from common import UserError
from paper import idea, sheet

TINY = ["--epochs", "1", "--limit-train", "96", "--limit-eval", "20", "--batch-size", "32", "--width", "0.02"]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, without the runs' own pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "DigitsFeatures", functools.cache(fid.DigitsFeatures))
    for name in ("save_pictures", "save_posterior"):
        monkeypatch.setattr(fid, name, lambda *_: None)


def test_the_idea_shows_sigma_points_the_covariances_ellipse_and_what_they_decode_to(monkeypatch):
    monkeypatch.setattr(idea, "TRAINING", f"{idea.TRAINING} --limit-train 96 --width 0.02")
    examples = idea.main(["--epochs", "1", "--out", "pictures/idea.png"])
    assert np.asarray(Image.open("pictures/idea.png")).std() > 1 and len(examples) == 3
    axes = Figure().subplots()
    idea.draw_plane(axes, examples, torch.zeros(7, 2))
    for i, e in enumerate(examples):
        points = common.sigma_points(e.mu[None], e.scale[None], 0.5)[0]
        assert torch.equal(e.points[0], points) and len(e.points[1]) == len(points) == 5
        offsets = axes.collections[1 + 2 * i].get_offsets()
        assert np.allclose(offsets, points)
        ellipse = torch.tensor(axes.lines[i].get_xydata())  # (z - μ)ᵀ Σ⁻¹ (z - μ) = 1
        assert torch.allclose(((ellipse - e.mu) ** 2 / e.scale**2).sum(1), torch.ones(len(ellipse)).double(), rtol=1e-4)
        assert e.errors[0].shape == () and e.errors[1].shape == (idea.DRAWS,) and e.errors[1].min() > 0
    assert not Path("runs").exists()


def test_the_error_of_a_mean_image_is_that_to_the_posteriors(monkeypatch):
    """A linear decoder: the mean of sigma points is D(μ), which is the posterior's; five samples are off by σ/√5."""
    scale = torch.tensor([[0.3, 0.3]])
    e = idea.example(
        lambda x: (torch.zeros(1, 2), scale), lambda z: z.sum(1)[:, None, None, None].expand(-1, 1, 2, 2),
        torch.zeros(1, 1, 2, 2), torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert e.errors[0] < 0.02
    assert e.errors[1].square().mean().sqrt() == pytest.approx(0.3 * (2 / 5) ** 0.5, rel=0.1)
    assert idea.choose(torch.eye(4, 2) * 5, torch.tensor([[0.1, 0.1], [3, 3], [0.2, 0.1], [0.1, 0.1]]))[0] == 1


def test_a_sheet_shows_the_runs_images_and_counts(capsys):
    vae.main([*TINY, "--k", "2", "--latent-dim", "3"])
    rae.main(TINY)
    results = uae.main([*TINY, "--k", "2"])
    rows = sheet.main(["runs"])
    assert [row.label for row in rows] == ["VAE 2x", "RAE-no-reg", "UAE 2x random"] and rows[1].variances is None
    assert len(rows[0].variances) == 3 and len(rows[2].variances) == 16
    assert sheet.collapsed(rows[2]) == f"{results['collapsed_dimensions']} of 16 collapsed"
    assert rows[2].variances.mean() == pytest.approx(results["mean_variance"], rel=1e-5)
    assert (rows[2].variances.diff() <= 0).all()

    folder = next(Path("runs").glob("uae*"))
    encoder, decoder, _ = common.load_trained(folder, uae.nets)
    test = common.load_dataset("digits").test
    means = encoder(common.to_float(test[:16]))[0]
    tile = lambda name, row, column: rows[2].grids[name][0, 33 * row + 1 :, 33 * column + 1 :][:32, :32]  # noqa: E731
    at = lambda images, i: (images[i, 0] + 1) / 2  # noqa: E731
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # noqa: E731
    close(tile("reconstructions", 0, 5), test[5, 0] / 255)
    close(tile("reconstructions", 1, 5), at(decoder(means), 5))
    close(tile("interpolations", 1, 0), at(decoder(means), 9))
    close(tile("interpolations", 1, 6), at(decoder(means), 11))
    close(tile("interpolations", 0, 3), at(decoder(common.slerp(means[8:9], means[10:11])), 0))

    assert Image.open("runs/sheet.png").width == 1200
    page = Path("runs/sheet.html").read_text()
    assert page.count("<section>") == 3 and page.count("<img") == page.count('src="data:image/png;base64,') == 11
    assert "http" not in page and f"<td>{results['sample']:.2f}</td>" in page

    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | {"image_size": 64}))
    with pytest.raises(UserError, match=r"uae-.* and runs/vae-.* cannot be compared: image size 64 and 32|32 and 64"):
        sheet.main(["runs"])
    with pytest.raises(UserError, match=r"no best\.pt below nosuch"):
        sheet.main(["nosuch"])
    with pytest.raises(UserError, match=r"ends in \.png"):
        sheet.main(["runs", "--out", "sheet.jpg"])
    assert re.search(r"wrote runs/sheet\.png and runs/sheet\.html", capsys.readouterr().out)
