"""Device code. Three ideas, as everywhere: merge row statistics, turn them into an objective, write its gradient.

All exponents are to base 2: with M = round(m log2 e) and d = z log2 e - M, one fused multiply-add an element, e = 2^d.
M need not be m exactly: what it is off by multiplies every e of the row alike and cancels in e / S and in d - W / S.

    S = sum e,   W = sum e d,   ln p_y = ln 2 d_y - ln S,   H = ln S - ln 2 W / S
    dL/dz_j = e_j (A + B d_j) - t [j = y] - u [j = argmax z]

dal_kernels/reference.py is the long form; csrc/objective.h the same in C++.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below 2^-1000 (and for -inf) e is 0 in float32; a finite d keeps e d at 0 too.
LOWEST = tl.constexpr(-1100.0)
# Fields of one row, field-major (len(FIELDS), N), in the order of dal_kernels.ops.FIELDS.
SHIFT, SCALE, SLOPE, TARGET_TERM, ARGMAX_TERM, TARGET_PROB, ENTROPY = (tl.constexpr(i) for i in range(7))


# ---- row statistics


@triton.jit
def shift_of(peak):
    """M for a maximum. A row (so far) of -inf alone takes 0: its exponentials are 0, not 2^(-inf + inf)."""
    return tl.where(peak == -float("inf"), 0.0, peak * LOG2E)


@triton.jit
def exponent(z, shift):
    """d = z log2 e - M."""
    return tl.fma(z, tl.full(z.shape, LOG2E, z.dtype), -shift)


@triton.jit
def rebase(total, weighted, shift, new):
    """Statistics moved from one shift to another: with s = shift - new, W <- 2^s (W + S s), S <- 2^s S."""
    ratio = tl.exp2(shift - new)
    step = tl.maximum(shift - new, LOWEST)
    return ratio * total, ratio * (weighted + total * step)


# ---- objectives, to base 2 as well: l = log2 p_y, M = W / S, h = H / ln 2 = log2 S - M.
# Each is a loss and coefficients (a, b, t, u) of  p_j (a + b (log2 p_j + h)) - t [j = y] - u [j = argmax z].


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
    """1 / q (1 where q = 0, which is cross-entropy) and n ln 2 with n = lambda / (q ln C); 0 for a single class."""
    inverse = 1.0 / tl.where(q == 0.0, 1.0, q)
    if LOG_CLASSES > 0:
        return inverse, bootstrap_weight * inverse * (LN2 / LOG_CLASSES)
    else:
        return inverse, bootstrap_weight * 0.0


@triton.jit
def dynamics_aware(log_prob, log_max_prob, mean, entropy, q, inverse, n, HARD: tl.constexpr):
    """(1 - p_y^q) / q + lambda / (q ln C) B(p): arXiv 2303.11562. B = H, or with HARD -ln p_argmax.

    Returns the loss and (a - b M, b, t, u).
    """
    exponent = tl.where(q == 0.0, 0.0, q * log_prob)
    power = tl.exp2(exponent)
    loss = tl.where(q == 0.0, log_prob * -LN2, -inverse * expm1_nonpositive(exponent * LN2, power))
    if HARD:
        u = n * (1.0 / LN2) + power * 0.0
        return loss - tl.where(n == 0.0, 0.0, n * log_max_prob), power + u, power * 0.0, power, u
    else:
        return loss + tl.where(n == 0.0, 0.0, n * entropy), power + n * mean, -n + power * 0.0, power, power * 0.0


@triton.jit
def finish(peak_d, total, weighted, target_d, ignored, q, inverse, n, row_weight, HARD: tl.constexpr):
    """Statistics of rows -> loss, the coefficients of e_j (A + B d_j) - t - u, and l. A bad label came with NaN.

    An ignored row goes through as one of a single class, with weight 0: nothing of it is left.
    """
    total = tl.where(ignored, 1.0, total)
    weighted = tl.where(ignored, 0.0, weighted)
    scaled = 1.0 / total
    log_sum = tl.log2(total)
    mean = weighted * scaled
    log_prob = tl.where(ignored, 0.0, target_d - log_sum)
    log_max_prob = tl.where(ignored, 0.0, peak_d - log_sum)
    loss, a, b, t, u = dynamics_aware(log_prob, log_max_prob, mean, log_sum - mean, q, inverse, n, HARD)
    scaled *= row_weight
    return loss, scaled * a, scaled * b, row_weight * t, row_weight * u, log_prob


@triton.jit
def affine_at(d, a, b):
    """e (A + B d) of single classes."""
    return tl.exp2(d) * (a + b * tl.maximum(d, LOWEST))


@triton.jit
def store_fields(fields_ptr, row, count, live, shift, a, b, t):
    """What the gradient of a row is made from again, but for the argmax term."""
    tl.store(fields_ptr + SHIFT * count + row, shift, mask=live)
    tl.store(fields_ptr + SCALE * count + row, a, mask=live)
    tl.store(fields_ptr + SLOPE * count + row, b, mask=live)
    tl.store(fields_ptr + TARGET_TERM * count + row, t, mask=live)


@triton.jit
def store_statistics(fields_ptr, prediction_ptr, row, count, live, u, log_prob, total, weighted, argmax, ignored):
    """What the user learns of a row, and the argmax term."""
    tl.store(fields_ptr + ARGMAX_TERM * count + row, u, mask=live)
    tl.store(prediction_ptr + row, argmax, mask=live)
    tl.store(fields_ptr + TARGET_PROB * count + row, tl.where(ignored, float("nan"), tl.exp2(log_prob)), mask=live)
    tl.store(fields_ptr + ENTROPY * count + row, (tl.log2(total) - weighted / total) * LN2, mask=live)


@triton.jit
def store_sums(partial_ptr, loss, weight):
    """Sum of the losses and of the weights of a program's rows, for the reduction."""
    tl.store(partial_ptr + tl.program_id(0), loss)
    tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), weight)


