"""The results of runs in one Markdown table beside the paper's numbers, and the paper's tables by themselves.

    python -m paper.table runs/         # every results.json below the folder, mean ± standard deviation over seeds
    python -m paper.table paper/results/fashion_mnist.csv       # the same for the results of paper.study
    python -m paper.table --paper       # Tables 2, 3, 5, 6, 8, 9 and 10 of the paper, a command for each row

tables.csv beside this file is the one place that knows the paper's numbers.
"""

import csv
import importlib
import itertools
import re
import statistics
from argparse import ArgumentTypeError
from functools import cache
from pathlib import Path

import common
from common import UserError
from fid import KINDS

TABLES = Path(__file__).with_name("tables.csv")
DATASETS = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR10", "celeba": "CelebA"}
ORDER = ["VAE", "UT-VAE", "RAE-no-reg", "RAE-GP", "RAE-L2", "RAE-SN", "VAE*", "UT-VAE*", "UAE", "IWAE", "WAE-MMD"]
# differ between runs of one row: the seed, where a run was and how it was started; label follows from the others
IGNORED = {"seed", "name", "out", "data_dir", "device", "resume", "eval_only", "save_images", "label"}


def paper_rows() -> list[dict[str, str]]:
    """The rows of tables.csv, in the paper's order."""
    with open(TABLES, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def paper_cells(row: dict[str, str], dataset: str) -> list[str]:
    """The paper's three numbers of a row for a data set, as the paper prints them."""
    return [row[f"{dataset}_{kind}"] for kind in KINDS]


def paper_tables() -> str:
    """The paper's tables in one of Markdown."""
    lines = ["| Row | Command | " + " | ".join(f"Paper: {name}" for name in DATASETS.values()) + " |", "|" + "---|" * 5]
    for table, rows in itertools.groupby(paper_rows(), lambda row: row["table"]):
        lines.append(f"| **Table {table}** | | | | |")
        for row in rows:
            numbers = " | ".join(" / ".join(paper_cells(row, dataset)) for dataset in DATASETS)
            lines.append(f"| {row['label']} | `{row['command']}` | {numbers} |")
    return "\n".join(lines)


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
    return setting, rows


def read_runs(folders: list[Path]) -> tuple[dict[tuple, list[tuple[Path, dict]]], list[str]]:
    """The results below the folders by (data set, features, model), with their folders; and what is left out, in words.

    Raises UserError for a file that is none of these scripts', or if there is nothing for a table.
    """
    rows, left_out = {}, []
    for run in sorted({file.parent for folder in folders for file in folder.rglob("args.json")}):
        if not (run / "results.json").is_file():
            left_out.append(f"{run} is not finished")
    for file in sorted({file for folder in folders for file in folder.rglob("results.json")}):
        result = common.load_json(file)
        if result.get("metric", "") is None:
            left_out.append(f"{file.parent} has no distances (--fid none)")
            continue
        try:
            key = (result["data"]["name"], result["features"], result["model"])
            result |= {kind: float(result[kind]) for kind in (*KINDS, "validation_mse")}
            result["settings"] = {name: value for name, value in result["args"].items() if name not in IGNORED}
            result["settings"] |= {name: result[name] for name in ("images", "features_hash")}
            result["seed"], result["count"] = result["args"]["seed"], result["images"]["test"]
            rows.setdefault(key, []).append((file.parent, result))
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{file} is not a results.json of these scripts") from None
    for file in (folder for folder in folders if folder.is_file()):
        for line in read_results(file):
            if line["error"] or not line["metric"]:
                why = line["error"] or "has no distances (--fid none)"
                left_out.append(f"{line['label']}, seed {line['seed']}: {why}")
                continue
            result = {"seed": line["seed"], "count": line["images"], "settings": {"setting": line["setting"]}}
            result |= {kind: float(line[kind]) for kind in (*KINDS, "validation_mse")}
            rows.setdefault((line["dataset"], line["features"], line["label"]), []).append((file, result))
    if not rows:
        where = ", ".join(f"{folder}/" for folder in folders)
        raise UserError("; ".join([f"no results.json with distances below {where}", *left_out]))
    return rows, left_out


def check_runs(what: str, runs: list[tuple[Path, dict]]) -> None:
    """Raise UserError if runs of one row differ in anything but the seed, or have one seed twice."""
    (first, reference), *_ = runs
    seeds = {}
    for folder, result in runs:
        a, b = reference["settings"], result["settings"]
        if differ := [f"{k} ({a.get(k)!r}, {b.get(k)!r})" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]:
            raise UserError(f"{first} and {folder} are both {what} but differ in {', '.join(differ)}: remove one")
        if (other := seeds.setdefault(result["seed"], folder)) != folder:
            raise UserError(f"{other} and {folder} are one seed of {what}: remove one")


def place(key: tuple[str, str, str]) -> tuple:
    """Where (data set, features, model) stands in the table: models in the order of Table 2, variants beside them."""
    stem = re.sub("(?<!RAE)-GP|-full|[†²ⁿ]", "", key[2].split(" ")[0])
    return *key[:2], ORDER.index(stem) if stem in ORDER else len(ORDER), key[2]


def results_table(*folders: Path, wanted: str | re.Pattern = "") -> str:
    """One Markdown table of all results.json below the folders, a row per data set, model and features: mean ± standard
    deviation over seeds, and the paper's numbers for its rows. What all rows have in common stands above the table,
    what was left out below it.

    wanted: a regular expression; only the models that have it.
    """
    rows, left_out = read_runs(folders)
    rows = {key: runs for key, runs in rows.items() if re.search(wanted, key[2])}
    if not rows:
        raise UserError("--rows: no model has this in its name")
    paper = paper_results()
    compared = any((dataset, model) in paper for dataset, _, model in rows)
    groups = {(*key[:2], str(runs[0][1]["count"])) for key, runs in rows.items()}
    header = ["Data set", "Features", "Images"] if len(groups) > 1 else []
    header += ["Model", "Rec.", "Sample", "Interp.", "MSE", "Seeds", *["Paper (rec. / sample / interp.)"] * compared]
    title = [] if len(groups) > 1 else ["{}, {}, {} images:".format(*group) + "\n" for group in groups]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for key in sorted(rows, key=place):
        (dataset, features, model), runs = key, rows[key]
        check_runs(f"{model} on {dataset}", runs)
        cells = [dataset, features, str(runs[0][1]["count"])] if len(groups) > 1 else []
        cells += [model, *(spread([result[kind] for _, result in runs]) for kind in (*KINDS, "validation_mse"))]
        cells += [str(len(runs)), *[" / ".join(paper.get((dataset, model), ()))] * compared]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*title, *lines, *(f"\nleft out: {what}" for what in left_out)])


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, to two decimals of a distance as the paper has it, to five of a small error."""
    mean = statistics.mean(values)
    digits = 1 if mean >= 100 else 2 if mean >= 0.5 else 5
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def regex(text: str) -> re.Pattern:
    """A regular expression, as argparse wants it."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def main(argv: list[str] | None = None) -> None:
    parser = common.Parser("paper.table", __doc__)
    parser.add_argument(
        "folders", type=Path, nargs="*", help="folders of runs, for example runs/, or results of paper.study"
    )
    parser.add_argument("--rows", metavar="REGEX", type=regex, default="", help="only models whose name has this")
    parser.add_argument("--paper", action="store_true", help="print the paper's tables")
    args = parser.parse_args(argv)
    if bool(args.folders) == args.paper:
        parser.error("give folders of runs, for example runs/, or --paper")
    print(paper_tables() if args.paper else results_table(*args.folders, wanted=args.rows))


if __name__ == "__main__":
    common.cli(main)
