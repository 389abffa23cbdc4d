"""Optimiser and learning rate of a recipe."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    StepLR,
)

from dal_kernels.training.recipes import Recipe

__all__ = ["make_optimizer", "make_scheduler"]


def make_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> Optimizer:
    if recipe.optimizer == "adamw":
        return AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)
    return SGD(
        parameters,
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )


def make_scheduler(recipe: Recipe, optimizer: Optimizer) -> LRScheduler:
    """Of the learning rate; to be stepped after each epoch."""
    warmup = recipe.warmup_epochs
    rise = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup) if warmup else None
    main: LRScheduler
    match recipe.schedule:
        case "cosine":
            main = CosineAnnealingLR(optimizer, recipe.epochs - warmup)
        case "step":
            main = StepLR(optimizer, recipe.decay_every, recipe.decay)
        case "exponential":
            main = ExponentialLR(optimizer, recipe.decay)
        case _:
            main = ConstantLR(optimizer, factor=1.0)
    return SequentialLR(optimizer, [rise, main], [warmup]) if rise else main
