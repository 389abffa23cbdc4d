"""Device code. Three ideas, as everywhere: merge row statistics, turn them into an objective, write its gradient.

Of an element: d = (z - m) log2 e and e = 2^d, for base 2 has an instruction. Of a row, all is to base e:

    S = sum e,   W = ln 2 sum e d,   ln p_y = z_y - m - ln S,   H = ln S - W / S
    dL/dz_j = e_j (A + B (z_j - m)) - t [j = y] - u [j = argmax z]

dal_kernels/reference.py is the long form; csrc/objective.h the same in C++.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below 2^-1100 (and for -inf) e is 0; a finite d keeps e d at 0 too.
LOWEST = tl.constexpr(-1100.0)
# Fields of one row, field-major (len(FIELDS), N), in the order of dal_kernels.ops.FIELDS.
MAX, SCALE, SLOPE, TARGET_TERM, ARGMAX_TERM, TARGET_PROB, ENTROPY = (tl.constexpr(i) for i in range(7))


# ---- row statistics


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
def rebase(total, weighted, peak, new):
    """S and sum e d moved to a larger maximum: with s = (peak - new) log2 e, W <- 2^s (W + S s), S <- 2^s S.

    Of -inf alone, S = 0: s is whatever keeps that 0, for both maxima may be -inf.
    """
    step = tl.maximum(tl.minimum(exponent(peak, new), 0.0), LOWEST)
    ratio = tl.exp2(step)
    return ratio * total, ratio * (weighted + total * step)


# ---- objectives
# Each is a loss and coefficients (a, b, t, u) of  p_j (a + b (ln p_j + H)) - t [j = y] - u [j = argmax z].


@triton.jit
def expm1_nonpositive(x, power):
    """e^x - 1 for x <= 0, given e^x: that difference keeps its digits below -1/8, the series above."""
    TERMS: tl.constexpr = 11 if x.dtype == tl.float64 else 6
    series = x * (1.0 / TERMS) + 1.0
    for k in tl.static_range(1, TERMS - 1):
        series = tl.fma(series, x * (1.0 / (TERMS - k)), tl.full(x.shape, 1.0, x.dtype))
    return tl.where(x > -0.125, x * series, power - 1.0)


@triton.jit
def schedule(q, bootstrap_weight, LOG_CLASSES: tl.constexpr):
    """1 / q (1 where q = 0, which is cross-entropy) and n = lambda / (q ln C); 0 for a single class."""
    inverse = 1.0 / tl.where(q == 0.0, 1.0, q)
    if LOG_CLASSES > 0:
        return inverse, bootstrap_weight * inverse * (1.0 / LOG_CLASSES)
    else:
        return inverse, bootstrap_weight * 0.0


@triton.jit
def dynamics_aware(log_prob, log_sum, mean, entropy, q, inverse, n, HARD: tl.constexpr):
    """(1 - p_y^q) / q + lambda / (q ln C) B(p): arXiv 2303.11562. B = H, or with HARD -ln p_argmax = ln S.

    Returns the loss and (a - b W / S, b, t, u).
    """
    exponent = tl.where(q == 0.0, 0.0, q * log_prob)
    power = tl.exp2(exponent * LOG2E)
    loss = tl.where(q == 0.0, -log_prob, -inverse * expm1_nonpositive(exponent, power))
    if HARD:
        u = n + power * 0.0
        return loss + tl.where(n == 0.0, 0.0, n * log_sum), power + u, power * 0.0, power, u
    else:
        return loss + tl.where(n == 0.0, 0.0, n * entropy), power + n * mean, -n + power * 0.0, power, power * 0.0


@triton.jit
def finish(total, weighted, target_difference, ignored, q, inverse, n, row_weight, HARD: tl.constexpr):
    """Statistics of rows -> loss, coefficients of the gradient, and ln p_y. A bad label came with z_y - m = NaN.

    An ignored row goes through as one of a single class, with weight 0: nothing of it is left.
    """
    total = tl.where(ignored, 1.0, total)
    weighted = tl.where(ignored, 0.0, weighted)
    scaled = 1.0 / total
    log_sum = tl.log2(total) * LN2
    mean = weighted * scaled
    log_prob = tl.where(ignored, 0.0, target_difference - log_sum)
    loss, a, b, t, u = dynamics_aware(log_prob, log_sum, mean, log_sum - mean, q, inverse, n, HARD)
    scaled *= row_weight
    return loss, scaled * a, scaled * b, row_weight * t, row_weight * u, log_prob


@triton.jit
def affine_at(difference, a, b):
    """e (A + B (z - m)) of single classes."""
    return tl.exp2(difference * LOG2E) * (a + b * tl.maximum(difference, LOWEST))


@triton.jit
def store_fields(fields_ptr, row, count, live, origin, a, b, t):
    """What the gradient of a row is made from again, but for the argmax term."""
    tl.store(fields_ptr + MAX * count + row, origin, mask=live)
    tl.store(fields_ptr + SCALE * count + row, a, mask=live)
    tl.store(fields_ptr + SLOPE * count + row, b, mask=live)
    tl.store(fields_ptr + TARGET_TERM * count + row, t, mask=live)


@triton.jit
def store_statistics(fields_ptr, prediction_ptr, row, count, live, u, log_prob, total, weighted, argmax, ignored):
    """What the user learns of a row, and the argmax term."""
    tl.store(fields_ptr + ARGMAX_TERM * count + row, u, mask=live)
    tl.store(prediction_ptr + row, argmax, mask=live)
    prob = tl.exp2(log_prob * LOG2E)
    tl.store(fields_ptr + TARGET_PROB * count + row, tl.where(ignored, float("nan"), prob), mask=live)
    tl.store(fields_ptr + ENTROPY * count + row, tl.log2(total) * LN2 - weighted / total, mask=live)


@triton.jit
def store_sums(partial_ptr, loss, weight):
    """Sum of the losses and of the weights of a program's rows, for the reduction."""
    tl.store(partial_ptr + tl.program_id(0), loss)
    tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), weight)


