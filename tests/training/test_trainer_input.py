"""What is given to the trainer, on wrong and on unusual files: each was once lost, mistaken or a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dal_kernels.training import UsageError, cli, evaluate, main
from dal_kernels.training.config_file import _yaml
from dal_kernels.training.corrections import read_corrections
from dal_kernels.training.data import load_data
from dal_kernels.training.data.base import NOTHING
from dal_kernels.training.data.table import split_parts
from dal_kernels.training.data.unlabelled import samples_of
from dal_kernels.training.metrics import EpochMetrics
from dal_kernels.training.predict import PredictConfig
from dal_kernels.training.records import Run, write_metrics
from support.trainings import needs_training, rows_of

numpy: Any = pytest.importorskip("numpy")
library = pytest.importorskip("PIL.Image")
needs_training()


def written(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight images of each of two classes, nothing to test on."""
    for shade, name in ((40, "dark"), (200, "light")):
        for i in range(8):
            path = tmp_path / "pictures" / "train" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            library.new("RGB", (8, 8), (shade + i,) * 3).save(path)
    return tmp_path / "pictures"


# --- features


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"paths": ["a"]}, r"paths must be \(2,\), got \(1,\)"),
        ({"labels": [0]}, r"must hold numbers .* and labels int64 \(1,\)"),
        ({"split": ["train", "test", "test"]}, r"split must be \(2,\), got \(3,\)"),
        ({"features": [["a"], ["b"]]}, r"must hold numbers .* got features <U1"),
        ({"labels": [[0, 1], [1, 0]]}, r"must hold numbers .* and labels int64 \(2, 2\)"),
        ({"labels": [0.0, 1.0]}, "labels must be integers or words, got float64"),
        ({"class_names": [["a", "b"]]}, r"class_names must be \(C,\), got \(1, 2\)"),
        ({"features": numpy.zeros((0, 1)), "labels": numpy.zeros(0, int)}, r"has no rows, got features \(0, 1\)"),
    ],
)
def test_wrong_features_are_refused_by_all(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "f.npz"
    numpy.savez(path, **{"features": [[1.0], [2.0]], "labels": [0, 1], "class_names": ["a", "b"], **arrays})
    with pytest.raises(UsageError, match=message):
        load_data(f"npz:{path}")
    with pytest.raises(UsageError, match=message):
        samples_of(f"npz:{path}", None, (1,), "skip")


def test_a_side_of_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="image_size is for images of KIND:PATH, got 32 for npz:"):
        load_data(f"npz:{tmp_path}", image_size=32)


@pytest.mark.parametrize(("setting", "value", "least"), [("threads", 0, 1), ("workers", -1, 0)])
def test_predicting_has_the_limits_of_training(setting: str, value: int, least: int) -> None:
    with pytest.raises(UsageError, match=f"{setting} must be >= {least}, got {value}"):
        PredictConfig("digits", Path(), **{setting: value})  # type: ignore[arg-type]


# --- names


def test_a_dot_in_a_name_is_kept(tmp_path: Path) -> None:
    epoch = EpochMetrics(**dict.fromkeys(EpochMetrics.__dataclass_fields__, 0))
    run = Run("set.v1", SimpleNamespace(), 0.0, "dal", 0, [epoch])  # type: ignore[arg-type]
    assert [path.name for path in write_metrics(tmp_path / "set.v1", [run])] == ["set.v1.csv", "set.v1.jsonl"]
    (tmp_path / "set.v1").mkdir()
    numpy.save(tmp_path / "set.v1" / "features.npy", [[1.0], [2.0]])
    numpy.save(tmp_path / "set.v1" / "labels.npy", [0, 1])
    data = f"npz:{tmp_path / 'set.v1'}"
    assert load_data(data).name == "npz-set.v1"
    command = ["compare", "--data", data, "--noise", "none", "--losses", "dal", "--seeds", "0", "--epochs", "1"]
    assert main([*command, "--val-fraction", "0.5", "--output", str(tmp_path / "out")]) == 0
    found = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert found == {f"npz-set.v1.{kind}" for kind in ("md", "csv", "jsonl", "png", "svg")}


