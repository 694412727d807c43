"""Tests of paper/table.py and of tables.csv."""

import importlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from common import UserError
from paper import table


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def fake_run(
    folder, model="UAE 8x largest", seed=0, value=1.0, data="cifar10", features=("FID", "inception-tf"),
    how=("1", "sqrtm"), **args,
):  # fmt: skip
    """A run's folder as far as the table reads it."""
    distances = {"reconstruction": 2 * value, "sample": value, "interpolation": 3.0}
    distances |= dict(zip(("hash", "method"), how, strict=True))
    metrics = {name: {"metric": metric} | distances for metric, name in zip(features[::2], features[1::2], strict=True)}
    content = {"model": model, "data": data, "images": {"test": 10000}, "validation_mse": value / 100}
    content |= {"distances": metrics, "args": {"seed": seed, "epochs": 100, "out": str(folder)} | args}
    Path(folder).mkdir(parents=True)
    (Path(folder) / "args.json").write_text("{}")
    (Path(folder) / "results.json").write_text(json.dumps(content))


def printed(capsys, *argv):
    table.main([str(each) for each in argv])
    return capsys.readouterr().out.splitlines()


def test_results_are_means_over_seeds_in_the_papers_order_for_each_features_of_a_run(capsys):
    for seed, value in enumerate((1.0, 2.0, 6.0)):
        fake_run(f"runs/a{seed}", seed=seed, value=value, device=f"cuda:{seed}")
    for model in ("Mine", "VAE 8x", "UT-VAE*-GP 2x largest", "VAE*-full 2x", "WAE-MMD", "VAE*² 8x"):
        fake_run(f"runs/{model}", model=model)
    fake_run("runs/f", data="fashion_mnist", features=("FD-Lite0", "lite0@128", "FDC", "fashion_mnist-mlp"))
    lines = printed(capsys, "runs")
    assert lines[0].startswith("cifar10, FID inception-tf, 10000 test images, epochs 100 (")
    assert lines[2] == "| Model | FID | MSE | Seeds | Paper |"
    models = [line.strip("| ").split(" | ")[0] for line in lines[4:9]]
    assert models == ["VAE 8x", "VAE*-full 2x", "VAE*² 8x", "UT-VAE*-GP 2x largest", "UAE 8x largest"]
    ours, theirs = "6.00 ± 5.29 / 3.00 ± 2.65 / 3.00 ± 0.00 | 0.03000 ± 0.02646 | 3", "71.97 / 89.91 / 83.50"
    assert lines[8] == f"| UAE 8x largest | {ours} | {theirs} |"
    assert lines[10] == "| Mine | 2.00 / 1.00 / 3.00 | 0.01000 | 1 |  |"  # no row of the paper
    assert lines[12].startswith("fashion_mnist, FD-Lite0 lite0@128, FDC fashion_mnist-mlp, 10000")
    assert lines[14] == "| Model | FD-Lite0 | FDC | MSE | Seeds |"
    assert lines[16:] == ["| UAE 8x largest | 2.00 / 1.00 / 3.00 | 2.00 / 1.00 / 3.00 | 0.01000 | 1 |"]
    shutil.move("runs/a2", "others/a2")  # several folders, one of them twice
    assert printed(capsys, "runs", "others", "others/a2") == lines


def test_a_runs_other_figures_are_columns(capsys):
    fake_run("runs/a")
    content = json.loads(Path("runs/a/results.json").read_text()) | {"mean_variance": 0.1234, "collapsed_dimensions": 7}
    Path("runs/a/results.json").write_text(json.dumps(content))
    _, _, header, _, row = printed(capsys, "runs", "--rows", "8x")
    assert header == "| Model | FID | MSE | Collapsed | Variance | Seeds | Paper |"
    assert row.startswith("| UAE 8x largest | 2.00 / 1.00 / 3.00 | 0.01000 | 7.0 | 0.123 | 1 | ")


