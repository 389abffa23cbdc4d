"""The knobs of a loss as one tensor beside the logits: what the caller may give, and the errors for what he may not."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dal_kernels.fields import loss_dtype, loss_dtype_of
from dal_kernels.objective import Knob, Objective
from dal_kernels.surroundings import is_capturing, is_recording, transforms_active
from dal_kernels.tensors import HALVES, LOGITS, is_number, moved, no_gradient, of_rows, refuse_dtensor

KnobValue = float | Tensor
_NUMBERS = frozenset({float, int})


def knob_tensor(
    objective: Objective, values: tuple[KnobValue, ...] | Tensor, input: Tensor, shape: torch.Size
) -> Tensor:
    """The knobs as (K,) or (N, K), float32 or float64, on the device of ``input``.

    Args:
        values: a number, a 0-d tensor or one value a row for each knob; or all of them as the (K,) tensor of a module,
            which has been checked.
        shape: of the target.

    Raises:
        TypeError, ValueError: naming the knob. Values of tensors are looked at on a CPU only, where looking is free.
    """
    if isinstance(values, Tensor):
        is_beside = values.device == input.device or (values.is_cpu and input.is_cpu)
        return values if is_beside else moved(values, input.device)
    dtype = loss_dtype(input)
    if (
        _NUMBERS.issuperset(map(type, values))
        and (remembered := remembered_knobs(objective, values, input)) is not None
    ):
        return remembered
    numbers = tuple(value for value in values if not isinstance(value, Tensor))
    for knob, value in zip(objective.knobs, values, strict=True):
        if not isinstance(value, Tensor):
            _check_number(knob, value, dtype)
    if len(numbers) == len(values):
        _check_rule(objective, tuple(map(float, numbers)))
        return _filled(numbers, dtype, input.device)
    tensors = [
        _beside(knob, value, input, shape)
        if isinstance(value, Tensor)
        else torch.full((), float(value), dtype=dtype, device=input.device)
        for knob, value in zip(objective.knobs, values, strict=True)
    ]
    rows = [tensor for tensor in tensors if tensor.dim()]
    if rows:
        tensors = [tensor.expand(rows[0].shape) for tensor in tensors]
    knobs = torch.stack(tensors, -1)  # which promotes float32 beside float64
    if input.is_cpu and not (torch.compiler.is_compiling() or transforms_active() or is_recording(knobs)):
        _check_tensor(objective, knobs.to(dtype))  # as the kernels will read them: a float64 q may be 0 in float32
    return knobs


def _filled(numbers: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Filled, because a copy from the host would wait for the device, and cannot be captured in a CUDA graph.
    if not numbers:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.stack([torch.full((), float(number), dtype=dtype, device=device) for number in numbers])


def remembered_knobs(objective: Objective, numbers: tuple[Any, ...], input: Tensor) -> Tensor | None:
    """Knobs that are floats or ints as (K,), beside the input; None where they may not be kept for the next call.

    Raises:
        ValueError: the loss cannot have one of them.
    """
    if torch.compiler.is_compiling() or transforms_active() or is_recording(input):
        return None
    # What is filled during a capture has no value before the graph is replayed.
    if input.is_cuda and is_capturing():
        return None
    return _remembered(objective, numbers, loss_dtype(input), input.device, _stream(input))


def _stream(input: Tensor) -> int:
    """The current stream. Another one could read what is filled on this one before it is filled."""
    return torch.cuda.current_stream(input.device).cuda_stream if input.is_cuda else 0


@functools.lru_cache(maxsize=256)
def _remembered(
    objective: Objective, numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int
) -> Tensor:
    """Checked and filled once a stream, because either costs as much as a kernel takes at classifier sizes."""
    for knob, number in zip(objective.knobs, numbers, strict=True):
        _check_number(knob, number, dtype)
    _check_rule(objective, numbers)
    # Tensors made in inference mode would be unfit for training.
    with torch.inference_mode(False):
        return _filled(numbers, dtype, device)


def remembered_number(knob: Knob, number: float, input: Tensor) -> Tensor:
    """One knob that is a number among others that are tensors, as (), beside the input.

    Raises:
        ValueError: the loss cannot have it.
    """
    dtype = loss_dtype(input)
    _check_number(knob, number, dtype)
    with torch.inference_mode(False):
        return torch.full((), number, dtype=dtype, device=input.device)


def _check_number(knob: Knob, value: Any, dtype: torch.dtype) -> None:
    if not is_number(value):
        raise TypeError(f"{knob.name} must be a number or a floating-point tensor, got {type(value).__name__}")
    limits = torch.finfo(dtype)
    if (wanted := knob.refusal(value, limits)) is not None:
        raise ValueError(f"{knob.name} must be {wanted}, got {value}")
    if limits.bits == 32 and (wanted := knob.refusal(_in_float32(value), limits)) is not None:
        raise ValueError(f"{knob.name} must be {wanted} in float32, got {value}, which is {_in_float32(value):g} there")


def _in_float32(value: float) -> float:
    """Rounded to its 24 digits, as kernels read it. By arithmetic alone, because a compiler traces it."""
    if not -1e30 < value < 1e30:
        return value
    shifted = value * (2**29 + 1)
    return shifted - (shifted - value)


def refuse_class_weight(name: str, value: Any) -> None:
    """Raise TypeError where class weights stand in the place of a knob: torch.nn.CrossEntropyLoss takes them first."""
    if isinstance(value, Iterable) and not (isinstance(value, Tensor) and value.dim() == 0):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}; class weights are given as weight=...")


def check_numbers(objective: Objective, values: tuple[Any, ...]) -> tuple[float, ...]:
    """Knobs that are numbers, checked before there is an input."""
    for knob, value in zip(objective.knobs, values, strict=True):
        _check_number(knob, value, loss_dtype_of(torch.get_default_dtype()))
    numbers = tuple(float(value) for value in values)
    _check_rule(objective, numbers)
    return numbers


def _check_rule(objective: Objective, numbers: tuple[float, ...]) -> None:
    if objective.rule is not None:
        ok, words = objective.rule(*numbers)
        if not ok:
            named = zip(objective.knobs, numbers, strict=True)
            raise ValueError(f"{words}, got {' and '.join(f'{knob.name} = {number:g}' for knob, number in named)}")


def _check_tensor(objective: Objective, knobs: Tensor) -> None:
    limits = torch.finfo(knobs.dtype)
    rows = [knobs.tolist()] if knobs.dim() == 1 else knobs[_refused(objective, knobs, limits)].tolist()
    for values in rows:
        row = 0 if knobs.dim() == 1 else int(_refused(objective, knobs, limits).nonzero()[0])
        for knob, value in zip(objective.knobs, values, strict=True):
            if (wanted := knob.refusal(value, limits)) is not None:
                raise ValueError(f"{knob.name} must be {wanted}, got {value} at row {row}")
        if objective.rule is not None:
            ok, words = objective.rule(*values)
            if not ok:
                raise ValueError(f"{words}, got {values[0]} at row {row}")


def _refused(objective: Objective, knobs: Tensor, limits: torch.finfo) -> Tensor:
    """Which rows (N,) have a knob that is refused."""
    columns = knobs.unbind(-1)
    fits = torch.ones_like(columns[0], dtype=torch.bool)
    for knob, column in zip(objective.knobs, columns, strict=True):
        least, most = knob.least, min(knob.most, limits.max)
        fits &= (column >= least) & (column <= most) if knob.inclusive else (column > least) & (column < most)
        fits &= (column <= 0) | (column >= limits.tiny)
        if knob.whole:
            fits &= column == column.round()
    if objective.rule is not None:
        fits &= objective.rule(*columns)[0]
    return ~fits


def _beside(knob: Knob, value: Tensor, input: Tensor, shape: torch.Size) -> Tensor:
    """A knob as a 0-d or (N,) tensor next to the logits."""
    name = knob.name
    if knob.whole and not value.is_floating_point():
        value = value.float()
    if value.dtype not in LOGITS:
        raise TypeError(f"{name} must be a number or a floating-point tensor, got {value.dtype}")
    refuse_dtensor(name, value)
    no_gradient(name, value)
    if value.dtype in HALVES:
        value = value.float()
    if value.dim() == 0 or (value.shape == (1,) and shape != (1,)):
        value = value.reshape(())
        is_beside = (value.is_cpu and input.is_cpu) or value.device == input.device
        return value if is_beside else moved(value, input.device)
    return of_rows(name, value, input, shape, "a number, a 0-d tensor or one value a row")
