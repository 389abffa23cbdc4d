"""Losses, gradients and statistics of every backend against float64 truth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import dynamics_aware_loss
from support.axes import CLASSES, bootstraps, dtypes, reductions
from support.truth import (
    NOTHING_TO_DIVIDE_BY,
    Case,
    check,
    gradient_bound,
    make_case,
    make_huge_case,
    make_mean_over_nothing,
    random_upstream,
    relative_error,
    run,
)


@pytest.mark.parametrize("classes", CLASSES)
@dtypes
@reductions
@bootstraps
def test_matches_truth(backend: str, classes: int, dtype: torch.dtype, reduction: str, bootstrap: str) -> None:
    case = make_case(7, classes, dtype, reduction=reduction, bootstrap=bootstrap)
    check(case, random_upstream(case), backend)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 300.0])
@dtypes
@bootstraps
def test_matches_truth_whatever_the_scale_of_the_logits(
    backend: str, scale: float, dtype: torch.dtype, bootstrap: str
) -> None:
    case = make_case(64, 100, dtype, scale=scale, bootstrap=bootstrap)
    check(case, torch.ones((), dtype=torch.float64), backend)


@pytest.mark.parametrize(
    ("q", "bootstrap_weight"), [(0.0, 0.0), (1e-5, 0.0), (0.4, 0.0), (1.0, 0.0), (1.5, 1.0), (3.0, 0.2)]
)
@dtypes
def test_matches_truth_along_the_schedule(backend: str, q: float, bootstrap_weight: float, dtype: torch.dtype) -> None:
    case = make_case(33, 50, dtype)
    case.q, case.bootstrap_weight = q, bootstrap_weight
    check(case, random_upstream(case), backend)


@pytest.mark.parametrize("upstream", [1.0, 0.0, -2.5, 1e-3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@dtypes
def test_scales_by_a_scalar_upstream_gradient(
    backend: str, upstream: float, reduction: str, dtype: torch.dtype
) -> None:
    case = make_case(16, 65, dtype, reduction=reduction)
    check(case, torch.tensor(upstream, dtype=torch.float64), backend)


@pytest.mark.parametrize("kind", ["random", "zero", "stride 0", "strided"])
@dtypes
@bootstraps
def test_takes_any_upstream_gradient_of_rows(backend: str, kind: str, dtype: torch.dtype, bootstrap: str) -> None:
    case = make_case(16, 130, dtype, reduction="none", bootstrap=bootstrap)
    upstream: Tensor = {
        "random": random_upstream(case),
        "zero": torch.zeros(16, dtype=torch.float64),
        "stride 0": torch.tensor(0.3, dtype=torch.float64).expand(16),
        "strided": torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))[::2],
    }[kind]
    check(case, upstream, backend)


@dtypes
@reductions
@bootstraps
def test_schedule_values_may_differ_by_row(backend: str, dtype: torch.dtype, reduction: str, bootstrap: str) -> None:
    case = make_case(40, 30, dtype, reduction=reduction, bootstrap=bootstrap)
    case.q = torch.linspace(0.2, 2.0, 40, dtype=torch.float64)
    case.bootstrap_weight = torch.linspace(0.0, 1.0, 80, dtype=torch.float64)[::2].clamp_min(0.1) - 0.1
    check(case, random_upstream(case), backend)


@pytest.mark.parametrize("ignore_index", [-100, 3, -1, 999])
@pytest.mark.parametrize("weighted", [False, True])
@dtypes
@reductions
def test_class_weights_and_ignored_rows(
    backend: str, ignore_index: int, weighted: bool, dtype: torch.dtype, reduction: str
) -> None:
    case = make_case(50, 20, dtype, reduction=reduction, ignore_index=ignore_index)
    case.target[::5] = ignore_index
    if weighted:
        case.options["weight"] = torch.linspace(0.1, 2.0, 40)[::2]
    upstream = random_upstream(case)
    check(case, upstream, backend)
    outcome = run(case, upstream, backend)
    assert not outcome.gradient[::5].any()
    assert outcome.stats.target_prob[::5].isnan().all()


@reductions
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", ["none", "some", "all", "no rows"])
def test_q_zero_is_cross_entropy(backend: str, reduction: str, weighted: bool, ignored: str) -> None:
    rows = 0 if ignored == "no rows" else 12
    logits = torch.randn(rows, 9, dtype=torch.float64)
    target = torch.randint(9, (rows,))
    target[{"none": slice(0, 0), "some": slice(2, 6), "all": slice(None), "no rows": slice(None)}[ignored]] = -100
    weight = torch.rand(9, dtype=torch.float64) + 0.1 if weighted else None
    results = []
    for loss_of in (
        lambda z: F.cross_entropy(z, target, weight=weight, reduction=reduction),
        lambda z: dynamics_aware_loss(z, target, 0, weight=weight, reduction=reduction, backend=backend),
    ):
        leaf = logits.clone().requires_grad_()
        loss = loss_of(leaf)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14, equal_nan=True)


def test_masked_classes_get_no_gradient(backend: str) -> None:
    case = make_case(12, 5000, reduction="sum")
    case.logits[:, :4200] = -math.inf  # a whole first block of some rows' statistics
    case.logits[::2, 4500:] = -math.inf
    case.target[:] = torch.randint(4200, 4500, (12,))
    case.target[3] = 17  # p_y = 0: loss 1/q plus bootstrap, gradient of the first term 0
    check(case, torch.ones((), dtype=torch.float64), backend)
    outcome = run(case, torch.ones((), dtype=torch.float64), backend)
    assert not outcome.gradient[:, :4200].any()


@pytest.mark.parametrize("bootstrap_weight", [0.0, 0.5])
@bootstraps
@dtypes
def test_extreme_logits(backend: str, bootstrap_weight: float, bootstrap: str, dtype: torch.dtype) -> None:
    case = make_case(6, 37, dtype, bootstrap=bootstrap, reduction="none")
    case.bootstrap_weight = bootstrap_weight
    case.logits[0] = 1e4
    case.logits[1] = -1e4
    case.logits[2, ::2], case.logits[2, 1::2] = 1e4, -1e4
    case.logits[3, 5] = 1e4
    case.target[3] = 5  # p_y = 1 exactly
    case.logits[4] = 0.0
    check(case, torch.ones(6, dtype=torch.float64), backend)


@pytest.mark.parametrize("power", [0.2, 0.25, 0.8, 1.0])
@pytest.mark.parametrize("classes", [5, 12, 300, 1030, 20011, 33000])
@pytest.mark.parametrize(("bootstrap", "bootstrap_weight"), [("soft", 0.0), ("soft", 0.5), ("hard", 0.5)])
@dtypes
def test_finite_logits_of_any_size(
    backend: str, classes: int, power: float, bootstrap: str, bootstrap_weight: float, dtype: torch.dtype
) -> None:
    case = make_huge_case(classes, dtype, power, bootstrap=bootstrap)
    case.bootstrap_weight = bootstrap_weight
    check(case, random_upstream(case), backend, cancelling=True)  # in rows of equal logits


@pytest.mark.parametrize("power", [0.25, 1.0])
@dtypes
def test_cross_entropy_of_finite_logits_of_any_size(backend: str, power: float, dtype: torch.dtype) -> None:
    """Up to where the loss itself leaves float32, and then infinite, as torch's."""
    case = make_huge_case(11, dtype, power)
    case.target[:] = torch.arange(8)
    loss = dynamics_aware_loss(case.logits, case.target, 0.0, reduction="none", backend=backend)
    expected = F.cross_entropy(case.logits.to(loss.dtype), case.target, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


@bootstraps
def test_shares_of_masked_classes_beside_logits_far_below_zero(backend: str, bootstrap: str) -> None:
    """However a row of many classes is shared out, a share of -inf alone has no maximum that others could move to."""
    case = make_case(2, 300_000, bootstrap=bootstrap, reduction="none")
    case.logits -= 500
    case.logits[0, :150_000], case.logits[1, 150_000:] = -math.inf, -math.inf
    case.target[0], case.target[1] = 299_999, 0
    check(case, torch.ones(2, dtype=torch.float64), backend, cancelling=True)


@pytest.mark.parametrize(("class_weight", "ignored"), NOTHING_TO_DIVIDE_BY)
@pytest.mark.parametrize("classes", [7, 1100, 33000])
@pytest.mark.parametrize("upstream", [1.0, 2.5])
@dtypes
def test_a_mean_over_nothing_is_that_of_cross_entropy(
    backend: str, classes: int, class_weight: float | None, ignored: str, upstream: float, dtype: torch.dtype
) -> None:
    """NaN; and its gradient 0 / 0, but 0 in ignored rows."""
    case = make_mean_over_nothing(classes, dtype, class_weight, ignored)
    got = run(case, torch.tensor(upstream), backend)
    leaf = case.logits.detach().to(got.loss.dtype).requires_grad_()
    expected = F.cross_entropy(leaf, case.target, **case.options)
    expected.backward(torch.full_like(expected, upstream))
    assert leaf.grad is not None
    found, true = (got.loss, got.gradient.to(leaf.dtype)), (expected.detach(), leaf.grad)
    torch.testing.assert_close(found, true, rtol=0, atol=0, equal_nan=True)
    # Nobody asks for statistics: other kernels.
    leaf = case.logits.detach().clone().requires_grad_()
    loss = dynamics_aware_loss(leaf, case.target, 0.7, 0.6, backend=backend, **case.options)
    loss.backward(torch.full_like(loss, upstream))
    assert leaf.grad is not None
    torch.testing.assert_close((loss.detach(), leaf.grad.to(true[1].dtype)), true, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("classes", [1, 2, 10, 17, 1000, 9000])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "all -inf"])
