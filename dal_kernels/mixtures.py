"""Losses of rows whose targets are smoothed or two, made of quantities of the rows in plain vectors of N values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dal_kernels.arguments import Call, RowStats
from dal_kernels.fields import loss_dtype
from dal_kernels.objective import RowQuantities
from dal_kernels.reference import row_factors
from dal_kernels.tensors import is_number, of_rows, shape_of

# Another target, and the share of the first.
Mix = tuple[Tensor, float | Tensor]
# What makes differentiable quantities of the rows of a call for each of some targets, and the prediction:
# :func:`dal_kernels.quantities.quantities_of_call`, or its like behind a classifier layer.
Quantities = Callable[[Call, tuple[Tensor, ...]], tuple[tuple[RowQuantities, ...], Tensor]]
# The other target and the share of the first, of flat rows.
Other = tuple[Tensor, Any]


class SmoothedQuantities(RowQuantities):
    """Quantities whose l and p_y are mixed with their means over the classes: G / C and 1 / C."""

    smoothing = 0.0

    @classmethod
    def of(cls, row: RowQuantities, smoothing: float) -> SmoothedQuantities:
        own = 1 - smoothing
        smoothed = cls(own * row.log_prob + smoothing / row.classes * row.sum_log_prob, *row[1:])
        smoothed.smoothing = smoothing
        smoothed.plain = row
        return smoothed

    plain: RowQuantities

    @property
    def prob(self) -> Tensor:
        return (1 - self.smoothing) * self.plain.prob + self.smoothing / self.classes

    @property
    def miss(self) -> Tensor:
        return (1 - self.smoothing) * self.plain.miss + self.smoothing * (self.classes - 1) / self.classes


def mixed_loss(
    call: Call, label_smoothing: float, other: Other | None, quantities: Quantities
) -> tuple[Tensor, RowStats | None]:
    """The reduced loss and statistics of flat rows whose targets are smoothed or mixed, in vectors of N values."""
    targets, shares = [call.target], [1.0]
    if other is not None:
        other_target, share = other
        targets, shares = [call.target, other_target], [share, 1.0 - share]
    counted = [labels != call.ignore_index for labels in targets]
    # A row of which one target is ignored is a row of the other.
    first = torch.where(counted[0], targets[0], targets[-1])
    others = [torch.where(has, labels, first) for has, labels in zip(counted[1:], targets[1:], strict=True)]
    rows, prediction = quantities(call._replace(target=first), (first, *others))
    values = call.knobs.to(rows[0].log_prob.dtype).unbind(-1)
    classes = call.logits.shape[1]
    total = weights = torch.zeros_like(rows[0].log_prob)
    for row, labels, has, share in zip(rows, targets, counted, shares, strict=True):
        if label_smoothing > 0:
            row = SmoothedQuantities.of(row, label_smoothing)
        factor = share * row_factors(labels, classes, call.weight, call.ignore_index, row.log_prob.dtype)
        if call.sample_weight is not None:
            factor = factor * call.sample_weight
        total = total + torch.where(has, call.objective.formula(row, *values) * factor, 0.0)
        weights = weights + torch.where(has, factor, 0.0)
    loss = reduced(total, weights, call.reduction)
    stats = None
    if call.want_stats:
        prob = torch.where(counted[0], rows[0].prob, float("nan"))
        stats = RowStats(prob.detach(), rows[0].entropy.detach(), prediction, rows[0].max_log_prob.detach().exp())
    return loss, stats


def reduced(rows: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """Weighted losses of rows as the caller wants them; "mean" divides by the sum of what the rows count."""
    loss = rows if reduction == "none" else rows.sum()
    return loss / weights.sum() if reduction == "mean" else loss


def other_of(call: Call, input: Tensor, target: Tensor, mix: Mix) -> Other:
    """The other target and the share of the first, as flat rows."""
    if not (isinstance(mix, tuple) and len(mix) == 2):
        raise TypeError(f"mix must be a pair (other_target, weight), got {type(mix).__name__}")
    other, share = mix
    if not isinstance(other, Tensor) or other.shape != target.shape or other.is_floating_point():
        got = shape_of(other) if isinstance(other, Tensor) else type(other).__name__
        raise ValueError(f"mix[0] must be class indices shaped like target, {tuple(target.shape)}, got {got}")
    if isinstance(share, Tensor):
        share = share.to(loss_dtype(input))
        share = share if share.dim() == 0 else of_rows("mix[1]", share, input, call.shape, "one weight or one a row")
    elif not is_number(share) or not 0 <= share <= 1:
        raise ValueError(f"mix[1] must be a weight from 0 to 1, got {share!r}")
    return other.reshape(-1).long(), share
