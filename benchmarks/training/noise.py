"""Label noise, seeded by a generator of its own."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from benchmarks.training.errors import UsageError

__all__ = ["noise_rate", "symmetric_noise"]


def symmetric_noise(labels: Tensor, rate: float, classes: int, generator: Generator) -> Tensor:
    """A copy of ``labels`` of which exactly ``round(rate * N)`` are wrong.

    A flipped label is drawn uniformly from the *other* classes, so ``rate`` is the share of wrong labels. Some authors,
    DAL's among them, draw from all classes, the true one too: their "40 %" of 10 classes is 36 % wrong.
    """
    if not 0 <= rate < 1:
        raise UsageError(f"the noise rate must be in [0, 1), got {rate}")
    if classes < 2:
        raise UsageError(f"symmetric noise needs at least 2 classes, got {classes}")
    flipped = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
    shift = torch.randint(1, classes, (len(flipped),), generator=generator)
    noisy = labels.clone()
    noisy[flipped] = (labels[flipped] + shift) % classes
    return noisy


def noise_rate(given: Tensor, true: Tensor) -> float:
    """The share of labels that are wrong, in [0, 1]."""
    return (given != true).double().mean().item()
