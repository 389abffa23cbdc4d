"""The fused operators as torch.library knows them: registered here, with the fake kernels that tracing needs.

The operators of every backend have these schemas:

    loss(logits, target, q, bootstrap_weight, weight, ignore_index, reduction, hard, want_gradient)
        -> (loss, gradient, *correction)
    loss_and_fields(the same, want_prediction) -> (loss, gradient, fields, prediction, *correction)
    gradient(logits, target, fields, prediction, upstream, ignore_index, *correction) -> gradient

with logits (N, C), reduction an index into :data:`dal_kernels.fields.REDUCTIONS`, gradient (N, C) already divided for
"mean", or empty where it is not wanted, fields (7, N) and prediction (N,) or empty. The gradient of a hard bootstrap
needs the prediction. On a GPU there are target_prob and entropy only with it: fields (4, N) without. In ``gradient`` a
target of C or more is a class that lies elsewhere: its row is written without the target's term.

On a GPU the divisor of a mean is known only after the gradient is written: that is divided by N, and ``correction``,
N over the true divisor, is left for the backward. On a CPU there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from dal_kernels import extensions
from dal_kernels.backends import cuda as _cuda
from dal_kernels.fields import FIELDS, GRADIENT_FIELDS, loss_dtype


class Kernels(NamedTuple):
    """The operators of one backend.

    Attributes:
        rescale: gradient in place from (saved tensors, upstream, ignore_index, whether it must be made again because it
            is rounded), without looking at the upstream's value; None where looking is free.
        writes_gradient: whether the forward can write the gradient of such logits.
        overwrite: ``gradient`` of contiguous logits that nobody needs afterwards, in their place where it can.
    """

    loss: OpOverload
    loss_and_fields: OpOverload
    gradient: OpOverload
    rescale: Callable[..., Tensor] | None
    writes_gradient: Callable[[Tensor], bool]
    overwrite: Callable[..., Tensor]


KERNELS: dict[str, Kernels] = {}

# Why the compiled extensions, or Triton, are not there, or None.
native_error: str | None = None
cuda_error: str | None = None
triton_error: str | None = None
native_instruction_set = ""


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
    loss = logits.new_empty((logits.shape[0],) if reduction == 0 else (), dtype=loss_dtype(logits))
    return loss, logits.new_empty(tuple(logits.shape) if want_gradient else (0,))


def _fake_loss_and_fields(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *shared, want_prediction = arguments
    rows = logits.shape[0]
    fields = logits.new_empty((len(FIELDS), rows), dtype=loss_dtype(logits))
    prediction = logits.new_empty((rows,) if want_prediction else (0,), dtype=torch.int64)
    return *_fake_loss(logits, *shared), fields, prediction


def _fake_gradient(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(tuple(logits.shape))


def _fake_gpu_loss(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, gradient = _fake_loss(logits, *arguments)
    return loss, gradient, loss.new_empty(() if loss.dim() == 0 else (0,))


def _fake_gpu_loss_and_fields(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, gradient, correction = _fake_gpu_loss(logits, *arguments[:-1])
    *_, fields, prediction = _fake_loss_and_fields(logits, *arguments)
    count = len(FIELDS) if arguments[-1] else GRADIENT_FIELDS
    return loss, gradient, fields.new_empty((count, logits.shape[0])), prediction, correction


_CPU_FAKES: dict[str, Callable[..., Any]] = {
    "loss": _fake_loss,
    "loss_and_fields": _fake_loss_and_fields,
    "gradient": _fake_gradient,
}
_GPU_FAKES = _CPU_FAKES | {"loss": _fake_gpu_loss, "loss_and_fields": _fake_gpu_loss_and_fields}

_LOSS_ARGUMENTS = (
    "Tensor logits, Tensor target, Tensor q, Tensor bootstrap_weight, Tensor? weight, int ignore_index, "
    "int reduction, bool hard, bool want_gradient"
)
_TRITON_SCHEMAS = {
    "loss": f"({_LOSS_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    "loss_and_fields": f"({_LOSS_ARGUMENTS}, bool want_prediction) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gradient": (
        "(Tensor logits, Tensor target, Tensor fields, Tensor prediction, Tensor upstream, int ignore_index, "
        "Tensor correction) -> Tensor"
    ),
}


def _register(
    backend: str,
    fakes: dict[str, Callable[..., Any]],
    rescale: Callable[..., Tensor] | None,
    writes_gradient: Callable[[Tensor], bool],
    overwrite: Callable[..., Tensor] | None,
) -> None:
    for name, fake in fakes.items():
        torch.library.register_fake(f"dal_kernels::{name}_{backend}", fake)
    loss, loss_and_fields, gradient = (getattr(torch.ops.dal_kernels, f"{name}_{backend}").default for name in fakes)
    KERNELS[backend] = Kernels(loss, loss_and_fields, gradient, rescale, writes_gradient, overwrite or gradient)


def _overwrite_cpu(logits: Tensor, *arguments: Any) -> Tensor:
    torch.ops.dal_kernels.overwrite_cpu(logits, *arguments)
    return logits


try:
    native_module = extensions.load("_native")  # loading it defines the operators
except ImportError as error:
    native_error = str(error)
else:
    native_instruction_set = native_module.instruction_set
    _register("cpu", _CPU_FAKES, None, lambda logits: True, _overwrite_cpu)

try:
    cuda_module = extensions.load("_cuda")
except ImportError as error:
    cuda_error = str(error)
else:
    # Its kernel reads the special classes once the row is written: out of place.
    _register("cuda", _GPU_FAKES, _cuda.rescale, _cuda.writes_gradient, overwrite=None)


def _why_no_triton(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return "Triton is not installed; it comes with torch's CUDA and ROCm builds for Linux (pip install triton)"
    version = (
        f" {triton.__version__}" if (triton := sys.modules.get("triton")) and hasattr(triton, "__version__") else ""
    )
    return f"Triton{version} is installed, but cannot be used: {type(error).__name__}: {error}"


_library = torch.library.Library("dal_kernels", "FRAGMENT")
try:
    from dal_kernels.backends.triton import launch as _launch
except Exception as error:  # also a Triton that is broken or too old must not take the package with it
    triton_error = _why_no_triton(error)
else:
    for _name, _schema in _TRITON_SCHEMAS.items():
        _library.define(f"{_name}_triton{_schema}")
        for _device in ("CPU", "CUDA"):  # CPU tensors: an interpreter or an emulator
            _library.impl(f"{_name}_triton", getattr(_launch, _name), _device)
    _register("triton", _GPU_FAKES, _launch.rescale, _launch.writes_gradient, _launch.overwrite)
