"""The study: every row of the paper's tables in one small setting, seed by seed, and what we decided beside it.

    python -m paper.study --dry-run                                   # the rows and the time expected
    python -m paper.study --out runs/study                            # Fashion-MNIST: hours; again after any stop
    python -m paper.study --out runs/study --rows '^UT-VAE' --seeds 0 1 2
    python -m paper.study --out runs/digits --dataset digits -- --epochs 20    # flags after -- change the setting

One line for each row and seed goes into --results, by which a finished one is known and not run again; a stopped one
goes on from its checkpoint below --out; one that fails is written down with its error, the others go on, and it is
tried again by the next start. `paper.table` and `paper.claims` read the file.
"""

import csv
import importlib
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from argparse import RawDescriptionHelpFormatter
from functools import partial
from multiprocessing import connection
from pathlib import Path

import common
from common import UserError
from fid import KINDS
from paper.table import paper_rows, read_results, regex

ROOT = Path(__file__).parent.parent
# The settings, fixed before anything was compared: paper/README.md, What was seen
SMALL = "--width 0.0625 --limit-train 10000 --limit-eval 2000 --epochs 25 --lr 0.002 --fid lite0@128"
SETTINGS = {"fashion_mnist": SMALL, "cifar10": f"{SMALL} --latent-dim 64", "digits": ""}
# Decisions of ours on what the paper leaves open, as further rows
ABLATIONS = [
    "ut_vae.py --k 2 --regularizer w2-squared",
    "ut_vae.py --k 2 --regularizer w2-norms",
    "ut_vae.py --k 2 --kappa 0.001",
    "ut_vae.py --k 2 --regularizer w2 --kappa 0.001",
]
MEASURED = [*KINDS, "validation_mse", "collapsed_dimensions", "mean_variance", "best_epoch"]
MINUTES = 1.8  # for each unit of cost below, until a row is finished here; one thread, the setting of Fashion-MNIST


class Row:
    """A row in a setting: `label`, `command` (script and flags of the row alone), `argv` and `cost`.

    Which sigma points the paper draws depends on the data set: they are named in argv, for images from elsewhere.
    """

    def __init__(self, command: str, setting: str, dataset: str) -> None:
        self.command = command
        self.script, *flags = command.split()
        self.argv = [*flags, *shlex.split(setting)]
        script = importlib.import_module(self.script.removesuffix(".py"))
        args = script.arguments([*self.argv, "--dataset", dataset])
        self.argv += ["--sigma-points", args.sigma_points] if "sigma_points" in args else []
        self.label, self.k = args.label, getattr(args, "k", 1)
        penalty = "-GP" in args.label or args.script == "uae"
        self.cost = 1 + self.k + 2 * penalty  # the decoder's passes, and about one more for the encoder


def study_rows(setting: str, dataset: str) -> list[Row]:
    """The distinct rows of tables.csv, without Table 8's other name for UAE 2x, and the ablations; cheap ones first."""
    rows = {}
    for command in (*(row["command"] for row in paper_rows() if row["label"] != "UT-VAE*-GP 2x"), *ABLATIONS):
        row = Row(command, setting, dataset)
        rows.setdefault(row.label, row)
    return sorted(rows.values(), key=lambda row: row.cost)


