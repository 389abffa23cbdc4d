"""What is kept of a run, in memory and in files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from dal_kernels.training.atomic import replacing
from dal_kernels.training.inspection import Inspection
from dal_kernels.training.metrics import EpochMetrics
from dal_kernels.training.noise import Noise

__all__ = ["Run", "write_classes", "write_metrics", "write_rows"]


@dataclass(frozen=True)
class Run:
    """One network trained.

    ``measured_noise`` is the share of wrong labels among those whose truth is known, before a file of labels
    ``corrected`` them; ``made_by`` says how it was trained, more than one thing if it was resumed in another way;
    ``inspections`` is of its labels, if they were ``inspected``.
    """

    data: str
    noise: Noise
    measured_noise: float
    loss: str
    seed: int
    history: list[EpochMetrics] = field(default_factory=list, repr=False)
    made_by: list[dict[str, str]] = field(default_factory=list, repr=False)
    inspections: list[Inspection] = field(default_factory=list, repr=False, compare=False)
    corrected: bool = False
    inspected: bool = False

    @property
    def folder(self) -> str:
        """A name of its own among the runs on one data set, good in any file system."""
        # An inspection would otherwise take the place of the network that train made in the same output.
        kind = "-corrected" * self.corrected + "-inspected" * self.inspected
        return quote(f"{self.noise}-{self.loss}-seed{self.seed}{kind}".replace(":", "-", 1), safe="")

    def rows(self) -> list[dict[str, Any]]:
        """A row for each epoch; noise as the command line takes it."""
        key = {name: value for name, value in vars(self).items() if name not in ("history", "made_by", "inspections")}
        return [{**key, "noise": str(self.noise), **vars(metrics)} for metrics in self.history]


def write_metrics(path: Path, runs: Iterable[Run]) -> list[Path]:
    """Write a line for each epoch, as CSV and as JSON lines (where not-a-number is NaN); gives the two files."""
    rows = [row for run in runs for row in run.rows()]
    as_csv, as_json = (path.with_name(f"{path.name}.{kind}") for kind in ("csv", "jsonl"))  # a dot may be in its name
    with replacing(as_csv) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with replacing(as_json) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [as_csv, as_json]


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write a CSV file; gives its path."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_classes(
    folder: Path, labels: Tensor, prediction: Tensor, names: Sequence[str], prefix: str = ""
) -> list[Path]:
    """Write classes.csv, how many samples of each class there are and how many are told, and confusion.csv, how many
    samples of each class are taken for which, of the pairs that there are.

    Args:
        labels, prediction: (M,) int64, in [0, C).
        names: (C,).
        prefix: what the files' names begin with.
    """
    labelled, predictions = (torch.bincount(classes, minlength=len(names)).tolist() for classes in (labels, prediction))
    right = torch.bincount(labels[labels == prediction], minlength=len(names)).tolist()
    rows = [
        (name, count, hits, hits / count if count else "", predicted)
        for name, count, hits, predicted in zip(names, labelled, right, predictions, strict=True)
    ]
    pairs, counts = torch.stack([labels, prediction], 1).unique(dim=0, return_counts=True)
    confusion = [(names[a], names[b], count) for (a, b), count in zip(pairs.tolist(), counts.tolist(), strict=True)]
    return [
        write_rows(folder / f"{prefix}classes.csv", ("class", "samples", "right", "accuracy", "predicted"), rows),
        write_rows(folder / f"{prefix}confusion.csv", ("label", "predicted", "samples"), confusion),
    ]