def test_rows_of_a_study_that_failed_are_named(capsys):
    columns = "label,seed,command,FDC_reconstruction,FDC_sample,FDC_interpolation,validation_mse,mean_variance,"
    lines = ["# --dataset digits --epochs 8", f"{columns}collapsed_dimensions,error"]
    lines += ["VAE 1x,3,vae.py,,,,,,,exit code 2", "VAE 1x,4,vae.py,1,2,3,0.5,0.25,7,"]
    Path("results.csv").write_text("\n".join(lines))
    row, _, left_out = printed(capsys, "results.csv")[-3:]
    assert row == "| VAE 1x | 1.00 / 2.00 / 3.00 | 0.50000 | 7.0 | 0.250 | 1 |"
    assert left_out == "left out: VAE 1x, seed 3: exit code 2"


def test_a_sweep_has_a_row_for_each_value(capsys):
    for n, seed in ((128, 0), (16, 0), (16, 1), (32, 0)):
        fake_run(f"runs/{n}-{seed}", seed=seed, value=n, latent_dim=n, images=[1, 2, 3])
    fake_run("runs/other", model="VAE 8x", latent_dim=7)
    rows = [line.strip("| ").split(" | ") for line in printed(capsys, "runs", "--rows", "UAE")[4:]]
    assert [row[0] for row in rows] == [f"UAE 8x largest, latent-dim {n}" for n in (16, 32, 128)]
    assert [row[3] for row in rows] == ["2", "1", "1"]
    fake_run("runs/more", seed=1, latent_dim=32, images=[1, 2, 4])  # its images have changed
    assert "| UAE 8x largest, images 1 2 4, latent-dim 32 |" in "\n".join(printed(capsys, "runs"))


OF_ALL = {
    "epochs": 9, "schedule": "linear", "lr": 0.1, "batch_size": 9, "latent_dim": 9, "width": 0.5, "image_size": 64,
    "precision": "bf16", "limit_train": 9, "limit_eval": 9,
}  # fmt: skip
SETTINGS = OF_ALL | {"beta": 9.0, "kappa": 3.0, "images": [1, 2, 9], "ranks": 2}


@pytest.mark.parametrize("name", SETTINGS)
def test_runs_of_another_setting_are_not_averaged(name, capsys):
    """Not of one model; and other models do not look alike if the setting is one that they should share."""
    first, shown = dict.fromkeys(SETTINGS, 7), " ".join(map(str, [SETTINGS[name]])).strip("[]").replace(",", "")
    for seed, (value, settings) in enumerate([(1, first), (3, first), (50, first | {name: SETTINGS[name]})]):
        fake_run(f"runs/{seed}", seed=seed, value=value, **settings)
    flag = name.replace("_", "-")
    rows = [line.strip("| ").split(" | ") for line in printed(capsys, "runs")[4:]]
    cells = {row[0].removeprefix("UAE 8x largest, "): (row[1].split(" / ")[1], row[3]) for row in rows}
    assert cells == {f"{flag} 7": ("1.00 and 3.00", "2"), f"{flag} {shown}": ("50.00", "1")}
    shutil.rmtree("runs/2")
    fake_run("runs/other", model="VAE 8x", **first | {name: SETTINGS[name]})
    title, *_, other, one = printed(capsys, "runs")
    assert (flag in other and flag in one and flag not in title) == (name in OF_ALL)


@pytest.mark.parametrize(
    ("how", "features", "row"),
    [(("2", "sqrtm"), "inception-tf", ("fid inception-tf 1 sqrtm", "fid inception-tf 2 sqrtm")),  # other weights
     (("1", "eigh"), "inception-tf", ("fid inception-tf 1 sqrtm", "fid inception-tf 1 eigh")),
     (("1", "sqrtm"), "lite0@64", ("fid inception-tf 1 sqrtm", "fid lite0@64 1 sqrtm"))],
)  # fmt: skip
def test_distances_that_were_measured_otherwise_are_not_averaged(how, features, row, capsys):
    fake_run("runs/a", seed=0)
    fake_run("runs/b", seed=1, value=50, how=how, features=("FID", features))
    names = [line.strip("| ").split(" | ")[0] for line in printed(capsys, "runs")[4:]]
    assert sorted(names) == sorted(f"UAE 8x largest, {each}" for each in row)


