"""What the microbenchmarks measure with: peaks of memory, flushes of the cache, the machine in words."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.machine import cache_bytes, machine
from benchmarks.micro import instruments, run
from benchmarks.micro.cases import LARGE, Size
from benchmarks.micro.contenders import (
    AUTHORS,
    COPY,
    CROSS_ENTROPY,
    OURS,
    REFERENCE,
)
from support.children import printed_by

linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is Linux's")


@linux
def test_the_peak_on_a_cpu_is_what_was_there_at_once() -> None:
    """In a process of its own, as it is measured: the heap of this one has memory already that nobody sees taken."""
    size = 2**24
    program = f"""
import torch
from benchmarks.micro import instruments
source = torch.ones({size // 4})

def three():
    kept = [source.clone() for _ in range(2)]
    del kept[0]
    kept += [source.clone() for _ in range(2)]

instruments.return_memory()
print(*(instruments.peak(call, "cpu") for call in (source.clone, three, lambda: None)))
"""
    one, three, none = map(int, printed_by("-c", program).split())
    assert one == pytest.approx(size, rel=0.05)
    assert three == pytest.approx(3 * size, rel=0.05)
    assert none < 0.05 * size


@linux
def test_memory_is_that_of_the_tensors_whoever_came_before() -> None:
    """Measured among the timings, a copy of the logits took nothing: the heap had the memory."""
    size = Size(2, LARGE // 2)
    found = run.measure([size], ["fp32"], ["--device=cpu", "-k", "memory and not compile"])
    assert not found.samples
    (peaks,) = found.memory.values()
    copies = {name: round(peak / (4 * LARGE), 1) for name, peak in peaks.items()}
    assert copies[OURS] == copies[COPY] == 1
    assert copies[AUTHORS] >= copies[REFERENCE] >= copies[CROSS_ENTROPY] >= 2


def test_a_flush_reads_as_much_as_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, expected in ((2**20, 2**20), (None, instruments.UNKNOWN_CACHE)):
        monkeypatch.setattr(instruments, "cache_bytes", lambda device, size=size: size)
        buffer = instruments._buffer.__wrapped__("cpu")
        assert buffer.nbytes == expected
        assert buffer.min() == 1


def test_the_machine_is_described() -> None:
    assert f"torch {torch.__version__}" in machine()
    size = cache_bytes(torch.device("cpu"))
    assert size is None or size >= 2**15


@pytest.mark.gpu
def test_instruments_of_a_gpu() -> None:
    x = torch.ones(2**24, device="cuda")
    assert instruments.launches(lambda: x.add_(1).mul_(2)) == 2
    assert instruments.peak(x.clone, "cuda") == x.nbytes
    x.fill_(0)
    replay = instruments.capture(lambda: x.add_(1))
    before = x[0].item()
    stamp = instruments.clock("cuda", "graph")
    start = stamp()
    replay()
    end = stamp()
    assert x[0].item() - before == instruments.GRAPH_CALLS
    assert 0 < end - start < 1
    assert isinstance(instruments.clock("cuda", "host")(), float)
