"""The pace of DAL in every backend, against its plain operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dal_kernels import pace
from dal_kernels.arguments import RowStats
from dal_kernels.fields import MAX_PROB, REDUCTIONS, TARGET_PROB
from dal_kernels.objective import Objective
from dal_kernels.objectives import dynamics_aware, dynamics_aware_hard, joint_asymmetric
from dal_kernels.ops import KERNELS
from dal_kernels.pace import PaceNumbers
from support.axes import reductions
from support.truth import make_case

# q, weight, confidence, agreement, calls, bound, q_start, opening.
STATES = {
    "at the start": (0.0, 0.0, 1e-6, 1e-6, 0, 0.6, 0.6, 1.0),
    "wrong labels": (0.0, 0.0, 0.8, 0.4, 900, 1.4, 0.6, 0.0),
    "wrong labels, early": (0.0, 0.0, 0.8, 0.4, 90, 0.7, 0.6, 0.0),
    "right labels": (0.0, 0.0, 0.9, 0.9, 900, 1.4, 0.6, 0.0),
    "many classes": (0.0, 0.0, 0.01, 0.01, 90, 0.7, 0.6, 0.8),
    "sure of everything": (0.0, 0.0, 1.0, 1.0, 900, 1.2, 0.6, 1.0),
    "most labels wrong": (0.0, 0.0, 0.3, 0.3, 900, 1.4, 0.6, 0.0),
    "most labels wrong, early": (0.0, 0.0, 0.3, 0.3, 300, 1.4, 0.6, 0.0),
    "most labels wrong, more than in the opening": (0.0, 0.0, 0.25, 0.24, 700, 1.4, 0.5, 0.3),
    "nearly sure": (0.0, 0.0, 0.45, 0.48, 900, 1.4, 0.6, 0.0),
    "little above a guess": (0.0, 0.0, 0.13, 0.14, 900, 1.4, 0.6, 0.0),
    "slow": (0.0, 0.0, 0.2, 0.24, 900, 1.4, 0.6, 0.0),
    "very slow": (0.0, 0.0, 0.2, 0.6, 900, 1.4, 0.6, 0.0),
}


def rows_of_a_call(rows: int, dtype: torch.dtype) -> tuple[RowStats, Tensor]:
    """Some of them ignored."""
    generator = torch.Generator().manual_seed(rows)
    target_prob, max_prob = torch.rand(2, rows, generator=generator, dtype=dtype)
    target_prob[::5] = float("nan")
    max_prob[::5] = float("nan")
    prediction, target = torch.randint(3, (2, rows), generator=generator)
    return RowStats(target_prob, target_prob, prediction, max_prob), target


def numbers_of(state: tuple[float, ...]) -> PaceNumbers:
    return PaceNumbers.of(torch.tensor((state[0], 0.5, *state[2:])))  # a weight from before, which must not stay


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 33, 1030, 8200, 20001])
@pytest.mark.parametrize("state", STATES)
def test_an_operator_sees_what_plain_operations_see(state: str, rows: int, dtype: torch.dtype, fused: str) -> None:
    stats, target = rows_of_a_call(rows, dtype)
    got, expected = (numbers_of(STATES[state]) for _ in range(2))
    every = pace.rows_apart(rows)
    KERNELS[fused].see(
        got.all, stats.max_prob, stats.target_prob, stats.prediction, target, every, q_end=1.5, max_weight=0.8
    )
    pace.see(expected, stats, target, q_end=1.5, max_weight=0.8)
    torch.testing.assert_close(got.all, expected.all, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_weight", [1.0, 0.3])
@pytest.mark.parametrize("q_end", [1.5, 1.0, 0.9])
@pytest.mark.parametrize("state", STATES)
def test_an_operator_keeps_the_pace_that_plain_operations_keep(
    state: str, q_end: float, max_weight: float, fused: str
) -> None:
    *learnt, bound, q_start, opening = STATES[state]
    got, expected = numbers_of((*learnt, 0.0, 0.0, 0.0)), numbers_of(STATES[state])
    KERNELS[fused].keep_pace(got.all, bound, q_start, opening, q_end, max_weight)
    pace.keep_pace(expected, q_end, max_weight)
    torch.testing.assert_close(got.all, expected.all, rtol=1e-5, atol=1e-6)


# Each way of the CUDA kernels to reduce the losses: one block, blocks of many rows (a thread and some lanes each), a
# block a row in registers and in loops, several blocks a row.
CALLS: dict[str, tuple[tuple[int, int], torch.dtype, Objective]] = {
    "one block": ((9, 7), torch.float32, dynamics_aware),
    "short rows": ((300, 10), torch.bfloat16, dynamics_aware),
    "lanes": ((150, 100), torch.float32, dynamics_aware_hard),
    "one row": ((1, 2100), torch.float16, dynamics_aware),
    "long rows": ((7, 2100), torch.float32, dynamics_aware),
    "rows in a loop": ((3, 600), torch.float64, dynamics_aware),
    "shared rows": ((3, 8200), torch.float64, dynamics_aware),
    "a wide loss": ((40, 60), torch.float32, joint_asymmetric),
    "shared rows of a wide loss": ((2, 16400), torch.float32, joint_asymmetric),
    "no rows": ((0, 7), torch.float32, dynamics_aware),
}


def call_of(name: str, reduction: str, numbers: PaceNumbers, ignored: slice | None = None) -> tuple[Any, ...]:
    """Arguments of ``loss``, with the first numbers of the pace for knobs; with ignored rows one has a NaN too."""
    shape, dtype, objective = CALLS[name]
    case = make_case(*shape, dtype)
    if ignored is not None:
        case.logits[2:3] = float("nan")
        case.target[ignored] = -100
    knobs = numbers.all[: len(objective.knobs)]
    return case.logits, case.target, knobs, None, objective.id, -100, REDUCTIONS.index(reduction)


@pytest.mark.parametrize("ignored", [slice(1, None, 4), slice(None)], ids=["some", "all"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("want_gradient", [True, False])
@reductions
@pytest.mark.parametrize("name", CALLS)
def test_a_loss_that_is_followed_by_the_pace_is_both(
    name: str, reduction: str, want_gradient: bool, every: int, ignored: slice, fused: str
) -> None:
    """With the numbers from before the call for its knobs, though it writes over them."""
    kernels = KERNELS[fused]
    got, expected = (numbers_of((0.7, *STATES["wrong labels, early"][1:])) for _ in range(2))
    call = call_of(name, reduction, got, ignored)
    want_gradient = want_gradient and kernels.writes_gradient(call[0], call[4])
    found = kernels.loss_and_pace(*call, want_gradient, got.all, every, 1.5, 0.8)
    call = call_of(name, reduction, expected, ignored)
    made = kernels.loss_and_fields(*call, want_gradient, True)
    rows = (made[2][MAX_PROB], made[2][TARGET_PROB], made[3], call[1])
    kernels.see(expected.all, *rows, every, 1.5, 0.8)
    assert len(found) == len(made)
    for one, other in zip(found, made, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.all, expected.all, rtol=1e-5, atol=1e-6)


def test_many_rows_are_looked_at_evenly() -> None:
    """No more than an average needs, and of images all columns."""
    for rows, width in ((8191, 7), (8192, 64), (8 * 512 * 512, 512)):
        looked_at = torch.arange(0, rows, pace.rows_apart(rows))
        assert min(rows, 2500) <= len(looked_at) <= 8192
        assert len((looked_at % width).unique()) == width


WRONG: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "numbers of another dtype": (lambda given: given.__setitem__(0, given[0].double()), "numbers must be"),
    "numbers too short": (lambda given: given.__setitem__(0, given[0][:7]), "numbers must be"),
    "one row less": (lambda given: given.__setitem__(2, given[2][1:]), "of N rows"),
    "columns": (lambda given: given.__setitem__(1, torch.rand(9, 2)[:, 0]), "contiguous"),
    "half precision": (lambda given: given.__setitem__(slice(1, 3), [torch.rand(9).half()] * 2), "max_prob"),
    "two dtypes": (lambda given: given.__setitem__(2, given[2].double()), "max_prob"),
    "an int32 target": (lambda given: given.__setitem__(4, given[4].int()), "int64"),
    "no step": (lambda given: given.__setitem__(5, 0), "every"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_operator_refuses_what_it_cannot_read(wrong: str, fused: str) -> None:
    stats, target = rows_of_a_call(9, torch.float32)
    given = [numbers_of(STATES["at the start"]).all, stats.max_prob, stats.target_prob, stats.prediction, target, 1]
    spoil, said = WRONG[wrong]
    spoil(given)
    with pytest.raises((ValueError, RuntimeError), match=said):
        KERNELS[fused].see(*given, 1.5, 1.0)


WRONG_CALLS: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "numbers too short": (lambda given: given.__setitem__(-4, given[-4][:7]), "numbers must be"),
    "a strided target": (lambda given: given.__setitem__(1, torch.zeros(9, 2, dtype=torch.long)[:, 0]), "contiguous"),
    "no step": (lambda given: given.__setitem__(-3, 0), "every"),
    "no such reduction": (lambda given: given.__setitem__(6, 3), "reduction"),
}


@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_a_loss_that_is_refused_leaves_the_pace_alone(wrong: str, fused: str) -> None:
    numbers = numbers_of(STATES["wrong labels"])
    given = [*call_of("one block", "mean", numbers), True, numbers.all, 1, 1.5, 0.8]
    spoil, said = WRONG_CALLS[wrong]
    spoil(given)
    with pytest.raises((ValueError, RuntimeError), match=said):
        KERNELS[fused].loss_and_pace(*given)
    assert torch.equal(numbers.all, numbers_of(STATES["wrong labels"]).all)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_operators_are_what_their_schemas_say(dtype: torch.dtype, fused: str) -> None:
    stats, target = rows_of_a_call(9, dtype)
    numbers = numbers_of(STATES["wrong labels"]).all
    rows = (stats.max_prob, stats.target_prob, stats.prediction, target)
    torch.library.opcheck(KERNELS[fused].see, (numbers, *rows, 1, 1.5, 1.0))
    torch.library.opcheck(KERNELS[fused].keep_pace, (numbers, 0.9, 0.6, 0.1, 1.5, 1.0))


@reductions
@pytest.mark.parametrize("name", ["one block", "lanes", "a wide loss"])
def test_the_operator_of_both_is_what_its_schema_says(name: str, reduction: str, fused: str) -> None:
    numbers = numbers_of(STATES["wrong labels"])
    call = call_of(name, reduction, numbers_of(STATES["wrong labels"]))
    torch.library.opcheck(KERNELS[fused].loss_and_pace, (*call, False, numbers.all, 1, 1.5, 1.0))
