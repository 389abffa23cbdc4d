"""Clocks and counters: events of the device, a cold cache, CUDA graphs, launches, peak memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from benchmarks.machine import cache_bytes, peak_memory

__all__ = ["GRAPH_CALLS", "capture", "clock", "flush", "launches", "peak", "return_memory"]

GRAPH_CALLS = 20
UNKNOWN_CACHE = 2**28
# On a GPU the buffer also takes the device longer than the host needs to launch what is timed.
FLUSH = {"cpu": 1, "cuda": 8}
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h

Call = Callable[[], object]


class Stamp:
    """A moment in the device's queue; the difference of two is in seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, other: Stamp) -> float:
        self.event.synchronize()
        return other.event.elapsed_time(self.event) / 1e3


def clock(device: str, method: str) -> Callable[[], float | Stamp]:
    """CUDA events, or the host's clock: on a CPU, and for the time that the host takes."""
    return Stamp if device == "cuda" and method != "host" else time.perf_counter


@cache
def _buffer(device: str) -> Tensor:
    """What to read, all of it, so that a cache holds nothing else.

    Not of zeros: a system may have one page for all of those. Read, not written, which would leave it writing back.
    """
    size = cache_bytes(torch.device(device)) or UNKNOWN_CACHE
    return torch.ones(FLUSH[device] * size // 4, device=device)


def flush(device: str) -> None:
    """Read more than a cache holds; on a GPU only queued."""
    _buffer(device).sum()


def capture(call: Call) -> Callable[[], None]:
    """A replay of ``GRAPH_CALLS`` calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay


def launches(call: Call) -> int:
    """What one call starts on the GPU: kernels, copies and fills, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def return_memory() -> None:
    """Make larger blocks go back to the system as soon as they are free, in this process and for good.

    What a heap keeps is not counted when it is used again. A process that has done this is no place for timings. Needs
    Linux with glibc.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def peak(call: Call, device: str) -> int:
    """Bytes that a call needs at once beside what was there before.

    On a CPU that is the growth of the resident set: after :func:`return_memory`, which comes before any tensor.
    """
    call()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    before = peak_memory(reset=True)
    call()
    return peak_memory() - before
