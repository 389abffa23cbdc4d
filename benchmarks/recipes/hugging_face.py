"""Hugging Face Trainer. The criterion, and the two lines in the Trainer:

    criterion = DynamicsAwareLoss(total_steps=1, reduction="sum")

    compute_loss_func=lambda outputs, labels, num_items_in_batch: criterion(outputs.logits, labels) / num_items_in_batch
    callbacks=[StepSchedule(criterion)]

The Trainer leaves the division to this function: ``num_items_in_batch`` counts the labels other than -100 in all the
batches of one optimiser step, on all processes. Evaluation calls it too. Run with transformers 5.24, torch 2.13.

The Trainer saves nothing of the criterion. Its position comes from the Trainer, and how far the network has come the
schedule sees again within some twenty batches, with a smaller q until then.

Read the log when you resume: a model whose weights transformers saves under other names than it trains them under (ViT
in this release) goes on with fresh ones, and only a warning of missing keys says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import default_collate
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from benchmarks.recipes.digits import noisy_digits, show
from dal_kernels import DynamicsAwareLoss


class StepSchedule(TrainerCallback):
    """Sets a loss's schedule to the share of the training that the Trainer has done, which it restores on resuming.

    By its count of optimiser steps, and of them in all: those are right with ``max_steps``, which ends a training
    whatever its number of epochs, and with gradient accumulation, where ``state.epoch`` counts micro-batches. The
    processes average what they have learnt once an epoch.
    """

    def __init__(self, criterion: DynamicsAwareLoss) -> None:
        self.criterion = criterion

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.criterion.step(state.global_step / state.max_steps)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.criterion.schedule.synchronize()


def make_trainer(args: TrainingArguments) -> Trainer:
    """A small convolutional network on digits; the schedule spans the whole training, however ``args`` gives it."""
    set_seed(args.seed)
    train_set, test_set = noisy_digits()
    config = ConvNextConfig(
        num_channels=1, patch_size=2, num_stages=2, hidden_sizes=[32, 64], depths=[1, 1], num_labels=10
    )
    criterion = DynamicsAwareLoss(total_steps=1, reduction="sum")
    return Trainer(
        ConvNextForImageClassification(config),
        args,
        train_dataset=train_set,
        eval_dataset=test_set,
        data_collator=lambda samples: dict(zip(("pixel_values", "labels"), default_collate(samples), strict=True)),
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
        compute_loss_func=lambda outputs, labels, num_items_in_batch: (
            criterion(outputs.logits, labels) / num_items_in_batch
        ),
        callbacks=[StepSchedule(criterion)],
    )


def train(folder: Path, epochs: int = 30, resume: bool = False) -> float:
    """Train with a checkpoint an epoch in ``folder``, with ``resume`` from the last; the share of right test images."""
    trainer = make_trainer(
        TrainingArguments(
            str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            learning_rate=5e-3,
            save_strategy="epoch",
            save_total_limit=1,
            logging_nan_inf_filter=False,  # else NaN is left out of the logged loss
            report_to="none",
            disable_tqdm=True,
        )
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.evaluate()["eval_accuracy"]


if __name__ == "__main__":
    show(train)
