"""A layer form under what torch puts around calls: compilation, transforms, autocast, second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dal_kernels import (
    CrossEntropyLoss,
    GeneralizedCrossEntropyLoss,
    linear_loss,
)
from dal_kernels.linear_ops import linear_gradient
from dal_kernels.linear_ops import linear_loss as operator
from support.truth import relative_error
from support.unfused import gradients, layer, unfused


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "scale": 2.0}, {"num_items": 7}, {"reduction": "none"}], ids=str
)
def test_compiles_to_one_graph(fused: str, options: dict[str, Any]) -> None:
    given = layer((4, 6), torch.float32) | {"shift": 1} | options
    given["sample_weight"] = torch.rand(4, 6, requires_grad=True)
    loss = GeneralizedCrossEntropyLoss(0.7, target_shift=0.5, backend=fused)
    compiled = torch.compile(lambda **named: linear_loss(loss, **named), fullgraph=True, backend="aot_eager")
    got, expected = compiled(**given), linear_loss(loss, **given)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, given), gradients(expected, given))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 2.0}, {"num_items": 7}], ids=str)
def test_what_is_exported_or_transformed_is_the_same(options: dict[str, Any]) -> None:
    given = layer((4, 6), torch.float32) | options
    loss = GeneralizedCrossEntropyLoss(0.7)
    others = {name: value for name, value in given.items() if name != "input"}
    of_input = lambda x: linear_loss(loss, x, **others)  # noqa: E731
    expected = torch.autograd.grad(of_input(given["input"]), given["input"])[0]
    torch.testing.assert_close(torch.func.grad(of_input)(given["input"].detach()), expected, rtol=1e-4, atol=1e-6)
    recorded = torch.fx.experimental.proxy_tensor.make_fx(of_input)(given["input"].detach())
    leaf = given["input"].detach().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(recorded(leaf), leaf)[0], expected, rtol=1e-4, atol=1e-6)


def test_autocast_makes_halves(fused: str) -> None:
    given = layer((4, 6), torch.float32) | {"softcap": 3.0, "scale": torch.tensor(2.0, requires_grad=True)}
    loss = CrossEntropyLoss(backend=fused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = linear_loss(loss, **given), unfused(loss, **given)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-3)
    for one, other in zip(gradients(got, given), gradients(expected, given), strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, other.double()) < 3e-2


@pytest.mark.parametrize("by", ["input", "linear_weight", "linear_bias", "scale", "sample_weight"])
def test_a_second_derivative_is_refused_aloud(fused: str, by: str) -> None:
    given = layer((8,)) | {"scale": torch.tensor(1.5, dtype=torch.float64, requires_grad=True)}
    given["sample_weight"] = torch.rand(8, dtype=torch.float64, requires_grad=True)
    loss = linear_loss(CrossEntropyLoss(backend=fused), **given)
    (gradient,) = torch.autograd.grad(loss, given[by], create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*eager"):
        torch.autograd.grad(gradient.square().sum(), given["linear_weight"])


def test_the_operators_are_what_torch_takes_them_for(fused: str) -> None:
    given = layer((9,), torch.float32)
    target = given["target"].clamp_min(0)
    tensors = [given[name].detach() for name in ("input", "linear_weight", "linear_bias")]
    rows = torch.linspace(-1, 1, 9)
    changes = (2.0, rows, torch.tensor(1.5))
    wanted = [True] * 5
    arguments = (*tensors, target, torch.tensor([0.7]), None, 2, -100, 2, fused, 4, torch.float32, True, wanted)
    torch.library.opcheck(operator, (*arguments, *changes, rows.square()))
    _, fields, prediction, *_ = operator(*arguments)
    one = torch.ones(())
    more = (target.flip(0).unsqueeze(0), rows.unsqueeze(0))
    how = (-100, fused, 4, torch.float32, wanted)
    torch.library.opcheck(linear_gradient, (*tensors, target, fields, prediction, one, *how, *changes, *more))
