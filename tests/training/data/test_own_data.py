"""Data of the user's own: folders of images, tables of paths and labels, features; and files that cannot be read."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dal_kernels.training import TrainingConfig, UsageError, main, run_training
from dal_kernels.training.data import load_data
from dal_kernels.training.data.base import NOTHING, DataSet
from dal_kernels.training.models import build_model
from dal_kernels.training.recipes import recipe_for
from support.pictures import SIDE, trained
from support.trainings import needs_training, rows_of

numpy = pytest.importorskip("numpy")
library = pytest.importorskip("PIL.Image")
needs_training()


def write_table(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


# --- what is read


def test_a_folder_and_what_maps_its_outputs_back(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(f"folder:{pictures}", tmp_path / "out")
    said = capsys.readouterr().out
    assert "how many of the training labels are wrong is unknown" in said
    assert "0.0%" not in said.splitlines()[0]
    assert run["class_names"] == ["dark", "light"]
    assert run["data path"] == str(pictures)
    assert run["input shape"] == [3, SIDE, SIDE], "the images' own side"
    (labels,) = tmp_path.glob("out/*/*/labels.npz")
    with numpy.load(labels) as saved:
        assert saved["class_names"].tolist() == ["dark", "light"]
        assert len(saved["paths"]) == len(saved["labels"]) == 24
        for path, label in zip(saved["paths"].tolist(), saved["labels"].tolist(), strict=True):
            assert Path(path).is_file()
            assert Path(path).parent.name == run["class_names"][label]
    (checkpoint,) = tmp_path.glob("out/*/*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["settings"]["class_names"] == ["dark", "light"]


def test_paths_are_found_from_another_working_folder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--data", "folder:pictures", "--epochs", "1", "--output", "out"]) == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    trained("folder:../pictures", tmp_path / "corrected", "--labels", "../out/suggested.csv")
    assert all(Path(row["path"]).is_file() for row in rows_of(tmp_path / "out" / "suggested.csv"))


def test_noise_made_from_labels_that_nobody_verified_is_called_changed(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(f"folder:{pictures}", tmp_path / "out", "--noise", "0.25")
    assert "25.0% of the training labels were changed; how many were wrong before is unknown" in capsys.readouterr().out


def test_a_table_reads_as_the_folder_that_it_lists(pictures: Path) -> None:
    rows = [(str(path.relative_to(pictures)), path.parent.name, path.parts[-3]) for path in pictures.rglob("*.png")]
    table = write_table(pictures / "list.csv", [("path", "label", "split"), *rows])
    listed, folder = load_data(f"csv:{table}"), load_data(f"folder:{pictures}")
    assert listed.names == folder.names
    assert not listed.verified
    for train in (True, False):
        labels = {path: listed.names[label] for path, label in pairs(listed, train)}
        expected = {str(Path(path).relative_to(pictures)): folder.names[label] for path, label in pairs(folder, train)}
        assert labels == expected
    image = listed.train.batch([0], train=False)
    place = folder.paths("train").index(str(pictures / listed.paths("train")[0]))
    torch.testing.assert_close(image, folder.train.batch([place], train=False))


def pairs(data: DataSet, train: bool) -> list[tuple[str, int]]:
    labels = data.train_labels if train else data.test_labels
    return list(zip(data.paths("train" if train else "test"), labels.tolist(), strict=True))


def test_a_parquet_table(pictures: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    paths = sorted(pictures.rglob("train/*/*.png"))
    table = arrow.table({"path": [str(path) for path in paths], "label": [int("light" in str(path)) for path in paths]})
    parquet.write_table(table, pictures / "list.parquet")
    data = load_data(f"csv:{pictures / 'list.parquet'}")
    assert data.names == ["0", "1"]
    assert data.train_labels.tolist() == [int("light" in path) for path in data.paths("train")]


def test_a_table_without_a_split_holds_out_a_tenth(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(str(path), path.parent.name) for path in pictures.rglob("*.png")]
    table = write_table(tmp_path / "list.csv", [("path", "label"), *rows])
    assert load_data(f"csv:{table}").test is NOTHING
    run = trained(f"csv:{table}", tmp_path / "out")
    assert run["val_fraction"] == 0.1
    said = capsys.readouterr().out
    assert "validation" in said
    assert "test accuracy" not in said
    assert list(tmp_path.glob("out/*/*/best.pt"))


@pytest.mark.parametrize("folder", [True, False])
def test_features_are_standardised_by_the_network(tmp_path: Path, folder: bool) -> None:
    generator = numpy.random.default_rng(0)
    labels = numpy.arange(300) % 3
    features = (generator.normal(size=(300, 5)) + 3 * labels[:, None]) * [1, 10, 100, 1000, 0] + 7
    arrays = {
        "features": features.astype("float32"),
        "labels": labels,
        "split": numpy.where(numpy.arange(300) < 240, "train", "val"),
        "class_names": numpy.array(["a", "b", "c"]),
    }
    path = tmp_path / ("f" if folder else "f.npz")
    if folder:
        path.mkdir()
        for name, array in arrays.items():
            numpy.save(path / f"{name}.npy", array)
    else:
        numpy.savez(path, **arrays)
    data = load_data(f"npz:{path}")
    assert data.names == ["a", "b", "c"]
    assert (len(data.train), len(data.test)) == (240, 60)
    recipe = recipe_for(f"npz:{path}")
    assert recipe.widths == (), "a linear probe"
    network = build_model(recipe, (5,), 3, 0, data.moments)
    standard = network[0](data.train.batch(range(240), train=True))
    torch.testing.assert_close(standard.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(0), torch.tensor([1.0, 1, 1, 1, 0]), atol=0.01, rtol=0)
    config = TrainingConfig(
        f"npz:{path}", noise=("0.2",), losses=("dal",), seeds=(0,), changes={"learning_rate": 0.05}, verbose=False
    )
    assert run_training(config, data).runs[0].history[-1].test_accuracy > 0.9


@pytest.mark.parametrize(("side", "model"), [(16, "cnn"), (80, "resnet18-224")])
def test_the_network_follows_the_size_of_the_images(side: int, model: str) -> None:
    auto, named = (build_model(recipe_for("folder:x", model=name), (3, side, side), 4, 0) for name in ("auto", model))
    assert list(auto.state_dict()) == list(named.state_dict())
    assert auto.eval()(torch.zeros(1, 3, side, side)).shape == (1, 4)


# --- what is refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "must have the columns path, label, got none"),
        ([("path", "class")], "must have the columns path, label, got path, class"),
        ([("path", "label")], "has no rows"),
        ([("path", "label"), ("a.png", "")], "row 1: the label is empty"),
        ([("path", "label"), ("a.png", "x"), ("b.png",)], "row 2: must have 2 values, got 1"),
        ([("path", "label"), ("a.png", "x")], "must be of at least 2 classes, got 1"),
        ([("path", "label", "split"), ("a.png", "x", "dev")], "row 1: split must be one of train, val, .*got 'dev'"),
        (
            [("path", "label", "split"), ("a", "x", "train"), ("b", "y", "train"), ("c", "z", "val")],
            "row 3: no row to train on has the label 'z'",
        ),
        ([("path", "label"), ("a.png", "x"), ("b.png", "y")], r"the image .*a\.png is missing"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, rows: list[tuple[str, ...]], message: str) -> None:
    table = write_table(tmp_path / "list.csv", rows)
    with pytest.raises(UsageError, match=message) as caught:
        load_data(f"csv:{table}")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": [0, 1]}, "must hold features .* got labels"),
        ({"features": [1.0, 2.0], "labels": [0, 1]}, r"must hold numbers .* got features float64 \(2,\)"),
        ({"features": [[1.0], [2.0]], "labels": [0]}, r"labels int64 \(1,\)"),
        ({"features": [[1.0], [2.0]], "labels": [0.0, 1.0]}, "labels must be integers or words, got float64"),
        ({"features": [[1.0], [float("nan")]], "labels": [0, 1]}, "features must be finite, got other values in row 1"),
        ({"features": [[1.0], [2.0]], "labels": [0, 1], "class_names": ["a"]}, "labels must be from 0 to 0"),
        ({"features": [[1.0], [2.0]], "labels": [0, 1], "split": ["train"]}, r"split must be \(2,\), got \(1,\)"),
    ],
)
def test_wrong_features_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    numpy.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        load_data(f"npz:{tmp_path / 'f.npz'}")


def test_of_a_folder_of_arrays_the_one_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "features.npy").mkdir()
    with pytest.raises(UsageError, match=r"cannot be read: .*features\.npy; it must hold"):
        load_data(f"npz:{tmp_path}")


def test_a_single_array_is_no_features_with_labels(tmp_path: Path) -> None:
    numpy.save(tmp_path / "f.npy", numpy.zeros((4, 2)))
    with pytest.raises(UsageError, match=r"f\.npy is a single array; save it with its labels by numpy\.savez: feat"):
        load_data(f"npz:{tmp_path / 'f.npy'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "folder:"], "folder:PATH"),
        (["--data", "tar:x"], "data must be one of digits, .*, folder:PATH, csv:PATH, .*, npz:PATH, got 'tar:x'"),
        (["--data", "folder:nowhere"], "the data folder nowhere does not exist"),
        (["--data", "csv:nowhere.csv"], "^dal-train: nowhere.csv cannot be read: No such file or directory$"),
        (["--data", "npz:nowhere.npz"], "^dal-train: nowhere.npz cannot be read: No such file or directory; it must"),
        (["--config", "nowhere.json"], "^dal-train: nowhere.json cannot be read: No such file or directory$"),
        (["--data", "folder:x", "--data-dir", "y"], "data_dir is for data sets with a name"),
        (["--image-size", "32"], "image_size is for images of KIND:PATH"),
        (["--image-size", "3"], "image_size must be 0 or from 8 to 4096, got 3"),
        (["--patience", "2"], "patience needs a val_fraction above 0"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
