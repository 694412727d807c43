"""Tests of paper/study.py."""

import contextlib
import csv
import json
import multiprocessing
import os
import re
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import fid
import harness
import rae
import vae
from common import UserError
from paper import study, table

torch.set_num_threads(1)  # as in the study's processes


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def metrics(folder):
    """The lines of a run's metrics.csv without its times."""
    with open(folder / "metrics.csv", newline="") as lines:
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in csv.DictReader(lines)]


def test_a_study_fails_is_killed_and_loses_nothing(monkeypatch, capsys):
    """The first start ends by SIGKILL, with one row failed and one in the middle; the second finishes both."""
    small = "--dataset digits --epochs 8 --limit-train 200 --limit-eval 20 --width 0.02 --latent-dim 4"
    monkeypatch.setitem(study.SETTINGS, "digits", small)
    fork = multiprocessing.get_context("fork")  # here torch is imported already
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda _method: fork)
    features = fid.classifier_features("digits")  # fitted once
    monkeypatch.setattr(fid, "classifier_features", lambda *_: features)
    argv = ["--dataset", "digits", "--rows", "^(RAE-no-reg|VAE 1x)$", "--seeds", "3", "--out", "out", "--jobs"]
    rae_run, vae_run = (Path("out") / script.arguments([*small.split(), "--seed", "3", *flags]).name
                        for script, flags in ((rae, []), (vae, ["--k", "1"])))  # fmt: skip
    rae_run.mkdir(parents=True)
    (rae_run / "last.pt").touch()  # no checkpoint: this row fails
    killed = fork.Process(target=study.main, args=([*argv, "1"],))
    killed.start()
    deadline = time.monotonic() + 120
    while not (Path("out/results.csv").exists() and (vae_run / "metrics.csv").exists()):
        assert killed.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.join()
    setting, (line,) = table.read_results(Path("out/results.csv"))
    assert (setting, line["label"], line["seed"]) == (small, "RAE-no-reg", "3")
    assert re.match("exit code 2: rae.py: error: cannot read .*last.pt", line["error"])
    while True:  # the run ends with the study
        with contextlib.suppress(UserError):
            harness.locked(vae_run / ".lock").close()
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert 1 <= len(metrics(vae_run)) < 8

    (rae_run / "last.pt").unlink()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    study.main([*argv, "2"])
    assert os.environ["OMP_NUM_THREADS"] == "1"
    rows = {line["label"]: line for line in table.read_results(Path("out/results.csv"))[1]}
    assert rows.keys() == {"RAE-no-reg", "VAE 1x"} and not any(line["error"] for line in rows.values())
    assert all(float(rows["VAE 1x"][name]) > 0 for name in ("validation_mse", "FDC_sample", "mean_variance", "seconds"))
    assert rows["VAE 1x"]["commit"] == study.code_version()
    (log,) = Path("out/logs").glob("vae*")
    epochs = re.findall(r"^epoch (\d)/8", log.read_text(), re.MULTILINE)  # of both processes
    assert (
        {*"2345678"} <= {*epochs} and len(epochs) <= 9 and [row["epoch"] for row in metrics(vae_run)] == [*"12345678"]
    )
    results = rae.main([*small.split(), "--seed", "3", "--out", "alone"])
    assert metrics(rae_run) == metrics("alone" / Path(rae_run.name))
    assert float(rows["RAE-no-reg"]["FDC_sample"]) == results["distances"]["digits-mlp"]["sample"]

    os.utime(vae_run / "last.pt", (0, 0))  # stopped long ago, when it had been trained
    Path("out/results.csv").unlink()
    study.main([*argv, "2"])
    lines = table.read_results(Path("out/results.csv"))[1]
    assert len(lines) == 2 and all(0 < float(line["seconds"]) < 600 for line in lines)

    monkeypatch.setattr(study, "run_script", None)  # nothing is left to run
    study.main([*argv, "1"])
    output = capsys.readouterr()
    assert "0 runs to do of 2" in output.out and "lines of commit" not in output.err
    monkeypatch.setitem(study.SETTINGS, "digits", "--dataset digits")
    with pytest.raises(UserError, match=f"is of another setting, {small}: give another"):
        study.main([*argv, "1"])


