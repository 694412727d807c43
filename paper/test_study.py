"""Tests of paper/study.py and of paper/claims.py, and of what stands in paper/README.md by them."""

import csv
import multiprocessing
import re
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import rae
from common import UserError
from paper import claims, study, table

PAPER = Path(__file__).parent


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def metrics(folder):
    """The lines of a run's metrics.csv without its times."""
    (file,) = Path(folder).glob("*/metrics.csv")
    with open(file, newline="") as lines:
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in csv.DictReader(lines)]


def test_a_study_fails_is_killed_and_loses_nothing(monkeypatch):
    """The first start ends by SIGKILL, with one row failed and one in the middle; the second finishes both."""
    threads = torch.get_num_threads()
    setting = "--epochs 12 --limit-train 200 --limit-eval 20 --width 0.02 --latent-dim 4 --fid none"
    argv = ["--dataset", "digits", "--rows", "^(RAE-no-reg|VAE 1x)$", "--seeds", "3", "--out", "out"]
    argv, one_by_one = [[*argv, *jobs, "--", *setting.split()] for jobs in ([], ["--jobs", "1"])]  # RAE fails first
    broken = Path("out/rae.py-seed-3/broken")
    broken.mkdir(parents=True)
    for name in ("last.pt", "args.json"):
        (broken / name).touch()
    killed = multiprocessing.get_context("fork").Process(target=study.main, args=(one_by_one,))
    killed.start()
    deadline = time.monotonic() + 120
    while not (Path("out/results.csv").exists() and list(Path("out").glob("vae*/*/metrics.csv"))):
        assert killed.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    children = subprocess.check_output(["pgrep", "-P", str(killed.pid)], text=True).split()
    killed.kill()
    killed.join()
    (line,) = table.read_results(Path("out/results.csv"))
    assert (line["label"], line["seed"]) == ("RAE-no-reg", "3") and "exit code 2: rae.py: error: cannot read" in line[
        "error"
    ]
    while re.search("^[^Z]", subprocess.run(["ps", "-o", "stat=", *children], capture_output=True, text=True).stdout):
        assert time.monotonic() < deadline  # none of its processes outlives it
        time.sleep(0.05)
    before = len(metrics("out/vae.py-k-1-seed-3"))
    assert 1 <= before < 12

    for file in broken.iterdir():
        file.unlink()
    study.main(argv)
    rows = {line["label"]: line for line in table.read_results(Path("out/results.csv"))}
    assert rows.keys() == {"RAE-no-reg", "VAE 1x"} and not any(line["error"] for line in rows.values())
    assert float(rows["VAE 1x"]["validation_mse"]) > 0 and rows["VAE 1x"]["torch"] and rows["VAE 1x"]["images"] == "20"
    assert "--resume" in Path("out/vae.py-k-1-seed-3/log.txt").read_text()
    assert len(metrics("out/vae.py-k-1-seed-3")) == 12
    torch.set_num_threads(1)
    rae.main([*setting.split(), "--seed", "3", "--out", "alone"])
    torch.set_num_threads(threads)
    assert metrics("out/rae.py-seed-3") == metrics("alone")

    monkeypatch.setattr(study, "run_script", None)  # nothing is left to run
    study.main(argv)
    with pytest.raises(UserError, match="is of another setting"):
        study.main([*argv, "--lr", "0.001"])


def test_a_line_names_the_commit_and_whether_the_code_was_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    assert study.code_version() == ""  # no repository
    git = ["git", "-c", "user.name=a", "-c", "user.email=a"]
    for name in ("a.py", "results.csv"):
        Path(name).write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "1"]):
        subprocess.run([*git, *command], check=True)
    commit = study.code_version()
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    Path("results.csv").write_text("2")  # as the study itself does
    assert study.code_version() == commit
    Path("a.py").write_text("2")
    assert study.code_version() == f"{commit}-dirty"


