"""Recipes, and the networks that the trainer makes of them."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dal_kernels.training import PRESETS, Recipe, UsageError
from dal_kernels.training.data import DATA
from dal_kernels.training.models import build_model
from dal_kernels.training.recipes import recipe_for
from support.trainings import needs_training

needs_training()


# --- recipes


@pytest.mark.parametrize("data", DATA)
def test_each_data_set_has_a_preset(data: str) -> None:
    assert recipe_for(data) in PRESETS.values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": math.nan}, "learning_rate must be > 0, got nan"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adamw, got 'lion'"),
        ({"schedule": "linear"}, "schedule must be one of cosine, constant, step, exponential"),
        ({"decay": 0.0}, "decay"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"amp": "fp8"}, "amp must be one of none, bf16, fp16"),
        ({"widths": (4, 0)}, "widths"),
        ({"gce_q": 1.1}, "gce_q must be in"),
        ({"q_start": 2.0}, "q_start must not be above q_end, got 2.0 and 1.5"),
        ({"q_end": math.inf}, "q_end"),
        ({"warmup_epochs": 60}, "warmup_epochs must be below epochs, got 60 and 60"),
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"loss_step": "batch"}, "loss_step must be one of epoch, iteration"),
        ({"lr": 0.1}, "settings must be among model, .*, got lr"),
        ({"preset": "imagenet"}, "preset must be one of digits, .*, got 'imagenet'"),
    ],
)
def test_recipes_refuse(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_for("digits", **changes)


# --- models


@pytest.mark.parametrize(
    ("model", "widths", "shape"),
    [
        ("mlp", (12,), (8, 8)),
        ("mlp", (), (5,)),
        ("cnn", (4, 6), (7, 9)),
        ("cnn", (), (3, 8, 8)),
        ("cnn", (4,), (3, 9, 9)),
        ("resnet18-cifar", (), (32, 32)),
        ("resnet18-cifar", (), (3, 32, 32)),
    ],
)
def test_models_follow_the_seed_and_leave_the_global_generator_alone(
    model: str, widths: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    recipe = recipe_for("digits", model=model, widths=widths)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    made, same, other = (build_model(recipe, shape, 11, seed).eval() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    inputs = torch.ones(2, *shape)
    with torch.no_grad():
        assert made(inputs).shape == (2, 11)
        assert torch.equal(made(inputs), same(inputs))
        assert not torch.equal(made(inputs), other(inputs))


@pytest.mark.parametrize(
    ("recipe", "shape", "classes", "count"),
    [
        (PRESETS["digits"], (8, 8), 10, 64 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10),
        # As published of ResNet-18 for CIFAR-10.
        (PRESETS["cifar10"], (3, 32, 32), 10, 11_173_962),
    ],
)
def test_models_have_the_parameters_that_they_should(
    recipe: Recipe, shape: tuple[int, ...], classes: int, count: int
) -> None:
    assert sum(parameter.numel() for parameter in build_model(recipe, shape, classes, 0).parameters()) == count


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in that knows one network."""
    models = ModuleType("torchvision.models")
    models.list_models = lambda module: ["resnet50"]
    models.get_model = lambda name, weights, num_classes: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes)
    )
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return models


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            "resnet51",
            (3, 8, 8),
            "model must be one of auto, mlp, .* resnet50, timm:NAME, got 'resnet51'",
        ),
        ("resnet50", (8, 8), r"takes samples of shape \(3, H, W\), got \(8, 8\)"),
        ("cnn", (64,), r"model cnn takes images, got samples of shape \(64,\)"),
    ],
)
@pytest.mark.usefixtures("torchvision")
def test_models_refuse(model: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(recipe_for("digits", model=model), shape, 10, 0)


@pytest.mark.usefixtures("torchvision")
def test_models_of_torchvision_get_the_classes() -> None:
    model = build_model(PRESETS["webvision"], (3, 224, 224), 1000, 0)
    assert model[-1].out_features == 1000


def test_a_missing_torchvision_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        UsageError, match=f"install the torchvision that matches torch {torch.__version__}".replace("+", r"\+")
    ):
        build_model(PRESETS["webvision"], (3, 224, 224), 1000, 0)
