"""A batch of rows whose classes lie in slices: statistics of a slice, merged, and the gradient of a slice from them.

Statistics are those of csrc/row_sums.h, in float64: a few numbers a row cost nothing. The objective is its formula, and
the slopes of it are autograd's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dal_kernels.arguments import Call, RowStats
from dal_kernels.fields import loss_dtype
from dal_kernels.objective import Objective, RowQuantities
from dal_kernels.ops import KERNELS
from dal_kernels.reference import row_factors
from dal_kernels.tensors import HALVES

# What gradient() takes for the target of an ignored row.
IGNORED = -1
# Takes the place of an exponent of -inf, or of one further down: its power is 0, and so is its product with that power,
# where -inf * 0 would be NaN.
_LOWEST = -1e4


class Statistics(NamedTuple):
    """Of rows (N,), float64, but for argmax, int64: the first class with m.

    With d = z - m: m = max z, S = sum e^d, W = sum e^d d, and of wide objectives D = sum d, P = sum e^2d, else None.
    Of a slice without classes, or of -inf alone, S = W = P = 0. A NaN is the maximum.

    Attributes:
        classes: how many are summed over, a number or (R, 1) of slices.
    """

    peak: Tensor
    total: Tensor
    weighted: Tensor
    argmax: Tensor
    differences: Tensor | None = None
    squares: Tensor | None = None
    classes: float | Tensor = 0


def statistics(logits: Tensor, backend: str, wide: bool) -> Statistics:
    """Of rows (N, C), C >= 0, by the kernels of ``backend``."""
    rows, classes = logits.shape
    if classes == 0:
        zero = logits.new_zeros(rows, dtype=torch.float64)
        nothing = zero if wide else None
        return Statistics(zero - math.inf, zero, zero, zero.long(), nothing, nothing)
    if backend != "eager":
        sums, argmax = KERNELS[backend].statistics(logits, True, wide)
        peak, total, weighted, *others = sums.double().unbind(0)
        differences, squares = others or (None, None)
        return Statistics(peak, total, weighted, argmax, differences, squares, classes)
    z = logits.float() if logits.dtype in HALVES else logits
    argmax = z.argmax(1)
    peak = z.gather(1, argmax.unsqueeze(1))
    difference = z - _origin(peak)
    d = difference.clamp_min(_LOWEST)
    e = d.exp()
    found = Statistics(peak.squeeze(1).double(), e.sum(1).double(), (e * d).sum(1).double(), argmax, classes=classes)
    if wide:
        found = found._replace(differences=difference.sum(1).double(), squares=(e * e).sum(1).double())
    return found


def _origin(peak: Tensor) -> Tensor:
    """What exponents of a row are relative to: m, or 0 in one of -inf alone, where -inf - -inf would be NaN."""
    return torch.where(peak == -math.inf, 0.0, peak)


def _moved(slices: Statistics, peak: Tensor) -> Statistics:
    """To a larger maximum: with s = m - peak, r = e^s: W <- r (W + S s), S <- r S, D <- D + C s, P <- r^2 P.

    What has S = 0 has nothing to move.
    """
    moves = slices.total != 0
    shift = torch.where(moves, slices.peak - peak, 0.0)
    clamped = shift.clamp_min(_LOWEST)
    ratio = clamped.exp()
    moved = slices._replace(
        peak=peak, total=ratio * slices.total, weighted=ratio * (slices.weighted + slices.total * clamped)
    )
    if slices.differences is None or slices.squares is None:
        return moved
    return moved._replace(
        differences=slices.differences + slices.classes * shift, squares=ratio * ratio * slices.squares
    )


def joined(chunks: list[Statistics]) -> Statistics:
    """Of all rows, from those of chunks of them over the same classes."""
    columns: list[Any] = list(zip(*(chunk[:6] for chunk in chunks), strict=True))
    peak, total, weighted, argmax, differences, squares = (
        None if column[0] is None else torch.cat(column) for column in columns
    )
    return Statistics(peak, total, weighted, argmax, differences, squares, chunks[0].classes)  # type: ignore[arg-type]


def merge(slices: Statistics) -> Statistics:
    """Of whole rows from those of slices (R, N), which name their argmax as a class of the row. The first of equals."""
    peak = slices.peak.amax(0)
    moved = _moved(slices, peak)
    largest = torch.where(peak.isnan(), slices.peak.isnan(), slices.peak == peak)
    argmax = torch.where(largest, slices.argmax, torch.iinfo(torch.int64).max).amin(0)
    differences, squares = (None if sums is None else sums.sum(0) for sums in (moved.differences, moved.squares))
    return Statistics(peak, moved.total.sum(0), moved.weighted.sum(0), argmax, differences, squares)


def quantities_of(row_sums: Statistics, target_logit: Tensor, classes: int) -> RowQuantities:
    """What the formulas take, from statistics of whole rows."""
    log_sum = row_sums.total.log()
    unused = torch.full_like(log_sum, math.nan)
    return RowQuantities(
        log_prob=target_logit - row_sums.peak - log_sum,
        entropy=log_sum - row_sums.weighted / row_sums.total,
        max_log_prob=-log_sum,
        sum_log_prob=unused if row_sums.differences is None else row_sums.differences - classes * log_sum,
        square_sum=unused if row_sums.squares is None else row_sums.squares / row_sums.total**2,
        classes=classes,
    )


class Slopes(NamedTuple):
    """Derivatives of a loss by the quantities of its row, (N,)."""

    log_prob: Tensor
    entropy: Tensor
    max_log_prob: Tensor
    sum_log_prob: Tensor
    square_sum: Tensor


def slopes_of(objective: Objective, row: RowQuantities, knobs: tuple[Tensor, ...]) -> tuple[Tensor, Slopes]:
    """The loss of rows, and its slopes by autograd."""
    with torch.enable_grad():
        inner = [value.detach().clone().requires_grad_() for value in row.tensors]
        log_prob, entropy, max_log_prob, sum_log_prob, square_sum = inner
        loss = objective.formula(
            RowQuantities(log_prob, entropy, max_log_prob, sum_log_prob, square_sum, row.classes), *knobs
        )
        found = torch.autograd.grad(loss.sum(), inner, allow_unused=True)
    return loss.detach(), Slopes(*(torch.zeros_like(loss) if slope is None else slope for slope in found))


class Coefficients(NamedTuple):
    """Of a row, dL/dz_j = e^d (scale + slope d + square e^d) + constant - target_term [j = y] - argmax_term [j = k]."""

    scale: Tensor
    slope: Tensor
    target_term: Tensor
    argmax_term: Tensor
    square: Tensor
    constant: Tensor


def coefficients_of(row_sums: Statistics, row: RowQuantities, slopes: Slopes) -> Coefficients:
    """The one chain rule of all losses, as csrc/affine_gradient.h has it too."""
    square = slopes.square_sum if row_sums.squares is None else slopes.square_sum * row.square_sum
    a = -(slopes.log_prob + slopes.max_log_prob + row.classes * slopes.sum_log_prob + 2 * square)
    b = -slopes.entropy
    total = row_sums.total
    return Coefficients(
        (a - b * (row_sums.weighted / total)) / total,
        b / total,
        -slopes.log_prob,
        -slopes.max_log_prob,
        2 * slopes.square_sum / total**2,
        slopes.sum_log_prob,
    )


class Finished(NamedTuple):
    """Of flat rows: the reduced loss, and the coefficients of its gradient (float64, divided for a mean), or None."""

    loss: Tensor
    coefficients: Coefficients | None
    stats: RowStats | None


def finish(call: Call, row_sums: Statistics, target_logit: Tensor, want_gradient: bool) -> Finished:
    """Statistics of whole rows -> what reference.reduced_loss gives, and the coefficients of the gradient."""
    classes, dtype = call.logits.shape[1], torch.float64
    row = quantities_of(row_sums, target_logit, classes)
    loss, slopes = slopes_of(call.objective, row, call.knobs.to(dtype).unbind(-1))
    ignored = call.target == call.ignore_index
    factor = row_factors(call.target, classes, call.weight, call.ignore_index, dtype)
    loss = torch.where(ignored, 0.0, loss * factor)
    if call.reduction != "none":
        loss = loss.sum()
    if call.reduction == "mean":
        divisor = factor.sum()
        loss = loss / divisor
        factor = torch.where(ignored, 0.0, factor / divisor)
    coefficients = None
    if want_gradient:
        made = coefficients_of(row_sums, row, slopes)
        coefficients = Coefficients(*(torch.where(ignored, 0.0, value * factor) for value in made))
    sum_dtype = loss_dtype(call.logits)
    stats = None
    if call.want_stats:
        prob = torch.where(ignored, math.nan, row.prob)
        # In a row of -inf alone no class is the largest: NaN, as its entropy is.
        max_prob = torch.where(row_sums.total > 0, row.max_log_prob.exp(), math.nan)
        stats = RowStats(prob.to(sum_dtype), row.entropy.to(sum_dtype), row_sums.argmax, max_prob.to(sum_dtype))
    return Finished(loss.to(sum_dtype), coefficients, stats)


def fields_of(peak: Tensor, of_rows: Coefficients, dtype: torch.dtype, wide: bool) -> Tensor:
    """m and coefficients as fields of any backend: (5, N), or (10, N) of wide objectives."""
    fields = [_origin(peak), *of_rows[:4]]
    if wide:  # between them lie statistics, which no gradient reads
        fields += [*[torch.zeros_like(peak)] * 3, of_rows.square, of_rows.constant]
    return torch.stack(fields).to(dtype)


def within(classes: Tensor, ignored: Tensor, argmax: Tensor, offset: int, size: int) -> tuple[Tensor, Tensor]:
    """Target and predicted class of rows as classes of a slice, or as what :func:`gradient` takes for others."""

    def placed(of_rows: Tensor, elsewhere: int) -> Tensor:
        at = of_rows - offset
        return torch.where((at >= 0) & (at < size), at, elsewhere)

    return torch.where(ignored, IGNORED, placed(classes, size)), placed(argmax, -1)


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
    """Of :class:`Coefficients`."""
    classes = logits.shape[1]
    peak, a, b, t, u, *others = fields.unsqueeze(2)
    d = (logits.to(fields.dtype) - peak).clamp_min(_LOWEST)
    e = d.exp()
    if others:
        *_, square, constant = others
        result = e * (a + b * d + square * e) + constant
    else:
        result = e * (a + b * d)
    for at, term in ((target, t), (prediction, u)):
        if at.numel():
            inside = ((at >= 0) & (at < classes)).unsqueeze(1)
            result.scatter_add_(1, torch.where(inside, at.unsqueeze(1), 0), torch.where(inside, -term, 0.0))
    result = result * upstream.reshape(-1, 1)
    return result.masked_fill((target == IGNORED).unsqueeze(1), 0.0).to(logits.dtype)
