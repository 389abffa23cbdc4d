"""Statistics of rows alone, for whoever makes a loss of them: slices of classes on several devices."""

from __future__ import annotations

import triton
import triton.language as tl

from dal_kernels.backends.triton.long_rows import merged_splits, read_blocks
from dal_kernels.backends.triton.objectives import LN2
from dal_kernels.backends.triton.row import RowSums


@triton.jit
def store_row_sums(
    sums_ptr, argmax_ptr, row, live, count, peak, sums, argmax, nan_at,
    CLASSES: tl.constexpr, ARGMAX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(3 or 5, N) sums, and the predicted class. A NaN is the maximum."""
    if ARGMAX:
        tl.store(argmax_ptr + row, tl.where(nan_at < CLASSES, nan_at, argmax), mask=live)
    tl.store(sums_ptr + row, tl.where(nan_at < CLASSES, float("nan"), peak), mask=live)
    tl.store(sums_ptr + count + row, sums.total, mask=live)
    tl.store(sums_ptr + 2 * count + row, sums.weighted, mask=live)
    if WIDE:
        tl.store(sums_ptr + 3 * count + row, sums.differences, mask=live)
        tl.store(sums_ptr + 4 * count + row, sums.squares, mask=live)


@triton.jit
def row_statistics(
    logits_ptr, row_stride, sums_ptr, argmax_ptr, count,
    ARGMAX: tl.constexpr, WIDE: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    start = logits_ptr + row * (CLASSES if PACKED else row_stride)
    peak, sums, argmax, nan_at = read_blocks(
        start, 0, tl.cdiv(CLASSES, BLOCK), True, CLASSES, BLOCK, ARGMAX, True, WIDE, ACC
    )
    sums = RowSums(sums.total, sums.weighted * LN2, sums.differences, sums.squares)
    store_row_sums(
        sums_ptr, argmax_ptr, row, row < count, count, peak, sums, argmax, nan_at, CLASSES, ARGMAX, WIDE
    )  # fmt: skip


@triton.jit
def merge_statistics(
    parts_ptr, places_ptr, sums_ptr, argmax_ptr, count,
    ARGMAX: tl.constexpr, WIDE: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One program for all rows, which are few."""
    row = tl.arange(0, ROWS)
    live = row < count
    peak, sums, argmax, nan_at = merged_splits(parts_ptr, places_ptr, row, live, count, CLASSES, BLOCK, SPLITS, WIDE)
    store_row_sums(sums_ptr, argmax_ptr, row, live, count, peak, sums, argmax, nan_at, CLASSES, ARGMAX, WIDE)
