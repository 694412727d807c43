"""The idea in one picture: sigma points of a posterior, random samples of it, and what they decode to.

    python -m paper.idea --out assets/idea.png

Trains a UT-VAE with n = 2 on the embedded digits, so that its latent space can be drawn, and decodes the 2n+1 = 5 sigma
points of three test images, and sets of five random samples of each. Chosen by their posteriors alone, before anything
is decoded: standard deviations within SCALES, so that points decode to digits and not all to the same; of these first
the widest posterior (the large one), then twice that whose mean is farthest from those chosen.
"""

import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor, nn

import common
import fid
import harness
import ut_vae
from paper.table import png

TRAINING = "--latent-dim 2 --k 5 --fid none"
SCALES = (0.15, 0.6)  # of both latent dimensions; the training means spread by about 1
POINTS, SAMPLES = fid.BLUE, fid.ORANGE
KAPPA = 0.5
DRAWS = 400  # sets of five samples; all together stand for the whole posterior
SHOWN = 3  # of these sets
RANGE = 0.6  # where the colours of a difference end; images are in [-1,1]


class Example(NamedTuple):
    """One image [H,W]: mean and standard deviations [2], sigma points and the first set of samples [5,2], what they
    decode to [5,H,W]; the mean image of the whole posterior, that of the sigma points, and those of all sets
    [DRAWS,H,W]."""

    x: Tensor
    mu: Tensor
    scale: Tensor
    points: tuple[Tensor, Tensor]
    images: tuple[Tensor, Tensor]
    whole: Tensor
    mean: Tensor
    means: Tensor

    def off(self, mean: Tensor) -> Tensor:
        """How far mean images [...,H,W] are from the whole posterior's, in root mean square over pixels [...]."""
        return (mean - self.whole).square().mean((-2, -1)).sqrt()


@torch.inference_mode()
def example(encoder: nn.Module, decoder: nn.Module, x: Tensor, generator: torch.Generator) -> Example:
    """Decode the posterior of one image x [1,1,H,W] in [-1,1]."""
    mu, scale = encoder(x)
    points = common.sigma_points(mu, scale, KAPPA)[0]
    samples = common.sample_gaussian(mu, scale, DRAWS * len(points), generator)[0]
    decoded, sampled = decoder(points)[:, 0], decoder(samples)[:, 0].unflatten(0, (DRAWS, -1))
    images, means = (decoded, sampled[0]), sampled.mean(1)
    both = points, samples[: len(points)]
    return Example(x[0, 0], mu[0], scale[0], both, images, means.mean(0), decoded.mean(0), means)


def draw_plane(axes: Axes, e: Example, which: int, training: Tensor) -> None:
    """The latent plane around a posterior: training means, one standard deviation, and what its sigma points (which is
    0) or five samples (1) decode to, where they lie."""
    angle, colour = torch.linspace(0, 2 * torch.pi, 200), (POINTS, SAMPLES)[which]
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    axes.scatter(*training.T.numpy(), s=3, color="0.85")
    axes.plot(*(e.mu + e.scale * circle).T.numpy(), color=colour)
    for z, image in zip(e.points[which], e.images[which], strict=True):
        picture = OffsetImage(image.numpy(), zoom=1.2, cmap="gray", clim=(-1, 1))
        box = {"edgecolor": colour, "linewidth": 2}
        axes.add_artist(AnnotationBbox(picture, tuple(z.tolist()), pad=0.1, bboxprops=box))
    (low, bottom), (high, top) = (e.mu - 3 * e.scale).tolist(), (e.mu + 3 * e.scale).tolist()
    axes.set(xlim=(low, high), ylim=(bottom, top), xticks=[], yticks=[], xlabel="z1", ylabel="z2")
    axes.set_title(("five sigma points of a posterior", "five random samples of it")[which], color=colour, fontsize=12)


def draw_means(figure: SubFigure, e: Example, size: int) -> None:
    """Input and mean images, and below these what each of them has more (red) or less (blue) than the posterior's."""
    panels = figure.subplots(2, 3 + SHOWN)
    for row, anchor in zip(panels, "SN", strict=True):  # no gap between the rows
        for panel in row:
            panel.set(xticks=[], yticks=[], frame_on=False, anchor=anchor)
    shown = [e.x, e.whole, e.mean, *e.means[:SHOWN]]
    titles = ["input", "posterior", "5 σ points", *["5 samples"] * SHOWN]
    colours = ["black", "black", POINTS, *[SAMPLES] * SHOWN]
    for i, (image, title, colour) in enumerate(zip(shown, titles, colours, strict=True)):
        panels[0, i].imshow(image.numpy(), cmap="gray", vmin=-1, vmax=1)
        panels[0, i].set_title(title, color=colour, fontsize=size)
        if i > 1:
            panels[1, i].imshow((image - e.whole).numpy(), cmap="seismic", vmin=-RANGE, vmax=RANGE)
            panels[1, i].set_xlabel(f"off by {e.off(image):.3f}", fontsize=size)
            panels[1, i].set(frame_on=True)


def save_figure(path: Path, examples: list[Example], training: Tensor) -> None:
    """Above the first example: what its points decode to, and the mean images; below the mean images of the others."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.45, 1])
    planes, means = above.subfigures(1, 2, width_ratios=[1, 1])
    for which, axes in enumerate(planes.subplots(1, 2)):
        draw_plane(axes, examples[0], which, training)
    means.suptitle("mean images, and what they differ by from the posterior's", fontsize=12)
    draw_means(means, examples[0], 9)
    for part, e in zip(below.subfigures(1, len(examples) - 1), examples[1:], strict=True):
        draw_means(part, e, 9)
    with common.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def choose(mu: Tensor, scale: Tensor) -> list[int]:
    """Three images by their posteriors, mu and scale [N,2], as the head of this file says. Raises UserError if there
    are fewer."""
    within = ((scale > SCALES[0]) & (scale < SCALES[1])).all(1).nonzero()[:, 0]
    if len(within) < 3:
        raise common.UserError(f"{len(within)} test images have standard deviations within {SCALES}, three are needed")
    chosen = [int(within[scale[within].prod(1).argmax()])]
    for _ in range(2):
        chosen.append(int(within[torch.cdist(mu[within], mu[chosen]).amin(1).argmax()]))
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
    return draw(encoder, decoder, args.out)


def draw(encoder: nn.Module, decoder: nn.Module, out: Path) -> list[Example]:
    """The picture of a trained model with n = 2."""
    data = common.load_dataset("digits")
    with torch.inference_mode():
        means, _ = encoder(common.to_float(data.train))
        x = common.to_float(data.test)
        chosen = choose(*encoder(x))
    generator = torch.Generator().manual_seed(0)
    examples = [example(encoder, decoder, x[i : i + 1], generator) for i in chosen]
    save_figure(out, examples, means)
    print(f"wrote {out}: " + "; ".join(f"{e.off(e.mean):.3f} against {e.off(e.means).mean():.3f}" for e in examples))
    return examples


if __name__ == "__main__":
    harness.cli(main)
