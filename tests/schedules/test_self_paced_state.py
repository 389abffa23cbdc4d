"""A schedule that follows the network goes on where it stopped, in one process and in several."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dal_kernels import (
    DynamicsAwareLoss,
)
from support.paced import CALLS, averages, batch
from support.ranks import report, run

# Both ways, because each tells the schedule.
pytestmark = pytest.mark.usefixtures("way")


def trained(calls: int = CALLS, **options: Any) -> DynamicsAwareLoss:
    criterion = DynamicsAwareLoss(**{"total_steps": 4, **options})
    for seed in range(calls):
        criterion(*batch(seed))
        if seed % 3 == 2:
            criterion.step()
    return criterion


def through_a_state_dict(criterion: DynamicsAwareLoss) -> DynamicsAwareLoss:
    resumed = DynamicsAwareLoss(total_steps=4)
    resumed.load_state_dict(criterion.state_dict())
    return resumed


def through_the_schedule(criterion: DynamicsAwareLoss) -> DynamicsAwareLoss:
    resumed = DynamicsAwareLoss(total_steps=4)
    resumed.schedule.load_state_dict(criterion.schedule.state_dict())
    return resumed


def through_pickle(criterion: DynamicsAwareLoss) -> DynamicsAwareLoss:
    return pickle.loads(pickle.dumps(criterion))


@pytest.mark.parametrize("way", [through_a_state_dict, through_the_schedule, through_pickle, copy.deepcopy])
def test_training_goes_on_where_it_stopped(way: Any) -> None:
    whole, stopped = trained(), trained(6)
    resumed = way(stopped)
    assert torch.equal(resumed.q, stopped.q)
    for seed in range(6, CALLS):
        resumed(*batch(seed))
        if seed % 3 == 2:
            resumed.step()
    assert torch.equal(resumed.q, whole.q)
    assert resumed.schedule.state_dict() == whole.schedule.state_dict()
    assert torch.equal(stopped.q, trained(6).q)  # a copy has numbers of its own


def test_a_state_of_a_fixed_schedule_goes_on_from_the_authors_q() -> None:
    fixed = DynamicsAwareLoss(total_steps=10, pace="fixed")
    fixed.step(7)
    paced = DynamicsAwareLoss(total_steps=10)
    paced.load_state_dict(fixed.state_dict())
    assert paced.schedule.q == pytest.approx(fixed.schedule.q)


def test_a_fixed_schedule_takes_the_position_of_a_paced_one() -> None:
    fixed = DynamicsAwareLoss(total_steps=4, pace="fixed")
    fixed.load_state_dict(trained(6).state_dict())
    assert fixed.schedule.position == 2


def test_a_state_of_neither_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 2\), of .* or \(6, 2\), of .*confidence.*got shape \(5, 2\)"):
        DynamicsAwareLoss(total_steps=4).set_extra_state(torch.zeros(5, 2, dtype=torch.int64))


def test_an_unknown_pace_is_refused() -> None:
    with pytest.raises(ValueError, match="pace must be 'auto' or 'fixed', got 'slow'"):
        DynamicsAwareLoss(total_steps=4, pace="slow")  # type: ignore[arg-type]


def test_the_tensors_stay_the_same() -> None:
    """Captured code reads them where they were."""
    criterion = trained(3)
    q = criterion.q
    criterion(*batch(3))
    criterion.to(torch.float16)
    assert criterion.q is q
    assert q.dtype == torch.float32


def check_ranks_agree(world: int) -> None:
    rank = dist.get_rank()
    criterion = DynamicsAwareLoss(total_steps=10)
    for seed in range(3):
        criterion(*batch(100 * rank + seed))
    every = [trained(0) for _ in range(world)]
    for other, seen in enumerate(every):
        for seed in range(3):
            seen(*batch(100 * other + seed))
    criterion.schedule.synchronize()
    mean = [sum(values) / world for values in zip(*map(averages, every), strict=True)]
    assert averages(criterion) == pytest.approx(mean, rel=1e-6)


@pytest.mark.xdist_group("ranks")
def test_ranks_agree_where_they_are_told_to(tmp_path: Path) -> None:
    run(__name__, 2, tmp_path)
    report("check_ranks_agree", 2, tmp_path)


def test_a_process_on_its_own_has_nobody_to_agree_with() -> None:
    criterion = trained(3)
    before = averages(criterion)
    criterion.schedule.synchronize()
    assert averages(criterion) == before
