"""The schedule that follows what the network has learnt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dal_kernels import (
    DynamicsAwareLoss,
    DynamicsAwareSchedule,
    SelfPacedSchedule,
    dynamics_aware_loss,
)
from support.paced import CALLS, averages, batch, expected_averages

# Both ways, because each tells the schedule.
pytestmark = pytest.mark.usefixtures("way")


def share(value: float) -> float:
    return min(1.0, max(0.0, value))


def expected_q(confidence: float, agreement: float, calls: int, authors: float, opening: float) -> float:
    free, too_large = 0.0, 1.5
    for _ in range(100):  # halves, to where q is what it gives
        q = (free + too_large) / 2
        gives = 1.5 * confidence * min(1.0, max(0.2, 0.2 + 15 * (1 - agreement / confidence - 0.12 * q)))
        free, too_large = (q, too_large) if gives > q else (free, q)
    in_doubt = share(calls / 700) * share((confidence - 0.1) / 0.1) * share((0.6 - confidence) / 0.2)
    in_doubt *= share((1.3 - agreement / confidence) / 0.3)
    least = 0.6 * max(opening, in_doubt) * min(1.0, math.log(10) / -math.log(confidence))
    return min(authors, max(least, free))


@pytest.mark.parametrize(
    ("position", "opening"), [(0, 1), (4, 1), (5, 14 / 15), (8, 8 / 15), (12, 0), (50, 0), (80, 0)]
)
def test_q_is_what_the_formula_says(position: int, opening: float, backend: str) -> None:
    criterion = DynamicsAwareLoss(total_steps=50, backend=backend)
    criterion.step(position)
    batches = [batch(seed) for seed in range(CALLS)]
    for count, (logits, target) in enumerate(batches):
        before = criterion.q.item(), criterion.bootstrap_weight.item()
        loss = criterion(logits, target)
        torch.testing.assert_close(loss, dynamics_aware_loss(logits, target, *before, backend=backend))
        learnt = expected_averages(batches[: count + 1])
        assert averages(criterion) == pytest.approx(learnt, rel=1e-5)
        q = expected_q(*learnt, count + 1, min(1.5, 0.6 + 0.9 * position / 50), opening)
        assert criterion.q.item() == criterion.schedule.q == pytest.approx(q, rel=1e-5)
        assert criterion.schedule.bootstrap_weight == pytest.approx(max(0.0, (q - 1) / 0.5), abs=1e-5)
        assert criterion.schedule.noise_rate == pytest.approx(max(0.0, 1 - learnt[1] / learnt[0]), abs=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"shape": "cosine", "warmup_steps": 2}, {"max_bootstrap_weight": 0.4}, {"max_bootstrap_weight": 2}]
)
def test_a_sure_network_with_wrong_labels_has_the_schedule_that_is_the_bound(settings: dict[str, Any]) -> None:
    criterion = DynamicsAwareLoss(schedule=SelfPacedSchedule(0.6, 1.5, 10, **settings))
    bound = DynamicsAwareSchedule(0.6, 1.5, 10, **settings)
    target = torch.arange(10)
    logits = (30.0 * F.one_hot(torch.where(target < 6, target, 0), 10)).requires_grad_()
    for _ in range(400):
        criterion(logits, target)
    assert criterion.schedule.noise_rate == pytest.approx(0.4, abs=1e-3)
    for t in range(11):
        criterion.step(t)
        assert (criterion.schedule.q, criterion.schedule.bootstrap_weight) == pytest.approx(bound.at(t), abs=1e-5)


def test_right_labels_stay_close_to_cross_entropy() -> None:
    criterion = DynamicsAwareLoss(total_steps=10)
    for _ in range(200):
        criterion((30.0 * torch.eye(10)).requires_grad_(), torch.arange(10))
    criterion.step(10)
    assert criterion.schedule.q == pytest.approx(0.3, abs=1e-3)
    assert criterion.schedule.noise_rate == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_the_opening_pulls_as_with_ten_classes(classes: int) -> None:
    """Many classes make p_y small: an exponent of 0.6 would leave 1.6 % of the gradient of 1000."""
    criterion = DynamicsAwareLoss(total_steps=100)
    for _ in range(200):  # to where the average is the chance of a class
        criterion(torch.zeros(2, classes, requires_grad=True), torch.zeros(2, dtype=torch.long))
    assert (1 / classes) ** criterion.schedule.q == pytest.approx(max(10**-0.6, classes**-0.6), rel=1e-3)


@pytest.mark.parametrize(
    ("confidence", "agreement", "calls", "held"),
    [
        (0.3, 0.3, 700, 1.0),  # calibrated, because most labels are wrong
        (0.3, 0.3, 350, 0.5),
        (0.3, 0.3, 2**24, 1.0),
        (0.3, 0.2, 900, 1.0),
        (0.25, 0.25 * 1.15, 900, 0.5),
        (0.25, 0.4, 900, 0.0),  # right more often than sure: the network is slow
        (0.5, 0.5, 900, 0.5),
        (0.6, 0.6, 900, 0.0),
        (0.15, 0.15, 900, 0.5),
        (0.1, 0.1, 900, 0.0),  # it guesses
    ],
)
def test_q_is_held_where_wrong_labels_are_what_makes_a_network_unsure(
    confidence: float, agreement: float, calls: int, held: float
) -> None:
    criterion = DynamicsAwareLoss(total_steps=60)
    criterion.step(30)
    learnt = {"confidence": confidence, "agreement": agreement, "calls": calls}
    criterion.schedule.load_state_dict({**criterion.schedule.state_dict(), **learnt})
    without = min(1.05, 1.5 * confidence * (1.0 if agreement < 0.7 * confidence else 0.2))
    assert criterion.schedule.q == pytest.approx(max(0.6 * held, without), rel=1e-4)


def test_a_short_training_learns() -> None:
    """Ten classes, two fifths of the labels wrong, few passes: the fixed schedule ends at chance."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 16, generator=generator)
    true = torch.arange(2000) % 10
    inputs = centres[true] + 0.5 * torch.randn(2000, 16, generator=generator)
    wrong = torch.rand(2000, generator=generator) < 0.4
    labels = torch.where(wrong, torch.randint(10, (2000,), generator=generator), true)
    hits = {}
    for pace in ("auto", "fixed"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        criterion = DynamicsAwareLoss(total_steps=6, pace=pace)  # type: ignore[arg-type]
        for _ in range(6):
            for rows in torch.randperm(2000, generator=torch.Generator().manual_seed(1)).split(32):
                optimizer.zero_grad()
                criterion(network(inputs[rows]), labels[rows]).backward()
                optimizer.step()
            criterion.step()
        hits[pace] = (network(inputs).argmax(1) == true).double().mean().item()
    assert hits["auto"] > 0.9
    assert hits["fixed"] < hits["auto"] - 0.3


def test_the_schedule_shows_itself() -> None:
    schedule = SelfPacedSchedule(0.6, 1.5, 10)
    assert repr(schedule).startswith("SelfPacedSchedule(q_start=0.6, q_end=1.5, total_steps=10, position=0, q=")
