"""Warm-up, cosine, the largest bootstrap weight and restarts: their values, how modules take them, how they resume."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.schedule_figure import save_picture
from dal_kernels import (
    DynamicsAwareLoss,
    DynamicsAwareSchedule,
    LinearDynamicsAwareLoss,
    Ramp,
    SelfPacedSchedule,
    dynamics_aware_loss,
)
from support.children import ROOT

SHAPED: dict[str, Any] = {"warmup_steps": 3, "shape": "cosine", "max_bootstrap_weight": 0.25}
KINDS = [DynamicsAwareSchedule, SelfPacedSchedule]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator).requires_grad_(), torch.arange(6) % 5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 0.5, 2: 0.8, 5: 1.25, 10: 2.0}),
        ({"warmup_steps": 2}, {0: 0.5, 1.9: 0.5, 2: 0.5, 6: 1.25, 8: 1.625, 10: 2.0, 12: 2.0}),
        ({"shape": "cosine"}, {0: 0.5, 2.5: 0.5 + 1.5 * (1 - math.sqrt(0.5)) / 2, 5: 1.25, 20 / 3: 1.625, 10: 2.0}),
        ({"shape": "cosine", "warmup_steps": 4}, {4: 0.5, 6: 0.875, 7: 1.25, 8: 1.625, 11: 2.0}),
    ],
)
@pytest.mark.parametrize("largest", [1.0, 0.3, 0.0, 2.0])
def test_values_are_those_of_the_shape(settings: dict[str, Any], expected: dict[float, float], largest: float) -> None:
    s = DynamicsAwareSchedule(0.5, 2.0, 10, max_bootstrap_weight=largest, **settings)
    for t, q in expected.items():
        assert s.at(t) == pytest.approx((q, largest * max(0.0, q - 1.0)), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"warmup_steps": 10}, ValueError, r"^warmup_steps must be below total_steps, got 10\.0 of 10\.0"),
        ({"warmup_steps": -1}, ValueError, r"^warmup_steps must be finite and >= 0, got -1"),
        ({"warmup_steps": "2"}, TypeError, r"^warmup_steps must be a number, got str"),
        ({"shape": "step"}, ValueError, r"^shape must be 'linear' or 'cosine', got 'step'"),
        ({"max_bootstrap_weight": -0.5}, ValueError, r"^max_bootstrap_weight must be finite and >= 0, got -0\.5"),
        ({"max_bootstrap_weight": math.nan}, ValueError, r"^max_bootstrap_weight must be finite and >= 0, got nan"),
    ],
)
@kinds
def test_a_bad_setting_is_named(
    kind: type[DynamicsAwareSchedule], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(0.6, 1.5, 10, **settings)


@kinds
def test_the_schedule_shows_what_is_not_plain(kind: type[DynamicsAwareSchedule]) -> None:
    shown = "total_steps=10, warmup_steps=3, shape='cosine', max_bootstrap_weight=0.25, position=0, "
    assert shown in repr(kind(0.6, 1.5, 10, **SHAPED))


# --- restart


@kinds
@pytest.mark.parametrize("total_steps", [None, 40])
def test_a_restart_begins_again(kind: type[DynamicsAwareSchedule], total_steps: float | None) -> None:
    s = kind(0.6, 1.5, 10, **SHAPED)
    criterion = DynamicsAwareLoss(schedule=s)
    criterion.step(9)
    s.restart(total_steps)
    fresh = DynamicsAwareSchedule(0.6, 1.5, total_steps or 10, **SHAPED)
    assert s.position == 0
    assert [s.at(t) for t in range(50)] == [fresh.at(t) for t in range(50)]
    if kind is DynamicsAwareSchedule:
        assert criterion.q.item() == pytest.approx(0.6)  # the loss hears of it


def test_a_restart_keeps_what_the_network_has_learnt() -> None:
    criterion = DynamicsAwareLoss(total_steps=10)
    for _ in range(5):
        criterion(*batch())
        criterion.step()
    before = criterion.schedule.state_dict()
    criterion.schedule.restart(20)
    assert criterion.schedule.state_dict() == {**before, "position": 0, "total_steps": 20}
    assert before["confidence"] > 0.1


@pytest.mark.parametrize(("total_steps", "error"), [(3, ValueError), (0, ValueError), ("9", TypeError)])
def test_a_refused_restart_changes_nothing(total_steps: Any, error: type[Exception]) -> None:
    s = DynamicsAwareSchedule(0.6, 1.5, 10, **SHAPED)
    s.step(5)
    before = s.state_dict()
    with pytest.raises(error, match=r"total_steps.*got"):
        s.restart(total_steps)
    assert s.state_dict() == before


# --- modules


def layer_form(*settings: Any, **options: Any) -> LinearDynamicsAwareLoss:
    return LinearDynamicsAwareLoss(4, 5, *settings, **options)


modules = pytest.mark.parametrize("module", [DynamicsAwareLoss, layer_form], ids=["module", "layer"])


def test_a_module_trains_with_the_schedule_it_is_given() -> None:
    s, (logits, target) = DynamicsAwareSchedule(0.6, 1.5, 10, **SHAPED), batch()
    criterion = DynamicsAwareLoss(schedule=s)
    assert criterion.schedule is s
    for t in range(12):
        torch.testing.assert_close(criterion(logits, target), dynamics_aware_loss(logits, target, *s.at(t)))
        criterion.step()


@modules
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 9}, "schedule must be given without total_steps"),
        ({"q_start": 0.6, "q_end": 1.5}, "schedule must be given without q_start, q_end"),
        ({"pace": "auto"}, "schedule must be given without pace"),
    ],
)
def test_a_schedule_beside_its_settings_is_refused(
    module: Any, kind: type[DynamicsAwareSchedule], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        module(schedule=kind(0.6, 1.5, 10), **settings)


@modules
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "^total_steps, or a schedule, must be given, got neither$"),
        ({"q_start": 0.4, "pace": "fixed"}, "^total_steps, or a schedule, must be given, got neither$"),
        ({"schedule": Ramp(3, q=(0, 1))}, "^schedule must be a DynamicsAwareSchedule or .*got Ramp$"),
    ],
)
def test_a_module_without_a_schedule_is_refused(module: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        module(**settings)


# --- states


def made(kind: type[DynamicsAwareSchedule], position: float = 0.0, **settings: Any) -> DynamicsAwareLoss:
    criterion = DynamicsAwareLoss(schedule=kind(0.6, 1.5, 10, **settings))
    criterion.step(position)
    return criterion


@kinds
def test_a_shaped_schedule_resumes_without_a_word(kind: type[DynamicsAwareSchedule]) -> None:
    saved, resumed, other = (made(kind, position, **SHAPED) for position in (6.5, 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(saved.state_dict())
        other.schedule.load_state_dict(json.loads(json.dumps(saved.schedule.state_dict())))
    assert resumed.schedule.state_dict() == other.schedule.state_dict() == saved.schedule.state_dict()


@kinds
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"warmup_steps": 4}, "warmup_steps was 4, is 3$"),
        ({"shape": "linear"}, "shape was 'linear', is 'cosine'$"),
        ({"max_bootstrap_weight": 1}, r"max_bootstrap_weight was 1, is 0\.25$"),
    ],
)
def test_a_state_of_another_shape_warns_and_gives_the_position(
    kind: type[DynamicsAwareSchedule], setting: dict[str, Any], message: str
) -> None:
    saved, resumed = made(kind, 6.5, **{**SHAPED, **setting}), made(kind, **SHAPED)
    with pytest.warns(UserWarning, match=message):
        resumed.load_state_dict(saved.state_dict())
    assert resumed.schedule.position == 6.5
    assert resumed.schedule.at(7) == made(kind, **SHAPED).schedule.at(7)


@pytest.mark.parametrize("resumed_kind", KINDS, ids=lambda kind: f"into {kind.__name__}")
@pytest.mark.parametrize(
    ("kind", "names"),
    [pytest.param(kind, names, id=f"{kind.__name__}-{len(names)}") for kind in KINDS for names in kind.EARLIER_STATES],
)
def test_a_state_of_an_earlier_kind_loads(
    kind: type[DynamicsAwareSchedule], names: tuple[str, ...], resumed_kind: type[DynamicsAwareSchedule]
) -> None:
    saved = made(kind, 6.5)
    saved(*batch())
    state = dict(zip(kind.STATE, saved.get_extra_state(), strict=True))
    earlier = torch.stack([state[name] for name in names])
    assert earlier.shape in (((6, 2), (9, 2)) if kind is SelfPacedSchedule else ((4, 2),))
    resumed = made(resumed_kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict({"_extra_state": earlier})
    assert resumed.schedule.position == 6.5
    if kind is resumed_kind:
        lost = {name: 0.0 for name in kind.STATE if name == "calls"}
        assert resumed.schedule.state_dict() == {**saved.schedule.state_dict(), **lost}
    with pytest.warns(UserWarning, match="shape was 'linear', is 'cosine'"):
        made(resumed_kind, **SHAPED).load_state_dict({"_extra_state": earlier})


# --- the picture


def test_the_picture_of_the_readme_is_what_its_module_draws(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    once, again = tmp_path / "once.svg", tmp_path / "again.svg"
    for path in (once, again):
        save_picture(path)
    kept = (ROOT / "docs" / "schedule.svg").read_bytes()
    assert once.read_bytes() == again.read_bytes()
    assert len(kept) < 60_000
    if f"Matplotlib v{matplotlib.__version__}," in kept.decode():  # another release draws other bytes
        assert once.read_bytes() == kept
