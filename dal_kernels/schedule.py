"""The schedule of DAL: the exponent q grows, and the bootstrap weight fades in once q has passed 1.

Arithmetic on Python floats, and tensors that follow it. Source: arXiv 2303.11562 and its authors' training script, in
which one step is an epoch. Any monotone clock works: epochs, iterations, or a fraction of either.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dal_kernels.live import LiveNumbers

__all__ = ["DynamicsAwareSchedule"]

_SETTINGS = ("q_start", "q_end", "total_steps")


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


class DynamicsAwareSchedule:
    r"""q(t) and bootstrap_weight(t) in closed form, with a position to step.

    .. math::
        q(t) = q_s + (q_e - q_s) \, t/T, \qquad
        \lambda(t) = \mathrm{clamp}\Big(\frac{t - t_0}{T - t_0},\, 0,\, 1\Big), \qquad q(t_0) = 1

    Past ``total_steps`` both stay at their last value. ``q_end <= 1`` never bootstraps: the weight stays 0. With
    ``q_start == q_end`` q is constant, and the weight is 1 if it is above 1, else 0.

    Args:
        q_start: exponent at the first step, >= 0. Small values fit faster; with many classes take 0.2 to 0.4.
        q_end: exponent at the last, >= q_start. Above 1 easy samples are stressed and noisy ones let go.
        total_steps: length T of training, > 0, in the unit that :meth:`step` counts.

    Attributes:
        position: steps taken so far, a float; 0 at the start, so that the first epoch trains with ``q_start``.
        q, bootstrap_weight: the values at ``position``, floats. :meth:`on` gives them as tensors that follow.
        live: those values for a loss to read.

    Raises:
        TypeError: a setting is not a number.
        ValueError: a setting is negative or not finite, ``total_steps`` is 0, or ``q_start > q_end``.
    """

    # Names of the entries of the state dict, in order.
    STATE: tuple[str, ...] = (*_SETTINGS, "position")

    def __init__(self, q_start: float, q_end: float, total_steps: float) -> None:
        self.q_start = q_start
        self.q_end = q_end
        self.total_steps = total_steps
        if self.q_start > self.q_end:
            raise ValueError(f"q_start must not be above q_end, got {self.q_start} and {self.q_end}")
        self.position = 0.0
        self.live = LiveNumbers(self.at(0.0))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, number(name, value) if name in DynamicsAwareSchedule.STATE else value)
        # Whatever moves or changes the schedule, the tensors must say it: a loss reads them and nothing else.
        if name in DynamicsAwareSchedule.STATE and "live" in self.__dict__:
            self._tell()

    def _tell(self) -> None:
        self.live.set(self.at(self.position))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(q, bootstrap_weight) at :attr:`position` as 0-d float32 tensors on ``device``.

        They are the same two tensors at each call, changed in place whenever the schedule is: code that was compiled
        or captured with them sees it move. Not to be written to.
        """
        q, bootstrap_weight = self.live.on(device)[1]
        return q, bootstrap_weight

    def at(self, t: float) -> tuple[float, float]:
        """(q, bootstrap_weight) at time ``t`` >= 0, which may be fractional or past the end."""
        t = number("t", t)
        start, end, total = self.q_start, self.q_end, self.total_steps
        if t >= total or start == end:
            return end, 1.0 if end > 1.0 else 0.0
        q = min(end, start + (end - start) * t / total)
        if end <= 1.0:
            return q, 0.0
        crossing = (1.0 - start) * total / (end - start)
        return q, min(1.0, max(0.0, (t - crossing) / (total - crossing)))

    @property
    def q(self) -> float:
        return self.at(self.position)[0]

    @property
    def bootstrap_weight(self) -> float:
        return self.at(self.position)[1]

    def step(self, t: float | None = None) -> tuple[float, float]:
        """Go one step on, or with ``t`` to that position (as ``scheduler.step(epoch)``). Returns :meth:`at` there.

        In compiled code this breaks the graph.
        """
        values: tuple[float, float] = _step(self, t)
        return values

    def state_dict(self) -> dict[str, float]:
        """Settings and position as plain numbers."""
        return {**{name: getattr(self, name) for name in _SETTINGS}, "position": self.position}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Go to the saved position. The settings stay as constructed; a warning names those that were saved otherwise.

        Raises:
            ValueError: an entry is missing or the position is not a finite number >= 0.
        """
        missing = [name for name in DynamicsAwareSchedule.STATE if name not in state_dict]
        if missing:
            raise ValueError(f"state_dict must have the entries of state_dict(), missing: {', '.join(missing)}")
        position = number("position", state_dict["position"])
        # Not exactly: an average of equal settings, as of weights in an exponential moving average, is off by an ulp.
        changed = [name for name in _SETTINGS if not math.isclose(state_dict[name], getattr(self, name), rel_tol=1e-6)]
        if changed:
            listed = ", ".join(f"{name} was {state_dict[name]}, is {getattr(self, name)}" for name in changed)
            warnings.warn(f"schedule resumed with other settings than it was saved with: {listed}", stacklevel=2)
        self.position = position

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(q_start={self.q_start:g}, q_end={self.q_end:g}, total_steps={self.total_steps:g}, "
            f"position={self.position:g}, q={self.q:.6g}, bootstrap_weight={self.bootstrap_weight:.6g})"
        )


# Not compiled, because the position is a number: compiled code would hold it fixed, and be compiled anew at each step.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _step(schedule: DynamicsAwareSchedule, t: float | None) -> tuple[float, float]:
    schedule.position = schedule.position + 1.0 if t is None else number("t", t)
    return schedule.at(schedule.position)
