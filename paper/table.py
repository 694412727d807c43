"""The results of runs in Markdown beside the paper's numbers, and the paper's tables by themselves.

    python -m paper.table runs/         # every results.json below the folder, mean ± standard deviation over seeds
    python -m paper.table paper/results/fashion_mnist.csv       # the same for the results of paper.study
    python -m paper.table --paper       # Tables 2, 3, 5, 6, 8, 9 and 10 of the paper, a command for each row

A run that differs in anything but the seed is a row of its own, named by the flags that differ: of one model any, of
all models those that they should share (SHARED). tables.csv beside this file is the one place that knows the paper's
numbers.
"""

import csv
import importlib
import itertools
import json
import re
import statistics
from argparse import ArgumentTypeError
from functools import cache
from pathlib import Path
from typing import NamedTuple

import common
import harness
from common import UserError
from fid import KINDS

TABLES = Path(__file__).with_name("tables.csv")
DATASETS = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR10", "celeba": "CelebA"}
ORDER = ["VAE", "UT-VAE", "RAE-no-reg", "RAE-GP", "RAE-L2", "RAE-SN", "VAE*", "UT-VAE*", "UAE", "IWAE", "WAE-MMD"]
MEASURED = {"validation_mse": ("MSE", 5), "collapsed_dimensions": ("Collapsed", 1), "mean_variance": ("Variance", 3)}
# differ between runs of one row: the seed, where a run was and how it was started; the label follows from the others
IGNORED = harness.UNNAMED | {"command", "name", "label"}
# settings that runs of different models share, or should not be compared by
SHARED = (
    "setting", "epochs", "schedule", "lr", "batch_size", "latent_dim", "width", "image_size", "precision",
    "limit_train", "limit_eval",
)  # fmt: skip
WORDS = {"label", "command", "torch", "commit", "error", "device", "note"}  # columns of paper.study that are no numbers


class Result(NamedTuple):
    """A run: three distances by features, and the other figures by name. `settings`: all that it depends on but the
    seed; `title`: what is said of it above the table."""

    source: Path
    data: str
    model: str
    seed: int
    title: str
    settings: dict[str, str]
    distances: dict[str, list[float]]
    figures: dict[str, float]


