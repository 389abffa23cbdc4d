"""Rows put together from slices of their classes, in one process: every backend against float64 truth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import arguments
from dal_kernels.objectives import dynamics_aware_of
from dal_kernels.slices import IGNORED, Statistics, fields_of, finish, gradient, merge, statistics
from support.axes import bootstraps, dtypes
from support.truth import (
    LOSS_SLACK,
    NOTHING_TO_DIVIDE_BY,
    Case,
    entry_allowance,
    gradient_bound,
    make_case,
    make_huge_case,
    make_mean_over_nothing,
    random_upstream,
    relative_error,
    true_outcome,
)


def stacked(slices: list[Statistics]) -> Statistics:
    """(R, N) of slices as ranks gather them."""
    columns = list(zip(*(of[:-1] for of in slices), strict=True))
    sizes = torch.tensor([[of.classes] for of in slices], dtype=torch.float64)
    return Statistics(*(None if column[0] is None else torch.stack(column) for column in columns), sizes)


def from_slices(case: Case, sizes: list[int], upstream: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient, argmax) as ranks with so many classes each would make them."""
    options = {"weight": None, "ignore_index": -100, "reduction": "mean", "bootstrap": "soft", **case.options}
    objective = dynamics_aware_of(options.pop("bootstrap"))
    call = arguments.check(
        case.logits, case.target, objective, (case.q, case.bootstrap_weight), **options, want_stats=True
    )
    parts = case.logits.split(sizes, 1)
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    found = [statistics(part, backend, wide=False) for part in parts]
    found = [of._replace(argmax=of.argmax + first) for of, first in zip(found, firsts, strict=True)]
    whole = merge(stacked(found))
    target = case.target.masked_fill(case.target == options["ignore_index"], 0)
    done = finish(call, whole, case.logits.gather(1, target.unsqueeze(1)).squeeze(1).double(), True)
    assert done.coefficients is not None
    fields = fields_of(whole.peak, done.coefficients, done.loss.dtype, wide=False)
    gradients = []
    for part, first, size in zip(parts, firsts, sizes, strict=True):
        classes = []
        for at, elsewhere in ((case.target, size), (whole.argmax, -1)):
            inside = (at >= first) & (at < first + size)
            classes.append(torch.where(inside, at - first, elsewhere))
        local = torch.where(case.target == options["ignore_index"], IGNORED, classes[0])
        prediction = classes[1] if objective.needs_argmax else classes[1][:0]
        arguments_of = (local, fields, prediction, upstream.to(fields.dtype), backend)
        apart = gradient(part.contiguous(), *arguments_of, in_place=False)
        in_place = gradient(part.clone(), *arguments_of, in_place=True)
        torch.testing.assert_close(in_place, apart, rtol=0, atol=0, equal_nan=True)
        gradients.append(apart)
    return done.loss, torch.cat(gradients, 1), whole.argmax


def check(case: Case, sizes: list[int], backend: str) -> None:
    upstream = random_upstream(case)
    truth = true_outcome(case, upstream)
    loss, got, argmax = from_slices(case, sizes, upstream, backend)
    dtype = case.logits.dtype
    ulps = 4 * torch.finfo(loss.dtype).eps * (len(case.target) if case.options.get("reduction") == "sum" else 1)
    assert (loss.double() - truth.loss).abs().max() <= LOSS_SLACK[dtype] * truth.loss.norm() + ulps
    if relative_error(got, truth.gradient) > gradient_bound(truth.gradient, dtype):
        rounding = torch.finfo(dtype).eps * truth.gradient.abs() + torch.finfo(dtype).smallest_normal
        allowed = rounding + entry_allowance(case, upstream, truth)
        assert ((got.double() - truth.gradient).abs() <= allowed).all()
    assert torch.equal(argmax, case.logits.argmax(1))


@dtypes
@bootstraps
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sizes", [[60, 41], [1, 0, 100], [33, 33, 35], [101]], ids=str)
def test_matches_truth(backend: str, dtype: torch.dtype, bootstrap: str, reduction: str, sizes: list[int]) -> None:
    case = make_case(9, 101, dtype, reduction=reduction, bootstrap=bootstrap, weight=torch.linspace(0.1, 2.0, 101))
    case.target[4] = -100
    check(case, sizes, backend)


@pytest.mark.parametrize("sizes", [[4100, 37], [20011, 33000]], ids=str)
@bootstraps
def test_matches_truth_in_long_rows(backend: str, bootstrap: str, sizes: list[int]) -> None:
    check(make_case(3, sum(sizes), bootstrap=bootstrap), sizes, backend)


@pytest.mark.parametrize(("q", "bootstrap_weight"), [(0.0, 0.0), (1e-5, 0.0), (1.0, 0.0), (1.5, 1.0), (3.0, 0.2)])
@bootstraps
def test_matches_truth_along_the_schedule(backend: str, q: float, bootstrap_weight: float, bootstrap: str) -> None:
    case = make_case(20, 50, bootstrap=bootstrap)
    case.q, case.bootstrap_weight = q, bootstrap_weight
    check(case, [17, 33], backend)


@bootstraps
def test_slices_of_very_different_size_and_far_from_zero(backend: str, bootstrap: str) -> None:
    """Maxima beside which a rounding in another base would move S by a percent; slices that vanish."""
    case = make_case(8, 60, bootstrap=bootstrap, reduction="none")
    case.logits[0] += 1e4
    case.logits[1] -= 1e4
    case.logits[2, :30] += 200
    case.logits[3, 30:] += 200
    case.logits[4, :30] = -math.inf
    case.logits[5, 30:] = -math.inf
    case.target[4], case.target[5] = 41, 3
    case.logits[6] = 0.0  # a tie over the slices
    check(case, [30, 30], backend)


@pytest.mark.parametrize("power", [0.2, 0.25, 0.8, 1.0])
@dtypes
@bootstraps
def test_finite_logits_of_any_size(backend: str, bootstrap: str, dtype: torch.dtype, power: float) -> None:
    check(make_huge_case(60, dtype, power, bootstrap=bootstrap), [29, 0, 31], backend)


@pytest.mark.parametrize(("class_weight", "ignored"), NOTHING_TO_DIVIDE_BY)
def test_a_mean_over_nothing_is_that_of_cross_entropy(backend: str, class_weight: float | None, ignored: str) -> None:
    case = make_mean_over_nothing(7, torch.float32, class_weight, ignored)
    leaf = case.logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, case.target, **case.options)
    expected.backward()
    loss, got, _ = from_slices(case, [3, 4], torch.ones(()), backend)
    torch.testing.assert_close((loss, got), (expected.detach(), leaf.grad), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "all -inf"])
@bootstraps
def test_a_poisoned_row_is_lost_and_no_other(backend: str, poison: float, bootstrap: str) -> None:
    case = make_case(6, 60, bootstrap=bootstrap, reduction="none")
    clean_loss, clean, _ = from_slices(case, [40, 20], torch.ones(6), backend)
    case.logits[2, slice(None) if poison == -math.inf else 50] = poison
    loss, got, argmax = from_slices(case, [40, 20], torch.ones(6), backend)
    others = torch.arange(6) != 2
    assert loss[2].isnan()
    assert got[2].isnan().all()
    assert torch.equal(loss[others], clean_loss[others])
    assert torch.equal(got[others], clean[others])
    assert torch.equal(argmax, case.logits.argmax(1))
