"""What a loss of the table may be asked for beside its knobs: smoothed, shifted, scaled, mixed and soft targets."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dal_kernels.arguments import (
    BACKENDS,
    Backend,
    Call,
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
from dal_kernels.objective import Objective, RowQuantities
from dal_kernels.quantities import quantities_of_call
from dal_kernels.reference import row_factors
from dal_kernels.tensors import LOGITS, check_choice, of_rows, shape_of

Mix = tuple[Tensor, float | Tensor]


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


def check_form(module: nn.Module, names: tuple[str, ...]) -> None:
    """Raise ValueError for an option that the forms of a loss (linear, class-parallel) do not have."""
    for name in names:
        value, nothing = getattr(module, name), 0.0 if name == "label_smoothing" else None
        if isinstance(value, Tensor) or value != nothing:
            raise ValueError(f"{name} must be {nothing} in this form of a loss, got {value!r:.60}")


def check_smoothing(objective: Objective, label_smoothing: float) -> None:
    """Raise ValueError for what is no share, or where the loss cannot be smoothed."""
    if not isinstance(label_smoothing, Real) or not 0 <= label_smoothing <= 1:
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
    elif not isinstance(scale, Real) or not 0 < scale < float("inf"):
        raise ValueError(f"scale must be finite and > 0, got {scale!r}")
    return scale


def shifted(input: Tensor, target: Tensor, shift: float | Tensor) -> Tensor:
    """The logits with the shift added to that of each row's target class; in a copy."""
    place = int(input.dim() > 1)
    classes = input.shape[place]
    labels = target.long()
    valid = (labels >= 0) & (labels < classes)
    labels = torch.where(valid, labels, 0)
    if not isinstance(shift, Tensor):
        if not isinstance(shift, Real) or not abs(shift) < float("inf"):
            raise ValueError(f"target_shift must be finite, got {shift!r}")
        values = torch.full_like(labels, float(shift), dtype=input.dtype)
    elif shift.dim() == 0:
        values = shift.expand(labels.shape)
    elif shift.shape == (classes,):
        values = shift[labels]
    elif shift.shape in (target.shape, (*target.shape, 1)):
        values = shift.reshape(target.shape)
    else:
        raise ValueError(
            f"target_shift must be a number, one a class ({classes},) or one a row {tuple(target.shape)}, "
            f"got shape {shape_of(shift)}"
        )
    values = torch.where(valid, values, 0).to(input.dtype)
    return input.scatter_add(place, labels.unsqueeze(place), values.unsqueeze(place))


def fading_shift(classes: int, q: Tensor, q_start: float) -> Tensor:
    """A target shift for many classes that is gone when q reaches 1, a 0-d tensor.

    At q_start it gives a network that knows nothing the probabilities of labels that it would have with ten classes:
    p_y = e^shift / (e^shift + C - 1) = 1/10. From there it falls in a line. After arXiv 2306.05497, which sets a shift
    by the number of classes and keeps it.
    """
    return math.log(max(1.0, (classes - 1) / 9)) * ((1.0 - q) / (1.0 - q_start)).clamp(0.0, 1.0)


class SmoothedQuantities(RowQuantities):
    """Quantities whose l and p_y are mixed with their means over the classes: G / C and 1 / C."""

    smoothing = 0.0

    @classmethod
    def of(cls, row: RowQuantities, smoothing: float) -> SmoothedQuantities:
        own = 1 - smoothing
        smoothed = cls(own * row.log_prob + smoothing / row.classes * row.sum_log_prob, *row[1:])
        smoothed.smoothing = smoothing
        smoothed.plain = row
        return smoothed

    plain: RowQuantities

    @property
    def prob(self) -> Tensor:
        return (1 - self.smoothing) * self.plain.prob + self.smoothing / self.classes

    @property
    def miss(self) -> Tensor:
        return (1 - self.smoothing) * self.plain.miss + self.smoothing * (self.classes - 1) / self.classes


def _mixed_loss(
    objective: Objective,
    knobs: tuple[KnobValue, ...] | Tensor,
    input: Tensor,
    target: Tensor,
    label_smoothing: float,
    mix: Mix | None,
    options: dict[str, Any],
) -> Any:
    """By the fused statistics of the rows, of which the loss is made in plain vectors of N values."""
    backend = options.pop("backend")
    options["want_stats"] = options.pop("return_stats")
    call = check(input, target, objective, knobs, **options)
    targets, shares = [call.target], [1.0]
    if mix is not None:
        other, share = _other_of(call, input, target, mix)
        targets, shares = [call.target, other], [share, 1.0 - share]
    counted = [of != call.ignore_index for of in targets]
    # A row of which one target is ignored is a row of the other.
    first = torch.where(counted[0], targets[0], targets[-1])
    others = [torch.where(has, of, first) for has, of in zip(counted[1:], targets[1:], strict=True)]
    rows, prediction = quantities_of_call(call._replace(target=first), (first, *others), choose(backend, input))
    values = call.knobs.to(rows[0].log_prob.dtype).unbind(-1)
    classes = call.logits.shape[1]
    total = weights = torch.zeros_like(rows[0].log_prob)
    for row, of, has, share in zip(rows, targets, counted, shares, strict=True):
        if label_smoothing > 0:
            row = SmoothedQuantities.of(row, label_smoothing)
        factor = share * row_factors(of, classes, call.weight, call.ignore_index, row.log_prob.dtype)
        if call.sample_weight is not None:
            factor = factor * call.sample_weight
        total = total + torch.where(has, objective.formula(row, *values) * factor, 0.0)
        weights = weights + torch.where(has, factor, 0.0)
    loss = reduced(total, weights, call.reduction)
    stats = None
    if call.want_stats:
        prob = torch.where(counted[0], rows[0].prob, float("nan"))
        stats = RowStats(prob.detach(), rows[0].entropy.detach(), prediction, rows[0].max_log_prob.detach().exp())
    return call.shaped(loss, stats)


def reduced(rows: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """Weighted losses of rows as the caller wants them; "mean" divides by the sum of what the rows count."""
    loss = rows if reduction == "none" else rows.sum()
    return loss / weights.sum() if reduction == "mean" else loss


def _other_of(call: Call, input: Tensor, target: Tensor, mix: Mix) -> tuple[Tensor, Any]:
    """The other target and the share of the first, as flat rows."""
    if not (isinstance(mix, tuple) and len(mix) == 2):
        raise TypeError(f"mix must be a pair (other_target, weight), got {type(mix).__name__}")
    other, share = mix
    if not isinstance(other, Tensor) or other.shape != target.shape or other.is_floating_point():
        got = shape_of(other) if isinstance(other, Tensor) else type(other).__name__
        raise ValueError(f"mix[0] must be class indices shaped like target, {tuple(target.shape)}, got {got}")
    if isinstance(share, Tensor):
        share = share.to(loss_dtype(input))
        share = share if share.dim() == 0 else of_rows("mix[1]", share, input, call.shape, "one weight or one a row")
    elif not isinstance(share, Real) or not 0 <= share <= 1:
        raise ValueError(f"mix[1] must be a weight from 0 to 1, got {share!r}")
    return other.reshape(-1).long(), share


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
    logits, shares = (of.movedim(place, -1).to(dtype) for of in (input, target))
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
