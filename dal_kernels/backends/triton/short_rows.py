"""A row in registers: several short rows a program, or one row of up to 32 K classes."""

from __future__ import annotations

import triton
import triton.language as tl

from dal_kernels.backends.triton.apart import apart_at, class_step, image_and_position
from dal_kernels.backends.triton.objectives import LN2
from dal_kernels.backends.triton.reduction import Reduction, reduce_losses, store_sums
from dal_kernels.backends.triton.row import (
    LOWEST,
    RowGradient,
    RowSums,
    affine_at,
    correct_terms,
    exponent,
    finish,
    origin_of,
    read_knobs,
    read_target,
    read_weight,
    store_fields,
    store_statistics,
)


@triton.jit
def leave_ignored(
    reduction, row, ACC: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    MEAN: tl.constexpr, REDUCED: tl.constexpr, GRADIENT: tl.constexpr, FIELDS: tl.constexpr, WIDE: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """All that a program does whose only row is ignored."""
    zero = tl.zeros(row.shape, ACC)
    if FIELDS:
        nothing = RowGradient(zero, zero, zero, zero, zero, zero, zero)
        store_fields(reduction.fields, row, reduction.count, row < reduction.count, nothing, WIDE, False)
    if GRADIENT:
        out = reduction.gradient + tl.program_id(0).to(tl.int64) * CLASSES
        for tile in tl.static_range(TILES):
            column = tl.arange(0, BLOCK) + tile * BLOCK
            tl.store(out + column, tl.zeros((BLOCK,), ACC), mask=column < CLASSES)
    if REDUCED:
        nothing = tl.full((), 0.0, ACC)
        store_sums(reduction, nothing, nothing)
        reduce_losses(reduction, nothing, nothing, CLASSES, MEAN, GRADIENT, FIELDS, SUMS)
    else:
        tl.store(reduction.loss + row, zero)


@triton.jit
def store_tile(
    place, e, d, gradient, ignored, inside, at_target, at_argmax,
    AXIS: tl.constexpr, SLOPED: tl.constexpr, ZEROED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile. SLOPED: whether B is not 0.

    ZEROED: ignored rows may have anything in place of the exponentials. ``at_target``, ``at_argmax``: the special
    classes, whose terms are left to :func:`correct_terms` where that is None.
    """
    inner = tl.expand_dims(gradient.scale, AXIS)
    if SLOPED:
        slope = tl.broadcast_to(tl.expand_dims(gradient.slope, AXIS), d.shape)
        inner = tl.fma(slope, d, tl.broadcast_to(inner, d.shape))
    if WIDE:
        square = tl.broadcast_to(tl.expand_dims(gradient.square, AXIS), e.shape)
        inner = tl.fma(square, e, tl.broadcast_to(inner, e.shape))
    g = e * inner
    if WIDE:
        g += tl.expand_dims(gradient.constant, AXIS)
    if at_target is not None:
        g -= tl.where(at_target, tl.expand_dims(gradient.target_term, AXIS), 0.0)
    if at_argmax is not None:
        g -= tl.where(at_argmax, tl.expand_dims(gradient.argmax_term, AXIS), 0.0)
    if ZEROED:
        g = tl.where(tl.expand_dims(ignored, AXIS), 0.0, g)
    tl.store(place, g.to(place.dtype.element_ty), mask=inside)


# AXIS 1: the classes of a row lie over the lanes of a warp. AXIS 0, for very few classes: a row is one lane's, so that
# no lane idles on masked classes, nothing is shuffled, and the objective is computed once a row.
# APART: rows of logits (B, C, S), and of the gradient, lie over the lanes as they do in memory: AXIS 0. The terms of
# special classes are then part of each element's gradient, because stores of single classes would be scattered.
# TILES: a longer row, one a program, comes in blocks that only the last of which needs a mask.
# Not KEPT, for the longest rows: of each element only d fits the registers, and e is made again for the gradient.
# OBJECTIVE: a function of objectives.py; ENTROPY, ARGMAX, WIDE: what it needs of a row beside the rest. Losses with the
# entropy do not where their second knob, its weight, is 0.
@triton.jit(do_not_specialize=["class_stride", "inner"])
def loss_rows(
    logits_ptr, row_stride, class_stride, inner, outer_stride, target_ptr, target_stride, knobs_ptr, knobs_stride,
    weight_ptr, gradient_ptr, loss_ptr, correction_ptr, partial_ptr, ticket_ptr, fields_ptr, prediction_ptr, count,
    ignore_index, numbers_ptr, every, q_end, max_weight,
    OBJECTIVE: tl.constexpr, KNOBS: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, WIDE: tl.constexpr,
    CLASSES: tl.constexpr, LOG_CLASSES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, AXIS: tl.constexpr,
    TILES: tl.constexpr, KEPT: tl.constexpr, PACKED: tl.constexpr, APART: tl.constexpr, VECTOR: tl.constexpr,
    PER_ROW: tl.constexpr,
    MEAN: tl.constexpr, REDUCED: tl.constexpr, GRADIENT: tl.constexpr, FIELDS: tl.constexpr, PREDICTION: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    reduction = Reduction(
        loss_ptr, correction_ptr, partial_ptr, ticket_ptr, weight_ptr, target_ptr, target_stride, gradient_ptr,
        fields_ptr, count, ignore_index, prediction_ptr, numbers_ptr, every, q_end, max_weight,
        inner if APART else None,
    )  # fmt: skip
    # 64-bit arithmetic once a program; offsets within it fit 32 bits unless rows lie far apart.
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    live = first + row < count
    columns = tl.arange(0, BLOCK)
    image = first
    position = row
    if APART:
        live = tl.max_constancy(live, VECTOR)
        image, position = image_and_position(first, row, live, inner)
        start = logits_ptr
        offset = apart_at(image, position, outer_stride, row_stride, VECTOR)
    elif PACKED:
        start = logits_ptr + first * CLASSES
        offset = row * CLASSES
    else:
        start = logits_ptr + first * row_stride
        offset = row.to(tl.int64) * row_stride

    target, ignored, counted = read_target(
        target_ptr + first * target_stride, target_stride, row, live, ignore_index, CLASSES
    )  # fmt: skip
    across = tl.expand_dims(columns, 1 - AXIS)
    # An ignored row is not read unless its statistics are wanted. Among others it is -inf: e = 0 and gradient 0. Alone
    # in its program it is done here, so that the tiles of other rows are loaded without a mask, which would cost a move
    # an element.
    if ROWS == 1:
        live = tl.full((ROWS,), True, tl.int1)
        wanted = live
        if not PREDICTION:
            if tl.load(target_ptr + first * target_stride) == ignore_index:
                leave_ignored(
                    reduction, first + row, ACC, CLASSES, BLOCK, TILES, MEAN, REDUCED, GRADIENT, FIELDS, WIDE, SUMS
                )  # fmt: skip
                return
            ignored = ~live
    else:
        wanted = live if PREDICTION else live & ~ignored
    step = tl.full((), 1, tl.int64)  # from class to class
    if APART:
        step = class_step(class_stride, VECTOR)
        offsets = tl.expand_dims(offset, AXIS) + across * step
    elif AXIS == 0:
        # class_stride is 1, which the compiler must not know: it would lay the classes of a row over lanes again.
        offsets = tl.expand_dims(offset, AXIS) + across * class_stride
    else:
        offsets = tl.expand_dims(offset, AXIS) + across
    tiles = ()
    for tile in tl.static_range(TILES):
        if APART:
            at = start + (offsets + tile * BLOCK * step)
        else:
            at = start + (offsets + tile * BLOCK)
        if (ROWS == 1 or APART) and (tile + 1) * BLOCK <= CLASSES:
            tiles += (tl.load(at).to(ACC),)
        elif APART:
            tiles += (tl.load(at, mask=across + tile * BLOCK < CLASSES, other=-float("inf")).to(ACC),)
        else:
            inside = tl.expand_dims(wanted, AXIS) & (across + tile * BLOCK < CLASSES)
            tiles += (tl.load(at, mask=inside, other=-float("inf")).to(ACC),)
    if APART:
        # Of the elements that are here: read again it would be as many bytes as another class.
        label = tl.expand_dims(tl.where(counted, target, -1).to(tl.int32), AXIS)
        found = tl.zeros_like(tiles[0])
        for tile in tl.static_range(TILES):
            found = tl.where(label == across + tile * BLOCK, tiles[tile], found)
        target_z = tl.where(counted, tl.sum(found, AXIS), float("nan"))
    else:
        target_z = tl.load(start + offset + target, mask=counted, other=float("nan")).to(ACC)
    knobs = read_knobs(knobs_ptr, knobs_stride, first + row, live, KNOBS, PER_ROW, ACC)
    # Nothing asks for W without an entropy term: one branch for the whole program. Every e waits for it in a register.
    entropic = PREDICTION or ENTROPY
    if KEPT and ENTROPY and not PREDICTION:
        if PER_ROW:
            entropic = tl.max(knobs[1], 0) != 0.0
        else:
            entropic = knobs[1] != 0.0

    top = tiles[0]
    column = tl.broadcast_to(across, top.shape)
    for tile in tl.static_range(1, TILES):
        z = tiles[tile]
        if ARGMAX or PREDICTION:
            better = ~(z <= top) & (top == top)  # a NaN is better, and stays
            top = tl.where(better, z, top)
            column = tl.where(better, across + tile * BLOCK, column)
        else:
            top = tl.maximum(top, z)
    peak = tl.max(top, AXIS)
    argmax = target
    if ARGMAX or PREDICTION:
        # NaN, which no comparison finds, first. (z != z is compared in bfloat16, and kept in both types.)
        found = tl.where(top == tl.expand_dims(peak, AXIS), column, column - CLASSES)
        argmax = tl.min(tl.where(top < tl.expand_dims(peak, AXIS), CLASSES, found), AXIS)
        argmax = tl.where(argmax < 0, argmax + CLASSES, argmax).to(tl.int64)
    origin = origin_of(peak)
    exponents = ()
    powers = ()
    differences = tl.zeros_like(tiles[0])
    squares = tl.zeros_like(tiles[0])
    for tile in tl.static_range(TILES):
        z = tiles[tile]
        d = exponent(z, tl.expand_dims(origin, AXIS))
        e = tl.exp2(d)
        if WIDE:
            difference = z - tl.expand_dims(origin, AXIS)
            if ROWS > 1 or (tile + 1) * BLOCK > CLASSES:
                difference = tl.where(across + tile * BLOCK < CLASSES, difference, 0.0)
            differences += difference
            squares += e * e
        d = tl.maximum(d, LOWEST)
        exponents += (d,)
        if KEPT:
            powers += (e,)
        if tile == 0:
            sums = e
            products = e * d
        else:
            sums += e
            products += e * d
    total = tl.sum(sums, AXIS)
    weighted = tl.zeros_like(total)
    if entropic:
        weighted = tl.sum(products, AXIS) * LN2
    row_sums = RowSums(total, weighted, None, None)
    if WIDE:
        row_sums = RowSums(total, weighted, tl.sum(differences, AXIS), tl.sum(squares, AXIS))
    target_difference = target_z - origin
    weight = read_weight(weight_ptr, target, ignored, counted, ACC)
    scaled = weight / count if MEAN else weight
    loss, gradient, log_prob = finish(
        row_sums, origin, target_difference, ignored, knobs, scaled, OBJECTIVE, CLASSES, LOG_CLASSES, WIDE
    )

    loss = loss * weight
    if PREDICTION:
        store_statistics(
            fields_ptr, prediction_ptr, first + row, count, live, gradient, log_prob, total, weighted, argmax, ignored
        )  # fmt: skip
    loss_sum = tl.sum(loss, 0)
    weight_sum = tl.sum(weight, 0)
    if REDUCED:
        store_sums(reduction, loss_sum, weight_sum)
    else:
        tl.store(loss_ptr + first + row, loss, mask=live)
    if FIELDS:
        store_fields(fields_ptr, first + row, count, live, gradient, WIDE, PREDICTION)
    if GRADIENT:
        if APART:
            step = class_step(inner, VECTOR)
            place = apart_at(image, position, step * CLASSES, 1, VECTOR)
            to = gradient_ptr + (tl.expand_dims(place, AXIS) + across * step)
        else:
            out = gradient_ptr + first * CLASSES
            place = row * CLASSES
            to = out + (tl.expand_dims(place, AXIS) + across)
            at_target = affine_at(target_difference, gradient, WIDE)
        # Of e and d as they are at hand: d is to base 2.
        HALF: tl.constexpr = 1.0 if KEPT else 0.5
        by_tile = RowGradient(
            None, gradient.scale * HALF, gradient.slope * (HALF * LN2), gradient.target_term, gradient.argmax_term,
            gradient.square * (HALF * HALF), gradient.constant,
        )  # fmt: skip
        for tile in tl.static_range(TILES):
            d = exponents[tile]
            if KEPT:
                e = powers[tile]
            else:
                # 2 e, and not e, which the compiler would know and keep beside d.
                e = tl.exp2(d + 1.0)
            if ROWS == 1 and (tile + 1) * BLOCK <= CLASSES:
                inside = None
            else:
                inside = tl.expand_dims(live, AXIS) & (across + tile * BLOCK < CLASSES)
            is_target = None
            is_argmax = None
            if APART:
                into = to + tile * BLOCK * step
                is_target = label == across + tile * BLOCK
                if ARGMAX:
                    is_argmax = tl.expand_dims(argmax.to(tl.int32), AXIS) == across + tile * BLOCK
            else:
                into = to + tile * BLOCK
            # Stored in each branch: a tensor that leaves a branch costs a move an element.
            if entropic and ENTROPY:
                store_tile(
                    into, e, d, by_tile, ignored, inside, is_target, is_argmax, AXIS, True, PREDICTION or APART, WIDE
                )
            else:
                store_tile(
                    into, e, d, by_tile, ignored, inside, is_target, is_argmax, AXIS, False, PREDICTION or APART, WIDE
                )
        if not APART:
            correct_terms(out + place, at_target, target, argmax, gradient, counted, counted, ARGMAX, WIDE)
    if REDUCED:
        reduce_losses(reduction, loss_sum, weight_sum, CLASSES, MEAN, GRADIENT, FIELDS, SUMS)
