"""What a training step executes, counted by an executor of compiled GPU code; not timed."""

from __future__ import annotations

from typing import Any

import torch

from dal_kernels import dynamics_aware_loss

Case = tuple[int, int, torch.dtype]
# Upper bounds: thread-instructions an element, reads and writes in sizes of the logits (None: any).
Bounds = tuple[float, float | None, float | None]


def hold_step(backend: str, case: Case, bounds: Bounds, launches: Any, expected: tuple[int, int]) -> list[Any]:
    """Hold a mean-reduced step through the public API to ``bounds``; returns what it launched.

    Args:
        case: rows, classes and dtype of the logits.
        launches: a list that grows as kernels start.
        expected: launches of a step, and of a forward without gradient.
    """
    from gpuless import traffic

    rows, classes, dtype = case
    logits = torch.randn(rows, classes).to(dtype).requires_grad_()
    arguments = torch.randint(classes, (rows,)), torch.tensor(1.2), torch.tensor(0.4)
    dynamics_aware_loss(logits, *arguments, backend=backend).backward()
    step = list(launches)
    launches.clear()
    with torch.no_grad():
        dynamics_aware_loss(logits, *arguments, backend=backend)
    moved = traffic([launch.stats for launch in step], logits.numel(), logits.element_size())
    most, reads, writes = bounds
    assert sum(launch.stats.warp_instructions for launch in step) * 32 / logits.numel() <= most
    assert reads is None or moved.reads <= reads
    assert writes is None or moved.writes <= writes
    assert (len(step), len(launches)) == expected
    return step
