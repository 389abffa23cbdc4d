"""Triton's kernels launched by the autograd node: the same as by Triton itself, and when they are left to it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dal_kernels import DynamicsAwareLoss, dynamics_aware_loss, node
from support.marks import needs_executor
from support.replaying import Launches, installed
from support.truth import make_case

pytestmark = [
    needs_executor,
    pytest.mark.skipif(node.short_way is None, reason=f"no autograd node: {node.error}"),
]
Step = Callable[[int], tuple[Tensor, ...]]


@pytest.fixture
def replayed() -> Iterator[Launches]:
    """The kernels that the node has launched so far."""
    import gpuless

    with gpuless.install(90), installed() as names:
        yield names


def step_of(
    rows: int = 40, classes: int = 21, dtype: torch.dtype = torch.float32, *, knobs: Any = (0.8, 0.4),
    upstream: float = 1.0, prepared: Callable[[Tensor], Tensor] = torch.Tensor.clone, **options: Any,
) -> Step:  # fmt: skip
    """A training step on other numbers for each seed."""

    def step(seed: int) -> tuple[Tensor, ...]:
        case = make_case(rows, classes, dtype, seed=seed)
        leaf = prepared(case.logits).detach().requires_grad_()
        result = dynamics_aware_loss(leaf, case.target, *knobs, backend="triton", **options)
        loss, *stats = (result[0], *result[1]) if isinstance(result, tuple) else (result,)
        (loss.sum() * upstream).backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad, *stats

    return step


def assert_as_by_triton(step: Step, replayed: Launches, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The second of two steps has the bits that Triton's own launches give; returns what the node launched for it."""
    step(0)
    assert replayed == []
    found = step(1)
    launched = list(replayed)
    with monkeypatch.context() as patch:
        patch.setattr(node, "short_way", None)
        expected = step(1)
    assert replayed == launched
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    return launched


PACKED = {
    "float32": step_of(),
    "bfloat16, upstream": step_of(dtype=torch.bfloat16, upstream=0.5),
    "float16": step_of(dtype=torch.float16),
    "float64": step_of(dtype=torch.float64),
    "sum, statistics": step_of(reduction="sum", return_stats=True, upstream=3.0),
    "none": step_of(reduction="none"),
    "weights": step_of(weight=torch.linspace(0.5, 2, 21), ignore_index=3),
    "one row": step_of(rows=1, classes=1000),
    "split rows": step_of(rows=2, classes=70_000),
    "rows not side by side": step_of(prepared=lambda logits: torch.cat([logits, logits], 1)[:, :21]),
    "rows not aligned": step_of(prepared=lambda logits: torch.cat([logits, logits], 1)[:, 1:22]),
    "knobs as tensors": step_of(knobs=(torch.tensor(0.8), torch.tensor(0.4))),
}


