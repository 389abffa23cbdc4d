"""A whole training by the Hugging Face Trainer; dal_kernels.integrations.transformers says what matters."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import default_collate
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.recipes.digits import noisy_digits, show
from dal_kernels import DynamicsAwareLoss
from dal_kernels.integrations.transformers import ScheduleCallback, loss_function


def make_trainer(args: TrainingArguments) -> Trainer:
    """A small convolutional network on digits; the schedule spans the whole training, however ``args`` gives it."""
    set_seed(args.seed)
    train_set, test_set = noisy_digits()
    config = ConvNextConfig(
        num_channels=1, patch_size=2, num_stages=2, hidden_sizes=[32, 64], depths=[1, 1], num_labels=10
    )
    criterion = DynamicsAwareLoss(total_steps=1)
    return Trainer(
        ConvNextForImageClassification(config),
        args,
        train_dataset=train_set,
        eval_dataset=test_set,
        data_collator=lambda samples: dict(zip(("pixel_values", "labels"), default_collate(samples), strict=True)),
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
        compute_loss_func=loss_function(criterion),
        callbacks=[ScheduleCallback(criterion)],
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
