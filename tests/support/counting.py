"""Upper bounds of what a training step executes, held under an executor of compiled GPU code; not timed."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.counts import count

Case = tuple[int, int, torch.dtype]
# Upper bounds: thread-instructions an element, reads and writes in sizes of the logits (None: any).
Bounds = tuple[float, float | None, float | None]


def hold_step(backend: str, case: Case, bounds: Bounds, launches: Any, expected: tuple[int, int]) -> None:
    """Hold a mean-reduced step through the public API to ``bounds``.

    ``launches`` holds those of the step afterwards.

    Args:
        case: rows, classes and dtype of the logits.
        launches: a list that grows as kernels start.
        expected: launches of a step, and of a forward without gradient.
    """
    forward, step = (count(backend, *case, gradient, launches) for gradient in (False, True))
    most, reads, writes = bounds
    assert step.instructions <= most
    assert reads is None or step.reads <= reads
    assert writes is None or step.writes <= writes
    assert (len(step.kernels), len(forward.kernels)) == expected
