"""WebVision and Clothing1M, on small trees with the real names."""

from __future__ import annotations

from pathlib import Path

import pytest

from dal_kernels.noise import UNKNOWN
from dal_kernels.training import UsageError
from dal_kernels.training.data import load_data
from support.pictures import same_colours, write_folders, write_image, write_lines

Image = pytest.importorskip("PIL.Image", reason="the extra dal_kernels[demo]")


GOOGLE = [
    ("google/q0001/aa.jpg", 0),
    ("google/q0002/ab.jpg", 999),
    ("google/q0003/ad.jpg", 49),
    ("google/x/ag.jpg", 50),
]


FLICKR = [("flickr/q0001/ba.jpg", 0), ("flickr/q0009/bd.jpg", 7)]


VAL = [("val000001.jpg", 50), ("val000003.jpg", 3), ("val000007.jpg", 49)]


def write_webvision(root: Path) -> None:
    for name, entries, below in (
        ("train_filelist_google", GOOGLE, ""),
        ("train_filelist_flickr", FLICKR, ""),
        ("val_filelist", VAL, "val_images_256"),
    ):
        write_lines(root / "info" / f"{name}.txt", [f"{key} {label}" for key, label in entries])
        for key, _ in entries:
            write_image(root / below / key)


@pytest.mark.parametrize(
    ("name", "classes", "train", "test"),
    [
        ("webvision", 1000, GOOGLE + FLICKR, VAL),
        ("mini-webvision", 50, [GOOGLE[0], GOOGLE[2]], VAL[1:]),
    ],
)
def test_webvision(
    tmp_path: Path, name: str, classes: int, train: list[tuple[str, int]], test: list[tuple[str, int]]
) -> None:
    write_webvision(tmp_path)
    data = load_data(name, tmp_path)
    assert (data.name, data.classes) == (name, classes)
    assert data.train_labels.tolist() == [label for _, label in train]
    assert data.true_labels.tolist() == [UNKNOWN] * len(train)
    assert data.test_labels.tolist() == [label for _, label in test]
    assert same_colours(data.train, [Path(key).name for key, _ in train])
    assert same_colours(data.test, [key for key, _ in test])
    assert data.train.batch([0], train=True).shape == (1, 3, 224, 224)


def test_mini_webvision_in_folders_goes_by_the_numbers(tmp_path: Path) -> None:
    write_folders(tmp_path, [str(i) for i in range(50)])
    data = load_data("mini-webvision", tmp_path)
    assert data.train_labels.tolist() == [*range(50)]
    assert same_colours(data.test, [f"val_{i}.jpg" for i in range(50)])
    assert data.true_labels.tolist() == [UNKNOWN] * 50
    assert data.train.transform.jitter is not None


def test_mini_webvision_in_too_few_folders_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path, ["a", "b"])
    with pytest.raises(UsageError, match="mini-webvision must have 50 classes, got 2 in "):
        load_data("mini-webvision", tmp_path)


@pytest.mark.parametrize("name", ["webvision", "mini-webvision"])
@pytest.mark.parametrize("file", ["train_filelist_google.txt", "val_filelist.txt"])
def test_a_broken_webvision_is_refused(tmp_path: Path, name: str, file: str) -> None:
    write_webvision(tmp_path)
    path = tmp_path / "info" / file
    with path.open("a", encoding="utf-8") as lines:
        lines.write("some/image.jpg 1000\n")
    number = len(path.read_text(encoding="utf-8").splitlines())
    with pytest.raises(UsageError, match=rf"{file}, line {number}: the label must be an integer from 0 to 999"):
        load_data(name, tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match=f"{name}: info/{file} not found in "):
        load_data(name, tmp_path)


SHOP = {"0/aa.jpg": 3, "0/ab.jpg": 13, "1/ad.jpg": 0, "1/ag.jpg": 5}


TRUTH = {"0/ab.jpg": 12, "1/ba.jpg": 7, "1/bd.jpg": 1}


TRAIN_KEYS, TEST_KEYS = ["1/ad.jpg", "0/aa.jpg", "0/ab.jpg"], ["1/bd.jpg", "1/ba.jpg"]


def write_clothing1m(root: Path, texts: str = "", prefix: str = "images/", images: str = "images") -> Path:
    """Returns the folder of the lists."""
    lists = root / texts
    for name, labels in (("noisy_label_kv.txt", SHOP), ("clean_label_kv.txt", TRUTH)):
        write_lines(lists / name, [f"{prefix}{key} {label}" for key, label in labels.items()])
    for name, keys in (("noisy_train_key_list.txt", TRAIN_KEYS), ("clean_test_key_list.txt", TEST_KEYS)):
        write_lines(lists / name, [f"{prefix}{key}" for key in keys])
    for key in SHOP | TRUTH:
        write_image(root / images / key)
    return lists


@pytest.mark.parametrize("texts", ["", "annotations"])
@pytest.mark.parametrize("prefix", ["images/", ""])
@pytest.mark.parametrize("images", ["images", ""])
def test_clothing1m_in_all_its_layouts(tmp_path: Path, texts: str, prefix: str, images: str) -> None:
    write_clothing1m(tmp_path, texts, prefix, images)
    data = load_data("clothing1m", tmp_path)
    assert data.classes == 14
    assert data.train_labels.tolist() == [0, 3, 13]
    assert data.true_labels.tolist() == [UNKNOWN, UNKNOWN, 12]
    assert data.test_labels.tolist() == [1, 7]
    assert same_colours(data.train, ["ad.jpg", "aa.jpg", "ab.jpg"])
    assert same_colours(data.test, ["bd.jpg", "ba.jpg"])
    assert len(data.validation) == 0


def test_clothing1m_is_validated_on_its_own_list(tmp_path: Path) -> None:
    write_lines(write_clothing1m(tmp_path) / "clean_val_key_list.txt", ["images/0/ab.jpg"])
    data = load_data("clothing1m", tmp_path)
    assert data.validation_labels.tolist() == [12], "the clean label"
    assert same_colours(data.validation, ["ab.jpg"])


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("noisy_label_kv.txt", "images/new.jpg 14", "line 5: the label must be an integer from 0 to 13"),
        ("noisy_label_kv.txt", "1/ad.jpg 1", "line 5: 1/ad.jpg has the label 1, and had 0 before"),
        ("clean_label_kv.txt", "images/new.jpg", "line 4: must be a path and a label"),
        ("noisy_train_key_list.txt", "images/1/ba.jpg", "line 4: .* has no label in noisy_label_kv.txt"),
        ("clean_test_key_list.txt", "images/1/ag.jpg", "line 3: .* has no label in clean_label_kv.txt"),
        ("clean_test_key_list.txt", "", "line 3: '' has no label"),
        ("clean_test_key_list.txt", "1/bd.jpg", "line 3: 1/bd.jpg is listed for the second time"),
    ],
)
def test_a_broken_clothing1m_is_refused(tmp_path: Path, file: str, line: str, message: str) -> None:
    with (write_clothing1m(tmp_path) / file).open("a", encoding="utf-8") as lines:
        lines.write(f"{line}\n")
    with pytest.raises(UsageError, match=f"{file}, {message}"):
        load_data("clothing1m", tmp_path)


@pytest.mark.parametrize("file", ["noisy_train_key_list.txt", "clean_test_key_list.txt", "noisy_label_kv.txt"])
def test_an_empty_list_of_clothing1m_is_named(tmp_path: Path, file: str) -> None:
    (write_clothing1m(tmp_path) / file).write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=f"{file} is empty"):
        load_data("clothing1m", tmp_path)
