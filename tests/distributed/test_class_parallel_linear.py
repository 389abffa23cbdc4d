"""Classes of a layer split over processes, which give rows of their own: one process with all rows and classes."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dal_kernels import (
    ClassParallelLinear,
    CrossEntropyLoss,
    DynamicsAwareLoss,
    GeneralizedCrossEntropyLoss,
    JointAsymmetricLoss,
    LinearLoss,
)
from support.ranks import C, Collectives, N, close, finished_ranks, names_of, raises, report

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

D = 12
LOSSES: dict[str, Any] = {
    "GCE": lambda: GeneralizedCrossEntropyLoss(0.7),
    "weights": lambda: CrossEntropyLoss(weight=torch.linspace(0.5, 2.0, C)),
    "smoothed": lambda: CrossEntropyLoss(label_smoothing=0.1, reduction="sum"),
    "wide": JointAsymmetricLoss,
    "auto": lambda: DynamicsAwareLoss(total_steps=4),
}


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels of which some are ignored, and weights, of the rows of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(C, (N,), generator=generator)
    target[5::9] = -100
    return torch.randn(N, D, generator=generator), target, torch.rand(N, generator=generator)


def own(values: Tensor) -> Tensor:
    """This rank's rows, as a batch of two sequences."""
    part = values.chunk(dist.get_world_size())[dist.get_rank()]
    return part.reshape(2, -1, *values.shape[1:]).clone()


def whole(form: ClassParallelLinear) -> LinearLoss:
    """The same classifier and loss in one process."""
    one = LinearLoss(copy.deepcopy(form.loss), D, C, bias=form.bias is not None)
    with torch.no_grad():
        for name in ("weight", "bias"):
            if getattr(form, name) is not None:
                getattr(one.classifier, name).copy_(getattr(form, name).full_tensor())
    return one


def check_matches_one_process(world: int) -> None:
    features, target, weights = rows()
    for index, make in enumerate(LOSSES.values()):
        form = ClassParallelLinear(make(), D, C, bias=index != 1)
        one = whole(form)
        given, all_rows = own(features).requires_grad_(), features.clone().requires_grad_()
        options = {"sample_weight": weights} if index % 2 else {}
        got, stats = form(given, own(target), return_stats=True, **{name: own(of) for name, of in options.items()})
        expected, true_stats = one(all_rows, target, return_stats=True, **options)
        close(got, expected, 1e-5)
        close(stats.target_prob, own(true_stats.target_prob), 1e-5)
        got.backward()
        expected.backward()
        close(given.grad, own(all_rows.grad), 1e-5)
        for name in ("weight", "bias")[: 2 if form.bias is not None else 1]:
            close(getattr(form, name).grad.full_tensor(), getattr(one.classifier, name).grad, 1e-5)
        if hasattr(form.loss.schedule, "noise_rate"):
            assert form.loss.schedule.state_dict() == pytest.approx(one.loss.schedule.state_dict(), rel=1e-4)


def check_ranks_start_with_other_classes(world: int) -> None:
    torch.manual_seed(0)
    weight = ClassParallelLinear(CrossEntropyLoss(), D, C).weight.full_tensor()
    assert len(weight.unique(dim=0)) == C
    assert weight.abs().max() <= D**-0.5


def check_bytes_on_the_wire(world: int) -> None:
    """Of N rows: how many, features and labels once, 4 floats a row of all ranks, and the features' gradient back."""
    features, target, _ = rows()
    form = ClassParallelLinear(GeneralizedCrossEntropyLoss(0.7), D, C)
    given = own(features).requires_grad_()
    with Collectives() as forward:
        loss = form(given, own(target))
    here = N // world
    assert [size for _, size in forward.seen] == [16, 4 * here * D, 8 * here, 4 * 4 * (N + 2)]
    with Collectives() as backward:
        loss.backward()
    assert len(backward.seen) == 1
    assert backward.seen[0][0].startswith(("_reduce_scatter", "reduce_scatter"))


