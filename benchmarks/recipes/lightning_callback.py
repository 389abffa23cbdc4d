"""A whole training by PyTorch Lightning; dal_kernels.integrations.lightning says what matters."""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.recipes.digits import digits_model, noisy_digits, show
from dal_kernels import DynamicsAwareLoss
from dal_kernels.integrations.lightning import ScheduleCallback


class Classifier(lightning.LightningModule):
    """A network of 64 - 256 - 128 - 10 whose loss is DAL over so many epochs."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.model = digits_model()
        self.criterion = DynamicsAwareLoss(total_steps=epochs)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return self.criterion(self.model(images), labels)

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).double().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, epochs: int = 30, resume: bool = False) -> float:
    """Train with a checkpoint an epoch in ``folder``, with ``resume`` from the last; the share of right test images."""
    lightning.seed_everything(0, verbose=False)
    train_set, test_set = noisy_digits()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[ScheduleCallback(), ModelCheckpoint(folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Classifier(epochs),
        DataLoader(train_set, batch_size=32, shuffle=True),
        DataLoader(test_set, batch_size=len(test_set)),
        ckpt_path="last" if resume else None,
    )
    return trainer.callback_metrics["accuracy"].item()


if __name__ == "__main__":
    show(train)
