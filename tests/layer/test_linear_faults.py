"""What a reader of the layer forms once found wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import (
    BrierLoss,
    CrossEntropyLoss,
    GeneralizedCrossEntropyLoss,
    LinearLoss,
    arguments,
    linear_call,
    linear_loss,
    linear_row_statistics,
)
from dal_kernels.arguments import label_error
from dal_kernels.knobs import knob_tensor
from dal_kernels.linear_chunks import Changes, LayerInChunks
from dal_kernels.objectives import generalized_cross_entropy


@pytest.mark.parametrize("classes", [20, 4300])
def test_the_gradient_of_a_scale_of_0(classes: int) -> None:
    torch.manual_seed(0)
    features, weight, bias = torch.randn(7, 5), torch.randn(classes, 5), torch.randn(classes)
    target = torch.randint(classes, (7,))
    scales = [torch.zeros((), requires_grad=True) for _ in range(2)]
    F.cross_entropy(F.linear(features, weight, bias) * scales[0], target).backward()
    linear_loss(CrossEntropyLoss(), features, weight, target, linear_bias=bias, scale=scales[1]).backward()
    torch.testing.assert_close(scales[1].grad, scales[0].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_gradient_of_a_scale_under_a_cap_is_summed_in_float32(dtype: torch.dtype) -> None:
    """Of what stands in ``dtype``: a row's sum that is rounded to it would cost the digits that rows cancel."""
    torch.manual_seed(1)
    gradient, tanh = torch.randn(19, 500).to(dtype), torch.rand(19, 500).to(dtype)
    features, weight, target = torch.randn(19, 3).to(dtype), torch.randn(500, 3).to(dtype), torch.randint(500, (19,))
    changes = Changes(softcap=5.0, target_shift=None, scale=torch.tensor(4.0))
    layer = LayerInChunks(features, weight, None, dtype, 19, [False, False, False, True], target, changes)
    layer.change_back(slice(0, 19), gradient.clone(), target, tanh.clone())
    products = gradient.double() * tanh.double()
    assert (layer.of_scale - 5 * products.sum()).abs() <= 5e-6 * 5 * products.abs().sum()


def test_statistics_take_a_target_of_the_rows_shape_alone() -> None:
    features, weight = torch.randn(2, 6, 4), torch.randn(9, 4)
    with pytest.raises(ValueError, match=r"target must have shape \(2, 6\)"):
        linear_row_statistics(features, weight, torch.zeros(6, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="target must be a tensor, got list"):
        linear_row_statistics(features, weight, [0, 1])  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"mix": True}], ids=str)
def test_create_graph_gives_the_first_derivative_and_refuses_the_second(options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    features, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    target = torch.randint(9, (6,))
    if "mix" in options:
        options = {"mix": (target.flip(0), 0.3)}
    loss = linear_loss(BrierLoss(), features, weight, target, **options).sum()
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    again = linear_loss(BrierLoss(), features, weight, target, **options).sum()
    torch.testing.assert_close(gradient.detach(), torch.autograd.grad(again, features)[0])
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.square().sum().backward()


def test_a_class_is_no_loss_and_options_of_a_new_classifier_are_not_for_one_that_is_given() -> None:
    with pytest.raises(TypeError, match="got the class BrierLoss"):
        LinearLoss(BrierLoss, 3, 4)
    with pytest.raises(ValueError, match="bias, device and dtype must be left out"):
        LinearLoss(GeneralizedCrossEntropyLoss(), 3, 4, bias=False, classifier=torch.nn.Linear(3, 4))


@pytest.mark.parametrize("options", [{"mix": True}, {"label_smoothing": 0.1}, {"row_statistics": True}], ids=str)
def test_plain_operations_keep_no_logits_of_other_chunks(options: dict[str, Any]) -> None:
    """Autograd saves what a chunk of logits is made of, and nothing of their size."""
    torch.manual_seed(3)
    features, weight = torch.randn(32, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    target = torch.randint(500, (32,))
    sizes = []

    def saved(tensor: Any) -> Any:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        if "row_statistics" in options:
            row = linear_row_statistics(features, weight, target, backend="eager", chunk_bytes=4 * 500 * 4)
            loss = (row.log_prob * row.entropy).sum()
        else:
            mix = (target.flip(0), 0.3) if "mix" in options else None
            criterion = BrierLoss(backend="eager", label_smoothing=options.get("label_smoothing", 0.0))
            loss = linear_loss(criterion, features, weight, target, mix=mix, chunk_bytes=4 * 500 * 4)
    assert max(sizes) <= weight.numel()
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, (features, weight)))


