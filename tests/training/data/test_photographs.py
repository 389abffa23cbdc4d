"""Photographs in files: the readers of folders, WebVision and Clothing1M, on small trees with the real names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

import pytest
import torch

from dal_kernels.noise import UNKNOWN
from dal_kernels.training import UsageError
from dal_kernels.training.data import load_data
from dal_kernels.training.data.base import FileImages
from dal_kernels.training.data.files import read_label_list
from dal_kernels.training.data.transforms import ImageTransform

Image = pytest.importorskip("PIL.Image", reason="the extra dal_kernels[demo]")

PLAIN = ImageTransform((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def colour_of(name: str) -> tuple[int, int, int]:
    """A colour for each name, far from the others: to see which file was read."""
    number = sum(map(ord, name))
    return 30 * (number % 7) + 20, 30 * (number // 7 % 7) + 20, 30 * (number // 49 % 7) + 20


def write_image(path: Path, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour_of(path.name)).save(path)
    return path


def write_lines(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def colours(images: FileImages) -> list[tuple[int, int, int]]:
    """The colour of each image, through the test's transform."""
    mean, sd = (torch.tensor(x) for x in (images.transform.mean, images.transform.sd))
    middle = images.batch(range(len(images)), train=False)[:, :, 112, 112]
    return [tuple(row) for row in (255 * (middle * sd + mean)).round().int().tolist()]


def same_colours(images: FileImages, names: list[str]) -> bool:
    """JPEG changes colours by a little."""
    return torch.allclose(
        torch.tensor(colours(images)).float(), torch.tensor([colour_of(n) for n in names]).float(), atol=4
    )


# --- images in files


def test_images_are_opened_as_they_are_fetched(tmp_path: Path) -> None:
    names = ["a.jpg", "b.png", "c.jpg", "d.jpg", "e.jpg", "f.bmp"]
    for name in names[:3] + names[5:]:
        write_image(tmp_path / name)
    (tmp_path / "e.jpg").write_bytes(write_image(tmp_path / "whole.jpg", (300, 300)).read_bytes()[:700])
    images = FileImages(tmp_path, names, PLAIN)
    assert images.batch([5, 0], train=True).shape == (2, 3, 224, 224)
    assert torch.allclose(images.batch([5], False)[0, :, 0, 0] * 255, torch.tensor(colour_of("f.bmp")).float())
    for missing in ("d.jpg", "e.jpg"):
        with pytest.raises(UsageError, match=rf"the image .*{missing} cannot be read"):
            images.batch([0, names.index(missing)], train=False)


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + (5).to_bytes(4, "big") + b"IHDR" + bytes(9),  # ValueError
        b"",
        b"GIF89a",
    ],
    ids=["a PNG with a short header", "nothing", "a GIF's first bytes"],
)
def test_a_damaged_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UsageError, match=r"the image .*a\.png cannot be read"):
        FileImages(tmp_path, ["a.png"], PLAIN).batch([0], train=False)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_any_mode_are_read(tmp_path: Path, mode: str) -> None:
    suffix = ".jpg" if mode == "CMYK" else ".png"
    Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode).save(tmp_path / f"a{suffix}")
    out = FileImages(tmp_path, [f"a{suffix}"], PLAIN).batch([0], train=False)
    assert (out > 0.98).all()


@pytest.mark.parametrize(("names", "message"), [([], "no images"), (["gone.jpg", "too.jpg"], r"gone\.jpg is missing")])
def test_missing_first_images_are_noticed_at_once(tmp_path: Path, names: list[str], message: str) -> None:
    write_image(tmp_path / "a.jpg")
    with pytest.raises(UsageError, match=message):
        FileImages(tmp_path, names, PLAIN)


# --- lists

