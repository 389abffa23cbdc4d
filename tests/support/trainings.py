"""What tests of the trainer share: what they need, small data, and what a run leaves."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dal_kernels.training.data.base import DataSet, TensorImages
from dal_kernels.training.metrics import TIMINGS
from dal_kernels.training.parallel import World
from dal_kernels.training.recipes import recipe_for
from dal_kernels.training.run import CHECKPOINT
from dal_kernels.training.train import Trainer

ALONE = World(0, 1, torch.device("cpu"))


def needs_training() -> None:
    """Skip what calls this where the extra dal_kernels[training] is not installed."""
    for module in ("matplotlib", "numpy", "PIL", "sklearn", "tabulate", "tqdm"):
        pytest.importorskip(module, reason=f"the extra dal_kernels[training]: {module} is not installed")


def rows_of(path: Path) -> list[dict[str, str]]:
    """Of a CSV file, by the names of its columns."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def data_of(labels: Tensor, classes: int, inputs: Tensor | None = None, flips: Tensor | None = None) -> DataSet:
    """A clean data set; by default each input is its label."""
    images = TensorImages(labels[:, None].float() if inputs is None else inputs)
    return DataSet("made-up", classes, images, labels, labels, images, labels, flips)


def saved(folder: Path) -> dict[str, Any]:
    """The checkpoint of the one run below a folder, without what took time."""
    (path,) = folder.glob(f"*/*/{CHECKPOINT}")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    state["history"] = [{k: v for k, v in epoch.items() if k not in TIMINGS} for epoch in state["history"]]
    return state


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same history and state, bit by bit."""
    assert str(found["history"]) == str(expected["history"]), "as text, for NaN does not equal itself"
    assert found["scheduler"] == expected["scheduler"]
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=0, atol=0)
    for name, weights in expected["network"].items():
        assert torch.equal(found["network"][name], weights), name
    for name, state in expected["optimizer"]["state"].items():
        assert torch.equal(found["optimizer"]["state"][name]["momentum_buffer"], state["momentum_buffer"])


def trainer_on(data: DataSet, loss: str = "dal", **changes: Any) -> Trainer:
    return Trainer(recipe_for("digits", **changes), data, data.train_labels, loss, 0, 0, ALONE)
