"""The study: rows of the paper's tables in one small setting, seed by seed, and what we decided beside them.

    python -m paper.study --dry-run                                   # the runs to do and the time expected
    python -m paper.study --out runs/study                            # Fashion-MNIST: hours; again after any stop
    python -m paper.study --out runs/study --rows '^UT-VAE' --seeds 0 1 2
    python -m paper.study --out runs/digits --dataset digits
    python -m paper.study --out runs/cifar10 --dataset cifar10 --images path/to/cifar10    # as a folder of images
    python -m paper.study --add runs/uae-* --results paper/results/fashion_mnist_full.csv  # runs started by hand

One line for each row and seed goes into --results, by which a finished one is known and not run again; a stopped one
goes on from its checkpoint below --out; one that fails is written down with its error, the others go on, and it is
tried again by the next start. The first line of the file is the setting of all; runs that have another are not added.
A line with a note is no line of today's code. `paper.table`, `paper.claims` and `paper.agreement` read the file.
"""

import csv
import importlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import threading
import time
from multiprocessing import connection
from pathlib import Path

from tqdm import tqdm

import common
import harness
from common import UserError
from fid import KINDS
from paper.table import IGNORED, dataset_of, metrics_of, paper_rows, read_results, regex, row_name

ROOT = Path(__file__).parent.parent
# The settings, fixed before the first run (paper/README.md, The study)
SMALL = "--width 0.0625 --epochs 8 --schedule linear --lr 0.005 --limit-eval 5000 --fid lite0@128"
SETTINGS = {
    "fashion_mnist": f"--dataset fashion_mnist {SMALL} classifier",
    "cifar10": f"--dataset cifar10 --latent-dim 128 {SMALL}",
    "digits": "--dataset digits",
    "fashion_mnist_eighth": f"--dataset fashion_mnist {SMALL.replace('0.0625', '0.125')} classifier",  # of the width
}
HEADLINE = ["VAE* 2x", "UT-VAE* 2x", "UAE 2x", "IWAE 2x", "IWAE 8x", "WAE-MMD"]  # beside Tables 2 and 3
ABLATIONS = [  # decisions of ours on what the paper leaves open, as further rows
    "vae.py --k 2 --schedule plateau",
    "ut_vae.py --k 2 --regularizer w2 --schedule plateau",
    "ut_vae.py --k 2 --regularizer w2-squared",
    "ut_vae.py --k 2 --regularizer w2-norms",
]
EIGHTH = ["vae.py --k 8", "ut_vae.py --k 8", "uae.py --k 8"]  # the rows at an eighth of the width
SQUARED = [f"{command} --k 2 --regularizer w2-squared" for command in ("vae.py", "ut_vae.py", "uae.py")]
MEASURED = ["validation_mse", "collapsed_dimensions", "mean_variance", "best_epoch"]
# For each unit of cost below, until a row is finished here: the medians of paper/results/, two runs on two cores
MINUTES = {"fashion_mnist": 4.1, "cifar10": 6.1, "digits": 0.34, "fashion_mnist_eighth": 7.6}


class Row:
    """A row of a data set: `label`, `command` (script and flags of the row alone), `argv`, `seeds` and `cost`.

    Which sigma points the paper draws depends on the data set: they are named in argv, for images from elsewhere.
    """

    def __init__(self, command: str, dataset: str, headline: bool) -> None:
        self.command, self.headline = command, headline
        self.script, *flags = command.split()
        self.argv = [*SETTINGS[dataset].split(), *flags, "--device", "cpu"]  # in fp32, as all lines of a file
        args = importlib.import_module(self.script.removesuffix(".py")).arguments(self.argv)
        self.argv += ["--sigma-points", args.sigma_points] if "sigma_points" in args else []
        self.label = args.label
        if "--schedule plateau" in command:
            self.label += " plateau"
        k = getattr(args, "k", 1)
        five = dataset == "digits" or (dataset == "fashion_mnist" and headline)
        self.seeds = range(5 if five else 3)
        self.cost = 1 + k + 2 * ("-GP" in args.label or args.script == "uae")  # encoder, decoder's passes, penalty


def study_rows(dataset: str) -> list[Row]:
    """The rows of a data set: those of the headline first. Each has one label."""
    paper, rows = [row for row in paper_rows() if row["label"] != "UT-VAE*-GP 2x"], {}  # another name of UAE 2x
    if dataset == "cifar10":
        commands = [row["command"].replace("--k 8", "--k 2") for row in paper if row["table"] == "2"]
        commands = [(command, True) for command in commands + SQUARED]
    elif dataset == "fashion_mnist_eighth":
        commands = [(command, True) for command in EIGHTH]
    else:
        first = [row["command"] for row in paper if row["table"] in "23" or row["label"] in HEADLINE] + ABLATIONS
        commands = [(command, True) for command in first] + [(row["command"], False) for row in paper]
    for command, headline in commands:
        row = Row(command, dataset, headline)
        rows.setdefault(row.label, row)
    return list(rows.values())


