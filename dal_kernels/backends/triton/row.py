"""What every kernel computes of a row: statistics, loss, coefficients of the gradient, and what is kept of them.

Of an element: d = (z - m) log2 e and e = 2^d, for base 2 has an instruction. Of a row, all is to base e:

    S = sum e,   W = ln 2 sum e d,   ln p_y = z_y - m - ln S,   H = ln S - W / S
    dL/dz_j = e_j (A + B (z_j - m) + E e_j) + D - t [j = y] - u [j = argmax z]

and of losses that sum over all classes, "wide" ones, which alone have E and D, sum (z - m) and sum e^2 too.
dal_kernels/slices.py is the long form; csrc/row_sums.h and csrc/affine_gradient.h the same in C++.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dal_kernels.backends.triton.objectives import LN2, LOG2E, RowQuantities
from dal_kernels.fields import FIELDS

# Below 2^-1100 (and for -inf) e is 0; a finite d keeps e d at 0 too.
LOWEST = tl.constexpr(-1100.0)
# Fields of one row, field-major (fields, N), by the names of dal_kernels.fields.
MAX, SCALE, SLOPE, TARGET_TERM, ARGMAX_TERM, TARGET_PROB, ENTROPY_FIELD, MAX_PROB, SQUARE, CONSTANT = (
    tl.constexpr(FIELDS.index(name))
    for name in (
        "max", "scale", "slope", "target_term", "argmax_term", "target_prob", "entropy", "max_prob", "square",
        "constant",
    )
)  # fmt: skip


class RowSums(NamedTuple):
    """S, W, and of wide losses sum (z - m) and sum e^2."""

    total: Any
    weighted: Any
    differences: Any
    squares: Any


class RowGradient(NamedTuple):
    """(m, A, B, t, u, E, D)."""

    origin: Any
    scale: Any
    slope: Any
    target_term: Any
    argmax_term: Any
    square: Any
    constant: Any


# ---- statistics


@triton.jit
def origin_of(peak):
    """m of a maximum. A row (so far) of -inf alone takes 0: its exponentials are 0, not 2^(-inf + inf)."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def exponent(z, origin):
    """d = (z - m) log2 e, the difference first: it is 0 at the largest logit whatever its size, and exact near it.

    A product with a rounded one, subtracted in one fused multiply-add, would leave that rounding: 2^it is 0 or infinite
    for logits beyond 10^9.
    """
    return (z - origin) * LOG2E


@triton.jit
def rebase(sums, classes, peak, new, WIDE: tl.constexpr):
    """Sums over so many classes, W to base 2, moved to a larger maximum.

    With s = (peak - new) log2 e: W <- 2^s (W + S s), S <- 2^s S, sum (z - m) <- + classes (peak - new), and
    sum e^2 <- 4^s sum e^2. Of -inf alone, S = 0: s is whatever keeps that 0, for both maxima may be -inf.
    """
    step = tl.maximum(tl.minimum(exponent(peak, new), 0.0), LOWEST)
    ratio = tl.exp2(step)
    total = ratio * sums.total
    weighted = ratio * (sums.weighted + sums.total * step)
    if WIDE:
        moved = tl.where(peak == -float("inf"), 0.0, classes * (peak - new))
        return RowSums(total, weighted, sums.differences + moved, ratio * ratio * sums.squares)
    else:
        return RowSums(total, weighted, sums.differences, sums.squares)


