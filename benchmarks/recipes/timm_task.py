"""A whole training by timm; dal_kernels.integrations.timm says what matters."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch.utils.data import DataLoader

from benchmarks.recipes.digits import noisy_digits, show
from dal_kernels import DynamicsAwareLoss
from dal_kernels.integrations.timm import MixupLoss


def train(folder: Path, epochs: int = 30, resume: bool = False) -> float:
    """Train with a checkpoint an epoch in ``folder``, with ``resume`` from the last; the share of right test images."""
    torch.manual_seed(0)
    train_set, test_set = noisy_digits()
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    task = ClassificationTask(model, criterion=MixupLoss(DynamicsAwareLoss(total_steps=epochs)), verbose=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    lr_scheduler = CosineLRScheduler(optimizer, t_initial=epochs)
    saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(folder), max_history=1)
    start = resume_task_checkpoint(task, folder / "last.pth.tar", optimizer, log_info=False) if resume else 0
    for epoch in range(start, epochs):
        torch.manual_seed(epoch)  # one order of batches an epoch, resumed or not
        lr_scheduler.step(epoch)
        task.criterion.step(epoch)
        for images, labels in DataLoader(train_set, batch_size=64, shuffle=True):
            loss = task(images, labels)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        saver.save_checkpoint(epoch)
    model.eval()
    evaluator = task.create_evaluator()
    with torch.no_grad():
        for images, labels in DataLoader(test_set, batch_size=len(test_set)):
            evaluator.update(model(images), labels)
    return evaluator.compute()["top1"] / 100


if __name__ == "__main__":
    show(train)