def test_a_line_names_the_commit_and_whether_the_code_was_changed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    assert study.code_version() == ""  # no repository
    Path("a.py").touch()
    Path("results.csv").touch()
    for command in ("init -q", "add .", "commit -qm 1"):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a", *command.split()], check=True)
    commit = study.code_version()
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    Path("results.csv").write_text("2")  # as the study itself does
    assert study.code_version() == commit
    Path("a.py").write_text("2")
    assert study.code_version() == f"{commit}-dirty"
    study.note_other_code(Path("r.csv"), [{"commit": f"{commit}-dirty", "error": ""}, {"commit": "old", "error": "x"}])
    assert not capsys.readouterr().err
    study.note_other_code(Path("r.csv"), [{"commit": commit, "error": ""}, {"commit": f"{commit}-dirty", "error": ""}])
    assert f"note: r.csv has lines of commit {commit}: one study is of one" in capsys.readouterr().err


def test_runs_started_by_hand_are_added_to_a_file_with_their_card(monkeypatch, capsys):
    small = "--epochs 1 --limit-train 96 --limit-eval 30 --width 0.02 --batch-size 32 --precision fp32"
    features = fid.classifier_features("digits")  # fitted once
    monkeypatch.setattr(fid, "classifier_features", lambda *_: features)
    for flags in ("--seed 3", "--seed 1 --lr 0.004"):
        rae.main([*small.split(), *flags.split(), "--decoder-reg", "gp", "--out", flags[7]])
    ((run,), (other,)) = (list(Path(seed).glob("rae*")) for seed in "31")
    lines = [
        {"label": "RAE-GP", "seed": 3, "note": "old"},
        {"label": "RAE-GP", "seed": 3},
        {"label": "VAE 8x", "seed": 3, "commit": "a", "device": "B"},
    ]
    empty = dict.fromkeys(["command", *(f"FDC_{kind}" for kind in fid.KINDS), "validation_mse", "error"], "")
    harness.write_csv(Path("r.csv"), [empty | line for line in lines], heading=f"# --dataset digits {small} (here)\n")
    results = json.loads((run / "results.json").read_text())
    assert results["device"] == "cpu"  # where it was evaluated
    (run / "results.json").write_text(json.dumps(results | {"device": "NVIDIA H200"}))
    capsys.readouterr()
    study.main(["--add", str(run), "--results", "r.csv"])
    assert capsys.readouterr().out == "added     RAE-GP, seed 3, NVIDIA H200\n"
    setting, (former, added, left) = table.read_results(Path("r.csv"))
    assert setting == f"--dataset digits {small} (here)" and left == table.read_results(Path("r.csv"))[1][2]
    assert (former["note"], former["device"], left["device"], left["commit"]) == ("old", "", "B", "a")
    assert (added["command"], added["note"], added["device"]) == ("rae.py --decoder-reg gp", "", "NVIDIA H200")
    assert float(added["FDC_sample"]) == results["distances"]["digits-mlp"]["sample"] and added["error"] == ""
    assert float(added["validation_mse"]) == results["validation_mse"] and added["commit"] == study.code_version()
    before = Path("r.csv").read_text()
    (Path("none")).mkdir()
    harness.write_csv(Path("two.csv"), [empty | lines[0] | {f"FID_{kind}": "" for kind in fid.KINDS}],
                     heading=f"# --dataset digits {small}\n")  # fmt: skip
    for argv, message in (
        (["--add", str(other), "--results", "r.csv"], "another setting than .*: lr is 0.004, not 0.005"),
        (["--add", "none", "--results", "r.csv"], "none is no finished run of these scripts"),
        (["--add", str(run), "--results", "two.csv"], "is RAE-GP with FDC: a row of the study with FDC, FID is needed"),
        (["--add", str(run)], "give the --results to add to"),
    ):
        with pytest.raises(UserError, match=message):
            study.main(argv)
    assert Path("r.csv").read_text() == before


def test_a_run_killed_before_it_has_an_output_is_a_line(tmp_path):
    row, lost = study.Row("vae.py", "digits", True), tmp_path / "none.txt"
    line = study.record(row, 0, lost, -9, ["FDC"], 0.0, "abc")
    assert line["error"] == "exit code -9: no output" and line["label"] == "VAE 8x"


