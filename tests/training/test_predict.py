"""Predictions of what was trained, settings from files, and what else a trainer is expected to have."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from dal_kernels.training import main
from dal_kernels.training.data import load_data
from dal_kernels.training.predict import find_checkpoint
from support.trainings import needs_training, rows_of

needs_training()


# --- predict


@pytest.mark.parametrize("settings", ["", "--ema-decay 0.98", "--val-fraction 0.2"])
def test_what_is_predicted_is_what_the_training_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str
) -> None:
    command = ["train", "--data", "digits", "--epochs", "4", "--output", str(tmp_path), *settings.split()]
    assert main(command) == 0
    assert f"Written: {tmp_path / 'digits'}" in capsys.readouterr().out
    assert main(["predict", "--data", "digits", "--output", str(tmp_path)]) == 0
    (run,) = tmp_path.glob("digits/*")
    metrics = rows_of(run / "metrics.csv")
    if "val" in settings:  # the best epoch's, by the validation
        metrics.sort(key=lambda row: float(row["validation_accuracy"]))
    rows, data = rows_of(tmp_path / "predictions.csv"), load_data("digits")
    assert tuple(rows[0]) == ("path", "predicted", "confidence")
    assert [int(row["path"]) for row in rows] == list(range(450))
    right = sum(int(row["predicted"]) == label for row, label in zip(rows, data.test_labels.tolist(), strict=True))
    assert right / 450 == float(metrics[-1]["test_accuracy"])
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in rows)
    assert f"{right / 450:.1%} as their labels say" in capsys.readouterr().out
    classes = rows_of(tmp_path / "predicted-classes.csv")
    assert sum(int(row["right"]) for row in classes) == right
    if "val" not in settings:
        assert classes == rows_of(run / "classes.csv")
        assert rows_of(tmp_path / "predicted-confusion.csv") == rows_of(run / "confusion.csv")


def test_images_without_labels_are_predicted_by_the_names_of_their_files(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for shade, name in ((30, "dark"), (220, "light")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(20):
                picture = image.new("RGB", (16, 16), (shade + i,) * 3)
                picture.save(tmp_path / "data" / part / name / f"{i}.png")
    (tmp_path / "new" / "deep").mkdir(parents=True)
    for shade, name in ((35, "a.png"), (230, "deep/b.png")):
        image.new("RGB", (30, 20), (shade,) * 3).save(tmp_path / "new" / name)
    (tmp_path / "new" / "c.png").write_bytes(b"")
    out = str(tmp_path / "out")
    command = ["train", "--data", f"folder:{tmp_path / 'data'}", "--epochs", "10", "--batch-size", "8"]
    assert main([*command, "--output", out]) == 0
    assert main(["predict", "--data", f"folder:{tmp_path / 'new'}", "--output", out]) == 0
    found = {row["path"]: row["predicted"] for row in rows_of(tmp_path / "out" / "predictions.csv")}
    assert found == {str(tmp_path / "new" / "a.png"): "dark", str(tmp_path / "new" / "deep" / "b.png"): "light"}
    (skipped,) = rows_of(tmp_path / "out" / "predicted-skipped.csv")
    assert skipped["path"].endswith("c.png")
    table = tmp_path / "list.csv"
    table.write_text("path\nnew/a.png\nnew/deep/b.png\n", encoding="utf-8")
    assert main(["predict", "--data", f"csv:{table}", "--output", out]) == 0
    found = {row["path"]: row["predicted"] for row in rows_of(tmp_path / "out" / "predictions.csv")}
    assert found == {"new/a.png": "dark", "new/deep/b.png": "light"}


def test_features_without_labels_are_predicted(tmp_path: Path) -> None:
    import numpy

    labels = numpy.arange(200) % 2
    features = numpy.random.default_rng(0).normal(size=(200, 3)) + 6 * labels[:, None]
    numpy.savez(tmp_path / "f.npz", features=features, labels=numpy.where(labels, "yes", "no"))
    numpy.savez(tmp_path / "new.npz", features=[[0.0, 0, 0], [6, 6, 6]])
    out = str(tmp_path / "out")
    assert main(["train", "--data", f"npz:{tmp_path / 'f.npz'}", "--learning-rate", "0.05", "--output", out]) == 0
    assert main(["predict", "--data", f"npz:{tmp_path / 'new.npz'}", "--output", out]) == 0
    assert [row["predicted"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == ["no", "yes"]


def test_the_newest_run_predicts_unless_another_is_named(tmp_path: Path) -> None:
    for hour, name in ((2, "b"), (1, "a")):
        (tmp_path / "digits" / name).mkdir(parents=True)
        (tmp_path / "digits" / name / "checkpoint.pt").write_bytes(b"")
        os.utime(tmp_path / "digits" / name / "checkpoint.pt", (3600 * hour, 3600 * hour))
    assert find_checkpoint(tmp_path).parent.name == "b"
    (tmp_path / "digits" / "b" / "best.pt").write_bytes(b"")
    assert find_checkpoint(tmp_path).name == "best.pt"


def test_an_inspection_predicts_only_where_there_is_no_other_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, "train --val-fraction 0.2")
    inspection = trained(tmp_path, "inspect")
    capsys.readouterr()
    assert main(["predict", "--output", str(tmp_path)]) == 0
    assert f"by {run / 'best.pt'} (epoch" in capsys.readouterr().out
    shutil.rmtree(run)
    assert main(["predict", "--output", str(tmp_path)]) == 0
    assert f"by {inspection / 'checkpoint.pt'} (epoch" in capsys.readouterr().out


def trained(out: Path, command: str) -> Path:
    """The folder of a run that was not there before."""
    before = {*out.glob("digits/*")}
    assert main([*command.split(), "--epochs", "2", "--output", str(out)]) == 0
    (run,) = {*out.glob("digits/*")} - before
    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "predict needs a checkpoint: none was given, and there is no run below"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt cannot be used"),
        (["--checkpoint", __file__], "cannot be used"),
        (["--data", "tar:x"], "data must be one of"),
    ],
)
def test_predict_says_what_is_missing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_samples_of_another_shape_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy

    assert main(["train", "--epochs", "1", "--output", str(tmp_path)]) == 0
    numpy.savez(tmp_path / "new.npz", features=[[0.0, 0, 0]])
    assert main(["predict", "--data", f"npz:{tmp_path / 'new.npz'}", "--output", str(tmp_path)]) == 2
    assert re.search(r"takes samples of shape \(8, 8\), got \(3,\)", capsys.readouterr().err)
