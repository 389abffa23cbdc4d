"""What is kept of a run, in memory and as CSV."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.training.train import EpochMetrics

__all__ = ["Run", "append_csv"]


@dataclass(frozen=True)
class Run:
    """One network trained. ``noise`` is the rate asked for, ``measured_noise`` what the labels became."""

    data: str
    noise: float
    measured_noise: float
    loss: str
    seed: int
    history: list[EpochMetrics] = field(default_factory=list, repr=False)


def append_csv(path: Path, run: Run, new: bool) -> None:
    """Write a line for each epoch of ``run``, after those already in the file unless it is to be a new one."""
    key = {name: value for name, value in vars(run).items() if name != "history"}
    rows = [{**key, **vars(metrics)} for metrics in run.history]
    with path.open("w" if new else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
