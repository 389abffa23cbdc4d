"""The schedule of DAL that follows what the network has learnt, and never goes above the authors'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dal_kernels import pace
from dal_kernels.arguments import RowStats
from dal_kernels.backends.choose import cuda_runs_on
from dal_kernels.functional import Hearer
from dal_kernels.knobs import refuse_class_weight
from dal_kernels.ops import KERNELS
from dal_kernels.pace import PaceNumbers, pace_numbers, rows_apart
from dal_kernels.schedule import DynamicsAwareSchedule
from dal_kernels.shapes import number
from dal_kernels.surroundings import is_recording
from dal_kernels.tensors import check_choice

__all__ = ["SelfPacedSchedule"]

Pace = Literal["auto", "fixed"]
_CPU = torch.device("cpu")
# A training stays at q_start for this share of its steps, and takes as many to leave it.
OPENING = 0.15
# What the state says of the network, with what stands for it in a state that says nothing: one that has learnt.
_LEARNT = {"confidence": 1.0, "agreement": 0.0, "calls": 0.0}


class SelfPacedSchedule(DynamicsAwareSchedule):
    r"""q and bootstrap_weight as fast as the network learns, and at most those of :class:`DynamicsAwareSchedule`.

    .. math::
        q &= \min\big(q_t,\; q_e \, c \, \mathrm{clamp}(0.2 + 15 (1 - a / c - 0.12\, q),\, 0.2,\, 1)\big) \\
        \lambda &= \lambda_{max} \, \mathrm{clamp}\Big(\frac{q - 1}{q_e - 1},\, 0,\, 1\Big)

    with :math:`q_t` the exponent of :class:`DynamicsAwareSchedule` at the time, c the mean of the largest probability
    and a the share of the rows whose prediction is their label, both averaged over some twenty training calls; see
    :mod:`dal_kernels.pace`. For the first 15 % of ``total_steps``, if that is more than three steps, q is at least
    q_start, or what comes to the same with more than ten classes, and falls to the formula's in the next. It is at
    least so much, too, where the network is unsure (c below 0.6) and hardly more often right than sure, after some
    hundreds of calls: then most labels are wrong, and a smaller q would let it learn them by heart. Where the network
    learns within a small part of ``total_steps``, and some labels are wrong, this comes to the authors' schedule; where
    they seem right, q stays small: close to cross-entropy.

    The averages lie beside the logits and are changed there by :meth:`see`; the host reads them only where it is asked
    to: :attr:`q`, :attr:`bootstrap_weight`, :attr:`noise_rate`, :meth:`state_dict` and ``repr`` wait for the device.

    Args:
        q_start, q_end, total_steps, warmup_steps, shape, max_bootstrap_weight: as of :class:`DynamicsAwareSchedule`.
            With few steps, or many classes, q_start 0.6 and q_end 1.5 do.

    Attributes:
        position: steps taken so far.
        q, bootstrap_weight: the values now, floats. :meth:`at` gives those of :class:`DynamicsAwareSchedule`.
        noise_rate: 1 - a / c, an estimate of the share of wrong labels, a float from 0 to 1.

    Raises:
        TypeError, ValueError: as :class:`DynamicsAwareSchedule`.
    """

    live: LivePace  # type: ignore[assignment]
    STATE = (*DynamicsAwareSchedule.STATE, *_LEARNT)
    # Before there were shapes, and before calls were counted.
    EARLIER_STATES = tuple(
        (*names, "confidence", "agreement")
        for names in (*DynamicsAwareSchedule.EARLIER_STATES, DynamicsAwareSchedule.STATE)
    )

    def _new_live(self) -> LivePace:  # type: ignore[override]
        return LivePace()

    def _tell(self) -> None:
        # Where three more steps end, because a training of few steps must not spend a whole one on opening. A clock of
        # total_steps = 2 or less is not counted in whole steps.
        ahead = (self.position + (3.0 if self.total_steps > 2 else 0.0)) / self.total_steps
        opening = min(1.0, max(0.0, 2.0 - ahead / OPENING))
        self.live.set(self.q_end, (self.at(self.position)[0], self.q_start, opening), self.max_bootstrap_weight)

    @property
    def q(self) -> float:
        return self.live.numbers().q.item()

    @property
    def bootstrap_weight(self) -> float:
        return self.live.numbers().bootstrap_weight.item()

    @property
    def noise_rate(self) -> float:
        confidence, agreement = self.live.numbers().averages.tolist()
        return max(0.0, 1.0 - agreement / confidence)

    def see(self, stats: RowStats, target: Tensor) -> None:
        """Follow the rows of one training call, on their device: once a call, whatever its size.

        With gradient accumulation each part is a call. In a distributed training each rank follows its own rows; where
        q must be the same on all, call :meth:`synchronize` on all of them, as after an epoch.

        Args:
            stats: of the call.
            target: as it was given to the loss.
        """
        self.live.see(stats, target)

    def hearer(self, input: Tensor) -> Hearer | None:
        """What lets a call of the loss do the same on its way: see :func:`dal_kernels.functional.loss_of`."""
        overridden = type(self).see is not SelfPacedSchedule.see or "see" in vars(self)
        return None if overridden else self.live.hearer(input)

    def synchronize(self, group: Any = None) -> None:
        """Average what the ranks of a ``torch.distributed`` group have learnt. All of them must call it.

        It does nothing in a process on its own.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        numbers = self.live.numbers()
        world = torch.distributed.get_world_size(group)
        torch.distributed.all_reduce(numbers.learnt, group=group)
        numbers.learnt.div_(world)
        self.live.keep()

    def state_dict(self) -> dict[str, float]:
        """Settings, position, and what has been learnt."""
        return {**super().state_dict(), **dict(zip(_LEARNT, self.live.numbers().learnt.tolist(), strict=True))}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Go to the saved position, and to what had been learnt there.

        A state without that, of a fixed schedule, is taken for one of a network that has learnt: q goes on from the
        authors', and within some twenty calls to where it belongs.

        Raises:
            ValueError: as of :class:`DynamicsAwareSchedule`.
        """
        learnt = [number(name, state_dict.get(name, other)) for name, other in _LEARNT.items()]
        super().load_state_dict(state_dict)
        self.live.numbers().learnt.copy_(torch.tensor(learnt, device="cpu"))
        self._tell()


def _backend_for(numbers: Tensor) -> str | None:
    """Whose kernels change numbers on that device, by one launch; None where plain operations must.

    CUDA C++ before Triton, because the host starts its kernels sooner.
    """
    names = ("cpu",) if numbers.is_cpu else ("cuda", "triton") if numbers.is_cuda else ()
    for name in names:
        if name in KERNELS and (name != "cuda" or cuda_runs_on(numbers.device)):
            return name
    return None


class LivePace:
    """The numbers of a pace on the device where training is; a tensor for each device that it has been on."""

    def __init__(self) -> None:
        # Two tuples, because compiled code holds fixed what it reads of one, and the bounds change with each step.
        self._limits, self._bounds = (0.0, 1.0), (0.0, 0.0, 0.0)
        self._numbers = {_CPU: pace_numbers(_CPU)}
        self._device = _CPU

    def __getstate__(self) -> dict[str, Any]:
        """Without tensors of other devices and without views: a copy has its own."""
        return {"limits": self._limits, "bounds": self._bounds, "learnt": self.numbers().learnt.tolist()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.numbers().learnt.copy_(torch.tensor(state["learnt"], device="cpu"))
        self._limits, self._bounds = state["limits"], state["bounds"]
        self.keep()

    def set(self, q_end: float, bounds: tuple[float, float, float], max_weight: float) -> None:
        """Where q ends, bound, q_start and opening of :class:`PaceNumbers`, and the largest weight."""
        self._limits, self._bounds = (q_end, max_weight), bounds
        self.keep()

    def keep(self) -> None:
        """q and the bootstrap weight for what has been learnt, and for those settings."""
        numbers = self.numbers()
        if (backend := _backend_for(numbers.all)) is not None:
            KERNELS[backend].keep_pace(numbers.all, *self._bounds, *self._limits)
            return
        for value, bound in zip((numbers.bound, numbers.q_start, numbers.opening), self._bounds, strict=True):
            value.fill_(bound)
        pace.keep_pace(numbers, *self._limits)

    def see(self, stats: RowStats, target: Tensor) -> None:
        """Take the rows of one training call into account, where they are."""
        numbers = self.numbers(stats.max_prob.device)
        backend = _backend_for(numbers.all)
        # Probabilities for each class are compared by plain operations, and a DTensor's rows added over its ranks.
        if backend is None or target.shape != stats.prediction.shape or type(stats.max_prob) is not Tensor:
            pace.see(numbers, stats, target, *self._limits)
            return
        rows = (stats.max_prob, stats.target_prob, stats.prediction, target.to(torch.int64))
        every = rows_apart(stats.max_prob.numel())
        KERNELS[backend].see(numbers.all, *(values.contiguous() for values in rows), every, *self._limits)

    def hearer(self, input: Tensor) -> Hearer | None:
        """By which a call with these logits (N, C) may :meth:`see` by itself; None where it must be told."""
        if input.dim() != 2:
            return None
        return self.numbers(input.device).all, rows_apart(input.shape[0]), *self._limits

    def numbers(self, device: torch.device | None = None) -> PaceNumbers:
        """On ``device``, to which what has been learnt goes along; by default where it is."""
        if device is None or device == self._device:
            return self._numbers[self._device]
        now = self._numbers[self._device]
        if torch.compiler.is_compiling() or device.type == "meta" or is_recording(now.all):
            return PaceNumbers.of(now.all.to(device))
        if device not in self._numbers:
            self._numbers[device] = pace_numbers(device)
        self._numbers[device].all.copy_(now.all)
        self._device = device
        return self._numbers[device]

    def on(self, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(q, bootstrap_weight) as a (2,) tensor on ``device``, and as 0-d tensors. Not to be written to."""
        numbers = self.numbers(device)
        return numbers.knobs, (numbers.q, numbers.bootstrap_weight)


