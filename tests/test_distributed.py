"""Classes split over ranks give what one process gives. Real processes over gloo; each start runs all its checks."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from children import PATIENCE
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dal_kernels import distributed, dynamics_aware_loss, exchange, linear_dynamics_aware_loss
from dal_kernels.distributed import (
    class_parallel_dynamics_aware_loss,
    class_parallel_linear_dynamics_aware_loss,
)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

N, D, C = 24, 12, 31
# Classes of each rank: even, uneven, and with empty slices at both ends or all but one.
SLICES = {
    2: [(16, 15), (30, 1), (0, 31), (31, 0)],
    4: [(8, 8, 8, 7), (1, 20, 3, 7), (0, 13, 0, 18), (0, 0, 31, 0)],
}
TOLERANCE = 2e-6


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


class Place:
    """This rank's part of all that one process would have."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.rank = dist.get_rank()
        self.offset, self.size = sum(sizes[: self.rank]), sizes[self.rank]
        self.told = {"class_offset": self.offset, "num_classes": sum(sizes)}

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.narrow(dim, self.offset, self.size).clone()


def upstream_of(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)


def same_bits_everywhere(value: Tensor) -> None:
    every = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(every, value)
    assert all(torch.equal(other.nan_to_num(7.0), value.nan_to_num(7.0)) for other in every)


def check_matches_one_process(world: int) -> None:
    weight = torch.linspace(0.1, 2.0, C)
    every = itertools.product(SLICES[world], ("mean", "sum", "none"), ("soft", "hard"), ("cpu", "eager"))
    for index, (sizes, reduction, bootstrap, backend) in enumerate(every):
        place = Place(sizes)
        logits, target = case(index)
        options: dict[str, Any] = {"reduction": reduction, "bootstrap": bootstrap, "return_stats": index % 3 == 0}
        options["weight"] = weight if index % 2 else None
        whole = logits.clone().requires_grad_()
        expected = dynamics_aware_loss(whole, target, 0.8, 0.6, backend=backend, **options)
        local = place.of(logits, 1).requires_grad_()
        told = place.told if index % 5 else {}
        got = class_parallel_dynamics_aware_loss(local, target, 0.8, 0.6, backend=backend, **told, **options)
        if options["return_stats"]:
            (expected, true_stats), (got, stats) = expected, got
            close(stats, true_stats)
            assert torch.equal(stats.prediction, true_stats.prediction)
        close(got, expected)
        same_bits_everywhere(got.detach())
        got.backward(upstream_of(got))
        expected.backward(upstream_of(expected))
        close(local.grad, place.of(whole.grad, 1))


def check_dtypes_and_shapes(world: int) -> None:
    place = Place(SLICES[world][1])
    for dtype, tolerance in (
        (torch.float64, 1e-12),
        (torch.bfloat16, 8e-3),
        (torch.float16, 1e-3),
    ):
        logits, target = case(3, dtype)
        whole, local = logits.clone().requires_grad_(), place.of(logits, 1).requires_grad_()
        expected, got = (
            dynamics_aware_loss(whole, target, 0.8, 0.6),
            class_parallel_dynamics_aware_loss(local, target, 0.8, 0.6, **place.told),
        )
        close(got, expected)
        got.backward()
        expected.backward()
        close(local.grad, place.of(whole.grad, 1), tolerance)
    for shape in ((C,), (3, C, 2), (0, C)):
        dim = int(len(shape) > 1)
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        target = torch.full(shape[:dim] + shape[dim + 1 :], 4)
        whole, local = logits.clone().requires_grad_(), place.of(logits, dim).requires_grad_()
        for reduction in ("mean", "none"):
            expected, got = (
                dynamics_aware_loss(whole, target, 0.8, 0.6, reduction=reduction),
                class_parallel_dynamics_aware_loss(local, target, 0.8, 0.6, reduction=reduction),
            )
            close(got, expected)
            (of_whole,) = torch.autograd.grad(expected, whole, upstream_of(expected))
            (of_local,) = torch.autograd.grad(got, local, upstream_of(got))
            close(of_local, place.of(of_whole, dim))


