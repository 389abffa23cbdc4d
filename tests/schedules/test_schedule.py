"""q(t) and bootstrap_weight(t): the authors' values, the limits of the formula, stepping and resuming."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dal_kernels import DynamicsAwareSchedule

CIFAR = (0.6, 1.5, 150)
WEBVISION = (0.4, 1.5, 250)


def authors(q_start: float, q_end: float, epochs: int, i: int) -> tuple[float, float]:
    """What the authors' script trains epoch ``i`` with."""
    crossing = (1 - q_start) * epochs / (q_end - q_start)
    return q_start + (q_end - q_start) * i / epochs, max(0.0, (i - crossing) / (epochs - crossing))


def schedule(**changes: Any) -> DynamicsAwareSchedule:
    return DynamicsAwareSchedule(**{"q_start": 0.6, "q_end": 1.5, "total_steps": 150, **changes})


def remaining(s: DynamicsAwareSchedule, steps: int) -> list[tuple[float, float]]:
    return [s.step() for _ in range(steps)]


@pytest.mark.parametrize("setting", [CIFAR, WEBVISION], ids=["cifar", "webvision"])
def test_every_epoch_has_the_values_of_the_authors(setting: tuple[float, float, int]) -> None:
    s = DynamicsAwareSchedule(*setting)
    for epoch in range(setting[2]):
        expected = authors(*setting, epoch)
        assert (s.q, s.bootstrap_weight) == pytest.approx(expected, rel=0, abs=1e-12)
        assert s.at(epoch) == (s.q, s.bootstrap_weight)
        s.step()


@pytest.mark.parametrize(("setting", "first"), [(CIFAR, 67), (WEBVISION, 137)], ids=["cifar", "webvision"])
def test_bootstrapping_starts_in_the_first_epoch_whose_q_is_above_one(
    setting: tuple[float, float, int], first: int
) -> None:
    s = DynamicsAwareSchedule(*setting)
    values = [s.at(epoch) for epoch in range(setting[2])]
    assert [weight for _, weight in values[:first]] == [0.0] * first
    assert all(weight > 0 for _, weight in values[first:])
    assert values[first - 1][0] < 1 < values[first][0]


