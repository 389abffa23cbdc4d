"""Photographs in one folder a class, below train/ and val/ or test/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dal_kernels.training.data.base import DataSet, FileImages
from dal_kernels.training.data.files import need_folder
from dal_kernels.training.data.transforms import IMAGENET, ImageTransform
from dal_kernels.training.errors import UsageError

__all__ = ["image_folder", "read_class_folders"]

ADVICE = "place the images in train/CLASS/ and val/CLASS/ (or test/CLASS/) below it"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_folder(folder: Path | None = None) -> DataSet:
    """Any photographs, inputs (3, 224, 224) by ImageNet's mean and deviation; tested on val/, or test/ without it.

    The folders' names are taken for the true labels of the training images too.

    Raises:
        UsageError: no folder was given, or the folders in it are not as :func:`read_class_folders` needs them.
    """
    folder = need_folder("image-folder", folder, ADVICE)
    classes, train, train_labels, test, test_labels = read_class_folders(
        "image-folder", folder, ImageTransform(*IMAGENET)
    )
    return DataSet("image-folder", len(classes), train, train_labels, train_labels, test, test_labels)


def read_class_folders(
    name: str, folder: Path, transform: ImageTransform
) -> tuple[list[str], FileImages, Tensor, FileImages, Tensor]:
    """The classes in order, and images and labels of both parts.

    The classes are the folders in train/, numbered in the order of their names; names that are all integers are in the
    order of those, for 10 sorts before 2 as a word. A class may have no test image. Files that are no images by their
    names are passed over, and at any depth so are files and folders whose names begin with a dot: Jupyter keeps copies
    in .ipynb_checkpoints, and macOS writes "._" files that are no images.

    Raises:
        UsageError: train/ or val/ and test/ is missing or empty, there are fewer than 2 classes, a class has no
            training image, or a class of the test is not in train/.
    """
    test_folder = next((path for part in ("val", "test") if (path := folder / part).is_dir()), None)
    if not (folder / "train").is_dir() or test_folder is None:
        raise UsageError(f"{name}: {folder} has no train/ and val/ (or test/); {ADVICE}")
    classes = _class_names(folder / "train")
    if len(classes) < 2:
        raise UsageError(f"{name}: {folder / 'train'} must hold at least 2 folders of classes, got {len(classes)}")
    unknown = sorted(set(_class_names(test_folder)) - set(classes))
    if unknown:
        raise UsageError(f"{name}: {test_folder / unknown[0]} is no class of {folder / 'train'}")
    train, test = _scan(folder / "train", classes), _scan(test_folder, classes)
    empty = [name for name, files in train.items() if not files]
    if empty:
        raise UsageError(f"{name}: {folder / 'train' / empty[0]} holds no image ({', '.join(SUFFIXES)})")
    return classes, *_part(folder / "train", train, transform), *_part(test_folder, test, transform)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _class_names(part: Path) -> list[str]:
    names = sorted(path.name for path in part.iterdir() if path.is_dir() and not _hidden(path.name))
    return sorted(names, key=int) if all(name.isascii() and name.isdecimal() for name in names) else names


def _scan(part: Path, classes: list[str]) -> dict[str, list[str]]:
    """The images of each class at any depth, as paths below ``part``."""
    return {name: sorted(os.path.relpath(path, part) for path in _images(part / name)) for name in classes}


def _images(folder: Path) -> Iterator[str]:
    for below, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _hidden(name)]  # os.walk goes into those that are left
        yield from (
            os.path.join(below, file) for file in files if file.lower().endswith(SUFFIXES) and not _hidden(file)
        )


def _part(part: Path, files: dict[str, list[str]], transform: ImageTransform) -> tuple[FileImages, Tensor]:
    names = [name for of_class in files.values() for name in of_class]
    labels = torch.repeat_interleave(torch.tensor([len(of_class) for of_class in files.values()]))
    return FileImages(part, names, transform), labels
