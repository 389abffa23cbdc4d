"""The warning of a stalled training: when it comes, when it does not, and that nothing waits for it."""

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

from dal_kernels import DynamicsAwareLoss, LinearDynamicsAwareLoss, LinearLoss, stall, watch
from dal_kernels.distributed import class_parallel_loss
from dal_kernels.stall import mean_and_most, stall_message
from support.watched import CLASSES, ROWS, TARGET, fixed, logits, past_one, train


@pytest.mark.parametrize("kind", ["fixed", "layer", "form"])
def test_a_stall_is_told_once_as_q_passes_one(kind: str, said: list[str]) -> None:
    losses: dict[str, Any] = {
        "fixed": fixed(),
        "layer": LinearDynamicsAwareLoss(CLASSES, CLASSES, total_steps=10, pace="fixed"),
        "form": LinearLoss(fixed(), CLASSES, CLASSES),
    }
    criterion = losses[kind]
    for parameter in criterion.parameters():
        nn.init.zeros_(parameter)
    past_one(criterion, 0.0, epochs=5)
    assert not said
    past_one(criterion, 0.0, epochs=4)
    (text,) = said
    assert text.startswith("training has stalled: q has passed 1 (it is 1.05), and the mean probability of the labels")
    assert "still 0.05, where chance is 0.05" in text
    assert "pace='auto'" in text


def unsure() -> Tensor:
    """Of a network that is sure of one row and wrong about the others: what the mean is of more rows is open."""
    return logits(12.0) * torch.tensor([[1.0]] + [[-1.0]] * (ROWS - 1))


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (fixed, lambda: (logits(6.0), TARGET)),
        (lambda: DynamicsAwareLoss(total_steps=10), lambda: (logits(0.0), TARGET)),
        (lambda: fixed(q_end=1.0), lambda: (logits(0.0), TARGET)),
        (lambda: fixed(q_start=1.1), lambda: (logits(0.0), TARGET)),
        (fixed, lambda: (unsure(), TARGET)),
        (fixed, lambda: (logits(0.0), torch.full_like(TARGET, -100))),
        (fixed, lambda: (logits(0.0) * math.nan, TARGET)),
        (fixed, lambda: (logits(0.0)[:1], TARGET[:1])),
    ],
    ids=["learnt", "auto", "q below 1", "q from above 1", "by chance", "ignored", "nan", "one row"],
)
def test_no_stall_is_seen_where_there_is_none(make: Any, batch: Any, said: list[str]) -> None:
    criterion = make()
    for _ in range(9):
        criterion(*batch())
        criterion.step()
    assert not said


@pytest.mark.parametrize(
    ("target_prob", "q", "classes", "stalled"),
    [
        (0.0012, 1.01, 1000, True),
        (0.0012, 1.0, 1000, False),  # q has not passed 1
        (0.01, 1.5, 1000, False),
        (0.1, 1.05, 10, True),
        (0.17, 1.05, 10, False),  # 80 % of the labels are wrong, and all was learnt
        (0.55, 1.5, 2, False),
        (math.nan, 1.5, 1000, False),
        (0.001, math.nan, 1000, False),
    ],
)
def test_a_stall_is_told_from_noise(target_prob: float, q: float, classes: int, stalled: bool) -> None:
    assert (stall_message(target_prob, q, classes) is not None) == stalled


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_the_mean_of_a_batch_may_be_off_by_two_standard_errors(shape: tuple[int, ...]) -> None:
    prob = torch.tensor([0.1, 0.2, math.nan, 0.4, 0.7, 0.1])
    counted = prob[~prob.isnan()]
    most = counted.mean() + 2 * counted.std() / math.sqrt(5)
    torch.testing.assert_close(mean_and_most(prob.reshape(shape)), torch.stack([counted.mean(), most]))


@pytest.mark.parametrize("known", [True, False], ids=["classes known", "classes not known"])
def test_a_loss_of_slices_is_watched_too(known: bool, said: list[str], tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        criterion = fixed()
        whole: dict[str, Any] = {"class_offset": 0, "num_classes": CLASSES} if known else {}
        for _ in range(8):
            class_parallel_loss(criterion, logits(0.0), TARGET, **whole)
            criterion.step()
    finally:
        dist.destroy_process_group()
    assert len(said) == known


# --- what it costs


class Slow:
    """Numbers of a device that arrive when they are let."""

    arrived = False

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.event = (None for _ in ())  # not to be pickled, as an event of a device

    def look(self) -> list[float] | None:
        return self.numbers.tolist() if self.arrived else None


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    monkeypatch.setattr(watch, "Arrival", Slow)
    monkeypatch.setattr(Slow, "arrived", False)
    return Slow


@pytest.mark.parametrize("then", [train, lambda criterion: criterion.step()], ids=["call", "step"])
def test_what_is_under_way_is_looked_at_when_it_has_arrived(then: Any, said: list[str], slow: type[Slow]) -> None:
    criterion = fixed()
    past_one(criterion, 0.0)
    assert not said
    slow.arrived = True
    then(criterion)
    assert len(said) == 1


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the methods by which the host has looked at tensors, or moved them."""
    seen: list[str] = []

    def watched(name: str, plain: Any) -> Any:
        def read(*args: Any, **options: Any) -> Any:
            seen.append(name)
            return plain(*args, **options)

        return read

    for name in ("item", "tolist", "cpu", "numpy", "to", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
    return seen


@pytest.mark.parametrize("pace", ["fixed", "auto"])
@pytest.mark.usefixtures("slow")
def test_the_host_reads_no_more_than_without_the_watch(pace: Any, reads: list[str]) -> None:
    past_one(DynamicsAwareLoss(total_steps=10, pace=pace, watch=False), 0.0)
    unwatched = list(reads)
    reads.clear()
    past_one(DynamicsAwareLoss(total_steps=10, pace=pace), 0.0)
    assert reads == unwatched


def test_statistics_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, asked = fixed(), []
    told = criterion.told
    monkeypatch.setattr(criterion, "told", lambda *args: asked.append(criterion.schedule.q) or told(*args))
    past_one(criterion, 6.0)
    assert asked == [criterion.schedule.at(5)[0]]


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for(said: list[str]) -> None:
    criterion, inputs = fixed(), (logits(0.0).detach().cuda().requires_grad_(), TARGET.cuda())
    stall.Arrival(torch.zeros(2, device="cuda"))  # pinned memory is there
    criterion(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            criterion(*inputs)
            criterion.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    criterion(*inputs)
    assert len(said) == 1


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda criterion: pickle.loads(pickle.dumps(criterion))], ids=["deepcopy", "pickle"]
)
@pytest.mark.usefixtures("slow")
def test_a_copy_counts_on(duplicate: Any, said: list[str]) -> None:
    criterion = fixed()
    past_one(criterion, 0.0)  # and something is under way
    twin = duplicate(criterion)
    for _ in range(20):
        twin.step()
    assert len(said) == 1
    assert twin.state_dict().keys() == fixed(watch=False).state_dict().keys()
