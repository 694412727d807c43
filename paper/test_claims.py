"""Tests of paper/claims.py, paper/agreement.py and of the generated parts of the documents."""

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

import harness
from common import UserError
from fid import KINDS
from paper import agreement, claims, documents, study, table


def results_file(path, rows, dataset="fashion_mnist"):
    """Results of paper.study: v, 2v and 500 - v as distances, error v/1000, by label and seed."""
    lines = []
    for label, seed, v in ((label, seed, v) for label, values in rows.items() for seed, v in values.items()):
        line = {"label": label, "seed": seed, "command": "x.py"}
        line |= {f"FDC_{kind}": value for kind, value in zip(KINDS, (v, 2 * v, 500 - v), strict=True)}
        collapsed = "" if label.startswith("RAE") else v
        line |= {"validation_mse": v / 1000, "collapsed_dimensions": collapsed, "mean_variance": collapsed}
        lines.append(line | {"error": "NaN" if label == "Bad" else ""})
    harness.write_csv(Path(path), lines, heading=f"# {study.SETTINGS[dataset]}\n")
    return Path(path)


def test_a_difference_is_paired_by_seed():
    """By hand: 1, 2, 3 have mean 2 and standard error 1/√3; for two degrees of freedom p = 1 - t/√(2 + t²)."""
    mean, half, p, base, seeds = claims.compare({2: 53, 1: 42, 0: 31, 4: 9}, {0: 30, 1: 40, 2: 50, 3: 7})
    assert (mean, base, seeds) == (2, 40, 3) and half == pytest.approx(4.302653 / math.sqrt(3))
    assert p == pytest.approx(1 - math.sqrt(12) / math.sqrt(14))
    assert claims.compare({0: 5}, {0: 3})[:2] == (2, math.inf) and claims.compare({0: 5}, {1: 3}) is None
    assert claims.compare({0: 5, 1: 6}, {0: 3, 1: 4})[1:3] == (0, 0)  # every seed says the same


@pytest.mark.parametrize(("dataset", "points"), [("digits", "random"), ("cifar10", "largest")])
def test_a_claim_takes_the_sign_of_the_papers_numbers(dataset, points, tmp_path):
    """UAE against UT-VAE*: the paper's UAE is ahead on CIFAR10 and behind on Fashion-MNIST, which judges the digits."""
    uae, ut_vae = f"UAE 2x {points}", f"UT-VAE* 2x {points}"
    file = results_file(tmp_path / "r.csv", {uae: {0: 110, 1: 112, 2: 114}, ut_vae: {0: 100, 1: 100, 2: 100}}, dataset)
    up, down = "+12.0 ± 5.0", "-3.0 ± 1.2"  # 4.302653 · 2/√3 of 100, and of 400
    cells = f"**{up}** / **{up}** / *opposite* {down} | **{up}** | 3 seen (losses: 3), 1 opposite |"
    if dataset == "cifar10":
        cells = f"*opposite* {up} / *opposite* {up} / **{down}** | *opposite* {up} | 1 seen, 3 opposite |"
    theirs = "-5.4 / -4.3 / -4.4" if dataset == "cifar10" else "+3.6 / +3.4 / +5.9"
    row = f"| UAE against UT-VAE* | {uae} − {ut_vae} | 3 | {theirs} | {cells}"
    assert claims.report(file, "headline").splitlines()[2:] == [row]


def test_each_kind_of_images_takes_its_own_sign_and_the_error_that_of_reconstructions(tmp_path):
    rows = {"UAE 8x random": {0: 110, 1: 112, 2: 114}, "UT-VAE 8x random": dict.fromkeys(range(3), 100)}
    up, down = "+12.0 ± 5.0", "-3.0 ± 1.2"
    cells = f"-9.8 / +15.8 / +35.9 | *opposite* {up} / **{up}** / *opposite* {down} | *opposite* {up} |"
    text = claims.report(results_file(tmp_path / "r.csv", rows), "others")
    assert f"{cells} 1 seen (losses: 1), 3 opposite |" in text


