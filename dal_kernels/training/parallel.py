"""One process or many: who am I, where do I compute, and sums over all."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from dal_kernels.collectives import lost_rank_cause
from dal_kernels.training.errors import UsageError

__all__ = ["World", "first_to_say", "join_world"]

T = TypeVar("T")
# How long a store is asked for that is there already, or nowhere.
STORE_PATIENCE = timedelta(seconds=10)


@dataclass(frozen=True)
class World:
    """This process among ``size``, and its device. The one of rank 0 writes files and prints."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values`` added up over the processes."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """The ``value`` of each process."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            distributed.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make``, called in the process of rank 0 alone, gives: a copy in each of the others.

        Raises:
            UsageError: ``make`` raised it; all processes do.
        """
        made: list[Any] = [None, None]
        if self.main:
            try:
                made[0] = make()
            except UsageError as error:
                made[1] = error
        if self.size > 1:
            distributed.broadcast_object_list(made, 0, device=self.device)
        result, refused = made
        if refused is not None:
            raise refused
        return result

    def wrap(self, network: nn.Module, sync_batch_norm: bool) -> nn.Module:
        """``network``, on the device already, such that its gradients are means over the processes.

        Raises:
            UsageError: batch normalisation cannot be synchronised on a CPU.
        """
        if self.size == 1:
            return network
        if sync_batch_norm:
            if self.device.type != "cuda":
                raise UsageError("sync_batch_norm needs GPUs, got device cpu; give --no-sync-batch-norm")
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return nn.parallel.DistributedDataParallel(network)

    @contextmanager
    def all_needed(self) -> Iterator[None]:
        """An error for want of another process says so, and how to go on; others pass.

        Raises:
            UsageError: a process has ended or cannot be reached.
        """
        try:
            yield
        except RuntimeError as error:
            cause = lost_rank_cause(error) if self.size > 1 else None
            if cause is None:
                raise
            raise UsageError(
                f"one of the {self.size} processes has ended or cannot be reached ({cause}); once all are started "
                "again, --resume goes on"
            ) from error

    def share_buffers(self, network: nn.Module) -> None:
        """Give all processes the buffers of the first: running statistics that are not synchronised drift apart."""
        if self.size > 1:
            for buffer in network.buffers():
                distributed.broadcast(buffer, 0)


def join_world(device: str) -> World:
    """Under torchrun the group of its processes, each with a GPU of its own if ``device`` is cuda; else this one alone.

    The group stays for the next call, and one that there was before is used.

    Raises:
        UsageError: the device cannot be used, or is one GPU for all processes.
    """
    parallel = distributed.is_torchelastic_launched()
    if parallel and device.startswith("cuda:"):
        raise UsageError(f"device must be cpu or cuda under torchrun, which is a GPU for each process, got {device!r}")
    if parallel and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        place = torch.device(device)
        torch.zeros((), device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if place.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    if not parallel:
        return World(0, 1, place)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave_group)  # not before: torchrun's processes can meet once only
    return World(distributed.get_rank(), distributed.get_world_size(), place)


def _leave_group() -> None:
    if distributed.is_initialized():
        # Networks in reference cycles go first, because the last owner of a gloo group must not be one of them: it
        # would hold the GIL while it waits for the group's threads, which may need it to free a tensor, for ever.
        gc.collect()
        distributed.destroy_process_group()


def first_to_say(message: str) -> bool:
    """Whether no other process of this torchrun has asked about the same; true for all if they have no common store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        store, _, _ = next(rendezvous("env://", timeout=STORE_PATIENCE))
        return bool(store.add(message, 1) == 1)
    except RuntimeError:  # the machine that has the store is gone: this may be what there is to say
        return True