@triton.jit
def correct_terms(
    gradient_ptr, at_target, at_argmax, target, argmax, t, u, has_target, has_argmax, HARD: tl.constexpr
):  # fmt: skip
    """The two classes of a row that differ from the affine rule, stored over it once the row is written.

    Cheaper than a comparison for each element. ``at_*``: the affine value there; ``has_*``: whether it is to be stored.
    """
    tl.debug_barrier()
    same = target == argmax
    if HARD:
        tl.store(gradient_ptr + argmax, at_argmax - u - tl.where(same, t, 0.0), mask=has_argmax)
        tl.store(gradient_ptr + target, at_target - t, mask=has_target & ~same)
    else:
        tl.store(gradient_ptr + target, at_target - t, mask=has_target)


@triton.jit
def store_loss(loss_ptr, correction_ptr, total, divisor, rows, MEAN: tl.constexpr):
    """The reduced loss. A mean's gradient was divided by N so far: N / divisor is left for the backward."""
    if MEAN:
        tl.store(loss_ptr, (total / divisor).to(loss_ptr.dtype.element_ty))
        # No row counted: the gradient is 0, not 0 * inf.
        correction = tl.where(divisor == 0.0, 0.0, rows / tl.where(divisor == 0.0, 1.0, divisor))
        tl.store(correction_ptr, correction.to(correction_ptr.dtype.element_ty))
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
# TILES > 1, for the longest rows: of each element only d fits the registers, and e is made again for the gradient.
@triton.jit(do_not_specialize=["class_stride"])
def loss_rows(
    logits_ptr, row_stride, class_stride, target_ptr, target_stride, q_ptr, q_stride, lam_ptr, lam_stride, weight_ptr,
    gradient_ptr, loss_ptr, partial_ptr, fields_ptr, prediction_ptr, count, ignore_index,
    CLASSES: tl.constexpr, LOG_CLASSES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, AXIS: tl.constexpr,
    TILES: tl.constexpr, PACKED: tl.constexpr, PER_ROW: tl.constexpr, HARD: tl.constexpr, MEAN: tl.constexpr,
    REDUCED: tl.constexpr, GRADIENT: tl.constexpr, FIELDS: tl.constexpr, PREDICTION: tl.constexpr,
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
    # An ignored row is not read unless its statistics are wanted: as -inf it has e = 0 and gradient 0.
    wanted = live if PREDICTION else live & ~ignored
    across = tl.expand_dims(columns, 1 - AXIS)
    if AXIS == 0:
        # class_stride is 1, which the compiler must not know: it would lay the classes of a row over lanes again.
        offsets = tl.expand_dims(offset, AXIS) + across * class_stride
    else:
        offsets = tl.expand_dims(offset, AXIS) + across
    tiles = ()
    for tile in tl.static_range(TILES):
        inside = tl.expand_dims(wanted, AXIS) & (across + tile * BLOCK < CLASSES)
        tiles += (tl.load(start + (offsets + tile * BLOCK), mask=inside, other=-float("inf")).to(ACC),)
    target_z = tl.load(start + offset + target, mask=counted, other=float("nan")).to(ACC)
    q, lam = read_schedule(q_ptr, q_stride, lam_ptr, lam_stride, first + row, live, PER_ROW, ACC)
    largest = tl.max(lam, 0) if PER_ROW else lam
    inverse, n = schedule(q, lam, LOG_CLASSES)
    # Nothing asks for W without an entropy term: one branch for the whole program. Every e would wait for it in a
    # register: none with TILES > 1.
    if TILES > 1:
        entropic = PREDICTION or not HARD
    else:
        entropic = PREDICTION or (not HARD and largest != 0.0)

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
    shift = shift_of(peak)
    exponents = ()
    for tile in tl.static_range(TILES):
        z = tiles[tile]
        d = exponent(z, tl.expand_dims(shift, AXIS))
        e = tl.exp2(d)
        d = tl.maximum(d, LOWEST)
        exponents += (d,)
        if tile == 0:
            sums = e
            products = e * d
        else:
            sums += e
            products += e * d
    total = tl.sum(sums, AXIS)
    weighted = tl.zeros_like(total)
    if entropic:
        weighted = tl.sum(products, AXIS)
    target_d = exponent(target_z, shift)
    peak_d = exponent(peak, shift)
    weight = read_weight(weight_ptr, target, ignored, counted, ACC)
    scaled = weight / count if MEAN else weight
    loss, a, b, t, u, log_prob = finish(peak_d, total, weighted, target_d, ignored, q, inverse, n, scaled, HARD)

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
        store_fields(fields_ptr, first + row, count, live, shift, a, b, t)
    if GRADIENT:
        out = gradient_ptr + first * CLASSES
        place = row * CLASSES
        to = out + (tl.expand_dims(place, AXIS) + across)
        element = gradient_ptr.dtype.element_ty
        at_target = affine_at(target_d, a, b)
        at_argmax = affine_at(peak_d, a, b)
        if TILES > 1:
            a *= 0.5
            b *= 0.5
        for tile in tl.static_range(TILES):
            d = exponents[tile]
            if TILES > 1:
                # 2 e, and not e, which the compiler would know and keep beside d.
                e = tl.exp2(d + 1.0)
            inside = tl.expand_dims(live, AXIS) & (across + tile * BLOCK < CLASSES)
            # Stored in each branch: a tensor that leaves a branch costs a move an element.
            if entropic and not HARD:
                slope = tl.broadcast_to(tl.expand_dims(b, AXIS), d.shape)
                g = e * tl.fma(slope, d, tl.broadcast_to(tl.expand_dims(a, AXIS), d.shape))
                if PREDICTION:
                    g = tl.where(tl.expand_dims(ignored, AXIS), 0.0, g)
                tl.store(to + tile * BLOCK, g.to(element), mask=inside)
            else:
                g = e * tl.expand_dims(a, AXIS)
                if PREDICTION:
                    g = tl.where(tl.expand_dims(ignored, AXIS), 0.0, g)
                tl.store(to + tile * BLOCK, g.to(element), mask=inside)
        correct_terms(out + place, at_target, at_argmax, target, argmax, t, u, counted, counted, HARD)


# ---- longer rows: statistics now, the gradient in the backward, for a second read comes either way


@triton.jit
def read_blocks(
    start, first, last, bootstrapped,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, ARGMAX: tl.constexpr, NAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Statistics of blocks [first, last) of a row, relative to their maximum: (peak, S, W, argmax, first NaN)."""
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
                total, weighted = rebase(total, weighted, shift_of(peak), shift_of(top))
            peak = top
            if ARGMAX:
                argmax = tl.min(tl.where(z == top, at, CLASSES), 0).to(tl.int64)
        if NAN:
            nan_at = tl.minimum(nan_at, tl.min(tl.where(z != z, at, CLASSES), 0).to(tl.int64))
        d = exponent(z, shift_of(peak))
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
    """Merged statistics of rows -> what outlives the forward; returns the sums of losses and weights."""
    target, ignored, counted = read_target(target_ptr, target_stride, row, live, ignore_index, CLASSES)
    q, lam = read_schedule(q_ptr, q_stride, lam_ptr, lam_stride, row, live, True, ACC)
    inverse, n = schedule(q, lam, LOG_CLASSES)
    shift = shift_of(peak)
    target_z = tl.load(logits_ptr + row * row_stride + target, mask=counted, other=float("nan")).to(ACC)
    target_d = exponent(target_z, shift)
    peak_d = exponent(peak, shift)
    weight = read_weight(weight_ptr, target, ignored, counted, ACC)
    scaled = weight / count if MEAN else weight
    loss, a, b, t, u, log_prob = finish(peak_d, total, weighted, target_d, ignored, q, inverse, n, scaled, HARD)
    loss = loss * weight
    if PREDICTION:
        store_statistics(fields_ptr, prediction_ptr, row, count, live, u, log_prob, total, weighted, argmax, ignored)
    if FIELDS:
        store_fields(fields_ptr, row, count, live, shift, a, b, t)
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
    # A split of -inf alone has S = W = 0, wherever it is moved from.
    totals, weights = rebase(totals, weights, shift_of(peaks), shift_of(peak)[:, None])
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
        store_loss(loss_ptr, correction_ptr, loss, weight, count, MEAN)


# ---- the reduction, the backward


@triton.jit
def reduce_sums(partial_ptr, loss_ptr, correction_ptr, programs, rows, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the programs, in fixed order."""
    lane = tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, programs, BLOCK):
        inside = first + lane < programs
        loss += tl.load(partial_ptr + first + lane, mask=inside, other=0.0).to(tl.float64)
        weight += tl.load(partial_ptr + programs + first + lane, mask=inside, other=0.0).to(tl.float64)
    store_loss(loss_ptr, correction_ptr, tl.sum(loss, 0), tl.sum(weight, 0), rows, MEAN)


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
    shift = tl.load(fields_ptr + SHIFT * count + row, mask=live, other=0.0)
    a = factor * tl.load(fields_ptr + SCALE * count + row, mask=live, other=0.0)
    b = factor * tl.load(fields_ptr + SLOPE * count + row, mask=live, other=0.0)
    t = factor * tl.load(fields_ptr + TARGET_TERM * count + row, mask=live, other=0.0)
    u = t  # looked at only if HARD
    if HARD:
        u = factor * tl.load(fields_ptr + ARGMAX_TERM * count + row, mask=live, other=0.0)
    inside = live[:, None] & (columns < CLASSES)[None, :]
    start = logits_ptr + row * (CLASSES if PACKED else row_stride)
    z = tl.load(start[:, None] + columns[None, :], mask=inside & counted[:, None], other=-float("inf")).to(ACC)
    d = exponent(z, shift[:, None])
    # The special classes that lie in this block, computed before they are overwritten: out may be what is rewritten.
    special = counted & (target >= first) & (target < tl.minimum(first + BLOCK, CLASSES))
    target_z = tl.load(start + target, mask=special, other=0.0).to(ACC)
    at_target = affine_at(exponent(target_z, shift), a, b)
    argmax = target
    has_argmax = special
    at_argmax = at_target
    if HARD:
        argmax = tl.load(prediction_ptr + row, mask=live, other=-1)
        has_argmax = counted & (argmax >= first) & (argmax < first + BLOCK)
        argmax_z = tl.load(start + argmax, mask=has_argmax, other=0.0).to(ACC)
        at_argmax = affine_at(exponent(argmax_z, shift), a, b)
    e = tl.exp2(d)
    g = e * tl.fma(
        tl.broadcast_to(b[:, None], d.shape), tl.maximum(d, LOWEST), tl.broadcast_to(a[:, None], d.shape)
    )  # fmt: skip
    if IN_PLACE:
        tl.debug_barrier()  # no warp may write a special class before all have read it
    # a and b of an ignored row are 0, and it is not read: e = 0.
    out = gradient_ptr + row * CLASSES
    tl.store(out[:, None] + columns[None, :], g.to(gradient_ptr.dtype.element_ty), mask=inside)
    correct_terms(out, at_target, at_argmax, target, argmax, t, u, special, has_argmax, HARD)
