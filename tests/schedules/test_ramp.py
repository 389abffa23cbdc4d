"""A schedule of knobs that is no DAL's: what it moves, how it resumes, and what compiled steps see."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import dal_kernels
from dal_kernels import (
    GeneralizedCrossEntropyLoss,
    Ramp,
    generalized_cross_entropy_loss,
)
from support.family import rows_of


def test_a_schedule_moves_knobs_and_resumes() -> None:
    logits, target = rows_of(8, 6)
    made = lambda: GeneralizedCrossEntropyLoss(schedule=Ramp(4, q=(0.2, 1.0)))  # noqa: E731
    criterion, seen = made(), []
    for _ in range(6):
        seen.append(criterion.knobs["q"])
        exact = generalized_cross_entropy_loss(logits, target, criterion.knobs["q"])
        torch.testing.assert_close(criterion(logits, target), exact, rtol=1e-6, atol=1e-7)
        criterion.step()
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    other = made()
    other.load_state_dict(criterion.state_dict())
    assert other.schedule is not None
    assert other.schedule.position == 6
    assert other.knobs == criterion.knobs
    copied = copy.deepcopy(made())
    copied.step(2.0)
    assert copied.knobs["q"] == pytest.approx(0.6)
    torch.testing.assert_close(
        copied(logits, target), generalized_cross_entropy_loss(logits, target, 0.6), rtol=1e-6, atol=1e-7
    )
    # A state dict of cross-entropy, which has no schedule.
    assert made().load_state_dict({}).missing_keys == []
    assert not GeneralizedCrossEntropyLoss().state_dict()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0, 0, 0.25, 0.5, 0.75, 1, 1]),
        ("cosine", [0, 0, 0.1464, 0.5, 0.8536, 1, 1]),
        ("step", [0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_the_shapes_of_a_ramp(shape: Any, expected: list[float]) -> None:
    ramp = Ramp(5, shape=shape, warmup_steps=1, q=(0, 1), a=(1, 3))
    assert [ramp.at(t)["q"] for t in range(7)] == pytest.approx(expected, abs=1e-4)
    assert ramp.at(5) == {"q": 1, "a": 3}


def test_a_compiled_step_sees_the_schedule_move() -> None:
    logits, target = rows_of(8, 6)
    criterion = GeneralizedCrossEntropyLoss(schedule=Ramp(4, q=(0.2, 1.0)))
    compiled = torch.compile(lambda z: criterion(z, target), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(logits), criterion(logits, target))
        criterion.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GeneralizedCrossEntropyLoss(schedule=Ramp(4, alpha=(0.2, 1.0))),
            "schedule must be of knobs of this loss",
        ),
        (lambda: Ramp(4), "knobs must be given"),
        (lambda: Ramp(0, q=(0, 1)), "total_steps must be finite and > 0"),
        (lambda: Ramp(4, warmup_steps=4, q=(0, 1)), "warmup_steps must be below total_steps"),
        (lambda: dal_kernels.AsymmetricUnhingedLoss(schedule=Ramp(4, a=(2.0, 0.5))), "a must be"),
        (lambda: GeneralizedCrossEntropyLoss(q=-1), "q must be finite and >= 0, got -1"),
    ],
)
def test_bad_schedules_are_one_clear_error(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pickled_schedule_moves_the_loss_that_it_was_pickled_with() -> None:
    loss = GeneralizedCrossEntropyLoss(schedule=Ramp(4, q=(0.2, 1.0)))
    again = pickle.loads(pickle.dumps(loss))
    again.step()
    assert again.knobs["q"] == pytest.approx(0.4)
    assert loss.knobs["q"] == 0.2
