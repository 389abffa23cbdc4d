"""How a schedule goes from its first value to its last: the numbers it takes, its warm-up and its shape."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal

Shape = Literal["linear", "cosine", "step"]


def number(name: str, value: Any) -> float:
    """``value`` as a float, or TypeError or ValueError: finite and >= 0, ``total_steps`` > 0."""
    accepted = f"finite and {'>' if name == 'total_steps' else '>='} 0"
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {accepted}, got a number too large for a float") from None
    if not math.isfinite(value) or value < 0 or (value == 0 and name == "total_steps"):
        raise ValueError(f"{name} must be {accepted}, got {value}")
    return value


def check_warmup(warmup_steps: float, total_steps: float) -> None:
    """Raise ValueError for a warm-up that leaves no step for the way."""
    if warmup_steps >= total_steps:
        raise ValueError(f"warmup_steps must be below total_steps, got {warmup_steps} of {total_steps}")


def share_of_way(t: float, warmup_steps: float, total_steps: float, shape: Shape) -> float:
    """How much of the way from the first value to the last is done at time ``t``: 0 in the warm-up, 1 from the end on.

    "linear" is even, "cosine" starts and ends slowly, "step" jumps to the end halfway.
    """
    if t >= total_steps:
        return 1.0
    share = max(0.0, t - warmup_steps) / (total_steps - warmup_steps)
    if shape == "cosine":
        return (1.0 - math.cos(math.pi * share)) / 2.0
    return share if shape == "linear" else float(share >= 0.5)
