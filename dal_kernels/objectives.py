"""Every loss of the family in one table: its name, its knobs, what it needs of a row, and its formula.

A row loss is a function of a few quantities of its row (:class:`RowQuantities`) and of its knobs. The formulas here are
plain and differentiable: they are what the kernels are held against, and what runs where no kernel does. The kernels
know a loss by its ``id``: csrc/objective.h and backends/triton/objectives.py have the same formulas with their slopes.
"""

from __future__ import annotations

import copyreg
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dal_kernels.objective import Knob, Objective, RowQuantities

__all__ = ["OBJECTIVES", "register"]

# What reverse cross-entropy takes -ln 0 for: ln 1e-4, as its authors do (arXiv 1908.06112).
REVERSE_SCALE = -math.log(1e-4)

OBJECTIVES: list[Objective] = []


def register(
    name: str,
    *knobs: Knob,
    uses: tuple[str, ...] = (),
    affine: bool = False,
    needs_argmax: bool = False,
    rule: Callable[..., tuple[Tensor | bool, str]] | None = None,
) -> Callable[[Callable[..., Tensor]], Objective]:
    """Put the decorated formula into the table, as the next id."""

    def put(formula: Callable[..., Tensor]) -> Objective:
        objective = Objective(len(OBJECTIVES), name, knobs, formula, frozenset(uses), affine, needs_argmax, rule)
        OBJECTIVES.append(objective)
        return objective

    return put


# ---- the formulas. Ids are their places here.

_Q, _BOOTSTRAP_WEIGHT = Knob("q"), Knob("bootstrap_weight")
_ALPHA, _BETA = Knob("alpha"), Knob("beta")
_MOST_ORDERS = 16


def _positive_q(q: Tensor, bootstrap_weight: Tensor) -> tuple[Tensor | bool, str]:
    words = "q must be > 0 where bootstrap_weight is not 0, and bootstrap_weight / q at most 1e30"
    return (bootstrap_weight == 0) | ((q != 0) & (bootstrap_weight <= 1e30 * q)), words


def box_cox(log_prob: Tensor, q: Tensor) -> Tensor:
    """(1 - p_y^q) / q of rows from ln p_y; -ln p_y where q = 0."""
    positive = torch.where(q == 0, 1.0, q)
    # expm1, because 1 - p^q keeps no digit near p = 1; not far from it, because autograd's derivative of expm1, its
    # result plus 1, keeps none there.
    exponent = positive * log_prob
    fit = torch.where(exponent < -0.5, 1.0 - exponent.exp(), -torch.expm1(exponent)) / positive
    return torch.where(q == 0, -log_prob, fit)


def bootstrap_term(measure: Tensor, q: Tensor, bootstrap_weight: Tensor, classes: int) -> Tensor:
    r""":math:`\lambda/(q \ln C) \, B(p)` of rows. ``measure`` is B(p): the entropy, or -ln p of the predicted class."""
    if classes == 1:
        return torch.zeros_like(measure)
    factor = bootstrap_weight / (torch.where(q == 0, 1.0, q) * math.log(classes))
    # Skipped, not multiplied by zero: where it is off, the term must not add 0 * inf.
    return torch.where(bootstrap_weight == 0, 0.0, factor * measure)


@register("dynamics_aware", _Q, _BOOTSTRAP_WEIGHT, uses=("entropy",), rule=_positive_q)
def dynamics_aware(row: RowQuantities, q: Tensor, bootstrap_weight: Tensor) -> Tensor:
    return box_cox(row.log_prob, q) + bootstrap_term(row.entropy, q, bootstrap_weight, row.classes)


@register("dynamics_aware_hard", _Q, _BOOTSTRAP_WEIGHT, uses=("max_log_prob",), needs_argmax=True, rule=_positive_q)
def dynamics_aware_hard(row: RowQuantities, q: Tensor, bootstrap_weight: Tensor) -> Tensor:
    return box_cox(row.log_prob, q) + bootstrap_term(-row.max_log_prob, q, bootstrap_weight, row.classes)


@register("generalized_cross_entropy", _Q)
def generalized_cross_entropy(row: RowQuantities, q: Tensor) -> Tensor:
    return box_cox(row.log_prob, q)


@register("symmetric_cross_entropy", _ALPHA, _BETA, affine=True)
def symmetric_cross_entropy(row: RowQuantities, alpha: Tensor, beta: Tensor) -> Tensor:
    """Cross-entropy and mean absolute error, which reverse cross-entropy is but for a factor."""
    return torch.where(alpha == 0, 0.0, -alpha * row.log_prob) + beta * row.miss


