"""Mistakes with a schedule that a loss can tell from its calls, each said once, in a sentence with its cure.

All of it is counted on the host. No call waits for a device: what is looked at there comes by a copy of its own, and is
read at a later call that finds it arrived. Compiled calls are not counted, nor those that are recorded or transformed,
nor what activation checkpointing computes again.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from dal_kernels.schedule import DynamicsAwareSchedule
from dal_kernels.stall import Arrival, mean_and_most, stall_message
from dal_kernels.surroundings import frames_inside, is_capturing, saves_through_hooks

__all__ = ["ScheduleWarning", "Watch"]

# Steps of a training that may be counted in epochs; more are counted in iterations.
MOST_EPOCHS = 1000
# Calls of a training that are hardly ever all of one epoch.
MOST_CALLS_OF_AN_EPOCH = 10_000


class ScheduleWarning(UserWarning):
    """A schedule is used so that training will not go as meant; the text says what to do instead."""


class Watch:
    """What a loss knows of its training calls, its evaluations and its steps.

    It warns of a schedule that is never stepped, that is stepped far past its end, whose ``total_steps`` are epochs
    while it is stepped once an iteration, and of a training that has stalled as q passes 1, see
    :mod:`dal_kernels.stall`. A constant schedule need not be stepped. A self-paced one cannot stall.

    "Never" is after 10,000 training calls, or ``total_steps`` where those are more than 1000, or after half of
    ``total_steps`` evaluations by the loss itself, from 5 to 10: with more than that in the first epoch the warning is
    a false alarm.

    Attributes:
        calls: training calls: in training mode, with a gradient.
        rounds: how often training went on after an evaluation.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.rounds = 0
        self._evaluated = False
        self._start = 0.0  # the position at the first training call
        self._position: float | None = None  # the last position at which q was looked at
        self._said: set[str] = set()
        self._looked = False
        self._arrival: tuple[Arrival, float, int] | None = (
            None  # statistics on their way here, q and the number of classes
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what is on its way: a copy does not hear of it."""
        return {**self.__dict__, "_arrival": None}

    def evaluated(self) -> None:
        """Count a call in evaluation. One before all training is a trial run."""
        self._evaluated = self.calls > 0

    def trained(self, schedule: Any) -> bool:
        """Count a training call; whether :meth:`look` wants its statistics."""
        position = schedule.position
        if self.calls == 0:
            self._start = position
        self.calls += 1
        if self._evaluated:
            self._evaluated = False
            self.rounds += 1
        if not getattr(schedule, "moved", True):  # a schedule of the user's own may not tell
            self._never_stepped(schedule)
        elif position > schedule.total_steps + 1:
            self._past_the_end(schedule)
        if self._arrival is not None:
            self._judge()
        if self._looked or position == self._position:
            return False
        self._position = position
        return _may_stall(schedule) and schedule.q > 1.0 and not (is_capturing() or saves_through_hooks())

    def stepped(self, schedule: Any) -> None:
        """Look at where a step has led."""
        if schedule.position > schedule.total_steps + 1:
            self._past_the_end(schedule)
        if self._arrival is not None:
            self._judge()

    def look(self, target_prob: Tensor, q: float, classes: int | None) -> None:
        """Look whether the network has learnt anything by the time of this training call, the first with q above 1.

        Args:
            target_prob: p_y of its rows.
            classes: C; None where only some of the classes are known here, and then nothing can be said.
        """
        self._looked = True
        if classes is not None and target_prob.device.type in ("cpu", "cuda"):
            self._arrival = Arrival(mean_and_most(target_prob)), q, classes
            self._judge()

    def _judge(self) -> None:
        if self._arrival is None or is_capturing():
            return
        arrival, q, classes = self._arrival
        numbers = arrival.look()
        if numbers is None:
            return
        self._arrival = None
        mean, most = numbers
        # The mean alone would not do, because a small batch may be low by chance.
        message = stall_message(mean, q, classes) if stall_message(most, q, classes) else None
        if message:
            self._say("stalled", message)

    def _never_stepped(self, schedule: Any) -> None:
        total = schedule.total_steps
        most = total if total >= MOST_EPOCHS else MOST_CALLS_OF_AN_EPOCH
        rounds = min(10.0, max(5.0, total / 2))
        if "never stepped" in self._said or (self.rounds < rounds and self.calls <= most):
            return
        if schedule.at(0.0) == schedule.at(total):
            self._said.add("never stepped")  # there is nothing to step
            return
        self._say(
            "never stepped",
            f"step() was never called on the loss in {self.calls} training calls, so its schedule stays at its first "
            f"values; call it once an epoch, or once an iteration, in the unit of total_steps={total:g} (if the first "
            "epoch is longer than that, all is well)",
        )

    def _past_the_end(self, schedule: Any) -> None:
        if "past the end" in self._said:
            return
        position, total = schedule.position, schedule.total_steps
        gained = position - self._start
        if total <= MOST_EPOCHS and position > 1.1 * total + 1 and gained <= 2 * self.calls <= 4 * gained:
            self._say(
                "past the end",
                f"total_steps={total:g} looks like epochs, but step() was called about once per training call "
                f"({self.calls} of them): give total_steps=epochs * len(loader), or call step() once an epoch",
            )
        elif position > 2 * total + 1:
            self._say(
                "past the end",
                f"the schedule was stepped to {position:g}, past its end at total_steps={total:g} twice over, and no "
                "longer moves; give total_steps in the unit of step(), or begin again with schedule.restart()",
            )

    def _say(self, what: str, message: str) -> None:
        self._said.add(what)
        warnings.warn(message, ScheduleWarning, stacklevel=frames_inside() + 1)


def _may_stall(schedule: Any) -> bool:
    """Whether q passes 1 whatever has been learnt."""
    fixed = isinstance(schedule, DynamicsAwareSchedule) and not hasattr(schedule, "see")
    return fixed and schedule.q_start <= 1.0
