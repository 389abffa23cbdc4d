"""DynamicsAwareLoss: the schedule's values in every call, buffers that stay put, and what nn.CrossEntropyLoss does."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dal_kernels import DynamicsAwareLoss, dynamics_aware_loss

CLASSES = 5
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])
VALUES = ("q", "bootstrap_weight")

on_any_device = pytest.mark.filterwarnings("ignore:dynamics_aware_loss runs as plain PyTorch operations")


def criterion(**changes: Any) -> DynamicsAwareLoss:
    return DynamicsAwareLoss(**{"total_steps": 10, **changes})


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


@pytest.mark.parametrize("bootstrap", ["soft", "hard"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
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


def test_step_updates_the_buffers_in_place() -> None:
    module = criterion()
    buffers = {name: getattr(module, name) for name in VALUES}
    places = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    for t, step in [(0, None), (1, ()), (8.5, (8.5,)), (9.5, ()), (40, (40,)), (0, (0,))]:
        if step is not None:
            module.step(*step)
        assert values(module) == expected(module, t)
        assert module.schedule.position == t
        assert all(getattr(module, name) is buffers[name] for name in VALUES)
        assert {name: getattr(module, name).data_ptr() for name in VALUES} == places


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
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


def test_values_are_buffers_and_nothing_is_a_parameter() -> None:
    module = criterion(weight=CLASS_WEIGHT)
    assert list(module.parameters()) == []
    assert set(dict(module.named_buffers())) == {"q", "bootstrap_weight", "weight"}
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
def test_weight_is_in_the_state_as_in_cross_entropy(weight: Tensor | None) -> None:
    state, plain = criterion(weight=weight).state_dict(), nn.CrossEntropyLoss(weight=weight).state_dict()
    assert {name for name, value in state.items() if isinstance(value, Tensor)} == set(plain)


def model(**changes: Any) -> nn.ModuleDict:
    return nn.ModuleDict({"net": nn.Linear(3, CLASSES), "criterion": criterion(**changes)})


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("position", [0, 6.5, 11])
def test_state_of_a_model_around_it_resumes_in_place(position: float) -> None:
    saved, resumed = model(weight=CLASS_WEIGHT), model(weight=torch.ones(CLASSES))
    saved["criterion"].step(position)
    place = resumed["criterion"].q.data_ptr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(through_file(saved.state_dict()))
    module = resumed["criterion"]
    assert (module.schedule.position, module.q.data_ptr()) == (position, place)
    assert values(module) == expected(module, position)
    assert torch.equal(module.weight, CLASS_WEIGHT)


def test_state_of_other_settings_warns_and_only_gives_the_position() -> None:
    saved, resumed = model(q_start=0.2), model()
    saved["criterion"].step(4)
    with pytest.warns(UserWarning, match=r"q_start was 0\.2, is 0\.6"):
        resumed.load_state_dict(saved.state_dict())
    assert values(resumed["criterion"]) == expected(criterion(), 4)


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
def test_buffers_follow_the_input_to_its_device() -> None:
    module = criterion(weight=CLASS_WEIGHT)
    logits, target = batch(6, CLASSES)
    loss = module(logits.to("meta"), target.to("meta"))
    assert (loss.device.type, loss.shape) == ("meta", ())
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"}


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
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
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
    torch._dynamo.reset()
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
        ({"total_steps": None}, TypeError, "total_steps must be given"),
        ({"total_steps": 0}, ValueError, "total_steps must be .*got 0"),
        ({"q_start": 2}, ValueError, r"q_start .*got 2\.0 and 1\.5"),
        ({"q_start": CLASS_WEIGHT}, TypeError, "q_start must be .*got Tensor"),  # nn.CrossEntropyLoss(weight)
        ({"reduction": "avg"}, ValueError, "reduction must be .*got 'avg'"),
        ({"bootstrap": "medium"}, ValueError, "bootstrap must be .*got 'medium'"),
        ({"weight": [1.0, 2.0]}, TypeError, "weight"),
    ],
)
def test_bad_setting_is_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        criterion(**settings)


def test_backend_is_passed_on() -> None:
    with pytest.raises(ValueError, match=r"backend must be .*got 'fused'"):
        criterion(backend="fused")(*batch(6, CLASSES))


def test_total_steps_has_no_default() -> None:
    with pytest.raises(TypeError, match="total_steps"):
        DynamicsAwareLoss()
