"""The losses under comparison: ours by name, any other by where it is imported from."""

from __future__ import annotations

import inspect
import json
import math
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dal_kernels import DynamicsAwareLoss, RowStats, losses
from dal_kernels.self_paced import Pace
from dal_kernels.training.errors import UsageError
from dal_kernels.training.recipes import Recipe

__all__ = ["FAMILY", "LOSSES", "FamilyLoss", "KernelLoss", "build_loss", "checked_loss", "exponents", "loss_title"]

# Names, and what they are called in print: what is compared unless others are asked for.
LOSSES = {"cross-entropy": "cross-entropy", "gce": "GCE", "mae": "MAE", "dal": "DAL"}
# Its authors' schedule, whatever the network has learnt; and with a target shift for many classes.
FIXED = {"dal-fixed": "DAL, fixed pace", "dal-shifted": "DAL, fixed pace, shifted"}
# The other losses of the package, with the settings of their papers, by the names of their functions.
FAMILY = {
    name.removesuffix("_loss").replace("_", "-"): getattr(losses, name)
    for name in losses.__all__
    if name.endswith("_loss") and name != "label_distribution_aware_margin_loss"
}
# Names that take no settings: what does. In LOSSES and FIXED, but for cross-entropy, which is of the family too.
INSTEAD = {
    "gce": "generalized-cross-entropy:{}, or --gce-q",
    "mae": "mean-absolute-error:{}",
    **dict.fromkeys(("dal", "dal-fixed", "dal-shifted"), "--q-start and --q-end"),
}
# What a command line may set of every loss of the family, beside its own knobs; and what it may not.
SHARED_SETTINGS = ("label_smoothing", "target_shift", "scale")
NO_SETTINGS = ("input", "target", "return_stats", "options")


class KernelLoss(DynamicsAwareLoss):
    """A loss of DAL's family that keeps what its pass learnt of the batch.

    ``q_start == q_end == q <= 1`` never bootstraps: cross-entropy at q = 0, GCE between, mean absolute error at 1.

    Attributes:
        stats: (N,) each, of the last batch.
    """

    stats: RowStats

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        loss: Tensor
        loss, self.stats = super().forward(input, target, return_stats=True, sample_weight=sample_weight)
        return loss


class FamilyLoss:
    """A loss of the family that keeps what its pass learnt of the batch.

    Attributes:
        stats: (N,) each, of the last batch.
    """

    stats: RowStats

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        loss: Tensor
        loss, self.stats = self._function(input, target, return_stats=True, sample_weight=sample_weight)
        return loss


def build_loss(name: str, recipe: Recipe, total_steps: int) -> Any:
    """A criterion(logits, labels) whose schedule, if it has one, takes ``total_steps``.

    ``name`` is one of ``LOSSES``, ``FIXED`` or ``FAMILY``, the last with settings of its own if it has any, as in
    "symmetric-cross-entropy:alpha=6,beta=0.1"; or it says where to import a loss from: "package.module.attribute" or
    "package.module:attribute". A class, or a function that needs no argument, is called to make the loss; anything else
    is the loss itself.

    Raises:
        UsageError: there is no such loss or setting of it, it cannot be made without arguments, it has parameters to
            train, or a schedule that cannot be saved.
    """
    exponents = {"cross-entropy": (0.0, 0.0), "gce": (recipe.gce_q,) * 2, "mae": (1.0, 1.0)}
    if name in LOSSES or name in FIXED:
        q_start, q_end = exponents.get(name, (recipe.q_start, recipe.q_end))
        pace: Pace = "auto" if name == "dal" else "fixed"
        # The trainer watches by itself: it knows the mean of an epoch, over all processes.
        return KernelLoss(
            q_start,
            q_end,
            total_steps=total_steps,
            pace=pace,
            target_shift="fading" if name == "dal-shifted" else None,
            watch=False,
        )
    if name in FAMILY:
        return FamilyLoss(FAMILY[name])
    family_name, _, settings = name.partition(":")
    if family_name in FAMILY and settings:
        return FamilyLoss(_with_settings(family_name, settings))
    found = _imported(name)
    if not callable(found):
        raise UsageError(f"loss {name} must be callable, got {type(found).__name__}")
    loss = found
    if _is_factory(found):
        try:
            loss = found()
        except Exception as error:  # its author's code may raise anything
            raise UsageError(f"loss {name} cannot be made without arguments: {error}") from error
        if not callable(loss):
            raise UsageError(f"loss {name} must make something callable, got {type(loss).__name__}")
    if any(parameter.requires_grad for parameter in getattr(loss, "parameters", tuple)()):
        raise UsageError(f"loss {name} has parameters of its own, which this benchmark would leave untrained")
    if hasattr(loss, "step") and not (hasattr(loss, "load_state_dict") and hasattr(loss, "state_dict")):
        raise UsageError(f"loss {name} has step() but no state_dict() and load_state_dict(): it could not be resumed")
    return loss


