"""Calls that a schedule follows, and what it must have learnt of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS, CLASSES, FEATURES = 12, 7, 5
CALLS = 9


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(ROWS, CLASSES, generator=generator)
    return logits.requires_grad_(), torch.randint(CLASSES, (ROWS,), generator=generator)


def averages(criterion: Any) -> list[float]:
    state = criterion.schedule.state_dict()
    return [state["confidence"], state["agreement"]]


def expected_averages(batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """In float64, from softmax and argmax."""
    confidence = agreement = 1e-6
    for logits, target in batches:
        prob = logits.detach().double().softmax(1)
        confidence += 0.05 * (prob.amax(1).mean().item() - confidence)
        agreement += 0.05 * ((prob.argmax(1) == target).double().mean().item() - agreement)
    return [confidence, agreement]
