"""One training run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from benchmarks.training.data import DataSet
from benchmarks.training.losses import end_epoch, exponents
from benchmarks.training.metrics import memorisation, predict, share
from benchmarks.training.recipes import Recipe

__all__ = ["EpochMetrics", "train"]


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch, counted from 1. Shares are in [0, 1] and NaN where there is nothing to count.

    Attributes:
        train_loss: mean over the epoch's samples while the weights move; not comparable between losses.
        test_accuracy: on the clean test set, after the epoch.
        memorised: share of the wrong-labelled training samples predicted as their wrong label, after the epoch.
        mislabelled_right: share of the same samples predicted as their true class.
        q, bootstrap_weight: what the loss used in the epoch; NaN if it has no such parameter.
        learning_rate: used in the epoch.
    """

    epoch: int
    train_loss: float
    test_accuracy: float
    memorised: float
    mislabelled_right: float
    q: float
    bootstrap_weight: float
    learning_rate: float


def train(
    model: nn.Module,
    criterion: nn.Module,
    data: DataSet,
    given: Tensor,
    recipe: Recipe,
    epochs: int,
    generator: Generator,
) -> Iterator[EpochMetrics]:
    """Train ``model`` in place on the labels ``given``; yields after each epoch.

    ``generator`` (CPU) orders the batches. ``data``, ``given`` and ``model`` are on one device.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs) if recipe.cosine else None
    # Only these are looked at for memorisation; predicting the others would be wasted.
    wrong = given != data.train_labels
    wrong_inputs, wrong_given, wrong_true = data.train_inputs[wrong], given[wrong], data.train_labels[wrong]

    for epoch in range(1, epochs + 1):
        q, bootstrap_weight = exponents(criterion)
        learning_rate = optimizer.param_groups[0]["lr"]
        total = _train_epoch(model, criterion, optimizer, data.train_inputs, given, recipe.batch_size, generator)
        end_epoch(criterion)
        if annealing is not None:
            annealing.step()
        memorised, right = memorisation(predict(model, wrong_inputs), wrong_given, wrong_true)
        yield EpochMetrics(
            epoch=epoch,
            train_loss=total / len(given),
            test_accuracy=share(predict(model, data.test_inputs) == data.test_labels),
            memorised=memorised,
            mislabelled_right=right,
            q=q,
            bootstrap_weight=bootstrap_weight,
            learning_rate=learning_rate,
        )


def _train_epoch(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    given: Tensor,
    batch_size: int,
    generator: Generator,
) -> float:
    """One pass in random order; the sum of the samples' losses."""
    total = torch.zeros((), device=inputs.device)  # summed on the device: no synchronisation per batch
    order = torch.randperm(len(given), generator=generator).to(inputs.device)
    for rows in order.split(batch_size):
        loss = criterion(model(inputs[rows]), given[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(rows)
    return total.item()