def test_what_a_run_does_not_depend_on_makes_no_row(capsys):
    same = {name: [f"{name} {seed}" for seed in (0, 1)] for name in sorted(table.IGNORED - {"seed"})}
    for seed, value in enumerate((1.0, 3.0)):
        fake_run(f"runs/{seed}", seed=seed, value=value, **{name: values[seed] for name, values in same.items()})
    (row,) = (line for line in printed(capsys, "runs") if line.startswith("| UAE 8x largest |"))
    assert "1.00 and 3.00" in row


def test_models_that_were_not_trained_alike_do_not_look_so(capsys):
    fake_run("runs/a", model="VAE 8x", beta=1, limit_train=None)
    fake_run("runs/b", epochs=8, beta=2, limit_train=None, batch_size=64)
    fake_run("runs/c", model="RAE-GP", epochs=8, beta=3, limit_train=None)
    title, *lines = printed(capsys, "runs")
    names = [line.strip("| ").split(" | ")[0] for line in lines[3:]]
    assert names == ["VAE 8x, epochs 100", "RAE-GP, epochs 8", "UAE 8x largest, batch-size 64, epochs 8"]
    assert "epochs" not in title and "limit" not in title and "batch" not in title


def test_what_has_no_row_is_named_and_what_is_wrong_is_refused(capsys):
    fake_run("runs/a")
    Path("runs/killed").mkdir()
    Path("runs/killed/args.json").write_text("{}")
    assert printed(capsys, "runs")[-1] == "left out: runs/killed is not finished"
    fake_run("two/a")
    fake_run("two/b", device="cuda")
    fake_run("bad/a")
    Path("bad/a/results.json").write_text('{"metric": "FID"}')
    for argv, message in (
        (["runs/killed"], "no results.json below runs/killed; runs/killed is not finished"),
        (["nosuch"], "nosuch"),
        (["runs", "--rows", "X"], "no model has this"),
        (["two"], "two/a and two/b are one seed of UAE 8x largest on cifar10: remove one"),
        (["bad"], "bad/a/results.json is no results.json of these scripts"),
    ):
        with pytest.raises(UserError, match=message):
            table.main(argv)
    for argv in ([], ["runs", "--paper"], ["--nosuch"], ["runs", "--rows", "("], ["--paper", "--rows", "VAE"]):
        with pytest.raises(SystemExit, match="2"):
            table.main(argv)
        assert re.fullmatch("paper.table: error: .*\n", capsys.readouterr().err)


def test_tables_csv_is_whole(capsys):
    rows = table.paper_rows()
    assert Counter(row["table"] for row in rows) == {"2": 9, "3": 4, "5": 19, "6": 15, "8": 8, "9": 8, "10": 2}
    for row in rows:
        numbers = list(row.values())[3:]
        assert len(numbers) == 9 and all(re.fullmatch(r"\d{2,3}\.\d{1,2}", number) for number in numbers), row
    assert table.paper_results()["celeba", "UT-VAE 8x random"][2] == "54.32"  # of Table 2; in Table 5 it is 44.32
    lines = printed(capsys, "--paper")
    cells = "44.29 / 48.73 / 61.99 | 110.0 / 120.6 / 118.3 | 65.86 / 68.53 / 68.75"
    assert len(lines) == 2 + 7 + 65 and lines[2] == "| **Table 2** |  |  |  |  |"
    assert lines[3] == f"| VAE 8x | `vae.py --k 8` | {cells} |"


@pytest.mark.parametrize("dataset", table.DATASETS)
def test_every_command_is_the_row_that_its_label_says(dataset):
    """The script's own label of a command is the paper's, with the heuristic that the paper uses on the data set."""
    for row in table.paper_rows():
        script, *flags = row["command"].split()
        args = importlib.import_module(script.removesuffix(".py")).arguments([*flags, "--dataset", dataset])
        label, heuristic = row["label"].replace(",", "").removesuffix("."), getattr(args, "sigma_points", None)
        assert args.label in (label, f"{label} {heuristic}"), row
        if heuristic and "--sigma-points" not in flags:
            assert heuristic == ("largest" if dataset == "cifar10" else "random")