def check_hard_rows(world: int) -> None:
    """Ties over slices, masked slices, NaN, infinities, all rows ignored, large logits."""
    sizes = SLICES[world][0]
    place = Place(sizes)
    logits, target = case(4)
    logits[0] = 0.0
    logits[1, [2, 17, 30]] = 50.0
    logits[2, :20] = -torch.inf
    target[2], target[3] = 25, 2
    logits[3, 20:] = -torch.inf
    logits[4, 28] = torch.nan
    logits[6, 9] = torch.inf
    logits[7] = -torch.inf
    logits[8] += 1e4
    logits[9] = torch.where(torch.arange(C) % 2 == 0, 1e4, -1e4)
    for bootstrap, backend in itertools.product(("soft", "hard"), ("cpu", "eager")):
        whole, local = logits.clone().requires_grad_(), place.of(logits, 1).requires_grad_()
        options: dict[str, Any] = {"reduction": "none", "bootstrap": bootstrap, "return_stats": True}
        expected, true_stats = dynamics_aware_loss(whole, target, 1.2, 0.6, backend="eager", **options)
        got, stats = class_parallel_dynamics_aware_loss(local, target, 1.2, 0.6, backend=backend, **options)
        assert stats.prediction.tolist() == logits.argmax(1).tolist()
        close(got, expected, 5e-6)
        close(stats, true_stats, 5e-6)
        got.sum().backward()
        expected.sum().backward()
        close(local.grad, place.of(whole.grad, 1))
    ignored = torch.full_like(target, -100)
    local = place.of(logits, 1).nan_to_num(0.0, 0.0, 0.0).requires_grad_()
    loss = class_parallel_dynamics_aware_loss(local, ignored, 0.7, **place.told)
    loss.backward()
    assert loss.isnan()
    assert not local.grad.any()


def check_collectives(world: int) -> None:
    place = Place(SLICES[world][0])
    logits, target = case(5)
    for bootstrap, reduction, return_stats in itertools.product(("soft", "hard"), ("mean", "none"), (False, True)):
        local = place.of(logits, 1).requires_grad_()
        options = {"bootstrap": bootstrap, "reduction": reduction, "return_stats": return_stats}
        with Collectives() as forward:
            got = class_parallel_dynamics_aware_loss(local, target, 0.8, 0.6, **place.told, **options)
        (sent,) = [size for _, size in forward.seen]
        floats = 4 + return_stats
        assert sent == 4 * floats * (N + 1)
        assert return_stats or sent <= 4 * 5 * N
        loss = got[0] if return_stats else got
        with Collectives() as backward:
            loss.sum().backward()
        assert backward.seen == []
    with Collectives() as untold:
        class_parallel_dynamics_aware_loss(local.detach(), target, 0.8)
    assert [size for _, size in untold.seen] == [16, 4 * 4 * (N + 1)]


def check_linear(world: int) -> None:
    generator = torch.Generator().manual_seed(6)
    x, classifier, bias = (torch.randn(shape, generator=generator) for shape in ((N, D), (C, D), (C,)))
    _, target = case(6)
    every = itertools.product(SLICES[world][:3], ("mean", "none"), ("soft", "hard"), ("cpu", "eager"), (True, False))
    for sizes, reduction, bootstrap, backend, with_bias in every:
        place = Place(sizes)
        whole = [tensor.clone().requires_grad_() for tensor in (x, classifier, bias)][: 2 + with_bias]
        local = [x.clone(), place.of(classifier, 0), place.of(bias, 0)][: 2 + with_bias]
        local = [tensor.requires_grad_() for tensor in local]
        options: dict[str, Any] = {"reduction": reduction, "bootstrap": bootstrap, "backend": backend}
        rows = dict(zip(("bias",), whole[2:], strict=False))
        expected = linear_dynamics_aware_loss(*whole[:2], target, 0.8, 0.6, **rows, **options)
        rows = dict(zip(("bias",), local[2:], strict=False))
        with Collectives() as forward:
            got = class_parallel_linear_dynamics_aware_loss(
                *local[:2], target, 0.8, 0.6, **rows, **options, **place.told, chunk_bytes=4 * 7 * max(sizes)
            )
        close(got, expected)
        same_bits_everywhere(got.detach())
        with Collectives() as backward:
            of_local = torch.autograd.grad(got, local, upstream_of(got))
        assert [len(forward.seen), [name for name, _ in backward.seen]] == [1, ["allreduce_"]]
        of_whole = torch.autograd.grad(expected, whole, upstream_of(expected))
        same_bits_everywhere(of_local[0])
        close(of_local[0], of_whole[0], 1e-5)
        for mine, all_of in zip(of_local[1:], of_whole[1:], strict=True):
            close(mine, place.of(all_of, 0), 1e-5)
    local[0].requires_grad_(False)
    with Collectives() as seen:
        class_parallel_linear_dynamics_aware_loss(local[0], local[1], target, 0.8, **place.told).backward()
    assert len(seen.seen) == 1


