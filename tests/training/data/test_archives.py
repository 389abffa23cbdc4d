"""Images in Hugging Face's datasets and in webdataset's tars."""

from __future__ import annotations

import importlib.util
import io
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dal_kernels.training import UsageError, main
from dal_kernels.training.data import load_data
from dal_kernels.training.data.archives import _content
from dal_kernels.training.data.base import UnreadableError
from support.trainings import needs_training, rows_of

library = pytest.importorskip("PIL.Image")
needs_training()

SIDE = 10


def encoded(shade: int) -> bytes:
    file = io.BytesIO()
    library.new("RGB", (SIDE, SIDE + 2), (shade,) * 3).save(file, "png")
    return file.getvalue()


# Image, label and part of each record, in order.
RECORDS = [
    (encoded(40 + 160 * (i % 2) + i), ("dark", "light")[i % 2], part)
    for part, count in (("train", 12), ("val", 4), ("test", 6))
    for i in range(count)
]


def write_hugging_face(folder: Path, records: list[tuple[bytes, str, str]], labelled: bool = True) -> str:
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
    if not labelled:
        del features["label"]
    parts: dict[str, Any] = {}
    for part in dict.fromkeys(part for *_, part in records):
        mine = [record for record in records if record[2] == part]
        columns: dict[str, Any] = {"image": [{"bytes": image, "path": None} for image, *_ in mine]}
        if labelled:
            columns["label"] = [label for _, label, _ in mine]
        name = {"val": "validation"}.get(part, part)
        parts[name] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return f"hf:{folder}"


def write_stream(folder: Path, records: list[tuple[bytes, str, str]], labelled: bool = True) -> str:
    return write_hugging_face(folder, records, labelled).replace("hf:", "hf-stream:", 1)


def write_parquet(folder: Path, records: list[tuple[bytes, str, str]], labelled: bool = True) -> str:
    """In the layout of the hub, whose names of files say the split."""
    datasets = pytest.importorskip("datasets")
    write_hugging_face(folder.parent / "saved" / folder.name, records, labelled)
    (folder / "data").mkdir(parents=True)
    for name, part in datasets.load_from_disk(str(folder.parent / "saved" / folder.name)).items():
        part.to_parquet(str(folder / "data" / f"{name}-00000-of-00001.parquet"))
    return f"hf:{folder}"


def write_parquet_stream(folder: Path, records: list[tuple[bytes, str, str]], labelled: bool = True) -> str:
    return write_parquet(folder, records, labelled).replace("hf:", "hf-stream:", 1)


def write_folders(folder: Path, records: list[tuple[bytes, str, str]], labelled: bool = True) -> str:
    """Images below split and class, as the library takes them too."""
    pytest.importorskip("datasets")
    for i, (image, label, part) in enumerate(records):
        path = folder / part / (label if labelled else "") / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return f"hf-stream:{folder}"