def test_the_parts_of_a_report(tmp_path, capsys):
    """With one run that failed, and a row of one seed, which is in no verdict and no correlation."""
    ours = {"VAE 1x": 40, "VAE* 1x": 30, "VAE 2x": 45, "VAE* 2x": 50, "RAE-no-reg": 35, "UT-VAE 2x pairs": 10}
    ours = {k: {0: v, 1: v + 1, 2: v + 3} for k, v in ours.items()} | {"RAE-GP": {0: 99}, "Bad": {1: 7}}
    file = results_file(tmp_path / "r.csv", ours)
    claims.main([str(file)])
    text, parts = capsys.readouterr().out, {part: claims.report(file, part) for part in claims.PARTS}
    assert all(part in text for part in parts.values())
    _, _, first, collapse = parts["summary"].splitlines()
    numbers = "| 3 | -31.1 | *opposite* +10.8 ± 0.0 | *opposite* +10.8 ± 0.0 |  |"  # 5 of 46.33, reconstructions alone
    assert first == f"| W₂ beats KL | VAE* 2x − VAE 2x {numbers} 4 seen, 4 opposite |"
    assert collapse.startswith("| KL collapses dimensions, W₂ does not | VAE* 2x − VAE 2x | 3 |")
    line = f"VAE* 1x − VAE 1x | 3 | {claims.FIGURE_5} | 31.33 against 41.33: **-10.00 ± 0.00** |"
    assert line in parts["collapse"] and parts["decisions"].count("\n") == 1  # none was run
    assert parts["others"].splitlines()[-1].endswith("| RAE-GP − RAE-no-reg | 1 | +6.3 / -2.8 / +0.9 | "
                                                     "+182.9 / +182.9 / -13.8 | +182.9 | one seed |")  # fmt: skip
    # VAE* 1x and VAE 1x have FIDs of 31.62 and 45.64, 39.26 and 51.20, 52.68 and 63.21; RAE-no-reg is in no pair of two
    assert "\n| all, below 2 % in the paper | 0 |" in parts["verdicts"]
    assert parts["verdicts"].endswith("\n\nFailed, in no comparison: Bad, seed 1.")
    # by hand: the paper's reconstructions 45.64, 31.62, 43.66, 30.07, 21.56, 102.1 and ours have ranks
    # 5 3 4 2 1 6 and 4 2 5 6 3 1: Σd² = 1 + 1 + 1 + 16 + 4 + 25, so 1 - 6·48/210; without the pairs 1 - 6·18/120;
    # then two rows with KL alone, and 3 2 1 with 1 3 2: Σd² = 4 + 1 + 1
    numbers = "| reconstructions | -0.37 ± 0.00 (6) | 0.10 ± 0.00 (5) |  | -0.50 ± 0.00 (3) |"
    assert all(f"| {measure} {numbers}\n" in parts["correlations"] for measure in ("FDC reconstruction", "error"))


def test_the_interval_of_a_rank_correlation_is_over_seeds():
    """By hand, with 1.96 times the root mean square of the draws' changes."""
    r, half = claims.spearman([[1, 1, 9], [2, 2, 2], [3, 3, 3]], [10, 20, 30])  # the means are 3.67, 2, 3
    assert r == pytest.approx(-0.5) and half == pytest.approx(1.96 * 1.5 * (8 / 27) ** 0.5, rel=0.05)  # draws without 9
    r, half = claims.spearman([[1, 1, 2.3], [2, 2, 2]], [10, 20])  # 1.43; with 2.3 twice 1.87, widened above 2
    assert r == pytest.approx(1) and half == pytest.approx(1.96 * 2 * (7 / 27) ** 0.5, rel=0.05)
    assert claims.spearman([[1], [2], [3], [4]], [1, 2, 4, 3]) == pytest.approx((0.8, 0))


def test_benjamini_and_hochberg_by_hand():
    """Of sorted p the largest i with p_i ≤ 0.05 i/m counts: 0.031 ≤ 0.05·4/5 brings 0.025 > 0.05·2/5 with it."""
    values = [(0.012, -1), (0.03, -1), (0.031, 1), (0.2, -1), (0.025, -1)]
    found = [claims.Comparison("others", "", ("a", "b"), "x", -3, mean, 0.5, p, 1, 3) for p, mean in values]
    found[2] = found[2]._replace(paper=-1.9)
    small = "| all, below 2 % in the paper | 1 | 0 | 1 | 0 | 0 | 1 |"
    assert claims.verdicts(found).endswith(f"| x | 5 | 4 | 1 | 0 | 3 | 1 |\n{small}\n| all | 5 | 4 | 1 | 0 | 3 | 1 |")
    found[0] = found[0]._replace(p=0.05)  # now 0.025 > 0.01, 0.03 > 0.02, 0.031 > 0.03, 0.05 > 0.04
    assert claims.verdicts(found).endswith("| all | 5 | 4 | 1 | 0 | 0 | 0 |")


@pytest.mark.parametrize("dataset", ["fashion_mnist", "cifar10", "digits"])
def test_every_claim_is_of_rows_of_the_study(dataset):
    labels = {row.label for row in study.study_rows(dataset)}
    every = [
        pair for group in claims.CLAIMS.values() for text in group.values() for pair in claims.pairs(text, dataset)
    ]
    assert len({*every}) == len(every) - sum(len(claims.pairs(text, dataset)) for text in claims.COLLAPSE.values())
    if dataset == "cifar10":  # nine rows of Table 2, with K = 2, and three with W₂²
        assert sum(set(pair) <= labels for pair in every) == 6 + 2 + 8 + 3
    else:
        assert {label for pair in every for label in pair} - labels == {"VAE*² 2x", "UAE² 2x random"}  # CIFAR10's alone
        labels = {label for label in labels if claims.paper_numbers(dataset, label)}
        failed = {"UT-VAE {k}x pairs", "UT-VAE {k}x largest", "VAE-full{gp} 2x", "UT-VAE-full{gp} 2x random"}
        failed = {label.format(k=k, gp=gp) for label in failed for k in (2, 4, 8) for gp in ("", "-GP")}
        assert {label for label in labels if claims.failure(dataset, label)} == failed