def schedule_of(
    schedule: DynamicsAwareSchedule | None,
    q_start: float | None,
    q_end: float | None,
    total_steps: float | None,
    pace: Pace | None,
) -> DynamicsAwareSchedule:
    """The schedule that a module is given, whole or as its settings.

    Raises:
        TypeError, ValueError: there is neither, there are both, or one of them is none.
    """
    refuse_class_weight("q_start", q_start)
    settings = {"q_start": q_start, "q_end": q_end, "total_steps": total_steps, "pace": pace}
    if schedule is not None:
        if not isinstance(schedule, DynamicsAwareSchedule):
            raise TypeError(
                f"schedule must be a DynamicsAwareSchedule or a SelfPacedSchedule, got {type(schedule).__name__}"
            )
        given = [name for name, value in settings.items() if value is not None]
        if given:
            raise TypeError(f"schedule must be given without {', '.join(given)}: it has its own; got both")
        return schedule
    if total_steps is None:
        raise TypeError("total_steps, or a schedule, must be given, got neither")
    pace = "auto" if pace is None else pace
    check_choice("pace", pace, get_args(Pace))
    kind = SelfPacedSchedule if pace == "auto" else DynamicsAwareSchedule
    return kind(0.6 if q_start is None else q_start, 1.5 if q_end is None else q_end, total_steps)