@register("taylor_cross_entropy", Knob("order", 1, _MOST_ORDERS, whole=True))
def taylor_cross_entropy(row: RowQuantities, order: Tensor) -> Tensor:
    miss = row.miss
    total, power = torch.zeros_like(miss), torch.ones_like(miss)
    for i in range(1, _MOST_ORDERS + 1):
        power = power * miss
        total = total + torch.where(order >= i, power / i, 0.0)
    return total


@register("asymmetric_generalized_cross_entropy", Knob("a", inclusive=False), Knob("q", inclusive=False))
def asymmetric_generalized_cross_entropy(row: RowQuantities, a: Tensor, q: Tensor) -> Tensor:
    return _asymmetric_power(row, a, q)


def _asymmetric_power(row: RowQuantities, a: Tensor, q: Tensor) -> Tensor:
    """((a + 1)^q - (a + p_y)^q) / q."""
    exponent = q * torch.log1p(-row.miss / (a + 1))
    return (a + 1) ** q * box_cox_of(exponent) / q


def box_cox_of(exponent: Tensor) -> Tensor:
    """1 - e^x for x <= 0, with its digits, and those of its derivative, near 0 and far from it."""
    return torch.where(exponent < -0.5, 1.0 - exponent.exp(), -torch.expm1(exponent.clamp_min(-1.0)))


@register("asymmetric_unhinged", Knob("a", 1.0, inclusive=False), Knob("q", inclusive=False))
def asymmetric_unhinged(row: RowQuantities, a: Tensor, q: Tensor) -> Tensor:
    """((a - p_y)^q - (a - 1)^q) / q, the smaller power taken out so that the difference keeps its digits."""
    return (a - 1) ** q * torch.expm1(q * torch.log1p(row.miss / (a - 1))) / q


@register("asymmetric_exponential", Knob("a", inclusive=False))
def asymmetric_exponential(row: RowQuantities, a: Tensor) -> Tensor:
    return (-row.prob / a).exp()


@register("jensen_shannon", Knob("pi", 0.0, 1.0, inclusive=False))
def jensen_shannon(row: RowQuantities, pi: Tensor) -> Tensor:
    """Generalised Jensen-Shannon divergence, scaled as its authors do; with m = p_y + pi (1 - p_y)."""
    log_rest = torch.log1p(-pi)
    added = pi * row.miss
    mean = row.prob + added
    unlikely = mean <= 0.5
    log_mean = torch.where(
        unlikely, torch.where(unlikely, mean, 1.0).log(), torch.log1p(-(1 - pi) * torch.where(unlikely, 0.0, row.miss))
    )
    # ln p - ln m by the ratio of the two where they are near, because for small pi nothing is left of that difference;
    # p ln p -> 0 at p = 0: a masked target.
    near = row.prob > added
    ratio = torch.where(near, added, 0.0) / torch.where(near, row.prob, 1.0)
    far = row.prob * (torch.where(row.prob == 0, 0.0, row.log_prob) - log_mean)
    of_target = torch.where(near, -row.prob * torch.log1p(ratio), far)
    total = -pi * log_mean - (1 - pi) * row.miss * log_rest + (1 - pi) * of_target
    return total / -((1 - pi) * log_rest)


@register("fisher_rao")
def fisher_rao(row: RowQuantities) -> Tensor:
    """arccos(sqrt p_y)^2. Near p_y = 1 by the series of arcsin^2, because a square root has no derivative at 0."""
    miss = row.miss
    near = miss < 0.03
    small = torch.where(near, miss, 0.0)
    series, coefficient = torch.zeros_like(miss), 1.0
    for n in range(1, 13):
        coefficient = coefficient * 2 * n / (2 * n - 1) if n > 1 else 2.0
        series = series + coefficient / (2 * n * n) * small**n
    angle = torch.acos(torch.where(near, 0.5, (0.5 * row.log_prob).exp()))
    return torch.where(near, series, angle * angle)


def _focal(row: RowQuantities, gamma: Tensor, detached: bool) -> Tensor:
    miss = row.miss
    modulator = torch.where(miss == 0, 1.0, miss) ** gamma
    modulator = modulator.detach() if detached else modulator
    return torch.where((miss == 0) & (gamma != 0), 0.0, -modulator * row.log_prob)


@register("focal", Knob("gamma"))
def focal(row: RowQuantities, gamma: Tensor) -> Tensor:
    """-(1 - p_y)^gamma ln p_y."""
    return _focal(row, gamma, detached=False)


