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

    ``validate`` and ``get_preds`` train nothing and move nothing. A fit that ends early counts the epochs that it
    trained; one with a ``start_epoch`` goes on at that epoch, also in a new Learner.

    ``lr_find`` trains for a while and takes the weights back: what the schedule learnt meanwhile is taken back too. The
    processes of a distributed training average what they have learnt once an epoch.

    Raises:
        ValueError: as a fit begins, the Learner's ``loss_func`` is no loss of dal_kernels with a schedule.
    """

    def __init__(self) -> None:
        self.trained = 0  # epochs, of all fits
        self._before: dict[str, Any] | None = None

    def before_fit(self) -> None:
        loss = self.learn.loss_func
        if not isinstance(loss, ListeningLoss) or loss.schedule is None:
            raise ValueError(
                f"ScheduleCallback needs a loss_func of dal_kernels with a schedule, got {type(loss).__name__}"
            )
        self._before = loss.schedule.state_dict() if hasattr(self.learn, "lr_finder") else None

    # Not before_epoch and after_fit, because validate and get_preds call those too.
    def before_train(self) -> None:
        # A fit with a start_epoch skips the epochs before it, which this callback has counted already if it saw them.
        trained = max(self.trained, self.learn.epoch)
        if self._before is None:
            self.trained = trained
        loss = self.learn.loss_func
        loss.step(trained)
        if hasattr(loss.schedule, "synchronize"):
            loss.schedule.synchronize()

    def after_train(self) -> None:
        if self._before is None:
            self.trained += 1

    def after_fit(self) -> None:
        if self._before is not None:
            self.learn.loss_func.schedule.load_state_dict(self._before)
