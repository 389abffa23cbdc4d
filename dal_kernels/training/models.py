"""Networks: small ones of our own, and by name those of torchvision and timm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dal_kernels.training.errors import UsageError
from dal_kernels.training.foreign_models import OWN, TIMM, timm_model, torchvision_model
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
        UsageError: the network is unknown or does not take such samples, its library is missing, or there are no
            pretrained weights of it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(recipe, shape, classes)
        return network if moments is None else nn.Sequential(Standardise(*moments), network)


def _network(recipe: Recipe, shape: Sequence[int], classes: int) -> nn.Module:
    name = recipe.model
    if name == "auto":
        name = "mlp" if len(shape) not in (2, 3) else "cnn" if max(shape[-2:]) <= 64 else "resnet18-224"
    images = len(shape) in (2, 3)
    if name.startswith(TIMM) and images:
        first, channels = _with_channels(shape)
        network = timm_model(name.removeprefix(TIMM), (channels, *shape[-2:]), classes, recipe.pretrained)
        return network if len(shape) == 3 else nn.Sequential(first, network)
    if name in OWN and recipe.pretrained:
        raise UsageError(f"pretrained is for networks of torchvision and timm, got model {name}")
    if name == "mlp":
        return _mlp(torch.Size(shape).numel(), recipe.widths, classes)
    if not images:
        raise UsageError(f"model {name} takes images, got samples of shape {tuple(shape)}; take mlp")
    if name == "cnn":
        return _cnn(shape, recipe.widths, classes)
    if name in ("resnet18-cifar", "resnet18-224"):
        return _resnet18(shape, classes, photographs=name == "resnet18-224")
    return torchvision_model(name, shape, classes, recipe.pretrained)


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
