"""What a loss of the table may be asked for beside its knobs: smoothed, shifted, scaled, mixed and soft targets."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dal_kernels.arguments import (
    BACKENDS,
    Backend,
    RowStats,
    check,
    check_options,
    class_weight_of,
    sample_weight_of,
)
from dal_kernels.backends.choose import choose
from dal_kernels.fields import Reduction, loss_dtype
from dal_kernels.functional import Hearer, loss_of
from dal_kernels.knobs import KnobValue, knob_tensor
from dal_kernels.mixtures import Mix, mixed_loss, other_of, reduced
from dal_kernels.objective import Objective, RowQuantities
from dal_kernels.quantities import quantities_of_call
from dal_kernels.tensors import LOGITS, check_choice, is_number, shape_of


def varied_loss(
    objective: Objective,
    knobs: tuple[KnobValue, ...] | Tensor,
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    target_shift: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    mix: Mix | None = None,
    backend: Backend = "auto",
    hearer: Hearer | None = None,
) -> Any:
    """The loss with the options that :class:`dal_kernels.losses.options.LossOptions` documents."""
    soft = is_soft(input, target)
    if not soft and mix is None and target_shift is None and scale is None and label_smoothing == 0:
        return loss_of(
            objective.id, knobs, input, target, weight=weight, ignore_index=ignore_index, reduction=reduction,
            return_stats=return_stats, sample_weight=sample_weight, backend=backend, hearer=hearer,
        )  # fmt: skip
    options: dict[str, Any] = {
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "return_stats": return_stats,
        "sample_weight": sample_weight,
        "backend": backend,
    }
    if label_smoothing != 0:
        check_smoothing(objective, label_smoothing)
    if target_shift is not None:
        if soft or mix is not None:
            raise ValueError("target_shift must be None with soft targets and with mix, which have no one target class")
        input = shifted(input, target, target_shift)
    if scale is not None:
        input = input * checked_scale(scale)
    if soft:
        if mix is not None:
            raise ValueError("mix must be None with soft targets, which say what they mix")
        return _soft_loss(objective, knobs, input, target, label_smoothing, options)
    if mix is None and label_smoothing == 0:
        return loss_of(objective.id, knobs, input, target, hearer=hearer, **options)
    return _mixed_loss(objective, knobs, input, target, label_smoothing, mix, options)


def is_soft(input: Tensor, target: Tensor) -> bool:
    """Whether the target holds probabilities: floats shaped like the logits."""
    both = isinstance(target, Tensor) and isinstance(input, Tensor)
    return both and target.is_floating_point() and target.shape == input.shape


def keep_variations(module: nn.Module, **values: float | Tensor | str | None) -> None:
    """Options of a module: a parameter is learnt, a tensor moves with the module, a number is a number."""
    for name, value in values.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            module.register_buffer(name, value, persistent=False)
        else:
            setattr(module, name, value)


def without_variations(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a loss for a form that has no smoothed, shifted or scaled logits.

    Raises:
        ValueError: there is one of these.
    """
    nothing = {"label_smoothing": 0.0, "target_shift": None, "scale": None}
    for name, default in nothing.items():
        value = options.get(name, default)
        if isinstance(value, Tensor) or value != default:
            raise ValueError(f"{name} must be {default} in this form of a loss, got {value!r:.60}")
    return {name: value for name, value in options.items() if name not in nothing}


def check_smoothing(objective: Objective, label_smoothing: float) -> None:
    """Raise ValueError for what is no share, or where the loss cannot be smoothed."""
    if not is_number(label_smoothing) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be a number from 0 to 1, got {label_smoothing!r}")
    if label_smoothing > 0 and not objective.affine:
        raise ValueError(
            f"label_smoothing must be 0 for {objective.name}_loss, got {label_smoothing}: its mixture with the uniform "
            "target is no function of a few sums of the row; give soft targets, which cost a pass a class"
        )


def checked_scale(scale: float | Tensor) -> float | Tensor:
    """The scale, or ValueError."""
    if isinstance(scale, Tensor):
        if scale.dim() or scale.dtype not in LOGITS:
            raise ValueError(f"scale must be a number or a 0-d tensor, got {scale.dtype} of shape {shape_of(scale)}")
    elif not is_number(scale) or not 0 < scale < float("inf"):
        raise ValueError(f"scale must be finite and > 0, got {scale!r}")
    return scale


def shifted(input: Tensor, target: Tensor, shift: float | Tensor) -> Tensor:
    """The logits with the shift added to that of each row's target class; in a copy."""
    place = int(input.dim() > 1)
    labels = target.long()
    values = shift_of_rows(shift, labels, input.shape[place], target.shape, input.dtype)
    labels = torch.where((labels >= 0) & (labels < input.shape[place]), labels, 0)
    return input.scatter_add(place, labels.unsqueeze(place), values.unsqueeze(place))


