"""The fused layer in torch's graph: backwards over a kept one, second derivatives, transforms, and compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dal_kernels.linear_ops import linear_gradient, linear_loss
from support.axes import bootstraps, dtypes, reductions
from support.layers import N, fused_layer, gradients, layer, two_steps


@dtypes
@reductions
def test_two_backwards_over_a_kept_graph_are_independent(fused: str, dtype: torch.dtype, reduction: str) -> None:
    given = layer(dtype)
    loss = fused_layer(given, backend=fused, reduction=reduction).sum()
    leaves = [given[name] for name in ("input", "classifier_weight", "bias")]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.fill_(77.0)
    for factor, keep in ((4.0, True), (1.0, False)):
        got = torch.autograd.grad(factor * loss, leaves, retain_graph=keep)
        torch.testing.assert_close(list(got), [factor * gradient for gradient in expected])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@reductions
@bootstraps
def test_schedule_and_statistics_may_change_before_the_backward(fused: str, reduction: str, bootstrap: str) -> None:
    given, outcomes = layer(), []
    for edit in (False, True):
        q, weight = torch.tensor(0.7), torch.tensor(0.5)
        options = {"reduction": reduction, "bootstrap": bootstrap, "return_stats": True, "backend": fused}
        loss, stats = fused_layer(given, q=q, bootstrap_weight=weight, **options)
        if edit:
            for value in (q, weight, *stats):
                value.zero_()
        outcomes.append(gradients(loss, given))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=0, atol=0)


def test_schedule_values_may_differ_by_row(backend: str) -> None:
    given = layer(torch.float64)
    options = {"q": torch.linspace(0.2, 2.0, N), "bootstrap_weight": torch.linspace(0.0, 1.0, N), "backend": backend}
    loss, plain = (f(given, **options) for f in (fused_layer, two_steps))
    torch.testing.assert_close(gradients(loss, given), gradients(plain, given))


@pytest.mark.parametrize("by", ["input", "classifier_weight", "bias"])
@pytest.mark.parametrize("leaf", [True, False])
def test_a_second_derivative_is_refused_aloud(fused: str, by: str, leaf: bool) -> None:
    given = layer(rows=12_000 if not leaf else N)  # more than is kept whole
    inner = dict(given) if leaf else {**given, "input": given["input"] * 1.0}
    loss = fused_layer(inner, 512, backend=fused)
    (gradient,) = torch.autograd.grad(loss, given["input"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*eager"):
        torch.autograd.grad(gradient.square().sum(), given[by])


def test_the_eager_backend_has_second_derivatives_in_chunks_too() -> None:
    given = layer(torch.float64, rows=3, classes=4)

    def loss_of(*leaves: Tensor) -> Tensor:
        named = dict(zip(("input", "classifier_weight", "bias"), leaves, strict=True))
        return fused_layer({**given, **named}, 1, q=1.2, backend="eager")

    leaves = tuple(given[name] for name in ("input", "classifier_weight", "bias"))
    assert torch.autograd.gradgradcheck(loss_of, leaves, fast_mode=True)


def test_function_transforms_go_to_plain_operations(fused: str) -> None:
    given = layer(torch.float64)

    def loss_of(x: Tensor, backend: str = "auto") -> Tensor:
        return fused_layer({**given, "input": x}, backend=backend)

    torch.testing.assert_close(
        torch.func.grad(loss_of)(given["input"]), torch.autograd.grad(loss_of(given["input"]), given["input"])[0]
    )
    with pytest.raises(RuntimeError, match="eager"):
        torch.func.grad(lambda x: loss_of(x, fused))(given["input"])


@pytest.mark.sampled(5)
@reductions
@pytest.mark.parametrize("return_stats", [False, True])
def test_compiles_to_one_graph(backend: str, reduction: str, return_stats: bool) -> None:
    given = layer()
    counter = CompileCounterWithBackend("aot_eager")
    q = torch.tensor(0.6)

    def loss_of(x: Tensor) -> Any:
        return fused_layer(
            {**given, "input": x * 1.5}, q=q, reduction=reduction, return_stats=return_stats, backend=backend
        )

    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    for value in (0.6, 1.2):
        q.fill_(value)
        got, plain = compiled(given["input"]), loss_of(given["input"])
        torch.testing.assert_close(got, plain, equal_nan=True)
        got, plain = (result[0] if return_stats else result for result in (got, plain))
        torch.testing.assert_close(gradients(got, given), gradients(plain, given), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.sampled(3)
@dtypes
@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False]], ids=str)
def test_opcheck(fused: str, dtype: torch.dtype, wanted: list[bool]) -> None:
    tensors = [value.detach() for value in layer(dtype).values()]
    tensors[-1].clamp_(0)  # NaN, the p_y of ignored rows, is not equal to itself
    how = (fused, 8, dtype)
    for reduction, hard in ((0, False), (1, True)):
        knobs, objective = torch.tensor([0.7, 0.4]), int(hard)
        arguments = (*tensors, knobs, None, objective, -100, reduction, *how, hard, wanted)
        torch.library.opcheck(linear_loss, arguments)
        _, fields, prediction, *_ = linear_loss(*arguments)
        upstream = torch.ones(N if reduction == 0 else (), dtype=fields.dtype)
        torch.library.opcheck(linear_gradient, (*tensors, fields, prediction, upstream, -100, *how, wanted))