def check_training_is_that_of_one_process(world: int) -> None:
    torch.manual_seed(1)
    form = ClassParallelLinear(DynamicsAwareLoss(total_steps=5, pace="fixed"), D, C)
    one = whole(form)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.05) for module in (form, one)]
    for step in range(5):
        features, target, _ = rows(step)
        losses = form(own(features), own(target)), one(features, target)
        close(losses[0], losses[1], 1e-5)
        for optimizer, loss, module in zip(optimizers, losses, (form, one), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            module.step()
    close(form.weight.full_tensor(), one.classifier.weight, 1e-4)


def check_gradients_that_are_averaged_later(world: int) -> None:
    features, target, _ = rows()
    torch.manual_seed(0)
    form = ClassParallelLinear(CrossEntropyLoss(), D, C, averaged=True)
    body = nn.parallel.DistributedDataParallel(nn.Linear(D, D))
    form(body(own(features)), own(target)).backward()
    one, plain = whole(form), copy.deepcopy(body.module)
    plain.zero_grad()
    one(plain(features), target).backward()
    close(body.module.weight.grad, plain.weight.grad, 1e-5)


def check_the_same_rows_everywhere(world: int) -> None:
    features, target, weights = rows()
    form = ClassParallelLinear(CrossEntropyLoss(), D, C, gather=False)
    one = whole(form)
    given, all_rows = (features.clone().requires_grad_() for _ in range(2))
    got = form(given, target, reduction="none", sample_weight=weights)
    expected = one(all_rows, target, reduction="none", sample_weight=weights)
    close(got, expected, 1e-5)
    upstream = torch.linspace(0.5, 2, N)
    got.backward(upstream)
    expected.backward(upstream)
    close(given.grad, all_rows.grad, 1e-5)


def check_features_that_differ_are_found_out(world: int) -> None:
    features, target, _ = rows()
    form = ClassParallelLinear(CrossEntropyLoss(), D, C, gather=False)
    changed = features.clone()
    changed[3, 4] += 1e-6 * dist.get_rank()
    raises("input must be the same on every rank", lambda: form(changed, target))
    order = torch.arange(N).roll(dist.get_rank())
    raises("input must be the same on every rank", lambda: form(features[order], target))
    raises("target must be the same on every rank", lambda: form(features, target.roll(dist.get_rank())))


def check_what_is_wrong_on_one_rank_ends_all(world: int) -> None:
    last = dist.get_rank() == world - 1
    of_last = f"^rank {world - 1} of the group: "
    for gather in (True, False):
        form = ClassParallelLinear(CrossEntropyLoss(), D, C, gather=gather)
        x, y, w = (own(of) if gather else of for of in rows())
        bad = y.clone()
        bad.view(-1)[1] = C
        call: Any = {"input": x, "target": y, "sample_weight": w, "return_stats": False, "reduction": "sum"}
        cases: list[tuple[dict[str, Any], str]] = [
            ({"target": bad}, f"{of_last}target at row 1 is {C}, accepted are 0 to {C - 1} and ignore_index -100$"),
            ({"input": x[..., 1:]}, f"{of_last}input must have shape"),
            ({"target": None}, f"{of_last}target must be a tensor"),
            ({"input": x.double()}, f"{of_last}linear_weight must have the dtype of input, torch.float64"),
            ({"input": x.clone().requires_grad_()}, "^input must be the same on every rank, got torch.float32, .*grad"),
            ({"sample_weight": None}, "^sample_weight must be the same on every rank, got a tensor, .*None$"),
            ({"return_stats": True}, "^return_stats must be the same on every rank, got False, .*True$"),
            ({"reduction": "mean"}, "^loss must be the same on every rank, got .*'sum'.*'mean'"),
        ]
        if not gather:
            cases.append(({"input": x[1:], "target": y[1:], "sample_weight": w[1:]}, "^the number of rows .* 23"))
        for changes, message in cases:
            with pytest.raises((TypeError, ValueError), match=message):
                form(**call | (changes if last else {}))
        with pytest.raises(RuntimeError, match=f"{of_last}.*[Ss]parse"):
            form(**call | ({"input": x.to_sparse()} if last else {}))
        other = ClassParallelLinear(GeneralizedCrossEntropyLoss(0.3 if last else 0.9), D, C, gather=gather)
        with pytest.raises(ValueError, match=r"^the loss's knobs must be the same on every rank, got \[0\.89"):
            other(**call)
        uneven = torch.ones(C)
        uneven[0] += dist.get_rank()
        other = ClassParallelLinear(CrossEntropyLoss(weight=uneven), D, C, gather=gather)
        with pytest.raises(ValueError, match=r"^weight must be the same on every rank of the group"):
            other(**call)
        assert form(**call).isfinite()


def check_ranks_may_have_other_numbers_of_rows(world: int) -> None:
    """Down to none."""
    features, target, weights = rows()
    counts = [[0, 9], [5, 0, 7, 1]][world // 4]
    begin, count = sum(counts[: dist.get_rank()]), counts[dist.get_rank()]
    part, every = slice(begin, begin + count), slice(0, sum(counts))
    torch.manual_seed(0)
    form = ClassParallelLinear(DynamicsAwareLoss(total_steps=4), D, C)
    one = whole(form)
    given, all_rows = features[part].clone().requires_grad_(), features[every].clone().requires_grad_()
    got, stats = form(given, target[part], return_stats=True, sample_weight=weights[part])
    expected, true_stats = one(all_rows, target[every], return_stats=True, sample_weight=weights[every])
    close(got, expected, 1e-5)
    close(stats, type(stats)(*(field[part] for field in true_stats)), 1e-5)
    got.backward()
    expected.backward()
    close(given.grad, all_rows.grad[part], 1e-5)
    close(form.weight.grad.full_tensor(), one.classifier.weight.grad, 1e-5)
    form.step()
    one.step()
    assert form.loss.schedule.state_dict() == pytest.approx(one.loss.schedule.state_dict(), rel=1e-4)


def check_errors(world: int) -> None:
    features, target, weights = rows()
    form = ClassParallelLinear(CrossEntropyLoss(), D, C)
    raises("input must have shape", lambda: form(features[:, 1:], target))
    raises("target must be class indices of shape", lambda: form(features, target[1:]))
    raises("sample_weight must have the shape of target", lambda: form(features, target, sample_weight=weights[1:]))
    raises("reduction must be 'mean' or 'sum'", lambda: form(features, target, reduction="none"))
    learnt = weights.clone().requires_grad_()
    raises("sample_weight must not require grad", lambda: form(features, target, sample_weight=learnt))
    raises("scale must be None", lambda: ClassParallelLinear(CrossEntropyLoss(scale=2.0), D, C))
    weighted = CrossEntropyLoss(weight=torch.ones(C - 1))
    raises("weight must have one value a class", lambda: ClassParallelLinear(weighted, D, C))
    raises("loss must be a module", lambda: ClassParallelLinear(nn.CrossEntropyLoss(), D, C), TypeError)
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("rows", "classes"))
    raises("mesh must have one dimension, got 2", lambda: ClassParallelLinear(CrossEntropyLoss(), D, C, mesh=mesh))
    assert ClassParallelLinear(CrossEntropyLoss(), D, C, mesh=mesh["classes"])(own(features), own(target)).isfinite()


def check_what_is_saved_is_loaded_by_another_number_of_ranks(world: int) -> None:
    import torch.distributed.checkpoint as checkpoint

    def made(mesh: Any = None) -> ClassParallelLinear:
        return ClassParallelLinear(DynamicsAwareLoss(total_steps=4, pace="fixed"), D, C, mesh=mesh)

    names: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    form = made()
    form.step(3.0)
    features, target, _ = rows()
    checkpoint.save(form.state_dict(), checkpoint_id=names[0])
    # Each rank loads it as a world of one, whose classes are all.
    alone = [dist.new_group([rank]) for rank in range(world)][dist.get_rank()]
    other = made(DeviceMesh.from_group(alone, "cpu"))
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=names[0], process_group=alone)
    other.load_state_dict(state)
    assert other.weight.to_local().shape == (C, D)
    close(other.weight.full_tensor(), form.weight.full_tensor(), 0)
    assert other.loss.schedule.position == 3.0
    close(other(features, target), form(own(features), own(target)), 1e-5)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(names[0])


finished = finished_ranks(__name__)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", names_of(__name__))
def test_every_rank(finished: tuple[int, Path], name: str) -> None:
    report(name, *finished)


def test_without_a_group_there_is_nothing_to_split_over() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        ClassParallelLinear(CrossEntropyLoss(), D, C)
