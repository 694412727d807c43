"""Two pictures of whether a study has what the paper has: the effect of sigma points, and the order of the main rows.

    python -m paper.agreement paper/results/fashion_mnist{,_eighth,_full}.csv --out assets/agreement.png

Left the difference of UT-VAE to VAE, reconstructions, over K, and for K = 8 in the files of other widths that follow
the study's; bars are 95 % intervals over seeds. Right the paper's FID of the study's main rows against ours.
"""

import math
import re
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from scipy.stats import linregress
from scipy.stats import t as student

import common
import harness
from common import UserError
from fid import BLUE, KINDS, ORANGE
from paper import claims
from paper.claims import compare, pairs, paper_numbers, paper_ratios, percent, values_by_row
from paper.table import DATASETS, dataset_of, png, read_results

Values = dict[str, dict[int, float]]  # by row and seed
EFFECT = "UT-VAE {k}x | VAE {k}x"
KS = (1, 2, 4, 8)
COLOURS = {"KL": ORANGE, "W₂": BLUE, "neither": "0.35"}  # of a row's loss
SIZE = 9.5  # of letters
HALO = [withStroke(linewidth=2.5, foreground="white")]  # of letters over bars


def width_of(setting: str) -> float:
    """The width of the nets that a setting of paper.study names."""
    found = re.search(r"--width (\S+)", setting)
    return float(found[1]) if found else 1.0


def per_doubling(values: Values, dataset: str) -> tuple[float, float]:
    """The least-squares slope over log₂ K of the logarithms of UT-VAE's ratios to VAE, by seed, and half its 95 %
    interval; nan below three ratios."""
    x, y = [], []
    for k, pair in zip(KS, pairs(EFFECT, dataset, KS), strict=True):
        ours, other = (values.get(label, {}) for label in pair)
        for seed in ours.keys() & other.keys():
            x.append(math.log2(k))
            y.append(math.log(ours[seed] / other[seed]))
    if len({*x}) < 2 or len(x) < 3:
        return math.nan, math.nan
    fit = linregress(x, y)
    return fit.slope, student.ppf(0.975, len(x) - 2) * fit.stderr


def draw_effect(axes: Axes, studies: list[tuple[str, Values]], dataset: str) -> None:
    """The difference of UT-VAE to VAE in %: over K in the first of `studies` (setting and values) and in the paper,
    then for K = 8 in the others."""
    every = pairs(EFFECT, dataset, KS)
    places = [(pair, values, f"{k}") for k, pair in zip(KS, every, strict=True) for _, values in studies[:1]]
    for setting, values in studies[1:]:
        width = width_of(setting)
        places.append((every[-1], values, f"8, width\n{'full' if width == 1 else f'1/{1 / width:.0f}'}"))
    theirs = [100 * math.expm1(paper_ratios(dataset, pair)[0]) for pair in every]
    axes.plot(range(len(KS)), theirs, "D--", color="0.35", mfc="white", label="the paper: FID, full width")
    if len(studies) > 1:
        axes.plot([len(KS) - 1, len(places) - 1], theirs[-1:] * 2, ":", color="0.35")
    for i, (pair, values, _) in enumerate(places):
        ratio = compare(*(values.get(label, {}) for label in pair))
        if ratio:
            mean, half, _, seeds = ratio
            low, at, high = (100 * math.expm1(mean + d) for d in (-half, 0, half))
            bars = [[at - low], [high - at]]
            label = f"here: FD-Lite0, width 1/{1 / width_of(studies[0][0]):.0f} unless named" if i == 0 else None
            axes.errorbar(i, at, bars if seeds > 1 else None, fmt="o", color=BLUE, capsize=4, label=label)
            text = f"{percent(mean)} %" + (f"\n{seeds} seed" if seeds == 1 else "")
            place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(text, (i, at), fontsize=SIZE, path_effects=HALO, **place)
    axes.axhline(0, color="0.7", lw=0.8, zorder=0)
    axes.set_xticks(range(len(places)), [place[2] for place in places])
    axes.set_xlim(-0.4, 1.16 * len(places) - 1)  # room for the last number
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.0f} %" if value else "0"))
    slope, half = per_doubling(studies[0][1], dataset)
    each = f"{percent(slope)} % ({percent(slope - half)} to {percent(slope + half)}) a doubling of K"
    axes.set(xlabel="K", title="UT-VAE against VAE, reconstructions" + ("" if math.isnan(slope) else f"\nhere {each}"))
    axes.legend(loc="lower left", fontsize=SIZE, frameon=False)


