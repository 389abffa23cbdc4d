"""The keyword options that the losses of the family share."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from dal_kernels.arguments import Backend, RowStats
from dal_kernels.fields import Reduction
from dal_kernels.mixtures import Mix

# What a call gives with return_stats.
LossAndStats = tuple[Tensor, RowStats]


class PlainOptions(TypedDict, total=False):
    """What every loss takes by name.

    Attributes:
        weight: (C,) class weights, which multiply the losses of rows; "mean" divides by their sum over the rows.
        ignore_index: rows with this target have loss 0 and gradient 0 and are not counted.
        reduction: "mean", "sum" or "none".
        backend: as in :func:`dal_kernels.dynamics_aware_loss`.
    """

    weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    backend: Backend


class ShiftOptions(PlainOptions, total=False):
    """What changes the logits before the softmax.

    Attributes:
        target_shift: added to the logit of each row's target class: a number, a (C,) tensor of one a class, or one a
            row, shaped like the target or, where N = C, (N, 1). Positive ones ease the fit with many classes (logit
            bias, arXiv 2306.05497), negative ones are margins. Costs a copy of the logits.
        scale: multiplies the (shifted) logits: a number or a 0-d tensor, which may be learnt. Costs a copy too.
    """

    target_shift: float | Tensor | None
    scale: float | Tensor | None


class SmoothingOptions(ShiftOptions, total=False):
    """And what smooths labels.

    Attributes:
        label_smoothing: the share, from 0 to 1, that the uniform target has beside the given one. For losses that are
            affine in ln p_y and p_y; the others refuse it.
    """

    label_smoothing: float


class ModuleOptions(SmoothingOptions, total=False):
    """What the modules of the losses take.

    Attributes:
        watch: whether mistakes with the schedule are warned of, see :class:`dal_kernels.ScheduleWarning`.
    """

    watch: bool


class CallOptions(TypedDict, total=False):
    """What a single call takes.

    Attributes:
        sample_weight: one value a row, shaped like the target or (N,). "mean" divides by what the rows count: sample
            weight times class weight. May require grad.
    """

    sample_weight: Tensor | None


class MixOptions(CallOptions, total=False):
    """And what mixes two targets.

    Attributes:
        mix: (other_target, w) of mixup and its like: w * loss(target) + (1 - w) * loss(other_target), w a number, a 0-d
            tensor or one a row. One pass over the logits more than without.
    """

    mix: Mix | None


class LossOptions(SmoothingOptions, MixOptions, total=False):
    """What the functions of the losses take."""


class CrossEntropyOptions(ShiftOptions, MixOptions, total=False):
    """What a function takes that has label_smoothing itself."""


class MarginOptions(PlainOptions, CallOptions, total=False):
    """What a function takes that shifts and scales by itself."""
