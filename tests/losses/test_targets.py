"""Labels that are smoothed, soft or mixed, against sums of the losses of plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dal_kernels import (
    DynamicsAwareLoss,
    LinearLoss,
    cross_entropy_loss,
    dynamics_aware_loss,
    generalized_cross_entropy_loss,
)
from dal_kernels.functional import loss_of
from dal_kernels.objective import Objective
from dal_kernels.objectives import OBJECTIVES
from dal_kernels.variations import varied_loss
from support.axes import objectives
from support.family import KNOBS, close, rows_of


@objectives
def test_smoothed_labels_are_a_mixture_with_the_uniform_one(backend: str, objective: Objective) -> None:
    logits, target = rows_of(8, 6)
    logits.requires_grad_()
    knobs, classes, share = KNOBS[objective.name], 6, 0.2
    if not objective.affine:
        with pytest.raises(ValueError, match="label_smoothing must be 0"):
            varied_loss(objective, knobs, logits, target, label_smoothing=share)
        return
    of_classes = [
        loss_of(objective.id, knobs, logits, torch.full_like(target, k), reduction="none", backend="eager")
        for k in range(classes)
    ]
    own = loss_of(objective.id, knobs, logits, target, reduction="none", backend="eager")
    expected = (1 - share) * own + share / classes * torch.stack(of_classes).sum(0)
    found = varied_loss(objective, knobs, logits, target, label_smoothing=share, reduction="none", backend=backend)
    close(found, expected, logits)


@objectives
@pytest.mark.parametrize("weighted", [False, True])
def test_soft_targets_are_a_sum_over_classes(objective: Objective, weighted: bool) -> None:
    logits, _ = rows_of(8, 6)
    logits.requires_grad_()
    shares = torch.rand(8, 6, dtype=torch.float64).softmax(1)
    shares[0] = F.one_hot(torch.tensor(2), 6)
    weight = torch.linspace(0.5, 1.5, 6, dtype=torch.float64) if weighted else None
    knobs = KNOBS[objective.name]
    of_classes = [
        loss_of(objective.id, knobs, logits, torch.full((8,), k), reduction="none", backend="eager", weight=weight)
        for k in range(6)
    ]
    expected = (shares * torch.stack(of_classes, 1)).sum(1)
    found = varied_loss(objective, knobs, logits, shares, reduction="none", weight=weight)
    close(found, expected, logits)


@objectives
@pytest.mark.parametrize(
    "share",
    [0.3, torch.tensor(0.3, dtype=torch.float64), torch.linspace(0, 1, 8, dtype=torch.float64)],
    ids=["number", "0-d", "rows"],
)
def test_mixed_targets_are_a_sum_of_two_losses(backend: str, objective: Objective, share: Any) -> None:
    logits, target = rows_of(8, 6)
    logits.requires_grad_()
    other = target.roll(3)
    other[2] = -100
    knobs = KNOBS[objective.name]
    first, second = (
        loss_of(objective.id, knobs, logits, of, reduction="none", backend="eager") for of in (target, other)
    )
    expected = share * first + (1 - share) * second
    found = varied_loss(objective, knobs, logits, target, mix=(other, share), reduction="none", backend=backend)
    close(found, expected, logits)
    mean = varied_loss(objective, knobs, logits, target, mix=(other, share), backend=backend)
    counted = torch.as_tensor(share).expand(8) + (1 - torch.as_tensor(share)) * (other != -100)
    torch.testing.assert_close(mean, expected.sum() / counted.double().sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"), [({"reduction": "avg"}, "reduction must be"), ({"backend": "cup"}, "backend must be")]
)
def test_plain_ways_check_what_the_kernels_do(options: dict[str, Any], message: str) -> None:
    """Soft targets, and label smoothing with class weights, run beside the kernels and their checks."""
    logits, target = rows_of(8, 6)
    with pytest.raises(ValueError, match=message):
        generalized_cross_entropy_loss(logits, logits.softmax(1), **options)
    with pytest.raises(ValueError, match=message):
        cross_entropy_loss(logits, target, 0.1, weight=torch.ones(6, dtype=torch.float64), **options)


def test_statistics_of_smoothed_and_weighted_rows_that_are_ignored() -> None:
    logits, target = rows_of(8, 6)
    target[2] = 255
    options: dict[str, Any] = {"weight": torch.linspace(0.5, 2, 6).double(), "ignore_index": 255}
    loss, stats = cross_entropy_loss(logits, target, 0.1, return_stats=True, **options)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, label_smoothing=0.1, **options))
    assert stats.target_prob.isnan().tolist() == [row == 2 for row in range(8)]


def test_dal_takes_what_the_family_takes() -> None:
    logits, target = rows_of(8, 6)
    logits.requires_grad_()
    other, shares = target.roll(1), torch.rand(8, 6, dtype=torch.float64).softmax(1)
    schedule = {"q_start": 1.2, "q_end": 1.2, "total_steps": 1, "pace": "fixed"}
    module = DynamicsAwareLoss(**schedule)
    q, weight = module.q, module.bootstrap_weight
    mixed = 0.3 * dynamics_aware_loss(logits, target, q, weight) + 0.7 * dynamics_aware_loss(logits, other, q, weight)
    close(module(logits, target, mix=(other, 0.3)), mixed, logits)
    close(module(logits, shares), varied_loss(OBJECTIVES[0], (q, weight), logits, shares), logits)
    scaled = dynamics_aware_loss(2 * (logits + F.one_hot(target, 6)), target, q, weight)
    close(DynamicsAwareLoss(**schedule, target_shift=1.0, scale=2.0)(logits, target), scaled, logits)
    form = LinearLoss(DynamicsAwareLoss(**schedule, target_shift=1.0, scale=2.0), 3, 6).double()
    features = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    logits = form.classifier(features)
    scaled = dynamics_aware_loss(2 * (logits + F.one_hot(target, 6)), target, q, weight)
    close(form(features, target), scaled, features)
