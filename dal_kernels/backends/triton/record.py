"""Operators of the Triton backend, written down as they run, for the autograd node to do again without Python.

What an operator allocates and launches follows from the shapes, strides, dtypes, alignment and numbers of its arguments
alone; only addresses differ from call to call. So for arguments of a kind the node asks for a record once, and from
then on launches the same compiled kernels itself: csrc/autograd/replay.h. What is written down here is what the
operators tell: buffers made by :func:`empty`, memory that is shared by :func:`keep`, launches made by :func:`start`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from dal_kernels.surroundings import is_capturing

# What a parameter of a kernel is: a number as its bits, or the address of an argument or of a buffer, by its place, and
# how many bytes behind that.
_BITS, _ARGUMENT, _BUFFER = range(3)

# Memory of a launch's own, in bytes, that is not worth giving back after it.
_SMALL = 1 << 16

# (buffers as (shape, dtype), places of the results among them, launches): csrc/autograd/replay.h has the rest.
Record = tuple[list[tuple[tuple[int, ...], torch.dtype]], list[int], list[tuple[Any, ...]]]


class _Recorder:
    """What one call of an operator has done so far."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments
        self.buffers: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.launches: list[tuple[Any, ...]] = []
        # Whether all was of a kind that can be done again: not where one tensor was given twice, because of two others
        # it could not be said which is meant.
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        self.complete = len({id(tensor) for tensor in tensors}) == len(tensors)

    def note(self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        function = function_of(compiled)
        if function is None or kernel.pre_run_hooks:
            self.complete = False
            return
        kinds = list(compiled.src.signature.values())[: len(arguments)]
        # Of what Triton has made a constant, as None and 1, the kernel has no parameter.
        given = [(value, kind) for value, kind in zip(arguments, kinds, strict=True) if kind != "constexpr"]
        parameters = [self._parameter(value, kind) for value, kind in given]
        threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
        # In front, what must live as long as the kernel may be launched.
        owned = (compiled, *self.kept)
        self.launches.append((owned, function, (*grid, 1, 1)[:3], threads, compiled.metadata.shared, parameters))

    def _parameter(self, value: Any, kind: str) -> tuple[int, int, int]:
        if isinstance(value, Tensor):
            for place, argument in enumerate(self.arguments):
                if argument is value:
                    return _ARGUMENT, place, 0
            if any(kept is value for kept in self.kept):
                return _BITS, value.data_ptr(), 0
            storage = value.untyped_storage().data_ptr()
            for place, buffer in enumerate(self.buffers):
                if buffer is value or (storage != 0 and buffer.untyped_storage().data_ptr() == storage):
                    return _BUFFER, place, int(value.storage_offset()) * value.element_size()
        elif kind == "fp32":
            return _BITS, int.from_bytes(ctypes.c_float(value), "little"), 0
        elif isinstance(value, int) and kind[0] in "iu":
            return _BITS, ctypes.c_uint64(value).value, 0
        self.complete = False  # as of a copy of an argument, which this knows nothing of
        return _BITS, 0, 0

    def written(self, results: list[Any]) -> Record | None:
        """How the call is done again, or None where that is not known."""
        places = [place for result in results for place, made in enumerate(self.buffers) if made is result]
        if not self.complete or len(places) != len(results):
            return None
        # Memory that a single launch needs for itself stays, because the next one on its stream comes after it: to
        # allocate it each time would take longer than to launch.
        stays = {
            place: made
            for place, made in enumerate(self.buffers)
            if place not in places and made.nbytes <= _SMALL and (len(self.launches) == 1 or made.nbytes == 0)
        }
        remaining = [place for place in range(len(self.buffers)) if place not in stays]

        def settled(what: int, value: int, offset: int) -> tuple[int, int, int]:
            if what != _BUFFER:
                return what, value, offset
            if value in stays:
                return _BITS, stays[value].data_ptr() + offset, 0
            return _BUFFER, remaining.index(value), offset

        launches = [
            ((owned, *stays.values()), *rest, [settled(*parameter) for parameter in parameters])
            for owned, *rest, parameters in self.launches
        ]
        buffers = [(tuple(self.buffers[place].shape), self.buffers[place].dtype) for place in remaining]
        return buffers, [remaining.index(place) for place in places], launches


class _Current(threading.local):
    recorder: _Recorder | None = None


_current = _Current()


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty``, written down."""
    made = like.new_empty(shape, dtype=dtype)
    if _current.recorder is not None:
        _current.recorder.buffers.append(made)
    return made


def keep(made: Tensor) -> Tensor:
    """Written down as memory that all calls of the kind share, one after the other on their stream."""
    if _current.recorder is not None:
        _current.recorder.kept.append(made)
    return made


def start(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """``kernel[grid]``, written down. Positional arguments are those of the kernel, constants have their names."""

    def launch(*arguments: Any, **constants: Any) -> None:
        # Said, because the kernels are written for it, and Triton 3.10 leaves it out where nothing is said (3.9 warns).
        compiled = kernel[grid](*arguments, enable_fp_fusion=True, **constants)
        if _current.recorder is not None:
            _current.recorder.note(kernel, compiled, grid, arguments)

    return launch


@contextlib.contextmanager
def _recording(arguments: tuple[Any, ...]) -> Iterator[_Recorder]:
    _current.recorder = recorder = _Recorder(arguments)
    try:
        yield recorder
    finally:
        _current.recorder = None


def record(operator: Callable[..., Any], *arguments: Any) -> tuple[list[Tensor], Record | None]:
    """What an operator gives, and how it is done again, or None where that is not known."""
    with _recording(arguments) as recorder:
        given = operator(*arguments)
    results = [given] if isinstance(given, Tensor) else list(given or ())
    return results, recorder.written(results)


# ---- what Triton and its driver say


# What a compiled kernel may ask of its launch beside its parameters, in one version of Triton or another.
_NEEDS = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size", "tensordesc_meta")


def function_of(compiled: Any) -> int | None:
    """The driver's function of a compiled kernel that takes no more than its parameters; None of any other."""
    metadata: Any = getattr(compiled, "metadata", None)
    if metadata is None or metadata.target.backend != "cuda" or metadata.num_ctas != 1:
        return None
    function = compiled.function
    needs_more = any(getattr(metadata, need, None) for need in _NEEDS)
    return function if isinstance(function, int) and not needs_more else None


@functools.cache
def launcher() -> int:
    """The address of ``cuLaunchKernel``, or 0 where Triton launches in another way."""
    if torch.version.cuda is None:
        return 0
    try:
        if type(driver.active).__name__ != "CudaDriver":
            return 0
        return ctypes.cast(ctypes.CDLL("libcuda.so.1").cuLaunchKernel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, RuntimeError):  # the last of which says that there is no driver at all
        return 0


def undisturbed() -> bool:
    """Whether a launch is nobody's business but the driver's.

    That is, no hook of Triton's wants to see it, as a profiler's does, nothing asks for another compilation, and no
    CUDA graph is captured, which must own what its launches count with.
    """
    try:
        runtime = triton.knobs.runtime
        return not (
            _listens(runtime.launch_enter_hook)
            or _listens(runtime.launch_exit_hook)
            or runtime.debug
            or getattr(runtime, "add_stages_inspection_hook", None) is not None
            or getattr(triton.knobs.compilation, "instrumentation_mode", "")
            or is_capturing()
        )
    except AttributeError:  # another Triton, which may listen in another way
        return False


def _listens(hook: Any) -> bool:
    """Whether a hook does anything: newer ones are chains, which may be empty, older ones functions or None."""
    return bool(getattr(hook, "calls", hook is not None))
