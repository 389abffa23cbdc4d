"""A target shift that fades: easy labels for an untrained network of many classes, none once q has reached 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dal_kernels import DynamicsAwareLoss, DynamicsAwareSchedule, LinearDynamicsAwareLoss, dynamics_aware_loss


@pytest.mark.parametrize(("classes", "prob"), [(3, 1 / 3), (10, 0.1), (11, 0.1), (1000, 0.1)])
def test_labels_start_as_with_ten_classes(classes: int, prob: float, backend: str) -> None:
    criterion = DynamicsAwareLoss(total_steps=9, pace="fixed", target_shift="fading", backend=backend)
    for shape in ((4, classes), (2, classes, 5)):
        logits = torch.zeros(shape, requires_grad=True)
        target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
        _, stats = criterion(logits, target, return_stats=True)
        torch.testing.assert_close(stats.target_prob, torch.full(target.shape, prob))


@pytest.mark.parametrize(("position", "share"), [(0, 1.0), (2, 0.5), (4, 0.0), (9, 0.0)])
def test_the_shift_falls_until_q_is_1(position: int, share: float, backend: str) -> None:
    criterion = DynamicsAwareLoss(0.6, 1.5, total_steps=9, pace="fixed", target_shift="fading", backend=backend)
    criterion.step(position)
    logits = torch.randn(5, 91, requires_grad=True)
    target = torch.randint(91, (5,))
    loss = criterion(logits, target)
    loss.backward()
    other = logits.detach().clone().requires_grad_()
    expected = dynamics_aware_loss(
        other, target, criterion.q, criterion.bootstrap_weight, target_shift=share * math.log(10), backend=backend
    )
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, other.grad)


def test_compiled_code_sees_it_fade() -> None:
    criterion = DynamicsAwareLoss(total_steps=9, pace="fixed", target_shift="fading")
    logits, target = torch.randn(5, 91), torch.randint(91, (5,))
    compiled = torch.compile(lambda z: criterion(z, target), backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for position in (0, 2, 7):
            criterion.step(position)
            torch.testing.assert_close(compiled(logits), criterion(logits, target))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"total_steps": 4}, "takes a schedule of the pace 'fixed' whose q_start is below 1, got SelfPacedSchedule"),
        ({"schedule": DynamicsAwareSchedule(1.0, 1.5, 4)}, "whose q_start is below 1, got DynamicsAware"),
        (
            {"total_steps": 4, "pace": "fixed", "target_shift": "fade"},
            "target_shift must be a number, a tensor or 'fading', got 'fade'",
        ),
    ],
)
def test_where_it_cannot_be_it_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DynamicsAwareLoss(**{"target_shift": "fading", **settings})


def test_the_layer_has_none() -> None:
    with pytest.raises(TypeError, match="target_shift"):
        LinearDynamicsAwareLoss(4, 20, total_steps=3, target_shift="fading")  # type: ignore[call-overload]
