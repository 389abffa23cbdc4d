"""The family: every loss against its formula, every kernel against float64, every option against its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import dal_kernels
from dal_kernels.functional import loss_of
from dal_kernels.losses.base import RobustLoss
from dal_kernels.objective import Objective
from support.axes import dtypes, objectives
from support.family import KNOBS, gradient_of, module_of, rows_of
from support.truth import LOSS_SLACK, gradient_bound, relative_error

A = -math.log(1e-4)


def nce(p: Tensor, own: Tensor) -> Tensor:
    return own.log() / p.log().sum(1)


def agce(own: Tensor, a: float, q: float) -> Tensor:
    return ((a + 1) ** q - (a + own) ** q) / q


def jensen_shannon(own: Tensor, pi: float) -> Tensor:
    mean = pi + (1 - pi) * own
    # Of the other classes the mean is (1 - pi) p_k.
    of_label = pi * -mean.log()
    of_prediction = (1 - pi) * (own * (own / mean).log() - (1 - own) * math.log(1 - pi))
    return (of_label + of_prediction) / -((1 - pi) * math.log(1 - pi))


# Written out from the papers, from the probabilities p (N, C) and those of the labels: the name of the function, its
# knobs, the loss of rows.
LONG_HAND: list[tuple[str, dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = [
    ("cross_entropy_loss", {}, lambda p, own: -own.log()),
    (
        "cross_entropy_loss",
        {"label_smoothing": 0.1},
        lambda p, own: -0.9 * own.log() - 0.1 / p.shape[1] * p.log().sum(1),
    ),
    ("generalized_cross_entropy_loss", {}, lambda p, own: (1 - own**0.7) / 0.7),
    ("mean_absolute_error_loss", {}, lambda p, own: 1 - own),
    ("reverse_cross_entropy_loss", {}, lambda p, own: A * (1 - own)),
    ("symmetric_cross_entropy_loss", {}, lambda p, own: -0.1 * own.log() + A * (1 - own)),
    ("taylor_cross_entropy_loss", {}, lambda p, own: (1 - own) + (1 - own) ** 2 / 2),
    ("taylor_cross_entropy_loss", {"order": 5}, lambda p, own: sum((1 - own) ** i / i for i in range(1, 6))),
    ("asymmetric_generalized_cross_entropy_loss", {}, lambda p, own: agce(own, 0.6, 0.6)),
    ("asymmetric_unhinged_loss", {}, lambda p, own: ((5.5 - own) ** 3 - 4.5**3) / 3),
    ("asymmetric_exponential_loss", {}, lambda p, own: (-own / 2.5).exp()),
    ("jensen_shannon_loss", {}, lambda p, own: jensen_shannon(own, 0.5)),
    ("jensen_shannon_loss", {"pi": 0.1}, lambda p, own: jensen_shannon(own, 0.1)),
    ("fisher_rao_loss", {}, lambda p, own: own.sqrt().acos() ** 2),
    ("focal_loss", {}, lambda p, own: -((1 - own) ** 2) * own.log()),
    ("focal_loss", {"detach_modulator": True}, lambda p, own: -((1 - own) ** 2).detach() * own.log()),
    (
        "partially_huberised_cross_entropy_loss",
        {},
        lambda p, own: torch.where(own > 0.1, -own.log(), -10 * own + math.log(10) + 1),
    ),
    ("normalized_cross_entropy_loss", {}, nce),
    ("active_passive_loss", {}, lambda p, own: nce(p, own) + A * (1 - own)),
    ("active_passive_loss", {"passive": "mae", "beta": 2.0}, lambda p, own: nce(p, own) + 2 * (1 - own)),
    (
        "active_passive_loss",
        {"passive": "agce", "alpha": 0.5, "a": 1.8, "q": 3.0},
        lambda p, own: 0.5 * nce(p, own) + agce(own, 1.8, 3.0),
    ),
    (
        "joint_asymmetric_loss",
        {},
        lambda p, own: nce(p, own) + ((p * p).sum(1) - 60 * own + 900) / p.shape[1],
    ),
    ("brier_loss", {}, lambda p, own: (p * p).sum(1) - 2 * own + 1),
    (
        "epsilon_softmax_loss",
        {"m": 100.0, "beta": 0.5},
        lambda p, own: -((own + 100 * (own == p.amax(1))) / 101).log() + 0.5 * (1 - own),
    ),
]
long_hand = pytest.mark.parametrize(("name", "knobs", "formula"), LONG_HAND, ids=[f"{n} {k}" for n, k, _ in LONG_HAND])


@long_hand
def test_every_loss_is_its_formula(backend: str, name: str, knobs: dict[str, Any], formula: Any) -> None:
    logits, target = rows_of()
    logits.requires_grad_()
    p = logits.softmax(1)
    expected = formula(p, p.gather(1, target.unsqueeze(1)).squeeze(1))
    for loss_of_rows in (getattr(dal_kernels, name), module_of(name, **knobs)):
        given = knobs if not isinstance(loss_of_rows, RobustLoss) else {}
        found = loss_of_rows(
            logits,
            target,
            reduction="none",
            **({"backend": backend} if not isinstance(loss_of_rows, RobustLoss) else {}),
            **given,
        )
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        upstream = torch.linspace(-1, 2, len(target), dtype=torch.float64)
        torch.testing.assert_close(
            torch.autograd.grad(found, logits, upstream, retain_graph=True),
            torch.autograd.grad(expected, logits, upstream, retain_graph=True),
            rtol=1e-10,
            atol=1e-11,
        )


def held_to_truth(
    objective: Objective, knobs: tuple[Any, ...], logits: Tensor, target: Tensor, backend: str, **options: Any
) -> None:
    dtype = logits.dtype
    given, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = loss_of(objective.id, knobs, given, target, backend=backend, **options)
    truth = loss_of(objective.id, knobs, exact, target, backend="eager", **options)
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream = upstream.to(loss.dtype)
    got, true = (torch.autograd.grad(of, at, upstream.to(of.dtype))[0] for of, at in ((loss, given), (truth, exact)))
    ulps = 4 * torch.finfo(loss.dtype).eps * max(1.0, float(truth.detach().abs().max()))
    assert (loss.double() - truth).abs().max() <= LOSS_SLACK[dtype] * truth.norm() + ulps
    # Where the whole gradient cancels, its norm is no measure.
    allowed = gradient_bound(true, dtype) * true.norm() + 1e-12 * upstream.abs().max()
    assert (got.double() - true).norm() <= allowed, relative_error(got, true)


@objectives
@dtypes
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_kernel_matches_truth(fused: str, objective: Objective, dtype: torch.dtype, reduction: str) -> None:
    for classes in (2, 10, 33, 1000, 4099):
        logits, target = rows_of(9, classes, 3.0, dtype)
        target[4] = -100
        held_to_truth(objective, KNOBS[objective.name], logits, target, fused, reduction=reduction)


@objectives
def test_knobs_may_differ_by_row(fused: str, objective: Objective) -> None:
    logits, target = rows_of(9, 20, 3.0, torch.float32)
    knobs = tuple(
        torch.full((9,), knob) if whole.whole else knob * torch.linspace(0.9, 1.1, 9)
        for knob, whole in zip(KNOBS[objective.name], objective.knobs, strict=True)
    )
    held_to_truth(objective, knobs, logits, target, fused, weight=torch.linspace(0.1, 2.0, 20))


@objectives
def test_long_rows_are_split_and_merged(fused: str, objective: Objective) -> None:
    logits, target = rows_of(3, 33000, 3.0, torch.float32)
    held_to_truth(objective, KNOBS[objective.name], logits, target, fused)


@objectives
@pytest.mark.parametrize("size", [40.0, 1e4])
def test_certain_rows_have_the_limits_of_the_formulas(fused: str, objective: Objective, size: float) -> None:
    """p_y is 1 or 0 up to rounding; nothing becomes NaN or infinite that is not so in float64."""
    logits = torch.zeros(4, 6)
    logits[0, 2], logits[1, 2], logits[2], logits[3, :3] = size, -size, size, -size
    target = torch.tensor([2, 2, 0, 3])
    given, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = loss_of(objective.id, KNOBS[objective.name], given, target, backend=fused, reduction="none")
    truth = loss_of(objective.id, KNOBS[objective.name], exact, target, backend="eager", reduction="none")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient_of(loss.sum(), given).double(), gradient_of(truth.sum(), exact), rtol=1e-4, atol=1e-5
    )


@objectives
def test_a_single_class_has_no_gradient(backend: str, objective: Objective) -> None:
    logits = torch.tensor([[0.5], [-3.0]], requires_grad=True)
    loss = loss_of(objective.id, KNOBS[objective.name], logits, torch.zeros(2, dtype=torch.long), backend=backend)
    assert loss.isfinite()
    assert gradient_of(loss, logits).tolist() == [[0.0], [0.0]]


# Numbers that lie within their limits, and beyond them once they are float32's.
AT_AN_END = {"asymmetric_unhinged_loss": {"a": 1 + 1e-9, "q": 1.5}, "jensen_shannon_loss": {"pi": 1 - 1e-9}}


@pytest.mark.parametrize("name", AT_AN_END)
def test_a_number_is_checked_as_kernels_read_it(backend: str, name: str) -> None:
    logits, target = rows_of()
    call = partial(getattr(dal_kernels, name), target=target, backend=backend, **AT_AN_END[name])
    assert call(logits).isfinite()
    with pytest.raises(ValueError, match=r"must be .* in float32, got"):
        call(logits.float())


# Losses that a small knob makes cross-entropy, and how far they are from it by then.
TO_CROSS_ENTROPY = {
    "jensen_shannon_loss": {"pi": 1e-12},
    "generalized_cross_entropy_loss": {"q": 1e-9},
    "focal_loss": {"gamma": 1e-9},
}


@pytest.mark.parametrize("name", TO_CROSS_ENTROPY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_knobs_come_to_cross_entropy(backend: str, name: str, dtype: torch.dtype) -> None:
    """To the digits of the dtype: what a formula divides by a small knob must not be a rounded difference."""
    logits, target = rows_of(dtype=dtype, scale=3.0)
    logits.requires_grad_()
    found = getattr(dal_kernels, name)(logits, target, reduction="none", backend=backend, **TO_CROSS_ENTROPY[name])
    exact = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(found, exact, **tolerance)
    torch.testing.assert_close(gradient_of(found.sum(), logits), gradient_of(exact.sum(), logits), **tolerance)


@objectives
def test_a_poisoned_row_is_lost_and_a_masked_class_is_not_there(backend: str, objective: Objective) -> None:
    logits, target = rows_of(6, 12, 3.0, torch.float32)
    masked = logits.clone()
    masked[:, 5] = -math.inf
    target[target == 5] = 6
    truth = loss_of(objective.id, KNOBS[objective.name], masked.double(), target, backend="eager", reduction="none")
    given = masked.requires_grad_()
    loss = loss_of(objective.id, KNOBS[objective.name], given, target, backend=backend, reduction="none")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    if truth.isfinite().all():
        assert gradient_of(loss.sum(), given).isfinite().all()
    poisoned = logits.clone()
    poisoned[2, 3] = math.nan
    poisoned.requires_grad_()
    loss = loss_of(objective.id, KNOBS[objective.name], poisoned, target, backend=backend, reduction="none")
    gradient = gradient_of(loss.sum(), poisoned)
    assert loss.isnan().tolist() == gradient.isnan().any(1).tolist() == [row == 2 for row in range(6)]
