"""Numbers that are tensors too: a schedule moves them, and compiled or captured code sees them move."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dal_kernels.surroundings import is_recording

_CPU = torch.device("cpu")
# A number is a whole part and a fraction in units of 2^-62, both int64. Integers, because loaders cast floating tensors
# to the dtype of the model, or take the dtype of the model from them; linear, because state dicts are averaged.
_UNIT = 2.0**-62


def packed(numbers: Iterable[float]) -> Tensor:
    """(n, 2) int64. On the CPU also where a meta device is the default: these are values, not memory to fill later."""
    pairs = [(int(number), int(math.ldexp(number % 1.0, 62))) for number in numbers]
    return torch.tensor(pairs, dtype=torch.int64, device="cpu")


def unpacked(pairs: Tensor) -> list[float]:
    """What :func:`packed` was given."""
    return [whole + fraction * _UNIT for whole, fraction in pairs.tolist()]


def _kept(number: float) -> float:
    """0 for what float32 holds with few digits and without a reciprocal, as at the foot of a ramp from 0."""
    return number if abs(number) >= torch.finfo(torch.float32).tiny else 0.0


class LiveNumbers:
    """Floats, and for each device one (K,) float32 tensor of them that is changed in place whenever they are."""

    def __init__(self, numbers: tuple[float, ...]) -> None:
        self.numbers = numbers
        self._tensors = {_CPU: self._new(_CPU)}

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensors: a copy has its own."""
        return {"numbers": self.numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["numbers"])  # type: ignore[misc]

    def set(self, numbers: tuple[float, ...]) -> None:
        """Change the numbers, as many as there are, and all their tensors."""
        self.numbers = numbers
        for tensor, _ in self._tensors.values():
            for place, number in enumerate(numbers):
                tensor[place].fill_(_kept(number))

    def on(self, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The (K,) tensor on ``device``, and its values as 0-d tensors: the same at each call. Not to be written to."""
        found = self._tensors.get(device)
        if found is not None and not is_recording(found[0]):
            return found
        if torch.compiler.is_compiling():
            # To make tensors here would write today's numbers into the compiled code.
            moved = self._tensors[_CPU][0].to(device)
            return moved, moved.unbind()
        made = self._new(device)
        if not is_recording(made[0]):  # else they are nothing to keep
            self._tensors[device] = made
        return made

    def _new(self, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
        # Tensors made in inference mode could not be changed outside of it.
        with torch.inference_mode(False):
            made = torch.empty(len(self.numbers), dtype=torch.float32, device=device)
            values = made.unbind()
            for value, number in zip(values, self.numbers, strict=True):
                value.fill_(_kept(number))
        return made, values
