"""DTensors: as logits what one process gives, compiled too; elsewhere an error that says what to do."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dal_kernels import (
    GeneralizedCrossEntropyLoss,
    LinearDynamicsAwareLoss,
    LinearLoss,
    dynamics_aware_loss,
    linear_dynamics_aware_loss,
    linear_loss,
)
from dal_kernels.distributed import (
    class_parallel_dynamics_aware_loss,
    class_parallel_linear_dynamics_aware_loss,
    class_parallel_linear_loss,
)
from support.ranks import C, Collectives, N, case, close, finished_ranks, names_of, raises, report, upstream_of

if dist.is_available():
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def check_dtensors(world: int) -> None:
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
            upstream = mine(upstream_of(expected)).to_local() if reduction == "none" else upstream_of(expected)
            (gradient,) = torch.autograd.grad(got, split, upstream)  # not .grad, which torch 2.10 replicates
            assert isinstance(gradient, DTensor)
            assert gradient.placements == split.placements
            close(gradient.full_tensor(), whole.grad)
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


def check_bad_dtensors(world: int) -> None:
    line, plane = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    logits, target = case(9)
    split = distribute_tensor(logits, line, (Shard(0),), src_data_rank=None)
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


def check_dtensors_beside_plain_tensors(world: int) -> None:
    line = init_device_mesh("cpu", (world,))
    logits, target = case(9)
    features, classifier = torch.ones(N, 4), torch.ones(C, 4)

    def of(value: Tensor) -> DTensor:
        return distribute_tensor(value, line, (Replicate(),), src_data_rank=None)

    wrong = {
        "target": of(target),
        "q": of(torch.ones(N)),
        "bootstrap_weight": of(torch.zeros(())),
        "weight": of(torch.ones(C)),
    }
    for name, value in wrong.items():
        call = {"target": target, "q": 0.7, name: value}
        message = rf"{name} must be a plain tensor, got a DTensor beside a plain input.*full_tensor\(\)"
        compiled = torch.compile(dynamics_aware_loss, backend="eager")
        for loss in (dynamics_aware_loss, class_parallel_dynamics_aware_loss, compiled):
            raises(message, lambda loss=loss, call=call: loss(logits, **call), TypeError)
        for loss in (linear_dynamics_aware_loss, class_parallel_linear_dynamics_aware_loss):
            raises(message, lambda loss=loss, call=call: loss(features, classifier, **call), TypeError)
    for loss in (linear_dynamics_aware_loss, class_parallel_linear_dynamics_aware_loss):
        parts = {"input": features, "classifier_weight": classifier, "bias": torch.zeros(C)}
        for name, instead in {
            "input": "; pass",
            "classifier_weight": ": .*fully_shard",
            "bias": ": .*fully_shard",
        }.items():
            *layer, bias = {**parts, name: of(parts[name])}.values()
            message = f"{name} must be a plain tensor, got a DTensor{instead}"
            raises(message, lambda loss=loss, layer=layer, bias=bias: loss(*layer, target, 0.7, bias=bias), TypeError)
    raises("local_logits must be a plain tensor.*dal_kernels.dynamics_aware_loss takes it",
           lambda: class_parallel_dynamics_aware_loss(of(logits), target, 0.7), TypeError)  # fmt: skip


def check_sample_weights(world: int) -> None:
    """A weight a row, plain or a DTensor, of this rank's rows or of all."""
    mesh = init_device_mesh("cpu", (world,))
    logits, target = case(12)
    weight = torch.rand(N, generator=torch.Generator().manual_seed(3))
    weight[target == -100] = torch.nan  # counts for nothing
    for reduction in ("mean", "sum", "none"):
        whole = logits.clone().requires_grad_()
        expected = dynamics_aware_loss(whole, target, 0.7, 0.4, sample_weight=weight, reduction=reduction)
        expected.sum().backward()
        for placement in (Shard(0), Shard(1), Replicate()):
            of_rows = [placement if placement == Shard(0) else Replicate()]
            split = distribute_tensor(logits, mesh, [placement]).requires_grad_()
            labels, weights = (distribute_tensor(value, mesh, of_rows) for value in (target, weight))
            for given in (weights, weights.to_local()):
                split.grad = None
                loss = dynamics_aware_loss(split, labels, 0.7, 0.4, sample_weight=given, reduction=reduction)
                mine = (
                    distribute_tensor(expected.detach(), mesh, of_rows).to_local() if reduction == "none" else expected
                )
                close(loss, mine)
                loss.sum().backward()
                close(split.grad.full_tensor(), whole.grad)
    learnt = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    split = distribute_tensor(logits, mesh, [Shard(0)])
    labels = distribute_tensor(target, mesh, [Shard(0)])
    raises("sample_weight must not require grad", lambda: dynamics_aware_loss(split, labels, 0.7, sample_weight=learnt))
    raises(
        "sample_weight must be a plain tensor, got a DTensor",
        lambda: dynamics_aware_loss(logits, target, 0.7, sample_weight=learnt),
        TypeError,
    )


