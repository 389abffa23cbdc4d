"""What a loss of the family may be asked for beside its knobs: each option against its definition."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import dal_kernels
from dal_kernels import (
    CrossEntropyLoss,
    DynamicsAwareLoss,
    GeneralizedCrossEntropyLoss,
    LabelDistributionAwareMarginLoss,
    LinearLoss,
    SymmetricCrossEntropyLoss,
    generalized_cross_entropy_loss,
    label_distribution_aware_margin_loss,
)
from dal_kernels.losses.base import RobustLoss
from dal_kernels.objectives import row_statistics_of
from support.children import SUPPORT, printed_by
from support.family import FAMILY, close, module_of, rows_of


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_cross_entropy_is_torchs(backend: str) -> None:
    """In a process of its own, because torch's samples freeze torch's flags where they are imported."""
    pytest.importorskip("expecttest", reason="torch's samples need it")
    assert int(printed_by(SUPPORT / "torch_samples.py", backend)) > 20


def test_class_weights_come_first_as_torch_takes_them_or_are_asked_for_by_name() -> None:
    logits, target = rows_of(8, 6)
    weight = torch.linspace(0.5, 2.0, 6)
    expected = torch.nn.CrossEntropyLoss(weight.double())(logits, target)
    assert CrossEntropyLoss(weight)(logits, target).item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(TypeError, match="q must be a number, got Tensor; class weights are given as weight="):
        GeneralizedCrossEntropyLoss(weight)


@pytest.mark.parametrize(
    "shift", [0.7, torch.linspace(-1, 1, 6).double(), torch.linspace(-1, 1, 8).double()], ids=["one", "class", "row"]
)
def test_the_target_is_shifted_and_all_logits_scaled(backend: str, shift: Any) -> None:
    logits, target = rows_of(8, 6)
    logits.requires_grad_()
    of_rows = shift if isinstance(shift, float) or len(shift) == 8 else shift[target]
    moved = 2.0 * (logits + F.one_hot(target, 6) * torch.as_tensor(of_rows, dtype=torch.float64).reshape(-1, 1))
    expected = generalized_cross_entropy_loss(moved, target, backend="eager")
    found = generalized_cross_entropy_loss(logits, target, target_shift=shift, scale=2.0, backend=backend)
    close(found, expected, logits)


def test_margins_grow_with_rarity() -> None:
    logits, target = rows_of(8, 4)
    counts = [1000, 100, 10, 10]
    margins = torch.tensor([0.5 * (10 / n) ** 0.25 for n in counts], dtype=torch.float64)
    lowered = logits - F.one_hot(target, 4) * margins[target].unsqueeze(1)
    expected = F.cross_entropy(30.0 * lowered, target)
    for given in (counts, torch.tensor(counts)):
        torch.testing.assert_close(
            label_distribution_aware_margin_loss(logits, target, given), expected, rtol=1e-6, atol=1e-7
        )
    module = LabelDistributionAwareMarginLoss(counts)
    torch.testing.assert_close(module(logits, target), expected, rtol=1e-6, atol=1e-7)
    assert not module.state_dict()
    with pytest.raises(ValueError, match="class_counts must be one finite number > 0 a class"):
        LabelDistributionAwareMarginLoss([3, 0])


def test_a_scale_may_be_learnt() -> None:
    logits, target = rows_of(8, 6)
    scale = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    module = SymmetricCrossEntropyLoss(scale=scale)
    assert dict(module.named_parameters()) == {"scale": scale}
    module(logits, target).backward()
    assert scale.grad is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be a number from 0 to 1, got 1.5"),
        ({"target_shift": math.inf}, ValueError, "target_shift must be finite"),
        ({"target_shift": torch.zeros(3)}, ValueError, r"target_shift must be .*one a class \(6,\).*got shape \(3,\)"),
        ({"scale": -1.0}, ValueError, "scale must be finite and > 0, got -1.0"),
        ({"scale": torch.ones(2)}, ValueError, "scale must be a number or a 0-d tensor"),
        ({"mix": torch.zeros(8)}, TypeError, r"mix must be a pair"),
        ({"mix": (torch.zeros(3, dtype=torch.long), 0.5)}, ValueError, r"mix\[0\] must be class indices"),
        ({"mix": (torch.zeros(8, dtype=torch.long), 1.5)}, ValueError, r"mix\[1\] must be a weight from 0 to 1"),
        (
            {"mix": (torch.zeros(8, dtype=torch.long), 0.5), "target_shift": 1.0},
            ValueError,
            "target_shift must be None",
        ),
        ({"alpha": -1.0}, ValueError, "alpha must be finite and >= 0, got -1.0"),
        ({"alpha": "1"}, TypeError, "alpha must be a number or a floating-point tensor, got str"),
        ({"beta": torch.tensor([1.0, -2.0, *[0.0] * 6])}, ValueError, "beta must be finite and >= 0, got -.* at row 1"),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
)
def test_bad_options_are_one_clear_error(options: dict[str, Any], error: type[Exception], message: str) -> None:
    logits, target = rows_of(8, 6)
    with pytest.raises(error, match=message):
        dal_kernels.symmetric_cross_entropy_loss(logits, target, **options)


@pytest.mark.parametrize("name", FAMILY)
def test_all_losses_take_the_same_call(name: str) -> None:
    """(N, C, d1) logits, ignored rows, weights, statistics, sample weights; the module gives what the function does."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(6, (4, 3), generator=generator, dtype=torch.int32)
    target[1, 2] = 255
    options: dict[str, Any] = {"weight": torch.linspace(0.5, 2, 6).double(), "ignore_index": 255}
    function, module = getattr(dal_kernels, name), module_of(name, **options)
    sample_weight = torch.linspace(0, 1, 12, dtype=torch.float64).reshape(4, 3)
    rows = function(logits, target, reduction="none", **options)
    assert rows.shape == target.shape
    assert rows[1, 2] == 0
    counts = torch.where(target == 255, 0.0, options["weight"][torch.where(target == 255, 0, target)])
    for given in ({}, {"sample_weight": sample_weight}):
        weights = given.get("sample_weight", torch.ones(()))
        expected = (rows * weights).sum() / (counts * weights).sum()
        for loss, stats in (
            function(logits, target, return_stats=True, **options, **given),
            module(logits, target, return_stats=True, **given),
        ):
            torch.testing.assert_close(loss, expected)
            assert stats.prediction.shape == target.shape
    assert module(logits, target, reduction="none").shape == target.shape
    module.step()
    assert "backend" not in repr(module)


