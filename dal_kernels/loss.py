"""The loss as a module: a schedule and the function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from dal_kernels.arguments import (
    BACKENDS,
    BOOTSTRAPS,
    Backend,
    Bootstrap,
    RowStats,
    check_class_weight,
    check_options,
)
from dal_kernels.fields import Reduction
from dal_kernels.listening import ListeningLoss
from dal_kernels.live import packed, unpacked
from dal_kernels.losses.options import PlainOptions
from dal_kernels.mixtures import Mix
from dal_kernels.objectives import dynamics_aware_of
from dal_kernels.schedule import DynamicsAwareSchedule
from dal_kernels.self_paced import Pace, SelfPacedSchedule, schedule_of
from dal_kernels.tensors import check_choice, classes_of
from dal_kernels.variations import fading_shift, keep_variations, varied_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DynamicsAwareLoss"]

TargetShift = float | Tensor | Literal["fading"] | None

# What a state may hold, as it is saved and as it once was. Its length says which.
_STATES = tuple(
    names for kind in (DynamicsAwareSchedule, SelfPacedSchedule) for names in (kind.STATE, *kind.EARLIER_STATES)
)


class DynamicsAwareOptions(PlainOptions, total=False):
    """What the module takes beside its schedule, for its overloads; :class:`DynamicsAwareLoss` says what it means."""

    bootstrap: Bootstrap
    target_shift: TargetShift
    scale: float | Tensor | None
    watch: bool


class DynamicsAwareLoss(ListeningLoss):
    """Dynamics-Aware Loss with its schedule: a drop-in for :class:`torch.nn.CrossEntropyLoss`.

    Call :meth:`step` once an epoch (as the paper does) or once an iteration, with ``total_steps`` in the same unit.
    See :func:`dal_kernels.dynamics_aware_loss` for the formula and for what ``forward`` takes. With the pace "auto" q
    follows what the network has learnt and is at most the authors', see :class:`dal_kernels.SelfPacedSchedule`; each
    call in training mode that makes a gradient counts, under gradient accumulation each part of a batch. With "fixed" q
    is the authors' whatever happens, see :class:`dal_kernels.DynamicsAwareSchedule`. A schedule with a warm-up, another
    shape or another largest bootstrap weight is made first and given as ``schedule``.

    The state dict has the class weights, as that of :class:`torch.nn.CrossEntropyLoss`, and under ``_extra_state`` the
    schedule's settings and position, and what the network has learnt, as a small tensor. A state dict without it, of a
    model that was trained with cross-entropy, is loaded too, strictly as well: the schedule stays where it is. The
    other way round a model without this loss takes such a state dict with ``strict=False``, or without that entry.

    Args:
        q_start, q_end: the first exponent and the last, by default 0.6 and 1.5.
        total_steps: the length of training.
        pace: "auto", the default, or "fixed".
        schedule: in the place of those four.
        weight, ignore_index, reduction, bootstrap, scale, backend: as in :func:`dal_kernels.dynamics_aware_loss`.
        target_shift: as there, or "fading": by the number of classes, less as q grows, and none from q = 1 on; for the
            pace "fixed" with more than ten classes. The pace "auto" needs none. It costs a copy of the logits.
        watch: whether to warn, once each, of a schedule that is never stepped, or in another unit than total_steps, and
            of a training that has stalled as q passes 1. Costs no synchronisation; compiled calls are not watched.

    Attributes:
        schedule: where the schedule stands. Whatever moves it moves the loss.
        q, bootstrap_weight: its values as 0-d float32 tensors, on the device of the last input. They are changed in
            place, so that compiled or captured code sees them change; no cast of the module rounds them.

    Warns:
        ScheduleWarning: what ``watch`` has seen.

    Raises:
        TypeError: a setting of the schedule or an option is of the wrong type, or there is a schedule beside settings
            of one, or neither a schedule nor total_steps.
        ValueError: a setting or an option is of the wrong value.
    """

    weight: Tensor | None
    target_shift: TargetShift
    scale: float | Tensor | None

    @overload
    def __init__(
        self,
        q_start: float = ...,
        q_end: float = ...,
        *,
        total_steps: float,
        pace: Pace = ...,
        **options: Unpack[DynamicsAwareOptions],
    ) -> None: ...
    @overload
    def __init__(self, *, schedule: DynamicsAwareSchedule, **options: Unpack[DynamicsAwareOptions]) -> None: ...
    def __init__(
        self,
        q_start: float | None = None,
        q_end: float | None = None,
        *,
        total_steps: float | None = None,
        pace: Pace | None = None,
        schedule: DynamicsAwareSchedule | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        bootstrap: Bootstrap = "soft",
        target_shift: TargetShift = None,
        scale: float | Tensor | None = None,
        backend: Backend = "auto",
        watch: bool = True,
    ) -> None:
        super().__init__()
        self.schedule: DynamicsAwareSchedule = schedule_of(schedule, q_start, q_end, total_steps, pace)
        self.keep_watch(watch)
        self.ignore_index = check_options(ignore_index, reduction)
        check_choice("bootstrap", bootstrap, BOOTSTRAPS)
        check_choice("backend", backend, BACKENDS)
        if weight is not None:
            check_class_weight(weight, None)
        self.register_buffer("weight", weight)
        if isinstance(target_shift, str):
            if target_shift != "fading":
                raise ValueError(f"target_shift must be a number, a tensor or 'fading', got {target_shift!r}")
            if isinstance(self.schedule, SelfPacedSchedule) or self.schedule.q_start >= 1:
                raise ValueError(
                    "target_shift 'fading' takes a schedule of the pace 'fixed' whose q_start is below 1, got "
                    f"{self.schedule!r}: the pace 'auto' starts with a q that suits the number of classes"
                )
        keep_variations(self, target_shift=target_shift, scale=scale)
        self.reduction: Reduction = reduction
        self.bootstrap: Bootstrap = bootstrap
        self.backend: Backend = backend
        self._device = torch.device("cpu")

    @property
    def q(self) -> Tensor:
        return self.schedule.on(self._device)[0]

    @property
    def bootstrap_weight(self) -> Tensor:
        return self.schedule.on(self._device)[1]

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        return_stats: bool = False,
        sample_weight: Tensor | None = None,
        reduction: Reduction | None = None,
        mix: Mix | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of ``input`` (logits) against ``target`` (class indices) at the schedule's position.

        Args:
            input, target, return_stats, sample_weight, mix: as in :func:`dal_kernels.dynamics_aware_loss`.
            reduction: in the place of the module's, for this call.

        Returns, Raises:
            As :func:`dal_kernels.dynamics_aware_loss`.
        """
        knobs = self._knobs_for(input)
        learns = self.learns(input)
        shift = self._shift_for(classes_of(input)) if self.target_shift is not None else None
        result: Tensor | tuple[Tensor, RowStats] = varied_loss(
            dynamics_aware_of(self.bootstrap), knobs, input, target, weight=self._weight(),
            ignore_index=self.ignore_index, reduction=self.reduction if reduction is None else reduction,
            return_stats=return_stats or learns, sample_weight=sample_weight, mix=mix, target_shift=shift,
            scale=self.scale, backend=self.backend, hearer=self.hearer(learns, return_stats, input),
        )  # fmt: skip
        if not learns or isinstance(result, Tensor):  # alone, because the call has told the schedule by itself
            return result
        return self.told(result, target, return_stats, classes_of(input))

    def for_form(self, input: Tensor, classes: int) -> tuple[int, Tensor, dict[str, Any]]:
        """What the forms of a loss (linear, class-parallel) take: its id in the table, its knobs and its options."""
        knobs = self._knobs_for(input)
        options = {**self._options(), "target_shift": self._shift_for(classes), "scale": self.scale}
        return dynamics_aware_of(self.bootstrap).id, knobs, options

    def get_extra_state(self) -> Tensor:
        return packed(self.schedule.state_dict().values())

    def set_extra_state(self, state: Tensor | Mapping[str, float]) -> None:
        """Take a schedule's state as :meth:`get_extra_state` gives it, or as it once did: shorter, or as a dict."""
        if isinstance(state, Tensor):
            names = next((names for names in _STATES if state.shape == (len(names), 2)), None)
            if names is None:
                shapes = " or ".join(f"({len(names)}, 2), of {', '.join(names)}" for names in sorted(_STATES, key=len))
                raise ValueError(f"_extra_state must be a tensor of shape {shapes}, got shape {tuple(state.shape)}")
            state = dict(zip(names, unpacked(state), strict=True))
        self.schedule.load_state_dict(state)

    def extra_repr(self) -> str:
        shown = f"schedule={self.schedule!r}, reduction={self.reduction!r}, bootstrap={self.bootstrap!r}"
        if self.weight is not None:
            shown += f", weight=({len(self.weight)},)"
        if self.ignore_index != -100:
            shown += f", ignore_index={self.ignore_index}"
        return shown + (f", backend={self.backend!r}" if self.backend != "auto" else "")

    def _weight(self) -> Tensor | None:
        """The class weights beside the input."""
        weight = self._buffers["weight"]  # sooner found than self.weight
        return weight.to(self._device) if weight is not None and self._device.type == "meta" else weight

    def _shift_for(self, classes: int) -> float | Tensor | None:
        """The target shift at the schedule's position."""
        shift = self.target_shift
        return fading_shift(classes, self.q, self.schedule.q_start) if isinstance(shift, str) else shift

    def _options(self) -> dict[str, Any]:
        """What every form of the loss takes by the same names."""
        return {
            "weight": self._weight(),
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "backend": self.backend,
        }

    def _knobs_for(self, input: Tensor) -> Tensor:
        """(q, bootstrap_weight) beside the input, to whose device the class weights go too."""
        if isinstance(input, Tensor) and input.device != self._device:
            self._device = input.device
            # Not to the meta device, from which no value comes back.
            if self.weight is not None and self._device.type != "meta":
                # Outside of inference mode, in which they would be made unfit for training.
                with torch.inference_mode(False):
                    self.weight = self.weight.to(self._device)
        return self.schedule.live.on(self._device)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # Where this module goes, so do the values: before code is compiled or captured there.
        self._device = fn(torch.empty(0)).device
        self.schedule.on(self._device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        _, _, missing_keys, *_ = arguments
        schedule = prefix + "_extra_state"
        if schedule in missing_keys:
            missing_keys.remove(schedule)
