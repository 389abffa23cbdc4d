"""The data sets, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.training.data.base import DataSet
from benchmarks.training.data.digits import digits
from benchmarks.training.data.fashion_mnist import fashion_mnist
from benchmarks.training.errors import UsageError

__all__ = ["DATA", "DataSet", "load_data"]

DATA: dict[str, Callable[[Path | None], DataSet]] = {"digits": digits, "fashion-mnist": fashion_mnist}


def load_data(name: str, folder: Path | None = None) -> DataSet:
    """The data set called ``name``; ``folder`` holds its files, if it has any."""
    if name not in DATA:
        raise UsageError(f"data must be one of {', '.join(DATA)}, got {name!r}")
    return DATA[name](folder)
