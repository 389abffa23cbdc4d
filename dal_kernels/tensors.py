"""What tensors may be given to a loss: dtypes, devices and shapes, and the errors for others."""

from __future__ import annotations

import sys
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

HALVES = (torch.float16, torch.bfloat16)
LOGITS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
LABELS = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
_PLAIN = (Tensor, Parameter)
# What refuse_dtensor says.
_BESIDE_PLAIN = (
    " beside a plain input: make input one too, or pass its full_tensor() or, of this rank's rows, to_local()"
)
OF_LAYER = (
    ": where fully_shard has split it, give the module that holds it (LinearLoss(..., classifier=head) gathers it) or "
    "apply fully_shard to the loss module alone; where its classes are split over ranks, as by ColwiseParallel, take "
    "dal_kernels.ClassParallelLinear, or dal_kernels.distributed.class_parallel_linear_loss of its to_local() with the "
    "group of its mesh"
)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a real number. True is none: who gives it for a number has taken it for a switch."""
    return isinstance(value, Real) and not isinstance(value, bool)


def moved(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device. Without waiting, but for a copy to a CPU: that would be read before it is there."""
    return value.to(device=device, dtype=dtype, non_blocking=device.type != "cpu")


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def classes_of(logits: Tensor) -> int:
    """C of logits (C,), (N, C) or (N, C, ...)."""
    return logits.shape[logits.dim() > 1]


def no_gradient(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor that requires grad."""
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad, got a tensor that does: the loss has no gradient for it")


def of_rows(name: str, value: Tensor, input: Tensor, shape: torch.Size, accepted: str) -> Tensor:
    """A value a row, shaped like the target or like its first dimension, as (N,)."""
    if value.device != input.device:
        raise ValueError(f"{name} must be on the device of input, {input.device}, got {value.device}")
    if value.shape == shape:
        return value if value.dim() == 1 else value.reshape(-1)
    if len(shape) > 1 and value.shape == shape[:1]:
        return value.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape).reshape(-1)
    raise ValueError(f"{name} must be {accepted}, shape {tuple(shape)}, got shape {shape_of(value)}")


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, without importing torch.distributed.tensor."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_dtensor(name: str, tensor: Tensor, instead: str = _BESIDE_PLAIN) -> None:
    """Raise TypeError for a DTensor, saying what to do instead."""
    if is_dtensor(tensor):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor{instead}")


def check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of the accepted strings."""
    if value not in accepted:
        listed = f"{', '.join(map(repr, accepted[:-1]))} or {accepted[-1]!r}"
        raise ValueError(f"{name} must be {listed}, got {value!r}")
