"""Tests of paper/table.py, of tables.csv and of the tables in paper/README.md."""

import importlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from common import UserError
from paper import table

README = Path(__file__).with_name("README.md")
HEADER = "| Data set | Features | Images | Model | Rec. | Sample | Interp. | MSE | Seeds |"


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def fake_result(folder, model="UAE 8x largest", seed=0, sample=1.0, data="cifar10", **settings):
    """A results.json as a run writes it, as far as the table reads it."""
    kinds = {"reconstruction": 2 * sample, "sample": sample, "interpolation": 3.0, "validation_mse": sample / 100}
    args = {"seed": seed, "epochs": 100, "out": str(folder), "world_size": 1} | settings
    content = {
        "model": model,
        "data": {"name": data},
        "metric": "FID",
        "features": "inception-tf",
        "features_hash": "1",
        "images": {"test": 10000},
        "args": args,
    } | kinds
    Path(folder).mkdir(parents=True)
    (Path(folder) / "results.json").write_text(json.dumps(content))


def printed(capsys, *argv):
    table.main(list(argv))
    return capsys.readouterr().out.splitlines()


def test_results_table_averages_over_seeds_in_the_papers_order(capsys):
    for i, sample in enumerate((1.0, 2.0, 6.0)):
        fake_result(f"runs/a{i}", seed=i, sample=sample, device=f"cuda:{i}")
    for model in ("VAE 8x", "UT-VAE*-GP 2x largest", "RAE-L2", "VAE*-full 2x", "WAE-MMD", "VAE*² 8x", "Mine"):
        fake_result(f"runs/{model.replace(' ', '').replace('*', 's')}", model=model)
    fake_result("runs/f", data="fashion_mnist")
    lines = printed(capsys, "runs")
    assert lines[0].startswith(HEADER)
    assert [line.split(" | ")[3] for line in lines[2:]] == [
        "VAE 8x", "RAE-L2", "VAE*-full 2x", "VAE*² 8x", "UT-VAE*-GP 2x largest", "UAE 8x largest", "WAE-MMD", "Mine",
        "UAE 8x largest",
    ]  # fmt: skip
    ours = "| inception-tf | 10000 | UAE 8x largest | 6.00 ± 5.29 | 3.00 ± 2.65 | 3.00 ± 0.00 | 0.03000 ± 0.02646 | 3 |"
    assert sum(line.startswith(f"| cifar10 {ours}") for line in lines) == 1
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    shutil.move("runs/a2", "others/a2")  # several folders, one of them twice
    assert printed(capsys, "runs", "others", "others/a2") == lines


def test_what_has_no_row_is_named_below_the_table(capsys):
    fake_result("runs/a")
    lines = printed(capsys, "runs")
    Path("runs/none").mkdir()
    Path("runs/none/results.json").write_text(json.dumps({"metric": None}))  # --fid none
    Path("runs/killed").mkdir()
    Path("runs/killed/args.json").write_text("{}")
    output = printed(capsys, "runs")
    assert output[: len(lines)] == lines
    assert [line for line in output[len(lines) :] if line] == [
        "left out: runs/killed is not finished", "left out: runs/none has no distances (--fid none)"
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"no results.* below runs/none/; runs/none has no distances \(--fid none\)"):
        table.main(["runs/none"])
    with pytest.raises(UserError, match="no results"):
        table.main(["nosuch"])


def test_runs_of_one_row_differ_in_the_seed_only():
    fake_result("runs/a0")
    for changed, message in (
        ({"seed": 9, "epochs": 50}, r"runs/a0 and runs/other are .* epochs \(100, 50\)"),
        ({"seed": 9, "world_size": 4}, r"world_size \(1, 4\)"),
        ({}, "runs/a0 and runs/other are one seed of UAE 8x largest on cifar10"),
    ):
        fake_result("runs/other", **changed)
        with pytest.raises(UserError, match=message):
            table.main(["runs"])
        shutil.rmtree("runs/other")
    Path("runs/a0/results.json").write_text('{"metric": "FID"}')
    with pytest.raises(UserError, match=r"a0/results\.json is not a results\.json of these scripts"):
        table.main(["runs"])


def test_the_papers_numbers_stand_beside_the_runs_of_its_rows(capsys):
    fake_result("runs/a", model="UAE 8x random")  # on CIFAR10 the paper has the largest
    fake_result("runs/b", model="UAE 8x largest", data="digits")
    lines = printed(capsys, "runs")
    assert lines[0] == HEADER
    fake_result("runs/c", model="UAE 8x largest")
    fake_result("runs/d", model="UT-VAE 8x random", data="celeba")  # in Tables 2 and 5: the first counts
    lines = printed(capsys, "runs")
    assert lines[0] == f"{HEADER} Paper (rec. / sample / interp.) |"
    known, ours = "inception-tf | 10000", "2.00 | 1.00 | 3.00 | 0.01000 | 1 |"
    assert lines[2:] == [
        f"| celeba | {known} | UT-VAE 8x random | {ours} 50.11 / 54.15 / 54.32 |",
        f"| cifar10 | {known} | UAE 8x largest | {ours} 71.97 / 89.91 / 83.50 |",
        f"| cifar10 | {known} | UAE 8x random | {ours}  |",
        f"| digits | {known} | UAE 8x largest | {ours}  |",
    ]


def test_the_readme_has_the_generated_tables(capsys):
    text = README.read_text(encoding="utf-8")
    between = re.findall(r"<!-- paper\.table --paper -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert between == ["\n".join(printed(capsys, "--paper"))]
    lines = between[0].splitlines()
    assert lines[2] == "| **Table 2** | | | | |" and len(lines) == 2 + 7 + 65
    cells = "44.29 / 48.73 / 61.99 | 110.0 / 120.6 / 118.3 | 65.86 / 68.53 / 68.75"
    assert lines[3] == f"| VAE 8x | `vae.py --k 8` | {cells} |"


def test_tables_csv_is_whole():
    rows = table.paper_rows()
    assert Counter(row["table"] for row in rows) == {"2": 9, "3": 4, "5": 19, "6": 15, "8": 8, "9": 8, "10": 2}
    for row in rows:
        assert list(row)[:3] == ["table", "label", "command"]
        numbers = list(row.values())[3:]
        assert len(numbers) == 9 and all(re.fullmatch(r"\d{2,3}\.\d{1,2}", number) for number in numbers), row


@pytest.mark.parametrize("dataset", table.DATASETS)
def test_every_command_is_the_row_that_its_label_says(dataset):
    """The script's own label of a command is the paper's, with the heuristic that the paper uses on the data set."""
    for row in table.paper_rows():
        script, *flags = row["command"].split()
        args = importlib.import_module(script.removesuffix(".py")).arguments([*flags, "--dataset", dataset])
        label = row["label"].replace(",", "").removesuffix(".")
        heuristic = getattr(args, "sigma_points", None)
        assert args.dataset == dataset and args.label in (label, f"{label} {heuristic}"), row
        if heuristic and "--sigma-points" not in flags:
            assert heuristic == ("largest" if dataset == "cifar10" else "random")


@pytest.mark.parametrize("argv", [[], ["runs", "--paper"], ["--nosuch"]])
def test_a_wrong_command_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        table.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "error: " in error
