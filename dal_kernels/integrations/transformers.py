"""Hugging Face Trainer. The criterion, and the two lines in the Trainer:

    criterion = DynamicsAwareLoss(total_steps=1)

    compute_loss_func=loss_function(criterion)
    callbacks=[ScheduleCallback(criterion)]

The Trainer saves nothing of the criterion: the callback saves its schedule, position and what it has learnt of the
network, in each checkpoint, and loads it from the one that is resumed from.

Read the log when you resume: a model whose weights transformers saves under other names than it trains them under (ViT
in 5.24) goes on with fresh ones, and only a warning of missing keys says so. Run with transformers 5.24, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dal_kernels.listening import ListeningLoss

__all__ = ["ScheduleCallback", "loss_function"]


def loss_function(criterion: ListeningLoss, causal: bool = False) -> Callable[..., Tensor]:
    """What the Trainer takes as ``compute_loss_func``: the criterion, summed, over ``num_items_in_batch``.

    The Trainer leaves this division to the function: the number counts the labels other than -100 in all the batches of
    one optimiser step, on all processes. Where it gives none, as in some evaluations, the mean is taken.

    Args:
        criterion: any loss of dal_kernels; its own ``reduction`` has no say.
        causal: whether the labels (B, T) are the inputs of a language model, logits (B, T, C), each of which is to be
            told from what is before it.
    """

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        if causal:
            labels = F.pad(labels, (0, 1), value=getattr(criterion, "ignore_index", -100))[..., 1:]
        if logits.ndim == labels.ndim + 1:  # classes are last here, and second in a loss
            logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        if num_items_in_batch is None:
            return criterion(logits, labels, reduction="mean")
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        return criterion(logits, labels, reduction="sum") / num_items_in_batch

    return compute_loss


class ScheduleCallback(TrainerCallback):
    """Sets a loss's schedule to the share of the training that the Trainer has done, which it restores on resuming.

    By its count of optimiser steps, and of them in all: those are right with ``max_steps``, which ends a training
    whatever its number of epochs, and with gradient accumulation, where ``state.epoch`` counts micro-batches. The
    processes average what they have learnt once an epoch.

    Args:
        criterion: its ``total_steps`` may be of any unit.
    """

    def __init__(self, criterion: ListeningLoss) -> None:
        self.criterion = criterion

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        path = _saved(args, state)
        if self.criterion.schedule is not None and state.is_world_process_zero and path.parent.is_dir():
            torch.save(self.criterion.schedule.state_dict(), path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = _saved(args, state)
        if self.criterion.schedule is not None and state.global_step > 0 and path.exists():
            self.criterion.schedule.load_state_dict(torch.load(path, weights_only=True))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        schedule = self.criterion.schedule
        if schedule is not None:
            self.criterion.step(schedule.total_steps * state.global_step / state.max_steps)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if hasattr(self.criterion.schedule, "synchronize"):
            self.criterion.schedule.synchronize()


def _saved(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the schedule is, in the Trainer's checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "dal_kernels_schedule.pt"
