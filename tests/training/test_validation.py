"""What a run is validated on: the part that the data has for it, or training samples held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dal_kernels.training import UsageError, main
from dal_kernels.training.data import DataSet, load_data
from dal_kernels.training.data.base import FileImages, TensorImages
from dal_kernels.training.loader import evaluation_loader, held_out
from dal_kernels.training.metrics import count_hits
from dal_kernels.training.predict import load_trained
from dal_kernels.training.recipes import recipe_for
from dal_kernels.training.train import Trainer
from support.trainings import ALONE, needs_training, rows_of, trainer_on

numpy = pytest.importorskip("numpy")
image = pytest.importorskip("PIL.Image")
needs_training()


def features(path: Path, split: list[str]) -> str:
    """Two classes; the labels of the validation are all the other class."""
    labels = numpy.arange(len(split)) % 2
    inputs = numpy.random.default_rng(0).normal(size=(len(split), 3)) + 6 * labels[:, None]
    swapped = numpy.where(numpy.array(split) == "val", 1 - labels, labels)
    numpy.savez(path, features=inputs, labels=swapped, split=numpy.array(split))
    return f"npz:{path}"


def pictures(folder: Path, *parts: str) -> str:
    """An image of each part/class, named by its part."""
    for part in parts:
        (folder / part).mkdir(parents=True)
        image.new("RGB", (8, 8)).save(folder / part / f"{part.partition('/')[0]}.png")
    return f"folder:{folder}"


def trainer_on_table(data: DataSet, **changes: Any) -> Trainer:
    recipe = recipe_for("npz", epochs=6, learning_rate=0.02, batch_size=8, **changes)
    return Trainer(recipe, data, data.train_labels, "gce", 0, 0, ALONE)


def test_the_validation_chooses_the_epoch_and_the_test_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = features(tmp_path / "f.npz", ["train"] * 100 + ["val"] * 60 + ["test"] * 40)
    data = load_data(table)
    assert (len(data.train), len(data.validation), len(data.test)) == (100, 60, 40)
    assert data.paths("validation") == [str(row) for row in range(100, 160)]
    command = ["train", "--data", table, "--epochs", "3", "--learning-rate", "0.02", "--batch-size", "8"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    assert "in the epoch validated best" in capsys.readouterr().out
    (run,) = tmp_path.glob("*/*/metrics.csv")
    rows = rows_of(run)
    # The labels of the validation are the other class, so that its best epoch is the one that has learnt least.
    assert (rows[-1]["validation_accuracy"], rows[-1]["test_accuracy"]) == ("0.0", "1.0")
    chosen = max(range(3), key=lambda i: float(rows[i]["validation_accuracy"]))
    assert torch.load(run.with_name("best.pt"), weights_only=True)["history"][-1]["epoch"] == chosen + 1
    assert main(["predict", "--data", table, "--output", str(tmp_path)]) == 0
    assert [row["path"] for row in rows_of(tmp_path / "predictions.csv")] == [str(row) for row in range(160, 200)]


def test_a_validation_alone_is_tested_on(tmp_path: Path) -> None:
    data = load_data(features(tmp_path / "f.npz", ["train"] * 60 + ["val"] * 40))
    assert (len(data.validation), len(data.test)) == (0, 40)
    assert trainer_on_table(data).held == 0


def test_a_fraction_that_is_asked_for_comes_before_the_part(tmp_path: Path) -> None:
    data = load_data(features(tmp_path / "f.npz", ["train"] * 100 + ["val"] * 60 + ["test"] * 40))
    assert trainer_on_table(data).held == 60
    trainer = trainer_on_table(data, val_fraction=0.2)
    assert trainer.held == 20
    while not trainer.done:
        trainer.run_epoch(lambda: None)
    assert trainer.history[-1].validation_accuracy == 1, "labels as given, not those of the part"


def test_patience_needs_something_to_stop_by(tmp_path: Path) -> None:
    data = load_data(features(tmp_path / "f.npz", ["train"] * 100 + ["val"] * 60 + ["test"] * 40))
    trainer = trainer_on_table(data, patience=1)
    while not trainer.done:
        trainer.run_epoch(lambda: None)
    assert len(trainer.history) < 6, "the labels of the validation are the other class"
    with pytest.raises(UsageError, match="patience needs a val_fraction above 0, or data with a validation"):
        trainer_on_table(load_data(features(tmp_path / "g.npz", ["train"] * 60 + ["val"] * 40)), patience=1)


def test_inspect_looks_at_the_last_epoch_whatever_the_validation(tmp_path: Path) -> None:
    table = features(tmp_path / "f.npz", ["train"] * 100 + ["val"] * 60 + ["test"] * 40)
    assert main(["inspect", "--data", table, "--epochs", "2", "--output", str(tmp_path)]) == 0
    (run,) = tmp_path.glob("*/*/metrics.csv")
    assert {row["validation_accuracy"] for row in rows_of(run)} == {"nan"}


@pytest.mark.parametrize(
    ("parts", "validation", "test", "note"),
    [
        (("val/a", "test/b"), [0], [1], ""),
        (("val/a",), [], [0], ""),
        (("test/b",), [], [1], ""),
        (("val/a", "test"), [], [0], "test is not used, as it has no folders of classes"),
        (("val", "test/b"), [], [1], "val is not used, as it has no folders of classes"),
    ],
)
def test_folders_with_classes_are_the_parts(
    tmp_path: Path, parts: tuple[str, ...], validation: list[int], test: list[int], note: str
) -> None:
    data = load_data(pictures(tmp_path, "train/a", "train/b", *parts))
    assert (data.validation_labels.tolist(), data.test_labels.tolist()) == (validation, test)
    assert data.note.removeprefix(f"{tmp_path}/") == note
    if validation:
        assert [Path(path).name for path in data.paths("validation")] == ["val.png"]
        assert data.validation.batch([0], train=False).shape == (1, 3, 8, 8)


def test_a_class_of_the_validation_must_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="val/c is no class of"):
        load_data(pictures(tmp_path, "train/a", "train/b", "val/c", "test/a"))


def test_a_table_has_the_same_parts(tmp_path: Path) -> None:
    parts = ("train/a", "train/b", "val/a", "test/b")
    pictures(tmp_path, *parts)
    rows = [f"{part}/{part.partition('/')[0]}.png,{part[-1]},{part.partition('/')[0]}" for part in parts]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]), encoding="utf-8")
    data = load_data(f"csv:{tmp_path / 'list.csv'}", bad_images="skip")
    assert data.paths("validation") == ["val/a/val.png"]
    assert (data.validation_labels.tolist(), data.test_labels.tolist()) == ([0], [1])
    assert all(isinstance(part, FileImages) and part.skip for part in (data.train, data.validation, data.test))


def test_a_broken_image_of_the_validation_is_listed_as_such(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", "train/a", "train/b", "val/a", "val/b", "test/b")
    (tmp_path / "data" / "val" / "b" / "val.png").write_bytes(b"")
    assert main(["train", "--data", data, "--epochs", "1", "--output", str(tmp_path / "out")]) == 0
    (skipped,) = tmp_path.glob("out/*/*/skipped.csv")
    (row,) = rows_of(skipped)
    assert row["part"] == "validation"
    assert row["path"].endswith(str(Path("val", "b", "val.png")))


def test_all_samples_of_the_part_are_measured() -> None:
    labels = torch.arange(10) % 2
    train = TensorImages(torch.randn(10, 3) + 4 * labels[:, None])
    data = DataSet("d", 2, train, labels, labels, train, labels, validation=train, validation_labels=labels)
    metrics = trainer_on_table(data).run_epoch(lambda: None)
    assert metrics.validation_accuracy == metrics.test_accuracy


def test_the_validation_is_held_out_and_by_the_labels_given(digits: DataSet) -> None:
    held, kept = held_out(1347, 0.2, seed=0)
    assert len(held) == round(0.2 * 1347)
    assert sorted([*held.tolist(), *kept.tolist()]) == list(range(1347))
    trainer = trainer_on(digits, "gce", val_fraction=0.2, epochs=2)
    trained = {i for _, indices in trainer.batches for i in indices.tolist()}
    assert trained == set(kept.tolist())
    metrics = trainer.run_epoch(lambda: None)
    loader = evaluation_loader(digits.train, held, 64, 0, ALONE)
    agreed, seen = count_hits(trainer.network, loader, digits.train_labels).tolist()
    assert metrics.validation_accuracy == agreed / seen
    assert trainer.best_epoch == 1


def test_training_stops_when_the_validation_becomes_no_better(digits: DataSet) -> None:
    trainer = trainer_on(digits, "gce", val_fraction=0.2, patience=3, epochs=60)
    while not trainer.done:
        trainer.run_epoch(lambda: None)
    accuracies = [epoch.validation_accuracy for epoch in trainer.history]
    assert len(accuracies) < 60
    assert accuracies.index(max(accuracies)) + 1 == trainer.best_epoch == len(accuracies) - 3


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    command = ["train", "--noise", "0.6", "--losses", "cross-entropy", "--epochs", "15", "--val-fraction", "0.2"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    (metrics,) = tmp_path.glob("digits/*/metrics.csv")
    accuracies = [float(row["validation_accuracy"]) for row in rows_of(metrics)]
    best = accuracies.index(max(accuracies)) + 1
    assert best < 15, "cross-entropy begins to memorise"
    assert load_trained(metrics.with_name("best.pt")).epoch == best
