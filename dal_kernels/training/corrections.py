"""Labels that replace those of a data set: what an inspection suggested, or a person put right."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dal_kernels.training.data.base import DataSet
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
        UsageError: the table cannot be read, or a row is of no sample or class, or its weight is not >= 0; it names
            the row.
    """
    columns = read_table(path, ("path",), ("suggested", "label", "weight"))
    labels = columns.get("suggested", columns.get("label"))
    if labels is None:
        raise UsageError(f"{path} must have a column suggested or label, got {', '.join(columns)}")
    paths = data.paths("train")
    known = {name: i for i, name in enumerate(paths)}
    if any(name not in known for name in columns["path"]):  # as where it was written from another working folder
        known = {os.path.abspath(name): i for name, i in known.items()} | known
    classes = {name: i for i, name in enumerate(data.names)}
    samples, numbers = [], []
    weights = torch.ones(len(paths)) if "weight" in columns else None
    for row, (name, label) in enumerate(zip(columns["path"], labels, strict=True), start=1):
        sample = known.get(name, known.get(os.path.abspath(name)))
        if sample is None:
            raise UsageError(f"{path}, row {row}: {data.name} has no training sample {name!r}")
        if label not in classes:
            raise UsageError(f"{path}, row {row}: {data.name} has no class {label!r}")
        samples.append(sample)
        numbers.append(classes[label])
        if weights is not None:
            weights[sample] = _weight(columns["weight"][row - 1], f"{path}, row {row}")
    return Corrections(torch.tensor(samples), torch.tensor(numbers), weights)


def _weight(text: str, place: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UsageError(f"{place}: the weight must be a number >= 0, got {text!r}")
    return weight
