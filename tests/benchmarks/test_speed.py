"""The speed that is promised, as ratios taken in one run. Not part of a normal run: a busy machine spoils timings."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import pytest
import torch
from torch.utils.benchmark import Timer

from benchmarks import layer
from benchmarks.micro import AUTHORS, COMPILED, COPY, CROSS_ENTROPY, OURS, Size, measure
from benchmarks.micro.contenders import Contender

# Each rival must take at least so many times as long as we do; a copy of the logits must take at least 1 / 1.6.
PROMISES = {
    (64, 14): {CROSS_ENTROPY: 1 / 0.95},
    (256, 1000): {CROSS_ENTROPY: 2.0, AUTHORS: 20.0},
    (8192, 1000): {CROSS_ENTROPY: 4.0, COMPILED: 5.0, AUTHORS: 30.0, COPY: 1 / 1.6},
    (256, 50000): {CROSS_ENTROPY: 4.0, COMPILED: 5.0, AUTHORS: 30.0, COPY: 1 / 1.6},
}


def seconds(calls: Sequence[Contender], threads: Sequence[int] = (torch.get_num_threads(),)) -> list[float]:
    """Of each call with each number of threads: medians over turns, so that a slow moment spoils none."""
    before = torch.get_num_threads()
    turns = []
    try:
        for _ in range(5):
            took = []
            for call in calls:
                for count in threads:
                    torch.set_num_threads(count)
                    call.touch_memory()
                    took.append(Timer("run()", globals={"run": call}, num_threads=count).blocked_autorange().median)
            turns.append(took)
    finally:
        torch.set_num_threads(before)
    return [median(one) for one in zip(*turns, strict=True)]


@pytest.mark.slow
@pytest.mark.skipif(torch.get_num_threads() < 2, reason="needs 2 cores")
def test_a_second_thread_gains_what_copying_gains(fused: str) -> None:
    calls = [Contender(name, "step", Size(8192, 1000), "fp32", "cpu") for name in (OURS, COPY)]
    alone, together, copy_alone, copy_together = seconds(calls, threads=(1, 2))
    assert alone / together >= 0.9 * copy_alone / copy_together


@pytest.mark.slow
def test_the_cost_of_an_element_does_not_depend_on_the_number_of_classes(fused: str) -> None:
    sizes = [Size(2 ** (22 - power), 2**power) for power in (8, 11, 14, 17, 20)]
    took = seconds([Contender(OURS, "step", size, "fp32", "cpu") for size in sizes])
    assert all(0.7 * median(took) <= one <= 1.3 * median(took) for one in took), took


@pytest.mark.slow
def test_bfloat16_of_large_logits_is_not_slower_than_float32(fused: str) -> None:
    float32, bfloat16 = seconds([Contender(OURS, "step", Size(8192, 1000), dtype, "cpu") for dtype in ("fp32", "bf16")])
    assert bfloat16 <= float32


@pytest.mark.slow
@pytest.mark.parametrize("size", PROMISES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_step_is_as_fast_as_promised(fused: str, size: tuple[int, int]) -> None:
    timings = measure([Size(*size)], ["fp32"], ["-k", "warm and step"], memory=False)
    (cell,) = timings.samples
    ratios = {name: timings.ratio(cell, name).median for name in PROMISES[size]}
    assert all(ratios[name] >= bound for name, bound in PROMISES[size].items()), ratios


@pytest.mark.slow
def test_a_classifier_layer_is_as_lean_and_fast_as_promised(fused: str) -> None:
    found = layer.measure(
        list(layer.CONTENDERS), (4096, 512, 131072), "float32", rounds=1, threads=torch.get_num_threads()
    )
    (memory, seconds), (torch_memory, torch_seconds), (_, plain_seconds) = found.values()
    assert memory <= 0.12 * torch_memory
    assert seconds <= torch_seconds
    assert seconds <= 1.05 * plain_seconds
