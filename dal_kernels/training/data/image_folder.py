"""Photographs in one folder a class, below train/ and val/ or test/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dal_kernels.training.data.base import DataSet, FileImages
from dal_kernels.training.data.files import need_folder, ordered
from dal_kernels.training.data.transforms import IMAGENET, ImageTransform
from dal_kernels.training.errors import UsageError, need

__all__ = ["folder_images", "image_folder", "images_below", "natural_side", "read_class_folders", "test_folder"]

ADVICE = "place the images in train/CLASS/ and val/CLASS/ (or test/CLASS/) below it"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_folder(folder: Path | None = None) -> DataSet:
    """Any photographs, inputs (3, 224, 224) by ImageNet's mean and deviation; tested on test/, or val/ without it.

    As :func:`folder_images`, with the side and the settings of photographs.

    Raises:
        UsageError: no folder was given, or the folders in it are not as :func:`read_class_folders` needs them.
    """
    folder = need_folder("image-folder", folder, ADVICE)
    return _data_set("image-folder", folder, *read_class_folders("image-folder", folder, ImageTransform(*IMAGENET)))


def folder_images(folder: Path, image_size: int = 0) -> DataSet:
    """The images of train/CLASS/ and val/CLASS/ (or test/CLASS/) below ``folder``, inputs (3, side, side).

    Nobody verified the labels, which are the names of the folders.

    Args:
        image_size: side of the inputs in pixels; 0: as :func:`natural_side`.

    Raises:
        UsageError: as :func:`read_class_folders`.
    """
    folder = need_folder("folder", folder, ADVICE)
    classes, train, train_labels, test, test_labels = read_class_folders("folder", folder, ImageTransform(*IMAGENET))
    transform = ImageTransform(*IMAGENET, side=image_size or natural_side(train))
    train, test = (replace(part, transform=transform) for part in (train, test))
    return _data_set(f"folder-{folder.resolve().name}", folder, classes, train, train_labels, test, test_labels)


def _data_set(
    name: str,
    folder: Path,
    classes: list[str],
    train: FileImages,
    train_labels: Tensor,
    test: FileImages,
    test_labels: Tensor,
) -> DataSet:
    """Of what :func:`read_class_folders` found; nobody verified the labels."""
    return DataSet(
        name,
        len(classes),
        train,
        train_labels,
        train_labels,
        test,
        test_labels,
        class_names=classes,
        train_paths=train.paths,
        test_paths=test.paths,
        verified=False,
        note=_note(folder),
    )


def natural_side(images: FileImages, most: int = 224) -> int:
    """The median short side, in pixels, of 25 of the images that can be opened, but not above ``most``."""
    library = need("PIL.Image", "pillow")
    sides = []
    for name in images.names[:: max(1, len(images) // 25)]:
        try:
            with library.open(images.root / name) as image:
                sides.append(min(image.size))
        except Exception:  # a damaged image can raise anything; whoever fetches it says so
            continue
    return max(8, min(most, sorted(sides)[len(sides) // 2])) if sides else most


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
    tests = test_folder(folder)
    if not (folder / "train").is_dir() or tests is None:
        raise UsageError(f"{name}: {folder} has no train/ and val/ (or test/); {ADVICE}")
    classes = _class_names(folder / "train")
    if len(classes) < 2:
        raise UsageError(f"{name}: {folder / 'train'} must hold at least 2 folders of classes, got {len(classes)}")
    unknown = sorted(set(_class_names(tests)) - set(classes))
    if unknown:
        raise UsageError(f"{name}: {tests / unknown[0]} is no class of {folder / 'train'}")
    train, test = _scan(folder / "train", classes), _scan(tests, classes)
    empty = [name for name, files in train.items() if not files]
    if empty:
        raise UsageError(f"{name}: {folder / 'train' / empty[0]} holds no image ({', '.join(SUFFIXES)})")
    return classes, *_part(folder / "train", train, transform), *_part(tests, test, transform)


def test_folder(folder: Path) -> Path | None:
    """test/, or val/ where that is missing or has no folders of classes, as ImageNet's has none."""
    parts = [path for part in ("test", "val") if (path := folder / part).is_dir()]
    return next((path for path in parts if _class_names(path)), parts[-1] if parts else None)


def _note(folder: Path) -> str:
    """What is to be said of a part that is there and not used."""
    used = test_folder(folder)
    other = folder / ("val" if used == folder / "test" else "test")
    return f"{other} is not used, as {used} is tested on; --val-fraction validates on others" if other.is_dir() else ""


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
