"""The data sets, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from dal_kernels.training.data.base import DataSet
from dal_kernels.training.data.cifar import cifar10, cifar100
from dal_kernels.training.data.clothing1m import clothing1m
from dal_kernels.training.data.digits import digits
from dal_kernels.training.data.fashion_mnist import fashion_mnist
from dal_kernels.training.data.image_folder import image_folder
from dal_kernels.training.data.kanji import CLASSES, kanji
from dal_kernels.training.data.udhr import udhr
from dal_kernels.training.data.webvision import mini_webvision, webvision
from dal_kernels.training.errors import UsageError

__all__ = ["DATA", "DataSet", "load_data"]

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


def load_data(name: str, folder: Path | None = None) -> DataSet:
    """The data set called ``name``; ``folder`` holds its files, if it has any.

    Raises:
        UsageError: there is no such data set, or its files are missing or wrong.
    """
    if name not in DATA:
        raise UsageError(f"data must be one of {', '.join(DATA)}, got {name!r}")
    return DATA[name](folder)