def write_tars(folder: Path, records: list[tuple[bytes, str, str]], labelled: bool = True) -> str:
    pytest.importorskip("webdataset")
    folder.mkdir()
    for part in dict.fromkeys(part for *_, part in records):
        with tarfile.open(folder / f"new-{part}-000.tar", "w") as tar:
            for i, (image, label, its) in enumerate(records):
                if its != part:
                    continue
                for suffix, content in (("png", image), *([("cls", label.encode())] if labelled else [])):
                    entry = tarfile.TarInfo(f"{i:04}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return f"wds:{folder}"


WRITE = {
    "hf": write_hugging_face,
    "hf, Parquet": write_parquet,
    "hf-stream": write_stream,
    "hf-stream, Parquet": write_parquet_stream,
    "hf-stream, folders": write_folders,
    "wds": write_tars,
}


@pytest.fixture(autouse=True)
def prepared_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where datasets keeps what it has prepared: not in the home of who runs the tests."""
    if importlib.util.find_spec("datasets") is not None:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.mark.parametrize("kind", WRITE)
def test_an_archive_is_what_was_written(tmp_path: Path, kind: str) -> None:
    data = load_data(WRITE[kind](tmp_path / "pictures", RECORDS))
    assert data.name == f"{kind.partition(',')[0]}-pictures"
    assert data.names == ["dark", "light"]
    assert not data.verified
    for part, labels, images in (
        ("train", data.train_labels, data.train),
        ("val", data.validation_labels, data.validation),
        ("test", data.test_labels, data.test),
    ):
        expected = [(label, image) for image, label, its in RECORDS if its == part]
        if kind == "hf-stream, folders":
            expected.sort(key=lambda record: record[0])  # a folder is read after the other
        assert [data.names[label] for label in labels.tolist()] == [label for label, _ in expected]
        for i, (_, image) in enumerate(expected):
            assert images.open(i).getpixel((0, 0)) == library.open(io.BytesIO(image)).getpixel((0, 0))
    assert len(set(data.paths("train"))) == 12
    assert data.train.batch([0], train=False).shape == (1, 3, SIDE, SIDE), "the images' own side"


def test_tars_of_one_name_in_two_folders_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("x", "y"):
        write_tars(tmp_path / folder, [record for record in RECORDS if record[2] == "train"])
    monkeypatch.chdir(tmp_path)
    paths = load_data("wds:{x,y}/new-train-000.tar").paths("train")
    assert len(set(paths)) == 24
    assert paths[0] == str(tmp_path / "x" / "new-train-000.tar" / "0000.png"), "found from another working folder"


@pytest.mark.parametrize("kind", WRITE)
def test_an_archive_is_trained_on_and_predicted(tmp_path: Path, kind: str) -> None:
    broken = [(b"", "dark", "train"), *RECORDS]
    out = str(tmp_path / "out")
    data = WRITE[kind](tmp_path / "pictures", broken)
    command = ["train", "--data", data, "--epochs", "8", "--batch-size", "4", "--learning-rate", "0.01"]
    assert main([*command, "--output", out]) == 0
    (skipped,) = tmp_path.glob("out/*/*/skipped.csv")
    assert skipped.read_text(encoding="utf-8").count("\ntrain,") == 1
    with pytest.raises(UnreadableError, match="cannot be read: the file is empty"):
        load_data(data, bad_images="error").train.batch([0], train=False)
    new = WRITE[kind](tmp_path / "new", [record for record in RECORDS if record[2] == "train"], labelled=False)
    assert main(["predict", "--data", new, "--output", out]) == 0
    assert [row["predicted"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == ["dark", "light"] * 6


@pytest.mark.parametrize(("kind", "module"), [("hf", "datasets"), ("hf-stream", "datasets"), ("wds", "webdataset")])
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["train", "--data", f"{kind}:{tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dal-train: {module} is missing")
    assert error.endswith(f": pip install {module}\n")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    with pytest.raises(UsageError, match=r"0.tar is missing; give a tar, a folder of some, or a pattern"):
        load_data(f"wds:{tmp_path}/{{0..2}}.tar")
    with pytest.raises(UsageError, match="there is no tar"):
        load_data(f"wds:{tmp_path}")
    (tmp_path / "0.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UsageError, match=r"0.tar cannot be read"):
        load_data(f"wds:{tmp_path}")


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_what_the_library_cannot_do_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As datasets 5.2 beside pyarrow 26, which cannot tell a type of the one by that of the other."""
    data = write_hugging_face(tmp_path / "pictures", RECORDS).replace("hf:", f"{kind}:", 1)
    datasets = sys.modules["datasets"]

    def fails(*_: Any) -> Any:
        raise TypeError("what it says")

    for of in (datasets.Dataset, datasets.IterableDataset):
        monkeypatch.setattr(of, "cast_column", fails)
    with pytest.raises(UsageError, match="pictures cannot be read by datasets: what it says"):
        load_data(data)


def test_a_stream_reads_what_lies_in_an_archive_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("dark/0.png", b"an image")
    path = f"zip://dark/0.png::{tmp_path / 'train.zip'}"
    assert _content({"bytes": None, "path": path}) == b"an image"


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_what_is_no_dataset_is_refused(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(UsageError, match="cannot be read by datasets, as a folder or as a name on the hub: "):
        load_data(f"{kind}:{tmp_path}")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(UsageError, match="must have one column of images, got 0 of text, label"):
        load_data(f"{kind}:{tmp_path / 'text'}")
    with pytest.raises(UsageError, match=r"splits must be among train, val, .* got 'extra'"):
        load_data(write_hugging_face(tmp_path / "extra", [(*RECORDS[0][:2], "extra")]).replace("hf:", f"{kind}:", 1))


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_a_name_on_the_hub_is_asked_for_there(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []
    column = {"image": [{"bytes": image, "path": None} for image, *_ in RECORDS], "label": [i % 2 for i in range(22)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    whole = datasets.Dataset.from_dict(column, features=features)

    def loaded(place: str, streaming: bool) -> Any:
        asked.append((place, streaming))
        return datasets.DatasetDict({"train": whole, "test": whole})

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    assert len(load_data(f"{kind}:owner/pictures").train) == 22
    assert asked == [("owner/pictures", kind == "hf-stream")]
