"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from dal_kernels import extensions, ops, reference
from dal_kernels.arguments import BACKENDS, Call, RowStats, raise_for_labels
from dal_kernels.autograd import fused_loss
from dal_kernels.objectives import OBJECTIVES
from dal_kernels.surroundings import constant_in_graphs, frames_inside, transforms_active
from dal_kernels.tensors import check_choice, classes_of

Run = Callable[[Call], tuple[Tensor, RowStats | None]]


def _run_eager(call: Call) -> tuple[Tensor, RowStats | None]:
    raise_for_labels(call)
    return reference.reduced_loss(call.flat)


def _run_cpu(call: Call) -> tuple[Tensor, RowStats | None]:
    try:
        return fused_loss(call, "cpu")
    except RuntimeError:
        # From torch 2.15 on a kernel's ValueError arrives as a RuntimeError.
        raise_for_labels(call)
        raise


def _run_triton(call: Call) -> tuple[Tensor, RowStats | None]:
    raise_for_labels(call)
    return fused_loss(call, "triton")


def _run_cuda(call: Call) -> tuple[Tensor, RowStats | None]:
    raise_for_labels(call)
    return fused_loss(call, "cuda")


RUN: dict[str, Run] = {"triton": _run_triton, "cuda": _run_cuda, "cpu": _run_cpu, "eager": _run_eager}


def _where(extension: ModuleType) -> str:
    """Nothing where an extension lies in this package, else in which other installation of it."""
    folder = Path(str(extension.__file__)).parent
    return (
        ""
        if folder.resolve() == extensions.PACKAGE.resolve()
        else f", from the dal_kernels installed in {folder.parent}"
    )


def _triton_reason() -> str:
    if ops.triton_error is not None:
        return f"not available: {ops.triton_error}"
    from triton import knobs
    from triton.runtime import driver

    if torch.cuda.is_available():
        return f"available: Triton kernels for {'ROCm' if torch.version.hip else 'CUDA'} tensors"
    if knobs.runtime.interpret:
        return "available: Triton kernels under its interpreter"
    try:
        target = driver.active.get_current_target()
    except Exception as error:
        return f"not available: Triton finds no device ({error})"
    return f"available: Triton kernels for {target.backend} {target.arch} through the active driver"


def _cuda_reason() -> str:
    if ops.cuda_error is not None:
        return f"not available: the compiled CUDA extension is missing: {ops.cuda_error}"
    if ops.cuda_module.emulates():
        return "available: CUDA C++ kernels for CPU tensors through an emulator"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "not available: the CUDA C++ kernels are built, but torch finds no CUDA device"
    return f"available: CUDA C++ kernels for CUDA tensors{_where(ops.cuda_module)}"


def _cpu_reason() -> str:
    if ops.native_error is not None:
        return f"not available: the compiled extension is missing: {ops.native_error}"
    return (
        f"available: compiled kernels for CPU tensors, using {ops.native_instruction_set} instructions"
        f"{_where(ops.native_module)}"
    )


_REASONS: dict[str, Callable[[], str]] = {
    "triton": _triton_reason,
    "cuda": _cuda_reason,
    "cpu": _cpu_reason,
    "eager": lambda: "available: plain PyTorch operations, exact on any device, not fused",
}


def available_backends() -> dict[str, str]:
    """Every backend by name, and in words whether it can be used here or what it lacks.

    A text that begins with "available" means that the name can be passed as ``backend``.
    """
    return {name: reason() for name, reason in _REASONS.items()}


@functools.cache
def _warn_once(device_type: str) -> None:
    reason = _cpu_reason() if device_type == "cpu" else f"no fused kernels for {device_type} tensors"
    warnings.warn(
        f"the loss runs as plain PyTorch operations, exact but slower: {reason}", stacklevel=frames_inside() + 1
    )


# Longer rows are taken by clusters of blocks on sm_90 and newer, which nothing but a GPU can run.
_MOST_CLASSES_OF_CUDA = 32768


def _auto(input: Tensor, objective: int | None) -> tuple[str, ...]:
    """The backends that read such tensors, of which "auto" takes the first that is there.

    On CUDA tensors that is CUDA C++ where it does no more passes over the logits than Triton: of both, counts of what
    they execute are alike, as are their launches and what they take of the host, but only where Triton's kernels are
    launched from a record, which is not so in compiled code, on a first call or on another than the default stream
    (``python -m benchmarks.counts`` has the figures). No GPU has timed them yet; the day one has, this
    is the place. What has no id in the table, as statistics of rows have none, is Triton's.
    """
    if input.is_cpu:
        return ("cpu",)
    if not input.is_cuda:
        return ()
    if not cuda_runs_on(input.device):
        return ("triton",)
    ahead = (
        objective is not None
        and not OBJECTIVES[objective].is_wide
        and input.dtype != torch.float64  # whose rows it reads twice
        and classes_of(input) <= _MOST_CLASSES_OF_CUDA
    )
    return ("cuda", "triton") if ahead else ("triton", "cuda")


@constant_in_graphs
def cuda_runs_on(device: torch.device) -> bool:
    """Whether the CUDA extension is there, and has code for that GPU, or code that its driver can compile."""
    return _cuda_runs_on(device)


@functools.cache
def _cuda_runs_on(device: torch.device) -> bool:
    # Fake tensors may be on a GPU where there is none.
    if ops.cuda_error is not None or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    record = extensions.read_record(Path(str(ops.cuda_module.__file__)).parent)
    return _has_code_for(torch.cuda.get_device_capability(device), tuple(record.get("architectures", ())))


def _has_code_for(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether one of the architectures fits: sm_90 is code for such GPUs, compute_90 what a driver can compile."""
    major, minor = capability
    for name in architectures:
        kind, _, version = name.partition("_")
        number = version.rstrip("af")
        own_major, own_minor = int(number[:-1]), int(number[-1])
        if version != number:  # of one GPU's own instructions
            fits = (own_major, own_minor) == capability
        elif kind == "compute":
            fits = (own_major, own_minor) <= capability
        else:
            fits = own_major == major and own_minor <= minor
        if fits:
            return True
    return False


def choose(backend: str, input: Tensor, objective: int | None = None) -> str:
    """The name of the backend, a key of :data:`RUN`, that ``backend`` means for tensors like ``input``.

    Args:
        objective: the id of the loss of :data:`dal_kernels.objectives.OBJECTIVES`, for a loss of logits.

    Raises:
        ValueError: no backend has that name, or it cannot read tensors on that device.
        RuntimeError: it is not available here.
    """
    if backend == "auto":
        for name in _auto(input, objective):
            if name in ops.KERNELS:
                # Fused kernels take no part in transforms; plain operations do.
                return "eager" if transforms_active() else name
        if not torch.compiler.is_compiling():
            _warn_once(input.device.type)
        return "eager"
    check_choice("backend", backend, BACKENDS)
    # Why a backend is missing cannot be found out while tracing; that it is, can.
    if torch.compiler.is_compiling():
        if backend not in RUN or (backend != "eager" and backend not in ops.KERNELS):
            raise RuntimeError(f"backend {backend!r} is not available")
    elif not (reason := _REASONS[backend]()).startswith("available"):
        raise RuntimeError(f"backend {backend!r} is {reason}")
    if backend == "cpu" and not input.is_cpu:
        raise ValueError(f"backend 'cpu' takes CPU tensors, got input on {input.device}")
    if backend != "eager" and transforms_active():
        raise RuntimeError(
            f"backend {backend!r} takes no part in torch.func transforms and forward-mode differentiation; "
            "backend 'eager' does, and 'auto' takes it there"
        )
    return backend
