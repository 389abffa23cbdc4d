"""DynamicsAwareLoss: the schedule's values in every call, buffers that stay put, and what nn.CrossEntropyLoss does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dal_kernels import DynamicsAwareLoss, DynamicsAwareSchedule, dynamics_aware_loss
from support.axes import bootstraps, reductions

CLASSES = 5
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])
VALUES = ("q", "bootstrap_weight")

on_any_device = pytest.mark.filterwarnings("ignore:the loss runs as plain PyTorch operations")


def criterion(**changes: Any) -> DynamicsAwareLoss:
    return DynamicsAwareLoss(**{"total_steps": 10, "pace": "fixed", **changes})


def batch(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of ``shape`` with classes first ((C,)) or second, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator)
    labels = torch.randint(CLASSES, shape[2:] if len(shape) == 1 else (shape[0], *shape[2:]), generator=generator)
    return logits.requires_grad_(), labels


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    """Gradient for an upstream gradient that differs from entry to entry."""
    upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)
    return torch.autograd.grad(loss, logits, upstream)[0]


def values(module: DynamicsAwareLoss) -> tuple[float, float]:
    return module.q.item(), module.bootstrap_weight.item()


def expected(module: DynamicsAwareLoss, t: float) -> tuple[float, ...]:
    return tuple(torch.tensor(value, dtype=torch.float32).item() for value in module.schedule.at(t))


@bootstraps
@reductions
def test_training_loop_follows_the_schedule(reduction: str, bootstrap: str) -> None:
    options = {"weight": CLASS_WEIGHT, "ignore_index": 2, "reduction": reduction, "bootstrap": bootstrap}
    module = criterion(**options)
    for epoch in range(12):
        logits, target = batch(7, CLASSES, seed=epoch)
        loss = module(logits, target)
        same = dynamics_aware_loss(logits, target, *module.schedule.at(epoch), **options)
        assert torch.equal(loss, same)
        assert torch.equal(gradient(loss, logits), gradient(same, logits))
        module.step()


def test_step_updates_the_tensors_in_place() -> None:
    module = criterion()
    tensors = {name: getattr(module, name) for name in VALUES}
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for t, step in [(0, None), (1, ()), (8.5, (8.5,)), (9.5, ()), (40, (40,)), (0, (0,))]:
        if step is not None:
            module.step(*step)
        assert values(module) == expected(module, t)
        assert module.schedule.position == t
        assert all(getattr(module, name) is tensors[name] for name in VALUES)
        assert {name: getattr(module, name).data_ptr() for name in VALUES} == places


@pytest.mark.parametrize("backend", ["auto", "eager"])
@reductions
def test_step_between_forward_and_backward_leaves_the_gradient_alone(reduction: str, backend: str) -> None:
    logits, target = batch(6, CLASSES)
    module = criterion(reduction=reduction, backend=backend)
    module.step(7)
    before = gradient(module(logits, target), logits)
    loss = module(logits, target)
    module.step()
    assert torch.equal(gradient(loss, logits), before)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.bfloat16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "inside a model": lambda m: nn.Sequential(nn.Linear(2, 2), m).half()[1],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_values_stay_float32_through_casts_and_weight_follows(cast: Any) -> None:
    module, plain = criterion(weight=CLASS_WEIGHT.clone()), nn.CrossEntropyLoss(weight=CLASS_WEIGHT.clone())
    module.step(8)
    module, plain = cast(module), cast(plain)
    assert module.q.dtype == module.bootstrap_weight.dtype == torch.float32
    assert values(module) == expected(module, 8)
    assert module.weight.dtype == plain.weight.dtype != torch.float32
    module.step()
    assert values(module) == expected(module, 9)


def test_class_weights_are_the_only_buffer_and_nothing_is_a_parameter() -> None:
    """Buffers are cast, averaged, broadcast and made empty by what is around a model: the schedule's values are not."""
    module = criterion(weight=CLASS_WEIGHT)
    assert list(module.parameters()) == []
    assert set(dict(module.named_buffers())) == {"weight"}
    assert not any(value.requires_grad for value in (module.q, module.bootstrap_weight))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copy_continues_on_its_own(duplicate: Any) -> None:
    module = criterion(weight=CLASS_WEIGHT, ignore_index=1, reduction="none", bootstrap="hard")
    module.step(8)
    twin = duplicate(module)
    assert torch.equal(twin(*batch(6, CLASSES)), module(*batch(6, CLASSES)))
    twin.step()
    assert (values(twin), values(module)) == (expected(module, 9), expected(module, 8))


