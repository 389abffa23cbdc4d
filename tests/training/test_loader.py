"""Batches of a seed and an epoch, over processes, and what is counted in them."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from dal_kernels.training import UsageError
from dal_kernels.training.data.base import TensorImages
from dal_kernels.training.loader import evaluation_loader, stream, training_loader
from dal_kernels.training.metrics import count_hits, share
from dal_kernels.training.parallel import World
from support.trainings import ALONE, needs_training

needs_training()


CPU = torch.device("cpu")


def indices(loader: Any, epoch: int | None = None) -> list[list[int]]:
    if epoch is not None:
        loader.set_epoch(epoch)
    return [batch.tolist() for _, batch in loader]


@pytest.mark.parametrize(("samples", "processes"), [(24, 2), (23, 2), (24, 4)])
def test_processes_share_the_batches_of_one(samples: int, processes: int) -> None:
    images = TensorImages(torch.arange(samples).float())
    whole = indices(training_loader(images, 8, 0, 0, ALONE), epoch=3)
    shares = [
        indices(training_loader(images, 8, 0, 0, World(rank, processes, CPU)), epoch=3) for rank in range(processes)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part) for part in parts} == {-(-len(batch) // processes)}
        together = list(chain(*parts))
        assert set(batch) <= set(together)
        assert len(together) - len(batch) == -len(batch) % processes
    evaluated = [
        indices(evaluation_loader(images, torch.arange(5, samples), 4, 0, World(rank, processes, CPU)))
        for rank in range(processes)
    ]
    assert sorted(chain(*chain(*evaluated))) == list(range(5, samples))


@pytest.mark.parametrize(
    ("samples", "batch_size", "processes", "sizes"),
    [
        (25, 8, 1, [8, 8, 9]),
        (26, 8, 1, [8, 8, 8, 2]),
        (24, 8, 1, [8, 8, 8]),
        (9, 8, 1, [9]),
        (26, 8, 2, [4, 4, 5]),
        (25, 8, 2, [4, 4, 5]),
        (27, 8, 2, [4, 4, 4, 2]),
        (1, 8, 1, [1]),
        (3, 1, 1, [1, 1, 1]),
    ],
)
def test_a_last_sample_alone_joins_the_batch_before(
    samples: int, batch_size: int, processes: int, sizes: list[int]
) -> None:
    images = TensorImages(torch.arange(samples).float())
    loaders = [training_loader(images, batch_size, 0, 0, World(rank, processes, CPU)) for rank in range(processes)]
    batches = [indices(loader, epoch=1) for loader in loaders]
    assert [[len(batch) for batch in part] for part in batches] == [sizes] * processes
    assert [len(loader) for loader in loaders] == [len(sizes)] * processes
    assert set(chain(*chain(*batches))) == set(range(samples))


def test_batches_follow_the_seed_and_the_epoch() -> None:
    images = TensorImages(torch.arange(24).float())
    orders = [indices(training_loader(images, 24, seed, 0, ALONE), epoch)[0] for seed in (0, 1) for epoch in (1, 2)]
    assert len(set(map(tuple, orders))) == 4
    assert indices(training_loader(images, 24, 0, 0, ALONE), 2)[0] == orders[1]


def test_a_batch_must_divide_by_the_processes() -> None:
    with pytest.raises(UsageError, match="batch_size must be a multiple of the 2 processes, got 5"):
        training_loader(TensorImages(torch.zeros(9)), 5, 0, 0, World(0, 2, CPU))


def test_streams_do_not_meet() -> None:
    uses = [(use, seed, epoch) for use in ("batches", "weights", "epoch") for seed in range(20) for epoch in range(100)]
    assert len({stream(*use) for use in uses}) == len(uses)
    assert max(stream(*use) for use in uses) < 2**32


@pytest.mark.parametrize(
    ("prediction", "memorised", "right"),
    [
        # the wrong labels are of samples 1 to 4: given 2, 2, 0, 0 for 1, 1, 2, 2
        ([0, 2, 2, 0, 0], 4, 0),
        ([0, 1, 1, 2, 2], 0, 4),
        ([9, 2, 1, 1, 1], 1, 1),
        ([1, 1, 1, 2, 0], 1, 3),
    ],
)
def test_hits_are_counted_in_evaluation_mode_and_the_mode_is_restored(
    prediction: list[int], memorised: int, right: int
) -> None:
    given, true = torch.tensor([0, 2, 2, 0, 0]), torch.tensor([0, 1, 1, 2, 2])
    images = TensorImages(nn.functional.one_hot(torch.tensor(prediction), 10).float())
    model = nn.Sequential(nn.Dropout(0.9)).train()
    loader = evaluation_loader(images, torch.arange(1, 5), 3, 0, ALONE)
    assert count_hits(model, loader, given, true).tolist() == [memorised, right, 4]
    assert model.training


def test_a_share_of_nothing_is_nan() -> None:
    assert math.isnan(share(0, 0))
    assert share(1, 4) == 0.25
