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


def build_model(recipe: Recipe, shape: Sequence[int], classes: int, seed: int) -> nn.Module:
    """The recipe's network for samples of ``shape``, with logits of ``classes``; initialised from ``seed``.

    Images are (H, W) or (channels, H, W). The caller's generators stay as they were.

    Raises:
        UsageError: the network is unknown or does not take such samples, or torchvision is missing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if recipe.model == "mlp":
            return _mlp(torch.Size(shape).numel(), recipe.widths, classes)
        if len(shape) not in (2, 3):
            raise UsageError(f"model {recipe.model} takes images, got samples of shape {tuple(shape)}; take mlp")
        if recipe.model == "cnn":
            return _cnn(shape, recipe.widths, classes)
        if recipe.model == "resnet18-cifar":
            return _resnet18(shape, classes)
        return _torchvision(recipe.model, shape, classes)


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


def _resnet18(shape: Sequence[int], classes: int) -> nn.Sequential:
    """ResNet-18 for images of about 32 x 32: its stem is a 3 x 3 convolution, without pooling."""
    first, channels = _with_channels(shape)
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [_Residual(inputs, outputs, 1 if inputs == outputs else 2) for inputs, outputs in pairwise(widths)]
    stem = (*_convolution(channels, widths[0], 3), nn.ReLU())
    return nn.Sequential(first, *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def _torchvision(name: str, shape: Sequence[int], classes: int) -> nn.Module:
    try:
        models = import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise UsageError(
            f"model {name} is torchvision's, which cannot be used here ({error}): install the torchvision that "
            f"matches torch {torch.__version__}, or take one of mlp, cnn, resnet18-cifar"
        ) from error
    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(f"model must be one of mlp, cnn, resnet18-cifar, {', '.join(known)}, got {name!r}")
    if len(shape) != 3 or shape[0] != 3:
        raise UsageError(f"model {name} takes samples of shape (3, H, W), got {tuple(shape)}")
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return model