def check_compiled(world: int) -> None:
    """Rows split or replicated: in one graph. Classes split: with a break, which fullgraph=True says."""
    if world > 2:  # has nothing to add, and takes long
        return
    line, plane = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    logits, target = case(10)

    def loss_of(logits: Any, target: Any) -> Tensor:
        return 3 * dynamics_aware_loss(2 * logits, target, 0.7, 0.4)

    expected = loss_of(whole := logits.clone().requires_grad_(), target)
    expected.backward()
    placed = [(line, [Shard(0)]), (line, [Replicate()]), (line, [Shard(1)]), (plane, [Shard(0), Shard(1)])]
    for mesh, placements in placed:
        torch._dynamo.reset()
        of_rows = [p if p == Shard(0) else Replicate() for p in placements]
        split = distribute_tensor(logits, mesh, placements, src_data_rank=None).requires_grad_()
        labels = distribute_tensor(target, mesh, of_rows, src_data_rank=None)
        whole_graph = Shard(1) not in placements
        got = torch.compile(loss_of, fullgraph=whole_graph, backend="aot_eager")(split, labels)
        (gradient,) = torch.autograd.grad(got, split)
        close(got, expected)
        assert gradient.placements == split.placements
        close(gradient.full_tensor(), whole.grad)
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    raises("classes are split over ranks breaks the graph", lambda: compiled(split, labels), Exception)


class Model(nn.Module):
    """Ends in the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(6, 8)
        self.criterion = LinearDynamicsAwareLoss(8, C, total_steps=4, pace="fixed")

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.criterion(torch.tanh(self.body(x)), target)


def trained(model: nn.Module) -> list[Tensor]:
    """Losses of a few steps."""
    _, target = case(11)
    x = torch.randn(N, 6, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def fsdp1(model: nn.Module, kinds: list[type[nn.Module]]) -> nn.Module:
    policy = ModuleWrapPolicy(kinds)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))


class Fused(nn.Module):
    """:class:`Model` with a head and a loss of it apart."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        plain = Model()
        self.body, self.head = plain.body, plain.criterion.classifier
        self.criterion = LinearLoss(
            GeneralizedCrossEntropyLoss(reduction=reduction), *self.head.weight.shape[::-1], classifier=self.head
        )
        self.reduction = reduction

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss = self.criterion(self.body(x), target)
        return loss.mean() if self.reduction == "none" else loss


def check_fully_sharded(world: int) -> None:
    """FSDP around the loss, or what holds it, or the head that it is given, trains as one process does."""
    if world > 2:  # has nothing to add, and takes long
        return
    expected = trained(Model())
    mesh = init_device_mesh("cpu", (world,))
    for names in (["criterion"], [""], ["criterion", "body", ""], ["body", "criterion.classifier", ""]):
        model = Model()
        for name in names:
            fully_shard(model.get_submodule(name), mesh=mesh)
        close(trained(model), expected, 1e-5)
    for kinds in ([], [LinearDynamicsAwareLoss]):
        close(trained(fsdp1(Model(), kinds)), expected, 1e-5)
    for reduction in ("mean", "none"):  # whose gradients are made in the forward and in the backward
        expected = trained(Fused(reduction))
        for names in (["head", ""], [""]):
            model = Fused(reduction)
            for name in names:
                fully_shard(model.get_submodule(name), mesh=mesh)
            close(trained(model), expected, 1e-5)
    split = parallelize_module(Model(), mesh, {"criterion.classifier": ColwiseParallel()})
    refused = "classifier.weight must be a plain tensor, got a DTensor: .*fully_shard.*ColwiseParallel.*to_local"
    raises(refused, lambda: trained(split), TypeError)
    raises(
        "must be an nn.Linear.*got FullyShardedDataParallel", lambda: trained(fsdp1(Model(), [nn.Linear])), TypeError
    )


def check_a_head_of_columns_is_taken_as_the_error_says(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    plain = Model()
    head = plain.criterion.classifier
    weight, bias = (distribute_tensor(of.detach(), mesh, [Shard(0)]).requires_grad_() for of in head.parameters())
    features, (_, target) = torch.randn(N, head.in_features, generator=torch.Generator().manual_seed(1)), case(3)
    loss = GeneralizedCrossEntropyLoss()
    refused = "linear_weight must be a plain tensor, got a DTensor: .*class_parallel_linear_loss of its to_local"
    raises(refused, lambda: linear_loss(loss, features, weight, target, linear_bias=bias), TypeError)
    of_mesh = {"linear_bias": bias.to_local(), "group": mesh.get_group()}
    got = class_parallel_linear_loss(loss, features, weight.to_local(), target, **of_mesh)
    expected = linear_loss(loss, features, head.weight, target, linear_bias=head.bias)
    close(got, expected, 1e-5)
    got.backward()
    expected.backward()
    close(weight.grad.full_tensor(), head.weight.grad, 1e-5)
    close(bias.grad.full_tensor(), head.bias.grad, 1e-5)


finished = finished_ranks(__name__)


@pytest.mark.xdist_group("ranks of dtensors")
@pytest.mark.parametrize("name", names_of(__name__))
def test_every_rank(finished: tuple[int, Path], name: str) -> None:
    report(name, *finished)
