"""What tests of the trainer share: what they need, a world of one process, and the tables that a run leaves."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from dal_kernels.training.parallel import World

ALONE = World(0, 1, torch.device("cpu"))


def needs_training() -> None:
    """Skip what calls this where the extra dal_kernels[training] is not installed."""
    for module in ("matplotlib", "numpy", "PIL", "sklearn", "tabulate", "tqdm"):
        pytest.importorskip(module, reason=f"the extra dal_kernels[training]: {module} is not installed")


def rows_of(path: Path) -> list[dict[str, str]]:
    """Of a CSV file, by the names of its columns."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
