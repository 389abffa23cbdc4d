"""Faults of the trainer that were found by using it, so that they stay away."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from dal_kernels.noise import asymmetric_noise, instance_noise, symmetric_noise
from dal_kernels.training import main, progress
from dal_kernels.training.contact_sheet import save_contact_sheet
from dal_kernels.training.data import load_data
from dal_kernels.training.data.base import NOTHING, DataSet, FileImages, TensorImages
from dal_kernels.training.data.transforms import ImageTransform
from dal_kernels.training.inspection import inspect
from dal_kernels.training.parallel import World
from dal_kernels.training.recipes import recipe_for
from dal_kernels.training.train import Trainer
from support.trainings import needs_training, rows_of

needs_training()

numpy: Any = pytest.importorskip("numpy")


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


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_grey_of_16_bits_is_not_all_white(tmp_path: Path, dtype: str) -> None:
    image = pytest.importorskip("PIL.Image")
    levels = numpy.array([[0, 257 * 10], [257 * 100, 65535]], dtype=dtype)
    name = "a.png" if dtype == "uint16" else "a.tif"
    image.fromarray(levels).save(tmp_path / name)
    images = FileImages(tmp_path, [name], ImageTransform((0.0,), (1.0,)))
    assert numpy.asarray(images.open(0))[..., 1].tolist() == [[0, 10], [100, 255]]


@pytest.mark.parametrize("bad", ["missing", "broken"])
def test_a_bad_file_is_skipped_wherever_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str) -> None:
    image = pytest.importorskip("PIL.Image")
    for i in range(12):
        image.new("RGB", (8, 8), (20 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "0.png").unlink()
    if bad == "broken":
        (tmp_path / "0.png").write_bytes(b"no image")
    rows = [f"{i}.png,{i % 2}" for i in range(12)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    command = ["train", "--data", f"csv:{tmp_path / 'list.csv'}", "--epochs", "1", "--batch-size", "4"]
    out = ["--output", str(tmp_path / "out")]
    said = "1 images could not be read"
    if bad == "missing":
        said = f"1 of 12 files are missing (the first is {tmp_path / '0.png'})"
    assert main([*command, "--noise", "instance:0.3", "--val-fraction", "0.25", *out]) == 0
    (table,) = tmp_path.glob("out/*/*/skipped.csv")
    assert f"  {said} and were left out, see {table}\n" in capsys.readouterr().out
    (skipped,) = rows_of(table)
    assert skipped["path"] == "0.png"
    assert main(["predict", *command[1:3], *out]) == 0
    assert f"; {said}\n" in capsys.readouterr().out
    assert main([*command, "--bad-images", "error", *out]) == 2


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


def test_losses_without_a_test_are_compared_by_the_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--noise", "0.2", "--losses", "dal", "gce", "--seeds", "0", "1", "--epochs", "2"]
    assert main([*command, "--data", features(tmp_path / "f.npz"), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed
    assert "n/a" not in printed
    assert "validation accuracy, best epoch, %" in printed
    assert "There is no test" in printed
    assert "how many were wrong before is unknown" in (tmp_path / "npz-f.md").read_text(encoding="utf-8")


# --- settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --val-fraction 0.9999", "val_fraction must hold out one sample at least and leave one to train on"),
        ("train --val-fraction 0.0001", "val_fraction must hold out one sample at least"),
        ("inspect --val-fraction 0.2", "inspect trains on all labels to the last epoch: val_fraction must be 0"),
        ("inspect --patience 3", "inspect trains on all labels to the last epoch: patience must be 0"),
    ],
)
def test_settings_that_do_not_suit_are_named(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments.split(), "--epochs", "1", "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [8, 9, 10, 13])
def test_no_part_of_a_batch_is_one_sample(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    digits, recipe = load_data("digits"), recipe_for("digits", batch_size=batch_size, accumulate=4)
    trainer = Trainer(recipe, digits, digits.train_labels, "gce", 0, 0, World(0, 1, torch.device("cpu")))
    sizes = []
    forward = trainer._forward
    monkeypatch.setattr(trainer, "_forward", lambda inputs: sizes.append(len(inputs)) or forward(inputs))
    for samples in range(2, batch_size + 2):
        trainer._train_step(torch.rand(samples, 8, 8), torch.arange(samples))
    assert min(sizes) == 2
    assert max(sizes) <= -(-batch_size // 4) + 1


def test_time_left_is_of_what_is_trained_now(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    told = progress.Progress(100, lines.append, lambda batches: None)
    told.skip(80)
    for _ in range(10):
        told.tick()
    now[0] += 30
    epoch = Mock(epoch=9, train_loss=1.0, test_accuracy=0.5, validation_accuracy=math.nan)
    told.tell(Mock(history=[epoch], loss_name="dal"))
    assert lines[0].endswith("all done in 0:00:30")


def test_an_output_that_cannot_be_written_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--epochs", "1", "--output", str(tmp_path)]) == 0
    (checkpoint,) = tmp_path.glob("digits/*/checkpoint.pt")
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert main(["predict", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "file" / "below")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dal-train: ")
    assert error.count("\n") == 1


def test_inspect_misses_a_package_before_the_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    assert main(["inspect"]) == 2
    printed, error = capsys.readouterr()
    assert "scikit-learn is missing" in error
    assert printed == ""


def test_a_package_of_no_extra_is_named_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main(["train", "--data", f"csv:{tmp_path / 'a.parquet'}"]) == 2
    assert capsys.readouterr().err.endswith(": pip install pyarrow\n")


MAKERS = {
    "symmetric": lambda labels: symmetric_noise(labels, 0.5, 4, torch.Generator()),
    "asymmetric": lambda labels: asymmetric_noise(labels, 0.5, torch.tensor([1, 2, 3, 0]), torch.Generator()),
    "instance": lambda labels: instance_noise(
        labels, 0.5, 4, torch.Generator(), torch.linspace(-1, 1, 120).view(40, 3)
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_noise_takes_integers_of_any_width_and_checks_them(kind: str) -> None:
    labels = torch.arange(40) % 4
    made = MAKERS[kind](labels)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(MAKERS[kind](labels.to(dtype)), made)
    for bad, message in (
        (labels.float(), r"labels must be integers \(N,\), got torch.float32 \(40,\)"),
        (labels[:, None], r"labels must be integers \(N,\), got torch.int64 \(40, 1\)"),
        (labels - 1, "labels must be from 0 to 3, got -1 at 0"),
        (labels + 1, "labels must be from 0 to 3, got 4 at 3"),
    ):
        with pytest.raises(ValueError, match=message):
            MAKERS[kind](bad)