def run_script(script: str, argv: list[str], log: Path) -> None:
    """Run a script as by hand, with its output in a file, and end with the process that started it."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    sys.stdout = sys.stderr = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    sys.argv = [script, *argv]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def code_version() -> str:
    """The commit of this repository, with -dirty if its Python files were changed since; nothing without git."""
    if not shutil.which("git"):
        return ""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = commit and git("diff", "--quiet", "HEAD", "--", "*.py").returncode
    return f"{commit}-dirty" if changed else commit


def note_other_code(file: Path, lines: list[dict]) -> None:
    """Say so if lines of results are of another commit than this code."""
    if others := {line.get("commit", "") for line in lines if not line["error"]} - {code_version()}:
        common.note(f"{file} has lines of commit {', '.join(sorted(others))}: one study is of one (paper/README.md)")


def record(row: Row, seed: int, log: Path, exitcode: int, metrics: list[str], started: float, commit: str) -> dict:
    """The line of a run that has ended, from its folder or, if it failed, from the last line of its output."""
    line = {"label": row.label, "seed": seed, "command": row.command}
    line |= dict.fromkeys([f"{metric}_{kind}" for metric in metrics for kind in KINDS], "")
    line |= dict.fromkeys([*MEASURED, "seconds", "torch", "commit", "error"], "")
    text = log.read_text(encoding="utf-8").strip() if log.exists() else ""  # killed before it was opened
    folders = re.findall(r"^everything is in (.*)/$", text, re.MULTILINE)
    if exitcode or not folders:
        return line | {"error": f"exit code {exitcode}: {['no output', *text.splitlines()][-1]}"}
    folder = Path(folders[-1])
    results = json.loads((folder / "results.json").read_text())
    trained = max((folder / "last.pt").stat().st_mtime, started)
    evaluation = (folder / "results.json").stat().st_mtime - trained
    return line | measured(results, seconds_trained(folder) + evaluation) | {"commit": commit}


def seconds_trained(folder: Path) -> float:
    """The seconds of a run's epochs."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as epochs:
        return sum(float(epoch["seconds"]) for epoch in csv.DictReader(epochs))


def measured(results: dict, seconds: float) -> dict:
    """What a line has of a results.json, and the seconds of the run."""
    line = {name: results.get(name, "") for name in MEASURED}
    for found in results["distances"].values():
        line |= {f"{found['metric']}_{kind}": found[kind] for kind in KINDS}
    return line | {"seconds": round(seconds), "torch": results["versions"]["torch"]}


def added(folder: Path, setting: str, metrics: list[str]) -> dict:
    """The line of a run that was started by hand, from its folder. Raises UserError unless it has this setting."""
    with common.explained(f"{folder} is no finished run of these scripts"):
        results, seconds = json.loads((folder / "results.json").read_text()), seconds_trained(folder)
        args, label, dataset = results["args"], results["model"], dataset_of(setting)
        card, found = results["device"], {each["metric"] for each in results["distances"].values()}
    commands = {row.label: row.command for row in study_rows(dataset)}
    if label not in commands or found != {*metrics}:
        here = f"{label} with {', '.join(sorted(found)) or 'no distance'}"
        raise UserError(f"{folder} is {here}: a row of the study with {', '.join(metrics)} is needed")
    script, *flags = commands[label].split()
    argv = [*setting.split(" (")[0].split(), *flags]
    wanted = vars(importlib.import_module(script.removesuffix(".py")).arguments(argv))
    names = wanted.keys() - IGNORED - {"ranks"} | {"dataset", "fid", "fid_method"}
    if differ := [f"{n} is {args.get(n)}, not {wanted[n]}" for n in sorted(names) if args.get(n) != wanted[n]]:
        raise UserError(f"{folder} has another setting than {setting}: {'; '.join(differ)}")
    line = {"label": label, "seed": args["seed"], "command": commands[label]}
    return line | measured(results, seconds) | {"commit": code_version(), "device": card}


def add_runs(folders: list[Path], file: Path) -> None:
    """Write the lines of runs into a file of results, in place of those of their rows and seeds that have no note."""
    setting, lines = read_results(file)
    lines = {(row_name(line), int(line["seed"])): line for line in lines}
    for line in [added(folder, setting, metrics_of(next(iter(lines.values())))) for folder in folders]:
        lines[line["label"], line["seed"]] = line
        print(f"added     {line['label']}, seed {line['seed']}, {line['device']}")
    harness.write_csv(file, list(lines.values()), heading=f"# {setting}\n")


