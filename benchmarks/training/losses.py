"""The losses under comparison: each a criterion(logits, labels) made for a number of epochs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from dal_kernels import DynamicsAwareLoss, dynamics_aware_loss

__all__ = ["LOSSES", "GeneralisedCrossEntropy", "LossSpec", "end_epoch", "exponents"]


class GeneralisedCrossEntropy(nn.Module):
    """GCE, (1 - p_y^q) / q with constant q: DAL without its schedule and without its bootstrap term."""

    def __init__(self, q: float = 0.7) -> None:
        super().__init__()
        self.q = q

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return dynamics_aware_loss(input, target, self.q, bootstrap_weight=0.0)


@dataclass(frozen=True)
class LossSpec:
    """How a loss is called in print, and how it is made for a training of so many epochs."""

    title: str
    build: Callable[[int], nn.Module]


LOSSES = {
    "cross-entropy": LossSpec("cross-entropy", lambda epochs: nn.CrossEntropyLoss()),
    "gce": LossSpec("GCE", lambda epochs: GeneralisedCrossEntropy(0.7)),
    "dal": LossSpec("DAL", lambda epochs: DynamicsAwareLoss(0.6, 1.5, total_steps=epochs)),
}


def end_epoch(criterion: nn.Module) -> None:
    """Advance a loss that has a schedule; called after each epoch, so the first trains at position 0."""
    if isinstance(criterion, DynamicsAwareLoss):
        criterion.step()


def exponents(criterion: nn.Module) -> tuple[float, float]:
    """(q, bootstrap_weight) at this moment; NaN for a loss that has none."""
    if isinstance(criterion, DynamicsAwareLoss):
        return criterion.schedule.q, criterion.schedule.bootstrap_weight
    if isinstance(criterion, GeneralisedCrossEntropy):
        return criterion.q, 0.0
    return math.nan, math.nan
