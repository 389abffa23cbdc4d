"""A weight a row: against rows repeated as often as they count, and against the plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dal_kernels import DynamicsAwareLoss, dynamics_aware_loss, linear_dynamics_aware_loss, reference
from support.axes import reductions

ROWS, CLASSES = 6, 5
COUNTS = torch.tensor([1, 3, 2, 0, 1, 4])
TARGET = torch.tensor([0, 4, 2, 1, -100, 3])


def logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def value_and_gradient(input: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    loss = dynamics_aware_loss(input, target, 1.2, 0.4, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), input)[0]


@pytest.mark.parametrize("class_weight", [None, torch.rand(CLASSES)], ids=["no class weights", "class weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_row_counts_as_often_as_its_weight_says(backend: str, reduction: str, class_weight: Tensor | None) -> None:
    input = logits(ROWS, CLASSES)
    options = {"reduction": reduction, "weight": class_weight, "backend": backend}
    loss, gradient = value_and_gradient(input, TARGET, sample_weight=COUNTS.float(), **options)
    repeated = value_and_gradient(input.repeat_interleave(COUNTS, 0), TARGET.repeat_interleave(COUNTS), **options)
    torch.testing.assert_close(loss, repeated[0])
    by_row = torch.zeros_like(gradient).index_add(0, torch.arange(ROWS).repeat_interleave(COUNTS), repeated[1])
    torch.testing.assert_close(gradient, by_row)


@reductions
@pytest.mark.parametrize("shape", [(CLASSES,), (ROWS, CLASSES), (ROWS, CLASSES, 2, 3)], ids=str)
def test_every_shape_is_as_in_the_reference(backend: str, shape: tuple[int, ...], reduction: str) -> None:
    input = logits(*shape)
    target_shape = shape[2:] if len(shape) == 1 else (shape[0], *shape[2:])
    target = torch.arange(torch.Size(target_shape).numel()).reshape(target_shape) % CLASSES
    for weight in (torch.rand(target_shape), torch.rand(target_shape[:1], dtype=torch.float64)):
        options = {"sample_weight": weight, "reduction": reduction}
        loss, gradient = value_and_gradient(input, target, backend=backend, **options)
        truth = reference.dynamics_aware_loss(input, target, 1.2, 0.4, **options)
        torch.testing.assert_close(loss, truth)
        torch.testing.assert_close(gradient, torch.autograd.grad(truth.sum(), input)[0])
    assert loss.shape == (target_shape if reduction == "none" else ())


@reductions
def test_the_weights_may_be_learnt(backend: str, reduction: str) -> None:
    """As when rows are weighted by what helps elsewhere: the gradient of the weights, in float64 by differences."""
    input, weight = logits(ROWS, CLASSES).double(), torch.rand(ROWS, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: dynamics_aware_loss(input, TARGET, 1.2, 0.4, sample_weight=w, reduction=reduction, backend=backend),
        (weight,),
    )


def test_an_ignored_row_hides_its_weight_and_no_other_row_does(backend: str) -> None:
    weight = torch.ones(ROWS)
    weight[4] = torch.nan  # the ignored one
    options = {"sample_weight": weight, "backend": backend}
    loss, gradient = value_and_gradient(logits(ROWS, CLASSES), TARGET, **options)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    weight[0] = torch.nan
    assert value_and_gradient(logits(ROWS, CLASSES), TARGET, **options)[0].isnan()


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0] * ROWS, TypeError, "got list"),
        (2.0, TypeError, "got float"),
        (torch.ones(ROWS, dtype=torch.int64), TypeError, "floating-point, got torch.int64"),
        (torch.ones(ROWS + 1), ValueError, r"shape \(6,\), got shape \(7,\)"),
        (torch.ones(()), ValueError, r"shape \(6,\), got shape \(\)"),
        (torch.ones(ROWS, device="meta"), ValueError, "on the device of input, cpu, got meta"),
    ],
)
def test_a_weight_that_is_none_is_one_clear_error(weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^sample_weight must be .*{message}"):
        dynamics_aware_loss(logits(ROWS, CLASSES), TARGET, 0.7, sample_weight=weight)


@reductions
def test_the_layer_form_weighs_rows_alike(backend: str, reduction: str) -> None:
    features, layer = logits(ROWS, 3), torch.nn.Linear(3, CLASSES)
    options = {
        "sample_weight": COUNTS.float(),
        "reduction": reduction,
        "backend": backend,
        "weight": torch.rand(CLASSES),
    }
    wanted = (features, layer.weight, layer.bias)
    fused = linear_dynamics_aware_loss(
        features, layer.weight, TARGET, 1.2, 0.4, bias=layer.bias, chunk_bytes=2 * 4 * CLASSES, **options
    )
    plain = dynamics_aware_loss(layer(features), TARGET, 1.2, 0.4, **options)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(torch.autograd.grad(fused.sum(), wanted), torch.autograd.grad(plain.sum(), wanted))


def test_the_module_passes_it_on() -> None:
    criterion, input = DynamicsAwareLoss(total_steps=10, pace="fixed"), logits(ROWS, CLASSES)
    q, bootstrap_weight = criterion.schedule.at(0)
    expected = dynamics_aware_loss(input, TARGET, q, bootstrap_weight, sample_weight=COUNTS.float())
    torch.testing.assert_close(criterion(input, TARGET, sample_weight=COUNTS.float()), expected)
