"""Networks of torchvision and timm, pretrained weights, channels last and torch.compile."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dal_kernels.training import UsageError, main
from dal_kernels.training.data import DataSet
from dal_kernels.training.data.base import TensorImages
from dal_kernels.training.models import build_model
from dal_kernels.training.predict import load_trained
from dal_kernels.training.recipes import recipe_for
from dal_kernels.training.train import Trainer
from support.trainings import ALONE, needs_training


class Net(nn.Module):
    """What both libraries make here: a body, and a last layer of so many classes; for images of 8 x 8 only."""

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(channels, 4, 8), nn.Linear(4, classes)

    def forward(self, input: Tensor) -> Tensor:
        assert input.shape[-1] == 8, "images must be 8 x 8"
        return self.head(self.body(input).flatten(1))


PRETRAINED = {name: torch.full_like(value, 0.25) for name, value in Net(1000).state_dict().items()}


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of torchvision and timm that know one network each."""
    models: Any = ModuleType("torchvision.models")
    models.list_models = lambda module: ["net"]
    models.get_model = lambda name, weights, num_classes: Net(num_classes)
    weights = SimpleNamespace(get_state_dict=lambda progress, check_hash: PRETRAINED)
    models.get_model_weights = lambda name: SimpleNamespace(DEFAULT=weights)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)

    def create_model(name: str, pretrained: bool, num_classes: int, in_chans: int, **options: Any) -> nn.Module:
        if pretrained:
            raise OSError("no network\nat all")
        model = Net(num_classes, in_chans)
        model.options = options
        return model

    config = SimpleNamespace(fixed_input_size=True, input_size=(3, 16, 16))
    timm: Any = ModuleType("timm")
    timm.is_model, timm.list_models, timm.create_model = "net".__eq__, lambda: ["net"], create_model
    timm.models = SimpleNamespace(get_pretrained_cfg=lambda name: config)
    monkeypatch.setitem(sys.modules, "timm", timm)


def build(model: str, shape: tuple[int, ...], **changes: Any) -> Any:
    return build_model(recipe_for("digits", model=model, **changes), shape, 5, 0)


@pytest.mark.usefixtures("libraries")
def test_pretrained_weights_are_in_all_layers_but_the_last() -> None:
    model, fresh = build("net", (3, 8, 8), pretrained=True), build("net", (3, 8, 8))
    assert all((value == 0.25).all() for value in model.body.state_dict().values())
    assert torch.equal(model.head.weight, fresh.head.weight), "by the seed"
    assert not (fresh.body.weight == 0.25).any()
    assert model.training


@pytest.mark.usefixtures("libraries")
def test_models_of_timm_fit_the_samples() -> None:
    model = build("timm:net", (3, 8, 8))
    assert model.options == {"img_size": (8, 8)}, "its images would be of 16 x 16"
    grey = build("timm:net", (8, 8))
    assert grey(torch.zeros(2, 8, 8)).shape == (2, 5)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("model", "shape", "pretrained", "message"),
    [
        ("timm:nett", (3, 8, 8), False, r"model timm:NAME must be one of timm's .*, got 'nett'; near it: net$"),
        ("timm:net", (3, 8, 8), True, "model timm:net cannot be had: no network$"),
        ("timm:net", (8,), False, r"model timm:net takes images, got samples of shape \(8,\)"),
        ("timm:net", (3, 16, 9), False, r"timm:net does not take samples of shape \(3, 16, 9\): images must be 8 x 8"),
        ("net", (3, 9, 9), False, r"model net does not take samples of shape \(3, 9, 9\): images must be 8 x 8"),
        ("cnn", (3, 9, 9), True, "pretrained is for networks of torchvision and timm, got model cnn"),
    ],
)
def test_what_does_not_suit_is_named(model: str, shape: tuple[int, ...], pretrained: bool, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(model, shape, pretrained=pretrained)


def test_a_missing_timm_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="install timm, and the torchvision that matches"):
        build("timm:net", (3, 8, 8))


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_timm_itself(name: str) -> None:
    try:
        pytest.importorskip("timm")
    except RuntimeError as error:
        pytest.skip(f"a torchvision for another torch: {error}")
    assert build(f"timm:{name}", (3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


# --- channels last, torch.compile


def pictures(*shape: int) -> DataSet:
    inputs, labels = torch.randn(24, *shape), torch.arange(24) % 2
    images = TensorImages(inputs + labels.view(-1, *[1] * len(shape)))
    return DataSet("pictures", 2, images, labels, labels, images, labels)


def trainer_on(data: DataSet, **changes: Any) -> Trainer:
    recipe = recipe_for("digits", batch_size=7, epochs=2, **changes)
    return Trainer(recipe, data, data.train_labels, "dal", 0, 0, ALONE)


def test_channels_last_changes_memory_and_not_what_is_learnt() -> None:
    data, seen = pictures(3, 8, 8), list[bool]()
    last, first = (trainer_on(data, model="cnn", widths=(4,), channels_last=on) for on in (True, False))
    convolution = next(part for part in last.network.modules() if isinstance(part, nn.Conv2d))
    convolution.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    loss = last.run_epoch(lambda: None).train_loss
    assert all(seen[:4]), "the batches too"
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert loss == pytest.approx(first.run_epoch(lambda: None).train_loss, rel=1e-4)
    with pytest.raises(UsageError, match=r"channels_last needs samples of shape \(channels, H, W\), got \(8, 8\)"):
        trainer_on(pictures(8, 8), model="cnn", channels_last=True)


def test_a_compiled_network_trains_and_is_saved_as_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_training()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    command = ["train", "--epochs", "1", "--accumulate", "2", "--output", str(tmp_path / "a")]
    assert main([*command, "--compile"]) == 0
    assert graphs
    assert main([*command[:-1], str(tmp_path / "b")]) == 0
    compiled, plain = (
        load_trained(next((tmp_path / name).glob("*/*/checkpoint.pt"))).network.state_dict() for name in "ab"
    )
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value)


def test_a_network_that_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    trainer = trainer_on(pictures(8, 8), model="mlp", compile=True)
    with pytest.raises(UsageError, match=r"model mlp cannot be compiled here: .*no compiler; give --no-compile"):
        trainer.run_epoch(lambda: None)
