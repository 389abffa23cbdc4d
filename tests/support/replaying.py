"""The launches that the autograd node makes itself, without a GPU: a ``cuLaunchKernel`` that calls an executor.

For kernels that Triton has compiled for the driver of gpuless, which takes CPU tensors. What the node packed for the
driver is unpacked as the kernel's signature says, and its memory bounded as that of the tensors it stood for.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy
from torch import Tensor

from dal_kernels import node
from dal_kernels.backends.triton import record

_SIZES = [ctypes.c_uint] * 7
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *_SIZES, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)
_NUMBERS = {"i1": ctypes.c_int8, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class _Launched(NamedTuple):
    compiled: Any
    arguments: tuple[Any, ...]  # with what a tensor spans in bytes in its place
    grid: tuple[int, ...]


def _span(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.untyped_storage().nbytes() - value.storage_offset() * value.element_size()


class Launches(list[str]):
    """The names of the kernels that the node has launched, each as it comes.

    Attributes:
        refusal: what the driver answers instead of launching, unless it is 0.
    """

    refusal = 0


@contextlib.contextmanager
def installed() -> Iterator[Launches]:
    """Has the node, where there is one, launch Triton's kernels for a driver of gpuless."""
    names = Launches()
    if node.short_way is None:
        yield names
        return
    known: dict[int, _Launched] = {}
    note = record._Recorder.note

    def note_spans(self: Any, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        known[len(known) + 1] = _Launched(compiled, tuple(map(_span, arguments)), grid)
        note(self, kernel, compiled, grid, arguments)

    def launch(function: int, *rest: Any) -> int:
        if names.refusal:
            return names.refusal
        x, y, z, threads, _, _, shared, stream, parameters, _ = rest
        compiled, arguments, grid = known[function]
        kinds = list(compiled.src.signature.values())
        slots = iter(range(len(kinds)))
        values = []
        for value, kind in zip(arguments, kinds, strict=False):
            if kind == "constexpr":
                values.append(value)
                continue
            slot = parameters[next(slots)]
            if kind[0] != "*":
                values.append(_NUMBERS[kind].from_address(slot).value)
                continue
            address = ctypes.c_uint64.from_address(slot).value
            memory = numpy.frombuffer((ctypes.c_uint8 * value).from_address(address), numpy.uint8) if address else None
            values.append(memory)
        metadata = compiled.metadata
        if (x, y, z) != (*grid, 1, 1)[:3] or threads != 32 * metadata.num_warps or shared != metadata.shared or stream:
            return 1
        rest = [None] * (len(kinds) - len(values))
        try:
            compiled.run(x, y, z, 0, compiled.function, None, None, None, None, *values, *rest)
        except Exception as error:  # which cannot pass through C
            names.append(f"{metadata.name}: {error}")
            return 1
        names.append(metadata.name)
        return 0

    called_back = LAUNCH(launch)
    address = ctypes.cast(called_back, ctypes.c_void_p).value
    with (
        mock.patch.object(record._Recorder, "note", note_spans),
        mock.patch.object(record, "function_of", side_effect=lambda compiled: len(known)),
    ):
        node._learn_triton()
        node._module.learn_triton(node._record, record.undisturbed, address)
        try:
            yield names
        finally:
            node._module.learn_triton(node._record, record.undisturbed, 0)
