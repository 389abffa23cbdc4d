"""The pace of DAL: kernels of one program. Formula and reasons: :mod:`dal_kernels.pace`."""

from __future__ import annotations

import triton
import triton.language as tl

from dal_kernels import pace

_DECAY = tl.constexpr(pace.DECAY)
_LEAST, _SLOPE, _TOLERATED = tl.constexpr(pace.LEAST), tl.constexpr(pace.SLOPE), tl.constexpr(pace.TOLERATED)
_LOG_TEN = tl.constexpr(pace.LOG_TEN)
_FOR_CALLS = tl.constexpr(pace.CALLS)
_FROM, _RISE, _TO, _FALL = (tl.constexpr(value) for value in (pace.FROM, pace.RISE, pace.TO, pace.FALL))
_SLOW, _SLOWNESS = tl.constexpr(pace.SLOW), tl.constexpr(pace.SLOWNESS)
# Places of the numbers.
_Q, _WEIGHT, _CONFIDENCE, _AGREEMENT, _CALLS, _BOUND, _START, _OPENING = (tl.constexpr(place) for place in range(8))


@triton.jit
def _share(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def doubt(confidence, agreement, calls):
    """As :func:`dal_kernels.pace.doubt`."""
    unsure = _share((confidence - _FROM) / _RISE) * _share((_TO - confidence) / _FALL)
    return _share(calls / _FOR_CALLS) * unsure * _share((_SLOW - agreement / confidence) / _SLOWNESS)


@triton.jit
def store_pace(numbers_ptr, confidence, agreement, calls, bound, q_start, opening, q_end, max_weight):
    """q and the bootstrap weight, as :func:`dal_kernels.pace.keep_pace`."""
    reach = q_end * confidence
    bracket = (1.0 - agreement / confidence) * _SLOPE + _LEAST
    free = reach * bracket / (reach * (_SLOPE * _TOLERATED) + 1.0)
    free = tl.minimum(tl.maximum(free, reach * _LEAST), reach)
    least = q_start * tl.maximum(opening, doubt(confidence, agreement, calls))
    q = tl.minimum(bound, tl.maximum(least / tl.maximum(-tl.log(confidence) / _LOG_TEN, 1.0), free))
    tl.store(numbers_ptr + _Q, q)
    tl.store(numbers_ptr + _WEIGHT, tl.where(q_end > 1.0, max_weight * _share((q - 1.0) / (q_end - 1.0)), 0.0))


@triton.jit
def follow(
    numbers_ptr, max_prob_ptr, target_prob_ptr, prediction_ptr, target_ptr, target_stride, count, every, q_end,
    max_weight, BLOCK: tl.constexpr,
):  # fmt: skip
    """The averages follow one call, and the pace follows them."""
    confidence = tl.zeros((BLOCK,), tl.float64)
    agreement = tl.zeros((BLOCK,), tl.float64)
    rows = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, tl.cdiv(count, every), BLOCK):
        row = (first + tl.arange(0, BLOCK)).to(tl.int64) * every
        live = row < count
        # From the cache that all programs share: what one of them had of its own could be older.
        target_prob = tl.load(target_prob_ptr + row, mask=live, other=float("nan"), cache_modifier=".cg")
        counted = target_prob == target_prob  # not of ignored rows, nor of those with a NaN among their logits
        confidence += tl.load(max_prob_ptr + row, mask=counted, other=0.0, cache_modifier=".cg").to(tl.float64)
        prediction = tl.load(prediction_ptr + row, mask=counted, other=0, cache_modifier=".cg")
        target = tl.load(target_ptr + row * target_stride, mask=counted, other=1)
        agreement += (counted & (prediction == target)).to(tl.float64)
        rows += counted.to(tl.float64)
    number = tl.sum(rows, 0)
    calls = tl.load(numbers_ptr + _CALLS) + tl.where(number > 0.0, 1.0, 0.0)
    weight = tl.where(number > 0.0, 1.0 - _DECAY, 0.0)
    number = tl.maximum(number, 1.0)
    sure = tl.load(numbers_ptr + _CONFIDENCE)
    sure += (weight * (tl.sum(confidence, 0) / number - sure)).to(tl.float32)
    agreeing = tl.load(numbers_ptr + _AGREEMENT)
    agreeing += (weight * (tl.sum(agreement, 0) / number - agreeing)).to(tl.float32)
    tl.store(numbers_ptr + _CONFIDENCE, sure)
    tl.store(numbers_ptr + _AGREEMENT, agreeing)
    tl.store(numbers_ptr + _CALLS, calls)
    bound, q_start = tl.load(numbers_ptr + _BOUND), tl.load(numbers_ptr + _START)
    opening = tl.load(numbers_ptr + _OPENING)
    store_pace(numbers_ptr, sure, agreeing, calls, bound, q_start, opening, q_end, max_weight)


@triton.jit
def follow_rows(
    numbers_ptr, max_prob_ptr, target_prob_ptr, prediction_ptr, target_ptr, count, every, q_end, max_weight,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """In a launch of its own."""
    follow(
        numbers_ptr, max_prob_ptr, target_prob_ptr, prediction_ptr, target_ptr, 1, count, every, q_end, max_weight,
        BLOCK,
    )  # fmt: skip


@triton.jit
def set_bound(numbers_ptr, bound, q_start, opening, q_end, max_weight):
    tl.store(numbers_ptr + _BOUND, bound)
    tl.store(numbers_ptr + _START, q_start)
    tl.store(numbers_ptr + _OPENING, opening)
    confidence, agreement = tl.load(numbers_ptr + _CONFIDENCE), tl.load(numbers_ptr + _AGREEMENT)
    calls = tl.load(numbers_ptr + _CALLS)
    store_pace(numbers_ptr, confidence, agreement, calls, bound, q_start, opening, q_end, max_weight)
