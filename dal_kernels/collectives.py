"""The collectives of the losses. What goes wrong on one rank ends all of them, with one sentence."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed's ProcessGroup, or None for the default one

# Called all_gather_into_tensor before torch 2.13.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


# What gloo says of a rank that has ended or is silent, and NCCL.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed out|timeout"
    r"|remote process exited|network error|communicator was aborted",
    re.IGNORECASE,
)


def lost_rank_cause(error: RuntimeError) -> str | None:
    """What the error of a collective says of a rank that has ended or is silent; None if it is about another thing."""
    if not _LOST.search(str(error)):
        return None
    return re.sub(r"^\[[^]]*\] *", "", str(error).partition("\n")[0]).partition(". ")[0]


@contextmanager
def _all_must_answer(group: Group) -> Iterator[None]:
    """An error for want of another rank says so: where it comes from is of no use to who waits. Others pass."""
    try:
        yield
    except RuntimeError as error:
        cause = lost_rank_cause(error)
        if cause is None:
            raise
        raise RuntimeError(
            f"every rank of the group must answer in a collective of the loss, and rank {dist.get_rank(group)} of "
            f"{dist.get_world_size(group)} waited for one that has ended, failed or hangs: {cause}"
        ) from error


def gather_into(found: Tensor, values: Tensor, group: Group) -> None:
    """Write the values (n, ...) of each rank to ``found`` (R n, ...), in their order. All must have as many."""
    with _all_must_answer(group):
        _all_gather(found, values.contiguous(), group=group)


def gathered_rows(values: Tensor, group: Group) -> Tensor:
    """(R N, ...) of the (N, ...) of each rank, in their order. Every rank must have as many."""
    found = values.new_empty((dist.get_world_size(group) * values.shape[0], *values.shape[1:]))
    gather_into(found, values, group)
    return found


def scattered_sum(values: Tensor, group: Group) -> Tensor:
    """(N, ...) of the sum over the ranks of their (R N, ...): this rank's part of it."""
    own = values.new_empty((values.shape[0] // dist.get_world_size(group), *values.shape[1:]))
    with _all_must_answer(group):
        _reduce_scatter(own, values, group=group)
    return own


def sum_over_ranks(values: Tensor, group: Group) -> None:
    """Let the values be the sum of those of all ranks."""
    with _all_must_answer(group):
        dist.all_reduce(values, group=group)


def sendable(error: Exception) -> Exception:
    """An error as it can be sent to other ranks: of a type that is there on all of them."""
    if type(error) in (TypeError, ValueError):
        return error
    plain = RuntimeError(f"{type(error).__name__}: {error}")
    plain.__cause__ = error
    return plain


def raise_everywhere(problem: Exception | None, group: Group) -> None:
    """Raise on all ranks, which must all call this, the error of the first that has one; on none if none has."""
    problems = objects_of_ranks(problem, group)
    ranks = [rank for rank, error in enumerate(problems) if error is not None]
    if ranks:
        first = problems[ranks[0]]
        shared = len({str(error) for error in problems}) == 1
        raise type(first)(str(first) if shared else f"rank {ranks[0]} of the group: {first}") from problem


def rows_of_ranks(rows: int, same: Mapping[str, str], problem: Exception | None, group: Group) -> list[int]:
    """How many rows each rank has, by a small all-gather in which they tell that nothing is wrong with their calls.

    Args:
        same: what must be the same on every rank, by what an error calls it.
        problem: what is wrong with this rank's call.

    Raises:
        TypeError, ValueError, RuntimeError: the problem of a rank, or what is not the same; on all ranks.
    """
    checksum = -1 if problem is not None else zlib.crc32(repr(dict(same)).encode())
    headers = torch.empty((dist.get_world_size(group), 2), dtype=torch.int64, device="cpu")
    gather_into(headers.view(-1), torch.tensor([rows, checksum], device="cpu"), group)
    counts, checksums = headers.t().tolist()
    if min(checksums) < 0:
        raise_everywhere(problem, group)
    if len(set(checksums)) > 1:
        of_ranks = objects_of_ranks(dict(same), group)
        for name in same:
            values = [of_rank.get(name) for of_rank in of_ranks]
            if len(set(values)) > 1:
                raise ValueError(f"{name} must be the same on every rank, got {', '.join(map(str, values))}")
    return list(counts)


def objects_of_ranks(own: Any, group: Group) -> list[Any]:
    """What each rank gives, in their order. All must call this."""
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    with _all_must_answer(group):
        dist.all_gather_object(of_ranks, own, group=group)
    return of_ranks
