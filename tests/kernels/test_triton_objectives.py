"""Every loss of the table by the Triton kernels, under an executor of the compiled code, against its formula."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dal_kernels.fields import Reduction
from dal_kernels.slices import statistics
from support.family_truth import BY_NAME, hold, hold_entries, knobs_of, knobs_per_row, make_batch
from support.marks import needs_executor
from support.truth import LOSS_SLACK

pytestmark = needs_executor

names = pytest.mark.parametrize("name", BY_NAME)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.fixture(autouse=True, scope="module")
def triton_under_the_executor() -> Iterator[None]:
    import gpuless

    with gpuless.install(90, collect=False):
        yield


@pytest.mark.sampled(4)
@names
@dtypes
@pytest.mark.parametrize(("classes", "reduction"), [(10, "mean"), (100, "none"), (1000, "mean")])
def test_matches_truth(name: str, dtype: torch.dtype, classes: int, reduction: Reduction) -> None:
    logits, target = make_batch(9, classes, dtype)
    hold(BY_NAME[name], knobs_of(BY_NAME[name]), logits, target, "triton", reduction=reduction)


@pytest.mark.sampled(3)
@names
@pytest.mark.parametrize(
    ("classes", "dtype", "reduction"),
    [(20_011, torch.float32, "mean"), (40_000, torch.float32, "none")],
    ids=str,
)
def test_matches_truth_in_long_rows(name: str, classes: int, dtype: torch.dtype, reduction: Reduction) -> None:
    """Those that stay in registers as exponents alone, and those that are read twice."""
    logits, target = make_batch(5, classes, dtype)
    target[4] = -100
    hold(BY_NAME[name], knobs_of(BY_NAME[name]), logits, target, "triton", reduction=reduction)


@pytest.mark.parametrize("name", ["generalized_cross_entropy", "joint_asymmetric"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [20_011, 40_000])
def test_matches_truth_in_long_rows_of_other_dtypes(name: str, dtype: torch.dtype, classes: int) -> None:
    logits, target = make_batch(5, classes, dtype)
    hold(BY_NAME[name], knobs_of(BY_NAME[name]), logits, target, "triton")


@pytest.mark.parametrize("name", ["smoothed_cross_entropy", "brier"])
def test_many_long_rows_of_wide_losses_take_a_program_each(name: str) -> None:
    logits, target = make_batch(260, 33_000, torch.bfloat16)
    hold(BY_NAME[name], knobs_of(BY_NAME[name]), logits, target, "triton")


@pytest.mark.parametrize("name", [name for name, objective in BY_NAME.items() if objective.knobs])
@pytest.mark.parametrize(("rows", "classes"), [(40, 10), (6, 1000)])
def test_each_row_may_have_knobs_of_its_own(name: str, rows: int, classes: int) -> None:
    logits, target = make_batch(rows, classes, torch.float32)
    target[[1, 4]] = -100
    weight = torch.linspace(0.1, 2.0, classes)
    objective = BY_NAME[name]
    hold(objective, knobs_per_row(objective, rows), logits, target, "triton", weight=weight)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_truth_at_both_ends(name: str, dtype: torch.dtype) -> None:
    """Probabilities of the target that are 1 up to rounding, and some that are 0 in float32."""
    logits, target = make_batch(9, 10, dtype, scale=40.0)
    hold_entries(BY_NAME[name], knobs_of(BY_NAME[name]), logits, target, "triton")


@names
def test_an_ignored_row_is_0_whatever_its_logits(name: str) -> None:
    logits, target = make_batch(5, 100, torch.float32)
    target[[0, 3]] = -100
    objective = BY_NAME[name]
    hold(objective, knobs_of(objective), logits, target, "triton", reduction="none")
    hold(objective, knobs_of(objective), logits, target, "triton", reduction="sum")


@pytest.mark.sampled(3)
@dtypes
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("rows", "classes"), [(9, 10), (300, 17), (6, 1000), (6, 20_011), (260, 17_000)])
def test_statistics_are_those_of_the_formula(dtype: torch.dtype, wide: bool, rows: int, classes: int) -> None:
    logits, _ = make_batch(rows, classes, dtype)
    logits[0] = -torch.inf
    logits[1, : classes // 2] = -torch.inf
    logits[2] += 300
    logits[3, [classes // 3, classes - 1]] = torch.nan
    logits[4, [classes // 3, classes - 1]] = 60.0
    got = statistics(logits, "triton", wide)
    truth = statistics(logits.double(), "eager", wide)
    assert torch.equal(got.argmax, truth.argmax)
    torch.testing.assert_close(got.peak, truth.peak, rtol=0, atol=0, equal_nan=True)
    sums = range(1, 3) if not wide else (1, 2, 4, 5)
    for place in sums:
        torch.testing.assert_close(got[place], truth[place], rtol=LOSS_SLACK[dtype], atol=1e-30, equal_nan=True)