def shift_of_rows(shift: float | Tensor, labels: Tensor, classes: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The shift of each row, shaped like its labels (int64); 0 where the label is no class.

    Args:
        shift: a number, a 0-d tensor, one a class or one a row, of which ``shape`` is the shape.
    """
    valid = (labels >= 0) & (labels < classes)
    if not isinstance(shift, Tensor):
        if not is_number(shift) or not abs(shift) < float("inf"):
            raise ValueError(f"target_shift must be finite, got {shift!r}")
        values = torch.full_like(labels, float(shift), dtype=dtype)
    elif shift.dim() == 0:
        values = shift.expand(labels.shape)
    elif shift.shape == (classes,):
        values = shift[torch.where(valid, labels, 0)]
    elif shift.shape in (shape, (*shape, 1)):
        values = shift.reshape(labels.shape)
    else:
        raise ValueError(
            f"target_shift must be a number, one a class ({classes},) or one a row {tuple(shape)}, "
            f"got shape {shape_of(shift)}"
        )
    return torch.where(valid, values, 0).to(dtype)


def fading_shift(classes: int, q: Tensor, q_start: float) -> Tensor:
    """A target shift for many classes that is gone when q reaches 1, a 0-d tensor.

    At q_start it gives a network that knows nothing the probabilities of labels that it would have with ten classes:
    p_y = e^shift / (e^shift + C - 1) = 1/10. From there it falls in a line. After arXiv 2306.05497, which sets a shift
    by the number of classes and keeps it.
    """
    return math.log(max(1.0, (classes - 1) / 9)) * ((1.0 - q) / (1.0 - q_start)).clamp(0.0, 1.0)


def _mixed_loss(
    objective: Objective,
    knobs: tuple[KnobValue, ...] | Tensor,
    input: Tensor,
    target: Tensor,
    label_smoothing: float,
    mix: Mix | None,
    options: dict[str, Any],
) -> Any:
    """Of logits, by the fused statistics of their rows."""
    backend = options.pop("backend")
    options["want_stats"] = options.pop("return_stats")
    call = check(input, target, objective, knobs, **options)
    other = None if mix is None else other_of(call, input, target, mix)
    quantities = partial(quantities_of_call, backend=choose(backend, input))
    return call.shaped(*mixed_loss(call, label_smoothing, other, quantities))


def _soft_loss(
    objective: Objective,
    knobs: tuple[KnobValue, ...] | Tensor,
    input: Tensor,
    target: Tensor,
    label_smoothing: float,
    options: dict[str, Any],
) -> Any:
    """sum_k t_k loss(z, k) for targets t shaped like the logits, by plain operations on all of them."""
    if input.dtype not in LOGITS:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64 logits, got {input.dtype}")
    check_options(options["ignore_index"], options["reduction"])
    check_choice("backend", options["backend"], BACKENDS)
    place = int(input.dim() > 1)
    classes, dtype = input.shape[place], loss_dtype(input)
    logits, shares = (tensor.movedim(place, -1).to(dtype) for tensor in (input, target))
    if label_smoothing > 0:
        shares = (1 - label_smoothing) * shares + label_smoothing / classes
    log_prob = F.log_softmax(logits, -1)
    prob = log_prob.exp()
    entropy = -(prob * log_prob.masked_fill(log_prob == -float("inf"), 0.0)).sum(-1, keepdim=True)
    best = log_prob.amax(-1, keepdim=True)
    others = (entropy, best, log_prob.sum(-1, keepdim=True), prob.square().sum(-1, keepdim=True), classes)
    shape = logits.shape[:-1]
    values = knob_tensor(objective, knobs, input, shape).to(dtype).unbind(-1)
    values = tuple(value if value.dim() == 0 else value.reshape(*shape, 1) for value in values)
    rows = objective.formula(RowQuantities(log_prob, *others), *values)
    if options["weight"] is not None:
        rows = rows * class_weight_of(options["weight"], input, classes)
    rows = torch.where(shares == 0, 0.0, shares * rows).sum(-1)
    weights = torch.ones_like(rows)
    if options["sample_weight"] is not None:
        weights = sample_weight_of(options["sample_weight"], input, shape).reshape(shape)
        rows = rows * weights
    loss = reduced(rows, weights, options["reduction"])
    if not options["return_stats"]:
        return loss
    hit = torch.where(shares == 0, 0.0, shares * prob).sum(-1)
    return loss, RowStats(
        hit.detach(), entropy.squeeze(-1).detach(), logits.argmax(-1), best.squeeze(-1).detach().exp()
    )