def test_repr_shows_where_the_schedule_stands_and_what_is_not_default() -> None:
    module = criterion(reduction="sum", weight=CLASS_WEIGHT, ignore_index=3, backend="eager")
    module.step(5)
    shown = ["position=5,", "q=1.05,", "reduction='sum'", "weight=(5,)", "ignore_index=3", "backend='eager'"]
    assert [part for part in shown if part not in repr(module)] == []


@on_any_device
def test_values_follow_the_input_to_its_device() -> None:
    module = criterion(weight=CLASS_WEIGHT)
    logits, target = batch(6, CLASSES)
    loss = module(logits.to("meta"), target.to("meta"))
    assert (loss.device.type, loss.shape) == ("meta", ())
    assert {value.device.type for value in (module.q, module.bootstrap_weight)} == {"meta"}
    assert torch.equal(module.weight, CLASS_WEIGHT)  # a meta tensor would have lost it


@on_any_device
@pytest.mark.parametrize("back", [lambda m: m.to_empty(device="cpu"), lambda m: m], ids=["to_empty", "next forward"])
def test_values_survive_a_visit_to_the_meta_device(back: Any) -> None:
    module = criterion().to("meta")
    assert module.q.device.type == "meta"
    module.step(8)
    module = back(module)
    logits, target = batch(6, CLASSES)
    assert torch.equal(module(logits, target), dynamics_aware_loss(logits, target, *module.schedule.at(8)))
    assert values(module) == expected(module, 8)


@pytest.mark.parametrize("shape", [(CLASSES,), (9, CLASSES), (4, CLASSES, 2, 3)], ids=str)
@reductions
@pytest.mark.parametrize(
    "options", [{}, {"weight": CLASS_WEIGHT}, {"ignore_index": 3}], ids=["plain", "weight", "ignore"]
)
def test_q_zero_is_cross_entropy(shape: tuple[int, ...], reduction: str, options: dict[str, Any]) -> None:
    logits, target = batch(*shape, seed=2)
    loss = criterion(q_start=0, q_end=0, reduction=reduction, **options)(logits, target)
    truth = nn.CrossEntropyLoss(reduction=reduction, **options)(logits, target)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(gradient(loss, logits), gradient(truth, logits))


def test_compiled_module_follows_step_without_compiling_again() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    module = criterion()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for epoch in range(11):
        logits, target = batch(6, CLASSES, seed=epoch)
        loss = compiled(logits, target)
        same = dynamics_aware_loss(logits, target, *module.schedule.at(epoch))
        torch.testing.assert_close(loss, same, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient(loss, logits), gradient(same, logits), rtol=1e-6, atol=1e-7)
        module.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"total_steps": "9"}, TypeError, "total_steps must be a number, got str"),
        ({"total_steps": 0}, ValueError, "total_steps must be .*got 0"),
        ({"q_start": 2}, ValueError, r"q_start .*got 2\.0 and 1\.5"),
        # nn.CrossEntropyLoss(weight)
        ({"q_start": CLASS_WEIGHT}, TypeError, "q_start must be .*got Tensor; class weights are given as weight="),
        ({"q_start": [1.0, 2.0]}, TypeError, "q_start must be .*got list; class weights are given as weight="),
        (
            {"q_start": CLASS_WEIGHT, "total_steps": None},
            TypeError,
            "q_start must be .*class weights are given as weight=",
        ),
        ({"reduction": "avg"}, ValueError, "reduction must be .*got 'avg'"),
        ({"bootstrap": "medium"}, ValueError, "bootstrap must be .*got 'medium'"),
        ({"weight": [1.0, 2.0]}, TypeError, r"weight must be a tensor of shape \(C,\) or None, got list"),
        ({"weight": torch.ones(2, 5)}, ValueError, r"weight must .*shape \(C,\), got shape \(2, 5\)"),
        ({"weight": torch.ones(5, dtype=torch.int64)}, TypeError, "weight must be floating-point, got torch.int64"),
        ({"weight": torch.ones(5, requires_grad=True)}, ValueError, "weight must not require grad"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got float"),
        ({"backend": "fused"}, ValueError, r"backend must be .*got 'fused'"),
    ],
)
def test_bad_setting_is_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        criterion(**settings)