def test_the_studys_rows_are_those_of_the_paper_and_of_our_decisions(capsys):
    study.main(["--dry-run"])
    *runs, last = capsys.readouterr().out.splitlines()
    found = [re.search(r"min  (.*), seed (\d): (.*)", run).groups() for run in runs]
    seeds = Counter(label for label, _, _ in found)
    commands = {command for _, _, command in found}
    assert {number for label, number in seeds.items() if re.search("RAE|MMD|[12]x", label)} == {5}
    assert {number for label, number in seeds.items() if re.search("[48]x", label)} == {3}
    for row in table.paper_rows():
        label = study.Row(row["command"], "--width 0.1", "fashion_mnist").label
        assert label.replace("UT-VAE*-GP 2x", "UAE 2x") in seeds, row
    assert set(study.ABLATIONS) < commands and len(seeds) == 56
    order = [(int(seed), study.Row(command, "", "fashion_mnist").cost) for _, seed, command in found]
    assert order == sorted(order)  # seed by seed, cheap rows first
    assert last.startswith(f"{len(found)} runs to do of {len(found)}, about ")


def results_file(path, values, dataset="fashion_mnist", setting="--width 1"):
    """Results of a study, from {label: {seed: reconstruction}}; sample is twice, the error a thousandth of that."""
    lines = []
    for label, seeds in values.items():
        for seed, value in seeds.items():
            line = {"dataset": dataset, "label": label, "seed": seed, "command": "", "setting": setting}
            line |= {"metric": "FD-Lite0", "features": "lite0@128", "images": 2000, "error": "", "seconds": 240}
            line |= {"reconstruction": value, "sample": 2 * value, "interpolation": 500 - value}
            lines.append(line | {"validation_mse": value / 1000, "collapsed_dimensions": round(value)})
    Path(path).write_text(study.common.csv_text(lines))
    return Path(path)


def test_the_time_expected_comes_from_the_rows_that_are_finished_selected_or_not(capsys):
    """RAE's cost is 2 and VAE 4x's 5: 240 s make 600 s; three seeds, two at a time, make 15 minutes."""
    setting = f"--dataset fashion_mnist {study.SETTINGS['fashion_mnist']}"
    results_file("r.csv", {"RAE-no-reg": {0: 30}}, setting=setting)
    study.main(["--dry-run", "--rows", "^VAE 4x$", "--results", "r.csv"])
    assert "3 runs to do of 3, about 15 min;" in capsys.readouterr().out


def test_a_claim_is_judged_by_paired_differences():
    """Seeds differ by far more than the models do: only pairs show it."""
    file = results_file("r.csv", {
        "VAE 2x": {0: 30, 1: 40, 2: 50, 3: 7}, "UT-VAE 2x random": {2: 47, 1: 38, 0: 29, 4: 1000},
    })  # fmt: skip
    lines = table.read_results(file)
    claim = claims.Claim("", "", better="UT-VAE 2x random", worse="VAE 2x")
    word, mean, error, seeds = claims.judge(claim, claims.by_row(lines, "reconstruction"))  # 1, 2, 3
    assert (word, seeds) == ("seen", 3) and (mean, error) == pytest.approx((2, 3**-0.5))
    assert claims.judge(claim, claims.by_row(lines, "interpolation"))[0] == "reversed"
    lines[-2]["reconstruction"] = "41"  # seed 0: 30 - 41
    assert claims.judge(claim, claims.by_row(lines, "reconstruction"))[0] == "not seen"
    lines[-2]["error"] = "NaN"
    assert claims.judge(claim, claims.by_row(lines, "reconstruction"))[0] == "too few seeds"
    assert claims.judge(claim._replace(worse="VAE 4x"), claims.by_row(lines, "reconstruction")) is None