@pytest.mark.parametrize("name", PACKED)
def test_the_second_step_is_launched_without_python(
    name: str, replayed: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert assert_as_by_triton(PACKED[name], replayed, monkeypatch)


def test_arguments_of_another_kind_are_another_record(replayed: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, alignment, strides, other numbers: each decides what Triton compiles, or what it is given."""
    kinds = [
        step_of(),
        step_of(rows=41),
        step_of(ignore_index=1),
        step_of(ignore_index=16),
        step_of(prepared=lambda logits: torch.cat([logits, logits], 1)[:, :21]),
        step_of(prepared=lambda logits: torch.cat([logits, logits], 1)[:, 1:22]),
    ]
    for step in kinds:
        step(0)
        assert "loss_rows" not in replayed
    for times, step in enumerate(kinds, 1):
        found = step(1)
        assert replayed.count("loss_rows") == times
        with monkeypatch.context() as patch:
            patch.setattr(node, "short_way", None)
            torch.testing.assert_close(found, step(1), rtol=0, atol=0)


def test_a_schedule_that_is_told(replayed: Launches) -> None:
    """In the loss's own launch, whose knobs are the numbers that it moves."""

    def state(steps: int) -> dict[str, Any]:
        criterion = DynamicsAwareLoss(total_steps=50, backend="triton", watch=False)
        for seed in range(steps):
            case = make_case(40, 21, seed=seed)
            criterion(case.logits.requires_grad_(), case.target).backward()
            criterion.step()
        return criterion.schedule.state_dict()

    first = state(1)
    assert replayed == []
    assert state(1) == first
    assert replayed[0] == "loss_rows"
    assert not any("follow" in name for name in replayed)


def test_a_profiler_sees_the_operators(replayed: Launches) -> None:
    step = step_of(upstream=2.0)
    step(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        step(1)
    assert replayed
    events = {event.name: event for event in seen.events()}
    assert {"dal_kernels::loss_triton", "dal_kernels::scale_gradient_triton"} <= set(events)
    assert events["dal_kernels::loss_triton"].input_shapes[0] == [40, 21]


def test_what_is_forgotten_is_given_back(replayed: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training whose batches all differ in size would else fill the memory of the GPU."""
    from dal_kernels.backends.triton import record, ticket

    made: list[weakref.ref[Tensor]] = []
    new = ticket._new

    def watched(logits: Tensor) -> Tensor:
        counter = new(logits)
        made.append(weakref.ref(counter))
        return counter

    monkeypatch.setattr(ticket, "_new", watched)
    step_of()(0)
    assert [counter() is None for counter in made] == [False]
    node._module.learn_triton(node._record, record.undisturbed, 0)
    gc.collect()
    assert [counter() is None for counter in made] == [True]


# --- what stays with Triton


def hooked(attribute: str, patch: pytest.MonkeyPatch) -> list[Any]:
    from triton import knobs

    seen: list[Any] = []
    chain = getattr(knobs.runtime, attribute)
    if hasattr(chain, "calls"):
        patch.setattr(chain, "calls", [seen.append])
    else:
        patch.setattr(knobs.runtime, attribute, seen.append)
    return seen


@pytest.mark.parametrize("attribute", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_of_triton_sees_each_launch(attribute: str, replayed: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of()
    step(0)
    with monkeypatch.context() as patch:
        seen = hooked(attribute, patch)
        step(1)
        assert len(seen) >= 2
    assert replayed == []
    step(1)
    assert replayed


def test_debugging_is_compiled_for(replayed: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    step = step_of()
    step(0)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    step(1)
    assert replayed == []


def test_a_captured_graph_is_tritons(replayed: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    from dal_kernels.backends.triton import record

    step = step_of()
    step(0)
    monkeypatch.setattr(record, "is_capturing", lambda: True)
    step(1)
    assert replayed == []


def test_what_is_copied_first_is_tritons(replayed: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that do not lie side by side are copied: the copy is of one call's numbers."""
    step = step_of(prepared=lambda logits: logits.t().contiguous().t())
    step(0)
    found = step(1)
    assert "loss_rows" not in replayed
    monkeypatch.setattr(node, "short_way", None)
    torch.testing.assert_close(found, step(1), rtol=0, atol=0)


def test_a_subclass_in_the_backward_sees_the_operator(replayed: Launches) -> None:
    class Seeing(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(str(func))
            return func(*(factor if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))

    case = make_case(40, 21, torch.bfloat16)
    factor = torch.tensor(2.0)
    for upstream in (factor, Tensor._make_subclass(Seeing, factor)):
        for _ in range(2):
            loss = dynamics_aware_loss(case.logits.requires_grad_(), case.target, 0.8, 0.4, backend="triton")
            torch.autograd.grad(loss, case.logits, upstream, retain_graph=True)
    assert Seeing.seen.count("dal_kernels.gradient_triton.default") == 2


def test_one_tensor_in_two_places_is_tritons(replayed: Launches) -> None:
    """In the next call there may be two."""
    from dal_kernels.backends.triton import record

    values, target = torch.rand(8), torch.zeros(8, dtype=torch.int64)
    numbers = torch.tensor([0.0, 0, 0.5, 0.5, 900, 1, 0.6, 1])

    def see(max_prob: Tensor, target_prob: Tensor) -> Any:
        from dal_kernels.backends.triton import launch_pace

        return record.record(launch_pace.see, numbers, max_prob, target_prob, target.clone(), target, 1, 1.5, 0.5)[1]

    assert see(values, values) is None
    assert see(values, values.clone()) is not None


def test_without_a_driver_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Triton's interpreter beside a CUDA build of torch."""
    from triton.runtime import driver

    from dal_kernels.backends.triton import record

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(type(driver), "active", property(lambda self: (_ for _ in ()).throw(RuntimeError("0 drivers"))))
    assert record.launcher.__wrapped__() == 0


def test_without_a_context_of_this_thread_triton_makes_one(replayed: Launches) -> None:
    step = step_of()
    step(0)
    replayed.refusal = 201
    found = step(1)
    assert replayed == []
    replayed.refusal = 0
    torch.testing.assert_close(found, step(1), rtol=0, atol=0)
    assert replayed
    # In a backward nothing but Triton is left, where a forward of CPU tensors has the long way too.
    case = make_case(40, 21)
    loss = dynamics_aware_loss(case.logits.requires_grad_(), case.target, 0.8, 0.4, backend="triton")
    replayed.refusal = 201
    (2 * loss).backward()
    assert case.logits.grad is not None


def test_what_the_driver_refuses_is_an_error(replayed: Launches) -> None:
    case = make_case(40, 21)
    step_of(upstream=2.0)(0)
    loss = dynamics_aware_loss(case.logits.requires_grad_(), case.target, 0.8, 0.4, backend="triton")
    replayed.refusal = 719
    with pytest.raises(RuntimeError, match="could not launch a kernel of Triton's: error 719"):
        (2 * loss).backward()
