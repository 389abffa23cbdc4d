"""Labels that replace those of a data set: what an inspection suggested, or a person put right."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dal_kernels.training.data.base import DataSet
from dal_kernels.training.data.files import class_labels
from dal_kernels.training.data.table import read_table
from dal_kernels.training.errors import UsageError

__all__ = ["Corrections", "read_corrections"]


@dataclass(frozen=True)
class Corrections:
    """Samples (M,) int64 and their labels (M,) int64; and, if it is said, what each of all N counts, (N,) float32."""

    samples: Tensor
    labels: Tensor
    weights: Tensor | None

    def apply(self, given: Tensor) -> tuple[Tensor, Tensor | None]:
        """A copy of ``given`` (N,) with the labels replaced, and the weights."""
        labels = given.clone()
        labels[self.samples] = self.labels
        return labels, self.weights


def read_corrections(path: Path, data: DataSet) -> Corrections:
    """A table with the columns path, suggested (or label) and, perhaps, weight, of training samples of ``data``.

    Samples that are not listed keep their labels, and have the weight 1.

    Raises:
        UsageError: the table cannot be read, or a row is of no sample or class, of a sample that has a row already, of
            a path that several samples have, or its weight is not >= 0; it names the row.
    """
    columns, rows = read_table(path, ("path",), ("suggested", "label", "weight"))
    labels = columns.get("suggested", columns.get("label"))
    if labels is None:
        raise UsageError(f"{path} must have a column suggested or label, got {', '.join(columns)}")
    paths = data.paths("train")
    known = _places(paths)
    if any(name not in known for name in columns["path"]):  # as where it was written from another working folder
        known = _places(map(os.path.abspath, paths)) | known
    numbers = class_labels(labels, data.names)
    samples: dict[int, int] = {}  # and the row of each
    weights = torch.ones(len(paths)) if "weight" in columns else None
    for i, (row, name) in enumerate(zip(rows, columns["path"], strict=True)):
        place = f"{path}, row {row}"
        found = known.get(name, known.get(os.path.abspath(name), []))
        if not found:
            raise UsageError(f"{place}: {data.name} has no training sample {name!r}")
        if len(found) > 1:
            raise UsageError(f"{place}: {data.name} has {len(found)} training samples {name!r}, must have one")
        if found[0] in samples:
            raise UsageError(f"{place}: the sample {name!r} is in row {samples[found[0]]} already")
        if numbers[i] < 0:
            raise UsageError(f"{place}: {data.name} has no class {labels[i]!r}")
        samples[found[0]] = row
        if weights is not None:
            weights[found[0]] = _weight(columns["weight"][i], place)
    return Corrections(torch.tensor(list(samples)), numbers, weights)


def _places(paths: Iterable[str]) -> dict[str, list[int]]:
    """Which samples have each path."""
    places: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        places.setdefault(path, []).append(i)
    return places


def _weight(text: str, place: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UsageError(f"{place}: the weight must be a number >= 0, got {text!r}")
    return weight