def test_the_report_has_verdicts_the_papers_differences_and_rank_correlations(capsys):
    labels = ["VAE 1x", "VAE* 1x", "UT-VAE 2x pairs", "RAE-no-reg"]
    ours = {"VAE 1x": 40, "VAE* 1x": 30, "RAE-no-reg": 35, "UT-VAE 2x pairs": 10}
    claims.main([str(results_file("r.csv", {label: {s: ours[label] + s for s in range(3)} for label in labels}))])
    lines = capsys.readouterr().out.splitlines()
    cells = "seen: +10.0 ± 0.0 (+14.0) | seen: +20.0 ± 0.0 (+11.6) | reversed: -10.0 ± 0.0 (+9.0)"
    claim = f"| W₂ beats KL, samples, K = 1 | Table 6 | VAE* 1x < VAE 1x | 3 | {cells} | seen: +0.01000 ± 0.00000 |"
    assert lines.count(claim) == 1
    collapse = (
        "| KL collapses dimensions, W₂ does not, samples | App. H, Fig. 5 | VAE* 1x < VAE 1x | 3 | seen: +10.0 ± 0.0 |"
    )
    assert lines.count(collapse) == 1
    start = lines.index("| Of 1 claims | Rec. | Sample | Interp. | MSE |")
    counts = ["| seen | 1 | 1 | 0 | 1 |", "| reversed | 0 | 0 | 1 | 0 |", "| not seen | 0 | 0 | 0 | 0 |"]
    assert lines[start + 2 : start + 5] == counts
    # reconstruction: the paper has 45.64, 31.62, 21.56 and, a failure, 102.1; ours are 40, 30, 35 and 10
    assert "Decisions of ours:" not in lines  # none of their rows is there
    assert "| all | 4 | -0.40 | -0.40 | 0.40 |" in lines
    assert "| without those that the paper calls failures | 3 | 0.50 | 0.50 | -0.50 |" in lines
    small = {"VAE 1x": {s: 0.4 + s for s in range(3)}, "VAE* 1x": {s: 0.3 + s for s in range(3)}}
    claims.main([str(results_file("small.csv", small, dataset="digits"))])
    assert "< VAE 1x | 3 | seen: +0.10 ± 0.00 | seen: +0.20 ± 0.00 |" in capsys.readouterr().out  # no paper's numbers
    both = Path("small.csv").read_text() + Path("r.csv").read_text().split("\n", 1)[1].replace("--width 1", "--width 2")
    Path("both.csv").write_text(both)
    with pytest.raises(UserError, match=r"both\.csv has results of 2 settings"):
        claims.main(["both.csv"])


def test_as_many_claims_are_counted_by_chance_as_chance_shows(monkeypatch):
    """Simulated: differences of 3 and of 5 seeds without any effect."""
    labels = [(f"A{i}", f"B{i}", 3 if i < 300 else 5) for i in range(600)]
    monkeypatch.setattr(claims.common, "DEFAULTS", {"mine": {"sigma_points": "random"}})
    draw = np.random.default_rng(0).normal
    values = {label: dict(enumerate(draw(50, 9, n))) for *pair, n in labels for label in pair}
    lines = table.read_results(results_file("r.csv", values, dataset="mine"))
    every = [claims.Claim("", "", *pair) for *pair, _ in labels]
    title, _, *rows = claims.tally([*every, *every], lines).splitlines()
    seen, reversed_, not_seen, chance = ([float(cell) for cell in row.split("|")[2:-1]] for row in rows)
    assert title.startswith("| Of 600 claims |") and seen[0] + reversed_[0] + not_seen[0] == 600
    expected = 300 * (0.0918 + 0.0581)  # of Student's t with 2 and 4 degrees of freedom, beyond 2
    assert chance == [pytest.approx(expected, abs=0.1)] * 4
    assert abs(seen[0] - expected) < 20 and abs(reversed_[0] - expected) < 20  # three standard deviations
    assert claims.tally(every, [line for line in lines if line["seed"] != "2" and int(line["seed"]) < 3]) == ""


