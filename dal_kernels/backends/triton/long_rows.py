"""Longer rows: statistics now, the gradient in the backward, for a second read comes either way."""

from __future__ import annotations

import triton
import triton.language as tl

from dal_kernels.backends.triton.objectives import LN2
from dal_kernels.backends.triton.reduction import Reduction, reduce_losses, store_loss, store_sums
from dal_kernels.backends.triton.row import (
    LOWEST,
    RowSums,
    exponent,
    finish,
    origin_of,
    read_knobs,
    read_target,
    read_weight,
    rebase,
    store_fields,
    store_statistics,
)


@triton.jit
def wants_entropy(knobs_ptr, knobs_stride, row, ENTROPY: tl.constexpr, PREDICTION: tl.constexpr):
    """Whether anything asks for W of a row: no loss does where its second knob, the weight of the entropy, is 0."""
    if ENTROPY and not PREDICTION:
        return tl.load(knobs_ptr + row * knobs_stride + 1) != 0.0
    else:
        return PREDICTION


@triton.jit
def read_blocks(
    start, first, last, entropic,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, ARGMAX: tl.constexpr, NAN: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Of blocks [first, last) of a row: (peak, sums relative to it, W to base 2, argmax, first NaN)."""
    columns = tl.arange(0, BLOCK)
    peak = tl.full((), -float("inf"), ACC)
    argmax = tl.full((), 0, tl.int64)
    nan_at = tl.full((), CLASSES, tl.int64)
    # One accumulator a lane, all relative to the largest logit so far; they move only when that grows.
    zero = tl.zeros((BLOCK,), ACC)
    sums = RowSums(zero, zero, zero, zero)
    for block in range(first, last):
        at = block * BLOCK + columns
        z = tl.load(start + at, mask=at < CLASSES, other=-float("inf")).to(ACC)
        top = tl.max(z, 0)
        if top > peak:
            if peak > -float("inf"):
                # Every lane has one class of each block so far: only the last one is ragged.
                sums = rebase(sums, (block - first).to(ACC), peak, top, WIDE)
            peak = top
            if ARGMAX:
                argmax = tl.min(tl.where(z == top, at, CLASSES), 0).to(tl.int64)
        if NAN:
            nan_at = tl.minimum(nan_at, tl.min(tl.where(z != z, at, CLASSES), 0).to(tl.int64))
        d = exponent(z, origin_of(peak))
        e = tl.exp2(d)
        total = sums.total + e
        weighted = sums.weighted
        if entropic:
            weighted += e * tl.maximum(d, LOWEST)
        differences = sums.differences
        squares = sums.squares
        if WIDE:
            differences += tl.where(at < CLASSES, z - origin_of(peak), 0.0)
            squares += e * e
        sums = RowSums(total, weighted, differences, squares)
    whole = RowSums(tl.sum(sums.total, 0), tl.sum(sums.weighted, 0), 0.0, 0.0)
    if WIDE:
        whole = RowSums(whole.total, whole.weighted, tl.sum(sums.differences, 0), tl.sum(sums.squares, 0))
    return peak, whole, argmax, nan_at


@triton.jit
def finish_rows(
    peak, sums, argmax, row, live, logits_ptr, row_stride, target_ptr, target_stride, knobs_ptr, knobs_stride,
    weight_ptr, loss_ptr, fields_ptr, prediction_ptr, count, ignore_index,
    OBJECTIVE: tl.constexpr, KNOBS: tl.constexpr, WIDE: tl.constexpr, CLASSES: tl.constexpr, LOG_CLASSES: tl.constexpr,
    MEAN: tl.constexpr, REDUCED: tl.constexpr, FIELDS: tl.constexpr, PREDICTION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Merged statistics, W to base e -> what outlives the forward; returns the sums of losses and weights."""
    target, ignored, counted = read_target(target_ptr, target_stride, row, live, ignore_index, CLASSES)
    knobs = read_knobs(knobs_ptr, knobs_stride, row, live, KNOBS, True, ACC)
    origin = origin_of(peak)
    target_z = tl.load(logits_ptr + row * row_stride + target, mask=counted, other=float("nan")).to(ACC)
    weight = read_weight(weight_ptr, target, ignored, counted, ACC)
    scaled = weight / count if MEAN else weight
    loss, gradient, log_prob = finish(
        sums, origin, target_z - origin, ignored, knobs, scaled, OBJECTIVE, CLASSES, LOG_CLASSES, WIDE
    )
    loss = loss * weight
    if PREDICTION:
        store_statistics(
            fields_ptr, prediction_ptr, row, count, live, gradient, log_prob, sums.total, sums.weighted, argmax, ignored
        )  # fmt: skip
    if FIELDS:
        store_fields(fields_ptr, row, count, live, gradient, WIDE, PREDICTION)
    if not REDUCED:
        tl.store(loss_ptr + row, loss, mask=live)
    return tl.sum(loss, 0), tl.sum(weight, 0)


@triton.jit
def loss_long_rows(
    logits_ptr, row_stride, target_ptr, target_stride, knobs_ptr, knobs_stride, weight_ptr,
    loss_ptr, correction_ptr, partial_ptr, ticket_ptr, fields_ptr, prediction_ptr, count, ignore_index,
    numbers_ptr, every, q_end, max_weight,
    OBJECTIVE: tl.constexpr, KNOBS: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, WIDE: tl.constexpr,
    CLASSES: tl.constexpr, LOG_CLASSES: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
    MEAN: tl.constexpr, REDUCED: tl.constexpr, FIELDS: tl.constexpr, PREDICTION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    start = logits_ptr + tl.program_id(0).to(tl.int64) * (CLASSES if PACKED else row_stride)
    ignored = tl.load(target_ptr + tl.program_id(0).to(tl.int64) * target_stride) == ignore_index
    blocks = tl.cdiv(CLASSES, BLOCK)
    if not PREDICTION:
        blocks = tl.where(ignored, 0, blocks)
    entropic = wants_entropy(knobs_ptr, knobs_stride, tl.program_id(0).to(tl.int64), ENTROPY, PREDICTION)
    peak, sums, argmax, nan_at = read_blocks(
        start, 0, blocks, entropic, CLASSES, BLOCK, ARGMAX or PREDICTION, PREDICTION, WIDE, ACC
    )
    one = tl.zeros((1,), ACC)
    sums = RowSums(sums.total + one, sums.weighted * LN2 + one, sums.differences + one, sums.squares + one)
    loss, weight = finish_rows(
        peak + one, sums, tl.where(nan_at < CLASSES, nan_at, argmax) + tl.zeros((1,), tl.int64), row, row < count,
        logits_ptr, row_stride, target_ptr, target_stride, knobs_ptr, knobs_stride, weight_ptr, loss_ptr, fields_ptr,
        prediction_ptr, count, ignore_index,
        OBJECTIVE, KNOBS, WIDE, CLASSES, LOG_CLASSES, MEAN, REDUCED, FIELDS, PREDICTION, ACC,
    )  # fmt: skip
    if REDUCED:
        reduction = Reduction(
            loss_ptr, correction_ptr, partial_ptr, ticket_ptr, weight_ptr, target_ptr, target_stride, None, fields_ptr,
            count, ignore_index, prediction_ptr, numbers_ptr, every, q_end, max_weight, None,
        )  # fmt: skip
        store_sums(reduction, loss, weight)
        reduce_losses(reduction, loss, weight, CLASSES, MEAN, False, FIELDS, SUMS)


# ---- few long rows: several programs share one


@triton.jit
def split_statistics(
    logits_ptr, row_stride, knobs_ptr, knobs_stride, parts_ptr, places_ptr,
    ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, WIDE: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, PACKED: tl.constexpr, PREDICTION: tl.constexpr,
):  # fmt: skip
    """Program (row, split) reads its share of the blocks. parts: (3 or 5, N, SPLITS), places: (2, N, SPLITS) int64."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    BLOCKS: tl.constexpr = (CLASSES + BLOCK - 1) // BLOCK
    peak, sums, argmax, nan_at = read_blocks(
        logits_ptr + row * (CLASSES if PACKED else row_stride), split * BLOCKS // SPLITS,
        (split + 1) * BLOCKS // SPLITS, wants_entropy(knobs_ptr, knobs_stride, row, ENTROPY, PREDICTION),
        CLASSES, BLOCK, ARGMAX or PREDICTION, PREDICTION, WIDE, ACC,
    )  # fmt: skip
    at = row * SPLITS + split
    size = tl.num_programs(0) * SPLITS
    tl.store(parts_ptr + at, peak)
    tl.store(parts_ptr + size + at, sums.total)
    tl.store(parts_ptr + 2 * size + at, sums.weighted)
    if WIDE:
        tl.store(parts_ptr + 3 * size + at, sums.differences)
        tl.store(parts_ptr + 4 * size + at, sums.squares)
    tl.store(places_ptr + at, argmax)
    tl.store(places_ptr + size + at, nan_at)


@triton.jit
def merged_splits(
    parts_ptr, places_ptr, row, live, count, CLASSES: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """(peak, sums, W to base e, argmax, first NaN) of whole rows, the splits merged in order."""
    split = tl.arange(0, SPLITS)
    at = row[:, None] * SPLITS + split[None, :]
    size = count * SPLITS
    inside = live[:, None]
    peaks = tl.load(parts_ptr + at, mask=inside, other=0.0)
    totals = tl.load(parts_ptr + size + at, mask=inside, other=1.0)
    weights = tl.load(parts_ptr + 2 * size + at, mask=inside, other=0.0)
    peak = tl.max(peaks, 1)
    parts = RowSums(totals, weights, None, None)
    classes = None
    if WIDE:
        differences = tl.load(parts_ptr + 3 * size + at, mask=inside, other=0.0)
        squares = tl.load(parts_ptr + 4 * size + at, mask=inside, other=1.0)
        parts = RowSums(totals, weights, differences, squares)
        BLOCKS: tl.constexpr = (CLASSES + BLOCK - 1) // BLOCK
        last = tl.minimum((split + 1) * BLOCKS // SPLITS * BLOCK, CLASSES)
        classes = (last - split * BLOCKS // SPLITS * BLOCK).to(peaks.dtype)[None, :]
    parts = rebase(parts, classes, peaks, peak[:, None], WIDE)
    sums = RowSums(tl.sum(parts.total, 1), tl.sum(parts.weighted, 1) * LN2, None, None)
    if WIDE:
        sums = RowSums(sums.total, sums.weighted, tl.sum(parts.differences, 1), tl.sum(parts.squares, 1))
    argmax = tl.load(places_ptr + at, mask=inside, other=0)
    argmax = tl.min(tl.where(peaks == peak[:, None], argmax, CLASSES), 1)
    nan_at = tl.min(tl.load(places_ptr + size + at, mask=inside, other=CLASSES), 1)
    return peak, sums, argmax, nan_at


@triton.jit
def merge_splits(
    parts_ptr, places_ptr, logits_ptr, row_stride, target_ptr, target_stride, knobs_ptr, knobs_stride,
    weight_ptr, loss_ptr, correction_ptr, fields_ptr, prediction_ptr, count, ignore_index,
    OBJECTIVE: tl.constexpr, KNOBS: tl.constexpr, WIDE: tl.constexpr, CLASSES: tl.constexpr, LOG_CLASSES: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, MEAN: tl.constexpr, REDUCED: tl.constexpr,
    FIELDS: tl.constexpr, PREDICTION: tl.constexpr,
):  # fmt: skip
    """One program for all rows, which are few: the splits merged, the objective, the reduction."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.arange(0, ROWS)
    live = row < count
    peak, sums, argmax, nan_at = merged_splits(parts_ptr, places_ptr, row, live, count, CLASSES, BLOCK, SPLITS, WIDE)
    loss, weight = finish_rows(
        peak, sums, tl.where(nan_at < CLASSES, nan_at, argmax), row.to(tl.int64), live,
        logits_ptr, row_stride, target_ptr, target_stride, knobs_ptr, knobs_stride, weight_ptr, loss_ptr,
        fields_ptr, prediction_ptr, count, ignore_index,
        OBJECTIVE, KNOBS, WIDE, CLASSES, LOG_CLASSES, MEAN, REDUCED, FIELDS, PREDICTION, ACC,
    )  # fmt: skip
    if REDUCED:
        reduction = Reduction(
            loss_ptr, correction_ptr, None, None, weight_ptr, target_ptr, target_stride, None, fields_ptr, count,
            ignore_index, None, None, 1, 0.0, 0.0, None,
        )  # fmt: skip
        store_loss(reduction, loss, weight, CLASSES, MEAN, False, FIELDS)
