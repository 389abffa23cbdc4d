"""The inspector of labels: its numbers, its memory, what it finds, and what becomes of that."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dal_kernels import CrossEntropyLoss, DynamicsAwareLoss, RowStats
from dal_kernels.training import LabelInspector
from dal_kernels.training import inspector as inspector_module
from dal_kernels.training.inspection import inspect
from support.trainings import needs_training, rows_of

needs_training()


def visits(samples: int, classes: int, batches: int) -> list[tuple[Tensor, Tensor, RowStats]]:
    """Batches of different samples, with the statistics of random logits."""
    made = []
    labels = torch.randint(classes, (samples,))
    for _ in range(batches):
        indices = torch.randperm(samples)[: samples // 2]
        logits = torch.randn(len(indices), classes)
        logits[:, 0] += 2 * (indices % 2)  # some samples have a class that is preferred more often than others
        _, stats = CrossEntropyLoss()(logits, labels[indices], return_stats=True)
        made.append((indices, labels[indices], stats))
    return made


def fed(inspector: LabelInspector, batches: list[tuple[Tensor, Tensor, RowStats]]) -> LabelInspector:
    for batch in batches:
        inspector.update(*batch)
    return inspector


# --- its numbers


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("twice", [False, True])
def test_the_averages_are_those_of_each_sample_by_itself(twice: bool, dtype: torch.dtype) -> None:
    batches = [(indices.to(dtype), *rest) for indices, *rest in visits(20, 4, 12)]
    if twice:  # while the first waits to be taken in
        batches = [batch for batch in batches for _ in range(2)]
    found = fed(LabelInspector(20, 4, momentum=0.8), batches).inspect()
    seen = defaultdict(list)
    for indices, labels, stats in batches:
        for row, i in enumerate(indices.tolist()):
            p, top, prediction = (value[row].item() for value in (stats.target_prob, stats.max_prob, stats.prediction))
            agrees = prediction == labels[row].item()
            seen[i].append((p, p if agrees else p - top, float(agrees), prediction, top))
    for i, rows in seen.items():
        weights = torch.tensor([0.8 ** (len(rows) - 1 - k) for k in range(len(rows))], dtype=torch.float64)
        for name, column in (("target_prob", 0), ("margin", 1), ("agreement", 2)):
            values = torch.tensor([row[column] for row in rows], dtype=torch.float64)
            expected = (weights * values).sum() / weights.sum()
            assert getattr(found, name)[i].item() == pytest.approx(expected.item(), abs=1e-6), (name, i)


@pytest.mark.parametrize("index", [-1, 20])
@pytest.mark.parametrize("waits", [True, False])  # as on a CPU, and as on a GPU
def test_an_index_of_no_sample_is_refused(index: int, waits: bool) -> None:
    inspector, other = LabelInspector(20, 4), LabelInspector(20, 4)
    (batch,) = visits(20, 4, 1)
    indices, labels, stats = batch
    outside = indices.clone()
    outside[3] = index
    if waits:
        inspector.update(outside, labels, stats)
    else:
        inspector._take_in(inspector._place(outside), labels, stats.target_prob, stats.prediction, stats.max_prob)
    for _ in range(2):  # it is not forgotten
        with pytest.raises(ValueError, match=f"indices must be from 0 to 19, got {index}$"):
            inspector.inspect()
    kept = torch.arange(len(indices)) != 3
    other.update(indices[kept], labels[kept], RowStats(*(values[kept] for values in stats)))
    for name, value in inspector.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize(("limit", "value"), [("WAITING", 3), ("ENOUGH", 30)])
def test_a_training_hears_of_an_index_of_no_sample_before_it_ends(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(inspector_module, limit, value)
    inspector = LabelInspector(20, 4)
    (batch,) = visits(20, 4, 1)  # ten rows
    inspector.update(batch[0] + 11, *batch[1:])
    inspector.update(*batch)
    with pytest.raises(ValueError, match="indices must be from 0 to 19, got"):
        inspector.update(*batch)


def test_who_calls_may_fill_the_tensors_with_the_next_batch() -> None:
    batches = visits(20, 4, 6)
    whole = fed(LabelInspector(20, 4), batches)
    inspector = LabelInspector(20, 4)
    indices, labels = (torch.empty_like(numbers) for numbers in batches[0][:2])
    for batch in batches:
        indices.copy_(batch[0])
        labels.copy_(batch[1])
        inspector.update(indices, labels, batch[2])
    for name, value in inspector.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=0, atol=0)


def test_the_class_that_was_preferred_most_is_suggested() -> None:
    inspector = LabelInspector(8, 3)
    for winner in (1, 2, 1, 1, 2, 1):  # of sample 0; the others are believed, but for two
        logits = torch.tensor([[0.0, 0, 0]] + [[4.0, 0, 0]] * 5 + [[0.0, 0, 4]] * 2)
        logits[0, winner] = 4
        _, stats = CrossEntropyLoss()(logits, torch.zeros(8, dtype=torch.long), return_stats=True)
        inspector.update(torch.arange(8), torch.zeros(8, dtype=torch.long), stats)
    found = inspector.inspect()
    assert found.suggested.tolist() == [1, 0, 0, 0, 0, 0, 2, 2]
    assert found.noise_rate == 3 / 8
    assert found.confusion() == [(0, 2, 2), (0, 1, 1)]
    assert sorted(found.order[:3].tolist()) == [0, 6, 7]
    assert found.rank[found.order].tolist() == list(range(1, 9))


def test_rows_that_the_loss_ignores_and_samples_never_seen_are_left_out(tmp_path: Path) -> None:
    inspector = LabelInspector(4, 3)
    target = torch.tensor([0, -100, 2])
    _, stats = CrossEntropyLoss()(torch.randn(3, 3), target, return_stats=True)
    inspector.update(torch.tensor([2, 1, 0]), target, stats)
    found = inspector.inspect()
    assert found.given.tolist() == [2, -1, 0, -1]
    assert sorted(found.order.tolist()) == [0, 2]
    assert found.margin.isfinite().all()
    found.save_csv(tmp_path / "a.csv", paths=["a", "b", "c", "d"], class_names=["x", "y", "z"])
    assert {row["path"]: row["given"] for row in rows_of(tmp_path / "a.csv")} == {"a": "z", "c": "x"}


def test_a_state_goes_on_where_it_was_saved() -> None:
    batches = visits(20, 4, 12)
    whole = fed(LabelInspector(20, 4), batches)
    state = fed(LabelInspector(20, 4), batches[:5]).state_dict()
    resumed = LabelInspector(20, 4)
    resumed.load_state_dict(state)
    for name, value in fed(resumed, batches[5:]).state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("other", [LabelInspector(21, 4), LabelInspector(20, 5), LabelInspector(20, 4, momentum=0.5)])
def test_a_state_of_another_inspector_is_refused(other: LabelInspector) -> None:
    with pytest.raises(ValueError, match=r"state must be of 20 samples, 4 classes and momentum 0\.9, got 2"):
        LabelInspector(20, 4).load_state_dict(other.state_dict())


# --- what it costs


def test_its_memory_does_not_grow_with_the_classes() -> None:
    def size(classes: int) -> int:
        state = LabelInspector(1000, classes).state_dict().values()
        return sum(value.nbytes for value in state if isinstance(value, Tensor))

    assert size(10) == size(100_000) == 32 * 1000


def test_an_update_waits_for_no_device() -> None:
    """Tensors without content: whatever asked for a value of theirs would raise."""
    inspector = LabelInspector(100, 10)
    whole, probability = torch.zeros(8, dtype=torch.long, device="meta"), torch.zeros(8, device="meta")
    with pytest.raises(RuntimeError):
        probability[0].item()
    inspector.update(whole, whole, RowStats(probability, probability, whole, probability))
    assert inspector.state_dict()["averages"].device.type == "meta", "it follows the first statistics"


def test_what_a_cpu_takes_is_there_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way from a GPU; tensors without content stand for its."""
    waited = []

    def copied(tensor: Tensor, device: torch.device, non_blocking: bool, **_: Any) -> Tensor:
        waited.append(not non_blocking)
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    whole, probability = torch.zeros(8, dtype=torch.long, device="meta"), torch.zeros(8, device="meta")
    monkeypatch.setattr(Tensor, "to", copied)
    LabelInspector(20, 4, device="cpu").update(whole, whole, RowStats(probability, probability, whole, probability))
    assert waited == [True] * 5