def loss_of(label: str) -> str:
    """Which term of the loss a row's posteriors have, a key of COLOURS."""
    if label.startswith(("RAE", "WAE")):
        return "neither"
    return "W₂" if "*" in label or label.startswith("UAE") else "KL"


def draw_order(axes: Axes, values: Values, dataset: str, rows: list[str]) -> dict[str, tuple[float, float]]:
    """The paper's FID of rows against our means, bars of one standard deviation over seeds; returns the points."""
    points = {}
    for label in rows:
        ours, theirs, colour = list(values[label].values()), paper_numbers(dataset, label)[0], COLOURS[loss_of(label)]
        points[label] = theirs, np.mean(ours)
        axes.errorbar(theirs, np.mean(ours), np.std(ours, ddof=1), fmt="o", ms=5, color=colour, ecolor="0.85")
    axes.set(xscale="log", yscale="log", ylabel="FD-Lite0 here", xlabel=f"the paper's FID, {DATASETS[dataset]}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=np.arange(1, 10, 0.5 if axis is axes.xaxis else 0.1)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    r = claims.rank_correlation(values, dataset, KINDS[0], rows)
    axes.set_title(f"The {len(rows)} main rows, reconstructions\nrank correlation {r:.2f}")
    for name, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=f"with {name}")
    axes.legend(loc="lower right", fontsize=SIZE, frameon=False)
    return points


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two boxes (x0, y0, x1, y1) meet."""
    return bool((a[:2] < b[2:]).all() and (b[:2] < a[2:]).all())


def write_labels(axes: Axes, points: dict[str, tuple[float, float]]) -> list:
    """A label for each point where it meets no point, no other label and no edge, as near as there is room; a line
    leads to one that is far. Returns the labels. Raises UserError if there is no room."""
    at = axes.transData.transform(list(points.values()))
    taken, inside = [np.hstack([p - 9, p + 9]) for p in at], axes.get_window_extent().extents
    crowd = np.linalg.norm(at[:, None] - at[None], axis=-1)
    labels = []
    for i in np.argsort(np.sort(crowd, axis=1)[:, 1:4].sum(1)):  # the most crowded first
        text, point = list(points.items())[i]
        for radius, angle in ((r, a) for r in range(8, 160, 6) for a in np.arange(0, 2 * np.pi, np.pi / 12)):
            dx, dy = radius * np.cos(angle), radius * np.sin(angle)
            side = "left" if dx > 2 else "right" if dx < -2 else "center"
            place = {"xytext": (dx, dy), "textcoords": "offset points", "ha": side, "va": "center"}
            style = {"fontsize": SIZE, "color": COLOURS[loss_of(text)], "path_effects": HALO}
            label = axes.annotate(text.removesuffix(" random"), point, **place, **style)
            box = label.get_window_extent().extents
            free = not any(overlap(box, other) for other in taken)
            if free and (box[:2] > inside[:2]).all() and (box[2:] < inside[2:]).all():
                taken.append(box)
                labels.append(label)
                if radius > 14:
                    axes.annotate("", point, arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.6}, **place)
                break
            label.remove()
        else:
            raise UserError(f"no room for the label {text}")
    return labels


def read_values(file: Path) -> tuple[str, Values]:
    """The setting of a study's results and its first distance of reconstructions."""
    setting, lines = read_results(file)
    return setting, values_by_row(lines, next(iter(claims.columns_of(lines)[0].values()))[0])


def main(argv: list[str] | None = None) -> list:
    parser = harness.Parser("paper.agreement", __doc__)
    parser.add_argument("results", type=Path, nargs="+", help="results of paper.study, then those of other widths")
    parser.add_argument("--out", type=png, default=Path("runs/agreement.png"), help="the picture")
    args = parser.parse_args(argv)
    for file in args.results[1:]:
        if not file.exists():
            common.note(f"{file} is not there: its width is not drawn")
    studies = [read_values(file) for file in args.results[:1] + [file for file in args.results[1:] if file.exists()]]
    dataset, values = dataset_of(studies[0][0]), studies[0][1]
    rows = [label for label in claims.main_rows(dataset) if len(values.get(label, ())) > 1]
    if dataset not in DATASETS or len(rows) < 3:
        raise UserError(f"{args.results[0]}: {len(rows)} main rows have two seeds and numbers in the paper, not three")
    figure = Figure(figsize=(10.8, 5), dpi=140, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.35])
    draw_effect(left, studies, dataset)
    points = draw_order(right, values, dataset, rows)
    figure.draw_without_rendering()  # fixes where the panels are
    labels = write_labels(right, points)
    with common.replacing(args.out) as temporary:
        figure.savefig(temporary, format="png")
    print(f"wrote {args.out}")
    return labels


if __name__ == "__main__":
    harness.cli(main)