@triton.jit
def finish(
    sums, origin, target_difference, ignored, knobs, row_weight,
    OBJECTIVE: tl.constexpr, CLASSES: tl.constexpr, LOG_CLASSES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Statistics of rows -> loss, gradient, and ln p_y. A bad label came with z_y - m = NaN.

    An ignored row goes through as one of a single class, with weight 0: nothing of it is left.
    """
    total = tl.where(ignored, 1.0, sums.total)
    weighted = tl.where(ignored, 0.0, sums.weighted)
    scaled = 1.0 / total
    log_sum = tl.log2(total) * LN2
    mean = weighted * scaled
    log_prob = tl.where(ignored, 0.0, target_difference - log_sum)
    sum_log_prob = log_sum
    square_sum = log_sum
    if WIDE:
        sum_log_prob = tl.where(ignored, 0.0, sums.differences) - CLASSES * log_sum
        square_sum = tl.where(ignored, 1.0, sums.squares) * scaled * scaled
    row = RowQuantities(log_prob, log_sum - mean, -log_sum, sum_log_prob, square_sum, CLASSES)
    slopes = OBJECTIVE(row, knobs, LOG_CLASSES)
    return slopes.loss, affine_gradient(row, slopes, origin, mean, scaled, row_weight), log_prob


@triton.jit
def affine_gradient(row, slopes, origin, mean, scaled, row_weight):
    """The one chain rule of all losses, from W / S and 1 / S: csrc/affine_gradient.h."""
    zero = tl.zeros_like(scaled)
    t = -slopes.by_log_prob
    a = t
    b = zero
    u = zero
    square = zero
    constant = zero
    if slopes.by_max_log_prob is not None:
        u -= slopes.by_max_log_prob
        a += u
    if slopes.by_entropy is not None:
        b -= slopes.by_entropy
        a += slopes.by_entropy * mean
    if slopes.by_sum_log_prob is not None:
        constant += slopes.by_sum_log_prob
        a -= row.classes * slopes.by_sum_log_prob
    if slopes.by_square_sum is not None:
        square += 2.0 * slopes.by_square_sum
        a -= 2.0 * row.square_sum * slopes.by_square_sum
    scaled_weight = scaled * row_weight
    return RowGradient(
        origin,
        scaled_weight * a,
        scaled_weight * b,
        row_weight * t,
        row_weight * u,
        scaled_weight * scaled * square,
        row_weight * constant,
    )


@triton.jit
def affine_at(difference, gradient, WIDE: tl.constexpr):
    """e (A + B (z - m) + E e) + D of single classes."""
    e = tl.exp2(difference * LOG2E)
    inner = gradient.scale + gradient.slope * tl.maximum(difference, LOWEST)
    if WIDE:
        return e * (inner + gradient.square * e) + gradient.constant
    else:
        return e * inner


# ---- what is read of a row beside its logits


@triton.jit
def read_target(target_ptr, target_stride, row, live, ignore_index, CLASSES: tl.constexpr):
    """(label, whether the row is ignored, whether the label is a class)."""
    target = tl.load(target_ptr + row * target_stride, mask=live, other=ignore_index)
    ignored = target == ignore_index
    return target, ignored, (target >= 0) & (target < CLASSES) & ~ignored


@triton.jit
def read_knobs(knobs_ptr, knobs_stride, row, live, KNOBS: tl.constexpr, PER_ROW: tl.constexpr, ACC: tl.constexpr):
    """Knobs, 0-d or one per row. A row beyond the last takes those of the first, of which every loss is finite."""
    knobs = ()
    for k in tl.static_range(KNOBS):
        if PER_ROW:
            knobs += (tl.load(knobs_ptr + tl.where(live, row, 0) * knobs_stride + k).to(ACC),)
        else:
            knobs += (tl.load(knobs_ptr + k).to(ACC),)
    return knobs


@triton.jit
def read_weight(weight_ptr, target, ignored, counted, ACC: tl.constexpr):
    if weight_ptr is not None:
        return tl.load(weight_ptr + target, mask=counted, other=0.0)
    else:
        return tl.where(ignored, 0.0, tl.full(target.shape, 1.0, ACC))


# ---- what is kept of a row


@triton.jit
def store_fields(fields_ptr, row, count, live, gradient, WIDE: tl.constexpr, PREDICTION: tl.constexpr):
    """What the gradient of a row is made from again, but for the argmax term."""
    tl.store(fields_ptr + MAX * count + row, gradient.origin, mask=live)
    tl.store(fields_ptr + SCALE * count + row, gradient.scale, mask=live)
    tl.store(fields_ptr + SLOPE * count + row, gradient.slope, mask=live)
    tl.store(fields_ptr + TARGET_TERM * count + row, gradient.target_term, mask=live)
    if WIDE:
        tl.store(fields_ptr + SQUARE * count + row, gradient.square, mask=live)
        tl.store(fields_ptr + CONSTANT * count + row, gradient.constant, mask=live)
        if not PREDICTION:
            # A wide objective has a place for them in any case, because fields lie in one order. Without the stores
            # the caller would get what memory held.
            zero = tl.zeros(row.shape, gradient.scale.dtype)
            tl.store(fields_ptr + ARGMAX_TERM * count + row, zero, mask=live)
            tl.store(fields_ptr + TARGET_PROB * count + row, zero, mask=live)
            tl.store(fields_ptr + ENTROPY_FIELD * count + row, zero, mask=live)
            tl.store(fields_ptr + MAX_PROB * count + row, zero, mask=live)


@triton.jit
def store_statistics(
    fields_ptr, prediction_ptr, row, count, live, gradient, log_prob, total, weighted, argmax, ignored
):  # fmt: skip
    """What the user learns of a row, and the argmax term."""
    tl.store(fields_ptr + ARGMAX_TERM * count + row, gradient.argmax_term, mask=live)
    tl.store(prediction_ptr + row, argmax, mask=live)
    prob = tl.exp2(log_prob * LOG2E)
    tl.store(fields_ptr + TARGET_PROB * count + row, tl.where(ignored, float("nan"), prob), mask=live)
    tl.store(fields_ptr + ENTROPY_FIELD * count + row, tl.log2(total) * LN2 - weighted / total, mask=live)
    # Of a row of -inf alone nothing is known, as of its entropy.
    tl.store(fields_ptr + MAX_PROB * count + row, tl.where(total > 0, 1.0 / total, float("nan")), mask=live)


@triton.jit
def correct_terms(
    gradient_ptr, at_target, target, argmax, gradient, has_target, has_argmax, ARGMAX: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The two classes of a row that differ from the affine rule, stored over it once the row is written.

    Cheaper than a comparison for each element. ``at_target``: the affine value there; ``has_*``: whether it is to be
    stored.
    """
    tl.debug_barrier()
    same = target == argmax
    t = gradient.target_term
    if ARGMAX:
        at_argmax = gradient.scale  # as z = m there
        if WIDE:
            at_argmax += gradient.square + gradient.constant
        tl.store(gradient_ptr + argmax, at_argmax - gradient.argmax_term - tl.where(same, t, 0.0), mask=has_argmax)
        tl.store(gradient_ptr + target, at_target - t, mask=has_target & ~same)
    else:
        tl.store(gradient_ptr + target, at_target - t, mask=has_target)
