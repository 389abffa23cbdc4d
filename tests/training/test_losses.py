"""Losses by name: ours, torch's and the user's own, as the trainer makes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dal_kernels.training import PRESETS, UsageError
from dal_kernels.training.losses import FAMILY, FIXED, INSTEAD, LOSSES, build_loss, exponents
from dal_kernels.training.recipes import recipe_for
from support.trainings import needs_training

needs_training()


def formula(q: float) -> Callable[[Tensor], Tensor]:
    return lambda p: ((1 - p**q) / q).mean()


def cross_entropy(p: Tensor) -> Tensor:
    return -p.log().mean()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cross-entropy", cross_entropy),
        ("gce", formula(0.5)),
        ("mae", formula(1.0)),
        ("dal-fixed", formula(0.6)),
        ("torch.nn.CrossEntropyLoss", cross_entropy),
        ("torch.nn:CrossEntropyLoss", cross_entropy),
        ("torch.nn.functional.cross_entropy", cross_entropy),
        ("support.own_losses.a_factory", cross_entropy),
        ("support.own_losses.plain", cross_entropy),
        ("support.own_losses.an_instance", cross_entropy),
        ("support.own_losses:Stepping", cross_entropy),
    ],
)
def test_losses_are_their_formulas(name: str, expected: Callable[[Tensor], Tensor]) -> None:
    logits, labels = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    loss = build_loss(name, recipe_for("digits", gce_q=0.5), 4)
    p = logits.softmax(1)[torch.arange(6), labels]
    torch.testing.assert_close(loss(logits, labels), expected(p))
    if name in LOSSES:
        torch.testing.assert_close(loss.stats.target_prob, p)


@pytest.mark.parametrize("name", [name for name in FAMILY if name not in LOSSES])
def test_losses_of_the_family_are_known_by_name(name: str) -> None:
    logits, labels = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    loss = build_loss(name, PRESETS["digits"], 4)
    torch.testing.assert_close(loss(logits, labels), FAMILY[name](logits, labels))
    torch.testing.assert_close(loss.stats.target_prob, logits.softmax(1)[torch.arange(6), labels])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("symmetric-cross-entropy:alpha=6,beta=0.1", {"alpha": 6, "beta": 0.1}),
        ("epsilon-softmax:m=1e3", {"m": 1e3}),
        ("focal:detach_modulator=true", {"detach_modulator": True}),
        ("active-passive:passive=agce,a=0.1,q=3", {"passive": "agce", "a": 0.1, "q": 3}),
        ("cross-entropy:label_smoothing=0.1", {"label_smoothing": 0.1}),
    ],
)
def test_losses_of_the_family_take_settings_of_their_own(name: str, settings: dict[str, Any]) -> None:
    logits, labels = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    logits.requires_grad_()
    function = FAMILY[name.partition(":")[0]]
    gradient, expected, default = (
        torch.autograd.grad(loss, logits)[0]  # a detached modulator is seen in the gradient alone
        for loss in (
            build_loss(name, PRESETS["digits"], 4)(logits, labels),
            function(logits, labels, **settings),
            function(logits, labels),
        )
    )
    torch.testing.assert_close(gradient, expected)
    assert not torch.allclose(gradient, default)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("cross-entropy", (0, 0), (0, 0)),
        ("gce", (0.7, 0), (0.7, 0)),
        ("mae", (1, 0), (1, 0)),
        ("dal-fixed", (0.6, 0), (1.5, 1)),
        ("dal", (3e-7, 0), (3e-7, 0)),
        ("support.own_losses:Stepping", (math.nan, math.nan), (math.nan, math.nan)),
    ],
)
def test_losses_start_before_any_step_and_end_where_they_should(
    name: str, first: tuple[float, float], last: tuple[float, float]
) -> None:
    loss = build_loss(name, PRESETS["digits"], 4)
    assert exponents(loss) == pytest.approx(first, rel=1e-3, nan_ok=True)
    for _ in range(4):
        loss.step()
    assert exponents(loss) == pytest.approx(last, rel=1e-3, nan_ok=True)


def test_a_name_that_takes_no_settings_has_others_instead() -> None:
    assert set(INSTEAD) == set(LOSSES | FIXED) - set(FAMILY)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vocal", "losses must be among cross-entropy, gce, mae, dal, .*, or package.module:attribute, got 'vocal'"),
        ("cross_entropy", "^do you mean cross-entropy[?] losses must be among cross-entropy, .* got 'cross_entropy'"),
        ("generalised-cross-entropy:q=1", "^do you mean generalized-cross-entropy[?] losses must be among"),
        ("unlike:q=1", "^losses must be among"),
        ("gce:q=3", "loss gce has no settings of its own, give generalized-cross-entropy:q=3, or --gce-q; got 'gce:q"),
        ("mae:scale=2", "loss mae has no settings of its own, give mean-absolute-error:scale=2; got"),
        ("dal:qq=3", "loss dal has no settings of its own, give --q-start and --q-end; got 'dal:qq=3'"),
        ("torch.nn.NoSuchLoss", "cannot be imported: .*NoSuchLoss"),
        ("no_such_package:Loss", "cannot be imported: No module named"),
        (":Loss", "losses must be among"),
        ("jensen-shannon:", "losses must be among"),
        ("jensen-shannon:pi", "must be NAME:KNOB=VALUE,KNOB=VALUE with each knob once, got 'pi'"),
        ("jensen-shannon:pi=0.1,pi=0.2", "must be NAME:KNOB=VALUE,KNOB=VALUE with each knob once, got 'pi=0.2'"),
        ("jensen-shannon:reduction=sum", "are pi, label_smoothing, target_shift, scale, got 'reduction'"),
        ("jensen-shannon:pi=3", "pi must be finite and > 0 and < 1, got 3"),
        ("jensen-shannon:pi=half", "pi must be a number or a floating-point tensor, got str"),
        ("support.own_losses:not_a_loss", "must be callable, got int"),
        ("support.own_losses:makes_no_loss", "must make something callable, got int"),
        (
            "dal_kernels.DynamicsAwareLoss",
            "cannot be made without arguments: total_steps, or a schedule, must be given",
        ),
        ("support.own_losses:Trainable", "parameters of its own"),
        ("support.own_losses:Forgetful", r"has step\(\) but no state_dict\(\)"),
    ],
)
def test_losses_refuse(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_loss(name, PRESETS["digits"], 4)