# --- what is refused


@pytest.mark.parametrize("settings", [(0, 2), (5, 1), (5, 2, 1.0), (5, 2, -0.1)])
def test_an_inspector_of_nothing_is_refused(settings: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        LabelInspector(*settings)


def test_batches_that_do_not_fit_are_refused() -> None:
    target = torch.zeros(3, dtype=torch.long)
    _, stats = DynamicsAwareLoss(total_steps=1)(torch.randn(3, 4), target, return_stats=True)
    with pytest.raises(ValueError, match=r"must be \(B,\) of one batch, got \(2,\), \(3,\) and \(3,\)"):
        LabelInspector(5, 4).update(torch.arange(2), target, stats)


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_few_wrong_labels_are_suggested_without_a_mixture(wrong: int) -> None:
    margin, agreement = torch.full((50,), 0.9), torch.full((50,), 0.95)
    margin[:wrong], agreement[:wrong] = -0.5, 0.1
    given, visited = torch.zeros(50, dtype=torch.int32), torch.ones(50, dtype=torch.int32)
    found = inspect(given, given + 1, margin, margin, agreement, visited)
    assert found.mixture is None
    assert found.noise_rate == wrong / 50
    assert found.confidence.tolist() == pytest.approx([0.9] * wrong + [0.05] * (50 - wrong))
    assert found.suggested.tolist() == [1] * wrong + [0] * (50 - wrong)
