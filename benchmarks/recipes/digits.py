"""What the recipes train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils.data import TensorDataset

from benchmarks.training.data import load_data
from benchmarks.training.noise import symmetric_noise

__all__ = ["noisy_digits", "show"]

WRONG = 0.4


def noisy_digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's digits to train on, 40 % of the labels wrong, and to test on, clean.

    Images are (1, 8, 8) float32, standardised; labels int64, 0 to 9.
    """
    data = load_data("digits")
    given = symmetric_noise(data.train_labels, WRONG, data.classes, torch.Generator().manual_seed(0))
    train, test = (part.batch(range(len(part)), train=False).unsqueeze(1) for part in (data.train, data.test))
    return TensorDataset(train, given), TensorDataset(test, data.test_labels)


def show(train: Callable[[Path], float]) -> None:
    """Run a recipe in a folder that is thrown away, and print what it reached."""
    with TemporaryDirectory() as folder:
        print(f"trained on {WRONG:.0%} wrong labels, right on {train(Path(folder)):.1%} of the clean test images")
