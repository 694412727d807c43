"""Fig. 4: noise and bias of the decoder's gradients, a pair of sigma points against two random samples (Appendix B).

    python -m paper.gradient_noise                        # the embedded digits
    python -m paper.gradient_noise --dataset cifar10      # the paper's figure

Trains a UT-VAE with K = 2 and random pairs for each of --seeds (the flags of ut_vae.py can be given), and measures on
the last batch of each epoch. Writes gradient_noise.csv and gradient_noise.png into a folder below --out.
"""

import copy
import math
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import common
import fid
import harness
import ut_vae
from common import UserError, sample_gaussian, sample_sigma_points

PAIRS, SAMPLES = 50, 200  # draws (Appendix B)
REFUSED = dict.fromkeys(("--resume", "--fid", "--fid-method", "--save-images"), "it measures new trainings, no images")
REFUSED |= dict.fromkeys(("--k", "--sigma-points"), "it measures random pairs, K = 2") | {"--seed": "give --seeds"}


def moments(decoder: nn.Module, x: Tensor, draw, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean m and standard deviation σ over draws of the decoder's gradient of ‖x - ½ Σ D(z_k)‖², and the mean image.

    x [B,C,H,W]; draw() -> z [B,2,n]. Gradients are flat, [weights].
    """
    mean = squares = image = 0.0  # running mean, sum of squared deviations from it (Welford), mean decoded image
    for i in range(1, draws + 1):
        z = draw()
        decoded = decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2]).mean(1)
        gradients = torch.autograd.grad((x - decoded).square().mean(), list(decoder.parameters()))
        gradient = torch.cat([g.flatten() for g in gradients])
        difference = gradient - mean
        mean = mean + difference / i
        squares = squares + difference * (gradient - mean)
        image = image + (decoded.detach() - image) / i
    return mean, (squares / (draws - 1)).sqrt(), image


def gradient_noise(encoder: nn.Module, decoder: nn.Module, x: Tensor, kappa: float = 0.5) -> dict[str, float]:
    """Medians over the decoder's weights j (Eq. 21), x [B,C,H,W].

    `pair_cv`: coefficient of variation σ_j/|m_j| over 50 draws of a random pair of sigma points an image; `samples_cv`:
    over 200 draws of two random samples, whose mean m'_j stands for the true gradient; `gradient_bias`:
    |m_j - m'_j|/|m'_j|, which holds the sampling error of both means; `image_bias`: that of the mean decoded image,
    over its pixels. Measured on copies of both nets in training mode.
    """
    encoder, decoder = (copy.deepcopy(net).train() for net in (encoder, decoder))
    with torch.no_grad():
        mu, scale = encoder(x)
    m, deviation, image = moments(decoder, x, lambda: sample_sigma_points(mu, scale, 2, "pairs", kappa), PAIRS)
    true_m, true_deviation, true_image = moments(decoder, x, lambda: sample_gaussian(mu, scale, 2), SAMPLES)

    def median(a: Tensor, b: Tensor) -> float:
        return (a.abs() / b.abs()).nanmedian().item()  # 0/0 where a weight has no gradient

    return {
        "pair_cv": median(deviation, m),
        "samples_cv": median(true_deviation, true_m),
        "gradient_bias": median(m - true_m, true_m),
        "image_bias": median(image - true_image, true_image),
    }


def summary(runs: list[list[dict[str, float]]]) -> str:
    """What is seen over all epochs and seeds, in one sentence."""
    rows = [row for run in runs for row in run]
    ratios = [row["pair_cv"] / row["samples_cv"] for row in rows]
    text = f"The pair's coefficient of variation is {min(ratios):.2f} to {max(ratios):.2f} times that of two samples"
    for name, of in (("gradient_bias", "gradients"), ("image_bias", "mean image")):
        text += f", the relative bias of the {of} {min(r[name] for r in rows):.2g} to {max(r[name] for r in rows):.2g}"
    return text + "."


def save_figure(path: Path, runs: list[list[dict[str, float]]]) -> None:
    """Fig. 4a (coefficient of variation) and 4b (relative bias) over epochs: mean over runs, and a band from the least
    to the largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = (
        (left, "pair_cv", fid.BLUE, "pair of sigma points"),
        (left, "samples_cv", fid.ORANGE, "two random samples"),
        (right, "gradient_bias", fid.BLUE, "of the decoder's gradients"),
        (right, "image_bias", fid.ORANGE, "of the mean decoded image"),
    )
    epochs = [row["epoch"] for row in runs[0]]
    for axes, name, colour, label in lines:
        values = np.array([[row[name] for row in run] for run in runs])
        axes.plot(epochs, values.mean(0), color=colour, label=label)
        axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
    left.set(title="noise of the decoder's gradients", ylabel="coefficient of variation (median)")
    right.set(title="bias of a pair of sigma points", ylabel="relative bias (median)")
    for axes in (left, right):
        axes.set(xlabel="epoch", ylim=(0, None))
        axes.legend()
    seeds = f"{len(runs)} seeds, bands from the least to the largest. " if len(runs) > 1 else ""
    figure.supxlabel(textwrap.fill(seeds + summary(runs), 120), fontsize=8)
    with common.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def arguments(argv: list[str] | None = None) -> list[Namespace]:
    """ut_vae.py's for each of --seeds, with K = 2 and random pairs."""
    parser = harness.Parser("paper.gradient_noise", __doc__ + "\nFurther flags are those of ut_vae.py.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a training for each")
    ours, rest = parser.parse_known_args(argv)
    for flag in (flag for flag in REFUSED if flag in [each.partition("=")[0] for each in rest]):
        raise UserError(f"{flag} is not for paper.gradient_noise: {REFUSED[flag]}")
    if common.LAUNCHED:
        raise UserError("paper.gradient_noise runs in one process, without torchrun")
    flags = ["--k", "2", "--sigma-points", "pairs", *rest]
    settings = [ut_vae.arguments([*flags, "--seed", str(seed)]) for seed in dict.fromkeys(ours.seeds)]
    if settings[0].epochs == 0:
        raise UserError("--epochs 0: gradients are measured after each epoch, give 1 or more")
    return settings


def train(args: Namespace) -> Iterator[dict[str, float]]:
    """Train as ut_vae.py does, and measure after each epoch."""
    device = harness.start(args)
    model = harness.prepare(ut_vae.nets(args), args, device)
    encoder, decoder = model.values()
    data = harness.load_data(args, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=device.type == "cuda")
    scheduler = harness.learning_rate(optimizer, args)
    for epoch in range(args.epochs):
        model.train()
        torch.manual_seed(harness.stream_seed(args.seed, "noise", epoch=epoch))
        shuffle = harness.stream_seed(args.seed, "shuffle", epoch=epoch)
        for x in common.epoch_batches(data.train, args.batch_size, shuffle, args.flip):
            optimizer.zero_grad()
            ut_vae.loss(encoder, decoder, x, args)["loss"].backward()
            optimizer.step()
        with harness.validating(model, args.seed):
            batches = common.validation_batches(data.val, args.batch_size)
            losses = [(ut_vae.loss(encoder, decoder, v, args)["loss"].item(), len(v)) for v in batches]
        loss = sum(loss * images for loss, images in losses) / len(data.val)
        if not math.isfinite(loss):
            raise UserError(f"the loss is not finite after epoch {epoch + 1}, seed {args.seed}: lower --lr")
        scheduler.step(loss)
        yield {"seed": args.seed, "epoch": epoch + 1} | gradient_noise(encoder, decoder, x, args.kappa)


def main(argv: list[str] | None = None) -> list[list[dict[str, float]]]:
    settings, runs = arguments(argv), []
    name = settings[0].name.replace("ut_vae", "gradient_noise", 1).rpartition("-seed")[0]
    folder = Path(settings[0].out) / name
    if folder.exists():
        raise UserError(f"{folder} is there: remove it, or give another --out")
    for args in settings:
        runs.append([])
        for row in train(args):
            runs[-1].append(row)
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
            harness.write_csv(folder / "gradient_noise.csv", [row for run in runs for row in run])
    save_figure(folder / "gradient_noise.png", runs)
    print(f"{summary(runs)}\neverything is in {folder}/")
    return runs


if __name__ == "__main__":
    harness.cli(main)
