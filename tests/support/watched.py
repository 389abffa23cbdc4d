"""Calls of a loss as in a training, for the tests of what it warns of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import DynamicsAwareLoss

CLASSES, ROWS = 20, 40
TARGET = torch.arange(ROWS) % CLASSES


def logits(sure: float = 6.0) -> Tensor:
    """Of a network that has learnt the labels, or with 0 nothing."""
    return (sure * F.one_hot(TARGET, CLASSES).float()).requires_grad_()


def train(criterion: Any, calls: int = 3, sure: float = 6.0) -> None:
    for _ in range(calls):
        criterion(logits(sure), TARGET)


def evaluate(criterion: Any) -> None:
    with torch.no_grad():
        criterion(logits(), TARGET)


def epochs_without_a_step(criterion: Any) -> None:
    """More than any schedule is given before it is said to be never stepped."""
    for _ in range(12):
        train(criterion)
        evaluate(criterion)


def fixed(total_steps: float = 10, **options: Any) -> DynamicsAwareLoss:
    return DynamicsAwareLoss(total_steps=total_steps, pace="fixed", **options)


def past_one(criterion: Any, sure: float, epochs: int = 8, calls: int = 2) -> None:
    """Ten epochs would be all; q passes 1 in the fifth."""
    for _ in range(epochs):
        train(criterion, calls, sure)
        criterion.step()
