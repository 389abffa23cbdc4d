"""The arithmetic of the microbenchmarks: spreads, ratios of a turn, shares of a copy, and what is said of them."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from benchmarks.micro import tables
from benchmarks.micro.cases import MODES, SIZES, Size
from benchmarks.micro.contenders import (
    AUTHORS,
    COMPILED,
    COMPILED_CROSS_ENTROPY,
    COPY,
    CROSS_ENTROPY,
    OURS,
    PROXIES,
    REFERENCE,
    REFILL,
)
from benchmarks.micro.results import BenchmarkError, Cell, Results, Spread


def measured(contender: str, data: list[float], repeat: int = 0, mode: str = "step", **extra: Any) -> dict[str, Any]:
    method = extra.pop("method", "warm")
    params = {"size": "4x10", "dtype": "fp32", "method": method, "mode": mode, "repeat": repeat, "contender": contender}
    return {"params": params, "extra_info": extra, "stats": {"data": data}}


def results(*benchmarks: dict[str, Any]) -> Results:
    return Results([{"machine_info": {"absent": {}}, "benchmarks": list(benchmarks)}])


STEP = Cell(Size(4, 10), "fp32", "warm", "step")


def test_a_spread_is_of_quantiles() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0])
    assert (spread.low, spread.median, spread.high) == pytest.approx((1.0, 2.5, 4.0))


def test_a_ratio_compares_samples_of_a_turn() -> None:
    """The machine is ten times slower in the second turn: the ratio does not see it."""
    found = results(
        measured(OURS, [1.0, 1.0]),
        measured(CROSS_ENTROPY, [3.0, 3.0]),
        measured(OURS, [10.0], repeat=1),
        measured(CROSS_ENTROPY, [30.0], repeat=1),
    )
    assert found.ratio(STEP, CROSS_ENTROPY) == Spread(3, 3, 3)
    assert found.time(STEP, CROSS_ENTROPY).median == 3


def test_a_ratio_of_many_samples_keeps_their_spread() -> None:
    values = torch.linspace(1, 3, 5000, dtype=torch.float64)
    spread = results(measured(OURS, [1.0]), measured(CROSS_ENTROPY, values.tolist())).ratio(STEP, CROSS_ENTROPY)
    assert (spread.low, spread.median, spread.high) == pytest.approx((1.4, 2.0, 2.6), abs=0.01)


def test_shares_of_a_copy_are_of_the_bytes_that_must_move() -> None:
    """A copy moves 2 N·C in 1 s, or in 0.5 s into memory at hand: a step, the same, in 4 s; a forward half of it."""
    found = results(
        measured(COPY, [1.0]),
        measured(OURS, [4.0]),
        measured(OURS, [2.0], mode="forward"),
        measured(REFILL, [0.5], mode="no-grad"),
        measured(OURS, [1.0], mode="no-grad"),
    )
    shares = {mode: found.copy_share(STEP._replace(mode=mode)) for mode in MODES}
    assert shares == {"step": 0.25, "forward": 0.25, "no-grad": 0.25}
    assert math.isnan(results(measured(OURS, [1.0])).copy_share(STEP))


def test_replays_of_many_calls_are_of_one() -> None:
    found = results(measured(OURS, [2.0], method="graph", calls=20))
    assert found.time(STEP._replace(method="graph"), OURS).median == pytest.approx(0.1)


def test_facts_beside_the_timings_are_kept() -> None:
    found = results(measured(OURS, [9.0], method="memory", peak_bytes=7), measured(OURS, [1.0], launches=2))
    assert found.memory == {(Size(4, 10), "fp32"): {OURS: 7}}
    assert found.launches == {(STEP, OURS): 2}
    assert list(found.samples) == [STEP]
    assert "| 4×10  | fp32    | forward + backward |             2 |" in tables._launches(found)


def test_rivals_without_us_are_refused() -> None:
    with pytest.raises(BenchmarkError, match=r"dal_kernels.* is not selected at .*warm"):
        results(measured(CROSS_ENTROPY, [1.0]))


def test_who_was_missing_in_any_process_is_kept() -> None:
    documents = [{"machine_info": {"absent": {name: "why"}, "device": "cpu"}, "benchmarks": []} for name in "ab"]
    assert Results(documents).machine == {"absent": {"a": "why", "b": "why"}, "device": "cpu"}


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        (Spread(1.234e-6, 1.1e-6, 9.9e-6), "1.2 µs (1.1 to 9.9)"),
        (Spread(0.25, 9.04e-5, 1.0), "250,000 µs (90.4 to 1,000,000)"),
    ],
)
def test_times_in_words(spread: Spread, text: str) -> None:
    assert tables.times(spread) == text


# The machine is as fast as it was, then ten times slower.
BUSY = [1.0] * 5 + [10.0] * 5


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([1.0] * 10, [3.0] * 10, None),
        ([1.0] * 10, {COPY: [1.9] * 10}, None),  # what a cache may do
        ([1.0] * 10, {COPY: [45.0] * 10}, "at 4×10 our loss seems to have 4500% of a copy's bandwidth"),
        ([1.0] * 5 + [1.9] * 5, [3.0] * 10, None),  # as wide as the figure at most
        (BUSY, [3.0] * 10, "2 of 2 figures"),
        (
            [1.0] * 10,
            BUSY,
            r"1 of 2 figures.* 1\.6 times \(4×10, fp32, forward \+ backward, warm: F\.cross",
        ),
    ],
)
def test_a_busy_machine_is_said_on_top(
    ours: list[float], theirs: list[float] | dict[str, list[float]], said: str | None
) -> None:
    others = theirs if isinstance(theirs, dict) else {CROSS_ENTROPY: theirs}
    found = results(measured(OURS, ours), *(measured(name, data) for name, data in others.items()))
    warning = tables.busy(found)
    assert warning is None if said is None else warning and re.match(f"This machine is busy: {said}", warning)
    found.machine |= dict.fromkeys(("gpu", "cache_bytes"), None) | {"backends": {}}
    found.machine |= dict.fromkeys(("processor", "threads", "device", "system", "dal_kernels", "torch", "python"), "?")
    top = tables.document(found).splitlines()[2]
    assert top == f"**{warning}**" if warning else "busy" not in top


@pytest.mark.parametrize("dtypes", [["fp32"], ["fp32", "bf16"]], ids=len)
def test_no_word_of_a_figure_is_cut_off(dtypes: list[str]) -> None:
    figures = pytest.importorskip("benchmarks.micro.figures", reason="the extra dal_kernels[bench]")
    names = [OURS, CROSS_ENTROPY, COMPILED_CROSS_ENTROPY, COMPILED, REFERENCE, AUTHORS, COPY, *PROXIES]
    cells = [{"size": str(size), "dtype": dtype} for size in SIZES for dtype in dtypes]
    benchmarks = [measured(name, [1e-3, 2e-3]) for name in names for _ in cells]
    memory = [measured(name, [1.0], method="memory", peak_bytes=7) for name in names for _ in cells]
    for one, cell in zip([*benchmarks, *memory], cells * 2 * len(names), strict=True):
        one["params"] |= cell
    found = results(*benchmarks, *memory)
    for make in (figures._times, figures._ratios, figures._memory, lambda _: figures._counts()):
        figure = make(found)
        figure.canvas.draw()
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert 0 <= drawn.x0 <= drawn.x1 <= width
        assert 0 <= drawn.y0 <= drawn.y1 <= height
        figures.plt.close(figure)
