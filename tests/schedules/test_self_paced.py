"""The schedule that follows what the network has learnt."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dal_kernels import (
    DynamicsAwareLoss,
    DynamicsAwareSchedule,
    LinearDynamicsAwareLoss,
    LinearLoss,
    SelfPacedSchedule,
    dynamics_aware_loss,
)
from support.ranks import report, run

# Both ways, because each tells the schedule.
pytestmark = pytest.mark.usefixtures("way")

ROWS, CLASSES, FEATURES = 12, 7, 5
CALLS = 9


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(ROWS, CLASSES, generator=generator)
    return logits.requires_grad_(), torch.randint(CLASSES, (ROWS,), generator=generator)


def strided(values: Tensor) -> Tensor:
    return torch.stack([values, values], 1)[:, 0]


def averages(criterion: Any) -> list[float]:
    state = criterion.schedule.state_dict()
    return [state["confidence"], state["agreement"]]


def expected_averages(batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """In float64, from softmax and argmax."""
    confidence = agreement = 1e-6
    for logits, target in batches:
        prob = logits.detach().double().softmax(1)
        confidence += 0.05 * (prob.amax(1).mean().item() - confidence)
        agreement += 0.05 * ((prob.argmax(1) == target).double().mean().item() - agreement)
    return [confidence, agreement]


def expected_q(confidence: float, agreement: float, authors: float, opening: float = 0.0) -> float:
    free = 0.0
    for _ in range(100):  # to where q is what it gives
        free = 1.5 * confidence * min(1.0, max(0.2, 0.2 + 6 * (1 - agreement / confidence - 0.06 * min(free, 0.5))))
    low = opening * min(1.0, math.log(10) / -math.log(confidence))
    return min(authors, max(low, free))


@pytest.mark.parametrize(("position", "opening"), [(0, 0.6), (3, 0.6), (5, 0.36), (8, 0.0), (50, 0.0), (80, 0.0)])
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
        q = expected_q(*learnt, min(1.5, 0.6 + 0.9 * position / 50), opening)
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


def called(criterion: Any, logits: Tensor, target: Tensor) -> None:
    criterion(logits, target)


def under_no_grad(criterion: Any, logits: Tensor, target: Tensor) -> None:
    with torch.no_grad():
        criterion(logits, target)


def in_evaluation(criterion: Any, logits: Tensor, target: Tensor) -> None:
    criterion.eval()(logits, target)
    criterion.train()


def without_gradient(criterion: Any, logits: Tensor, target: Tensor) -> None:
    criterion(logits.detach(), target)


def all_ignored(criterion: Any, logits: Tensor, target: Tensor) -> None:
    criterion(logits, torch.full_like(target, -100))


def all_nan(criterion: Any, logits: Tensor, target: Tensor) -> None:
    assert criterion(logits * math.nan, target).isnan()


def no_rows(criterion: Any, logits: Tensor, target: Tensor) -> None:
    criterion(logits[:0], target[:0])


@pytest.mark.parametrize(
    "call",
    [under_no_grad, in_evaluation, without_gradient, all_ignored, all_nan, no_rows],
    ids=lambda call: call.__name__,
)
def test_only_rows_of_training_count(call: Any, backend: str) -> None:
    criterion = DynamicsAwareLoss(total_steps=10, backend=backend)
    called(criterion, *batch())
    before = criterion.schedule.state_dict()
    call(criterion, *batch(1))
    assert criterion.schedule.state_dict() == before


def test_ignored_rows_and_rows_with_nan_do_not_count() -> None:
    logits, target = batch()
    poisoned = logits.detach().clone()
    poisoned[3] = math.nan
    target[5] = -100
    kept = torch.tensor([row not in (3, 5) for row in range(ROWS)])
    criterion = DynamicsAwareLoss(total_steps=10)
    criterion(poisoned.requires_grad_(), target)
    assert averages(criterion) == pytest.approx(expected_averages([(logits[kept], target[kept])]), rel=1e-5)


def mixed(criterion: Any, logits: Tensor, target: Tensor) -> Tensor:
    return criterion(logits, target, mix=(target.roll(1), 0.7))


def soft(criterion: Any, logits: Tensor, target: Tensor) -> Tensor:
    return criterion(logits, F.one_hot(target, CLASSES).float())


def weighted(criterion: Any, logits: Tensor, target: Tensor) -> Tensor:
    return criterion(logits, target, sample_weight=torch.rand(ROWS))


def unreduced(criterion: Any, logits: Tensor, target: Tensor) -> Tensor:
    return criterion(logits, target, reduction="none").sum()


def with_statistics(criterion: Any, logits: Tensor, target: Tensor) -> Tensor:
    loss, stats = criterion(logits, target, return_stats=True)
    assert torch.equal(stats.prediction, logits.argmax(1))
    return loss


def in_an_image(criterion: Any, logits: Tensor, target: Tensor) -> Tensor:
    return criterion(logits.reshape(3, 4, CLASSES).movedim(2, 1), target.reshape(3, 4))


def in_half_precision(criterion: Any, logits: Tensor, target: Tensor) -> Tensor:
    return criterion(logits.bfloat16(), target)


@pytest.mark.parametrize(
    "call", [mixed, soft, weighted, unreduced, with_statistics, in_an_image, in_half_precision],
    ids=lambda call: call.__name__,
)  # fmt: skip
def test_every_way_to_call_counts(call: Any, backend: str) -> None:
    criterion = DynamicsAwareLoss(total_steps=10, backend=backend)
    logits, target = batch()
    call(criterion, logits, target).backward()
    close = 1e-2 if call is in_half_precision else 1e-5
    assert averages(criterion) == pytest.approx(expected_averages([(logits, target)]), rel=close)


@pytest.mark.parametrize("kind", ["layer", "form"])
def test_layers_follow_the_same_rows(kind: str, backend: str) -> None:
    options: dict[str, Any] = {"total_steps": 10, "backend": backend}
    loss = DynamicsAwareLoss(**options)
    layer = (
        LinearDynamicsAwareLoss(FEATURES, CLASSES, chunk_bytes=4 * CLASSES * 5, **options)
        if kind == "layer"
        else LinearLoss(loss, FEATURES, CLASSES, chunk_bytes=4 * CLASSES * 5)
    )
    criterion = layer if isinstance(layer, LinearDynamicsAwareLoss) else loss
    features, target = 4 * torch.randn(ROWS, FEATURES), batch()[1]
    layer(features, target).backward()
    assert averages(criterion) == pytest.approx(expected_averages([(layer.classifier(features), target)]), rel=1e-5)


def test_a_compiled_loop_follows_too(backend: str) -> None:
    plain, criterion = (DynamicsAwareLoss(total_steps=10, backend=backend) for _ in range(2))
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        logits, target = batch(seed)
        torch.testing.assert_close(compiled(logits, target), plain(logits, target))
        assert averages(criterion) == pytest.approx(averages(plain), rel=1e-6)
        criterion.step()
        plain.step()


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


def test_what_overrides_see_is_what_sees() -> None:
    seen = []

    class Mine(SelfPacedSchedule):
        def see(self, stats: Any, target: Tensor) -> None:
            seen.append(target)
            super().see(stats, target)

    criterion = DynamicsAwareLoss(schedule=Mine(0.6, 1.5, CALLS))
    criterion(*batch())
    plain = DynamicsAwareLoss(total_steps=CALLS)
    plain.schedule.see = lambda stats, target: seen.append(target)  # type: ignore[method-assign]
    plain(*batch())
    assert len(seen) == 2


def test_a_0d_input_is_told_as_what_it_is() -> None:
    with pytest.raises(ValueError, match="input must have shape"):
        DynamicsAwareLoss(total_steps=CALLS)(torch.tensor(1.0, requires_grad=True), torch.tensor(0))


@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("place", [lambda target: target, strided, Tensor.int], ids=["packed", "strided", "int32"])
def test_the_schedule_hears_of_a_call_whatever_its_labels_and_result(
    backend: str, place: Any, return_stats: bool
) -> None:
    criterion = DynamicsAwareLoss(total_steps=CALLS, backend=backend)  # type: ignore[arg-type]
    batches = [batch(seed) for seed in range(3)]
    for logits, target in batches:
        result = criterion(logits, place(target), return_stats=return_stats)
        assert isinstance(result, tuple) is return_stats
    assert averages(criterion) == pytest.approx(expected_averages(batches), rel=1e-5)
