"""WebVision 1.0, and its first 50 classes: photographs labelled by the search that found them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dal_kernels.noise import UNKNOWN
from dal_kernels.training.data.base import DataSet, FileImages
from dal_kernels.training.data.files import find_files, need_folder, read_label_list
from dal_kernels.training.data.image_folder import read_class_folders
from dal_kernels.training.data.transforms import IMAGENET, ImageTransform
from dal_kernels.training.errors import UsageError

__all__ = ["mini_webvision", "webvision"]

CLASSES, MINI_CLASSES = 1000, 50
TRAIN_LISTS = ("info/train_filelist_google.txt", "info/train_filelist_flickr.txt")
TEST_LIST = "info/val_filelist.txt"
TRANSFORM = ImageTransform(*IMAGENET, jitter=(0.4, 0.4, 0.4, 0.2))
ADVICE = "unpack WebVision 1.0 there: its lists in info/, its images in google/, flickr/ and val_images_256/"


def webvision(folder: Path | None = None) -> DataSet:
    """WebVision 1.0, 2.4 million training images of 1000 classes, 50 000 to test; inputs (3, 224, 224).

    ``folder`` holds info/ with the lists, and the images that they name; those of the test are below val_images_256/.
    Nobody knows the true labels of the training images.

    Raises:
        UsageError: no folder was given, or a list or an image is missing or wrong; of a list it names the line.
    """
    folder = need_folder("webvision", folder, ADVICE)
    return _from_lists("webvision", folder, TRAIN_LISTS, CLASSES, ADVICE)


def mini_webvision(folder: Path | None = None) -> DataSet:
    """The first 50 classes of WebVision's Google part, 66 000 training and 2 500 test images; inputs (3, 224, 224).

    ``folder`` is WebVision's, with its lists, or holds train/CLASS/ and val/CLASS/ for exactly 50 classes.

    Raises:
        UsageError: as of WebVision, or there are folders for another number of classes.
    """
    advice = f"{ADVICE}; or 50 folders of images in train/ and in val/"
    folder = need_folder("mini-webvision", folder, advice)
    if not (folder / "train").is_dir():
        return _from_lists("mini-webvision", folder, TRAIN_LISTS[:1], MINI_CLASSES, advice)
    data = read_class_folders("mini-webvision", folder, TRANSFORM)
    if data.classes != MINI_CLASSES:
        raise UsageError(f"mini-webvision must have {MINI_CLASSES} classes, got {data.classes} in {folder / 'train'}")
    return replace(data, true_labels=torch.full_like(data.train_labels, UNKNOWN), verified=True)


def _from_lists(name: str, folder: Path, train_lists: tuple[str, ...], classes: int, advice: str) -> DataSet:
    paths = find_files(name, (*train_lists, TEST_LIST), [folder], advice)
    *train, test = (
        {key: label for key, label in read_label_list(path, CLASSES).items() if label < classes} for path in paths
    )
    labels = torch.tensor([label for part in train for label in part.values()])
    return DataSet(
        name,
        classes,
        FileImages(folder, [key for part in train for key in part], TRANSFORM),
        labels,
        torch.full_like(labels, UNKNOWN),
        FileImages(folder / "val_images_256", list(test), TRANSFORM),
        torch.tensor(list(test.values())),
    )