def test_a_bad_label_is_named_by_its_row_in_what_was_given() -> None:
    features, weight = torch.randn(2, 5, 3), torch.randn(7, 3)
    target, other = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    target[:, 0] = -1  # of no row, once they are shifted
    target[1, 3] = 7
    for loss in (CrossEntropyLoss(), CrossEntropyLoss(backend="eager"), BrierLoss(label_smoothing=0.1)):
        with pytest.raises(ValueError, match=r"^target at row 8 is 7, accepted are 0 to 6 and ignore_index -100$"):
            linear_loss(loss, features, weight, target, shift=1)
    other[1, 2] = 9
    with pytest.raises(ValueError, match=r"^mix\[0\] at row 7 is 9, accepted"):
        linear_loss(CrossEntropyLoss(), features, weight, other * 0, mix=(other, 0.5), shift=2)
    with pytest.raises(ValueError, match=r"^mix\[0\] at row 7 is 9, accepted"):
        linear_loss(CrossEntropyLoss(), features, weight, other * 0, mix=(other, 0.5))


def test_labels_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def counted(call: Any, name: str = "target") -> Any:
        looks.append(name)
        return label_error(call, name)

    for module in (arguments, linear_call):
        monkeypatch.setattr(module, "label_error", counted)
    features, weight = torch.randn(2, 5, 3, requires_grad=True), torch.randn(7, 3)
    for shift in (0, 1):
        looks.clear()
        linear_loss(CrossEntropyLoss(), features, weight, torch.zeros(2, 5, dtype=torch.long), shift=shift).backward()
        assert looks == ["target"]


def test_a_shift_of_each_label_stands_where_its_label_does() -> None:
    torch.manual_seed(4)
    features, weight, target = torch.randn(2, 5, 3), torch.randn(7, 3), torch.randint(7, (2, 5))
    margins = torch.randn(2, 5)
    found = linear_loss(CrossEntropyLoss(target_shift=margins), features, weight, target, shift=1)
    logits = F.linear(features, weight)[:, :-1].reshape(-1, 7)
    logits[torch.arange(8), target[:, 1:].flatten()] += margins[:, 1:].flatten()
    torch.testing.assert_close(found, F.cross_entropy(logits, target[:, 1:].flatten()))
    # One a class stays one a class, where a sequence is as long as there are classes.
    features, target, margins = torch.randn(7, 3), torch.randint(7, (7,)), torch.randn(7)
    found = linear_loss(CrossEntropyLoss(target_shift=margins), features, weight, target, shift=1)
    logits = F.linear(features, weight)[:-1]
    logits[torch.arange(6), target[1:]] += margins[target[1:]]
    torch.testing.assert_close(found, F.cross_entropy(logits, target[1:]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("scale", {"scale": True}),
        ("softcap", {"softcap": True}),
        ("num_items", {"num_items": True}),
        (r"mix\[1\]", {"mix": (torch.zeros(3, dtype=torch.long), True)}),
        ("target_shift", {"loss": CrossEntropyLoss(target_shift=True)}),
        ("scale", {"loss": CrossEntropyLoss(scale=True)}),
        ("label_smoothing", {"loss": BrierLoss(label_smoothing=True)}),
    ],
    ids=str,
)
def test_true_is_no_number(name: str, options: dict[str, Any]) -> None:
    given = {"loss": BrierLoss(), "input": torch.randn(3, 2), "linear_weight": torch.randn(4, 2)}
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be .* got (True|bool)"):
        linear_loss(**given | {"target": torch.zeros(3, dtype=torch.long)} | options)


def test_class_weights_of_other_classes_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"weight must have one value a class, shape \(4,\), got shape \(5,\)"):
        LinearLoss(CrossEntropyLoss(weight=torch.ones(5)), 3, 4)


def test_what_goes_to_a_cpu_is_there_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of a GPU beside logits of a CPU: "meta" stands for it, on the way from which no test could see a race."""
    to, hasty = Tensor.to, []

    def watched(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        hasty.append(options.get("non_blocking", False))
        return torch.ones(tensor.shape) if tensor.is_meta else to(tensor, *arguments, **options)

    monkeypatch.setattr(Tensor, "to", watched)
    features, weight, target = torch.randn(7, 5), torch.randn(20, 5), torch.randint(20, (7,))
    given = {"scale": torch.ones((), device="meta"), "num_items": torch.ones((), device="meta")}
    linear_loss(CrossEntropyLoss(), features, weight, target, **given)
    logits, knob, whole = torch.randn(7, 20), torch.ones((), device="meta"), torch.ones(1, device="meta")
    for values in ((knob,), whole):
        knob_tensor(generalized_cross_entropy, values, logits, target.shape)
    assert len(hasty) >= 4
    assert not any(hasty)