def test_the_table_of_a_study(tmp_path, capsys):
    file = results_file(tmp_path / "r.csv", {"VAE 8x": {0: 60, 1: 70}, "Mine": {0: 1}, "Bad": {1: 2}})
    table.main([str(file)])
    title, _, header, _, vae, *_, last = capsys.readouterr().out.splitlines()
    assert title.startswith(study.SETTINGS["fashion_mnist"]) and last == "left out: Bad, seed 1: NaN"
    assert header == "| Model | FDC | MSE | Collapsed | Variance | Seeds | Paper |"
    numbers = "65.00 ± 7.07 / 130.0 ± 14.1 / 435.0 ± 7.1 | 0.06500 ± 0.00707 | 65.0 ± 7.1 | 65.000 ± 7.071 | 2"
    assert vae == f"| VAE 8x | {numbers} | 44.29 / 48.73 / 61.99 |"
    good, other = file.read_text(), tmp_path / "other.csv"
    for text in ("a,b\n1,2\n", good.replace("--dataset", "--data"), good.replace(",0.06,", ",zero,")):
        other.write_text(text)
        for module in (table, claims, agreement):
            with pytest.raises(UserError, match=r"other\.csv has no results of paper\.study: "):
                module.main([str(other)])


def test_the_picture_shows_each_rows_mean_and_spread_against_the_papers_number(tmp_path):
    rows = {"VAE 8x": {0: 50, 1: 60}, "RAE-GP": {0: 20, 1: 20}, "UT-VAE 2x pairs": {0: 90, 1: 91}}
    rows |= {"WAE-MMD": {0: 40, 1: 40}, "RAE-L2": {0: 300}, "Mine": {0: 3, 1: 3}}
    file = results_file(tmp_path / "r.csv", rows)
    ((first, second, _, error),) = agreement.read_panels(file)
    assert (first.title, second.title, error.title) == ("FDC, reconstruction", "FDC, sample", "error (MSE)")
    assert first.theirs == error.theirs == [44.29, 22.91, 102.1, 47.58, 20.28] and second.theirs[0] == 48.73
    # without the row of one seed, and without the pairs: ours 55, 20, 40 and the paper's 44.29, 22.91, 47.58
    assert first.correlation() == "rank correlation 0.80, without failures 0.50"
    axes = Figure().subplots()
    agreement.draw(axes, first)
    points = [tuple(each.lines[0].get_xydata()[0]) for each in axes.containers]
    assert points == [(44.29, 55), (22.91, 20), (102.1, 90.5), (47.58, 40), (20.28, 300)]
    assert {30, 50, 100} <= {*axes.get_xticks()} and 200 in axes.get_yticks()  # ticks where the rows are
    ends = axes.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert ends == pytest.approx([55 - 50**0.5, 55 + 50**0.5])  # standard deviation of 50 and 60
    assert [i for i, each in enumerate(axes.containers) if each.lines[0].get_markerfacecolor() == "white"] == [2]
    axes.figure.draw_without_rendering()
    agreement.write_labels(axes, first)
    assert {text.get_text() for text in axes.texts} == {"GP", "pairs", "L2"}
    assert agreement.describe("UT-VAE*-full-GP 2x random", "digits") == ("UT-VAE*", "2x", "full GP")
    assert agreement.describe("UT-VAE 8x random", "cifar10") == ("UT-VAE", "8x", "random")
    agreement.main([str(file), "--out", str(tmp_path / "deep" / "a.png")])
    assert Image.open(tmp_path / "deep" / "a.png").width == 11 * 160
    with pytest.raises(UserError, match=r"r\.csv: 1 rows have numbers of the paper"):
        agreement.main([str(results_file(tmp_path / "r.csv", {"VAE 8x": {0: 1}, "Mine": {0: 2}}))])


BLOCKS = [(file, block) for file in documents.DOCUMENTS if (study.ROOT / file).exists()
          for block in documents.BLOCK.findall((study.ROOT / file).read_text(encoding="utf-8"))]  # fmt: skip


@pytest.mark.parametrize(("file", "block"), BLOCKS, ids=[f"{file}: {m} {argv}" for file, (m, argv, _) in BLOCKS])
def test_the_generated_parts_of_the_documents_are_what_their_commands_print(file, block, monkeypatch):
    monkeypatch.chdir(study.ROOT)
    module, arguments, text = block
    assert documents.printed(module, arguments) == text


def test_documents_are_written_by_their_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results_file("r.csv", {"VAE 8x": {0: 60}})
    end = "<!-- end -->\n"
    old = f"a\n<!-- paper.table r.csv --rows '^V.* 8' -->\nold\n{end}b\n<!-- paper.claims a.csv -->\n{end}"
    Path("README.md").write_text(old)
    documents.main([])
    text = Path("README.md").read_text()
    first, second = (block[2] for block in documents.BLOCK.findall(text))
    assert "| VAE 8x | 60.00 /" in first and second == "*Not run yet: a.csv.*\n"
    assert text.replace(first, "old\n").replace(second, "") == old
    documents.main([])
    assert Path("README.md").read_text() == text and "2 generated parts, as they were" in capsys.readouterr().out
