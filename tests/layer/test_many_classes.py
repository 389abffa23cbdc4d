"""Losses behind a layer of many classes: all that linear_loss takes is what F.linear and the loss give in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given as over
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import (
    CrossEntropyLoss,
    GeneralizedCrossEntropyLoss,
    LabelDistributionAwareMarginLoss,
    linear_fused,
    linear_loss,
)
from dal_kernels.linear_ops import linear_gradient
from dal_kernels.linear_ops import linear_loss as operator
from support.axes import HALVES, reductions
from support.truth import SLACK, relative_error
from support.unfused import LOSSES, C, D, affine_losses, gradients, hold, layer, losses, of_backend, unfused


@pytest.mark.sampled(2)
@losses
@reductions
def test_every_loss_takes_all_of_it(fused: str, loss: Any, reduction: str) -> None:
    given = layer((3, 7))
    given |= {"shift": 1, "softcap": 2.5, "reduction": reduction}
    given["scale"] = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    given["sample_weight"] = torch.rand(3, 7, dtype=torch.float64).requires_grad_()
    hold(loss, given, fused)


@losses
def test_plain_operations_do_the_same(loss: Any) -> None:
    given = layer((2, 5))
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, dtype=torch.float64)
    hold(loss, {**given, "softcap": 4.0, "scale": scale, "sample_weight": weights, "num_items": 9}, "eager")


SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@over(st.data())
def test_any_shapes_strides_and_options(data: st.DataObject) -> None:
    draw = data.draw
    loss = draw(st.sampled_from(LOSSES))
    shape = draw(SHAPES)
    given = layer(shape, seed=draw(st.integers(0, 9)))
    how = draw(st.sampled_from(["dense", "transposed", "sliced", "expanded", "frozen"]))
    features = given["input"].detach()
    if how == "transposed":
        features = features.movedim(-1, 0).contiguous().movedim(0, -1)
    elif how == "sliced":
        features = torch.stack([features, features], -1)[..., 0]
    elif how == "expanded" and len(shape) > 1:
        features = features[:1].expand(*shape, D)
    given["input"] = features.requires_grad_(how != "frozen")
    if draw(st.booleans()):
        del given["linear_bias"]
    if draw(st.booleans()):
        given["linear_weight"] = torch.stack([given["linear_weight"].detach()] * 2)[1].t().contiguous().t()
        given["linear_weight"].requires_grad_(how == "frozen" or draw(st.booleans()))
    given["softcap"] = draw(st.sampled_from([None, 1.5, 30.0]))
    given["scale"] = draw(st.sampled_from([1.0, 0.7, torch.tensor(1.4, dtype=torch.float64, requires_grad=True)]))
    if len(shape) and shape[-1] > 1:
        given["shift"] = draw(st.integers(0, shape[-1] - 1))
    given["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    if draw(st.booleans()):
        given["sample_weight"] = torch.rand(shape, dtype=torch.float64).requires_grad_(draw(st.booleans()))
    if given["reduction"] == "mean":
        given["num_items"] = draw(st.sampled_from([None, 7, torch.tensor(11), torch.tensor([5.0])]))
    if draw(st.booleans()) and not any(value.requires_grad for value in given.values() if isinstance(value, Tensor)):
        given["input"].requires_grad_()
    hold(loss, given, draw(st.sampled_from(["cpu", "eager"])), draw(st.integers(1, 9)))


@pytest.mark.sampled(5)
@affine_losses
@reductions
@pytest.mark.parametrize("share", [0.3, "one a row", None], ids=str)
def test_two_labels_and_smoothed_ones(backend: str, loss: Any, reduction: str, share: Any) -> None:
    given = layer((3, 5)) | {"shift": 1, "softcap": 3.0, "reduction": reduction}
    given["scale"] = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    given["sample_weight"] = torch.rand(3, 5, dtype=torch.float64).requires_grad_()
    if share is not None:
        other = layer((3, 5), seed=1)["target"]
        given["mix"] = (other, torch.rand(3, 5, dtype=torch.float64) if isinstance(share, str) else share)
    hold(loss, given, backend)


def test_what_cannot_be_smoothed_or_shifted_says_so() -> None:
    given = layer((3, 5))
    with pytest.raises(ValueError, match="label_smoothing must be 0 for generalized_cross_entropy_loss"):
        linear_loss(GeneralizedCrossEntropyLoss(label_smoothing=0.1), **given)
    with pytest.raises(ValueError, match="target_shift must be None with mix"):
        linear_loss(GeneralizedCrossEntropyLoss(target_shift=0.1), **given, mix=(given["target"], 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 3.0},
        {"scale": 1.7},
        {"softcap": 3.0, "scale": 1.7, "sample_weight": torch.linspace(0, 2, 96)},
        {"num_items": 960},
    ],
    ids=["softcap", "scale", "all", "num_items"],
)
def test_no_further_from_truth_than_the_plain_pair(fused: str, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    given = layer((96,), dtype) | changes
    if "scale" in changes:
        given["scale"] = torch.tensor(changes["scale"], requires_grad=True)
    wide = lambda value: (  # noqa: E731
        value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
    )
    exact = {name: wide(value) for name, value in given.items()}
    loss = LabelDistributionAwareMarginLoss(torch.arange(1, C + 1), scale=2.0, backend=fused)
    true = gradients(unfused(of_backend(loss, "eager"), **exact), exact)
    got = gradients(linear_loss(loss, **given, chunk_bytes=20 * C * 4), given)
    plain = gradients(unfused(loss, **given), given)
    for one, other, truth in zip(got, plain, true, strict=True):
        assert relative_error(one, truth) <= 1.3 * relative_error(other, truth) + SLACK[dtype]


def test_float16_keeps_what_a_large_count_would_flush(fused: str) -> None:
    given = layer((64,), torch.float16)
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items() if name != "target"}
    exact["target"] = given["target"]
    items = 2**20
    (linear_loss(CrossEntropyLoss(backend=fused), **given, num_items=items, reduction="mean") * 65536.0).backward()
    (unfused(CrossEntropyLoss(), **exact, num_items=items) * 65536.0).backward()
    for name in ("input", "linear_weight", "linear_bias"):
        assert relative_error(given[name].grad, exact[name].grad) < 5e-3


@pytest.mark.parametrize("frozen", [("linear_weight", "linear_bias"), ("input",), ("input", "linear_weight")], ids=str)
def test_nothing_is_multiplied_for_what_is_frozen(
    fused: str, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one pass over the logits carries the weights of rows."""
    given = layer((12,), torch.float32) | {"sample_weight": torch.rand(12, requires_grad=True)}
    for name in frozen:
        given[name].requires_grad_(False)
    calls: list[tuple[str, list[bool]]] = []

    def spy(name: str, run: Any, place: int) -> None:
        def noted(*arguments: Any) -> Any:
            calls.append((name, arguments[place]))
            return run(*arguments)

        monkeypatch.setattr(linear_fused, name, noted)

    spy("linear_loss", operator, 13)
    spy("linear_gradient", linear_gradient, 11)
    linear_loss(CrossEntropyLoss(backend=fused), **given).backward()
    wanted = [name not in frozen for name in ("input", "linear_weight", "linear_bias")]
    assert calls == [("linear_loss", [*wanted, False, False])]


def test_class_priors_are_a_bias(fused: str) -> None:
    """Logit adjustment, and sampled softmax's correction: rows of the classifier with a bias of -ln q."""
    given = layer((30,))
    prior = torch.rand(C, dtype=torch.float64).softmax(0)
    bias = given.pop("linear_bias")
    loss = of_backend(CrossEntropyLoss(), fused)
    got = linear_loss(loss, **given, linear_bias=bias + prior.log())
    expected = F.cross_entropy(F.linear(given["input"], given["linear_weight"], bias) + prior.log(), given["target"])
    torch.testing.assert_close(got, expected)
    leaves = [given["input"], given["linear_weight"], bias]
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))