@reductions
@bootstraps
@dtypes
def test_a_poisoned_row_is_lost_and_no_other(
    backend: str, classes: int, poison: float, reduction: str, bootstrap: str, dtype: torch.dtype
) -> None:
    case = make_case(9, classes, dtype, reduction=reduction, bootstrap=bootstrap)
    clean = run(case, torch.ones(9 if reduction == "none" else ()), backend)
    if poison == -math.inf:
        case.logits[4] = poison
    else:
        case.logits[4, classes // 2] = poison
    got = run(case, torch.ones(9 if reduction == "none" else ()), backend)
    others = torch.arange(9) != 4
    assert got.gradient[4].isnan().all()
    assert torch.equal(got.gradient[others], clean.gradient[others])
    assert torch.equal(got.stats.entropy[others], clean.stats.entropy[others])
    assert got.stats.target_prob[4].isnan()
    assert got.stats.entropy[4].isnan()
    assert got.stats.max_prob[4].isnan()
    assert torch.equal(got.stats.prediction, case.logits.argmax(dim=1))
    assert got.loss[4].isnan() if reduction == "none" else got.loss.isnan()


@pytest.mark.parametrize("classes", [33, 1000])  # rows side by side, and one after the other
def test_a_poisoned_ignored_row_costs_nothing(backend: str, classes: int) -> None:
    case = make_case(9, classes)
    case.target[4] = -100
    clean = run(case, torch.ones(()), backend)
    case.logits[4, 7] = math.nan
    got = run(case, torch.ones(()), backend)
    assert torch.equal(got.loss, clean.loss)
    assert torch.equal(got.gradient, clean.gradient)


def test_digits_survive_where_the_target_is_almost_certain(backend: str) -> None:
    """1 - p^q loses every digit near p = 1; expm1 does not. The logits leave ln p_y = -1.2e-4."""
    logits = torch.tensor([[9.0, 0.0]])
    truth = -math.expm1(0.7 * -math.log1p(math.exp(-9.0))) / 0.7
    loss = dynamics_aware_loss(logits, torch.tensor([0]), 0.7, backend=backend)
    assert loss.item() == pytest.approx(truth, rel=2e-3)  # ln S in float32 is what is left of the error
    double = dynamics_aware_loss(logits.double(), torch.tensor([0]), 0.7, backend=backend)
    assert double.item() == pytest.approx(truth, rel=1e-11)


def test_the_target_term_is_subtracted_before_rounding(backend: str) -> None:
    """p_y = 0.999 in bfloat16: rounding p first would leave nothing of p - 1."""
    logits = torch.tensor([[7.0, 0.0, 0.0]], dtype=torch.bfloat16)
    case = Case(logits, torch.tensor([0]), q=0.7, bootstrap_weight=0.0)
    got = run(case, torch.ones(()), backend).gradient
    p = torch.tensor([7.0, 0.0, 0.0], dtype=torch.float64).softmax(0)
    truth = p[0] ** 0.7 * (p - torch.tensor([1.0, 0.0, 0.0]))
    assert relative_error(got[0], truth) <= gradient_bound(truth, torch.bfloat16)


@dtypes
def test_ties_go_to_the_first_class(backend: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 9000, dtype=dtype)
    logits[0, [8999, 4097]] = 5.0
    logits[1, [15, 16]] = 2.0
    case = Case(logits, torch.tensor([1, 2, 3]), options={"bootstrap": "hard", "reduction": "sum"})
    check(case, torch.ones((), dtype=torch.float64), backend)
    assert run(case, torch.ones(()), backend).stats.prediction.tolist() == [4097, 15, 0]


@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 3), (4, 5, 3, 2), (4, 5, 0)])
@reductions
def test_shapes_of_cross_entropy(backend: str, shape: tuple[int, ...], reduction: str) -> None:
    """Every position of (N, C, d1, ...) is a row; the gradient comes back where its logit was."""
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(5, target_shape)
    loss, stats = dynamics_aware_loss(logits, target, 0.0, reduction=reduction, return_stats=True, backend=backend)
    expected = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    upstream = torch.randn_like(loss)
    (got,), (true,) = (torch.autograd.grad(value, logits, upstream) for value in (loss, expected))
    torch.testing.assert_close(got, true)
    for value in stats:
        assert value.shape == target.shape
        assert not value.requires_grad


