"""Row quantities -> loss of the row and its slopes: csrc/objective.h in Triton, one function a loss.

A function has the name of its loss in dal_kernels/objectives.py, which has the formulas alone, with their sources. It
takes a row, its knobs, and ln C as a constant; how the row was read and how its gradient is written is none of its
business. Knobs are 0-d, or one a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from dal_kernels.objectives import OBJECTIVES

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Of the Taylor series of cross-entropy: the most that its knob may be.
MOST_ORDERS = tl.constexpr(16)


class RowQuantities(NamedTuple):
    """What a loss may depend on: l = ln p_y, H, M = the largest ln p_k, G = sum ln p_k, Q = sum p_k^2, and C."""

    log_prob: Any
    entropy: Any
    max_log_prob: Any
    sum_log_prob: Any
    square_sum: Any
    classes: Any


class Slopes(NamedTuple):
    """A loss, and its derivatives by what it depends on: None for what it does not."""

    loss: Any
    by_log_prob: Any
    by_entropy: Any = None
    by_max_log_prob: Any = None
    by_sum_log_prob: Any = None
    by_square_sum: Any = None


# ---- what the losses share


@triton.jit
def exponential(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1_nonpositive(x, power):
    """e^x - 1 for x <= 0, given e^x: that difference keeps its digits below -1/8, the series above."""
    TERMS: tl.constexpr = 11 if x.dtype == tl.float64 else 6
    series = x * (1.0 / TERMS) + 1.0
    for k in tl.static_range(1, TERMS - 1):
        series = tl.fma(series, x * (1.0 / (TERMS - k)), tl.full(x.shape, 1.0, x.dtype))
    return tl.where(x > -0.125, x * series, power - 1.0)


@triton.jit
def target_of(row):
    """(p_y, 1 - p_y), the latter with its digits."""
    prob = exponential(row.log_prob)
    return prob, -expm1_nonpositive(row.log_prob, prob)


@triton.jit
def box_cox(log_prob, q):
    """((1 - p_y^q) / q, p_y^q); q = 0 is cross-entropy."""
    inverse = 1.0 / tl.where(q == 0.0, 1.0, q)
    exponent = tl.where(q == 0.0, 0.0, q * log_prob)
    power = exponential(exponent)
    return tl.where(q == 0.0, -log_prob, -inverse * expm1_nonpositive(exponent, power)), power


@triton.jit
def bootstrap_factor(q, bootstrap_weight, LOG_CLASSES: tl.constexpr):
    """lambda / (q ln C); 0 for a single class."""
    if LOG_CLASSES > 0:
        return bootstrap_weight * (1.0 / tl.where(q == 0.0, 1.0, q)) * (1.0 / LOG_CLASSES)
    else:
        return bootstrap_weight * 0.0


@triton.jit
def normalized(row, weight):
    """weight l / G and its slopes: 1 for a single class; 0, and flat, where another class has probability 0."""
    single = row.sum_log_prob == 0.0
    total = tl.where(single, 1.0, row.sum_log_prob)
    quotient = row.log_prob / total
    each = weight / total
    return Slopes(
        tl.where(single, weight, weight * quotient),
        tl.where(single, 0.0, each),
        by_sum_log_prob=tl.where(single, 0.0, -each * quotient),
    )


@triton.jit
def asymmetric_power(row, a, q):
    """((a + 1)^q - (a + p_y)^q) / q, the first power taken out."""
    prob, miss = target_of(row)
    loss = -libdevice.pow(a + 1.0, q) * libdevice.expm1(q * libdevice.log1p(-miss / (a + 1.0))) / q
    return Slopes(loss, -prob * libdevice.pow(a + prob, q - 1.0))


# ---- the losses


@triton.jit
def dynamics_aware(row, knobs, LOG_CLASSES: tl.constexpr):
    """(1 - p_y^q) / q + lambda / (q ln C) H: arXiv 2303.11562."""
    loss, power = box_cox(row.log_prob, knobs[0])
    n = bootstrap_factor(knobs[0], knobs[1], LOG_CLASSES)
    return Slopes(loss + tl.where(n == 0.0, 0.0, n * row.entropy), -power, by_entropy=n)


@triton.jit
def dynamics_aware_hard(row, knobs, LOG_CLASSES: tl.constexpr):
    """The same with -ln of the largest probability for the entropy."""
    loss, power = box_cox(row.log_prob, knobs[0])
    n = bootstrap_factor(knobs[0], knobs[1], LOG_CLASSES)
    return Slopes(loss - tl.where(n == 0.0, 0.0, n * row.max_log_prob), -power, by_max_log_prob=-n)


@triton.jit
def generalized_cross_entropy(row, knobs, LOG_CLASSES: tl.constexpr):
    loss, power = box_cox(row.log_prob, knobs[0])
    return Slopes(loss, -power)


@triton.jit
def symmetric_cross_entropy(row, knobs, LOG_CLASSES: tl.constexpr):
    prob, miss = target_of(row)
    loss = tl.where(knobs[0] == 0.0, 0.0, -knobs[0] * row.log_prob) + knobs[1] * miss
    return Slopes(loss, -knobs[0] - knobs[1] * prob)


@triton.jit
def taylor_cross_entropy(row, knobs, LOG_CLASSES: tl.constexpr):
    """The sum of (1 - p_y)^i / i up to the order: its slope is the sum of a geometric series."""
    prob, miss = target_of(row)
    loss = tl.zeros_like(prob)
    slope = tl.zeros_like(prob)
    power = tl.full(prob.shape, 1.0, prob.dtype)
    for i in tl.static_range(1, MOST_ORDERS + 1):
        slope -= tl.where(i <= knobs[0], prob * power, 0.0)
        power *= miss
        loss += tl.where(i <= knobs[0], power * (1.0 / i), 0.0)
    return Slopes(loss, slope)


@triton.jit
def asymmetric_generalized_cross_entropy(row, knobs, LOG_CLASSES: tl.constexpr):
    return asymmetric_power(row, knobs[0], knobs[1])


@triton.jit
def asymmetric_unhinged(row, knobs, LOG_CLASSES: tl.constexpr):
    """((a - p_y)^q - (a - 1)^q) / q, the second power taken out."""
    prob, miss = target_of(row)
    least = knobs[0] - 1.0
    q = knobs[1]
    loss = libdevice.pow(least, q) * libdevice.expm1(q * libdevice.log1p(miss / least)) / q
    return Slopes(loss, -prob * libdevice.pow(least + miss, q - 1.0))


@triton.jit
def asymmetric_exponential(row, knobs, LOG_CLASSES: tl.constexpr):
    scaled = exponential(row.log_prob) / knobs[0]
    loss = exponential(-scaled)
    return Slopes(loss, -loss * scaled)


@triton.jit
def jensen_shannon(row, knobs, LOG_CLASSES: tl.constexpr):
    """With m = p_y + pi (1 - p_y); ln p_y - ln m by their ratio where they are near, and little is left of it."""
    prob, miss = target_of(row)
    rest = 1.0 - knobs[0]
    log_rest = libdevice.log1p(-knobs[0])
    added = knobs[0] * miss
    mean = prob + added
    log_mean = tl.where(mean <= 0.5, tl.log2(mean) * LN2, libdevice.log1p(-rest * miss))
    far = tl.where(prob == 0.0, 0.0, prob * (row.log_prob - log_mean))
    of_target = tl.where(prob <= added, far, -prob * libdevice.log1p(added / prob))
    total = -knobs[0] * log_mean - rest * miss * log_rest + rest * of_target
    return Slopes(total / (-rest * log_rest), -(prob * log_rest + of_target) / log_rest)


@triton.jit
def fisher_rao(row, knobs, LOG_CLASSES: tl.constexpr):
    """The square of the angle with cosine sqrt(p_y), by its tangent, because that keeps its digits at both ends."""
    _, miss = target_of(row)
    sine = tl.sqrt(miss)
    cosine = exponential(0.5 * row.log_prob)
    angle = libdevice.atan2(sine, cosine)
    ratio = tl.where(sine == 0.0, 1.0, angle / tl.where(sine == 0.0, 1.0, sine))
    return Slopes(angle * angle, -ratio * cosine)


@triton.jit
def focal(row, knobs, LOG_CLASSES: tl.constexpr):
    """-(1 - p_y)^gamma ln p_y. Of its slope, ln p / (1 - p) is -1 where both vanish."""
    prob, miss = target_of(row)
    constant = focal_detached(row, knobs, LOG_CLASSES)
    ratio = tl.where(miss == 0.0, -1.0, row.log_prob / tl.where(miss == 0.0, 1.0, miss))
    moving = tl.where(prob == 0.0, 0.0, knobs[0] * constant.by_log_prob * prob * ratio)
    return Slopes(constant.loss, constant.by_log_prob - moving)


@triton.jit
def focal_detached(row, knobs, LOG_CLASSES: tl.constexpr):
    """The same value; the modulator counts as a constant in the gradient."""
    _, miss = target_of(row)
    modulator = libdevice.pow(miss, knobs[0])
    return Slopes(tl.where(modulator == 0.0, 0.0, -modulator * row.log_prob), -modulator)


@triton.jit
def partially_huberised_cross_entropy(row, knobs, LOG_CLASSES: tl.constexpr):
    """Cross-entropy above p = 1 / tau, its tangent below."""
    log_tau = tl.log2(knobs[0]) * LN2
    linear = row.log_prob <= -log_tau
    scaled = knobs[0] * exponential(row.log_prob)
    return Slopes(tl.where(linear, log_tau + 1.0 - scaled, -row.log_prob), tl.where(linear, -scaled, -1.0))


@triton.jit
def smoothed_cross_entropy(row, knobs, LOG_CLASSES: tl.constexpr):
    own = 1.0 - knobs[0]
    each = knobs[0] / row.classes
    loss = tl.where(own == 0.0, 0.0, -own * row.log_prob) - tl.where(each == 0.0, 0.0, each * row.sum_log_prob)
    return Slopes(loss, -own, by_sum_log_prob=-each)


@triton.jit
def normalized_and_absolute(row, knobs, LOG_CLASSES: tl.constexpr):
    prob, miss = target_of(row)
    active = normalized(row, knobs[0])
    return Slopes(
        active.loss + knobs[1] * miss,
        active.by_log_prob - knobs[1] * prob,
        by_sum_log_prob=active.by_sum_log_prob,
    )


@triton.jit
def normalized_and_asymmetric(row, knobs, LOG_CLASSES: tl.constexpr):
    active = normalized(row, knobs[0])
    passive = asymmetric_power(row, knobs[2], knobs[3])
    return Slopes(
        active.loss + knobs[1] * passive.loss,
        active.by_log_prob + knobs[1] * passive.by_log_prob,
        by_sum_log_prob=active.by_sum_log_prob,
    )


@triton.jit
def joint_asymmetric(row, knobs, LOG_CLASSES: tl.constexpr):
    active = normalized(row, knobs[0])
    weight = knobs[1] / row.classes
    a = knobs[2]
    scaled = 2.0 * a * exponential(row.log_prob)
    return Slopes(
        active.loss + weight * (row.square_sum - scaled + a * a),
        active.by_log_prob - weight * scaled,
        by_sum_log_prob=active.by_sum_log_prob,
        by_square_sum=weight,
    )


@triton.jit
def brier(row, knobs, LOG_CLASSES: tl.constexpr):
    twice = 2.0 * exponential(row.log_prob)
    return Slopes(row.square_sum - twice + 1.0, -twice, by_square_sum=1.0)


@triton.jit
def epsilon_softmax(row, knobs, LOG_CLASSES: tl.constexpr):
    """Cross-entropy of (p + m e_k) / (1 + m), k the predicted class, and mean absolute error of p."""
    prob, miss = target_of(row)
    m = knobs[0]
    alpha = knobs[1]
    predicted = row.log_prob >= row.max_log_prob
    raised = -libdevice.log1p(-miss / (1.0 + m))
    entropy = tl.where(predicted, raised, libdevice.log1p(m) - row.log_prob)
    slope = tl.where(predicted, prob / (prob + m), 1.0)
    return Slopes(tl.where(alpha == 0.0, 0.0, alpha * entropy) + knobs[2] * miss, -alpha * slope - knobs[2] * prob)


# By the ids of the table, and under its names, so that a loss of either that the other lacks is an error at once.
FUNCTIONS = {objective.id: globals()[objective.name] for objective in OBJECTIVES}
