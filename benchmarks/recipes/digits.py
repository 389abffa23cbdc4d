"""What the recipes train, and on what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.data import TensorDataset

from dal_kernels.noise import symmetric_noise
from dal_kernels.training.data import load_data
from dal_kernels.training.models import build_model
from dal_kernels.training.recipes import PRESETS

__all__ = ["digits_model", "noisy_digits", "show"]

WRONG = 0.4


def noisy_digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's digits to train on, 40 % of the labels wrong, and to test on, clean.

    Images are (1, 8, 8) float32, standardised; labels int64, 0 to 9.
    """
    data = load_data("digits")
    given = symmetric_noise(data.train_labels, WRONG, data.classes, torch.Generator().manual_seed(0))
    train, test = (part.batch(range(len(part)), train=False).unsqueeze(1) for part in (data.train, data.test))
    return TensorDataset(train, given), TensorDataset(test, data.test_labels)


def digits_model() -> nn.Module:
    """The MLP of the preset for digits: (N, 1, 8, 8) -> (N, 10) logits."""
    return build_model(PRESETS["digits"], (1, 8, 8), 10, seed=0)


def show(train: Callable[[Path], float]) -> None:
    """Run a recipe in a folder that is thrown away, and print what it reached."""
    with TemporaryDirectory() as folder:
        print(f"trained on {WRONG:.0%} wrong labels, right on {train(Path(folder)):.1%} of the clean test images")
