"""Networks: small ones of our own, and torchvision's by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor, nn

from dal_kernels.training.errors import UsageError
from dal_kernels.training.recipes import Recipe

__all__ = ["build_model"]


class Standardise(nn.Module):
    """Takes mean and deviation, each shaped like a sample, off a batch; they are part of the network's state."""

    def __init__(self, mean: Tensor, sd: Tensor) -> None:
        super().__init__()
        self.mean, self.sd = nn.Buffer(mean), nn.Buffer(sd)

    def forward(self, input: Tensor) -> Tensor:
        return (input - self.mean) / self.sd


def build_model(
    recipe: Recipe, shape: Sequence[int], classes: int, seed: int, moments: tuple[Tensor, Tensor] | None = None
) -> nn.Module:
    """The recipe's network for samples of ``shape``, with logits of ``classes``; initialised from ``seed``.

    Images are (H, W) or (channels, H, W). "auto" is mlp for samples of other shapes, cnn for images of up to 64 pixels
    a side, else resnet18-224. The caller's generators stay as they were.

    Args:
        moments: mean and deviation that the network takes off its inputs.

    Raises:
        UsageError: the network is unknown or does not take such samples, or torchvision is missing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(recipe, shape, classes)
        return network if moments is None else nn.Sequential(Standardise(*moments), network)


def _network(recipe: Recipe, shape: Sequence[int], classes: int) -> nn.Module:
    name = recipe.model
    if name == "auto":
        name = "mlp" if len(shape) not in (2, 3) else "cnn" if max(shape[-2:]) <= 64 else "resnet18-224"
    if name == "mlp":
        return _mlp(torch.Size(shape).numel(), recipe.widths, classes)
    if len(shape) not in (2, 3):
        raise UsageError(f"model {name} takes images, got samples of shape {tuple(shape)}; take mlp")
    if name == "cnn":
        return _cnn(shape, recipe.widths, classes)
    if name in ("resnet18-cifar", "resnet18-224"):
        return _resnet18(shape, classes, photographs=name == "resnet18-224")
    return _torchvision(name, shape, classes)


def _mlp(inputs: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, on flattened inputs."""
    layers = [layer for pair in pairwise((inputs, *hidden, classes)) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def _with_channels(shape: Sequence[int]) -> tuple[nn.Module, int]:
    """A layer that gives grey images their channel, and how many channels there are then."""
    return (nn.Unflatten(1, (1, shape[0])), 1) if len(shape) == 2 else (nn.Identity(), shape[0])


def _cnn(shape: Sequence[int], widths: Sequence[int], classes: int) -> nn.Sequential:
    """3 x 3 convolutions of stride 2 with batch normalisation and ReLU, and a linear layer on what is left."""
    first, channels = _with_channels(shape)
    layers = [
        layer
        for inputs, outputs in pairwise((channels, *widths))
        for layer in (*_convolution(inputs, outputs, 3, 2), nn.ReLU())
    ]
    height, width = shape[-2:]
    for _ in widths:
        height, width = (height + 1) // 2, (width + 1) // 2
    return nn.Sequential(
        first, *layers, nn.Flatten(), nn.Linear((widths[-1] if widths else channels) * height * width, classes)
    )


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)


class _Residual(nn.Module):
    """Two 3 x 3 convolutions and a way past them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, outputs, 3, stride), nn.ReLU(), *_convolution(outputs, outputs, 3)
        )
        same = (inputs, stride) == (outputs, 1)
        self.past = nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, 1, stride))

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(self.body(input) + self.past(input))


def _resnet18(shape: Sequence[int], classes: int, photographs: bool) -> nn.Sequential:
    """ResNet-18, its stem a 7 x 7 convolution of stride 2 with pooling for ``photographs``, which leaves a sixteenth of
    the pixels; a 3 x 3 convolution for images of about 32 x 32.
    """
    first, channels = _with_channels(shape)
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [_Residual(inputs, outputs, 1 if inputs == outputs else 2) for inputs, outputs in pairwise(widths)]
    stem = [*_convolution(channels, widths[0], 3), nn.ReLU()]
    if photographs:
        stem = [*_convolution(channels, widths[0], 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    return nn.Sequential(first, *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def _torchvision(name: str, shape: Sequence[int], classes: int) -> nn.Module:
    try:
        models = import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise UsageError(
            f"model {name} is torchvision's, which cannot be used here ({error}): install the torchvision that "
            f"matches torch {torch.__version__}, or take one of mlp, cnn, resnet18-cifar, resnet18-224"
        ) from error
    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(
            f"model must be one of auto, mlp, cnn, resnet18-cifar, resnet18-224, {', '.join(known)}, got {name!r}"
        )
    if len(shape) != 3 or shape[0] != 3:
        raise UsageError(f"model {name} takes samples of shape (3, H, W), got {tuple(shape)}")
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return model
