"""Batches of images, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler

from dal_kernels.training.data.base import Images
from dal_kernels.training.errors import UsageError
from dal_kernels.training.parallel import World

__all__ = ["Batch", "evaluation_loader", "stream", "training_loader"]

# Inputs (B, ...) float32, and which samples they are: (B,) int64.
Batch = tuple[Tensor, Tensor]


def stream(*use: str | int) -> int:
    """A seed for each use of random numbers, such as ("batches", seed).

    One seed for all would put the samples whose labels were flipped first in the first epoch's order. 32 bits, because
    PyTorch's generator on the CPU looks at no more.
    """
    return zlib.crc32(repr(use).encode())


class _ByBatch(Dataset[Batch]):
    """Images as a map-style data set that is asked for a batch at a time."""

    def __init__(self, images: Images, train: bool) -> None:
        self.images, self.train = images, train

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.images.batch(indices, self.train), torch.tensor(indices)


class _TrainingBatches(Sampler[list[int]]):
    """Batches of one process, of which the last takes in a sample that would be a batch alone.

    Batch normalisation cannot train on one sample, and a step by the gradient of one is as long as by that of a batch.
    """

    def __init__(self, sampler: DistributedSampler[int], batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size

    def _starts(self) -> list[int]:
        samples = len(self.sampler)
        starts = list(range(0, samples, self.batch_size))
        return starts[:-1] if samples > self.batch_size > 1 and samples % self.batch_size == 1 else starts

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[list[int]]:
        indices: list[int] = list(self.sampler)
        yield from (indices[start:end] for start, end in pairwise([*self._starts(), len(indices)]))


def _as_it_is(batch: Any) -> Any:
    return batch


def training_loader(images: Images, batch_size: int, seed: int, workers: int, world: World) -> DataLoader[Batch]:
    """This process's share of each batch; ``batch_sampler.sampler`` is to be told the epoch.

    Together the processes see the same batches as one process would, but for a last batch that would have one sample
    a process: that joins the one before it. Where the samples do not divide by the processes, the last batch has some
    twice.

    Raises:
        UsageError: the batch does not divide by the processes.
    """
    if batch_size % world.size:
        raise UsageError(f"batch_size must be a multiple of the {world.size} processes, got {batch_size}")
    data = _ByBatch(images, train=True)
    # The type says of what its data set is; indices are what it gives.
    sampler: DistributedSampler[Any] = DistributedSampler(data, world.size, world.rank, seed=stream("batches", seed))
    return _loader(data, _TrainingBatches(sampler, batch_size // world.size), workers, world)


def evaluation_loader(
    images: Images, indices: Tensor, batch_size: int, workers: int, world: World
) -> DataLoader[Batch]:
    """This process's share of the samples ``indices`` (N,), each once."""
    mine: list[int] = indices[world.rank :: world.size].tolist()
    return _loader(_ByBatch(images, train=False), BatchSampler(mine, batch_size, drop_last=False), workers, world)


def _loader(data: _ByBatch, batches: Sampler[list[int]], workers: int, world: World) -> DataLoader[Batch]:
    # Workers that live on to the next epoch would carry random numbers over, which no checkpoint could bring back.
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=world.device.type == "cuda",
    )
