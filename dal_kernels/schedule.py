"""The schedule of DAL: the exponent q grows, and the bootstrap weight fades in once q has passed 1.

Arithmetic on Python floats, and tensors that follow it. Source: arXiv 2303.11562 and its authors' training script, in
which one step is an epoch. Any monotone clock works: epochs, iterations, or a fraction of either.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dal_kernels.live import LiveNumbers
from dal_kernels.shapes import check_warmup, number, share_of_way
from dal_kernels.surroundings import outside_of_graphs
from dal_kernels.tensors import check_choice

__all__ = ["DynamicsAwareSchedule"]

Shape = Literal["linear", "cosine"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

# Settings that the earliest states did not have, and what they were then; a shape is its place among SHAPES.
_LATER = {"warmup_steps": 0.0, "shape": 0.0, "max_bootstrap_weight": 1.0}
_SETTINGS = ("q_start", "q_end", "total_steps", *_LATER)


class DynamicsAwareSchedule:
    r"""q(t) and bootstrap_weight(t) in closed form, with a position to step.

    .. math::
        q(t) = q_s + (q_e - q_s) \, w(s), \qquad
        \lambda(t) = \lambda_{max} \, \mathrm{clamp}\Big(\frac{q(t) - 1}{q_e - 1},\, 0,\, 1\Big), \qquad
        s = \mathrm{clamp}\Big(\frac{t - W}{T - W},\, 0,\, 1\Big)

    with T the total and W the warm-up steps, and :math:`w(s) = s` or :math:`(1 - \cos \pi s) / 2`. So q stays at
    ``q_start`` during the warm-up and at ``q_end`` past the end. The authors' schedule is the linear one without
    warm-up, with a largest weight of 1. ``q_end <= 1`` never bootstraps: the weight stays 0. With ``q_start == q_end``
    q is constant, and the weight is the largest if it is above 1, else 0.

    Args:
        q_start: exponent at the first step, >= 0. Small values fit faster; with many classes take 0.2 to 0.4.
        q_end: exponent at the last, >= q_start. Above 1 easy samples are stressed and noisy ones let go.
        total_steps: length T of training, > 0, in the unit that :meth:`step` counts.
        warmup_steps: steps at q_start before q begins to grow, at least 0 and below ``total_steps``.
        shape: "linear", or "cosine", which starts and ends slowly.
        max_bootstrap_weight: the bootstrap weight at the end, >= 0; 0 never bootstraps.

    Attributes:
        position: steps taken so far, a float; 0 at the start, so that the first epoch trains with ``q_start``.
        q, bootstrap_weight: the values at ``position``, floats. :meth:`on` gives them as tensors that follow.
        live: those values for a loss to read.
        moved: whether a step, a restart, a state or an assignment has ever set the position.

    Raises:
        TypeError: a setting is not a number.
        ValueError: a setting is negative or not finite, ``total_steps`` is 0, ``q_start > q_end``, ``warmup_steps`` is
            not below ``total_steps``, or there is no such shape.
    """

    # Names of the entries of the state dict, in order.
    STATE: tuple[str, ...] = (*_SETTINGS, "position")
    # Of those that were saved before schedules had shapes.
    EARLIER_STATES: tuple[tuple[str, ...], ...] = (tuple(name for name in STATE if name not in _LATER),)

    def __init__(
        self,
        q_start: float,
        q_end: float,
        total_steps: float,
        *,
        warmup_steps: float = 0.0,
        shape: Shape = "linear",
        max_bootstrap_weight: float = 1.0,
    ) -> None:
        self.q_start = q_start
        self.q_end = q_end
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.shape: Shape = shape
        self.max_bootstrap_weight = max_bootstrap_weight
        if self.q_start > self.q_end:
            raise ValueError(f"q_start must not be above q_end, got {self.q_start} and {self.q_end}")
        check_warmup(self.warmup_steps, self.total_steps)
        self.position = 0.0
        self.moved = False
        self.live = self._new_live()
        self._tell()

    def __setattr__(self, name: str, value: Any) -> None:
        is_state = name in DynamicsAwareSchedule.STATE
        if name == "shape":
            check_choice(name, value, SHAPES)
        elif is_state:
            value = number(name, value)
        super().__setattr__(name, value)
        # Whatever moves or changes the schedule, the tensors must say it: a loss reads them and nothing else.
        if is_state and "live" in self.__dict__:
            self._tell()
            if name == "position":
                self.moved = True

    def _new_live(self) -> LiveNumbers:
        return LiveNumbers(self.at(0.0))

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
        way = share_of_way(number("t", t), self.warmup_steps, self.total_steps, self.shape)
        start, end = self.q_start, self.q_end
        q = end if way == 1.0 else min(end, start + (end - start) * way)
        faded_in = min(1.0, max(0.0, (q - 1.0) / (end - 1.0))) if end > 1.0 else 0.0
        return q, self.max_bootstrap_weight * faded_in

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

    def restart(self, total_steps: float | None = None) -> None:
        """Begin again at position 0, with a length of ``total_steps`` if given, as for a second round of training.

        A self-paced schedule keeps what the network has learnt, because the network keeps it too: its confidence and
        agreement describe the same weights after the restart. A new network takes a new schedule.

        Raises:
            TypeError, ValueError: ``total_steps`` is not a finite number > 0 and above ``warmup_steps``.
        """
        if total_steps is not None:
            check_warmup(self.warmup_steps, number("total_steps", total_steps))
            self.total_steps = total_steps
        self.position = 0.0

    def synchronize(self, group: Any = None) -> None:
        """Nothing: the ranks of a distributed training that step alike have the same numbers, but where they pace
        themselves (:class:`SelfPacedSchedule`).
        """

    def state_dict(self) -> dict[str, float]:
        """Settings and position as plain numbers, the shape as its place among "linear" and "cosine"."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {**settings, "shape": float(SHAPES.index(self.shape)), "position": self.position}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Go to the saved position. The settings stay as constructed; a warning names those that were saved otherwise.

        Raises:
            ValueError: an entry is missing or the position is not a finite number >= 0.
        """
        saved, now = {**_LATER, **state_dict}, self.state_dict()
        missing = [name for name in DynamicsAwareSchedule.STATE if name not in saved]
        if missing:
            raise ValueError(f"state_dict must have the entries of state_dict(), missing: {', '.join(missing)}")
        position = number("position", saved["position"])
        # Not exactly: an average of equal settings, as of weights in an exponential moving average, is off by an ulp.
        changed = [name for name in _SETTINGS if not math.isclose(saved[name], now[name], rel_tol=1e-6)]
        if changed:
            listed = ", ".join(
                f"{name} was {_shown(name, saved[name])}, is {_shown(name, now[name])}" for name in changed
            )
            warnings.warn(f"schedule resumed with other settings than it was saved with: {listed}", stacklevel=2)
        self.position = position

    def __repr__(self) -> str:
        now = self.state_dict()
        later = "".join(f"{name}={_shown(name, now[name])}, " for name, plain in _LATER.items() if now[name] != plain)
        return (
            f"{type(self).__name__}(q_start={self.q_start:g}, q_end={self.q_end:g}, total_steps={self.total_steps:g}, "
            f"{later}position={self.position:g}, q={self.q:.6g}, bootstrap_weight={self.bootstrap_weight:.6g})"
        )


def _shown(name: str, value: float) -> str:
    """A setting as its argument is written."""
    shapes: dict[float, str] = {place: repr(shape) for place, shape in enumerate(SHAPES)} if name == "shape" else {}
    return shapes.get(value, f"{value:.12g}")


# Not compiled, because the position is a number: compiled code would hold it fixed, and be compiled anew at each step.
@outside_of_graphs
def _step(schedule: DynamicsAwareSchedule, t: float | None) -> tuple[float, float]:
    schedule.position = schedule.position + 1.0 if t is None else number("t", t)
    return schedule.at(schedule.position)
