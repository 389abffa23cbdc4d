"""Which calls the schedule that follows the network hears of, and of which of their rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import (
    DynamicsAwareLoss,
    LinearDynamicsAwareLoss,
    LinearLoss,
    SelfPacedSchedule,
)
from support.paced import CALLS, CLASSES, FEATURES, ROWS, averages, batch, expected_averages

# Both ways, because each tells the schedule.
pytestmark = pytest.mark.usefixtures("way")


def strided(values: Tensor) -> Tensor:
    return torch.stack([values, values], 1)[:, 0]


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