def run_script(script: str, argv: list[str], log: Path) -> None:
    """Run a script as by hand, with its output in a file, and end with the process that started it."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *argv]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def code_version() -> str:
    """The commit of this repository, with -dirty if its Python files were changed since; nothing without git."""
    if not shutil.which("git"):
        return ""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = commit and git(["git", "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    return f"{commit}-dirty" if changed else commit


def record(row: Row, seed: int, dataset: str, setting: str, out: Path, log: Path, exitcode: int) -> dict:
    """The line of a run that has ended, from its folder or, if it failed, from the last line of its output."""
    line = {"dataset": dataset, "label": row.label, "seed": seed, "command": row.command, "setting": setting}
    line |= dict.fromkeys(["metric", "features", "images", *MEASURED, "seconds", "torch", "commit", "error"], "")
    *_, file = [None, *sorted(out.glob("*/results.json"), key=lambda file: file.stat().st_mtime)]
    if exitcode or not file:
        *_, last = ["no output", *log.read_text(encoding="utf-8").strip().splitlines()]
        return line | {"error": f"exit code {exitcode}: {last}"}
    results = common.load_json(file)
    with open(file.with_name("metrics.csv"), newline="", encoding="utf-8") as epochs:
        seconds = sum(float(epoch["seconds"]) for epoch in csv.DictReader(epochs))
    seconds += file.stat().st_mtime - file.with_name("last.pt").stat().st_mtime  # the evaluation
    return line | {
        **{name: results.get(name, "") for name in ("metric", "features", *MEASURED)},
        "images": results["images"]["test"],
        "seconds": round(seconds),
        "torch": results["versions"]["torch"],
        "commit": code_version(),
    }


def study(todo: list[tuple[int, Row]], dataset: str, setting: str, out: Path, file: Path, jobs: int) -> None:
    """Run all (seed, row), `jobs` at a time, and write each line into the file as it comes."""
    lines = {(line["label"], int(line["seed"])): line for line in (read_results(file) if file.exists() else [])}
    waiting, running, started, spent = list(todo), {}, time.monotonic(), 0
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes below: the same figures for any --jobs
    context = multiprocessing.get_context("spawn")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                seed, row = waiting.pop(0)
                folder = out / re.sub(r"[^\w.]+", "-", f"{row.command} --seed {seed}")
                folder.mkdir(parents=True, exist_ok=True)
                argv = [*row.argv, "--seed", str(seed), "--out", str(folder), "--resume", "auto"]
                process = context.Process(target=run_script, args=(row.script, argv, folder / "log.txt"))
                process.start()
                running[process.sentinel] = (process, seed, row, folder)
                print(f"started   {row.label}, seed {seed}: {folder}/log.txt", flush=True)
            for sentinel in connection.wait(running):
                process, seed, row, folder = running.pop(sentinel)
                process.join()
                line = record(row, seed, dataset, setting, folder, folder / "log.txt", process.exitcode)
                lines[row.label, seed] = line
                file.parent.mkdir(parents=True, exist_ok=True)
                common.write_file(file, common.csv_text(list(lines.values())))
                spent += row.cost
                left = sum(row.cost for _, row in waiting) + sum(row.cost for _, _, row, _ in running.values()) / 2
                about = common.duration((time.monotonic() - started) / spent * left)
                done = len(todo) - len(waiting) - len(running)
                what = f"failed    {row.label}, seed {seed}: {line['error']}"
                if not line["error"]:
                    numbers = " / ".join(f"{line[kind]:.2f}" for kind in KINDS if line[kind] != "")
                    what = f"finished  {row.label}, seed {seed}: {line['metric']} {numbers}, {line['seconds']} s"
                print(f"{what}\n{done} of {len(todo)} done, {len(running)} running, about {about} left", flush=True)
    finally:
        for process, *_ in running.values():
            process.terminate()


def main(argv: list[str] | None = None) -> None:
    parser = common.Parser(prog="paper.study", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=SETTINGS, default="fashion_mnist", help="whose setting (default: fashion_mnist)")
    add("--out", type=Path, default=Path("runs/study"), help="folder of the runs (default: runs/study)")
    add("--results", type=Path, help="file of the results (default: results.csv in --out)")
    add("--rows", metavar="REGEX", type=regex, default="", help="only rows whose label has this")
    add("--seeds", type=common.number(int, 0), nargs="+", help="default: 0 to 4 for rows with K ≤ 2, else 0 to 2")
    add("--jobs", type=common.number(int, 1), default=2, help="runs at a time, one thread each (default: 2)")
    add("--dry-run", action="store_true", help="print what would be run and the time expected")
    add("flags", nargs="*", metavar="-- FLAGS", help="further flags of all runs")
    args = parser.parse_args(argv)
    setting = shlex.join(["--dataset", args.dataset, *SETTINGS[args.dataset].split(), *args.flags])
    every = {row.label: row for row in study_rows(setting, args.dataset)}
    rows = [row for label, row in every.items() if args.rows.search(label)]
    if not rows:
        raise UserError(f"--rows {args.rows.pattern}: no row has this; --dry-run prints all")
    file = args.results or args.out / "results.csv"
    lines = read_results(file) if file.exists() else []
    if other := {line["setting"] for line in lines} - {setting}:
        raise UserError(f"{file} is of another setting, {other.pop()}: give another --results")
    finished = {(line["label"], int(line["seed"])): float(line["seconds"]) for line in lines if not line["error"]}
    seeds = {row: args.seeds or range(5 if row.k <= 2 else 3) for row in rows}
    in_order = [(seed, row) for seed in sorted({s for each in seeds.values() for s in each}) for row in rows]
    todo = [(seed, row) for seed, row in in_order if seed in seeds[row] and (row.label, seed) not in finished]
    measured = [seconds / every[label].cost for (label, _), seconds in finished.items() if label in every]
    unit = statistics.median(measured or [60 * MINUTES])
    for seed, row in todo if args.dry_run else ():
        print(f"{common.duration(unit * row.cost):>7}  {row.label}, seed {seed}: {row.command}")
    about = common.duration(unit * sum(row.cost for _, row in todo) / args.jobs)
    print(f"{len(todo)} runs to do of {sum(len(s) for s in seeds.values())}, about {about}; setting: {setting}")
    if not args.dry_run:
        study(todo, args.dataset, setting, args.out, file, args.jobs)


if __name__ == "__main__":
    common.cli(main)
