"""The short way of a call, through C++: what it takes, that it is what the long way is, and when it is set aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from dal_kernels import DynamicsAwareLoss, dynamics_aware_loss, node, pace
from dal_kernels.arguments import RowStats
from dal_kernels.functional import loss_of
from dal_kernels.objectives import dynamics_aware
from dal_kernels.pace import pace_numbers
from support.axes import dtypes, objectives, reductions
from support.short_way import CASE, longer, took
from support.truth import make_case

pytestmark = pytest.mark.skipif(node.short_way is None, reason=f"no autograd node: {node.error}")
__all__ = ["took"]


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    return (result[0], *result[1]) if isinstance(result, tuple) else (result,)


# --- it is what the long way is


@pytest.mark.parametrize("stats", [False, True], ids=["loss", "with statistics"])
@pytest.mark.parametrize("upstream", [1.0, -0.75])
@reductions
@dtypes
def test_both_ways_give_the_same_bits(
    fused: str, dtype: torch.dtype, reduction: str, upstream: float, stats: bool, took: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    case = make_case(9, 21, dtype)
    case.target[3] = 4
    weight = torch.linspace(0.5, 2, 21).to(torch.float64 if dtype == torch.float64 else torch.float32)

    def outcome() -> tuple[Tensor, ...]:
        logits = case.logits.clone().requires_grad_()
        result = dynamics_aware_loss(
            logits, case.target, 0.8, 0.4, weight=weight, ignore_index=4, reduction=reduction, return_stats=stats,
            backend=fused,
        )  # type: ignore[call-overload]  # fmt: skip
        loss, *rest = tensors_of(result)
        loss.backward(torch.full_like(loss, upstream))
        assert not any(tensor.requires_grad for tensor in rest)
        return (loss.detach(), logits.grad, *rest)

    found, expected = outcome(), longer(outcome, monkeypatch)
    assert took == [True]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@objectives
def test_each_loss_of_the_table_takes_the_short_way(
    fused: str, objective: Any, took: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = tuple(2 if knob.whole else min(knob.least + 0.7, knob.most) for knob in objective.knobs)

    def outcome() -> tuple[Tensor, Tensor]:
        logits = CASE.logits.clone().requires_grad_()
        loss = loss_of(objective.id, numbers, logits, CASE.target, backend=fused)
        (3 * loss).backward()
        assert logits.grad is not None
        return loss.detach(), logits.grad

    found, expected = outcome(), longer(outcome, monkeypatch)
    assert took == [True]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8], ids=str)
@reductions
@pytest.mark.parametrize("shape", [(12, 21), (3, 21, 4), (2, 21, 2, 3)], ids=str)
def test_labels_of_images_take_the_short_way(
    fused: str, shape: tuple[int, ...], reduction: str, labels: torch.dtype, took: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    leaf = torch.randn(shape, generator=generator)
    target = torch.randint(21, (shape[0], *shape[2:]), generator=generator)
    target.view(-1)[3] = 255 if labels == torch.uint8 else 100

    def outcome() -> tuple[Tensor, ...]:
        logits = leaf.clone().requires_grad_()
        result = dynamics_aware_loss(
            logits, target.to(labels), 0.8, 0.4, ignore_index=int(target.view(-1)[3]), reduction=reduction,
            return_stats=True, backend=fused,
        )  # type: ignore[call-overload]  # fmt: skip
        loss, *rest = tensors_of(result)
        assert loss.shape == (target.shape if reduction == "none" else ())
        assert {tensor.shape for tensor in rest} == {target.shape}
        loss.sum().backward()
        return (loss.detach(), logits.grad, *rest)

    found, expected = outcome(), longer(outcome, monkeypatch)
    assert took == [True]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_what_the_statistics_are(fused: str) -> None:
    logits = CASE.logits.clone().requires_grad_()
    loss, stats = dynamics_aware_loss(logits, CASE.target, 0.8, return_stats=True, backend=fused)  # type: ignore[call-overload]
    assert type(stats) is RowStats
    stats.target_prob.zero_()  # theirs who got it
    loss.backward()
    again = CASE.logits.clone().requires_grad_()
    dynamics_aware_loss(again, CASE.target, 0.8, backend=fused).backward()  # type: ignore[call-overload]
    torch.testing.assert_close(logits.grad, again.grad, rtol=0, atol=0)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient(grad: Any, fused: str, took: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = CASE.logits.clone().requires_grad_()

    def outcome() -> Any:
        with grad():
            result = dynamics_aware_loss(logits, CASE.target, 0.8, return_stats=True, backend=fused)  # type: ignore[call-overload]
        return tensors_of(result)

    found = outcome()
    assert took == [True]
    assert not found[0].requires_grad
    torch.testing.assert_close(found, longer(outcome, monkeypatch), rtol=0, atol=0)


@pytest.mark.parametrize("leaf", [True, False], ids=["with a gradient", "without"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@dtypes
def test_a_schedule_is_told_on_the_way(
    fused: str, dtype: torch.dtype, reduction: Any, leaf: bool, took: list[bool]
) -> None:
    """Of the call with the knobs from before it, which the telling writes over."""
    case = make_case(9, 21, dtype)
    case.target[3] = -100
    results = []
    for told in (True, False):
        numbers = pace_numbers(torch.device("cpu"))
        numbers.all.copy_(torch.tensor([0.7, 0.2, 0.8, 0.4, 900, 1.4, 0.6, 0.0]))
        logits = case.logits.clone().requires_grad_(leaf)
        hearer = (numbers.all, 1, 1.5, 0.8) if told else None
        result: Any = loss_of(
            dynamics_aware.id, numbers.knobs, logits, case.target, reduction=reduction, return_stats=True,
            backend=fused, hearer=hearer,
        )  # type: ignore[arg-type]  # fmt: skip
        loss, stats = (result, None) if told else result
        if leaf:
            loss.sum().backward()
        if stats is not None:
            pace.see(numbers, stats, case.target, 1.5, 0.8)
        results.append((loss.detach(), logits.grad, numbers.all))
    (loss, gradient, numbers), expected = results
    assert took == [True, True]
    torch.testing.assert_close((loss, gradient), expected[:2], rtol=0, atol=0)
    torch.testing.assert_close(numbers, expected[2], rtol=1e-5, atol=1e-6)


# --- knobs


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["numbers", "tensors"])
def test_numbers_that_change_are_seen(kind: Callable[[float], Any], took: list[bool]) -> None:
    for q in (0.3, 0.9, 0.3, 1.2):
        found = dynamics_aware_loss(CASE.logits, CASE.target, kind(q), kind(0.2))
        expected = dynamics_aware_loss(CASE.logits, CASE.target, q, 0.2, backend="eager")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert took[::2] == [True] * 4


def test_more_numbers_than_are_remembered() -> None:
    first = dynamics_aware_loss(CASE.logits, CASE.target, 0.25)
    for step in range(1500):
        dynamics_aware_loss(CASE.logits, CASE.target, 0.3 + step / 1500)
    assert torch.equal(dynamics_aware_loss(CASE.logits, CASE.target, 0.25), first)


# --- with modules, and set aside


def test_a_module_takes_it(took: list[bool]) -> None:
    criterion = DynamicsAwareLoss(total_steps=10)
    for _ in range(3):
        criterion(CASE.logits.clone().requires_grad_(), CASE.target).backward()
    functional_call(criterion, {}, (CASE.logits, CASE.target))
    assert took == [True] * 4


def test_a_threads_backward(took: list[bool]) -> None:
    # Autograd walks a CUDA graph in a thread of its own, without the GIL; here a thread of Python's does the same.
    from concurrent.futures import ThreadPoolExecutor

    logits = CASE.logits.clone().requires_grad_()
    loss = dynamics_aware_loss(logits, CASE.target, 0.7)
    expected = CASE.logits.clone().requires_grad_()
    dynamics_aware_loss(expected, CASE.target, 0.7, backend="eager").backward()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    torch.testing.assert_close(logits.grad, expected.grad)
