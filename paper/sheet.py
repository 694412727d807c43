"""Trained models side by side (Fig. 3, 5, 6, 7): the same test images, samples, interpolations, posterior variances.

    python -m paper.sheet runs/                          # writes runs/sheet.png and runs/sheet.html
    python -m paper.sheet runs/a runs/b --out sheet.png

A row for each run below the folders, all of one data set and image size. The page needs no other file; it has the table
of figures too, and Fig. 5's histograms of each run.
"""

import base64
import html
import importlib
import io
import json
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

import common
import fid
import harness
from common import UserError
from paper.table import IGNORED, names_of, place, png, results_table

COLUMNS = {
    "reconstructions": "test images above their reconstructions",
    "samples": "samples from the mixture",
    "interpolations": "interpolations between both ends",
}
VARIANCES = "posterior variances, sorted"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 0 12px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 3px 9px; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
section { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
figure { margin: 0; } img { width: 100%; }
.grid { image-rendering: pixelated; } figcaption { font-size: 13px; color: #444; }
"""


class Row(NamedTuple):
    """What the sheet shows of a run: its grids of images [3,H,W] in [0,1] by column, and for a Gaussian posterior means
    and variances of up to 1000 validation images [N,n]."""

    label: str
    grids: dict[str, Tensor]
    posterior: tuple[Tensor, Tensor] | None

    def variances(self) -> Tensor:
        """The mean variance of each dimension, largest first [n]; none for a deterministic model."""
        return self.posterior[1].mean(0).sort(descending=True).values if self.posterior else torch.empty(0)

    def collapsed(self) -> str:
        """How many dimensions are collapsed, in words."""
        return f"{int((self.variances() > fid.COLLAPSED).sum())} of {len(self.variances())} collapsed"


def find_runs(folders: list[Path]) -> list[tuple[Path, Namespace]]:
    """The finished runs below the folders, in the order of the tables. Raises UserError if they cannot be compared."""
    runs = []
    for file in sorted({done.with_name("args.json") for folder in folders for done in folder.rglob("results.json")}):
        with common.explained(f"cannot read {file}"):
            runs.append((file.parent, Namespace(**json.loads(file.read_text()))))
    if not runs:
        raise UserError(f"no results.json below {', '.join(map(str, folders))}")
    first, reference = runs[0]
    for folder, args in runs[1:]:
        for name in ("dataset", "image_size"):
            a, b = getattr(reference, name), getattr(args, name)
            if a != b:
                raise UserError(f"{first} and {folder} cannot be compared: {name.replace('_', ' ')} {a} and {b}")
    return sorted(runs, key=lambda run: (place(run[1].label), run[1].seed))


@torch.inference_mode()
def make_row(folder: Path, args: Namespace, data: common.Dataset, label: str) -> Row:
    """Decode what the sheet shows of a run."""
    encoder, decoder, _ = harness.load_trained(folder, importlib.import_module(args.script).nets)

    def grid(images: Tensor, columns: int) -> Tensor:
        return make_grid((images + 1) / 2, nrow=columns, padding=1, pad_value=1)

    inputs = data.test[:16]
    means, _ = harness.posterior(encoder, common.to_float(inputs))
    rows = torch.cat([common.to_float(inputs[:8]), decoder(means[:8])])
    steps = [common.slerp(means[8:10], means[10:12], step / 6) for step in range(7)]
    interpolations = decoder(torch.stack(steps, 1).flatten(0, 1))
    samples = decoder(fid.sample_latents(folder, 16, args.seed))
    mu, scale = harness.posterior(encoder, common.to_float(data.val[: args.limit_eval][:1000]))
    grids = (grid(rows, 8), grid(samples, 8), grid(interpolations, 7))
    posterior = None if scale is None else (mu, common.variances(scale))
    return Row(label, dict(zip(COLUMNS, grids, strict=True)), posterior)


def colours(variances: Tensor) -> list[str]:
    """Of dimensions by their mean variances: collapsed ones differ."""
    return [fid.ORANGE if value > fid.COLLAPSED else fid.BLUE for value in variances]


def draw_variances(axes, row: Row) -> None:
    """Bars of a row's sorted variances; nothing for a deterministic model."""
    if row.posterior is None:
        axes.set_axis_off()
        return
    variances = row.variances()
    axes.bar(range(len(variances)), variances.numpy(), width=1, color=colours(variances))
    axes.axhline(fid.COLLAPSED, color="0.6", linewidth=0.7, linestyle="--")
    axes.set(ylim=(0, 1.1), yticks=[0, 1], xticks=[])
    axes.set_xlabel(row.collapsed(), fontsize=9)


def draw_posterior(figure: Figure, row: Row) -> None:
    """Fig. 5: histograms of |mean| (top) and variance (bottom), the first 16 dimensions."""
    mu, variance = row.posterior
    means = variance.mean(0)
    halves = ("|mean|", mu.abs(), mu.abs().max().item()), ("variance", variance, max(1.2, variance.max().item()))
    for half, (name, values, top) in zip(figure.subfigures(2), halves, strict=True):
        half.supxlabel(name)
        panels = half.subplots(2, 8, sharex=True, sharey=True).flat
        for i, (panel, colour) in enumerate(zip(panels, colours(means), strict=False)):
            panel.hist(values[:, i].numpy(), bins=30, range=(0, top), histtype="stepfilled", color=colour)
            panel.set_title(f"z{i + 1}: var. {means[i]:.2f}", fontsize=9)
        for panel in panels[len(means) :]:
            panel.set_axis_off()


def save_png(path: Path, rows: list[Row]) -> None:
    """All rows below each other as one picture, 1200 pixels wide."""
    figure = Figure(figsize=(12, 0.4 + 0.95 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 4, squeeze=False, width_ratios=[8, 8, 7, 5])
    for axes, row in zip(panels, rows, strict=True):
        for panel, grid in zip(axes, row.grids.values(), strict=False):
            panel.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        axes[0].set_ylabel(row.label.replace(" ", "\n", 1), rotation=0, ha="right", va="center", fontsize=9)
        draw_variances(axes[3], row)
    for axes, title in zip(panels[0], (*COLUMNS.values(), VARIANCES), strict=True):
        axes.set_title(title, fontsize=9)
    with common.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def figure_html(picture: Image.Image | Figure, caption: str) -> str:
    """A picture with its caption, that needs no other file."""
    data, caption = io.BytesIO(), html.escape(caption)
    if isinstance(picture, Figure):
        picture.savefig(data, format="png", dpi=150)
    else:
        picture.save(data, "png")
    source, kind = base64.b64encode(data.getvalue()).decode(), "grid" if isinstance(picture, Image.Image) else "chart"
    image = f'<img class="{kind}" src="data:image/png;base64,{source}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def row_html(row: Row) -> str:
    """A row as a section of the page."""
    images = [(grid.permute(1, 2, 0) * 255).round().byte().numpy() for grid in row.grids.values()]
    figures = [figure_html(Image.fromarray(x), text) for x, text in zip(images, COLUMNS.values(), strict=True)]
    histograms = ""
    if row.posterior is not None:
        figure = Figure(figsize=(11, 6), layout="constrained")
        draw_posterior(figure, row)
        text = f"posteriors of {len(row.posterior[0])} validation images, {row.collapsed()} "
        text += f"(mean variance above {fid.COLLAPSED})"
        histograms = figure_html(figure, text)
    return f"<h2>{html.escape(row.label)}</h2>\n<section>{''.join(figures)}</section>{histograms}"


def table_html(markdown: str) -> str:
    """`results_table`'s Markdown as HTML."""
    lines = [line for line in markdown.splitlines() if line]
    head, _, *body = [line for line in lines if line.startswith("|")]

    def cells(line: str, tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell.strip())}</{tag}>" for cell in line.strip("| ").split(" | "))

    rows = [f"<tr>{cells(line, 'td')}</tr>" for line in body]
    rest = [f"<p>{html.escape(line)}</p>" for line in lines if not line.startswith("|")]
    table = f"<table><tr>{cells(head, 'th')}</tr>{''.join(rows)}</table>"
    return f'<div class="scroll">{table}</div>{"".join(rest)}'


def save_page(path: Path, rows: list[Row], table: str, title: str) -> None:
    """The same with the table of figures as one HTML page that needs no other file."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    body = [f"<h1>{html.escape(title)}</h1>", table_html(table), *map(row_html, rows)]
    text = "\n".join(["<!doctype html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>", ""])
    with common.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> list[Row]:
    parser = harness.Parser("paper.sheet", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of runs, for example runs/")
    parser.add_argument("--out", type=png, help="the picture; the page is beside it (default: sheet.png in the first)")
    args = parser.parse_args(argv)
    path = args.out or args.folders[0] / "sheet.png"
    runs, table = find_runs(args.folders), results_table(*args.folders)
    first = runs[0][1]
    data = common.load_dataset(first.dataset, first.data_dir, first.image_size)
    if len(data.test) < 12:
        raise UserError(f"{first.data} has {len(data.test)} test images, a sheet shows 12")
    flags = [{k: str(v) for k, v in vars(run).items() if k not in IGNORED - {"seed"}} for _, run in runs]
    names = names_of([(run.label, each) for (_, run), each in zip(runs, flags, strict=True)])
    rows = [make_row(*run, data, name) for run, name in zip(runs, names, strict=True)]
    save_png(path, rows)
    save_page(path.with_suffix(".html"), rows, table, f"{first.data}: models side by side")
    print(f"wrote {path} and {path.with_suffix('.html')}")
    return rows


if __name__ == "__main__":
    harness.cli(main)