def study(
    todo: list[tuple[int, Row]], lines: list[dict], setting: str, images: str | None, out: Path, file: Path, jobs: int
) -> None:
    """Run all (seed, row), `jobs` at a time, and write each line into the file as it comes."""
    lines = {(line["label"], int(line["seed"])): line for line in lines}
    names = {"FD-Lite0": ("lite0",), "FDC": ("classifier", "digits")}
    metrics = [metric for metric, words in names.items() if any(word in setting for word in words)]
    waiting, running, started, spent = list(todo), {}, time.monotonic(), 0
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes below: the same figures for any --jobs
    context = multiprocessing.get_context("spawn")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                seed, row = waiting.pop(0)
                log = out / "logs" / re.sub(r"[^\w.]+", "-", f"{row.command} --seed {seed}.txt")
                log.parent.mkdir(parents=True, exist_ok=True)
                argv = [*row.argv, *(["--dataset", images] if images else []), "--seed", str(seed)]
                argv += ["--out", str(out), "--resume"]
                process = context.Process(target=run_script, args=(row.script, argv, log))
                process.start()
                running[process.sentinel] = (process, seed, row, log, time.time(), code_version())
                print(f"started   {row.label}, seed {seed}: {log}", flush=True)
            for sentinel in connection.wait(running):
                process, seed, row, log, *start = running.pop(sentinel)
                process.join()
                line = record(row, seed, log, process.exitcode, metrics, *start)
                lines[row.label, seed] = line
                harness.write_csv(file, list(lines.values()), heading=f"# {setting}\n")
                spent += row.cost
                left = sum(row.cost for _, row in waiting) + sum(row.cost for _, _, row, *_ in running.values()) / 2
                about = tqdm.format_interval((time.monotonic() - started) / spent * left)
                done = len(todo) - len(waiting) - len(running)
                what = f"failed    {row.label}, seed {seed}: {line['error']}"
                if not line["error"]:
                    numbers = " / ".join(f"{line[f'{metric}_{kind}']:.4g}" for metric in metrics for kind in KINDS)
                    what = f"finished  {row.label}, seed {seed}: {numbers}, {line['seconds']} s"
                print(f"{what}\n{done} of {len(todo)} done, {len(running)} running, about {about} left", flush=True)
    finally:
        for process, *_ in running.values():
            process.terminate()


def main(argv: list[str] | None = None) -> None:
    parser = harness.Parser("paper.study", __doc__)
    add = parser.add_argument
    add("--dataset", choices=SETTINGS, default="fashion_mnist", help="whose rows and setting")
    add("--images", metavar="FOLDER", help="take CIFAR-10's images from here")
    add("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    add("--results", type=Path, help="file of the results (default: results.csv in --out)")
    add("--rows", metavar="REGEX", type=regex, default="", help="only rows whose label has this")
    add("--seeds", type=int, nargs="+", help="only these of a row's seeds, 0 to 4 or 0 to 2")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each")
    add("--dry-run", action="store_true", help="print what would be run and the time expected")
    add("--add", metavar="RUN", type=Path, nargs="+", help="add finished runs, by their folders, to --results instead")
    args = parser.parse_args(argv)
    if args.add:
        if not args.results:
            raise UserError("--add RUN: give the --results to add to")
        return add_runs(args.add, args.results)
    if args.images and (args.dataset != "cifar10" or not Path(args.images).is_dir()):
        raise UserError(f"--images {args.images}: give a folder of images, with --dataset cifar10")
    setting = SETTINGS[args.dataset] + (" (from a folder of images)" if args.images else "")
    every = {row.label: row for row in study_rows(args.dataset)}
    wanted = [(seed, row) for label, row in every.items() if re.search(args.rows, label) for seed in row.seeds]
    wanted = [(seed, row) for seed, row in wanted if not args.seeds or seed in args.seeds]
    if not wanted:
        given = f"--rows '{args.rows.pattern}'"
        if args.seeds:
            given += f" and --seeds {args.seeds}"
        raise UserError(f"no run of the study has {given}: --dry-run alone prints all")
    file = args.results or args.out / "results.csv"
    if not args.dry_run:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = harness.locked(file.with_name(f".{file.name}.lock"))
    other, lines = read_results(file) if file.exists() else (setting, [])
    if other != setting:
        way = "--images FOLDER" if other.startswith(f"{setting} (") else "another --results"
        raise UserError(f"{file} is of another setting, {other}: give {way}")
    finished = {(line["label"], int(line["seed"])): float(line["seconds"]) for line in lines if not line["error"]}
    wanted.sort(key=lambda run: (not run[1].headline, run[0]))  # the headline first, seed by seed
    todo = [(seed, row) for seed, row in wanted if (row.label, seed) not in finished]
    measured = [seconds / every[label].cost for (label, _), seconds in finished.items() if label in every]
    unit = statistics.median(measured or [60 * MINUTES[args.dataset]])
    for seed, row in todo if args.dry_run else ():
        print(f"{tqdm.format_interval(unit * row.cost):>7}  {row.label}, seed {seed}: {row.command}")
    about = tqdm.format_interval(unit * sum(row.cost for _, row in todo) / args.jobs)
    print(f"{len(todo)} runs to do of {len(wanted)}, about {about}; setting: {setting}")
    if todo:
        note_other_code(file, lines)
    if not args.dry_run:
        study(todo, lines, setting, args.images, args.out, file, args.jobs)
        lock.close()


if __name__ == "__main__":
    harness.cli(main)