def raises(message: str, call: Any, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        call()


def check_errors(world: int) -> None:
    place = Place(SLICES[world][0])
    logits, target = case(7)
    local = place.of(logits, 1).requires_grad_()

    def call(labels: Tensor = target, z: Any = local, **changes: Any) -> Tensor:
        return class_parallel_dynamics_aware_loss(z, labels, 0.8, 0.6, **{**place.told, **changes})

    everywhere = target.clone()
    everywhere[3] = C
    raises(f"target at row 3 is {C}", lambda: call(everywhere))
    mine = target.clone()
    mine[3] = place.rank
    raises("target must be the same on every rank", lambda: call(mine))
    raises("class_offset and num_classes must be those of slices that follow", lambda: call(num_classes=C + 1))
    raises("class_offset and num_classes must be given both", lambda: call(num_classes=None))
    raises("class_offset must be such that", lambda: call(num_classes=place.size - 1, class_offset=0))
    raises("class_offset must be an int, got float", lambda: call(class_offset=1.0), TypeError)
    raises("local_logits must be a tensor", lambda: call(z=None), TypeError)
    raises("local_logits must have shape", lambda: call(z=torch.tensor(0.0)))
    raises("target must have as many labels on every rank", lambda: class_parallel_dynamics_aware_loss(
        local[place.rank:], target[place.rank:], 0.8))  # fmt: skip
    raises("target must have shape", lambda: call(target[1:]))
    raises("together", lambda: class_parallel_dynamics_aware_loss(local[:, :0], target, 0.8))
    others = dist.new_group([0])
    if place.rank:
        raises("group must be one that this rank belongs to", lambda: call(group=others))
    loss = call(group=dist.new_group(list(range(world))))
    (gradient,) = torch.autograd.grad(loss, local, create_graph=True)
    raises("second derivative", gradient.square().sum().backward, RuntimeError)


def check_where_looking_would_cost_a_synchronisation(world: int) -> None:
    """As on a GPU: what a CPU raises for becomes NaN, of the row or of everything."""
    place = Place(SLICES[world][1])
    logits, target = case(7)
    look = exchange.agreement
    with (
        mock.patch.object(distributed, "raise_for_labels"),
        mock.patch.object(exchange, "agreement", lambda header, _: look(header, False)),
    ):

        def outcome(labels: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
            local = place.of(logits, 1).requires_grad_()
            options = {**place.told, "reduction": "none", **changes}
            loss = class_parallel_dynamics_aware_loss(local, labels, 0.8, 0.6, **options)
            loss.sum().backward()
            return loss.isnan(), local.grad.isnan()

        for label in (C, C + 7, -1, -5):
            nobodys = target.clone()
            nobodys[3] = label
            row = torch.arange(N) == 3
            lost, lost_gradient = outcome(nobodys)
            assert torch.equal(lost, row)
            assert torch.equal(lost_gradient, row.unsqueeze(1).expand(N, place.size))
        mine = target.clone()
        mine[3] = place.rank
        for lost, lost_gradient in (outcome(mine), outcome(target, num_classes=C + 1)):
            counted = target != -100
            assert lost[counted].all()
            assert lost_gradient[counted].all()


def check_dtensors(world: int) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    line = init_device_mesh("cpu", (world,))
    plane = init_device_mesh("cpu", (2, world // 2))
    logits, target = case(9)
    weight = torch.linspace(0.1, 2.0, C)
    q = torch.linspace(0.5, 1.5, N)
    placed = [(line, (Shard(1),)), (line, (Shard(-1),)), (line, (Shard(0),)), (line, (Replicate(),))]
    placed += [(plane, (Shard(0), Shard(1))), (plane, (Shard(1), Shard(0))), (plane, (Replicate(), Shard(1)))]
    placed += [(plane, (Shard(0), Shard(0)))]
    for (mesh, placements), reduction in itertools.product(placed, ("mean", "sum", "none")):
        of_rows = [p if p == Shard(0) else Replicate() for p in placements]

        def mine(value: Tensor, mesh: Any = mesh, of_rows: Any = of_rows) -> Any:
            return distribute_tensor(value, mesh, of_rows, src_data_rank=None)

        for bootstrap, plain in (("soft", False), ("hard", True)):
            whole = logits.clone().requires_grad_()
            options: dict[str, Any] = {"weight": weight, "reduction": reduction, "bootstrap": bootstrap}
            expected, true_stats = dynamics_aware_loss(whole, target, q, 0.6, return_stats=True, **options)
            split = distribute_tensor(logits, mesh, placements, src_data_rank=None).requires_grad_()
            labels, exponents = (mine(value).to_local() if plain else mine(value) for value in (target, q))
            got, stats = dynamics_aware_loss(split, labels, exponents, 0.6, return_stats=True, **options)
            assert type(got) is Tensor
            close(got, mine(expected.detach()).to_local() if reduction == "none" else expected)
            close(stats.target_prob, mine(true_stats.target_prob).to_local())
            assert torch.equal(stats.prediction, mine(true_stats.prediction).to_local())
            expected.backward(upstream_of(expected))
            got.backward(mine(upstream_of(expected)).to_local() if reduction == "none" else None)
            factor = 1.0 if reduction == "none" else upstream_of(expected).item()
            assert isinstance(split.grad, DTensor)
            assert split.grad.placements == split.placements
            close(split.grad.full_tensor() * factor, whole.grad)
    split = distribute_tensor(logits, line, (Shard(1),), src_data_rank=None)
    with Collectives() as seen:
        dynamics_aware_loss(split, target, 0.8)
    assert len(seen.seen) == 1
    ignored = torch.full_like(target, -100)
    split = distribute_tensor(logits, line, (Shard(0),), src_data_rank=None).requires_grad_()
    loss = dynamics_aware_loss(split, distribute_tensor(ignored, line, (Shard(0),), src_data_rank=None), 0.8)
    loss.backward()
    assert loss.isnan()
    assert not split.grad.to_local().any()
    single = distribute_tensor(logits[0], line, (Shard(0),), src_data_rank=None)
    close(dynamics_aware_loss(single, target[0], 0.8), dynamics_aware_loss(logits[0], target[0], 0.8))
    deep = distribute_tensor(logits.reshape(4, C, 6), line, (Shard(2),), src_data_rank=None)
    raises(
        r"input must be a DTensor with.*Shard\(dim=2\)", lambda: dynamics_aware_loss(deep, target.reshape(4, 6), 0.8)
    )
    partial = DTensor.from_local(logits, line, (Partial(),))
    raises("input must be a DTensor with.*Partial", lambda: dynamics_aware_loss(partial, target, 0.8))
    twice = distribute_tensor(logits, plane, (Shard(1), Shard(1)), src_data_rank=None)
    raises("input must be a DTensor with", lambda: dynamics_aware_loss(twice, target, 0.8))
    elsewhere = distribute_tensor(target, plane, (Replicate(), Replicate()), src_data_rank=None)
    raises("target must be on the mesh of input", lambda: dynamics_aware_loss(split, elsewhere, 0.8))
    message = "classifier_weight must be a plain tensor, got a DTensor"
    raises(message, lambda: linear_dynamics_aware_loss(torch.ones(N, C), split, target, 0.8), TypeError)


def check_training(world: int) -> None:
    """A classifier split over the ranks learns what one process learns, bit by bit of tolerance."""
    place = Place(SLICES[world][1])
    generator = torch.Generator().manual_seed(8)
    x, classifier = torch.randn(N, D, generator=generator), torch.randn(C, D, generator=generator)
    _, target = case(8)
    whole, local = classifier.clone().requires_grad_(), place.of(classifier, 0).requires_grad_()
    for step in range(5):
        q = 0.6 + 0.2 * step
        loss = dynamics_aware_loss(F.linear(x, whole), target, q, 0.1 * step)
        mine = class_parallel_dynamics_aware_loss(F.linear(x, local), target, q, 0.1 * step)
        close(mine, loss)
        for leaf, value in ((whole, loss), (local, mine)):
            (gradient,) = torch.autograd.grad(value, leaf)
            leaf.data.add_(gradient, alpha=-1.0)
    close(local.detach(), place.of(whole.detach(), 0), 1e-5)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for name, check in CHECKS.items():
        try:
            check(world)
            failure = ""
        except BaseException:
            failure = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(failure)
        if failure:  # the other ranks may wait for this one for ever: nothing more can be said
            break
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=lambda world: f"{world} ranks")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(run_rank, args=(request.param, str(folder)), nprocs=request.param, join=False)
    for process in context.processes:
        process.join(PATIENCE)
        process.kill()
    return folder, request.param


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", CHECKS)
def test_every_rank(finished: tuple[Path, int], name: str) -> None:
    folder, world = finished
    for rank in range(world):
        outcome = folder / f"{name}.{rank}"
        assert outcome.exists(), f"rank {rank} did not get here: see the checks before"
        if failure := outcome.read_text():
            pytest.fail(f"rank {rank}: {failure}", pytrace=False)


def test_without_a_group_there_is_nothing_to_split_over() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        class_parallel_dynamics_aware_loss(torch.randn(3, 4), torch.zeros(3, dtype=torch.long), 0.7)


def test_the_example_learns() -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks.split_classes"]
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    found = re.search(r"2 processes, 101 classes: training accuracy ([\d.]+)%", result.stdout)
    assert found, result.stderr[-3000:]
    assert float(found[1]) > 70
