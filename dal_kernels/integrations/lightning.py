"""PyTorch Lightning. The two lines, in the module's ``__init__`` and in the Trainer:

    self.criterion = DynamicsAwareLoss(total_steps=epochs)  # instead of nn.CrossEntropyLoss()
    callbacks=[ScheduleCallback()]

The criterion has no parameters, so DDP has nothing of it to average: each process paces q by its own share of a batch,
the callback averages over them what they have learnt, once an epoch, and equal shares give the gradient of the whole.
``torch.compile(module)`` takes the loss into its graph and compiles nothing again as q grows. Run with lightning 2.6.6,
torch 2.13.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from dal_kernels.listening import ListeningLoss

__all__ = ["ScheduleCallback"]

Interval = Literal["epoch", "step"]


class ScheduleCallback(Callback):
    """Sets the schedules of all losses of dal_kernels in a LightningModule to where Lightning's training is.

    A training resumed in the middle of an epoch begins without a call for that epoch: there the position comes from the
    checkpoint, because the losses are part of the module.

    Args:
        interval: what ``total_steps`` of the losses counts: "epoch", or "step", the steps of the optimiser.

    Raises:
        ValueError: ``interval`` is neither; or, as the training starts, no loss in the module has a schedule.
    """

    def __init__(self, interval: Interval = "epoch") -> None:
        if interval not in get_args(Interval):
            raise ValueError(f"interval must be one of {', '.join(get_args(Interval))}, got {interval!r}")
        self.interval = interval

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _scheduled(pl_module):
            raise ValueError(
                f"ScheduleCallback needs a loss of dal_kernels with a schedule as an attribute of the module, got none "
                f"in {type(pl_module).__name__}"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for loss in _scheduled(pl_module):
            if self.interval == "epoch":
                loss.step(trainer.current_epoch)
            if hasattr(loss.schedule, "synchronize"):
                loss.schedule.synchronize()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.interval == "step":
            for loss in _scheduled(pl_module):
                loss.step(trainer.global_step)


def _scheduled(module: LightningModule) -> list[ListeningLoss]:
    return [part for part in module.modules() if isinstance(part, ListeningLoss) and part.schedule is not None]
