"""Digits with random noise on each training image, so that a run depends on the state of the random numbers.

Run as a script it is the command line of the training benchmark, which then knows this data set.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.training import main
from benchmarks.training.data import DATA, DataSet
from benchmarks.training.data.base import TensorImages
from benchmarks.training.data.digits import digits


def jitter(batch: Tensor) -> Tensor:
    return batch + 0.3 * torch.randn(batch.shape)


def jittered(folder: Path | None = None) -> DataSet:
    data = digits(folder)
    assert isinstance(data.train, TensorImages)
    return replace(data, name="jittered", train=replace(data.train, augment=jitter))


if __name__ == "__main__":
    DATA["jittered"] = jittered
    sys.exit(main())
