"""Training under label noise: its parts on hand-made cases."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import chain
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dal_kernels.training import PRESETS, Recipe, Run, UsageError
from dal_kernels.training.data import DATA
from dal_kernels.training.data.base import TensorImages
from dal_kernels.training.loader import evaluation_loader, stream, training_loader
from dal_kernels.training.losses import FAMILY, LOSSES, build_loss, exponents
from dal_kernels.training.metrics import EpochMetrics, count_hits, share
from dal_kernels.training.models import build_model
from dal_kernels.training.noise import parse_noise
from dal_kernels.training.parallel import World
from dal_kernels.training.recipes import recipe_for
from dal_kernels.training.report import in_words
from dal_kernels.training.summary import summarise
from support.trainings import ALONE, needs_training

needs_training()

CPU = torch.device("cpu")


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


# --- losses


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vocal", "losses must be among cross-entropy, gce, mae, dal, .*, or package.module:attribute, got 'vocal'"),
        ("torch.nn.NoSuchLoss", "cannot be imported: .*NoSuchLoss"),
        ("no_such_package:Loss", "cannot be imported: No module named"),
        (":Loss", "losses must be among"),
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


# --- batches


def indices(loader: Any, epoch: int | None = None) -> list[list[int]]:
    if epoch is not None:
        loader.set_epoch(epoch)
    return [batch.tolist() for _, batch in loader]


@pytest.mark.parametrize(("samples", "processes"), [(24, 2), (23, 2), (24, 4)])
def test_processes_share_the_batches_of_one(samples: int, processes: int) -> None:
    images = TensorImages(torch.arange(samples).float())
    whole = indices(training_loader(images, 8, 0, 0, ALONE), epoch=3)
    shares = [
        indices(training_loader(images, 8, 0, 0, World(rank, processes, CPU)), epoch=3) for rank in range(processes)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part) for part in parts} == {-(-len(batch) // processes)}
        together = list(chain(*parts))
        assert set(batch) <= set(together)
        assert len(together) - len(batch) == -len(batch) % processes
    evaluated = [
        indices(evaluation_loader(images, torch.arange(5, samples), 4, 0, World(rank, processes, CPU)))
        for rank in range(processes)
    ]
    assert sorted(chain(*chain(*evaluated))) == list(range(5, samples))


@pytest.mark.parametrize(
    ("samples", "batch_size", "processes", "sizes"),
    [
        (25, 8, 1, [8, 8, 9]),
        (26, 8, 1, [8, 8, 8, 2]),
        (24, 8, 1, [8, 8, 8]),
        (9, 8, 1, [9]),
        (26, 8, 2, [4, 4, 5]),
        (25, 8, 2, [4, 4, 5]),
        (27, 8, 2, [4, 4, 4, 2]),
        (1, 8, 1, [1]),
        (3, 1, 1, [1, 1, 1]),
    ],
)
def test_a_last_sample_alone_joins_the_batch_before(
    samples: int, batch_size: int, processes: int, sizes: list[int]
) -> None:
    images = TensorImages(torch.arange(samples).float())
    loaders = [training_loader(images, batch_size, 0, 0, World(rank, processes, CPU)) for rank in range(processes)]
    batches = [indices(loader, epoch=1) for loader in loaders]
    assert [[len(batch) for batch in part] for part in batches] == [sizes] * processes
    assert [len(loader) for loader in loaders] == [len(sizes)] * processes
    assert set(chain(*chain(*batches))) == set(range(samples))


def test_batches_follow_the_seed_and_the_epoch() -> None:
    images = TensorImages(torch.arange(24).float())
    orders = [indices(training_loader(images, 24, seed, 0, ALONE), epoch)[0] for seed in (0, 1) for epoch in (1, 2)]
    assert len(set(map(tuple, orders))) == 4
    assert indices(training_loader(images, 24, 0, 0, ALONE), 2)[0] == orders[1]


def test_a_batch_must_divide_by_the_processes() -> None:
    with pytest.raises(UsageError, match="batch_size must be a multiple of the 2 processes, got 5"):
        training_loader(TensorImages(torch.zeros(9)), 5, 0, 0, World(0, 2, CPU))


def test_streams_do_not_meet() -> None:
    uses = [(use, seed, epoch) for use in ("batches", "weights", "epoch") for seed in range(20) for epoch in range(100)]
    assert len({stream(*use) for use in uses}) == len(uses)
    assert max(stream(*use) for use in uses) < 2**32


# --- metrics


@pytest.mark.parametrize(
    ("prediction", "memorised", "right"),
    [
        # the wrong labels are of samples 1 to 4: given 2, 2, 0, 0 for 1, 1, 2, 2
        ([0, 2, 2, 0, 0], 4, 0),
        ([0, 1, 1, 2, 2], 0, 4),
        ([9, 2, 1, 1, 1], 1, 1),
        ([1, 1, 1, 2, 0], 1, 3),
    ],
)
def test_hits_are_counted_in_evaluation_mode_and_the_mode_is_restored(
    prediction: list[int], memorised: int, right: int
) -> None:
    given, true = torch.tensor([0, 2, 2, 0, 0]), torch.tensor([0, 1, 1, 2, 2])
    images = TensorImages(nn.functional.one_hot(torch.tensor(prediction), 10).float())
    model = nn.Sequential(nn.Dropout(0.9)).train()
    loader = evaluation_loader(images, torch.arange(1, 5), 3, 0, ALONE)
    assert count_hits(model, loader, given, true).tolist() == [memorised, right, 4]
    assert model.training


def test_a_share_of_nothing_is_nan() -> None:
    assert math.isnan(share(0, 0))
    assert share(1, 4) == 0.25


# --- words


def run_of(loss: str, seed: int, accuracies: list[float], noise: str = "0.4") -> Run:
    history = [
        EpochMetrics(i, 1.0, accuracy, max(accuracies[:i]), math.nan, 0.5, 0.25, 0.3, math.nan, math.nan, 0.1, 0.1, 1.0)
        for i, accuracy in enumerate(accuracies, start=1)
    ]
    return Run("digits", parse_noise(noise), 0.4, loss, seed, history)


def test_summary_takes_last_and_best_over_seeds() -> None:
    (summary,) = summarise([run_of("gce", 0, [0.2, 0.9, 0.7]), run_of("gce", 1, [0.8, 0.7, 0.5])])
    assert summary.last.mean == pytest.approx(0.6)
    assert summary.last.sd == pytest.approx(math.sqrt(0.02))
    assert summary.best.mean == pytest.approx(0.85)
    assert summary.last.percent() == "60.0 ± 14.1"


@pytest.mark.parametrize(
    ("accuracies", "said", "unsaid"),
    [
        ({"cross-entropy": 0.5, "dal": 0.9}, ["DAL ends highest", "40.0 points ahead of cross-entropy"], ["tie"]),
        ({"cross-entropy": 0.9, "dal": 0.5}, ["cross-entropy ends highest", "ahead of DAL"], ["DAL ends", "tie"]),
        ({"gce": 0.801, "dal": 0.8}, ["GCE ends highest", "0.1 points ahead of DAL (less", "a tie"], ["DAL ends"]),
    ],
)
def test_words_follow_the_numbers(accuracies: dict[str, float], said: list[str], unsaid: list[str]) -> None:
    runs = [run_of(loss, seed, [a + 0.01 * seed]) for loss, a in accuracies.items() for seed in (0, 1)]
    words = in_words(summarise(runs))
    assert all(part in words for part in said)
    assert not any(part in words for part in unsaid)


def test_words_about_one_loss_compare_it_with_none() -> None:
    words = in_words(summarise([run_of("gce", 0, [0.5, 0.7])]))
    assert words == (
        f"Noise {parse_noise('0.4').title}: GCE ends at 70.0%. "
        "GCE keeps its best accuracy to the last epoch, by when it has memorised 50.0% of the wrong labels."
    )


def test_words_name_the_loss_that_was_best_before_it_fell() -> None:
    words = in_words(summarise([run_of("cross-entropy", 0, [0.95, 0.5]), run_of("dal", 0, [0.8, 0.9])]))
    assert "DAL ends highest at 90.0%" in words
    assert "Cross-entropy loses 45.0 points from its best epoch to its last" in words
    assert "Stopped at the best epoch, cross-entropy would be ahead at 95.0%" in words


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("0.4", "dal", 1), ("0.4", "dal", 11)),
        (("0.4", "a.b:c", 1), ("0.4", "a.b-c", 1)),
        (("0.4", "dal", 1), ("0.6", "dal", 1)),
    ],
)
def test_each_run_has_a_folder_of_its_own(first: tuple[str, str, int], second: tuple[str, str, int]) -> None:
    names = {run_of(loss, seed, [0.5], noise).folder for noise, loss, seed in (first, second)}
    assert len(names) == 2
    assert not any(character in name for name in names for character in "/:\\ ")