class Outputs(NamedTuple):
    logits: Tensor
    features: Tensor


@pytest.mark.parametrize(
    ("input", "got"),
    [
        (None, "NoneType"),
        (Outputs(torch.ones(6, CLASSES), torch.ones(6, 2)), "Outputs"),
        ([torch.ones(6, CLASSES)], "list"),
        (np.ones((6, CLASSES)), "ndarray"),
    ],
    ids=["None", "named tuple", "list", "array"],
)
def test_what_is_no_tensor_is_named(input: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"^input must be a tensor, got {got}$"):
        criterion()(input, batch(6, CLASSES)[1])
    with pytest.raises(TypeError, match=f"^target must be a tensor, got {got}$"):
        criterion()(batch(6, CLASSES)[0], input)


MOVES: dict[str, Callable[[DynamicsAwareLoss], Any]] = {
    "step": lambda module: module.schedule.step(9),
    "step by step": lambda module: [module.schedule.step() for _ in range(9)],
    "load_state_dict": lambda module: module.schedule.load_state_dict({**module.schedule.state_dict(), "position": 9}),
    "position": lambda module: setattr(module.schedule, "position", 9),
    "settings": lambda module: [setattr(module.schedule, name, value) for name, value in CHANGED.items()],
    "replaced": lambda module: setattr(module, "schedule", DynamicsAwareSchedule(*CHANGED.values())),
}
CHANGED = {"q_start": 0.2, "q_end": 1.25, "total_steps": 40}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("move", MOVES)
def test_the_loss_hears_whatever_moves_the_schedule(move: str, compiled: bool) -> None:
    module, (logits, target) = criterion(), batch(6, CLASSES)
    loss_of = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    before = loss_of(logits, target)
    MOVES[move](module)
    values_now = module.schedule.at(module.schedule.position)
    assert values(module) == expected(module, module.schedule.position)
    torch.testing.assert_close(loss_of(logits, target), dynamics_aware_loss(logits, target, *values_now))
    assert not torch.equal(loss_of(logits, target), before)


@on_any_device
@pytest.mark.parametrize(
    ("first", "then"), [("meta", "cpu"), ("cpu", "meta"), ("cpu", "cpu")], ids=["meta first", "meta then", "cast"]
)
def test_a_first_visit_in_inference_mode_leaves_a_loss_that_can_train(first: str, then: str) -> None:
    with torch.device(first):
        module = criterion(weight=CLASS_WEIGHT)
    logits, target = batch(6, CLASSES)
    with torch.inference_mode():  # validation before training
        if first == then:
            module.to(torch.float64)
        module(logits.to(then), target.to(then))
    module.step()
    loss = module(logits, target)
    gradient(loss, logits)
    assert torch.equal(loss, dynamics_aware_loss(logits, target, *module.schedule.at(1), weight=CLASS_WEIGHT))


def test_step_within_compiled_code_compiles_nothing_anew() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    module = criterion()

    @torch.compile(backend=counter)
    def step(logits: Tensor, target: Tensor) -> Tensor:
        loss = module(logits, target)
        module.step()
        return loss * 1.0

    counts = []
    for epoch in range(9):
        logits, target = batch(6, CLASSES, seed=epoch)
        torch.testing.assert_close(
            step(logits, target), dynamics_aware_loss(logits, target, *module.schedule.at(epoch))
        )
        counts.append(counter.frame_count)
    assert module.schedule.position == 9
    assert counts[2:] == [counts[1]] * 7  # the first two meet what is new


@reductions
def test_a_call_may_choose_its_reduction_and_ask_for_statistics(reduction: str) -> None:
    module, (logits, target) = criterion(weight=CLASS_WEIGHT, ignore_index=2), batch(6, CLASSES)
    module.step(8)
    options = {"weight": CLASS_WEIGHT, "ignore_index": 2, "reduction": reduction}
    loss, stats = module(logits, target, reduction=reduction, return_stats=True)
    same, same_stats = dynamics_aware_loss(logits, target, *module.schedule.at(8), **options, return_stats=True)
    assert torch.equal(loss, same)
    for field, same_field in zip(stats, same_stats, strict=True):
        torch.testing.assert_close(field, same_field, rtol=0, atol=0, equal_nan=True)