@pytest.mark.parametrize(
    "layout", ["rows apart", "class stride 2", "transposed", "expanded", "offset", "channels last"]
)
@dtypes
def test_any_strides(backend: str, layout: str, dtype: torch.dtype) -> None:
    wide = make_case(64, 400, dtype).logits
    logits = {
        "rows apart": wide[::2, 17:117],
        "class stride 2": wide[:32, :200:2],
        "transposed": wide[:, :100].T[:32],
        "expanded": wide[:1, :100].expand(32, 100),
        "offset": wide.flatten()[5 : 5 + 3200].view(32, 100),
        "channels last": wide[:32, :100].reshape(2, 4, 4, 100).permute(0, 3, 1, 2),
    }[layout]
    target = torch.randint(logits.shape[1], (logits.shape[0], *logits.shape[2:]))
    results = []
    for layout_of_logits in (logits, logits.contiguous()):
        leaf = layout_of_logits.detach().requires_grad_()
        loss = dynamics_aware_loss(leaf, target, 0.7, 0.5, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    # CUDA's lanes take the classes by where they lie in memory, and add them up in that order; on a CPU the lanes are
    # rows where classes are not neighbours.
    for one, other in zip(*results, strict=True):
        rtol = (4 if one.ndim == 0 else 1) * torch.finfo(one.dtype).eps if backend in ("cpu", "cuda") else 0.0
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol / 32)