def paper_rows() -> list[dict[str, str]]:
    """The rows of tables.csv, in the paper's order."""
    with open(TABLES, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def paper_cells(row: dict[str, str], dataset: str) -> list[str]:
    """The paper's three numbers of a row for a data set, as it prints them."""
    return [row[f"{dataset}_{kind}"] for kind in KINDS]


def paper_tables() -> str:
    """The paper's tables in one of Markdown."""
    lines = []
    for table, rows in itertools.groupby(paper_rows(), lambda row: row["table"]):
        lines.append([f"**Table {table}**", *[""] * 4])
        for row in rows:
            numbers = [" / ".join(paper_cells(row, dataset)) for dataset in DATASETS]
            lines.append([row["label"], f"`{row['command']}`", *numbers])
    return markdown(["Row", "Command", *(f"Paper: {name}" for name in DATASETS.values())], lines)


@cache
def paper_results() -> dict[tuple[str, str], list[str]]:
    """(data set, label that the row's command gives to its run): the paper's three numbers; the first row counts."""
    found = {}
    for row in paper_rows():
        script, *flags = row["command"].split()
        module = importlib.import_module(script.removesuffix(".py"))
        for dataset in DATASETS:
            label = module.arguments([*flags, "--dataset", dataset]).label
            found.setdefault((dataset, label), paper_cells(row, dataset))
    return found


def read_results(file: Path) -> tuple[str, list[dict[str, str]]]:
    """The setting of paper.study's results and their lines. Raises UserError for another file."""
    with common.explained(f"{file} has no results of paper.study"), open(file, newline="", encoding="utf-8") as lines:
        setting, rows = lines.readline().removeprefix("# ").strip(), list(csv.DictReader(lines))
        if not rows or not {"label", "seed", "command", "validation_mse", "error"} <= rows[0].keys():
            raise ValueError("other columns")
        if "--dataset " not in setting:
            raise ValueError("its first line is no setting")
        _ = [float(row[name] or 0) for row in rows for name in rows[0] if name not in WORDS]
    return setting, rows


def row_name(line: dict[str, str]) -> str:
    """The row that a line of paper.study's results is of: what a note says sets it apart from others of its label."""
    return f"{line['label']}, {line['note']}" if line.get("note") else line["label"]


def dataset_of(setting: str) -> str:
    """The data set that a setting of paper.study names."""
    return setting.split("--dataset ")[1].split()[0]


def metrics_of(line: dict[str, str]) -> list[str]:
    """The metrics whose distances a line of paper.study's results has."""
    return [column.removesuffix(f"_{KINDS[0]}") for column in line if column.endswith(f"_{KINDS[0]}")]


def read_study(file: Path) -> tuple[list[Result], list[str]]:
    """The results in a file of paper.study, and what is left out, in words."""
    (setting, lines), results = read_results(file), []
    for line in (line for line in lines if not line["error"]):
        distances = {metric: [float(line[f"{metric}_{kind}"]) for kind in KINDS] for metric in metrics_of(line)}
        figures = {name: float(line[name]) for name in MEASURED if line[name]}
        data, seed, settings = dataset_of(setting), int(line["seed"]), {"setting": setting}
        results.append(Result(file, data, row_name(line), seed, setting, settings, distances, figures))
    return results, [f"{line['label']}, seed {line['seed']}: {line['error']}" for line in lines if line["error"]]


def read_run(file: Path) -> Result:
    """The results.json of a run. Raises UserError for another file."""
    with common.explained(f"{file} is no results.json of these scripts"):
        content = json.loads(file.read_text())
        args, measured, counts = content["args"], content["distances"], content["images"]
        shown = {name: " ".join(map(str, value)) if isinstance(value, list) else str(value)
                 for name, value in args.items() if name not in IGNORED}  # fmt: skip
        features = {name: f"{found['metric']} {name}" for name, found in measured.items()}
        shown["fid"] = " ".join(f"{name} {found['hash'][:6]} {found['method']}" for name, found in measured.items())
        shown["fid"] = shown["fid"] or "none"
        distances = {features[name]: [float(found[kind]) for kind in KINDS] for name, found in measured.items()}
        figures = {name: float(content[name]) for name in MEASURED if name in content}
        title = ", ".join([content["data"], *features.values(), f"{counts['test']} test images"])
        return Result(file.parent, content["data"], content["model"], args["seed"], title, shown, distances, figures)


def read_all(folders: tuple[Path, ...]) -> tuple[list[Result], list[str]]:
    """The results below folders and in files of paper.study, and what is left out, in words. Raises UserError if there
    are none."""
    files = sorted({file.with_name("results.json") for folder in folders for file in folder.rglob("args.json")})
    left_out = [f"{file.parent} is not finished" for file in files if not file.is_file()]
    results = [read_run(file) for file in files if file.is_file()]
    for file in (folder for folder in folders if not folder.is_dir()):
        found, failed = read_study(file)
        results, left_out = results + found, left_out + failed
    if not results:
        raise UserError("; ".join([f"no results.json below {', '.join(map(str, folders))}", *left_out]))
    return results, left_out


def names_of(runs: list[tuple[str, dict[str, str]]]) -> list[str]:
    """The names of runs, given by label and settings: the label, and the settings in which it differs from the runs of
    its label or, if they are SHARED, from any: `UAE 8x, latent-dim 16`."""
    names = []
    for label, own in runs:
        others = {name: [s.get(name) for other, s in runs if name in SHARED or other == label] for name in sorted(own)}
        differ = [f"{name.replace('_', '-')} {own[name]}" for name, values in others.items() if len(set(values)) > 1]
        names.append(", ".join([label, *differ]))
    return names


def by_row(results: list[Result]) -> dict[str, list[Result]]:
    """The runs of one data set by the name of their row. Raises UserError if a row has one seed twice."""
    rows = {}
    for name, run in zip(names_of([(run.model, run.settings) for run in results]), results, strict=True):
        seeds = rows.setdefault(name, {})
        if other := seeds.get(run.seed):
            raise UserError(f"{other.source} and {run.source} are one seed of {name} on {run.data}: remove one")
        seeds[run.seed] = run
    return {name: list(rows[name].values()) for name in sorted(rows, key=place)}


def place(label: str) -> tuple:
    """Where a row stands in the table: models in the order of Table 2, variants beside them, numbers by size."""
    stem = re.sub("(?<!RAE)-GP|-full|[†²ⁿ]", "", label.split(",")[0].split(" ")[0])
    number = ORDER.index(stem) if stem in ORDER else len(ORDER)
    return number, [(int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", label)]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def results_table(*folders: Path, wanted: str | re.Pattern = "") -> str:
    """A Markdown table for each data set: a row's mean ± standard deviation over seeds, and the paper's numbers for its
    rows. What the runs have in common stands above it, what was left out below.

    wanted: a regular expression; only the models that have it.
    """
    results, left_out = read_all(folders)
    results = [result for result in results if re.search(wanted, result.model)]
    if not results:
        raise UserError("--rows: no model has this in its name")
    parts, paper = [], paper_results()
    for data in sorted({result.data for result in results}):
        here = [result for result in results if result.data == data]
        features = list(dict.fromkeys(name for result in here for name in result.distances))
        metrics = [name.split()[0] for name in features]
        headers = [m if metrics.count(m) == 1 else name for m, name in zip(metrics, features, strict=True)]
        figures = [name for name in MEASURED if any(name in result.figures for result in here)]
        compared = any((data, result.model) in paper for result in here)
        header = ["Model", *headers, *(MEASURED[name][0] for name in figures), "Seeds", *["Paper"] * compared]
        rows = []
        for name, runs in by_row(here).items():
            cells = [name]
            for each in features:
                values = zip(*(run.distances[each] for run in runs if each in run.distances), strict=True)
                cells.append(" / ".join(spread(list(kind)) for kind in values))
            for figure in figures:
                cells.append(
                    spread([run.figures[figure] for run in runs if figure in run.figures], MEASURED[figure][1])
                )
            rows.append([*cells, str(len(runs)), *[" / ".join(paper.get((data, runs[0].model), ()))] * compared])
        titles = "; ".join(dict.fromkeys(result.title for result in here))
        shared = {name: {result.settings.get(name, "None") for result in here} for name in SHARED[1:]}
        alike = "".join(f", {name.replace('_', '-')} {value}" for name, (value, *more) in shared.items()
                        if not more and value != "None")  # fmt: skip
        parts += [f"{titles}{alike} (distances: reconstruction / sample / interpolation):", markdown(header, rows)]
    return "\n\n".join([*parts, *(f"left out: {what}" for what in left_out)])


def spread(values: list[float], digits: int | None = None) -> str:
    """Mean ± standard deviation, of distances to as many digits as the paper has; two values as they are, nothing for
    none."""
    if not values:
        return ""
    mean = statistics.mean(values)
    digits = (1 if mean >= 100 else 2) if digits is None else digits
    if len(values) == 2:
        return " and ".join(f"{value:.{digits}f}" for value in values)
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def regex(text: str) -> re.Pattern:
    """A regular expression, as argparse wants it."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def png(text: str) -> Path:
    """The name of a picture, as argparse wants it."""
    if not text.endswith(".png"):
        raise ArgumentTypeError(f"{text}: give a name that ends in .png")
    return Path(text)


def main(argv: list[str] | None = None) -> None:
    parser = harness.Parser("paper.table", __doc__)
    add = parser.add_argument
    add("folders", type=Path, nargs="*", help="folders of runs, for example runs/, or results of paper.study")
    add("--rows", metavar="REGEX", type=regex, help="only models whose name has this")
    add("--paper", action="store_true", help="print the paper's tables")
    args = parser.parse_args(argv)
    if bool(args.folders) == args.paper:
        parser.error("give folders of runs, for example runs/, or --paper")
    if args.paper and args.rows:
        parser.error("--rows chooses among runs, not of --paper")
    print(paper_tables() if args.paper else results_table(*args.folders, wanted=args.rows or ""))


if __name__ == "__main__":
    harness.cli(main)
