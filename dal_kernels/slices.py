"""A batch of rows whose classes lie in slices: statistics of a slice, merged, and the gradient of a slice from them.

Statistics (m, S, W) are those of csrc/row_stats.h, in float64: a few numbers a row cost nothing. The objective is
reference.py's, and the coefficients of its gradient are its derivatives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dal_kernels.arguments import HALVES, Rows, RowStats
from dal_kernels.fields import FIELDS
from dal_kernels.ops import KERNELS
from dal_kernels.reference import bootstrap_term, generalized_cross_entropy, row_factors

# In gradient(): a row that is ignored, and a class that lies in another slice.
IGNORED = -1
_SCALE, _ENTROPY = FIELDS.index("scale"), FIELDS.index("entropy")
# As an exponent in the place of -inf (or of one that far down): its power is 0, and its product with that is 0 too.
_LOWEST = -1e4


class Statistics(NamedTuple):
    """Of rows (N,), float64: m = max z, S = sum e^(z - m), W = sum e^(z - m) (z - m); int64: the first class with m.

    Of a slice without classes, or of -inf alone, S = W = 0. A NaN is the maximum.
    """

    peak: Tensor
    total: Tensor
    weighted: Tensor
    argmax: Tensor


def statistics(logits: Tensor, backend: str) -> Statistics:
    """Of rows (N, C), C >= 0, by the kernels of ``backend``."""
    rows, classes = logits.shape
    if classes == 0:
        zero = logits.new_zeros(rows, dtype=torch.float64)
        return Statistics(zero - math.inf, zero, zero, zero.long())
    if backend == "eager":
        z = logits.float() if logits.dtype in HALVES else logits
        argmax = z.argmax(1)
        peak = z.gather(1, argmax.unsqueeze(1))
        d = (z - _origin(peak)).clamp_min(_LOWEST)
        e = d.exp()
        return Statistics(peak.squeeze(1).double(), e.sum(1).double(), (e * d).sum(1).double(), argmax)
    # Any loss will do: cross-entropy of the first class has the scale 1 / S.
    kernels, zero = KERNELS[backend], logits.new_zeros((), dtype=torch.float32)
    target = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    _, _, fields, argmax, *_ = kernels.loss_and_fields(
        logits, target, zero, zero, None, IGNORED, 0, False, False, True
    )  # fmt: skip
    peak = logits.gather(1, argmax.unsqueeze(1)).squeeze(1).double()
    total = 1 / fields[_SCALE].double()
    weighted = total * (total.log() - fields[_ENTROPY].double())
    empty = peak == -math.inf
    return Statistics(peak, torch.where(empty, 0.0, total), torch.where(empty, 0.0, weighted), argmax)


def _origin(peak: Tensor) -> Tensor:
    """What exponents of a row are relative to: m, or 0 in one of -inf alone, where -inf - -inf would be NaN."""
    return torch.where(peak == -math.inf, 0.0, peak)


def _moved(of: Statistics, peak: Tensor) -> Statistics:
    """To a larger maximum: with s = m - peak, W <- e^s (W + S s), S <- e^s S. What has S = 0 has nothing to move."""
    shift = torch.where(of.total == 0, 0.0, of.peak - peak).clamp_min(_LOWEST)
    ratio = shift.exp()
    return Statistics(peak, ratio * of.total, ratio * (of.weighted + of.total * shift), of.argmax)


def merge(slices: Statistics) -> Statistics:
    """Of whole rows from those of slices (R, N), which name their argmax as a class of the row. The first of equals."""
    peak = slices.peak.amax(0)
    moved = _moved(slices, peak)
    largest = torch.where(peak.isnan(), slices.peak.isnan(), slices.peak == peak)
    argmax = torch.where(largest, slices.argmax, torch.iinfo(torch.int64).max).amin(0)
    return Statistics(peak, moved.total.sum(0), moved.weighted.sum(0), argmax)


class Finished(NamedTuple):
    """Of flat rows: the reduced loss, and A, B, t, u of objective.h (float64, divided for a mean), or None."""

    loss: Tensor
    coefficients: tuple[Tensor, Tensor, Tensor, Tensor] | None
    stats: RowStats | None


def finish(rows: Rows, of: Statistics, target_logit: Tensor, want_gradient: bool) -> Finished:
    """Statistics of whole rows -> what reference.reduced_loss gives, and the coefficients of the gradient."""
    classes, dtype = rows.logits.shape[1], torch.float64
    q, bootstrap_weight = rows.q.to(dtype), rows.bootstrap_weight.to(dtype)
    log_sum = of.total.log()
    mean = of.weighted / of.total
    log_prob, entropy = target_logit - of.peak - log_sum, log_sum - mean
    with torch.set_grad_enabled(want_gradient):
        inner, measure = log_prob.detach().clone(), (log_sum if rows.hard else entropy).detach().clone()
        inner.requires_grad_(want_gradient), measure.requires_grad_(want_gradient)
        loss = generalized_cross_entropy(inner, q)
        if classes > 1:
            loss = loss + bootstrap_term(measure, q, bootstrap_weight, classes)
        coefficients = None
        if want_gradient:
            # Derivatives by ln p_y and by B(p): those by the logits follow by the chain rule.
            by_fit, by_measure = torch.autograd.grad(loss.sum(), (inner, measure), allow_unused=True)
            by_measure = torch.zeros_like(by_fit) if by_measure is None else by_measure
            u = by_measure if rows.hard else torch.zeros_like(by_fit)
            b = torch.zeros_like(by_fit) if rows.hard else -by_measure
            coefficients = ((u - by_fit - b * mean) / of.total, b / of.total, -by_fit, u)
    ignored = rows.target == rows.ignore_index
    factor = row_factors(rows.target, classes, rows.weight, rows.ignore_index, dtype)
    loss = torch.where(ignored, 0.0, loss.detach() * factor)
    if rows.reduction != "none":
        loss = loss.sum()
    if rows.reduction == "mean":
        divisor = factor.sum()
        loss = loss / divisor
        factor = torch.where(ignored, 0.0, factor / divisor)
    if coefficients is not None:
        a, b, t, u = (torch.where(ignored, 0.0, value * factor) for value in coefficients)
        coefficients = (a, b, t, u)
    sums = torch.float64 if rows.logits.dtype == torch.float64 else torch.float32
    stats = None
    if rows.want_stats:
        prob = torch.where(ignored, math.nan, log_prob.exp())
        stats = RowStats(prob.to(sums), entropy.to(sums), of.argmax)
    return Finished(loss.to(sums), coefficients, stats)


def fields_of(peak: Tensor, coefficients: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """m and coefficients as fields (5, N) of any backend."""
    return torch.stack([_origin(peak), *coefficients]).to(dtype)


def gradient(
    logits: Tensor, target: Tensor, fields: Tensor, prediction: Tensor, upstream: Tensor, backend: str, in_place: bool
) -> Tensor:
    """Gradient (N, C) of a slice.

    Args:
        target: (N,), the class within the slice; C where it lies in another; :data:`IGNORED` for a gradient of 0.
        prediction: the same of a hard bootstrap, -1 where it lies in another; else empty.
        in_place: the logits, contiguous, are not needed afterwards.
    """
    if logits.shape[1] == 0:
        return torch.empty_like(logits)
    if backend == "eager":
        return _eager_gradient(logits, target, fields, prediction, upstream)
    kernels = KERNELS[backend]
    correction = () if backend == "cpu" else (fields.new_empty(0),)
    run = kernels.overwrite if in_place else kernels.gradient
    return run(logits, target, fields, prediction, upstream, IGNORED, *correction)


def _eager_gradient(logits: Tensor, target: Tensor, fields: Tensor, prediction: Tensor, upstream: Tensor) -> Tensor:
    """e^(z - m) (A + B (z - m)) - t [j = y] - u [j = argmax z]."""
    classes = logits.shape[1]
    peak, a, b, t, u = fields.unsqueeze(2)
    d = (logits.to(fields.dtype) - peak).clamp_min(_LOWEST)
    result = d.exp() * (a + b * d)
    for at, term in ((target, t), (prediction, u)):
        if at.numel():
            inside = ((at >= 0) & (at < classes)).unsqueeze(1)
            result.scatter_add_(1, torch.where(inside, at.unsqueeze(1), 0), torch.where(inside, -term, 0.0))
    result = result * upstream.reshape(-1, 1)
    return result.masked_fill((target == IGNORED).unsqueeze(1), 0.0).to(logits.dtype)