@triton.jit
def correct_terms(
    gradient_ptr, at_target, a, target, argmax, t, u, has_target, has_argmax, HARD: tl.constexpr
):  # fmt: skip
    """The two classes of a row that differ from the affine rule, stored over it once the row is written.

    Cheaper than a comparison for each element. ``at_target``: the affine value there, as A is where z = m; ``has_*``:
    whether it is to be stored.
    """
    tl.debug_barrier()
    same = target == argmax
    if HARD:
        tl.store(gradient_ptr + argmax, a - u - tl.where(same, t, 0.0), mask=has_argmax)
        tl.store(gradient_ptr + target, at_target - t, mask=has_target & ~same)
    else:
        tl.store(gradient_ptr + target, at_target - t, mask=has_target)


@triton.jit
def spoil_counted_rows(
    target_ptr, target_stride, gradient_ptr, fields_ptr, count, ignore_index, CLASSES: tl.constexpr,
    GRADIENT: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """NaN for the gradient of each row that is not ignored, and for what it is made from again."""
    tl.debug_barrier()
    for first in range(0, count, 128):
        row = first + tl.arange(0, 128).to(tl.int64)
        target = tl.load(target_ptr + row * target_stride, mask=row < count, other=ignore_index)
        counted = target != ignore_index
        if FIELDS:
            tl.store(fields_ptr + SCALE * count + row, float("nan"), mask=counted)
        if GRADIENT:
            for column in range(0, CLASSES):
                tl.store(gradient_ptr + row * CLASSES + column, float("nan"), mask=counted)


@triton.jit
def store_loss(
    loss_ptr, correction_ptr, total, divisor, weight_ptr, target_ptr, target_stride, gradient_ptr, fields_ptr, count,
    ignore_index, CLASSES: tl.constexpr, MEAN: tl.constexpr, GRADIENT: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """The reduced loss. A mean's gradient was divided by N so far: N / divisor is left for the backward.

    Where the true divisor is 0 no row counted, and the gradient stays 0; or their weights are all 0, and it is 0 / 0.
    """
    if MEAN:
        tl.store(loss_ptr, (total / divisor).to(loss_ptr.dtype.element_ty))
        correction = tl.where(divisor == 0.0, 1.0, count / tl.where(divisor == 0.0, 1.0, divisor))
        tl.store(correction_ptr, correction.to(correction_ptr.dtype.element_ty))
        if weight_ptr is not None:
            if divisor == 0.0:
                spoil_counted_rows(
                    target_ptr, target_stride, gradient_ptr, fields_ptr, count, ignore_index, CLASSES, GRADIENT, FIELDS
                )  # fmt: skip
    else:
        tl.store(loss_ptr, total.to(loss_ptr.dtype.element_ty))
        tl.store(correction_ptr, 1.0)


# ---- what every row is computed with


@triton.jit
def read_target(target_ptr, target_stride, row, live, ignore_index, CLASSES: tl.constexpr):
    """(label, whether the row is ignored, whether the label is a class)."""
    target = tl.load(target_ptr + row * target_stride, mask=live, other=ignore_index)
    ignored = target == ignore_index
    return target, ignored, (target >= 0) & (target < CLASSES) & ~ignored


@triton.jit
def read_schedule(q_ptr, q_stride, lam_ptr, lam_stride, row, live, PER_ROW: tl.constexpr, ACC: tl.constexpr):
    if PER_ROW:
        q = tl.load(q_ptr + row * q_stride, mask=live, other=1.0).to(ACC)
        return q, tl.load(lam_ptr + row * lam_stride, mask=live, other=0.0).to(ACC)
    else:
        return tl.load(q_ptr).to(ACC), tl.load(lam_ptr).to(ACC)


@triton.jit
def read_weight(weight_ptr, target, ignored, counted, ACC: tl.constexpr):
    if weight_ptr is not None:
        return tl.load(weight_ptr + target, mask=counted, other=0.0)
    else:
        return tl.where(ignored, 0.0, tl.full(target.shape, 1.0, ACC))


# ---- a row in registers: several short rows a program, or one row of up to 32 K classes


# AXIS 1: the classes of a row lie over the lanes of a warp. AXIS 0, for very few classes: a row is one lane's, so that
# no lane idles on masked classes, nothing is shuffled, and the objective is computed once a row.
# TILES: a longer row, one a program, comes in blocks that only the last of which needs a mask.
# Not KEPT, for the longest rows: of each element only d fits the registers, and e is made again for the gradient.
@triton.jit(do_not_specialize=["class_stride"])
def loss_rows(
    logits_ptr, row_stride, class_stride, target_ptr, target_stride, q_ptr, q_stride, lam_ptr, lam_stride, weight_ptr,
    gradient_ptr, loss_ptr, partial_ptr, fields_ptr, prediction_ptr, count, ignore_index,
    CLASSES: tl.constexpr, LOG_CLASSES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, AXIS: tl.constexpr,
    TILES: tl.constexpr, KEPT: tl.constexpr, PACKED: tl.constexpr, PER_ROW: tl.constexpr, HARD: tl.constexpr,
    MEAN: tl.constexpr, REDUCED: tl.constexpr, GRADIENT: tl.constexpr, FIELDS: tl.constexpr, PREDICTION: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    # 64-bit arithmetic once a program; offsets within it fit 32 bits unless rows lie far apart.
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    live = first + row < count
    columns = tl.arange(0, BLOCK)
    if PACKED:
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
                zero = tl.zeros((ROWS,), ACC)
                if FIELDS:
                    store_fields(fields_ptr, first + row, count, live, zero, zero, zero, zero)
                if GRADIENT:
                    for tile in tl.static_range(TILES):
                        column = columns + tile * BLOCK
                        place = gradient_ptr + first * CLASSES + column
                        tl.store(place, tl.zeros((BLOCK,), ACC), mask=column < CLASSES)
                if REDUCED:
                    store_sums(partial_ptr, 0.0, 0.0)
                else:
                    tl.store(loss_ptr + first + row, zero)
                return
            ignored = ~live
    else:
        wanted = live if PREDICTION else live & ~ignored
    if AXIS == 0:
        # class_stride is 1, which the compiler must not know: it would lay the classes of a row over lanes again.
        offsets = tl.expand_dims(offset, AXIS) + across * class_stride
    else:
        offsets = tl.expand_dims(offset, AXIS) + across
    tiles = ()
    for tile in tl.static_range(TILES):
        at = start + (offsets + tile * BLOCK)
        if ROWS == 1 and (tile + 1) * BLOCK <= CLASSES:
            tiles += (tl.load(at).to(ACC),)
        else:
            inside = tl.expand_dims(wanted, AXIS) & (across + tile * BLOCK < CLASSES)
            tiles += (tl.load(at, mask=inside, other=-float("inf")).to(ACC),)
    target_z = tl.load(start + offset + target, mask=counted, other=float("nan")).to(ACC)
    q, lam = read_schedule(q_ptr, q_stride, lam_ptr, lam_stride, first + row, live, PER_ROW, ACC)
    largest = tl.max(lam, 0) if PER_ROW else lam
    inverse, n = schedule(q, lam, LOG_CLASSES)
    # Nothing asks for W without an entropy term: one branch for the whole program. Every e waits for it in a register.
    if KEPT:
        entropic = PREDICTION or (not HARD and largest != 0.0)
    else:
        entropic = PREDICTION or not HARD

    top = tiles[0]
    column = tl.broadcast_to(across, top.shape)
    for tile in tl.static_range(1, TILES):
        z = tiles[tile]
        if HARD or PREDICTION:
            better = ~(z <= top) & (top == top)  # a NaN is better, and stays
            top = tl.where(better, z, top)
            column = tl.where(better, across + tile * BLOCK, column)
        else:
            top = tl.maximum(top, z)
    peak = tl.max(top, AXIS)
    argmax = target
    if HARD or PREDICTION:
        # NaN, which no comparison finds, first. (z != z is compared in bfloat16, and kept in both types.)
        found = tl.where(top == tl.expand_dims(peak, AXIS), column, column - CLASSES)
        argmax = tl.min(tl.where(top < tl.expand_dims(peak, AXIS), CLASSES, found), AXIS)
        argmax = tl.where(argmax < 0, argmax + CLASSES, argmax).to(tl.int64)
    origin = origin_of(peak)
    exponents = ()
    powers = ()
    for tile in tl.static_range(TILES):
        z = tiles[tile]
        d = exponent(z, tl.expand_dims(origin, AXIS))
        e = tl.exp2(d)
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
    target_difference = target_z - origin
    weight = read_weight(weight_ptr, target, ignored, counted, ACC)
    scaled = weight / count if MEAN else weight
    loss, a, b, t, u, log_prob = finish(total, weighted, target_difference, ignored, q, inverse, n, scaled, HARD)

    loss = loss * weight
    if PREDICTION:
        store_statistics(
            fields_ptr, prediction_ptr, first + row, count, live, u, log_prob, total, weighted, argmax, ignored
        )  # fmt: skip
    if REDUCED:
        store_sums(partial_ptr, tl.sum(loss, 0), tl.sum(weight, 0))
    else:
        tl.store(loss_ptr + first + row, loss, mask=live)
    if FIELDS:
        store_fields(fields_ptr, first + row, count, live, origin, a, b, t)
    if GRADIENT:
        out = gradient_ptr + first * CLASSES
        place = row * CLASSES
        to = out + (tl.expand_dims(place, AXIS) + across)
        element = gradient_ptr.dtype.element_ty
        at_target = affine_at(target_difference, a, b)
        scale = a
        slope = b * LN2  # of d
        if not KEPT:
            scale *= 0.5
            slope *= 0.5
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
            # Stored in each branch: a tensor that leaves a branch costs a move an element.
            if entropic and not HARD:
                along = tl.broadcast_to(tl.expand_dims(slope, AXIS), d.shape)
                g = e * tl.fma(along, d, tl.broadcast_to(tl.expand_dims(scale, AXIS), d.shape))
                if PREDICTION:
                    g = tl.where(tl.expand_dims(ignored, AXIS), 0.0, g)
                tl.store(to + tile * BLOCK, g.to(element), mask=inside)
            else:
                g = e * tl.expand_dims(scale, AXIS)
                if PREDICTION:
                    g = tl.where(tl.expand_dims(ignored, AXIS), 0.0, g)
                tl.store(to + tile * BLOCK, g.to(element), mask=inside)
        correct_terms(out + place, at_target, a, target, argmax, t, u, counted, counted, HARD)


# ---- longer rows: statistics now, the gradient in the backward, for a second read comes either way


@triton.jit
def read_blocks(
    start, first, last, bootstrapped,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, ARGMAX: tl.constexpr, NAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of blocks [first, last) of a row, relative to their maximum: (peak, S, sum e d, argmax, first NaN)."""
    columns = tl.arange(0, BLOCK)
    peak = tl.full((), -float("inf"), ACC)
    argmax = tl.full((), 0, tl.int64)
    nan_at = tl.full((), CLASSES, tl.int64)
    # One accumulator a lane, all relative to the largest logit so far; they move only when that grows.
    total = tl.zeros((BLOCK,), ACC)
    weighted = tl.zeros((BLOCK,), ACC)
    for block in range(first, last):
        at = block * BLOCK + columns
        z = tl.load(start + at, mask=at < CLASSES, other=-float("inf")).to(ACC)
        top = tl.max(z, 0)
        if top > peak:
            if peak > -float("inf"):
                total, weighted = rebase(total, weighted, peak, top)
            peak = top
            if ARGMAX:
                argmax = tl.min(tl.where(z == top, at, CLASSES), 0).to(tl.int64)
        if NAN:
            nan_at = tl.minimum(nan_at, tl.min(tl.where(z != z, at, CLASSES), 0).to(tl.int64))
        d = exponent(z, origin_of(peak))
        e = tl.exp2(d)
        total += e
        if bootstrapped:
            weighted += e * tl.maximum(d, LOWEST)
    return peak, tl.sum(total, 0), tl.sum(weighted, 0), argmax, nan_at


@triton.jit
def finish_rows(
    peak, total, weighted, argmax, row, live, logits_ptr, row_stride, target_ptr, target_stride, q_ptr, q_stride,
    lam_ptr, lam_stride, weight_ptr, loss_ptr, fields_ptr, prediction_ptr, count, ignore_index,
    CLASSES: tl.constexpr, LOG_CLASSES: tl.constexpr, HARD: tl.constexpr, MEAN: tl.constexpr, REDUCED: tl.constexpr,
    FIELDS: tl.constexpr, PREDICTION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Merged statistics (peak, S, sum e d) -> what outlives the forward; returns the sums of losses and weights."""
    target, ignored, counted = read_target(target_ptr, target_stride, row, live, ignore_index, CLASSES)
    q, lam = read_schedule(q_ptr, q_stride, lam_ptr, lam_stride, row, live, True, ACC)
    inverse, n = schedule(q, lam, LOG_CLASSES)
    origin = origin_of(peak)
    weighted *= LN2
    target_z = tl.load(logits_ptr + row * row_stride + target, mask=counted, other=float("nan")).to(ACC)
    weight = read_weight(weight_ptr, target, ignored, counted, ACC)
    scaled = weight / count if MEAN else weight
    loss, a, b, t, u, log_prob = finish(total, weighted, target_z - origin, ignored, q, inverse, n, scaled, HARD)
    loss = loss * weight
    if PREDICTION:
        store_statistics(fields_ptr, prediction_ptr, row, count, live, u, log_prob, total, weighted, argmax, ignored)
    if FIELDS:
        store_fields(fields_ptr, row, count, live, origin, a, b, t)
    if not REDUCED:
        tl.store(loss_ptr + row, loss, mask=live)
    return tl.sum(loss, 0), tl.sum(weight, 0)


@triton.jit
def loss_long_rows(
    logits_ptr, row_stride, target_ptr, target_stride, q_ptr, q_stride, lam_ptr, lam_stride, weight_ptr,
    loss_ptr, partial_ptr, fields_ptr, prediction_ptr, count, ignore_index,
    CLASSES: tl.constexpr, LOG_CLASSES: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, HARD: tl.constexpr,
    MEAN: tl.constexpr, REDUCED: tl.constexpr, FIELDS: tl.constexpr, PREDICTION: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    start = logits_ptr + tl.program_id(0).to(tl.int64) * (CLASSES if PACKED else row_stride)
    ignored = tl.load(target_ptr + tl.program_id(0).to(tl.int64) * target_stride) == ignore_index
    lam = tl.load(lam_ptr + tl.program_id(0).to(tl.int64) * lam_stride)
    blocks = tl.cdiv(CLASSES, BLOCK)
    if not PREDICTION:
        blocks = tl.where(ignored, 0, blocks)
    peak, total, weighted, argmax, nan_at = read_blocks(
        start, 0, blocks, PREDICTION or (not HARD and lam != 0.0), CLASSES, BLOCK, HARD or PREDICTION, PREDICTION, ACC
    )  # fmt: skip
    one = tl.zeros((1,), ACC)
    loss, weight = finish_rows(
        peak + one, total + one, weighted + one, tl.where(nan_at < CLASSES, nan_at, argmax) + tl.zeros((1,), tl.int64),
        row, row < count, logits_ptr, row_stride, target_ptr, target_stride, q_ptr, q_stride, lam_ptr, lam_stride,
        weight_ptr, loss_ptr, fields_ptr, prediction_ptr, count, ignore_index,
        CLASSES, LOG_CLASSES, HARD, MEAN, REDUCED, FIELDS, PREDICTION, ACC,
    )  # fmt: skip
    if REDUCED:
        store_sums(partial_ptr, loss, weight)


# ---- few long rows: several programs share one


@triton.jit
def split_statistics(
    logits_ptr, row_stride, lam_ptr, lam_stride, parts_ptr, places_ptr,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PACKED: tl.constexpr, HARD: tl.constexpr,
    PREDICTION: tl.constexpr,
):  # fmt: skip
    """Program (row, split) reads its share of the blocks. parts: (3, N, SPLITS), places: (2, N, SPLITS) int64."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    lam = tl.load(lam_ptr + row * lam_stride)
    BLOCKS: tl.constexpr = (CLASSES + BLOCK - 1) // BLOCK
    peak, total, weighted, argmax, nan_at = read_blocks(
        logits_ptr + row * (CLASSES if PACKED else row_stride), split * BLOCKS // SPLITS,
        (split + 1) * BLOCKS // SPLITS, PREDICTION or (not HARD and lam != 0.0),
        CLASSES, BLOCK, HARD or PREDICTION, PREDICTION, ACC,
    )  # fmt: skip
    at = row * SPLITS + split
    size = tl.num_programs(0) * SPLITS
    tl.store(parts_ptr + at, peak)
    tl.store(parts_ptr + size + at, total)
    tl.store(parts_ptr + 2 * size + at, weighted)
    tl.store(places_ptr + at, argmax)
    tl.store(places_ptr + size + at, nan_at)


@triton.jit
def merge_splits(
    parts_ptr, places_ptr, logits_ptr, row_stride, target_ptr, target_stride, q_ptr, q_stride, lam_ptr, lam_stride,
    weight_ptr, loss_ptr, correction_ptr, fields_ptr, prediction_ptr, count, ignore_index,
    CLASSES: tl.constexpr, LOG_CLASSES: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, HARD: tl.constexpr,
    MEAN: tl.constexpr, REDUCED: tl.constexpr, FIELDS: tl.constexpr, PREDICTION: tl.constexpr,
):  # fmt: skip
    """One program for all rows, which are few: the splits merged in order, the objective, the reduction."""
    ACC: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.arange(0, ROWS)
    live = row < count
    split = tl.arange(0, SPLITS)
    at = row[:, None] * SPLITS + split[None, :]
    size = count * SPLITS
    peaks = tl.load(parts_ptr + at, mask=live[:, None], other=0.0)
    totals = tl.load(parts_ptr + size + at, mask=live[:, None], other=1.0)
    weights = tl.load(parts_ptr + 2 * size + at, mask=live[:, None], other=0.0)
    peak = tl.max(peaks, 1)
    totals, weights = rebase(totals, weights, peaks, peak[:, None])
    argmax = tl.load(places_ptr + at, mask=live[:, None], other=0)
    argmax = tl.min(tl.where(peaks == peak[:, None], argmax, CLASSES), 1)
    nan_at = tl.min(tl.load(places_ptr + size + at, mask=live[:, None], other=CLASSES), 1)
    loss, weight = finish_rows(
        peak, tl.sum(totals, 1), tl.sum(weights, 1), tl.where(nan_at < CLASSES, nan_at, argmax), row.to(tl.int64), live,
        logits_ptr, row_stride, target_ptr, target_stride, q_ptr, q_stride, lam_ptr, lam_stride, weight_ptr, loss_ptr,
        fields_ptr, prediction_ptr, count, ignore_index,
        CLASSES, LOG_CLASSES, HARD, MEAN, REDUCED, FIELDS, PREDICTION, ACC,
    )  # fmt: skip
    if REDUCED:
        store_loss(
            loss_ptr, correction_ptr, loss, weight, weight_ptr, target_ptr, target_stride, fields_ptr, fields_ptr,
            count, ignore_index, CLASSES, MEAN, False, FIELDS,
        )  # fmt: skip


# ---- the reduction, the backward


@triton.jit
def reduce_sums(
    partial_ptr, loss_ptr, correction_ptr, weight_ptr, target_ptr, target_stride, gradient_ptr, fields_ptr, programs,
    count, ignore_index,
    CLASSES: tl.constexpr, MEAN: tl.constexpr, GRADIENT: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the programs, in fixed order."""
    lane = tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, programs, BLOCK):
        inside = first + lane < programs
        loss += tl.load(partial_ptr + first + lane, mask=inside, other=0.0).to(tl.float64)
        weight += tl.load(partial_ptr + programs + first + lane, mask=inside, other=0.0).to(tl.float64)
    store_loss(
        loss_ptr, correction_ptr, tl.sum(loss, 0), tl.sum(weight, 0), weight_ptr, target_ptr, target_stride,
        gradient_ptr, fields_ptr, count, ignore_index, CLASSES, MEAN, GRADIENT, FIELDS,
    )  # fmt: skip


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
def gradient_rows(
    logits_ptr, row_stride, target_ptr, target_stride, fields_ptr, prediction_ptr, upstream_ptr, upstream_stride,
    correction_ptr, gradient_ptr, count, ignore_index,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, HARD: tl.constexpr,
    IF_CHANGED: tl.constexpr, IN_PLACE: tl.constexpr,
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
    factor = tl.load(upstream_ptr + row * upstream_stride, mask=live, other=1.0)
    if correction_ptr is not None:
        factor *= tl.load(correction_ptr)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row * target_stride, mask=live, other=ignore_index)
    counted = live & (target != ignore_index)
    factor = tl.where(counted, factor, 0.0)  # an ignored row has gradient 0 whatever the upstream one
    origin = tl.load(fields_ptr + MAX * count + row, mask=live, other=0.0)
    a = factor * tl.load(fields_ptr + SCALE * count + row, mask=live, other=0.0)
    b = factor * tl.load(fields_ptr + SLOPE * count + row, mask=live, other=0.0)
    t = factor * tl.load(fields_ptr + TARGET_TERM * count + row, mask=live, other=0.0)
    u = t  # looked at only if HARD
    if HARD:
        u = factor * tl.load(fields_ptr + ARGMAX_TERM * count + row, mask=live, other=0.0)
    inside = live[:, None] & (columns < CLASSES)[None, :]
    start = logits_ptr + row * (CLASSES if PACKED else row_stride)
    z = tl.load(start[:, None] + columns[None, :], mask=inside & counted[:, None], other=-float("inf")).to(ACC)
    difference = z - origin[:, None]
    # The special classes that lie in this block, computed before they are overwritten: out may be what is rewritten.
    special = counted & (target >= first) & (target < tl.minimum(first + BLOCK, CLASSES))
    target_z = tl.load(start + target, mask=special, other=0.0).to(ACC)
    at_target = affine_at(target_z - origin, a, b)
    argmax = target
    has_argmax = special
    if HARD:
        argmax = tl.load(prediction_ptr + row, mask=live, other=-1)
        has_argmax = counted & (argmax >= first) & (argmax < first + BLOCK)
    g = affine_at(difference, a[:, None], b[:, None])
    if IN_PLACE:
        tl.debug_barrier()  # no warp may write a special class before all have read it
    # a and b of an ignored row are 0, and it is not read: e = 0.
    out = gradient_ptr + row * CLASSES
    tl.store(out[:, None] + columns[None, :], g.to(gradient_ptr.dtype.element_ty), mask=inside)
    correct_terms(out, at_target, a, target, argmax, t, u, special, has_argmax, HARD)
