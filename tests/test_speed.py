"""The speed that is promised, as ratios taken in one run. Not part of a normal run: a busy machine spoils timings."""

from __future__ import annotations

import pytest

from benchmarks import layer
from benchmarks.micro import AUTHORS, COMPILED, COPY, CROSS_ENTROPY, Size, measure

# Each rival must take at least so many times as long as we do; a copy of the logits must take at least 1 / 2.5.
PROMISES = {
    (64, 14): {CROSS_ENTROPY: 1.0},
    (256, 1000): {CROSS_ENTROPY: 2.0, AUTHORS: 15.0},
    (8192, 1000): {CROSS_ENTROPY: 3.0, COMPILED: 4.0, AUTHORS: 15.0, COPY: 1 / 2.5},
    (256, 50000): {CROSS_ENTROPY: 3.0, COMPILED: 4.0, AUTHORS: 15.0, COPY: 1 / 2.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("size", PROMISES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_step_is_as_fast_as_promised(fused: str, size: tuple[int, int]) -> None:
    timings = measure([Size(*size)], ["fp32"], ["-k", "warm and step"], memory=False)
    (cell,) = timings.samples
    ratios = {name: timings.ratio(cell, name).median for name in PROMISES[size]}
    assert all(ratios[name] >= bound for name, bound in PROMISES[size].items()), ratios


@pytest.mark.slow
def test_a_classifier_layer_is_as_lean_and_fast_as_promised(fused: str) -> None:
    found = layer.measure(list(layer.CONTENDERS), (4096, 512, 131072), "float32", rounds=1)
    (memory, seconds), (torch_memory, torch_seconds), (_, plain_seconds) = found.values()
    assert memory <= 0.12 * torch_memory
    assert seconds <= torch_seconds
    assert seconds <= 1.05 * plain_seconds
