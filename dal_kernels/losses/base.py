"""The module that all losses of the family are: knobs, options, and a schedule of the knobs if one is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dal_kernels.arguments import BACKENDS, Backend, RowStats, check_class_weight, check_options
from dal_kernels.fields import Reduction
from dal_kernels.knobs import check_numbers, refuse_class_weight
from dal_kernels.listening import ListeningLoss
from dal_kernels.live import LiveNumbers, packed, unpacked
from dal_kernels.losses.ramp import Schedule
from dal_kernels.mixtures import Mix
from dal_kernels.objective import Objective
from dal_kernels.tensors import check_choice, classes_of
from dal_kernels.variations import keep_variations, varied_loss

# What a public loss comes to: a loss of the table and its knobs.
Bound = tuple[Objective, tuple[Any, ...]]


class RobustLoss(ListeningLoss):
    """A loss of the family: a drop-in for :class:`torch.nn.CrossEntropyLoss`.

    Subclasses say in :meth:`bind` which loss of the table they are. The state dict has the class weights, and the
    position of the schedule under ``_schedule`` where there is one; a state dict without that entry is loaded too.

    Args:
        knobs: the numbers of the loss by their public names.
        schedule: moves some of them during training, see :class:`dal_kernels.Ramp`; :meth:`step` moves it. One that has
            ``see(stats, target)`` is told the statistics of each training call.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.

    Attributes:
        schedule: as given, or None.

    Raises:
        TypeError, ValueError: a knob or an option is of the wrong type or value.
    """

    weight: Tensor | None
    target_shift: float | Tensor | None
    scale: float | Tensor | None

    def __init__(
        self,
        knobs: Mapping[str, float],
        *,
        schedule: Schedule | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        target_shift: float | Tensor | None = None,
        scale: float | Tensor | None = None,
        backend: Backend = "auto",
        watch: bool = True,
    ) -> None:
        super().__init__()
        self.ignore_index = check_options(ignore_index, reduction)
        check_choice("backend", backend, BACKENDS)
        if weight is not None:
            check_class_weight(weight, None)
        for name, value in knobs.items():
            refuse_class_weight(name, value)
        self.register_buffer("weight", weight)
        keep_variations(self, target_shift=target_shift, scale=scale)
        self.reduction: Reduction = reduction
        self.label_smoothing = label_smoothing
        self.backend: Backend = backend
        self.knobs = dict(knobs)
        self.schedule = schedule
        self.keep_watch(watch)
        if schedule is not None:
            unknown = [name for name in schedule.names if name not in self.knobs]
            if unknown:
                raise ValueError(
                    f"schedule must be of knobs of this loss ({', '.join(self.knobs) or 'it has none'}), "
                    f"got {', '.join(unknown)}"
                )
            self.knobs.update(schedule.at(schedule.position))
        objective, numbers = self.bind(**self.knobs)
        check_numbers(objective, numbers)
        self._objective = objective
        self._live = LiveNumbers(numbers)
        self._device = torch.device("cpu")
        if schedule is not None:
            for values in (schedule.at(t) for t in (0.0, schedule.total_steps)):
                check_numbers(objective, self.bind(**{**self.knobs, **values})[1])
            schedule.followers.append(self)

    def bind(self, *args: Any, **knobs: Any) -> Bound:
        """The loss of the table and its knobs, from the public ones by name."""
        raise NotImplementedError

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
        """The loss of ``input`` (logits) against ``target`` (class indices, or probabilities shaped like the logits).

        Args:
            reduction: in the place of the module's, for this call.
            return_stats, sample_weight, mix: see :class:`dal_kernels.losses.options.LossOptions`.
        """
        learns = self.learns(input)
        result: Tensor | tuple[Tensor, RowStats] = varied_loss(
            self._objective, self._knobs_for(input), input, target, return_stats=return_stats or learns,
            sample_weight=sample_weight, mix=mix, **self._options(reduction),
        )  # fmt: skip
        return self.told(result, target, return_stats, classes_of(input)) if learns else result

    def for_form(self, input: Tensor, classes: int) -> tuple[int, tuple[float, ...] | Tensor, dict[str, Any]]:
        """What the forms of a loss (linear, class-parallel) take: its id in the table, its knobs and its options.

        Args:
            input: of the form.
            classes: C.

        Raises:
            ValueError: an option that no form has.
        """
        return self._objective.id, self._knobs_for(input), self._options(None)

    def follow(self, values: Mapping[str, float]) -> None:
        """Take these values of the knobs: the schedule says so."""
        self.knobs.update(values)
        self._live.set(self.bind(**self.knobs)[1])

    def extra_repr(self) -> str:
        shown = [f"{name}={value:g}" for name, value in self.knobs.items()]
        shown.append(f"reduction={self.reduction!r}")
        if self.schedule is not None:
            shown.append(f"schedule={self.schedule!r}")
        if self.weight is not None:
            shown.append(f"weight=({len(self.weight)},)")
        plain = {"ignore_index": -100, "label_smoothing": 0.0, "target_shift": None, "scale": None, "backend": "auto"}
        for name, default in plain.items():
            value = getattr(self, name)
            if isinstance(value, Tensor) or value != default:
                shown.append(f"{name}={tuple(value.shape) if isinstance(value, Tensor) else repr(value)}")
        return ", ".join(shown)

    def _options(self, reduction: Reduction | None) -> Any:
        """What every form of the loss takes by the same names."""
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction if reduction is None else reduction,
            "label_smoothing": self.label_smoothing,
            "target_shift": self.target_shift,
            "scale": self.scale,
            "backend": self.backend,
        }

    def _knobs_for(self, input: Tensor) -> tuple[float, ...] | Tensor:
        """The knobs, as a tensor beside the input where a schedule moves them; the class weights go there too."""
        if isinstance(input, Tensor) and input.device != self._device:
            self._device = input.device
            # Not to the meta device, from which no value comes back. Outside of inference mode, in which they would be
            # made unfit for training.
            if self._device.type != "meta":
                with torch.inference_mode(False):
                    for name, buffer in self._buffers.items():
                        if buffer is not None:
                            self._buffers[name] = buffer.to(self._device)
        return self._live.numbers if self.schedule is None else self._live.on(self._device)[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # Where this module goes, so do the knobs: before code is compiled or captured there.
        self._device = fn(torch.empty(0)).device
        self._live.on(self._device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.schedule is not None:
            destination[prefix + "_schedule"] = packed(self.schedule.state_dict().values())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        *_, unexpected_keys, error_messages = arguments
        key = prefix + "_schedule"
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if key not in state_dict or self.schedule is None:
            return
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        names = list(self.schedule.state_dict())
        if state_dict[key].shape != (len(names), 2):
            error_messages.append(
                f"{key} must be of shape ({len(names)}, 2), of {', '.join(names)}, got {tuple(state_dict[key].shape)}"
            )
            return
        self.schedule.load_state_dict(dict(zip(names, unpacked(state_dict[key]), strict=True)))
