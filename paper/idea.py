"""The idea in one picture: what a posterior's sigma points decode to, beside as many random samples.

    python -m paper.idea --out assets/idea.png

Trains a UT-VAE with n = 2 on the embedded digits, so that its latent space can be drawn whole, and decodes the 2n+1 = 5
sigma points of three test images and five random samples of each.
"""

import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import common
import fid
import harness
import ut_vae
from paper.table import png

TRAINING = "--latent-dim 2 --k 5 --beta 0.002 --fid none"
COLOURS = (fid.BLUE, fid.ORANGE, "#009E73")  # of Okabe and Ito's palette
KAPPA = 0.5
DRAWS = 1000  # sets of five samples, for the spread of their mean


class Example(NamedTuple):
    """One image: mean and standard deviations [2], sigma points and samples [5,2], what they decode to [5,H,W], the
    input [H,W], and how far the mean image is from that of the whole posterior, in root mean square over pixels: for
    the sigma points, and for `DRAWS` means of five samples."""

    x: Tensor
    mu: Tensor
    scale: Tensor
    points: tuple[Tensor, Tensor]
    images: tuple[Tensor, Tensor]
    errors: tuple[Tensor, Tensor]


@torch.inference_mode()
def example(encoder: nn.Module, decoder: nn.Module, x: Tensor, generator: torch.Generator) -> Example:
    """Decode the posterior of one image x [1,1,H,W] in [-1,1]."""
    mu, scale = encoder(x)
    points = common.sigma_points(mu, scale, KAPPA)[0]
    samples = common.sample_gaussian(mu, scale, DRAWS * len(points), generator)[0]
    decoded, sampled = decoder(points)[:, 0], decoder(samples)[:, 0].unflatten(0, (DRAWS, -1))
    truth = sampled.mean((0, 1))  # the mean image of the posterior, by all samples

    def error(mean: Tensor) -> Tensor:
        return (mean - truth).square().mean((-2, -1)).sqrt()

    errors = error(decoded.mean(0)), error(sampled.mean(1))
    return Example(x[0, 0], mu[0], scale[0], (points, samples[: len(points)]), (decoded, sampled[0]), errors)


def draw_plane(axes: Axes, examples: list[Example], means: Tensor) -> None:
    """The latent plane: all training means, and for each example the ellipse of Σ, sigma points and samples."""
    angle = torch.linspace(0, 2 * torch.pi, 200)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    axes.scatter(*means.T.numpy(), s=3, color="0.85", label="means of all training images")
    for i, (e, colour) in enumerate(zip(examples, COLOURS, strict=False)):
        label = [text if i == 0 else None for text in ("Σ: one standard deviation", "sigma points", "random samples")]
        axes.plot(*(e.mu + e.scale * circle).T.numpy(), color=colour, label=label[0])
        axes.scatter(*e.points[0].T.numpy(), s=36, color=colour, edgecolor="white", zorder=3, label=label[1])
        axes.scatter(*e.points[1].T.numpy(), s=30, color=colour, marker="x", zorder=3, label=label[2])
    axes.set(title="latent space", aspect="equal", xlabel="z1", ylabel="z2")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=8)


def save_figure(path: Path, examples: list[Example], means: Tensor) -> None:
    """Left the latent plane, right what the points decode to, their mean, and the input."""
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.5])
    draw_plane(left.subplots(), examples, means)
    panels = right.subplots(2 * len(examples), 7, gridspec_kw={"hspace": 0.1, "wspace": 0.05})
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    for i, (e, colour) in enumerate(zip(examples, COLOURS, strict=False)):
        for row, name, images, error in zip(
            panels[2 * i : 2 * i + 2], ("sigma points", "samples"), e.images, e.errors, strict=True
        ):
            for panel, image in zip(row, (e.x, images.mean(0), *images), strict=True):
                panel.imshow(image.numpy(), cmap="gray", vmin=-1, vmax=1)
                for spine in panel.spines.values():
                    spine.set(color=colour, linewidth=2)
            row[2].set_ylabel(name, fontsize=8)
            spread = f" ± {error.std():.3f}" if error.dim() else ""
            row[1].set_xlabel(f"off by {error.mean():.3f}{spread}", fontsize=8)
    titles = ["input x", "mean image", "", "", "the five decoded points", "", ""]
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title, fontsize=9)
    right.supxlabel(
        "off by: distance of the mean image from that of the whole posterior (root mean square over pixels);\n"
        f"for samples mean ± standard deviation over {DRAWS} sets of five, of which one is shown",
        fontsize=8,
    )
    with common.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def choose(mu: Tensor, scale: Tensor) -> list[int]:
    """Three images whose posteriors are wide and far from each other; mu and scale [N,2]."""
    wide = scale.prod(1).argsort(descending=True)[: len(scale) // 4]
    chosen = [int(wide[0])]
    for _ in range(2):
        chosen.append(int(wide[torch.cdist(mu[wide], mu[chosen]).amin(1).argmax()]))
    return chosen


def main(argv: list[str] | None = None) -> list[Example]:
    parser = harness.Parser("paper.idea", __doc__)
    parser.add_argument("--out", type=png, default=Path("runs/idea.png"), help="the picture")
    parser.add_argument("--epochs", type=int, default=60, help="of the training")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # it names a folder that will go
        ut_vae.main([*TRAINING.split(), "--epochs", str(args.epochs), "--out", folder])
        (run,) = Path(folder).iterdir()
        encoder, decoder, _ = harness.load_trained(run, ut_vae.nets)
    data = common.load_dataset("digits")
    with torch.inference_mode():
        means, _ = encoder(common.to_float(data.train))
        x = common.to_float(data.test)
        chosen = choose(*encoder(x))
    generator = torch.Generator().manual_seed(0)
    examples = [example(encoder, decoder, x[i : i + 1], generator) for i in chosen]
    save_figure(args.out, examples, means)
    print(f"wrote {args.out}")
    return examples


if __name__ == "__main__":
    harness.cli(main)
