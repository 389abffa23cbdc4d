"""Photographs in one folder a class, below train/ and val/ or test/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dal_kernels.training.data.base import (
    NOTHING,
    DataSet,
    EncodedImages,
    FileImages,
    RecordImages,
    UnreadableError,
)
from dal_kernels.training.data.files import need_folder, ordered
from dal_kernels.training.data.transforms import IMAGENET, ImageTransform
from dal_kernels.training.errors import UsageError

__all__ = [
    "folder_images",
    "image_folder",
    "images_below",
    "natural_side",
    "read_class_folders",
    "test_folder",
    "with_side",
]

ADVICE = "place the images in train/CLASS/ and val/CLASS/ (or test/CLASS/) below it"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_folder(folder: Path | None = None) -> DataSet:
    """Any photographs, inputs (3, 224, 224) by ImageNet's mean and deviation.

    As :func:`folder_images`, with the side and the settings of photographs.

    Raises:
        UsageError: no folder was given, or the folders in it are not as :func:`read_class_folders` needs them.
    """
    folder = need_folder("image-folder", folder, ADVICE)
    return read_class_folders("image-folder", folder, ImageTransform(*IMAGENET))


def folder_images(folder: Path, image_size: int = 0, tested: bool = True) -> DataSet:
    """The images of train/CLASS/ and val/CLASS/ (or test/CLASS/) below ``folder``, inputs (3, side, side).

    Where there are both val/ and test/, the first is to choose an epoch by, and the second is tested on.

    Args:
        image_size: side of the inputs in pixels; 0: as :func:`natural_side`.
        tested: whether there must be a part to test on.

    Raises:
        UsageError: as :func:`read_class_folders`.
    """
    folder = need_folder("folder", folder, ADVICE)
    data = read_class_folders("folder", folder, ImageTransform(*IMAGENET), tested)
    name = f"folder-{folder.resolve().name}"
    return replace(with_side(data, image_size), name=name)


def with_side(data: DataSet, image_size: int) -> DataSet:
    """The images of ``data``, which are encoded, in inputs of so many pixels a side; 0: as :func:`natural_side`."""
    assert isinstance(data.train, EncodedImages)
    transform = ImageTransform(*IMAGENET, side=image_size or natural_side(data.train))
    return data.with_images(
        lambda images: replace(images, transform=transform) if isinstance(images, FileImages | RecordImages) else images
    )


def natural_side(images: EncodedImages, most: int = 224) -> int:
    """The median short side, in pixels, of 25 of the images that can be opened, but not above ``most``."""
    sides = []
    for index in range(0, len(images), max(1, len(images) // 25)):
        with suppress(UnreadableError):  # whoever fetches it says so
            sides.append(min(images.size(index)))
    return max(8, min(most, sorted(sides)[len(sides) // 2])) if sides else most


def read_class_folders(name: str, folder: Path, transform: ImageTransform, tested: bool = True) -> DataSet:
    """The data set ``name`` of the images in train/CLASS/, val/CLASS/, to choose an epoch by, and test/CLASS/.

    Of val/ and test/ one is enough, which is tested on. The classes are the folders in train/, numbered in the order of
    their names; names that are all integers are in the order of those, for 10 sorts before 2 as a word. A class may
    have no image to test on. Files that are no images by their names are passed over, and at any depth so are files and
    folders whose names begin with a dot: Jupyter keeps copies in .ipynb_checkpoints, and macOS writes "._" files that
    are no images. Nobody verified the labels, which are the names of the folders.

    Args:
        tested: whether there must be a part to test on.

    Raises:
        UsageError: train/ is missing or empty, or so are val/ and test/ where there must be one, there are fewer than 2
            classes, a class has no training image, or a class of the others is not in train/.
    """
    tests, validations = test_folder(folder), validation_folder(folder)
    if tests is not None and not _class_names(tests):
        tests = None
    missing = ["train/"] if not (folder / "train").is_dir() else []
    missing += ["val/CLASS/ or test/CLASS/ to test on"] if tested and tests is None else []
    if missing:
        raise UsageError(f"{name}: {folder} has no {' and no '.join(missing)}; {ADVICE}")
    classes = _class_names(folder / "train")
    if len(classes) < 2:
        raise UsageError(f"{name}: {folder / 'train'} must hold at least 2 folders of classes, got {len(classes)}")
    for part in filter(None, (tests, validations)):
        unknown = sorted(set(_class_names(part)) - set(classes))
        if unknown:
            raise UsageError(f"{name}: {part / unknown[0]} is no class of {folder / 'train'}")
    files = _scan(folder / "train", classes)
    empty = [name for name, of_class in files.items() if not of_class]
    if empty:
        raise UsageError(f"{name}: {folder / 'train' / empty[0]} holds no image ({', '.join(SUFFIXES)})")
    train, train_labels = _part(folder / "train", files, transform)
    data = DataSet(
        name,
        len(classes),
        train,
        train_labels,
        train_labels,
        NOTHING,
        torch.empty(0, dtype=torch.long),
        class_names=classes,
        train_paths=train.paths,
        verified=False,
        note="".join(
            f"{other} is not used, as it has no folders of classes"
            for other in (folder / "val", folder / "test")
            if other.is_dir() and other not in (tests, validations)
        ),
    )
    if tests is not None:
        test, labels = _part(tests, _scan(tests, classes), transform)
        data = replace(data, test=test, test_labels=labels, test_paths=test.paths)
    if validations is not None:
        validation, labels = _part(validations, _scan(validations, classes), transform)
        data = replace(data, validation=validation, validation_labels=labels, validation_paths=validation.paths)
    return data


def test_folder(folder: Path) -> Path | None:
    """test/, or val/ where that is missing or has no folders of classes, as ImageNet's has none."""
    parts = [path for part in ("test", "val") if (path := folder / part).is_dir()]
    return next((path for path in parts if _class_names(path)), parts[-1] if parts else None)


def validation_folder(folder: Path) -> Path | None:
    """val/, if it has folders of classes and is not tested on."""
    path = folder / "val"
    return path if path.is_dir() and test_folder(folder) != path and _class_names(path) else None


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _class_names(part: Path) -> list[str]:
    return ordered(path.name for path in part.iterdir() if path.is_dir() and not _hidden(path.name))


def _scan(part: Path, classes: list[str]) -> dict[str, list[str]]:
    """The images of each class at any depth, as paths below ``part``."""
    return {name: images_below(part / name, part) for name in classes}


def images_below(folder: Path, root: Path | None = None) -> list[str]:
    """The images at any depth, as paths below ``root``, by default ``folder`` itself, in order."""
    return sorted(os.path.relpath(path, root or folder) for path in _images(folder))


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
