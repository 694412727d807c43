"""One picture of whether our rows stand in the paper's order: its FID of each row against our distances and error.

    python -m paper.agreement paper/results/fashion_mnist.csv --out assets/agreement.png

A panel for each distance and one for the error, axes logarithmic, bars of one standard deviation over seeds. What
colour and marker do not say of a row is written beside it where there is room, first where the orders differ most. Rows
that failed in the paper are hollow.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from scipy.stats import rankdata

import common
import harness
from common import UserError
from fid import KINDS
from paper.claims import LIKE, SUCCESSES, columns_of, failure, paper_numbers, rank_correlation, values_by_row
from paper.table import DATASETS, dataset_of, png, read_results

COLOURS = {  # of Okabe and Ito's palette
    "VAE": "#E69F00", "VAE*": "#D55E00", "UT-VAE": "#56B4E9", "UT-VAE*": "#0072B2", "UAE": "#009E73", "RAE": "#000000",
    "IWAE": "#CC79A7", "WAE-MMD": "#F0E442",
}  # fmt: skip
MARKERS = {"1x": "v", "2x": "o", "4x": "^", "8x": "s", "": "D"}
HALO = withStroke(linewidth=2, foreground="white")  # of labels over bars
SIDES = [(5, 0, "left"), (-5, 0, "right"), (4, 5, "left"), (4, -5, "left"), (-4, 5, "right"), (-4, -5, "right")]


class Panel(NamedTuple):
    """What is measured, of which kind of images; our values by row and seed, and the paper's number of each row."""

    title: str
    kind: str
    dataset: str
    ours: dict[str, dict[int, float]]
    theirs: list[float]

    def correlation(self) -> str:
        """Spearman's, of all rows and of those that did not fail in the paper."""
        rows = "All rows", SUCCESSES
        every, rest = (rank_correlation(self.ours, self.dataset, self.kind, each) for each in rows)
        text = f"rank correlation {every[0]:.2f}" if every else "fewer than three rows have two seeds"
        return text + (f", without failures {rest[0]:.2f}" if rest and rest[2] < every[2] else "")


def read_panels(file: Path) -> list[list[Panel]]:
    """Of a study's results: a line of panels for each metric, the error beside the first."""
    setting, lines = read_results(file)
    dataset, found = dataset_of(setting), []
    columns = columns_of(lines)
    error = columns.pop("Error (MSE)")
    for metric, distances in columns.items():
        titles = [f"{metric}, {kind}" for kind in KINDS] + ["error (MSE)"] * (not found)
        found.append([])
        for i, (title, column) in enumerate(zip(titles, distances + error, strict=False)):
            ours = {k: v for k, v in values_by_row(lines, column).items() if paper_numbers(dataset, k)}
            if len(ours) < 3:
                raise UserError(f"{file}: {len(ours)} rows have numbers of the paper, three are needed")
            theirs = [paper_numbers(dataset, label)[i % 3] for label in ours]
            found[-1].append(Panel(title, KINDS[i % 3], dataset, ours, theirs))
    return found


def describe(label: str, dataset: str) -> tuple[str, str, str]:
    """Model, number of points and the rest of a row's label: `UT-VAE-full-GP 2x pairs` is UT-VAE, 2x, full GP pairs."""
    model, _, rest = label.partition(" ")
    base = re.match(r"(?:UT-)?VAE\*?|UAE|RAE|IWAE|WAE-MMD", model)[0]
    points, _, heuristic = rest.partition(" ")
    variant = [*model[len(base) :].split("-"), *heuristic.split()]
    return base, points, " ".join(v for v in variant if v != common.DEFAULTS[dataset]["sigma_points"]).strip()


