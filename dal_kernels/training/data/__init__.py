"""The data sets, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from dal_kernels.training.data.archives import ARCHIVES, archive_images
from dal_kernels.training.data.base import DataSet, FileImages, Images, RecordImages
from dal_kernels.training.data.cifar import cifar10, cifar100
from dal_kernels.training.data.clothing1m import clothing1m
from dal_kernels.training.data.digits import digits
from dal_kernels.training.data.fashion_mnist import fashion_mnist
from dal_kernels.training.data.features import feature_rows
from dal_kernels.training.data.image_folder import folder_images, image_folder
from dal_kernels.training.data.kanji import CLASSES, kanji
from dal_kernels.training.data.table import table_images
from dal_kernels.training.data.udhr import udhr
from dal_kernels.training.data.webvision import mini_webvision, webvision
from dal_kernels.training.errors import UsageError

__all__ = ["BAD_IMAGES", "DATA", "SOURCES", "DataSet", "check_name", "load_data"]

BAD_IMAGES = ("skip", "error")

DATA: dict[str, Callable[[Path | None], DataSet]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    **{name: partial(kanji, name) for name in CLASSES},
    "udhr": udhr,
    "cifar-10": cifar10,
    "cifar-100": cifar100,
    "mini-webvision": mini_webvision,
    "webvision": webvision,
    "clothing1m": clothing1m,
    "image-folder": image_folder,
}
# Data of the user's own, KIND:PATH: what opens the path; of images with their side too (0: their own).
SOURCES: dict[str, Callable[..., DataSet]] = {
    "folder": folder_images,
    "csv": table_images,
    **{kind: partial(archive_images, kind) for kind in ARCHIVES},
    "npz": feature_rows,
}


def check_name(name: str) -> None:
    """Raises UsageError where ``name`` says no data set."""
    kind, _, path = name.partition(":")
    if name not in DATA and not (kind in SOURCES and path):
        accepted = (*DATA, *(f"{kind}:PATH" for kind in SOURCES))
        raise UsageError(f"data must be one of {', '.join(accepted)}, got {name!r}")


def load_data(
    name: str, folder: Path | None = None, image_size: int = 0, bad_images: str = "error", tested: bool = True
) -> DataSet:
    """The data set called ``name``, or that of ``KIND:PATH``, a kind in ``SOURCES``.

    Args:
        folder: holds the files of a data set with a name, if it has any.
        image_size: side of the inputs in pixels, for ``SOURCES`` only; 0: that of the images, up to 224.
        bad_images: "skip" or "error", what is done about files that cannot be read.
        tested: whether folder:PATH must have a part to test on.

    Raises:
        UsageError: there is no such data set, or its files are missing or wrong.
    """
    check_name(name)
    kind, _, path = name.partition(":")
    if image_size and (name in DATA or kind == "npz"):
        raise UsageError(f"image_size is for images of KIND:PATH, got {image_size} for {name}")
    if name in DATA:
        data = DATA[name](folder)
    else:
        if folder is not None:
            raise UsageError(f"data_dir is for data sets with a name, got {folder} for {name}")
        options = {} if kind == "npz" else {"image_size": image_size}
        data = SOURCES[kind](Path(path), **options, **({"tested": tested} if kind == "folder" else {}))

    def told(images: Images) -> Images:
        if bad_images == "error" and isinstance(images, FileImages) and (missing := images.missing()):
            raise UsageError(f"the image {missing[0]} is missing")
        if not isinstance(images, FileImages | RecordImages):
            return images
        return replace(images, skip=bad_images == "skip")

    return data.with_images(told)
