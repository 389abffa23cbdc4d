"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dal_kernels import ops, reference
from dal_kernels.arguments import Rows, RowStats, raise_for_labels, transforms_active
from dal_kernels.autograd import fused_loss

Run = Callable[[Rows], tuple[Tensor, RowStats | None]]

NAMES = ("triton", "cuda", "cpu", "eager")


def _run_eager(rows: Rows) -> tuple[Tensor, RowStats | None]:
    raise_for_labels(rows)
    return reference.reduced_loss(rows)


def _run_cpu(rows: Rows) -> tuple[Tensor, RowStats | None]:
    return fused_loss(rows, "cpu")


_RUN: dict[str, Run] = {"cpu": _run_cpu, "eager": _run_eager}


def available_backends() -> dict[str, str]:
    """Every backend by name, and in words whether it can be used here or what it lacks.

    A text that begins with "available" means that the name can be passed as ``backend``.
    """
    if ops.native_error is None:
        cpu = f"available: compiled kernels for CPU tensors, using {ops.native_instruction_set} instructions"
    else:
        cpu = (
            f"not available: the compiled extension is missing ({ops.native_error}); "
            "install dal_kernels again with a C++17 compiler (GCC or Clang) at hand"
        )
    return {
        "triton": "not available: not part of this version",
        "cuda": "not available: not part of this version",
        "cpu": cpu,
        "eager": "available: plain PyTorch operations, exact on any device, not fused",
    }


@functools.cache
def _warn_once(device_type: str) -> None:
    reason = available_backends()["cpu"] if device_type == "cpu" else f"no fused kernels for {device_type} tensors"
    warnings.warn(f"dynamics_aware_loss runs as plain PyTorch operations, exact but slower: {reason}", stacklevel=4)


def choose(backend: str, input: Tensor) -> Run:
    """The function that runs checked rows for ``backend`` on tensors like ``input``.

    Raises:
        ValueError: no backend has that name, or it cannot read tensors on that device.
        RuntimeError: it is not available here.
    """
    if backend == "auto":
        if input.is_cpu and ops.native_error is None:
            # Fused kernels take no part in transforms; plain operations do.
            return _run_eager if transforms_active() else _run_cpu
        if not torch.compiler.is_compiling():
            _warn_once(input.device.type)
        return _run_eager
    if backend not in NAMES:
        raise ValueError(f"backend must be 'auto', {', '.join(map(repr, NAMES))}, got {backend!r}")
    if not (reason := available_backends()[backend]).startswith("available"):
        raise RuntimeError(f"backend {backend!r} is {reason}")
    if backend == "cpu" and not input.is_cpu:
        raise ValueError(f"backend 'cpu' takes CPU tensors, got input on {input.device}")
    if backend != "eager" and transforms_active():
        raise RuntimeError(
            f"backend {backend!r} takes no part in torch.func transforms and forward-mode differentiation; "
            "backend 'eager' does, and 'auto' takes it there"
        )
    return _RUN[backend]
