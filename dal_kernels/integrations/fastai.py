"""fastai. The two lines, where the Learner is made:

    loss_func=DynamicsAwareLoss(total_steps=epochs)  # instead of CrossEntropyLossFlat()
    cbs=ScheduleCallback()

``total_steps`` are the epochs of all fits together, those of ``fine_tune`` with frozen layers among them.
``Learner.save`` holds model and optimiser, not the loss: save ``learn.loss_func.state_dict()`` beside it, and load it
again, to go on as if nothing had been; ``Learner.export`` holds it. Run with fastai 2.8.12, torch 2.13.
"""

from __future__ import annotations

from typing import Any

from fastai.callback.core import Callback

from dal_kernels.listening import ListeningLoss

__all__ = ["ScheduleCallback"]


class ScheduleCallback(Callback):
    """Sets the schedule of the Learner's loss to the epochs that its fits have trained.

    ``lr_find`` trains for a while and takes the weights back: what the schedule learnt meanwhile is taken back too. The
    processes of a distributed training average what they have learnt once an epoch.

    Raises:
        ValueError: as a fit begins, the Learner's ``loss_func`` is no loss of dal_kernels with a schedule.
    """

    def __init__(self) -> None:
        self.trained = 0  # epochs of the fits before this one
        self._before: dict[str, Any] | None = None

    def before_fit(self) -> None:
        loss = self.learn.loss_func
        if not isinstance(loss, ListeningLoss) or loss.schedule is None:
            raise ValueError(
                f"ScheduleCallback needs a loss_func of dal_kernels with a schedule, got {type(loss).__name__}"
            )
        self._before = loss.schedule.state_dict() if hasattr(self.learn, "lr_finder") else None

    def before_epoch(self) -> None:
        loss = self.learn.loss_func
        loss.step(self.trained + self.learn.epoch)
        if hasattr(loss.schedule, "synchronize"):
            loss.schedule.synchronize()

    def after_fit(self) -> None:
        if self._before is None:
            self.trained += self.learn.n_epoch
        else:
            self.learn.loss_func.schedule.load_state_dict(self._before)
