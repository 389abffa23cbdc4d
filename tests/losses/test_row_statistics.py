"""Losses of one's own from row statistics: what they are, what they cost, and what may happen before the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dal_kernels import (
    focal_loss,
    generalized_cross_entropy_loss,
    linear_row_statistics,
    row_statistics,
)
from dal_kernels.ops import KERNELS
from dal_kernels.quantities import RowStatistics
from support.axes import dtypes
from support.family import gradient_of, rows_of

QUANTITIES = RowStatistics._fields[:-1]
# Of a gradient in its dtype, from sums in float32 or float64, relative to the true one.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@dtypes
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_each_quantity_and_its_gradient(fused: str, quantity: str, dtype: torch.dtype) -> None:
    logits, target = rows_of(7, 130, 2.0, dtype)
    target[4] = -100
    upstream = torch.linspace(-1, 1, 7, dtype=torch.float64)
    found = []
    for leaf, backend in ((logits.clone(), fused), (logits.double(), "eager")):
        value = getattr(row_statistics(leaf.requires_grad_(), target, backend=backend), quantity)
        assert value.isnan().tolist() == [quantity == "log_prob" and row == 4 for row in range(7)]
        (gradient,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
        found.append((value.double(), gradient.double()))
    (value, gradient), (expected, true) = found
    bound = BOUNDS[dtype]
    torch.testing.assert_close(value, expected, rtol=min(bound, 2e-6), atol=min(bound, 2e-6), equal_nan=True)
    assert not gradient[4].any()
    assert (gradient - true).norm() <= bound * true.norm()


@dtypes
def test_rows_of_two_targets(fused: str, dtype: torch.dtype) -> None:
    logits, target = rows_of(7, 130, 2.0, dtype)
    logits.requires_grad_()
    other = target.flip(0)
    mixed = focal_loss(logits, target, mix=(other, 0.3), backend=fused)
    apart = 0.3 * focal_loss(logits, target, backend="eager") + 0.7 * focal_loss(logits, other, backend="eager")
    found, expected = gradient_of(mixed, logits).double(), gradient_of(apart, logits).double()
    assert (found - expected).norm() <= 4 * BOUNDS[dtype] * expected.norm()


def test_an_ignored_target_of_two_is_none_though_the_first_class_is_impossible(backend: str) -> None:
    logits, target = rows_of(7, 5, 2.0)
    logits[:, 0] = -float("inf")
    target, logits = target.clamp_min(1), logits.requires_grad_()
    other = target.flip(0).index_fill(0, torch.tensor([1, 4]), -100)
    rows = focal_loss(logits, target, mix=(other, 0.3), reduction="none", backend=backend)
    apart = 0.3 * focal_loss(logits, target, reduction="none", backend="eager")
    apart = apart + 0.7 * focal_loss(logits, other, reduction="none", backend="eager")
    torch.testing.assert_close(rows, apart)
    torch.testing.assert_close(gradient_of(rows.sum(), logits), gradient_of(apart.sum(), logits))


def spy_on_gradients(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    kernels = KERNELS[backend]
    name = "gradient" if kernels.gradient_of_slopes is None else "gradient_of_slopes"

    def spy(*arguments: Any) -> Tensor:
        calls.append(arguments)
        made: Tensor = getattr(kernels, name)(*arguments)
        return made

    monkeypatch.setitem(KERNELS, backend, kernels._replace(**{name: spy}))
    return calls


def test_what_a_loss_does_not_use_costs_nothing_in_the_backward(fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = rows_of(9, 50, 2.0, torch.float32)
    logits.requires_grad_()
    calls = spy_on_gradients(monkeypatch, fused)
    loss = ((1 - row_statistics(logits, target, backend=fused).log_prob.mul(0.7).exp()) / 0.7).mean()
    expected = generalized_cross_entropy_loss(logits, target, 0.7, backend=fused)
    torch.testing.assert_close(gradient_of(loss, logits), gradient_of(expected, logits))
    (arguments,) = calls
    if KERNELS[fused].gradient_of_slopes is None:
        *_, fields, prediction, _, _, _ = arguments
        assert len(fields) < 9, "terms of the sums over all classes"
        assert prediction.numel() == 0
    else:
        assert arguments[-4:] == (None,) * 4


def test_the_prediction_may_be_edited_before_the_backward(fused: str) -> None:
    logits, target = rows_of(9, 50, 2.0, torch.float32)
    logits.requires_grad_()
    row = row_statistics(logits, target, backend=fused)
    expected = gradient_of(row_statistics(logits, target, backend="eager").max_log_prob.sum(), logits)
    row.prediction.zero_()
    torch.testing.assert_close(gradient_of(row.max_log_prob.sum(), logits), expected)


def test_a_label_that_is_no_class_is_named() -> None:
    logits, target = rows_of(9, 50, 2.0, torch.float32)
    target[3] = 77
    with pytest.raises(ValueError, match="target at row 3 is 77, accepted are 0 to 49 and ignore_index -100"):
        row_statistics(logits, target)


def test_only_a_first_target_is_ignored() -> None:
    if "cpu" not in KERNELS:
        pytest.skip("the CPU kernels are not built")
    logits = torch.randn(3, 5)
    targets = torch.tensor([[0, -100, 2], [1, -100, -100]])
    for first, message in ((0, "^target 1 at row 2 is -100, accepted are 0 to 4, because only target 0 may be"),
                           (7, "^target at row 0 is 7, accepted are 0 to 4 and ignore_index -100")):  # fmt: skip
        targets[0, 0] = first
        with pytest.raises(ValueError, match=message):
            KERNELS["cpu"].quantities(logits, targets, -100)


@pytest.mark.parametrize("shape", [(1, 1), (3, 300_000), (5, 4097), (300, 1000), (4000, 14)], ids=str)
@dtypes
def test_bits_do_not_depend_on_the_number_of_threads(threads: None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, target = rows_of(*shape, 2.0, dtype)
    logits.requires_grad_()
    found = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        *values, prediction = row_statistics(logits, target, backend="cpu")
        found.append((*values, prediction, gradient_of(sum(value.sum() for value in values), logits)))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@dtypes
@pytest.mark.parametrize("value", [9.0, float("inf"), float("nan")], ids=str)
def test_the_first_of_equal_classes_is_found_wherever_it_is(fused: str, value: float, dtype: torch.dtype) -> None:
    classes = 300
    places = torch.arange(classes)
    later = torch.maximum(places, torch.tensor(211))
    logits = torch.zeros(classes, classes).index_put((places, places), torch.tensor(value))
    logits = logits.index_put((places, later), torch.tensor(value)).to(dtype)
    assert torch.equal(row_statistics(logits, places, backend=fused).prediction, places)


def a_loss_of_ones_own(row: Any) -> Tensor:
    known = ~row.log_prob.isnan()
    loss = -(1 - row.square_sum) * torch.where(known, row.log_prob, 0.0) + 0.1 * row.entropy
    return (loss + 0.01 * row.sum_log_prob + row.max_log_prob.exp())[known].mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_row_statistics_make_a_loss_of_ones_own(fused: str, dtype: torch.dtype) -> None:
    logits, target = rows_of(9, 50, 2.0, dtype)
    target[4] = -100
    given, exact = logits.clone().requires_grad_(), logits.double().clone().requires_grad_()
    made = gradient_of(a_loss_of_ones_own(row_statistics(given, target, backend=fused)), given)
    true = gradient_of(a_loss_of_ones_own(row_statistics(exact, target, backend="eager")), exact)
    p = exact.softmax(1)
    own = p.gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1).log()
    loss = -(1 - p.square().sum(1)) * own - 0.1 * (p * p.log()).sum(1) + 0.01 * p.log().sum(1) + p.amax(1)
    torch.testing.assert_close(gradient_of(loss[target != -100].mean(), exact), true, rtol=1e-10, atol=1e-12)
    bound = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3}[dtype]
    assert (made.double() - true).norm() <= bound * true.norm()


def test_row_statistics_compile_to_one_graph(fused: str) -> None:
    logits, target = rows_of(9, 50, 2.0, torch.float32)
    logits.requires_grad_()
    plain = a_loss_of_ones_own(row_statistics(logits, target, backend=fused))

    def loss_of_logits(z: Tensor) -> Tensor:
        row = row_statistics(z, target, backend=fused)
        return (-row.log_prob + row.entropy).mean()

    compiled = torch.compile(loss_of_logits, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(gradient_of(compiled, logits), gradient_of(loss_of_logits(logits), logits))
    assert plain.isfinite()


def test_the_linear_form_has_row_statistics(fused: str) -> None:
    torch.manual_seed(0)
    layer, features, target = torch.nn.Linear(5, 40), torch.randn(10, 5, requires_grad=True), torch.randint(40, (10,))
    target[3] = -100
    fused_row = linear_row_statistics(
        features, layer.weight, target, linear_bias=layer.bias, chunk_bytes=40 * 4 * 3, backend=fused
    )
    row = row_statistics(layer(features), target, backend="eager")
    torch.testing.assert_close(fused_row, row, rtol=1e-5, atol=1e-5, equal_nan=True)
    leaves = (features, layer.weight, layer.bias)
    torch.testing.assert_close(
        torch.autograd.grad(a_loss_of_ones_own(fused_row), leaves),
        torch.autograd.grad(a_loss_of_ones_own(row), leaves),
        rtol=1e-4,
        atol=1e-6,
    )