@pytest.mark.parametrize("name", ["\U0001f994", "a\x7fb", "a\x85b", "a \u2028 b", "a\udc80b"])
def test_any_name_is_the_same_from_a_file_of_settings(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    text = f"data: {_yaml(name)}\n".encode()  # as it is written
    assert yaml.safe_load(text.decode()) == {"data": name}


# --- tables


def test_rows_without_a_label_are_left_out_of_the_tests_only(tmp_path: Path) -> None:
    labels, split = ["x", "y", "", "x", " "], ["train", "train", "val", "val", "test"]
    parts = split_parts(tmp_path, labels, split)
    assert [rows.tolist() for rows in parts.rows] == [[0, 1], [], [3]], "no row of the test has a label"
    made = parts.data_set("d", lambda rows: NOTHING, ["a"] * 5)
    assert made.note == "2 rows of validation and test are not used, as they have no label"
    assert split_parts(tmp_path, ["x", "y"], None).note == ""
    with pytest.raises(UsageError, match="row 3: the label is empty"):
        split_parts(tmp_path, labels, ["train", "train", "train", "val", "test"])


def test_a_row_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="row 3: the label is empty"):
        load_data(f"csv:{written(tmp_path / 'a.csv', 'path,label', 'a.png,x', '', 'b.png,')}")
    with pytest.raises(UsageError, match="row 3: must have 2 values, got 1"):
        load_data(f"csv:{written(tmp_path / 'a.csv', 'path,label', 'a.png,x', '', 'b.png')}")
    with pytest.raises(UsageError, match="row 3: no row to train on has the label 'z'"):
        split_parts(tmp_path, ["x", "y", "z"], ["train", "train", "val"])
    with pytest.raises(UsageError, match="row 3: digits has no class 'ten'"):
        read_corrections(written(tmp_path / "a.csv", "path,label", "1,2", "", "2,ten"), load_data("digits"))


def test_spaces_around_a_label_do_not_count(pictures: Path) -> None:
    lines = [f"train/{name}/{i}.png,{' ' * (i % 2)}{name}" for name in ("dark", "light") for i in range(8)]
    data = load_data(f"csv:{written(pictures / 'a.csv', 'path,label', *lines)}")
    assert data.names == ["dark", "light"]
    corrections = read_corrections(written(pictures / "b.csv", "path,label", "train/dark/0.png, light "), data)
    assert corrections.labels.tolist() == [1]


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "path,label,label,other,other", "a.png,x,y,1,2")
    with pytest.raises(UsageError, match="must have one column label, got 2"):
        load_data(f"csv:{path}")


def test_a_sample_has_one_correction(pictures: Path) -> None:
    def corrected(data: str, *paths: str) -> None:
        read_corrections(
            written(pictures / "c.csv", "path,label", *(f"{path},light" for path in paths)), load_data(data)
        )

    one, other = "train/dark/0.png", "train/light/0.png"
    once = f"csv:{written(pictures / 'a.csv', 'path,label', f'{one},dark', f'{other},light')}"
    corrected(once, one, other)
    with pytest.raises(UsageError, match=r"row 3: the sample 'train/dark/0.png' is in row 1 already"):
        corrected(once, one, other, one)
    twice = written(pictures / "b.csv", "path,label", f"{one},dark", f"{other},light", f"{one},light")
    corrected(f"csv:{twice}", other)
    with pytest.raises(UsageError, match=r"row 2: .* has 2 training samples 'train/dark/0.png', must have one"):
        corrected(f"csv:{twice}", other, one)


# --- folders


def test_labels_are_inspected_without_a_test(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", f"folder:{pictures}", "--epochs", "1", "--output", str(tmp_path / "out")]
    assert main(["inspect", *command]) == 0
    assert len(rows_of(tmp_path / "out" / "suggested.csv")) == 16
    capsys.readouterr()
    assert main(["train", *command]) == 2
    assert "pictures has no val/CLASS/ or test/CLASS/ to test on; place" in capsys.readouterr().err
    (pictures / "train").rename(pictures / "training")
    assert main(["train", *command]) == 2
    assert "pictures has no train/ and no val/CLASS/ or test/CLASS/ to test on; place" in capsys.readouterr().err


def test_a_test_without_classes_is_none(pictures: Path, tmp_path: Path) -> None:
    library.new("RGB", (8, 8)).save(written(pictures / "val" / "a.png"))
    data = load_data(f"folder:{pictures}", tested=False)
    assert data.test is NOTHING
    assert data.note == f"{pictures / 'val'} is not used, as it has no folders of classes"


# --- packages and errors


def test_evaluate_misses_a_package_before_it_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="matplotlib is missing"):
        evaluate.evaluate(PredictConfig("digits", tmp_path))


def test_an_error_without_words_is_called_by_its_name() -> None:
    assert cli.sentence(OSError()) == "OSError"
    assert cli.sentence(OSError("a\nb")) == "b"


def test_labels_go_to_classes_with_spaces_as_they_are_called() -> None:
    from dal_kernels.training.data.files import class_labels

    assert torch.equal(class_labels([" x", "x", "x ", "y"], ["x", " x"]), torch.tensor([1, 0, 0, -1]))
