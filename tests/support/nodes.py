"""Run by torchrun, each process with a folder of its own: a training by labels of a file, and one stopped after two
epochs and resumed.

As on nodes that share no disk: only the first process finds what it wrote.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

from dal_kernels.training import TrainingConfig, UsageError, run_training
from dal_kernels.training.metrics import EpochMetrics
from dal_kernels.training.run import CHECKPOINT
from dal_kernels.training.train import Trainer

EPOCHS, STOP = 4, 2


class StoppedError(Exception):
    pass


def stopping(trainer: Trainer, tick: Callable[[], object]) -> EpochMetrics:
    if len(trainer.history) == STOP:
        raise StoppedError
    return run_epoch(trainer, tick)


run_epoch = Trainer.run_epoch
out = Path(sys.argv[1]) / os.environ["RANK"]
left_alone = TrainingConfig(
    noise=("0.4",),
    losses=("dal",),
    seeds=(0,),
    changes={"epochs": EPOCHS, "momentum": 0.9},
    out=out / "left alone",
    verbose=False,
)
stopped = replace(left_alone, out=out / "stopped")
first = run_training(left_alone).runs[0]
labels = out / "left alone" / first.data / first.folder / "labels.npz"
run_training(replace(left_alone, noise=(f"file:{labels}",), changes={"epochs": 1}, out=None))
try:
    with mock.patch.object(Trainer, "run_epoch", stopping):
        run_training(stopped)
except StoppedError:
    pass
assert len(run_training(replace(stopped, resume=True)).runs[0].history) == EPOCHS

for path in out.glob(f"stopped/*/*/{CHECKPOINT}"):
    spoilt = out / "spoilt" / path.relative_to(out / "stopped")
    spoilt.parent.mkdir(parents=True)
    spoilt.write_bytes(b"not a checkpoint")
try:
    run_training(replace(stopped, out=out / "spoilt", resume=True))
except UsageError as error:
    out.with_suffix(".error").write_text(str(error), encoding="utf-8")
