"""Networks of torchvision and timm, with fresh weights or pretrained ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dal_kernels.training.errors import UsageError

__all__ = ["OWN", "TIMM", "timm_model", "torchvision_model"]

OWN = ("mlp", "cnn", "resnet18-cifar", "resnet18-224")
TIMM = "timm:"  # before the name of one of timm's


def torchvision_model(name: str, shape: Sequence[int], classes: int, pretrained: bool) -> nn.Module:
    """A classifier of torchvision's with logits of ``classes``, for samples of ``shape`` (3, H, W).

    Args:
        pretrained: with the weights that torchvision calls the default, in all layers that have as many outputs.

    Raises:
        UsageError: torchvision is missing, there is no such network, it does not take such samples, or its weights
            cannot be had.
    """
    models = _library("torchvision.models", name)
    known = models.list_models(module=models)
    if name not in known:
        accepted = ", ".join(("auto", *OWN, *known, f"{TIMM}NAME"))
        raise UsageError(f"model must be one of {accepted}, got {name!r}")
    if len(shape) != 3 or shape[0] != 3:
        raise UsageError(f"model {name} takes samples of shape (3, H, W), got {tuple(shape)}")
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    if pretrained:
        with _had(name):
            weights = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)
        ours = model.state_dict()
        # The last layer is of as many classes as the data has, and has nothing to start from.
        fitting = {key: value for key, value in weights.items() if key in ours and ours[key].shape == value.shape}
        model.load_state_dict({**ours, **fitting})
    return _that_takes(model, name, shape)


def timm_model(name: str, shape: Sequence[int], classes: int, pretrained: bool) -> nn.Module:
    """As :func:`torchvision_model`, of timm's by its name there, for samples of ``shape`` (channels, H, W).

    A network for images of one size is made for the size of the samples; timm resamples its weights.
    """
    timm = _library("timm", f"{TIMM}{name}")
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models())
        raise UsageError(
            f"model {TIMM}NAME must be one of timm's (timm.list_models()), got {name!r}"
            f"{'; near it: ' + ', '.join(near) if near else ''}"
        )
    options: dict[str, Any] = {}
    config = timm.models.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size and tuple(config.input_size[-2:]) != tuple(shape[-2:]):
        options["img_size"] = tuple(shape[-2:])
    with _had(f"{TIMM}{name}"):
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=classes, in_chans=shape[0], **options
        )
    return _that_takes(model, f"{TIMM}{name}", shape)


def _library(module: str, model: str) -> ModuleType:
    name = module.partition(".")[0]
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        needed = f"the torchvision that matches torch {torch.__version__}"
        raise UsageError(
            f"model {model} is {name}'s, which cannot be used here ({error}): install "
            f"{needed if name == 'torchvision' else f'timm, and {needed}'}, or take one of {', '.join(OWN)}"
        ) from error


@contextmanager
def _had(model: str) -> Iterator[None]:
    """What goes wrong in making a network, or in fetching its weights, is said in a sentence."""
    try:
        yield
    except Exception as error:  # the libraries raise anything, and a network too
        raise UsageError(f"model {model} cannot be had: {_first_line(error)}") from error


def _that_takes(model: nn.Module, name: str, shape: Sequence[int]) -> nn.Module:
    """``model``, tried on one sample, because some take one size of images only and each says so in its own way."""
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *shape))
    except Exception as error:
        raise UsageError(f"model {name} does not take samples of shape {tuple(shape)}: {_first_line(error)}") from error
    return model.train(training)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
