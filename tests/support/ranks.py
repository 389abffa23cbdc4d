"""Real processes over gloo that run the checks of a test module, each start all of them."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.children import PATIENCE

N, C = 24, 31
TOLERANCE = 2e-6


# Classes of each rank: even, uneven, and with empty slices at both ends or all but one.
SLICES = {
    2: [(16, 15), (30, 1), (0, 31), (31, 0)],
    4: [(8, 8, 8, 7), (1, 20, 3, 7), (0, 13, 0, 18), (0, 0, 31, 0)],
}


class Place:
    """This rank's part of all that one process would have."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.rank = dist.get_rank()
        self.offset, self.size = sum(sizes[: self.rank]), sizes[self.rank]
        self.told = {"class_offset": self.offset, "num_classes": sum(sizes)}

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.narrow(dim, self.offset, self.size).clone()


class Collectives(TorchDispatchMode):
    """Names of the collectives that run, and the bytes that each sends."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            sent = min(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            self.seen.append((func._schema.name.split("::")[1], sent))
        return func(*args, **(kwargs or {}))


def close(got: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def case(seed: int = 0, dtype: torch.dtype = torch.float32, classes: int = C) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(N, classes, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(classes, (N,), generator=generator)
    target[5::9] = -100
    return logits, target


def upstream_of(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)


def raises(message: str, call: Any, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        call()


def names_of(module: str) -> list[str]:
    """Of the checks of a module: its functions check_NAME(world)."""
    return [name for name in vars(sys.modules[module]) if name.startswith("check_")]


def _run(rank: int, world: int, module: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    importlib.import_module(module)
    for name in names_of(module):
        try:
            getattr(sys.modules[module], name)(world)
            failure = ""
        except BaseException:
            failure = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(failure)
        if failure:  # the other ranks may wait for this one for ever: nothing more can be said
            break
    dist.destroy_process_group()


def start(run: Any, arguments: tuple[Any, ...], world: int) -> list[Any]:
    """Processes of ``run(rank, *arguments)``, forked where they can be from one that has imported what all import."""
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    if method == "forkserver":
        mp.set_forkserver_preload(["torch.distributed.tensor", "dal_kernels", "pytest", "hypothesis"])
    return list(mp.start_processes(run, arguments, world, join=False, start_method=method).processes)


def run(module: str, world: int, folder: Path) -> None:
    """Run the checks of a module in ``world`` processes; each writes what went wrong to a file a check."""
    processes = start(_run, (world, module, str(folder)), world)
    for process in processes:
        process.join(PATIENCE)
        process.kill()


def report(name: str, world: int, folder: Path) -> None:
    """Fail where a rank's check did."""
    for rank in range(world):
        outcome = folder / f"{name}.{rank}"
        assert outcome.exists(), f"rank {rank} did not get here: see the checks before"
        if failure := outcome.read_text():
            pytest.fail(f"rank {rank}: {failure}", pytrace=False)


def finished_ranks(module: str) -> Any:
    """The fixture that runs the checks of a module once in two and once in four processes: (world, folder)."""

    @pytest.fixture(scope="module", params=[2, 4], ids=lambda world: f"{world} ranks")
    def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
        folder = tmp_path_factory.mktemp("ranks")
        run(module, request.param, folder)
        return request.param, folder

    return finished