@pytest.mark.parametrize("q_end", [0.6, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("t", [0, 1, 75.5, 149, 150, 1000])
def test_q_that_never_passes_one_never_bootstraps(q_end: float, t: float) -> None:
    q, bootstrap_weight = schedule(q_end=q_end).at(t)
    assert bootstrap_weight == 0.0
    assert q == pytest.approx(0.6 + (q_end - 0.6) * min(t, 150) / 150, abs=1e-12)


@pytest.mark.parametrize(
    ("q", "bootstrap_weight"), [(0.0, 0.0), (0.7, 0.0), (1.0, 0.0), (math.nextafter(1, 2), 1.0), (1.5, 1.0)]
)
@pytest.mark.parametrize("t", [0, 3.5, 150, 151])
def test_constant_q_bootstraps_fully_above_one_and_else_not_at_all(q: float, bootstrap_weight: float, t: float) -> None:
    assert schedule(q_start=q, q_end=q).at(t) == (q, bootstrap_weight)


def test_q_that_starts_above_one_bootstraps_from_the_start() -> None:
    s = schedule(q_start=1.2, q_end=1.6, total_steps=100)  # q would have been 1 at t = -50
    assert s.at(0) == pytest.approx((1.2, 1 / 3), abs=1e-12)
    assert s.at(40) == pytest.approx((1.36, 0.6), abs=1e-12)
    assert s.at(100) == (1.6, 1.0)


@pytest.mark.parametrize("t", [150, 150.25, 151, 1e9])
def test_values_stay_at_their_last_past_the_end(t: float) -> None:
    assert schedule().at(t) == (1.5, 1.0)


def test_stepping_past_the_end_stays_there() -> None:
    s = schedule(total_steps=2)
    assert remaining(s, 4)[1:] == [(1.5, 1.0)] * 3
    assert s.position == 4


def test_time_may_be_fractional() -> None:
    s = schedule()
    assert s.at(100.5) == pytest.approx(authors(*CIFAR, 100.5), abs=1e-12)  # type: ignore[arg-type]
    s.step(100.5)
    assert s.step() == s.at(101.5)


@settings(deadline=None, max_examples=300)
# start + (end - start) rounds up
@example(ends=[0.03, 0.29], total=250.0, moments=[250 * (1 - 2**-53), 250.0], shape="linear", warmup=0.0)
@example(ends=[0.0, math.nextafter(1, 2)], total=3.0, moments=[1.0, 2.0], shape="cosine", warmup=0.0)
@given(
    ends=st.lists(st.floats(0, 3), min_size=2, max_size=2).map(sorted),
    total=st.floats(1e-3, 1e6),
    moments=st.lists(st.floats(0, 2e6), min_size=2, max_size=2).map(sorted),
    shape=st.sampled_from(["linear", "cosine"]),
    warmup=st.floats(0, 0.999),
)
def test_both_values_never_fall_and_keep_their_range(
    ends: list[float], total: float, moments: list[float], shape: Any, warmup: float
) -> None:
    s = DynamicsAwareSchedule(*ends, total, shape=shape, warmup_steps=warmup * total)
    (q, bootstrap_weight), (later_q, later_weight) = map(s.at, moments)
    assert ends[0] <= q <= later_q <= ends[1]
    assert 0 <= bootstrap_weight <= later_weight <= 1
    if q < 1 - 1e-9:
        assert bootstrap_weight == 0.0


def test_step_counts_by_one_and_step_t_goes_to_t() -> None:
    s = schedule()
    assert (s.position, s.q, s.bootstrap_weight) == (0, 0.6, 0.0)
    assert s.step() == s.at(1) == (s.q, s.bootstrap_weight)
    assert s.step(120) == s.at(120) == (s.q, s.bootstrap_weight)
    assert s.step() == s.at(121)
    assert s.step(0) == s.at(0)
    assert s.position == 0


@pytest.mark.parametrize("iterations", [3, 391])
def test_epochs_and_iterations_agree_at_the_same_fraction_of_training(iterations: int) -> None:
    by_epoch, by_iteration = schedule(), schedule(total_steps=150 * iterations)
    for epoch in range(151):
        assert by_iteration.at(by_iteration.position) == pytest.approx(by_epoch.at(epoch), abs=1e-12)
        remaining(by_iteration, iterations)


def test_state_is_plain_numbers() -> None:
    s = schedule()
    s.step(70.25)
    state = s.state_dict()
    settings = {"q_start": 0.6, "q_end": 1.5, "total_steps": 150, "warmup_steps": 0, "shape": 0}
    assert state == {**settings, "max_bootstrap_weight": 1, "position": 70.25}
    assert {type(value) for value in state.values()} <= {int, float}


@pytest.mark.parametrize("position", [0, 66, 67.3, 149, 200])
def test_resuming_through_json_continues_exactly(position: float) -> None:
    s = schedule()
    s.step(position)
    saved = json.dumps(s.state_dict())
    resumed = schedule()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(json.loads(saved))
    assert remaining(resumed, 90) == remaining(s, 90)


@pytest.mark.parametrize(
    "changed", [{"q_start": 0.4}, {"q_end": 1.4}, {"total_steps": 300}, {"q_end": 2, "q_start": 1}]
)
def test_state_of_other_settings_warns_and_only_gives_the_position(changed: dict[str, float]) -> None:
    old, new = schedule(**changed), schedule()
    old.step(42)
    with pytest.warns(UserWarning, match="schedule resumed with other settings") as caught:
        new.load_state_dict(old.state_dict())
    assert len(caught) == 1
    message = str(caught[0].message)
    assert [name for name in ("q_start", "q_end", "total_steps") if name in message] == sorted(
        changed, key=["q_start", "q_end", "total_steps"].index
    )
    expected = schedule()
    expected.step(42)
    assert new.state_dict() == expected.state_dict()


BAD = [
    *[(name, value, ValueError) for name in ("q_start", "q_end") for value in (-0.1, math.nan, math.inf)],
    *[("total_steps", value, ValueError) for value in (0, -1, math.nan, math.inf)],
    *[
        (name, value, TypeError)
        for name in ("q_start", "q_end", "total_steps")
        for value in ("1", None, 1j, [1.0], torch.ones(()))
    ],
]


@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_bad_setting_is_named(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must be .*got "):
        schedule(**{name: value})


def test_setting_too_large_for_a_float_is_named() -> None:
    with pytest.raises(ValueError, match=r"^q_end must be finite"):
        schedule(q_end=10**400)


def test_start_above_end_is_refused_with_both_values() -> None:
    with pytest.raises(ValueError, match=r"q_start .*q_end.* 1\.5 and 0\.6"):
        schedule(q_start=1.5, q_end=0.6)


@pytest.mark.parametrize("method", ["at", "step"])
@pytest.mark.parametrize(
    ("t", "error"),
    [(-1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("3", TypeError), (1j, TypeError)],
)
def test_bad_time_is_refused_and_moves_nothing(method: str, t: Any, error: type[Exception]) -> None:
    s = schedule()
    s.step(3)
    with pytest.raises(error, match=r"^t must be .*got "):
        getattr(s, method)(t)
    assert s.position == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"position": None}, ValueError, "missing: position"),
        ({"q_end": None, "q_start": None}, ValueError, "missing: q_start, q_end"),
        ({"position": -1.0}, ValueError, "position must be .*got -1"),
        ({"position": math.nan}, ValueError, "position must be .*got nan"),
        ({"position": "7", "q_end": 3.0}, TypeError, "position must be .*got str"),
    ],
)
def test_bad_state_is_refused_and_changes_nothing(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    s = schedule()
    s.step(5)
    before = s.state_dict()
    state = {name: value for name, value in {**before, **changes}.items() if value is not None}
    with pytest.raises(error, match=message):
        s.load_state_dict(state)
    assert s.state_dict() == before


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"]
)
def test_copy_continues_on_its_own(duplicate: Any) -> None:
    s = schedule()
    s.step(80)
    twin = duplicate(s)
    assert twin.state_dict() == s.state_dict()
    assert remaining(twin, 5) == [s.at(81 + i) for i in range(5)]
    assert s.position == 80


def test_repr_shows_settings_position_and_values() -> None:
    s = schedule()
    s.step(75)
    shown = "DynamicsAwareSchedule(q_start=0.6, q_end=1.5, total_steps=150, position=75, q=1.05, bootstrap_weight=0.1)"
    assert repr(s) == shown
