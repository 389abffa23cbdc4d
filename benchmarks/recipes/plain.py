"""A plain loop. The two lines:

    criterion = DynamicsAwareLoss(total_steps=epochs)  # instead of nn.CrossEntropyLoss()
    criterion.step()  # after each epoch

The criterion's state dict holds the schedule's position: save it beside the model's. Run with torch 2.13 and 2.10.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks.recipes.digits import digits_model, noisy_digits, show
from dal_kernels import DynamicsAwareLoss


def train(folder: Path, epochs: int = 30, resume: bool = False) -> float:
    """Train with a checkpoint an epoch in ``folder``, with ``resume`` from the last; the share of right test images."""
    train_set, test_set = noisy_digits()
    model = digits_model()
    criterion = DynamicsAwareLoss(total_steps=epochs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = {"model": model, "criterion": criterion, "optimizer": optimizer}
    if resume:
        saved = torch.load(folder / "last.pt", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for epoch in range(int(criterion.schedule.position), epochs):
        torch.manual_seed(epoch)  # one order of batches an epoch, resumed or not
        for images, labels in DataLoader(train_set, batch_size=32, shuffle=True):
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        criterion.step()
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "last.pt")
    images, labels = test_set.tensors
    return (model(images).argmax(1) == labels).double().mean().item()


if __name__ == "__main__":
    show(train)
