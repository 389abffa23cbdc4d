"""The one benchmark, of every contender in every way. By hand:

pytest benchmarks/micro/bench_loss.py --size 64x14 --dtype fp32 -k "warm and step"
"""

from __future__ import annotations

import time
from functools import cache, partial
from typing import Any, NoReturn

import pytest
import torch

from benchmarks.micro.cases import parse_size
from benchmarks.micro.contenders import OURS, Contender
from benchmarks.micro.instruments import GRAPH_CALLS, capture, flush, launches, peak

COLD_ROUNDS = 3
SLOW, SLOW_ROUNDS = 0.03, 2  # seconds a call


@cache
def _fresh_compiler(size: str) -> None:
    """Shapes that change would be compiled as unknown ones, which no rival deserves."""
    torch.compiler.reset()


def _leave_out(what: str, error: Exception, missing: dict[str, str]) -> NoReturn:
    """A rival that does not work here, such as torch.compile without a compiler, stops nobody else."""
    missing[what] = f"{type(error).__name__}: {error}".splitlines()[0]
    pytest.skip(missing[what])


def test_loss(
    benchmark: Any,
    size: str,
    dtype: str,
    method: str,
    mode: str,
    repeat: int,
    contender: str,
    device: str,
    missing: dict[str, str],
) -> None:
    _fresh_compiler(size)
    call = Contender(contender, mode, parse_size(size), dtype, device)
    try:
        if repeat == 0:
            call()  # compiles
        if contender == OURS and method == "warm" and device == "cpu":
            call.touch_memory()
        start = time.perf_counter()
        call()  # takes the memory that later calls find again
        slow = time.perf_counter() - start > SLOW
    except Exception as error:
        if contender == OURS:
            raise
        _leave_out(contender, error, missing)
    if method == "warm" and device == "cuda" and repeat == 0:
        benchmark.extra_info["launches"] = launches(call)
    if method == "cold":
        benchmark.pedantic(call, setup=partial(flush, device), rounds=COLD_ROUNDS)
    elif method == "memory":
        benchmark.extra_info["peak_bytes"] = benchmark.pedantic(peak, (call, device))
    elif method == "graph":
        try:
            replay = capture(call)
        except RuntimeError as error:
            _leave_out(f"{contender} as a graph", error, missing)
        benchmark.extra_info["calls"] = GRAPH_CALLS
        benchmark(replay)
    elif slow:
        benchmark.pedantic(call, rounds=SLOW_ROUNDS)  # not calibrated, which takes calls too
    else:
        benchmark(call)
