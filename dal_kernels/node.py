"""The short way of a call: one C++ function that checks it, runs it and makes its node of the autograd graph.

The extension is built for one version of torch, because torch's autograd has no stable ABI, and is loaded by that
version alone. Without it, and for what is not the common case (other shapes, transforms, recording modes, tensor
subclasses, anything wrong), the long way in Python does the same: :mod:`dal_kernels.arguments` checks,
:mod:`dal_kernels.autograd` makes the node.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dal_kernels import extensions
from dal_kernels.arguments import RowStats
from dal_kernels.backends.choose import choose
from dal_kernels.knobs import remembered_knobs, remembered_number
from dal_kernels.objectives import OBJECTIVES
from dal_kernels.ops import KERNELS, in_triton
from dal_kernels.surroundings import frames_inside, is_capturing

# Why the extension cannot be used, or None where it is.
error: str | None = None
_module: Any = None  # the extension, once it is loaded


def _plan(backend: str, input: Tensor, objective: int) -> tuple[str, bool] | None:
    """Whose operators take a call and whether they write its gradient in the forward; None for the long way."""
    try:
        name = choose(backend, input, objective)
    except (RuntimeError, ValueError):  # the long way says what is wrong
        return None
    if name == "triton":
        _learn_triton()
    return None if name == "eager" else (name, KERNELS[name].writes_gradient(input, objective))


def _remember(objective: int, numbers: tuple[float, ...], input: Tensor) -> Tensor | None:
    """None also for numbers that the loss cannot have: the long way says what is wrong with them."""
    try:
        return remembered_knobs(OBJECTIVES[objective], numbers, input)
    except ValueError:
        return None


def _remember_number(objective: int, place: int, number: float, input: Tensor) -> Tensor | None:
    """As :func:`_remember`, of one number beside tensors."""
    try:
        return remembered_number(OBJECTIVES[objective].knobs[place], number, input)
    except ValueError:
        return None


def _record(name: str, *arguments: Any) -> Any:
    """What an operator of Triton's gives, by its name in ``ops.in_triton``, and how it is done again."""
    from dal_kernels.backends.triton import record

    return record.record(in_triton[name], *arguments)


@functools.cache
def _learn_triton() -> None:
    """Not before a call needs it, because it starts Triton's driver."""
    from dal_kernels.backends.triton import record

    _module.learn_triton(_record, record.undisturbed, record.launcher())


def _load() -> Callable[..., Any] | None:
    """``loss`` of the extension: :func:`dal_kernels.functional.loss_of` by position, or None for the long way."""
    global error, _module
    try:
        module = extensions.load("_node", made_for=torch.__version__)
    except ImportError as reason:
        error = str(reason)
        return None
    traits = [(len(objective.knobs), objective.needs_argmax) for objective in OBJECTIVES]
    try:
        module.learn(traits, _plan, _remember, _remember_number, is_capturing, RowStats)
    except (AttributeError, RuntimeError) as reason:
        error = f"it was built from other sources than these ({reason}); install dal_kernels again"
        return None
    _module = module
    loss: Callable[..., Any] = module.loss
    return loss


@functools.cache
def say_once() -> None:
    """Warn, the first time, that calls take the long way and why."""
    if error is not None:
        warnings.warn(
            f"calls of the loss take more of the host's time than they could: the autograd node is missing: {error}",
            stacklevel=frames_inside() + 1,
        )


short_way = _load()
