"""Digits with random noise on each training image, so that a run depends on the state of the random numbers.

Run as a script it is the command line of the training benchmark, which then knows this data set; the first argument
is the epoch, from 1, in the middle of which the process kills itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dal_kernels.training import main
from dal_kernels.training.data import DATA, DataSet
from dal_kernels.training.data.base import TensorImages
from dal_kernels.training.data.digits import digits
from dal_kernels.training.metrics import EpochMetrics
from dal_kernels.training.train import Trainer


def jitter(batch: Tensor) -> Tensor:
    return batch + 0.3 * torch.randn(batch.shape)


def jittered(folder: Path | None = None) -> DataSet:
    data = digits(folder)
    assert isinstance(data.train, TensorImages)
    return replace(data, name="jittered", train=replace(data.train, augment=jitter))


def killing(epoch: int) -> Callable[[Trainer, Callable[[], object]], EpochMetrics]:
    """Trainer.run_epoch, but in the middle of ``epoch`` the process is gone, as when its machine is switched off."""
    run_epoch = Trainer.run_epoch

    def killed(trainer: Trainer, tick: Callable[[], object]) -> EpochMetrics:
        batches = iter(range(len(trainer.batches) // 2))

        def count() -> None:
            tick()
            if next(batches, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        return run_epoch(trainer, count if len(trainer.history) + 1 == epoch else tick)

    return killed


if __name__ == "__main__":
    DATA["jittered"] = jittered
    Trainer.run_epoch = killing(int(sys.argv.pop(1)))  # type: ignore[method-assign]
    sys.exit(main())
