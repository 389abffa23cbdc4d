"""Losses as users write them for the trainer, which finds them by name: right ones and wrong ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Stepping(nn.Module):
    """A loss from elsewhere, with a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def step(self) -> None:
        self.steps += 1

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(input, target)


def a_factory(label_smoothing: float = 0.0) -> nn.Module:
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)


def plain(*args: Tensor) -> Tensor:
    return nn.functional.cross_entropy(*args)


def per_sample(input: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(input, target, reduction="none")


def detached(input: Tensor, target: Tensor) -> Tensor:
    return plain(input, target).detach()


def a_float(input: Tensor, target: Tensor) -> float:
    return plain(input, target).item()


an_instance = nn.CrossEntropyLoss()
not_a_loss = 3


def makes_no_loss() -> int:
    return 3


class Trainable(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)


class Forgetful:
    """Has a schedule that no checkpoint could hold."""

    def step(self) -> None: ...

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        return plain(input, target)
