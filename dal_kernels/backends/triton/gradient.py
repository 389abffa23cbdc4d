"""The backward: the written gradient scaled, or made from the fields of the forward."""

from __future__ import annotations

import triton
import triton.language as tl

from dal_kernels.backends.triton.apart import apart_at, class_step, image_and_position
from dal_kernels.backends.triton.row import (
    ARGMAX_TERM,
    CONSTANT,
    MAX,
    SCALE,
    SLOPE,
    SQUARE,
    TARGET_TERM,
    RowGradient,
    affine_at,
    correct_terms,
)


@triton.jit
def scale_gradient(gradient_ptr, upstream_ptr, correction_ptr, size, BLOCK: tl.constexpr):
    """gradient * upstream * correction in place; where that is 1, nothing at all."""
    factor = tl.load(upstream_ptr) * tl.load(correction_ptr)
    if factor == 1.0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(gradient_ptr + at, mask=at < size).to(factor.dtype)
    tl.store(gradient_ptr + at, (value * factor).to(gradient_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def row_factor(upstream_ptr, upstream_stride, correction_ptr, row, live):
    """What the gradient of a row is multiplied by, but for an ignored one."""
    factor = tl.load(upstream_ptr + row * upstream_stride, mask=live, other=1.0)
    if correction_ptr is not None:
        factor *= tl.load(correction_ptr)
    return factor


@triton.jit
def read_gradient(fields_ptr, row, live, count, factor, ARGMAX: tl.constexpr, WIDE: tl.constexpr):
    """What :func:`row.store_fields` and :func:`row.store_statistics` left, times a factor."""
    origin = tl.load(fields_ptr + MAX * count + row, mask=live, other=0.0)
    a = factor * tl.load(fields_ptr + SCALE * count + row, mask=live, other=0.0)
    b = factor * tl.load(fields_ptr + SLOPE * count + row, mask=live, other=0.0)
    t = factor * tl.load(fields_ptr + TARGET_TERM * count + row, mask=live, other=0.0)
    u = None
    square = None
    constant = None
    if ARGMAX:
        u = factor * tl.load(fields_ptr + ARGMAX_TERM * count + row, mask=live, other=0.0)
    if WIDE:
        square = factor * tl.load(fields_ptr + SQUARE * count + row, mask=live, other=0.0)
        constant = factor * tl.load(fields_ptr + CONSTANT * count + row, mask=live, other=0.0)
    return RowGradient(origin, a, b, t, u, square, constant)


@triton.jit
def over_classes(gradient, WIDE: tl.constexpr):
    """Of rows (N,), as (N, 1), what the affine rule takes."""
    square = None
    constant = None
    if WIDE:
        square = gradient.square[:, None]
        constant = gradient.constant[:, None]
    return RowGradient(None, gradient.scale[:, None], gradient.slope[:, None], None, None, square, constant)


@triton.jit
def gradient_rows(
    logits_ptr, row_stride, target_ptr, target_stride, fields_ptr, prediction_ptr, upstream_ptr, upstream_stride,
    correction_ptr, gradient_ptr, count, ignore_index,
    ARGMAX: tl.constexpr, WIDE: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PACKED: tl.constexpr, IF_CHANGED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Gradient from the fields of the forward. With IF_CHANGED the rows stand there already for a factor of 1.

    IN_PLACE: it takes the place of the logits.
    """
    if IF_CHANGED:  # a mean or a sum: one factor for all rows
        if tl.load(upstream_ptr) * tl.load(correction_ptr) == 1.0:
            return
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < count
    factor = row_factor(upstream_ptr, upstream_stride, correction_ptr, row, live)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row * target_stride, mask=live, other=ignore_index)
    counted = live & (target != ignore_index)
    factor = tl.where(counted, factor, 0.0)  # an ignored row has gradient 0 whatever the upstream one
    gradient = read_gradient(fields_ptr, row, live, count, factor, ARGMAX, WIDE)
    inside = live[:, None] & (columns < CLASSES)[None, :]
    start = logits_ptr + row * (CLASSES if PACKED else row_stride)
    z = tl.load(start[:, None] + columns[None, :], mask=inside & counted[:, None], other=-float("inf")).to(ACC)
    difference = z - gradient.origin[:, None]
    # The special classes that lie in this block, computed before they are overwritten: out may be what is rewritten.
    special = counted & (target >= first) & (target < tl.minimum(first + BLOCK, CLASSES))
    target_z = tl.load(start + target, mask=special, other=0.0).to(ACC)
    at_target = affine_at(target_z - gradient.origin, gradient, WIDE)
    argmax = target
    has_argmax = special
    if ARGMAX:
        argmax = tl.load(prediction_ptr + row, mask=live, other=-1)
        has_argmax = counted & (argmax >= first) & (argmax < first + BLOCK)
    g = affine_at(difference, over_classes(gradient, WIDE), WIDE)
    if IN_PLACE:
        tl.debug_barrier()  # no warp may write a special class before all have read it
    # a and b of an ignored row are 0, and it is not read: e = 0.
    out = gradient_ptr + row * CLASSES
    tl.store(out[:, None] + columns[None, :], g.to(gradient_ptr.dtype.element_ty), mask=inside)
    correct_terms(out, at_target, target, argmax, gradient, special, has_argmax, ARGMAX, WIDE)


@triton.jit(do_not_specialize=["class_stride", "inner"])
def gradient_rows_apart(
    logits_ptr, row_stride, class_stride, inner, outer_stride, target_ptr, target_stride, fields_ptr, prediction_ptr,
    upstream_ptr, upstream_stride, correction_ptr, gradient_ptr, count, ignore_index,
    ARGMAX: tl.constexpr, WIDE: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    VECTOR: tl.constexpr, IF_CHANGED: tl.constexpr,
):  # fmt: skip
    """:func:`gradient_rows` of rows that lie over the lanes as they do in memory, some classes of them after others.

    A program has a share of the classes of its rows. The special classes are part of the rule, because stores of single
    classes would be scattered.
    """
    if IF_CHANGED:
        if tl.load(upstream_ptr) * tl.load(correction_ptr) == 1.0:
            return
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    live = tl.max_constancy(first + row < count, VECTOR)
    image, position = image_and_position(first, row, live, inner)
    row += first
    factor = row_factor(upstream_ptr, upstream_stride, correction_ptr, row, live)
    target = tl.load(target_ptr + row * target_stride, mask=live, other=ignore_index)
    counted = live & (target != ignore_index)
    gradient = read_gradient(fields_ptr, row, live, count, tl.where(counted, factor, 0.0), ARGMAX, WIDE)
    step, out_step = class_step(class_stride, VECTOR), class_step(inner, VECTOR)
    start = logits_ptr + apart_at(image, position, outer_stride, row_stride, VECTOR)
    out = gradient_ptr + apart_at(image, position, out_step * CLASSES, 1, VECTOR)
    argmax = target
    if ARGMAX:
        argmax = tl.load(prediction_ptr + row, mask=live, other=-1)
    BLOCKS: tl.constexpr = (CLASSES + BLOCK - 1) // BLOCK
    shares = tl.num_programs(1)
    for block in range(tl.program_id(1) * BLOCKS // shares, (tl.program_id(1) + 1) * BLOCKS // shares):
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = live[:, None] & (column < CLASSES)[None, :]
        z = tl.load(start[:, None] + column[None, :] * step, mask=inside, other=-float("inf")).to(ACC)
        # Of an ignored row, which may have anything in it, e is 0 too.
        difference = tl.where(counted[:, None], z - gradient.origin[:, None], -float("inf"))
        g = affine_at(difference, over_classes(gradient, WIDE), WIDE)
        g -= tl.where(column[None, :] == target[:, None], gradient.target_term[:, None], 0.0)
        if ARGMAX:
            g -= tl.where(column[None, :] == argmax[:, None], gradient.argmax_term[:, None], 0.0)
        to = out[:, None] + column[None, :] * out_step
        tl.store(to, g.to(gradient_ptr.dtype.element_ty), mask=inside)
