"""Classes split over ranks give what one process gives. Real processes over gloo; each start runs all its checks."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import (
    ActivePassiveLoss,
    CrossEntropyLoss,
    DynamicsAwareLoss,
    EpsilonSoftmaxLoss,
    JointAsymmetricLoss,
    SymmetricCrossEntropyLoss,
    dynamics_aware_loss,
    linear_dynamics_aware_loss,
    linear_loss,
    row_statistics,
)
from dal_kernels.distributed import (
    class_parallel_dynamics_aware_loss,
    class_parallel_linear_dynamics_aware_loss,
    class_parallel_linear_loss,
    class_parallel_loss,
    class_parallel_row_statistics,
)
from support.axes import BOOTSTRAPS, REDUCTIONS
from support.children import ROOT, torchrun
from support.ranks import SLICES, C, Collectives, N, Place, case, close, finished_ranks, names_of, report, upstream_of

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

D = 12


def same_bits_everywhere(value: Tensor) -> None:
    every = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(every, value)
    assert all(torch.equal(other.nan_to_num(7.0), value.nan_to_num(7.0)) for other in every)


def check_matches_one_process(world: int) -> None:
    weights = (None, torch.linspace(0.1, 2.0, C))
    cases = itertools.product(SLICES[world], REDUCTIONS, BOOTSTRAPS, ("cpu", "eager"), weights)
    for index, (sizes, reduction, bootstrap, backend, weight) in enumerate(cases):
        place = Place(sizes)
        logits, target = case(index)
        # Statistics, and slices that a rank is told, turn with the case: they meet each of the others.
        options: dict[str, Any] = {"reduction": reduction, "bootstrap": bootstrap, "return_stats": index % 3 == 0}
        options["weight"] = weight
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


def check_losses_of_the_family(world: int) -> None:
    """One of each kind: of l alone, with H, M, G, and with G and Q; by kernels and by plain operations."""
    place = Place(SLICES[world][0])
    losses: list[Any] = [
        SymmetricCrossEntropyLoss(),
        DynamicsAwareLoss(total_steps=4, pace="fixed"),
        EpsilonSoftmaxLoss(m=10.0, beta=0.5),
        ActivePassiveLoss(weight=torch.linspace(0.1, 2.0, C)),
        JointAsymmetricLoss(reduction="none"),
        CrossEntropyLoss(label_smoothing=0.1),
    ]
    for index, loss in enumerate(losses):
        loss.backend = "eager" if index % 2 else "cpu"
        logits, target = case(index)
        whole, local = logits.clone().requires_grad_(), place.of(logits, 1).requires_grad_()
        expected, true_stats = loss(whole, target, return_stats=True)
        got, stats = class_parallel_loss(loss, local, target, return_stats=True)
        close(got, expected, 1e-5)
        close(stats, true_stats, 1e-5)
        got.backward(upstream_of(got))
        expected.backward(upstream_of(expected))
        close(local.grad, place.of(whole.grad, 1), 1e-5)
        torch.manual_seed(0)
        features, layer = torch.randn(N, 6, requires_grad=True), torch.nn.Linear(6, C)
        local_weight, local_bias = (place.of(of.detach(), 0).requires_grad_() for of in (layer.weight, layer.bias))
        expected = linear_loss(loss, features, layer.weight, target, linear_bias=layer.bias)
        got = class_parallel_linear_loss(
            loss, features, local_weight, target, linear_bias=local_bias, chunk_bytes=C * 4 * 7
        )
        close(got, expected, 1e-5)
        of_one = torch.autograd.grad(expected, (features, layer.weight, layer.bias), upstream_of(expected))
        of_rank = torch.autograd.grad(got, (features, local_weight, local_bias), upstream_of(got))
        close(of_rank, (of_one[0], *(place.of(of, 0) for of in of_one[1:])), 1e-5)


def check_row_statistics(world: int) -> None:
    place = Place(SLICES[world][1])
    for backend in ("cpu", "eager"):
        logits, target = case(2)
        whole, local = logits.clone().requires_grad_(), place.of(logits, 1).requires_grad_()
        gradients = []
        for leaf, row in (
            (whole, row_statistics(whole, target, backend=backend)),
            (local, class_parallel_row_statistics(local, target, backend=backend)),
        ):
            known = target != -100
            loss = (torch.where(known, -row.log_prob * row.square_sum, 0.0) + row.entropy - row.max_log_prob)[known]
            gradients.append(torch.autograd.grad((loss + 0.01 * row.sum_log_prob[known]).sum(), leaf)[0])
        close(gradients[1], place.of(gradients[0], 1), 1e-5)


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


finished = finished_ranks(__name__)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", names_of(__name__))
def test_every_rank(finished: tuple[int, Path], name: str) -> None:
    report(name, *finished)


def test_without_a_group_there_is_nothing_to_split_over() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        class_parallel_dynamics_aware_loss(torch.randn(3, 4), torch.zeros(3, dtype=torch.long), 0.7)


def test_the_example_learns() -> None:
    result = torchrun("-m", "benchmarks.split_classes")
    found = re.search(r"2 processes, 101 classes: training accuracy ([\d.]+)%", result.stdout)
    assert found, result.stderr[-3000:]
    assert float(found[1]) > 70


def test_the_page_on_distributed_training_has_a_script_that_trains(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(# torchrun .*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL)
    shown = "print(f'loss {loss.item():.6f}')\ndist.destroy_process_group()"
    script = script.replace("200_000", "300").replace("dist.destroy_process_group()", shown)
    file = tmp_path / "train.py"
    file.write_text(script)
    result = torchrun(str(file))
    losses = re.findall(r"loss ([\d.]+)", result.stdout)
    assert len(losses) == 2, result.stderr[-3000:]
    assert losses[0] == losses[1]
    assert 0 < float(losses[0]) < 5.9  # ln 300 is 5.7, and what is noise for 300 classes is hardly learnt