def draw(axes: Axes, panel: Panel) -> None:
    """The values of each row over seeds against the paper's number."""
    axes.set(xscale="log", yscale="log")
    for (label, by_seed), x in zip(panel.ours.items(), panel.theirs, strict=True):
        model, points, _ = describe(label, panel.dataset)
        edge = "0.3" if model == "WAE-MMD" else COLOURS[model]  # yellow needs an edge
        face, values = "white" if failure(panel.dataset, label) else COLOURS[model], list(by_seed.values())
        spread = np.std(values, ddof=1) if len(values) > 1 else 0
        axes.errorbar(x, np.mean(values), spread, fmt=MARKERS[points], ms=4.5, mfc=face, mec=edge, ecolor=edge, lw=0.7)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)) if high > 4 * low else MaxNLocator(7, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=7)
    axes.set_title(f"{panel.title}\n{panel.correlation()}", fontsize=8)
    name = DATASETS[LIKE.get(panel.dataset, panel.dataset)]
    axes.set_xlabel(f"the paper's FID, {name}, {panel.kind}", fontsize=7)


def write_labels(axes: Axes, panel: Panel) -> None:
    """The rest of the labels beside the points, where they touch no point and no other label."""
    ours = [np.mean(list(by_seed.values())) for by_seed in panel.ours.values()]
    at = axes.transData.transform(np.column_stack([panel.theirs, ours]))
    taken, inside = [*np.hstack([at - 4, at + 4])], axes.get_window_extent().extents
    for i in np.argsort(-abs(rankdata(ours) - rankdata(panel.theirs))):
        text = describe(list(panel.ours)[i], panel.dataset)[2]
        for x, y, side in SIDES if text else ():
            place = {"xytext": (x, y), "textcoords": "offset points", "ha": side, "va": "center"}
            label = axes.annotate(text, (panel.theirs[i], ours[i]), fontsize=6.5, path_effects=[HALO], **place)
            x0, y0, x1, y1 = box = label.get_window_extent().extents
            free = all(x1 < a or c < x0 or y1 < b or d < y0 for j, (a, b, c, d) in enumerate(taken) if j != i)
            if free and (box[:2] > inside[:2]).all() and (box[2:] < inside[2:]).all():
                taken.append(box)
                break
            label.remove()


def legend(panels: list[Panel]) -> list[Line2D]:
    """An entry for each model, each number of points, and the failures."""
    labels = [(label, *describe(label, panel.dataset)) for panel in panels for label in panel.ours]
    models, points = ({label[i] for label in labels} for i in (1, 2))
    shown = [("o", colour, colour, model) for model, colour in COLOURS.items() if model in models]
    shown += [(m, "0.4", "0.4", f"K = {k[0]}" if k else "no K") for k, m in MARKERS.items() if k in points]
    failed = any(failure(panel.dataset, label) for panel in panels for label in panel.ours)
    shown += [("o", "white", "0.4", "the paper's failures")] * failed
    return [Line2D([], [], ls="", marker=m, mfc=face, mec=edge, label=text) for m, face, edge, text in shown]


def main(argv: list[str] | None = None) -> None:
    parser = harness.Parser("paper.agreement", __doc__)
    parser.add_argument("results", type=Path, nargs="+", help="results of paper.study")
    parser.add_argument("--out", type=png, default=Path("runs/agreement.png"), help="the picture")
    args = parser.parse_args(argv)
    lines = [line for file in args.results for line in read_panels(file)]
    figure = Figure(figsize=(11, 2.9 * len(lines) + 0.4), dpi=160, layout="constrained")
    grid = figure.subplots(len(lines), 4, squeeze=False)
    drawn = [pair for axes, line in zip(grid, lines, strict=True) for pair in zip(axes, line, strict=False)]
    for axes, panel in drawn:
        draw(axes, panel)
    handles, empty = legend([panel for _, panel in drawn]), [axes for axes in grid.flat if not axes.has_data()]
    for axes in empty:
        axes.set_axis_off()
    if empty:
        empty[0].legend(handles=handles, loc="center", ncols=2, fontsize=8, frameon=False)
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    figure.draw_without_rendering()  # fixes where the panels are
    for axes, panel in drawn:
        write_labels(axes, panel)
    with common.replacing(args.out) as temporary:
        figure.savefig(temporary, format="png")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    harness.cli(main)
