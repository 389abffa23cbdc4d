"""Cases, their float64 truth, and the bounds that every backend is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dal_kernels import RowStats, dynamics_aware_loss, reference

# On top of 1.3 x what rounding the true gradient to its dtype costs.
SLACK = {torch.float32: 5e-6, torch.float64: 1e-11, torch.bfloat16: 2e-4, torch.float16: 2e-4}
# The loss is float32 for halves too.
LOSS_SLACK = {torch.float32: 5e-6, torch.float64: 1e-11, torch.bfloat16: 5e-6, torch.float16: 5e-6}


@dataclass
class Case:
    """One call: logits (N, C) in their dtype, everything else as the public function takes it."""

    logits: Tensor
    target: Tensor
    q: float | Tensor = 0.7
    bootstrap_weight: float | Tensor = 0.6
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    loss: Tensor
    gradient: Tensor
    stats: RowStats


def make_case(
    rows: int, classes: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0, **options: Any
) -> Case:
    """Random logits rounded to ``dtype``, and targets of which some are the first and the last class."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    target[:1], target[1:2] = 0, classes - 1
    return Case(logits, target, options=options)


def make_huge_case(classes: int, dtype: torch.dtype, power: float, **options: Any) -> Case:
    """Rows of finite logits as large as ``torch.finfo(dtype).max ** power``, at least 200: masks, and what diverges."""
    case = make_case(8, classes, dtype, reduction="none", **options)
    size = max(200.0, torch.finfo(dtype).max ** power)
    case.logits[0], case.logits[1] = size, -size
    case.logits[2, ::2], case.logits[2, 1::2] = size, -size
    case.logits[3, 1], case.logits[4, 1] = -size, size
    case.logits[5, 2:] = -size
    spread = 2 * torch.rand(classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
    case.logits[6] = (spread * size).to(dtype)
    case.logits[7, : classes // 2], case.logits[7, classes // 2 :] = -size, -size / 2
    case.target[:] = torch.tensor([0, classes - 1, 0, 1, 1, 2, int(case.logits[6].argmax()), classes - 1])
    return case


# What a mean divides by is 0: the weight of all classes, or None, and which rows are ignored.
NOTHING_TO_DIVIDE_BY = [(None, "all"), (1.0, "all"), (0.0, "none"), (0.0, "some"), (None, "no rows"), (0.0, "no rows")]


def make_mean_over_nothing(classes: int, dtype: torch.dtype, class_weight: float | None, ignored: str) -> Case:
    """One of :data:`NOTHING_TO_DIVIDE_BY`."""
    case = make_case(0 if ignored == "no rows" else 6, classes, dtype, reduction="mean")
    case.target[{"all": slice(None), "some": slice(1, 3)}.get(ignored, slice(0))] = -100
    if class_weight is not None:
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        case.options["weight"] = torch.full((classes,), class_weight, dtype=sums)
    return case


def random_upstream(case: Case, seed: int = 7) -> Tensor:
    """A random upstream gradient for the case's reduction, float64."""
    shape = tuple(case.target.shape) if case.options.get("reduction") == "none" else ()
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(case: Case, upstream: Tensor, backend: str) -> Outcome:
    logits = case.logits.detach().clone().requires_grad_()
    loss, stats = dynamics_aware_loss(
        logits, case.target, case.q, case.bootstrap_weight, backend=backend, return_stats=True, **case.options
    )
    loss.backward(upstream.to(loss.dtype))
    assert logits.grad is not None
    assert logits.grad.dtype == case.logits.dtype
    return Outcome(loss.detach(), logits.grad, stats)


def true_outcome(case: Case, upstream: Tensor) -> Outcome:
    """The same by the reference in float64, from the same rounded logits and the same upstream."""
    loss_dtype = torch.float64 if case.logits.dtype == torch.float64 else torch.float32
    logits = case.logits.detach().double().clone().requires_grad_()
    weight = case.options.get("weight")
    options = {**case.options, "weight": None if weight is None else weight.double()}
    loss, stats = reference.dynamics_aware_loss(
        logits, case.target, case.q, case.bootstrap_weight, return_stats=True, **options
    )
    loss.backward(upstream.to(loss_dtype).double())
    assert logits.grad is not None
    return Outcome(loss.detach(), logits.grad, stats)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; of a zero truth, the norm itself."""
    difference = (got.double() - truth).norm().item()
    norm = truth.norm().item()
    return difference / norm if norm > 0 else difference


def gradient_bound(truth: Tensor, dtype: torch.dtype) -> float:
    return 1.3 * relative_error(truth.to(dtype), truth) + SLACK[dtype]


def entry_allowance(case: Case, upstream: Tensor, truth: Outcome) -> Tensor:
    """8 eps of the largest coefficient of each row, (N, 1): where p_y is 1 up to rounding, its gradient is 1 - 1.

    And one and a half ulps of q ln p_y, which is what its power is known to: q, ln p_y and their product are rounded.
    """
    rows, classes = case.logits.shape
    q, bootstrap_weight = torch.as_tensor(case.q).double(), torch.as_tensor(case.bootstrap_weight).double()
    n = bootstrap_weight / (q * math.log(classes)) if classes > 1 else torch.zeros(())
    prob = truth.stats.target_prob.nan_to_num(1.0).clamp_min(torch.finfo(torch.float64).tiny)
    coefficient = prob**q * (1 - 1.5 * q * prob.log() / 8) + n * (1 + math.log(classes))
    weight = case.options.get("weight")
    ignored = case.target == case.options.get("ignore_index", -100)
    of_row = torch.ones(rows) if weight is None else weight[case.target.masked_fill(ignored, 0)]
    of_row = of_row.double().masked_fill(ignored, 0.0)
    if case.options.get("reduction", "mean") == "mean":
        of_row = of_row / of_row.sum()
    eps = torch.finfo(truth.loss.dtype if case.logits.dtype == torch.float64 else torch.float32).eps
    return (8 * eps * coefficient * of_row * upstream.abs()).expand(rows).unsqueeze(1)


def check(case: Case, upstream: Tensor, backend: str, *, cancelling: bool = False) -> None:
    """Hold loss, gradient and statistics of ``backend`` to the float64 truth.

    Args:
        cancelling: the case may be one whose whole gradient cancels, so that its norm is no measure: then each entry
            may be off by :func:`entry_allowance` instead.
    """
    got, truth = run(case, upstream, backend), true_outcome(case, upstream)
    dtype = case.logits.dtype
    # A loss near 0 is limited by ln S, which is known to an ulp of 1.
    ulps = 4 * torch.finfo(got.loss.dtype).eps * (len(case.target) if case.options.get("reduction") == "sum" else 1)
    loss_error = (got.loss.double() - truth.loss).abs().max().item() if truth.loss.numel() else 0.0
    assert loss_error <= LOSS_SLACK[dtype] * truth.loss.norm().item() + ulps
    within = relative_error(got.gradient, truth.gradient) <= gradient_bound(truth.gradient, dtype)
    if cancelling and not within:
        rounding = torch.finfo(dtype).eps * truth.gradient.abs() + torch.finfo(dtype).smallest_normal
        difference = (got.gradient.double() - truth.gradient).abs()
        within = bool((difference <= rounding + entry_allowance(case, upstream, truth)).all())
    assert within
    tolerance = LOSS_SLACK[dtype]
    torch.testing.assert_close(
        got.stats.target_prob.double(), truth.stats.target_prob, rtol=4 * tolerance, atol=tolerance, equal_nan=True
    )
    torch.testing.assert_close(got.stats.entropy.double(), truth.stats.entropy, rtol=4 * tolerance, atol=4 * tolerance)
    torch.testing.assert_close(got.stats.max_prob.double(), truth.stats.max_prob, rtol=4 * tolerance, atol=tolerance)
    assert torch.equal(got.stats.prediction, case.logits.argmax(dim=1))