BROKEN_LINES = [
    ("a.jpg", "must be a path and a label, got 'a.jpg'"),
    ("", "must be a path and a label"),
    ("a.jpg x", "must be an integer from 0 to 13, got 'x'"),
    ("a.jpg 14", "must be an integer from 0 to 13, got '14'"),
    ("a.jpg -1", "must be an integer"),
    ("a.jpg 1.0", "must be an integer"),
    ("one.jpg 3", "one.jpg has the label 3, and had 2 before"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN_LINES)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path / "list.txt", ["one.jpg 2", "two.jpg 1", line, "four.jpg 3"])
    with pytest.raises(UsageError, match=message) as caught:
        read_label_list(path, 14)
    assert str(caught.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"\xff\xfe 1", "cannot be read")])
def test_a_list_of_nothing_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UsageError, match=rf"list\.txt {message}"):
        read_label_list(tmp_path / "list.txt", 14)


def test_a_list_may_have_spaces_in_paths_windows_ends_and_the_same_line_twice(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"b c.jpg 3\r\na.jpg\t1\r\nb c.jpg 3")
    assert list(read_label_list(tmp_path / "list.txt", 14).items()) == [("b c.jpg", 3), ("a.jpg", 1)]


# --- folders


def write_folders(root: Path, classes: list[str], test: str = "val") -> None:
    for name in classes:
        for part in ("train", test):
            write_image(root / part / name / f"{part}_{name}.jpg")


@pytest.mark.parametrize("test", ["val", "test"])
@pytest.mark.parametrize("classes", [["0", "1", "2", "9", "10", "11"], ["ant", "bee", "cat"], ["1", "02", "10"]])
def test_class_folders_are_numbered_in_order(tmp_path: Path, classes: list[str], test: str) -> None:
    write_folders(tmp_path, classes[::-1], test)
    write_image(tmp_path / "train" / classes[0] / "deeper" / "z.PNG")
    write_lines(tmp_path / "train" / classes[0] / "Thumbs.db", ["no image"])
    data = load_data("image-folder", tmp_path)
    assert data.classes == len(classes)
    assert data.train_labels.tolist() == [0, *range(len(classes))]
    assert data.test_labels.tolist() == [*range(len(classes))]
    assert torch.equal(data.true_labels, data.train_labels)
    assert same_colours(data.train, ["z.PNG"] + [f"train_{name}.jpg" for name in classes])
    assert same_colours(data.test, [f"{test}_{name}.jpg" for name in classes])


@pytest.mark.parametrize(
    "hidden", [".ipynb_checkpoints/a-checkpoint.jpg", "a/.ipynb_checkpoints/a-checkpoint.jpg", "a/._train_a.jpg"]
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_hidden_files_and_folders_are_passed_over(tmp_path: Path, part: str, hidden: str) -> None:
    write_folders(tmp_path, ["a", "b"])
    write_image(tmp_path / part / hidden)
    data = load_data("image-folder", tmp_path)
    assert data.classes == 2
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 1]
    assert same_colours(data.train, ["train_a.jpg", "train_b.jpg"])


def test_a_class_without_test_images_does_not_shift_the_others(tmp_path: Path) -> None:
    write_folders(tmp_path, ["a", "b", "c"])
    (tmp_path / "val" / "b" / "val_b.jpg").unlink()
    (tmp_path / "val" / "b").rmdir()
    assert load_data("image-folder", tmp_path).test_labels.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: write_image(root / "val" / "d" / "x.jpg"), r"val/d is no class of .*train"),
        (lambda root: (root / "train" / "d").mkdir(), r"train/d holds no image \(\.bmp, "),
        (lambda root: (root / "val").rename(root / "valid"), "has no val/CLASS/ or test/CLASS/ to test on"),
        (lambda root: rmtree(root / "train" / "b"), r"train must hold at least 2 folders of classes, got 1"),
    ],
)
def test_wrong_class_folders_are_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    write_folders(tmp_path, ["a", "b"])
    spoil(tmp_path)
    with pytest.raises(UsageError, match=f"image-folder: .*{message}"):
        load_data("image-folder", tmp_path)


# --- WebVision

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


# --- Clothing1M

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