@register("focal_detached", Knob("gamma"))
def focal_detached(row: RowQuantities, gamma: Tensor) -> Tensor:
    """The same value; the modulator counts as a constant in the gradient."""
    return _focal(row, gamma, detached=True)


@register("partially_huberised_cross_entropy", Knob("tau", 1.0))
def partially_huberised_cross_entropy(row: RowQuantities, tau: Tensor) -> Tensor:
    """Cross-entropy where p_y > 1 / tau, else its tangent there."""
    linear = row.log_prob <= -tau.log()
    return torch.where(linear, -tau * row.prob + tau.log() + 1, -torch.where(linear, 0.0, row.log_prob))


@register("smoothed_cross_entropy", Knob("label_smoothing", 0.0, 1.0), uses=("sum_log_prob",), affine=True)
def smoothed_cross_entropy(row: RowQuantities, label_smoothing: Tensor) -> Tensor:
    spread = torch.where(label_smoothing == 0, 0.0, label_smoothing / row.classes * row.sum_log_prob)
    return -torch.where(label_smoothing == 1, 0.0, (1 - label_smoothing) * row.log_prob) - spread


def normalized(row: RowQuantities) -> Tensor:
    """Normalised cross-entropy l / G, 1 for a single class, 0 where another class has probability 0."""
    single = row.sum_log_prob == 0
    return torch.where(single, 1.0, row.log_prob / torch.where(single, 1.0, row.sum_log_prob))


@register("normalized_and_absolute", _ALPHA, _BETA, uses=("sum_log_prob",), affine=True)
def normalized_and_absolute(row: RowQuantities, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha NCE + beta (1 - p_y)."""
    return alpha * normalized(row) + beta * row.miss


@register(
    "normalized_and_asymmetric",
    _ALPHA,
    _BETA,
    Knob("a", inclusive=False),
    Knob("q", inclusive=False),
    uses=("sum_log_prob",),
)
def normalized_and_asymmetric(row: RowQuantities, alpha: Tensor, beta: Tensor, a: Tensor, q: Tensor) -> Tensor:
    """alpha NCE + beta AGCE."""
    return alpha * normalized(row) + beta * _asymmetric_power(row, a, q)


@register("joint_asymmetric", _ALPHA, _BETA, Knob("a"), uses=("sum_log_prob", "square_sum"), affine=True)
def joint_asymmetric(row: RowQuantities, alpha: Tensor, beta: Tensor, a: Tensor) -> Tensor:
    """alpha NCE + beta AMSE, the asymmetric mean squared error (Q - 2 a p_y + a^2) / C."""
    return alpha * normalized(row) + beta * (row.square_sum - 2 * a * row.prob + a * a) / row.classes


@register("brier", uses=("square_sum",), affine=True)
def brier(row: RowQuantities) -> Tensor:
    """Q - 2 p_y + 1: the squared distance of the probabilities from the label."""
    return row.square_sum - 2 * row.prob + 1


@register("epsilon_softmax", Knob("m"), _ALPHA, _BETA, uses=("max_log_prob",))
def epsilon_softmax(row: RowQuantities, m: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Cross-entropy of (p + m e_k) / (1 + m), k the predicted class, and mean absolute error of p."""
    predicted = row.log_prob >= row.max_log_prob
    raised = -torch.log1p(-torch.where(predicted, row.miss, 0.0) / (1 + m))
    entropy = torch.where(predicted, raised, torch.log1p(m) - torch.where(predicted, 0.0, row.log_prob))
    return torch.where(alpha == 0, 0.0, alpha * entropy) + beta * row.miss


def dynamics_aware_of(bootstrap: str) -> Objective:
    """The loss of :func:`dal_kernels.dynamics_aware_loss` with that bootstrap, "soft" or "hard"."""
    return dynamics_aware_hard if bootstrap == "hard" else dynamics_aware


# For calls that ask for the quantities alone: not in the table, for no kernel has it.
row_statistics_of = Objective(-1, "row_statistics", (), lambda row: row.log_prob)


def _called(name: str) -> Objective:
    for objective in (*OBJECTIVES, row_statistics_of):
        if objective.name == name:
            return objective
    raise ValueError(f"this version of dal_kernels has no loss {name!r}, which is in what is loaded")


# By its name, because its formula is found under no name of a module: the table's loss has taken that.
copyreg.pickle(Objective, lambda objective: (_called, (objective.name,)))
