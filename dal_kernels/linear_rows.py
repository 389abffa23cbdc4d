"""What a call behind a classifier layer has of each row: its features, its label, its weights."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor

from dal_kernels.mixtures import Mix
from dal_kernels.tensors import shape_of


class Rows(NamedTuple):
    """What has a value a row, as the caller gives it."""

    input: Tensor
    target: Tensor
    sample_weight: Tensor | None
    mix: Mix | None
    target_shift: Any = None

    @property
    def flat_target(self) -> Tensor:
        return self.target.reshape(-1)

    def without_last(self, shift: int, classes: int) -> Rows:
        """Each row beside the target ``shift`` further on in the last dimension of the target.

        Args:
            classes: C, because a ``target_shift`` (C,) is one a class.

        Raises:
            TypeError, ValueError: the target has not the shape of ``input`` without D, or none is so far on.
        """
        input, target = self.input, self.target
        if not isinstance(shift, Integral) or isinstance(shift, bool):
            raise TypeError(f"shift must be an int, got {type(shift).__name__}")
        if not isinstance(input, Tensor) or not isinstance(target, Tensor):
            name, value = ("target", target) if isinstance(input, Tensor) else ("input", input)
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if input.dim() and target.shape != input.shape[:-1]:
            raise ValueError(
                f"target must have shape {tuple(input.shape[:-1])} for input of shape {shape_of(input)}, "
                f"got {shape_of(target)}"
            )
        if shift == 0:
            return self
        length = input.shape[-2] if input.dim() > 1 else 0
        if not 0 < shift < length:
            raise ValueError(
                f"shift must be >= 0 and below the length of a sequence, {length}, which is the last dimension of "
                f"target, got {shift}"
            )

        def later(value: Any) -> Any:
            """What has a value a label, beside these; else it is one a sequence, or what is refused later."""
            return value[..., shift:] if isinstance(value, Tensor) and value.shape == target.shape else value

        mix: Any = tuple(map(later, self.mix)) if isinstance(self.mix, tuple) else self.mix
        of_labels = self.target_shift
        if not (isinstance(of_labels, Tensor) and of_labels.shape == (classes,)):  # one a class, then
            of_labels = later(of_labels)
        return Rows(input[..., :-shift, :], target[..., shift:], later(self.sample_weight), mix, of_labels)
