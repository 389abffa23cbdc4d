"""Photographs in files: one by one, in lists, and in a folder a class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

import pytest
import torch

from dal_kernels.training import UsageError
from dal_kernels.training.data import load_data
from dal_kernels.training.data.base import FileImages
from dal_kernels.training.data.files import read_label_list
from dal_kernels.training.data.transforms import ImageTransform
from support.pictures import colour_of, same_colours, write_folders, write_image, write_lines

Image = pytest.importorskip("PIL.Image", reason="the extra dal_kernels[demo]")

PLAIN = ImageTransform((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


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
