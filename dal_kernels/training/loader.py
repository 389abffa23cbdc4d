"""Batches of images, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler

from dal_kernels.training.data.base import EncodedImages, FileImages, Images, UnreadableError
from dal_kernels.training.errors import UsageError
from dal_kernels.training.parallel import World

__all__ = [
    "Batches",
    "evaluation_loader",
    "first_input",
    "held_out",
    "skipped_in_words",
    "stream",
    "training_loader",
]

# Inputs (B, ...) float32, which samples they are, (B,) int64, and which could not be read, with the reasons.
Batch = tuple[Tensor, Tensor, dict[int, str]]


def stream(*use: str | int) -> int:
    """A seed for each use of random numbers, such as ("batches", seed).

    One seed for all would put the samples whose labels were flipped first in the first epoch's order. 32 bits, because
    PyTorch's generator on the CPU looks at no more.
    """
    return zlib.crc32(repr(use).encode())


def held_out(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Which of ``count`` samples are held out, at random, and which are trained on, each in order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(stream("validation", seed)))
    held = round(fraction * count)
    return order[:held].sort().values, order[held:].sort().values


class _ByBatch(Dataset[Batch]):
    """Images as a map-style data set that is asked for a batch at a time, of those ``kept`` (N,), or of all."""

    def __init__(self, images: Images, train: bool, kept: Tensor | None = None) -> None:
        self.images, self.train, self.kept = images, train, kept

    def __len__(self) -> int:
        return len(self.images) if self.kept is None else len(self.kept)

    def __getitems__(self, places: list[int]) -> Batch:
        indices = places if self.kept is None else self.kept[places].tolist()
        try:
            return self.images.batch(indices, self.train), torch.tensor(indices), {}
        except UnreadableError:
            if not (isinstance(self.images, EncodedImages) and self.images.skip):
                raise
        return self._readable(places)

    def _readable(self, places: list[int]) -> Batch:
        """Without those that cannot be read. In training the next one that can be takes the place of each, because the
        batches of all processes must stay of one size, and batch normalisation needs two samples.
        """
        inputs, indices, broken = [], [], dict[int, str]()
        for place in places:
            for further in range(len(self) if self.train else 1):
                at = (place + further) % len(self)
                index = at if self.kept is None else int(self.kept[at])
                try:
                    inputs.append(self.images.batch([index], self.train))
                    indices.append(index)
                    break
                except UnreadableError as error:
                    broken[index] = str(error)
        if not inputs and self.train:
            raise UsageError(f"none of the {len(self)} images can be read; the first: {next(iter(broken.values()))}")
        return torch.cat(inputs) if inputs else torch.empty(0), torch.tensor(indices, dtype=torch.long), broken


class Batches:
    """Pairs of inputs (B, ...) float32 and which samples they are (B,) int64, in batches of which none is empty.

    Attributes:
        unreadable: samples that could not be read so far, and why.
    """

    def __init__(self, loader: DataLoader[Batch], order: DistributedSampler[Any] | None = None) -> None:
        self._loader, self._order = loader, order
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        """Of training batches, the order that the epoch has them in."""
        assert self._order is not None
        self._order.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, indices, broken in self._loader:
            self.unreadable |= broken
            if len(indices):
                yield inputs, indices


def skipped_in_words(parts: Iterable[tuple[Images, Collection[int]]]) -> list[str]:
    """How many samples could not be read, files that are missing apart from those that are broken.

    Args:
        parts: images, and which of them could not be read.
    """
    missing, files, broken = [], 0, 0
    for images, indices in parts:
        lost = images.missing(indices) if isinstance(images, FileImages) else []
        missing += lost
        files += len(images) if isinstance(images, FileImages) else 0
        broken += len(indices) - len(lost)
    words = [f"{len(missing)} of {files} files are missing (the first is {missing[0]})"] if missing else []
    return words + ([f"{broken} images could not be read"] if broken else [])


def first_input(images: Images) -> Tensor:
    """The first input (...) that can be read."""
    data = _ByBatch(images, train=False)
    for index in range(len(images)):
        inputs, _, broken = data.__getitems__([index])
        if not broken:
            return inputs[0]
    raise UsageError(f"none of the {len(images)} samples can be read")


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


def training_loader(
    images: Images, batch_size: int, seed: int, workers: int, world: World, kept: Tensor | None = None
) -> Batches:
    """This process's share of each batch of the samples ``kept`` (N,), or of all; it is to be told the epoch.

    Together the processes see the same batches as one process would, but for a last batch that would have one sample
    a process: that joins the one before it. Where the samples do not divide by the processes, the last batch has some
    twice.

    Raises:
        UsageError: the batch does not divide by the processes.
    """
    if batch_size % world.size:
        raise UsageError(f"batch_size must be a multiple of the {world.size} processes, got {batch_size}")
    data = _ByBatch(images, True, kept)
    # The type says of what its data set is; indices are what it gives.
    sampler: DistributedSampler[Any] = DistributedSampler(data, world.size, world.rank, seed=stream("batches", seed))
    return Batches(_loader(data, _TrainingBatches(sampler, batch_size // world.size), workers, world), sampler)


def evaluation_loader(images: Images, indices: Tensor, batch_size: int, workers: int, world: World) -> Batches:
    """This process's share of the samples ``indices`` (N,), each once but those that cannot be read."""
    share: list[int] = indices[world.rank :: world.size].tolist()
    batches = BatchSampler(share, batch_size, drop_last=False)
    return Batches(_loader(_ByBatch(images, train=False), batches, workers, world))


def _loader(data: _ByBatch, batches: Sampler[list[int]], workers: int, world: World) -> DataLoader[Batch]:
    # Workers that live on to the next epoch would carry random numbers over, which no checkpoint could bring back.
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=world.device.type == "cuda",
    )
