"""Calls timed in turns, so that a change of the machine's speed meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

__all__ = ["in_turns"]


def in_turns(
    calls: Sequence[Callable[[], object]], rounds: int, repeats: int, wait: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """Seconds of each call, one figure a round: of so many calls one after the other, once ``wait()`` has returned."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, of in zip(calls, times, strict=True):
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            of.append((time.perf_counter() - start) / repeats)
    return times
