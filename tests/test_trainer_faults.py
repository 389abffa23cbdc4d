"""Faults of the trainer that were found by using it, so that they stay away."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from dal_kernels.training import main
from dal_kernels.training.contact_sheet import save_contact_sheet
from dal_kernels.training.data.base import NOTHING, DataSet, TensorImages
from dal_kernels.training.inspection import inspect

for module in ("matplotlib", "numpy", "sklearn", "tabulate", "tqdm"):
    pytest.importorskip(module)

numpy: Any = pytest.importorskip("numpy")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def features(path: Path, rows: int = 200, **arrays: Any) -> str:
    """Two classes that a line tells apart, as ``--data`` takes them."""
    labels = numpy.arange(rows) % 2
    values = numpy.random.default_rng(0).normal(size=(rows, 3)) + 6 * labels[:, None]
    numpy.savez(path, **{"features": values, "labels": labels, **arrays})
    return f"npz:{path}"


# --- inspect


def test_a_network_that_has_not_learnt_replaces_no_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--epochs", "2", "--output", str(tmp_path)]) == 0
    assert all(row["given"] == row["suggested"] for row in rows_of(tmp_path / "suggested.csv"))
    text = (tmp_path / "inspect.md").read_text(encoding="utf-8")
    assert "has not learnt enough to judge labels" in text
    assert "The truth is known here: 0.0% of the labels are wrong. Of the right labels 0 are replaced." in text
    assert "nan" not in text
    assert text in capsys.readouterr().out
    assert not (tmp_path / "worst.png").exists()


def test_labels_that_nobody_verified_are_called_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = features(tmp_path / "f.npz")
    command = ["--data", data, "--noise", "0.2", "--learning-rate", "0.05", "--output", str(tmp_path)]
    assert main(["inspect", *command]) == 0
    text = (tmp_path / "inspect.md").read_text(encoding="utf-8")
    assert "20.0% of the labels were changed on purpose; how many were wrong before is unknown" in text
    assert "The truth is known" not in text
    capsys.readouterr()
    assert main(["train", *command, "--epochs", "2", "--labels", str(tmp_path / "suggested.csv")]) == 0
    said = capsys.readouterr().out
    assert "replaces" in said
    assert "are wrong" not in said
    assert "memorised" not in said
    capsys.readouterr()
    assert main(["train", "--data", data, "--epochs", "1", "--output", str(tmp_path)]) == 0
    assert "nan" not in capsys.readouterr().out


def test_names_of_classes_are_no_formulas(tmp_path: Path) -> None:
    labels, margin = torch.zeros(20, dtype=torch.long), torch.full((20,), 0.9)
    margin[0] = -0.9
    found = inspect(labels, labels + 1, margin, margin, margin.clamp(min=0), labels + 1)
    images = TensorImages(torch.rand(20, 8, 8))
    data = DataSet("a $b_$", 2, images, labels, labels, NOTHING, labels[:0], class_names=["$5_$", "$x^$"])
    assert save_contact_sheet(tmp_path / "worst.png", data, found) is not None


# --- what is in the output already


def test_no_network_is_lost_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--epochs", "2", "--output", str(tmp_path)]
    assert main(["train", *command]) == 0
    (checkpoint,) = tmp_path.glob("digits/*/checkpoint.pt")
    content = checkpoint.read_bytes()
    assert main(["inspect", *command]) == 0
    assert checkpoint.read_bytes() == content
    assert main(["train", *command, "--epochs", "3"]) == 2
    error = capsys.readouterr().err
    assert f"there is another run in {checkpoint.parent}, with another epochs: give another --output" in error
    assert checkpoint.read_bytes() == content
    assert main(["train", *command]) == 0, "the same again"
    assert main(["train", *command, "--epochs", "3", "--overwrite"]) == 0


def test_data_from_another_place_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        data = features(tmp_path / name / "f.npz")
        status = main(["train", "--data", data, "--epochs", "1", "--output", str(tmp_path / "out")])
    assert status == 2
    assert "with another data path" in capsys.readouterr().err


# --- predict, and what is in the data


def test_labels_that_are_no_classes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = features(tmp_path / "f.npz", labels=numpy.array(["no", "yes"] * 100))
    predict = ["predict", "--output", str(tmp_path), "--data"]
    assert main(["train", "--data", data, "--epochs", "2", "--output", str(tmp_path)]) == 0
    assert main([*predict, data]) == 0
    capsys.readouterr()
    assert main([*predict, features(tmp_path / "g.npz", labels=numpy.array(["no", "maybe"] * 100))]) == 0
    said = capsys.readouterr().out
    assert "of the 100 that have a label of the network's classes as their labels say" in said
    assert "the labels of 100 samples (maybe) are no classes of the network, which knows no, yes" in said
    assert main([*predict, features(tmp_path / "g.npz", labels=numpy.array(["a", "b"] * 100))]) == 0
    said = capsys.readouterr().out
    assert "200 samples (a, b) are no classes" in said
    assert "as their labels say" not in said
    assert not (tmp_path / "predicted-classes.csv").exists(), "of the prediction before"


@pytest.mark.parametrize("command", ["train", "predict"])
def test_features_of_the_test_are_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    good = features(tmp_path / "f.npz")
    assert main(["train", "--data", good, "--epochs", "1", "--output", str(tmp_path)]) == 0
    values = numpy.ones((200, 3))
    values[150, 1] = numpy.nan
    bad = features(tmp_path / "g.npz", features=values, split=numpy.array(["train"] * 100 + ["test"] * 100))
    assert main([command, "--data", bad, "--output", str(tmp_path)]) == 2
    assert "features must be finite, got other values in row 150" in capsys.readouterr().err


# --- compare


def test_runs_of_different_length_are_drawn_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--noise", "0.4", "--losses", "cross-entropy", "gce", "--seeds", "0", "1", "--epochs", "30"]
    assert main([*command, "--val-fraction", "0.2", "--patience", "2", "--output", str(tmp_path)]) == 0
    lengths = [len(rows_of(path)) for path in tmp_path.glob("digits/*/metrics.csv")]
    assert len(set(lengths)) > 1
    assert f", {min(lengths)} to {max(lengths)} epochs a run;" in capsys.readouterr().out
    assert (tmp_path / "digits.png").is_file()
    for loss in ("cross-entropy", "gce"):
        chosen = []
        for path in tmp_path.glob(f"digits/*{loss}*/metrics.csv"):
            epochs = rows_of(path)
            chosen.append(float(max(epochs, key=lambda row: float(row["validation_accuracy"]))["test_accuracy"]))
        text = (tmp_path / "digits.md").read_text(encoding="utf-8")
        assert f"{100 * numpy.mean(chosen):.1f} ± {100 * numpy.std(chosen, ddof=1):.1f} |" in text
    assert "chosen by validation is highest at" in text
    assert "would be ahead" not in text
