"""The fused operators as torch.library knows them: loaded here, with the fake kernels that tracing needs.

The operators of every backend have these schemas:

    loss(logits, target, q, bootstrap_weight, weight, ignore_index, reduction, hard, want_gradient) -> (loss, gradient)
    loss_and_fields(the same, want_prediction) -> (loss, gradient, fields, prediction)
    gradient(logits, target, fields, prediction, upstream, ignore_index) -> gradient

with logits (N, C), reduction an index into :data:`REDUCTIONS`, gradient (N, C) already divided for "mean", or empty
where it is not wanted, fields (len(FIELDS), N) and prediction (N,) or empty. The gradient of a hard bootstrap needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

REDUCTIONS = ("none", "mean", "sum")

# Row by row, what csrc/cpu/batch.h calls Field.
FIELDS = ("max", "scale", "slope", "target_term", "argmax_term", "target_prob", "entropy")


class Kernels(NamedTuple):
    """The operators of one backend."""

    loss: OpOverload
    loss_and_fields: OpOverload
    gradient: OpOverload


KERNELS: dict[str, Kernels] = {}

# Why the compiled extension is not there, or None.
native_error: str | None = None
native_instruction_set = ""


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _fake_loss(
    logits: Tensor,
    target: Tensor,
    q: Tensor,
    bootstrap_weight: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    hard: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty((logits.shape[0],) if reduction == 0 else (), dtype=_loss_dtype(logits))
    return loss, logits.new_empty(tuple(logits.shape) if want_gradient else (0,))


def _fake_loss_and_fields(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *shared, want_prediction = arguments
    rows = logits.shape[0]
    fields = logits.new_empty((len(FIELDS), rows), dtype=_loss_dtype(logits))
    prediction = logits.new_empty((rows,) if want_prediction else (0,), dtype=torch.int64)
    return *_fake_loss(logits, *shared), fields, prediction


def _fake_gradient(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(tuple(logits.shape))


_FAKES: dict[str, Callable[..., Any]] = {
    "loss": _fake_loss,
    "loss_and_fields": _fake_loss_and_fields,
    "gradient": _fake_gradient,
}


def _register(backend: str) -> None:
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"dal_kernels::{name}_{backend}", fake)
    KERNELS[backend] = Kernels(*(getattr(torch.ops.dal_kernels, f"{name}_{backend}").default for name in _FAKES))


try:
    _native = importlib.import_module("dal_kernels._native")  # importing it defines the operators
except ImportError as error:
    native_error = str(error)
else:
    native_instruction_set = _native.instruction_set
    _register("cpu")
