"""What a loss is: a formula of a few quantities of a row, with knobs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class RowQuantities(NamedTuple):
    """What a loss may depend on, of rows (N,), in float32 or float64.

    Attributes:
        log_prob: l = ln p_y of the target class.
        entropy: H = -sum p_k ln p_k, in nats.
        max_log_prob: M = ln of the largest probability.
        sum_log_prob: G = sum ln p_k over all classes.
        square_sum: Q = sum p_k^2.
        classes: C.
    """

    log_prob: Tensor
    entropy: Tensor
    max_log_prob: Tensor
    sum_log_prob: Tensor
    square_sum: Tensor
    classes: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All but the number of classes."""
        return self.log_prob, self.entropy, self.max_log_prob, self.sum_log_prob, self.square_sum

    @property
    def prob(self) -> Tensor:
        """p_y."""
        return self.log_prob.exp()

    @property
    def miss(self) -> Tensor:
        """1 - p_y, which keeps its digits where p_y is near 1. (So does its derivative, which expm1's does not.)"""
        near = self.log_prob > -0.5
        return torch.where(near, -torch.expm1(torch.where(near, self.log_prob, 0.0)), 1.0 - self.log_prob.exp())


class Knob(NamedTuple):
    """A number that shapes a loss: its name in signatures and errors, and what it may be."""

    name: str
    least: float = 0.0
    most: float = math.inf
    inclusive: bool = True
    whole: bool = False

    @property
    def accepted(self) -> str:
        if self.whole:
            return f"a whole number >= {self.least:g}" + (f" and <= {self.most:g}" if self.most < math.inf else "")
        sign, end = (">=", "<=") if self.inclusive else (">", "<")
        return f"finite and {sign} {self.least:g}" + (f" and {end} {self.most:g}" if self.most < math.inf else "")

    def refusal(self, value: float, limits: torch.finfo) -> str | None:
        """What it must be, where it may not be ``value`` in a loss of that dtype; else None.

        Comparisons only, because a number that torch.compile traces is a symbol.
        """
        least, most = self.least, min(self.most, limits.max)
        within = least <= value <= most if self.inclusive else least < value < most
        if not within or (self.whole and value != int(value)):
            return self.accepted
        # Below, a number has few digits, and its reciprocal, by which losses multiply, is infinite.
        if 0 < value < limits.tiny:
            zero = "0 or " if self.inclusive else ""
            return f"{zero}at least {limits.tiny:.3g}, {limits.dtype}'s smallest normal number"
        return None


class Objective(NamedTuple):
    """A loss, as the kernels and the reference know it.

    Attributes:
        id: its number in the operators; that of csrc/objective.h.
        name: of the public function without "_loss".
        knobs: in the order of the operators' tensor.
        formula: (quantities, *knobs) -> losses (N,), each knob 0-d or (N,) in the dtype of the quantities.
        uses: the quantities it needs beside log_prob.
        affine: whether it is affine in (l, p_y) at fixed other quantities, so that label smoothing is a substitution.
        needs_argmax: whether its gradient has a term at the predicted class: a slope by max_log_prob.
        rule: what must hold between knobs: (ok, words) of numbers or tensors.
    """

    id: int
    name: str
    knobs: tuple[Knob, ...]
    formula: Callable[..., Tensor]
    uses: frozenset[str] = frozenset()
    affine: bool = False
    needs_argmax: bool = False
    rule: Callable[..., tuple[Tensor | bool, str]] | None = None

    @property
    def is_wide(self) -> bool:
        """Whether it needs the sums over all classes that only some losses need."""
        return bool(self.uses & {"sum_log_prob", "square_sum"})
