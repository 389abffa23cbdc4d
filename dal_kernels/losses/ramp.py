"""Schedules for the knobs of any loss: what a schedule must be, and one that goes from one value to another."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Protocol, get_args

from dal_kernels.shapes import Shape, check_warmup, number, share_of_way
from dal_kernels.surroundings import outside_of_graphs
from dal_kernels.tensors import check_choice


class Schedule(Protocol):
    """What a loss asks of a schedule.

    Attributes:
        names: the knobs that it moves.
        position: steps taken so far.
        total_steps: where it ends.
        followers: the losses that are told, by ``follow(values)``, whenever the position changes.

    One that paces itself may also have ``see(stats, target)``, and hears then of each training call: its
    :class:`dal_kernels.RowStats` and its target. GCE whose q paces itself needs none of its own: it is
    :class:`dal_kernels.DynamicsAwareLoss` with a q_end of at most 1.
    """

    names: tuple[str, ...]
    position: float
    total_steps: float
    followers: list[Any]

    def at(self, t: float) -> dict[str, float]: ...
    def step(self, t: float | None = None) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, float]: ...
    def load_state_dict(self, state_dict: Mapping[str, float]) -> None: ...


class Ramp:
    """Knobs that go from one value to another during training.

    >>> from dal_kernels import GeneralizedCrossEntropyLoss, Ramp
    >>> criterion = GeneralizedCrossEntropyLoss(schedule=Ramp(100, q=(0.2, 0.9)))
    >>> criterion.step()  # once an epoch, if 100 are epochs

    Args:
        total_steps: length of training, > 0, in the unit that :meth:`step` counts: epochs, iterations, or a fraction.
        shape: "linear"; "cosine", which starts and ends slowly; or "step", which jumps to the end halfway.
        warmup_steps: steps at the first value before the way begins, at least 0 and below ``total_steps``.
        knobs: (first, last) of each knob by its name.

    Attributes:
        position: steps taken so far, a float; changing it moves the losses too.
        moved: whether it has ever been set.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self, total_steps: float, *, shape: Shape = "linear", warmup_steps: float = 0.0, **knobs: tuple[float, float]
    ) -> None:
        check_choice("shape", shape, get_args(Shape))
        if not knobs:
            raise ValueError("knobs must be given, as q=(0.2, 0.9), got none")
        self.total_steps = number("total_steps", total_steps)
        self.warmup_steps = number("warmup_steps", warmup_steps)
        check_warmup(self.warmup_steps, self.total_steps)
        self.shape: Shape = shape
        self.ends: dict[str, tuple[float, float]] = {}
        for name, ends in knobs.items():
            if not isinstance(ends, tuple) or len(ends) != 2:
                raise TypeError(f"{name} must be a pair (first, last), got {ends!r}")
            self.ends[name] = (number(name, ends[0]), number(name, ends[1]))
        self.names = tuple(self.ends)
        self.followers: list[Any] = []
        self._position = 0.0
        self.moved = False

    @property
    def position(self) -> float:
        return self._position

    @position.setter
    def position(self, value: float) -> None:
        self._position = number("position", value)
        self.moved = True
        values = self.at(self._position)
        for follower in self.followers:
            follower.follow(values)

    def at(self, t: float) -> dict[str, float]:
        """The knobs at time ``t`` >= 0, which may be fractional or past the end."""
        way = share_of_way(number("t", t), self.warmup_steps, self.total_steps, self.shape)
        return {name: first + (last - first) * way for name, (first, last) in self.ends.items()}

    def step(self, t: float | None = None) -> dict[str, float]:
        """Go one step on, or with ``t`` to that position. Returns :meth:`at` there. In compiled code a graph break."""
        values: dict[str, float] = _step(self, t)
        return values

    def state_dict(self) -> dict[str, float]:
        """Position and length as plain numbers."""
        return {"total_steps": self.total_steps, "position": self.position}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Go to the saved position. The settings stay as constructed; a warning says where the length was another.

        Raises:
            ValueError: an entry is missing, or the position is not a finite number >= 0.
        """
        missing = [name for name in self.state_dict() if name not in state_dict]
        if missing:
            raise ValueError(f"state_dict must have the entries of state_dict(), missing: {', '.join(missing)}")
        if not math.isclose(state_dict["total_steps"], self.total_steps, rel_tol=1e-6):
            warnings.warn(
                f"schedule resumed with another length than it was saved with: total_steps was "
                f"{state_dict['total_steps']}, is {self.total_steps}",
                stacklevel=2,
            )
        self.position = state_dict["position"]

    def __repr__(self) -> str:
        ends = ", ".join(f"{name}={ends}" for name, ends in self.ends.items())
        return f"{type(self).__name__}({self.total_steps:g}, shape={self.shape!r}, {ends}, position={self.position:g})"


# Not compiled, because the position is a number: compiled code would hold it fixed, and be compiled anew at each step.
@outside_of_graphs
def _step(ramp: Ramp, t: float | None) -> dict[str, float]:
    ramp.position = ramp.position + 1.0 if t is None else t
    return ramp.at(ramp.position)
