"""Every loss of the table, held to its formula in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dal_kernels.functional import loss_of
from dal_kernels.objective import Objective, RowQuantities
from dal_kernels.objectives import OBJECTIVES
from dal_kernels.slices import slopes_of
from support.family import KNOBS
from support.truth import LOSS_SLACK, gradient_bound, make_case, relative_error

BY_NAME = {objective.name: objective for objective in OBJECTIVES}


def knobs_of(objective: Objective) -> tuple[float, ...]:
    return KNOBS[objective.name]


def knobs_per_row(objective: Objective, rows: int) -> tuple[Tensor, ...]:
    """Knobs of which each row has its own, (N,) float32, about those of :data:`KNOBS`."""
    row = torch.arange(rows)
    of_rows = []
    for knob, value in zip(objective.knobs, knobs_of(objective), strict=True):
        of_rows.append(value - row % 2 if knob.whole else value * (1 - 0.2 * row / rows))
    return tuple(knob.float() for knob in of_rows)


def make_batch(rows: int, classes: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """(logits, target): of two rows the target is the largest logit, so that losses near 0 are among them."""
    case = make_case(rows, classes, dtype, scale, seed=classes)
    case.target[2:4] = case.logits[2:4].argmax(1)
    return case.logits, case.target


def upstream_of(loss: Tensor) -> Tensor:
    """A random upstream gradient, float64."""
    return torch.randn(loss.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def outcome(
    objective: Objective, knobs: tuple[Any, ...], logits: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """(loss, gradient for a random upstream)."""
    leaf = logits.clone().requires_grad_()
    loss = loss_of(objective.id, knobs, leaf, target, **options)
    loss.backward(upstream_of(loss).to(loss))
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def quantities_of(logits: Tensor, target: Tensor) -> RowQuantities:
    """Of rows, by softmax in float64."""
    log_prob = logits.double().log_softmax(1)
    prob = log_prob.exp()
    return RowQuantities(
        log_prob.gather(1, target.unsqueeze(1)).squeeze(1),
        torch.special.entr(prob).sum(1),
        log_prob.amax(1),
        log_prob.sum(1),
        prob.square().sum(1),
        logits.shape[1],
    )


def entry_allowance(objective: Objective, knobs: tuple[Any, ...], logits: Tensor, target: Tensor) -> Tensor:
    """8 eps of the coefficients of each row, (N, 1): where p_y is 1 up to rounding, its gradient is 1 - 1.

    And an ulp of ln p_y, which is what powers of p_y are known to.
    """
    row = quantities_of(logits, target)
    _, slopes = slopes_of(objective, row, tuple(torch.as_tensor(knob).double() for knob in knobs))
    classes = logits.shape[1]
    coefficient = (
        slopes.log_prob.abs() * (1 - row.log_prob / 8)
        + slopes.entropy.abs() * (1 + math.log(classes))
        + slopes.max_log_prob.abs()
        + slopes.sum_log_prob.abs() * classes
        + slopes.square_sum.abs() * 2
    )
    eps = torch.finfo(torch.float64 if logits.dtype == torch.float64 else torch.float32).eps
    return (8 * eps * coefficient).unsqueeze(1)


def hold(
    objective: Objective, knobs: tuple[Any, ...], logits: Tensor, target: Tensor, backend: str, **options: Any
) -> None:
    """Hold loss and gradient of ``backend`` to those of the formula in float64."""
    loss, gradient = outcome(objective, knobs, logits, target, backend=backend, **options)
    true_loss, true_gradient = outcome(objective, knobs, logits.double(), target, backend="eager", **options)
    dtype = logits.dtype
    # A loss near 0 is limited by ln S, which is known to an ulp of 1.
    allowed = LOSS_SLACK[dtype] * true_loss.norm() + 4 * torch.finfo(loss.dtype).eps
    assert (loss.double() - true_loss).abs().max() <= allowed
    assert gradient.dtype == dtype
    assert relative_error(gradient, true_gradient) <= gradient_bound(true_gradient, dtype)


def hold_entries(
    objective: Objective, knobs: tuple[Any, ...], logits: Tensor, target: Tensor, backend: str
) -> None:  # fmt: skip
    """The same of unreduced losses, entry by entry: also where a whole gradient cancels, and its norm is no measure."""
    loss, gradient = outcome(objective, knobs, logits, target, backend=backend, reduction="none")
    true_loss, true_gradient = outcome(objective, knobs, logits.double(), target, backend="eager", reduction="none")
    allowed = LOSS_SLACK[logits.dtype] * true_loss.abs() + 4 * torch.finfo(loss.dtype).eps * true_loss.abs().max()
    assert ((loss.double() - true_loss).abs() <= allowed).all()
    finfo = torch.finfo(logits.dtype)
    rounding = finfo.eps * true_gradient.abs() + finfo.smallest_normal
    of_rows = entry_allowance(objective, knobs, logits, target) * upstream_of(loss).abs().unsqueeze(1)
    assert ((gradient.double() - true_gradient).abs() <= rounding + of_rows).all()
