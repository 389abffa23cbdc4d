"""The losses in plain PyTorch: what every kernel is held against, and the backend of last resort.

Nothing here is fused or clever. Gradients come from autograd, to any order, in any floating dtype, on any device. The
formulas are those of :mod:`dal_kernels.objectives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels.arguments import BOOTSTRAPS, Bootstrap, Call, Options, RowStats, check, raise_for_labels
from dal_kernels.fields import Reduction
from dal_kernels.objective import RowQuantities
from dal_kernels.objectives import bootstrap_term, dynamics_aware_of
from dal_kernels.tensors import HALVES, check_choice

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["dynamics_aware_loss"]

OFFICIAL_EPSILON = 1e-6


def row_factors(target: Tensor, classes: int, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What each row counts, (N,): its class weight or 1, 0 where it is ignored, NaN where the label is no class.

    Their sum is the divisor of a mean.
    """
    valid = (target >= 0) & (target < classes)
    factor = torch.where(valid, 1.0, math.nan).to(dtype)
    if weight is not None:
        factor = factor * weight[torch.where(valid, target, 0)]
    return torch.where(target == ignore_index, 0.0, factor)


def row_quantities(logits: Tensor, target: Tensor, uses: Collection[str]) -> RowQuantities:
    """Of logits (N, C), float32 or float64, and target (N,), every entry in [0, C). What is not in ``uses`` is NaN."""
    log_prob = F.log_softmax(logits, dim=1)

    def entropy() -> Tensor:
        # p ln p -> 0 at p = 0, in value and gradient: masked classes have logits of -inf.
        return -(log_prob.exp() * log_prob.masked_fill(log_prob == -math.inf, 0.0)).sum(dim=1)

    unused = log_prob.new_full((), math.nan)
    return RowQuantities(
        log_prob=log_prob.gather(1, target.unsqueeze(1)).squeeze(1),
        entropy=entropy() if "entropy" in uses else unused,
        max_log_prob=log_prob.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)
        if "max_log_prob" in uses
        else unused,
        sum_log_prob=log_prob.sum(dim=1) if "sum_log_prob" in uses else unused,
        square_sum=log_prob.exp().square().sum(dim=1) if "square_sum" in uses else unused,
        classes=logits.shape[1],
    )


def official_dynamics_aware(logits: Tensor, target: Tensor, hard: bool, q: Tensor, bootstrap_weight: Tensor) -> Tensor:
    """The authors' arithmetic: p_y clamped to [1e-6, 1] and ln(p + 1e-6) in the entropy. Knobs as of the formulas."""
    row = row_quantities(logits, target, {"max_log_prob"})
    prob = F.softmax(logits, dim=1)
    target_prob = prob.gather(1, target.unsqueeze(1)).squeeze(1).clamp(OFFICIAL_EPSILON, 1.0)
    positive = torch.where(q == 0, 1.0, q)
    loss = torch.where(q == 0, -row.log_prob, (1.0 - target_prob**positive) / positive)
    measure = -row.max_log_prob if hard else -(prob * (prob + OFFICIAL_EPSILON).log()).sum(dim=1)
    return loss + bootstrap_term(measure, q, bootstrap_weight, row.classes)


def reduced_loss(call: Call, official: bool = False) -> tuple[Tensor, RowStats | None]:
    """The reduced loss of a checked call, and its statistics where they were asked for, both over flat rows.

    A target that is neither a class nor ``ignore_index`` makes its row's loss NaN, without a host synchronisation.
    """
    logits = call.logits.float() if call.logits.dtype in HALVES else call.logits
    ignored = call.target == call.ignore_index
    valid = (call.target >= 0) & (call.target < logits.shape[1])
    target = torch.where(valid, call.target, 0)
    knobs = call.knobs.to(logits.dtype).unbind(-1)

    # Ignored rows leave the graph before anything is computed from them: a NaN in one must not reach the gradient.
    counted_logits = logits.masked_fill(ignored.unsqueeze(1), 0.0)
    if official:
        losses = official_dynamics_aware(counted_logits, target, call.objective.needs_argmax, *knobs)
    else:
        losses = call.objective.formula(row_quantities(counted_logits, target, call.objective.uses), *knobs)
    factor = row_factors(call.target, logits.shape[1], call.weight, call.ignore_index, logits.dtype)
    loss = torch.where(ignored, 0.0, losses * factor)
    if call.reduction != "none":
        loss = loss.sum()
    if call.reduction == "mean":
        loss = loss / factor.sum()
    if not call.want_stats:
        return loss, None

    with torch.no_grad():
        row = row_quantities(logits, target, {"entropy", "max_log_prob"})
        known = valid & ~ignored
        prob = torch.where(known, row.prob, math.nan)
        return loss, RowStats(prob, row.entropy, logits.argmax(dim=1), row.max_log_prob.exp())


def run_weighted(run: Callable[[Call], tuple[Tensor, RowStats | None]], call: Call) -> tuple[Tensor, RowStats | None]:
    """``run(call)``, and where there are sample weights its losses of rows, weighted and then reduced.

    "mean" divides by the sum of what the rows count: sample weight times class weight, 0 of an ignored row.
    """
    if call.sample_weight is None:
        return run(call)
    loss, stats = run(call._replace(reduction="none", sample_weight=None))
    weights = torch.where(call.target == call.ignore_index, 0.0, call.sample_weight)
    loss = loss * weights
    if call.reduction != "none":
        loss = loss.sum()
    if call.reduction == "mean":
        classes = call.logits.shape[1]
        loss = loss / (weights * row_factors(call.target, classes, call.weight, call.ignore_index, weights.dtype)).sum()
    return loss, stats


@overload
def dynamics_aware_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    return_stats: Literal[False] = ...,
    official: bool = ...,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def dynamics_aware_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    return_stats: Literal[True],
    official: bool = ...,
    **options: Unpack[Options],
) -> tuple[Tensor, RowStats]: ...
@overload
def dynamics_aware_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    return_stats: bool,
    official: bool = ...,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, RowStats]: ...
def dynamics_aware_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = 0.0,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    bootstrap: Bootstrap = "soft",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    official: bool = False,
) -> Tensor | tuple[Tensor, RowStats]:
    """What :func:`dal_kernels.dynamics_aware_loss` computes, by plain PyTorch operations.

    Takes the same arguments (but ``backend``), raises the same errors, and returns the same things.

    Args:
        official: use the authors' arithmetic instead of the exact formula: p_y clamped to [1e-6, 1], so that rows below
            have no gradient from the first term, and ln(p + 1e-6) in the entropy.
    """
    check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    call = check(
        input, target, dynamics_aware_of(bootstrap), (q, bootstrap_weight), weight, ignore_index, reduction,
        return_stats, sample_weight,
    )  # fmt: skip
    raise_for_labels(call)
    shaped: Tensor | tuple[Tensor, RowStats] = call.shaped(*run_weighted(lambda of: reduced_loss(of, official), call))
    return shaped
