"""The loss in plain PyTorch: what every kernel is held against, and the backend of last resort.

Nothing here is fused or clever. Gradients come from autograd, to any order, in any floating dtype, on any device.
Source of the formula: "Dynamics-Aware Loss for Learning with Label Noise", arXiv 2303.11562.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels.arguments import HALVES, Bootstrap, Options, Rows, RowStats, check, raise_for_labels
from dal_kernels.fields import Reduction

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["dynamics_aware_loss"]

OFFICIAL_EPSILON = 1e-6


class RowLosses(NamedTuple):
    """Losses (N,) of rows, before any reduction; what row statistics are made of, still differentiable."""

    loss: Tensor
    target_prob: Tensor
    entropy: Tensor
    prediction: Tensor


def generalized_cross_entropy(target_log_prob: Tensor, q: Tensor) -> Tensor:
    """(1 - p_y^q) / q of rows from ln p_y; -ln p_y where q = 0."""
    positive = torch.where(q == 0, 1.0, q)
    # expm1, because 1 - p^q keeps no digit near p = 1; not far from it, because autograd's derivative of expm1, its
    # result plus 1, keeps none there.
    exponent = positive * target_log_prob
    fit = torch.where(exponent < -0.5, 1.0 - exponent.exp(), -torch.expm1(exponent)) / positive
    return torch.where(q == 0, -target_log_prob, fit)


def bootstrap_term(measure: Tensor, q: Tensor, bootstrap_weight: Tensor, classes: int) -> Tensor:
    r""":math:`\lambda/(q \ln C) \, B(p)` of rows. ``measure`` is B(p): the entropy, or -ln p of the predicted class."""
    factor = bootstrap_weight / (torch.where(q == 0, 1.0, q) * math.log(classes))
    # Skipped, not multiplied by zero: where it is off, the term must not add 0 * inf.
    return torch.where(bootstrap_weight == 0, 0.0, factor * measure)


def row_factors(target: Tensor, classes: int, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What each row counts, (N,): its class weight or 1, 0 where it is ignored, NaN where the label is no class.

    Their sum is the divisor of a mean.
    """
    valid = (target >= 0) & (target < classes)
    factor = torch.where(valid, 1.0, math.nan).to(dtype)
    if weight is not None:
        factor = factor * weight[torch.where(valid, target, 0)]
    return torch.where(target == ignore_index, 0.0, factor)


def row_losses(
    logits: Tensor, target: Tensor, q: Tensor, bootstrap_weight: Tensor, *, hard: bool, official: bool = False
) -> RowLosses:
    r"""Loss of each row: :math:`(1 - p_y^q)/q + \lambda/(q \ln C) \, B(p)`.

    B is the entropy of p, or with ``hard`` the negative log-likelihood of the predicted class.

    Args:
        logits: (N, C), float32 or float64.
        target: (N,) int64, every entry in [0, C).
        q, bootstrap_weight: 0-d or (N,).
        hard: which bootstrap term.
        official: the authors' arithmetic: p_y clamped to [1e-6, 1] and ln(p + 1e-6) in the entropy.
    """
    classes = logits.shape[1]
    q, bootstrap_weight = q.to(logits.dtype), bootstrap_weight.to(logits.dtype)
    log_prob = F.log_softmax(logits, dim=1)
    prob = log_prob.exp()
    prediction = logits.argmax(dim=1)
    # p ln p -> 0 at p = 0, in value and gradient: masked classes have logits of -inf.
    entropy = -(prob * log_prob.masked_fill(log_prob == -math.inf, 0.0)).sum(dim=1)
    target_log_prob = log_prob.gather(1, target.unsqueeze(1)).squeeze(1)

    if official:
        target_prob = prob.gather(1, target.unsqueeze(1)).squeeze(1).clamp(OFFICIAL_EPSILON, 1.0)
        positive = torch.where(q == 0, 1.0, q)
        loss = torch.where(q == 0, -target_log_prob, (1.0 - target_prob**positive) / positive)
        soft = -(prob * (prob + OFFICIAL_EPSILON).log()).sum(dim=1)
    else:
        loss = generalized_cross_entropy(target_log_prob, q)
        soft = entropy
    if classes > 1:
        measure = -log_prob.gather(1, prediction.unsqueeze(1)).squeeze(1) if hard else soft
        loss = loss + bootstrap_term(measure, q, bootstrap_weight, classes)
    return RowLosses(loss, target_log_prob.exp(), entropy, prediction)


def reduced_loss(rows: Rows, official: bool = False) -> tuple[Tensor, RowStats | None]:
    """The reduced loss of a checked call, and its statistics where they were asked for, both over flat rows.

    A target that is neither a class nor ``ignore_index`` makes its row's loss NaN, without a host synchronisation.
    """
    logits = rows.logits.float() if rows.logits.dtype in HALVES else rows.logits
    ignored = rows.target == rows.ignore_index
    valid = (rows.target >= 0) & (rows.target < logits.shape[1])
    target = torch.where(valid, rows.target, 0)

    # Ignored rows leave the graph before anything is computed from them: a NaN in one must not reach the gradient.
    kept = logits.masked_fill(ignored.unsqueeze(1), 0.0)
    losses = row_losses(kept, target, rows.q, rows.bootstrap_weight, hard=rows.hard, official=official)
    factor = row_factors(rows.target, logits.shape[1], rows.weight, rows.ignore_index, logits.dtype)
    loss = torch.where(ignored, 0.0, losses.loss * factor)
    if rows.reduction != "none":
        loss = loss.sum()
    if rows.reduction == "mean":
        loss = loss / factor.sum()
    if not rows.want_stats:
        return loss, None

    with torch.no_grad():
        every = row_losses(logits, target, rows.q, rows.bootstrap_weight, hard=rows.hard)
        known = valid & ~ignored
        return loss, RowStats(torch.where(known, every.target_prob, math.nan), every.entropy, every.prediction)


def run_weighted(run: Callable[[Rows], tuple[Tensor, RowStats | None]], rows: Rows) -> tuple[Tensor, RowStats | None]:
    """``run(rows)``, and where there are sample weights its losses of rows, weighted and then reduced.

    "mean" divides by the sum of what the rows count: sample weight times class weight, 0 of an ignored row.
    """
    if rows.sample_weight is None:
        return run(rows)
    loss, stats = run(rows._replace(reduction="none", sample_weight=None))
    kept = torch.where(rows.target == rows.ignore_index, 0.0, rows.sample_weight)
    loss = loss * kept
    if rows.reduction != "none":
        loss = loss.sum()
    if rows.reduction == "mean":
        classes = rows.logits.shape[1]
        loss = loss / (kept * row_factors(rows.target, classes, rows.weight, rows.ignore_index, kept.dtype)).sum()
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
    rows = check(
        input, target, q, bootstrap_weight, weight, ignore_index, reduction, bootstrap, return_stats, sample_weight
    )
    raise_for_labels(rows)
    shaped: Tensor | tuple[Tensor, RowStats] = rows.shaped(*run_weighted(lambda of: reduced_loss(of, official), rows))
    return shaped