LOSSES: list[Any] = [module_of(name) for name in FAMILY] + [
    CrossEntropyLoss(label_smoothing=0.1),
    DynamicsAwareLoss(total_steps=4, pace="fixed"),
    DynamicsAwareLoss(total_steps=4, pace="fixed", bootstrap="hard"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss)[:60])
def test_the_linear_form_takes_every_loss(fused: str, loss: RobustLoss | DynamicsAwareLoss) -> None:
    torch.manual_seed(3)
    loss.step(2.0)
    form = LinearLoss(copy.deepcopy(loss), 5, 40, chunk_bytes=40 * 4 * 3)
    features = torch.randn(10, 5, requires_grad=True)
    target = torch.randint(40, (10,))
    target[3] = -100
    outcomes = []
    for of in (form, lambda x, y: loss(form.classifier(x), y)):
        value = of(features, target)
        outcomes.append([value, *torch.autograd.grad(value, (features, *form.classifier.parameters()))])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)


def test_the_forms_refuse_what_they_do_not_have() -> None:
    smoothed = CrossEntropyLoss(label_smoothing=0.1, weight=torch.ones(4))
    with pytest.raises(ValueError, match="weight must be None with label_smoothing in the linear and class-parallel"):
        LinearLoss(smoothed, 3, 4)(torch.randn(2, 3), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="loss must be a module of dal_kernels"):
        LinearLoss(torch.nn.CrossEntropyLoss(), 3, 4)


@pytest.mark.parametrize("name", FAMILY)
def test_a_loss_is_pickled(name: str) -> None:
    loss = module_of(name)
    again = pickle.loads(pickle.dumps(loss))
    logits, target = torch.randn(4, 6), torch.arange(4)
    assert torch.equal(again(logits, target), loss(logits, target))


def test_what_a_pickle_asks_for_is_there_or_named() -> None:
    assert copy.deepcopy(row_statistics_of) is row_statistics_of
    unknown = pickle.dumps(row_statistics_of).replace(b"row_statistics", b"no_statistics_")
    with pytest.raises(ValueError, match="has no loss 'no_statistics_'"):
        pickle.loads(unknown)
