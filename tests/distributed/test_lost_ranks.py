"""A rank that is killed or hangs ends the others within the timeout of their process group, with one sentence."""

from __future__ import annotations

import datetime
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dal_kernels import ClassParallelLinear, CrossEntropyLoss
from dal_kernels.collectives import sum_over_ranks
from dal_kernels.distributed import class_parallel_loss
from support.children import PATIENCE
from support.ranks import start

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

TIMEOUT = 2  # seconds


def _linear(lose: Callable[[], None], backward: bool) -> None:
    form = ClassParallelLinear(CrossEntropyLoss(), 3, 8)
    features, target = torch.randn(5, 3, requires_grad=True), torch.arange(5)
    form(features, target).backward()
    loss: Any = form(features, target) if backward else None
    lose()
    if backward:
        loss.backward()
    else:
        form(features, target)


def _logits(lose: Callable[[], None], told: bool) -> None:
    logits: Tensor = torch.randn(5, 4)
    place: Any = {"class_offset": 4 * dist.get_rank(), "num_classes": 4 * dist.get_world_size()} if told else {}
    class_parallel_loss(CrossEntropyLoss(), logits, torch.arange(4).repeat(2)[:5], **place)
    lose()
    class_parallel_loss(CrossEntropyLoss(), logits, torch.arange(4).repeat(2)[:5], **place)


CALLS: dict[str, Callable[[Callable[[], None]], None]] = {
    "forward": lambda lose: _linear(lose, backward=False),
    "backward": lambda lose: _linear(lose, backward=True),
    "slices": lambda lose: _logits(lose, told=True),
    "untold slices": lambda lose: _logits(lose, told=False),
}


def _run(rank: int, world: int, call: str, how: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)

    def lose() -> None:
        if rank == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif rank == 1:
            time.sleep(PATIENCE)

    start = time.monotonic()
    try:
        CALLS[call](lose)
    except RuntimeError as error:
        Path(folder, str(rank)).write_text(f"{time.monotonic() - start} {error}")
    # Not by an ordinary exit, in which torch waits for threads of a group that is broken.
    os._exit(0)


@pytest.mark.xdist_group("ranks")
@pytest.mark.skipif(os.name != "posix", reason="a process is killed by a signal")
@pytest.mark.parametrize(
    ("call", "how", "world"),
    [
        ("forward", "killed", 2),
        ("forward", "killed", 4),
        ("forward", "hanging", 2),
        ("backward", "killed", 2),
        ("slices", "killed", 2),
        ("untold slices", "killed", 2),
    ],
)
def test_the_others_end_with_one_sentence(call: str, how: str, world: int, tmp_path: Path) -> None:
    processes = start(_run, (world, call, how, str(tmp_path)), world)
    for process in processes[:1] + processes[2:]:
        process.join(PATIENCE)
    for process in processes:
        process.kill()
    assert {path.name for path in tmp_path.iterdir()} - {"store"} == {str(rank) for rank in range(world) if rank != 1}
    for rank in set(range(world)) - {1}:
        seconds, _, message = (tmp_path / str(rank)).read_text().partition(" ")
        assert float(seconds) < 10 * TIMEOUT
        assert message.startswith(
            f"every rank of the group must answer in a collective of the loss, and rank {rank} of {world} waited for "
            "one that has ended, failed or hangs: "
        )
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:47523", True),
        ("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms for recv operation to complete", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("output tensor size must be equal to world_size times input tensor size", False),
        ("Invalid scalar type", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
    ],
)
def test_only_a_lost_rank_is_called_one(words: str, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with a call is not for want of another rank."""
    for name in ("get_rank", "get_world_size"):
        monkeypatch.setattr(dist, name, lambda group: 3)
    error = RuntimeError(words)

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(dist, "all_reduce", fails)
    with pytest.raises(RuntimeError) as raised:
        sum_over_ranks(torch.ones(2), None)
    if lost:
        assert str(raised.value).startswith("every rank of the group must answer in a collective of the loss")
        assert raised.value.__cause__ is error
    else:
        assert raised.value is error