def checked_loss(loss: Any, name: str, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """The loss called ``name`` of logits (B, C) and labels (B,), the samples weighed by ``weights`` (B,).

    Raises:
        UsageError: it is no loss of these, or gives no number with a gradient.
    """
    options = {} if weights is None else {"sample_weight": weights}
    try:
        value = loss(logits, labels, **options)
    except Exception as error:  # its author's code may raise anything
        raise UsageError(
            f"loss {name} cannot be used on logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"loss {name} must give one number with a gradient, got {got}")
    return value


def _with_settings(family_name: str, settings: str) -> Any:
    """A function with settings "KNOB=VALUE,KNOB=VALUE", tried on a row, so that a wrong one is found before training.

    Raises:
        UsageError: there is no such setting, or a value is not accepted.
    """
    name, function = f"{family_name}:{settings}", FAMILY[family_name]
    own = [knob for knob in inspect.signature(function).parameters if knob not in NO_SETTINGS]
    accepted = [*own, *SHARED_SETTINGS]
    values: dict[str, Any] = {}
    for setting in settings.split(","):
        knob, equals, value = setting.partition("=")
        if not (knob and equals and value) or knob in values:
            raise UsageError(f"loss {name} must be NAME:KNOB=VALUE,KNOB=VALUE with each knob once, got {setting!r}")
        if knob not in accepted:
            raise UsageError(f"loss {name}: the settings of {family_name} are {', '.join(accepted)}, got {knob!r}")
        values[knob] = _number_or_word(value)
    adjusted = partial(function, **values)
    try:
        adjusted(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    except (TypeError, ValueError) as error:
        raise UsageError(f"loss {name} cannot be made: {error}") from error
    return adjusted


def _number_or_word(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module or not all(map(str.isidentifier, attribute.split("."))):
        short, _, settings = name.partition(":")
        if short in INSTEAD:
            instead = INSTEAD[short].format(settings)
            raise UsageError(f"loss {short} has no settings of its own, give {instead}; got {name!r}")
        names = list(dict.fromkeys([*LOSSES, *FIXED, *FAMILY]))
        near = get_close_matches(short, names, n=1)
        raise UsageError(
            f"{f'do you mean {near[0]}? ' if near else ''}losses must be among {', '.join(names)}, a loss of the "
            f"family with settings such as jensen-shannon:pi=0.3, or package.module:attribute, got {name!r}"
        )
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module may raise anything when it is imported
        raise UsageError(f"loss {name} cannot be imported: {error}") from error
    return found


def _is_factory(found: Any) -> bool:
    """Whether it makes a loss: a class, or a function that needs no argument."""
    if inspect.isclass(found) or not inspect.isfunction(found):
        return inspect.isclass(found)
    parameters = inspect.signature(found).parameters.values()
    return all(
        parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters
    )


def loss_title(name: str) -> str:
    """What a loss is called in print."""
    return (LOSSES | FIXED).get(name, name)


def exponents(loss: Any) -> tuple[float, float]:
    """(q, bootstrap_weight) at this moment; NaN for a loss that has none."""
    if isinstance(loss, DynamicsAwareLoss):
        return loss.schedule.q, loss.schedule.bootstrap_weight
    return math.nan, math.nan