def test_the_studys_rows_are_those_of_the_paper_and_of_our_decisions(capsys):
    study.main(["--dry-run"])
    *runs, last = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r" *[\d:]+  (.*), seed (\d): (.*)", run).groups() for run in runs]
    seeds = Counter(label for label, _, _ in found)
    five = "VAE 2x", "UT-VAE* 2x random plateau", "UT-VAE 8x random", "IWAE 8x"
    assert {seeds[label] for label in five} == {5} and {seeds["UT-VAE 4x random"], seeds["UT-VAE 8x largest"]} == {3}
    assert set(study.ABLATIONS) < {command for _, _, command in found} and len(seeds) == 56
    first = {label for label, _, _ in found[: [seed for _, seed, _ in found].index("1")]}  # the headline, seed by seed
    for row in table.paper_rows():
        label = study.Row(row["command"], "fashion_mnist", True).label.replace("UT-VAE*-GP 2x", "UAE 2x")
        assert label in (first if row["table"] in "23" else seeds), row
    assert last.startswith(f"{len(runs)} runs to do of {len(runs)}") and study.SETTINGS["fashion_mnist"] in last
    assert table.read_results(study.ROOT / "paper/results/fashion_mnist.csv")[0] == study.SETTINGS["fashion_mnist"]
    seeds = {dataset: {len(row.seeds) for row in study.study_rows(dataset)} for dataset in ("digits", "cifar10")}
    assert seeds == {"digits": {5}, "cifar10": {3}}
    eighth = {row.label: (len(row.seeds), row.argv) for row in study.study_rows("fashion_mnist_eighth")}
    assert eighth.keys() == {"VAE 8x", "UT-VAE 8x random", "UAE 8x random"}
    assert all(seeds == 3 and vae.arguments(argv[:-4]).width == 0.125 for seeds, argv in eighth.values())
    assert vae.arguments(study.Row("vae.py", "digits", True).argv).device == "cpu"  # also where a GPU is


def test_rows_and_seeds_choose_among_the_studys_and_add_none(capsys):
    study.main(["--rows", "^VAE [24]x$", "--seeds", "1", "4", "--dry-run"])
    found = re.findall(r"(VAE .x), seed (\d)", capsys.readouterr().out)
    assert found == [("VAE 2x", "1"), ("VAE 2x", "4"), ("VAE 4x", "1")]  # VAE 4x has seeds 0 to 2
    with pytest.raises(UserError, match=r"no run of the study has --rows '4x' and --seeds \[4\]: --dry-run"):
        study.main(["--rows", "4x", "--seeds", "4", "--dry-run"])


def test_images_are_a_folder_for_cifar10(tmp_path):
    for dataset, images in (("cifar10", "nosuch"), ("fashion_mnist", str(tmp_path))):
        with pytest.raises(UserError, match=f"--images {images}: give a folder of images, with --dataset cifar10"):
            study.main(["--dataset", dataset, "--images", images, "--dry-run"])
    results = str(study.ROOT / "paper/results/cifar10.csv")
    with pytest.raises(UserError, match=r"of another setting, .*: give --images FOLDER"):
        study.main(["--dataset", "cifar10", "--results", results, "--dry-run"])


@pytest.mark.parametrize("dataset", study.SETTINGS)
def test_every_run_of_the_study_is_in_the_results(dataset, tmp_path, capsys):
    argv = ["--dataset", dataset, "--results", str(study.ROOT / f"paper/results/{dataset}.csv"), "--dry-run"]
    study.main(argv + ["--images", str(tmp_path)] * (dataset == "cifar10"))
    *missing, last = capsys.readouterr().out.splitlines()
    assert not missing and re.match(r"0 runs to do of \d+,", last)


def test_two_studies_with_one_file_of_results_are_one_too_many(monkeypatch, capsys):
    monkeypatch.setattr(study, "study", None)
    argv = ["--dataset", "digits", "--seeds", "0", "--out", "out"]
    Path("out").mkdir()
    with harness.locked(Path("out/.results.csv.lock")):
        study.main([*argv, "--dry-run"])  # what is left may be asked
        assert "to do" in capsys.readouterr().out
        with pytest.raises(UserError, match="out/ is in use by another"):
            study.main(argv)
