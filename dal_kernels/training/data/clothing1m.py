"""Clothing1M: photographs from shops, labelled by the words around them."""

from __future__ import annotations

from pathlib import Path

import torch

from dal_kernels.noise import UNKNOWN, read_lines
from dal_kernels.training.data.base import NOTHING, DataSet, FileImages
from dal_kernels.training.data.files import find_files, need_folder, read_label_list
from dal_kernels.training.data.transforms import ImageTransform
from dal_kernels.training.errors import UsageError, usage_errors

__all__ = ["clothing1m"]

LISTS = ("noisy_label_kv.txt", "clean_label_kv.txt", "noisy_train_key_list.txt", "clean_test_key_list.txt")
VALIDATION = "clean_val_key_list.txt"
TRANSFORM = ImageTransform(mean=(0.6959, 0.6537, 0.6371), sd=(0.3113, 0.3192, 0.3214))
ADVICE = f"unpack Clothing1M there: its images in images/, {', '.join(LISTS)} beside it or in annotations/"
IMAGES = "images/"  # in front of each key, in most copies


def clothing1m(folder: Path | None = None) -> DataSet:
    """Clothing1M, 1 000 000 training images of 14 classes with the shops' labels, 10 526 to test; inputs (3, 224, 224).

    Where the list of its validation is there too, its 14 313 images with clean labels are to choose an epoch by.
    ``folder`` holds the lists, or annotations/ with them, and the images; both with images/ in front or without. The
    true labels of some training images are known: those that are in clean_label_kv.txt too.

    Raises:
        UsageError: a list is missing or wrong; it names the file and the line.
    """
    folder = need_folder("clothing1m", folder, ADVICE)
    noisy_file, clean_file, train_file, test_file = find_files(
        "clothing1m", LISTS, [folder, folder / "annotations"], ADVICE
    )
    noisy, clean = (read_label_list(path, 14, strip=IMAGES) for path in (noisy_file, clean_file))
    train, test = _read_keys(train_file, noisy, noisy_file), _read_keys(test_file, clean, clean_file)
    validation_file = test_file.with_name(VALIDATION)
    validation = _read_keys(validation_file, clean, clean_file) if validation_file.exists() else []
    root = folder / IMAGES if (folder / IMAGES).is_dir() else folder
    return DataSet(
        "clothing1m",
        14,
        FileImages(root, train, TRANSFORM),
        torch.tensor([noisy[key] for key in train]),
        torch.tensor([clean.get(key, UNKNOWN) for key in train]),
        FileImages(root, test, TRANSFORM),
        torch.tensor([clean[key] for key in test]),
        validation=FileImages(root, validation, TRANSFORM) if validation else NOTHING,
        validation_labels=torch.tensor([clean[key] for key in validation], dtype=torch.long),
    )


def _read_keys(path: Path, labels: dict[str, int], labels_file: Path) -> list[str]:
    """The keys of a list, in its order, each of which has a label."""
    keys: dict[str, None] = {}
    with usage_errors():
        for place, line in read_lines(path):
            key = line.strip().removeprefix(IMAGES)
            if key not in labels:
                raise UsageError(f"{place}: {line!r} has no label in {labels_file.name}")
            if key in keys:
                raise UsageError(f"{place}: {key} is listed for the second time")
            keys[key] = None
    if not keys:
        raise UsageError(f"{path} is empty")
    return list(keys)
