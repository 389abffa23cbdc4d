"""dal-train evaluate: a checkpoint on a data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dal_kernels.training import main
from dal_kernels.training.confusion import save_confusion_figure
from dal_kernels.training.evaluate import class_accuracies
from support.trainings import needs_training, rows_of

numpy = pytest.importorskip("numpy")
needs_training()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert main(["train", "--epochs", "3", "--learning-rate", "0.5", "--output", str(out)]) == 0
    return out


def test_what_is_evaluated_is_what_the_training_measured(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--data", "digits", "--output", str(trained)]) == 0
    (run,) = trained.glob("digits/*")
    result = json.loads((trained / "evaluation.json").read_text(encoding="utf-8"))
    accuracy = float(rows_of(run / "metrics.csv")[-1]["test_accuracy"])
    assert result["accuracy"] == accuracy
    assert (result["samples"], result["epoch"], result["classes"]) == (450, 3, 10)
    classes, confusion = rows_of(trained / "evaluated-classes.csv"), rows_of(trained / "evaluated-confusion.csv")
    assert classes == rows_of(run / "classes.csv")
    assert confusion == rows_of(run / "confusion.csv")
    shares = [float(row["accuracy"]) for row in classes]
    assert result["mean class accuracy"] == pytest.approx(sum(shares) / 10)
    printed = capsys.readouterr().out
    worst = min(classes, key=lambda row: float(row["accuracy"]))
    assert f"accuracy {accuracy:.2%}" in printed
    assert f"told worst: {worst['class']} {float(worst['accuracy']):.1%}, " in printed
    taken = max((row for row in confusion if row["label"] != row["predicted"]), key=lambda row: int(row["samples"]))
    assert f"taken most: {taken['label']} for {taken['predicted']} ({taken['samples']})" in printed
    assert (trained / "evaluated-confusion.png").read_bytes().startswith(b"\x89PNG")
    assert "digits: " in (trained / "evaluated-confusion.svg").read_text(encoding="utf-8")


def test_labels_that_the_network_does_not_know_do_not_count(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = trained.glob("digits/*/checkpoint.pt")
    features = numpy.zeros((3, 8, 8), dtype="float32")
    numpy.savez(tmp_path / "f.npz", features=features, labels=numpy.array(["3", "x", "4"]))
    command = ["evaluate", "--data", f"npz:{tmp_path / 'f.npz'}", "--output", str(tmp_path)]
    assert main([*command, "--checkpoint", str(checkpoint)]) == 0
    assert "the labels of 1 samples (x) are no classes of the network" in capsys.readouterr().out
    result = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert (result["samples"], result["without a known label"], result["classes"]) == (2, 1, 2)
    numpy.savez(tmp_path / "f.npz", features=features)
    assert main([*command, "--checkpoint", str(checkpoint)]) == 2
    assert "evaluate needs labels, got no sample in npz:" in capsys.readouterr().err


def test_evaluate_names_itself_where_there_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--output", str(tmp_path)]) == 2
    assert "evaluate needs a checkpoint: none was given" in capsys.readouterr().err


def test_a_class_without_samples_has_no_accuracy(tmp_path: Path) -> None:
    labels, prediction = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1])
    assert str(class_accuracies(labels, prediction, 3).tolist()) == "[0.5, 1.0, nan]"
    names = ["$a$", "b" * 40, "c"]
    assert len(save_confusion_figure(tmp_path / "few", labels, prediction, names, "few")) == 2
    many = [str(i) for i in range(41)]
    assert save_confusion_figure(tmp_path / "many", labels, prediction, many, "many") == []