def test_a_stand_in_for_a_data_set_has_its_sigma_points():
    uae = study.Row("uae.py --k 2", "--dataset other.npz", "cifar10")
    assert uae.label == "UAE 2x largest" and uae.argv[-4:] == ["--dataset", "other.npz", "--sigma-points", "largest"]
    assert study.Row("vae.py --k 2", "--dataset other.npz", "cifar10").argv[-1] == "other.npz"
    assert claims.Claim("", "", "UAE 2x", "UT-VAE 8x random").on("cifar10")[2:] == (
        "UAE 2x largest",
        "UT-VAE 8x random",
    )


@pytest.mark.parametrize(
    ("dataset", "chosen", "other"), [("cifar10", "largest", "random"), ("digits", "random", "largest")]
)
def test_the_papers_choice_of_points_is_judged_against_the_others_not_itself(dataset, chosen, other, capsys):
    rows = {f"UT-VAE* 2x {chosen}": 1, f"UT-VAE* 2x {other}": 2, "VAE* 2x": 3}
    rows = {label: {s: error + s for s in range(3)} for label, error in rows.items()}
    claims.main([str(results_file("r.csv", rows, dataset=dataset))])
    report = capsys.readouterr().out
    verdicts = [line for line in report.splitlines() if "choice of points" in line]
    assert len(verdicts) == 1 and f"| UT-VAE* 2x {chosen} < UT-VAE* 2x {other} | 3 | seen: +1.0" in verdicts[0]
    assert report.count("| UT-VAE* 2x random < VAE* 2x |") == 1  # two claims on digits, of the same rows


@pytest.mark.parametrize("dataset", study.SETTINGS)
def test_every_claim_is_of_rows_of_the_study(dataset):
    labels = {row.label for row in study.study_rows("", dataset)}
    for claim in (claim.on(dataset) for claim in (*claims.CLAIMS, *claims.COLLAPSE, *claims.OURS)):
        assert {claim.better, claim.worse} <= labels, claim
    failures = {label for label in labels if claims.failure(label)}
    assert len(failures) == 6 + 4 and "VAE*-full 2x" not in failures


def test_the_table_reads_a_studys_results(capsys):
    file = results_file("r.csv", {"VAE 8x": {0: 60, 1: 70}, "Mine": {0: 1}})
    with open(file, "a") as more:
        more.write(file.read_text().splitlines()[-1].replace("Mine,0", "Bad,1").replace(",2000,,", ",2000,NaN,") + "\n")
    table.main([str(file)])
    lines = capsys.readouterr().out.splitlines()
    ours = "| VAE 8x | 65.00 ± 7.07 | 130.0 ± 14.1 | 435.0 ± 7.1 | 0.06500 ± 0.00707 | 2 | 44.29 / 48.73 / 61.99 |"
    assert lines[0] == "fashion_mnist, lite0@128, 2000 images:" and lines[4] == ours
    assert lines[-1] == "left out: Bad, seed 1: NaN"
    table.main([str(file), "--rows", "^V"])
    assert capsys.readouterr().out.splitlines() == [*lines[:5], "", "left out: Bad, seed 1: NaN"]
    with pytest.raises(UserError, match="no model has this"):
        table.main([str(file), "--rows", "X"])
    with pytest.raises(SystemExit):
        table.main([str(file), "--rows", "("])
    assert "'(' is not a regular expression" in capsys.readouterr().err
    Path("other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"other\.csv has no results of paper\.study"):
        table.main(["other.csv"])


@pytest.mark.parametrize("readme", [PAPER / "README.md", PAPER.parent / "README.md"])
def test_the_texts_figures_are_those_of_the_results(readme, monkeypatch, capsys):
    """What stands between `<!-- paper.X … -->` and `<!-- end -->` is what `python -m paper.X …` prints."""
    monkeypatch.chdir(PAPER.parent)
    text = readme.read_text(encoding="utf-8")
    for module, argv, content in re.findall(r"<!-- paper\.(\w+) (.*?) -->\n(.*?)\n<!-- end -->", text, re.DOTALL):
        {"table": table, "claims": claims}[module].main(argv.split())
        assert capsys.readouterr().out.strip() == content.strip(), argv
