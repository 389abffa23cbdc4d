"""Cross-entropy by the same kernels, and its focal form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import objectives
from dal_kernels.arguments import BACKENDS, Backend, RowStats, check, raise_for_labels
from dal_kernels.fields import Reduction, loss_dtype
from dal_kernels.losses.base import Bound, RobustLoss
from dal_kernels.mixtures import Mix, reduced
from dal_kernels.objective import Objective
from dal_kernels.quantities import places_of
from dal_kernels.reference import row_factors, row_quantities
from dal_kernels.tensors import check_choice
from dal_kernels.variations import check_smoothing, checked_scale, is_soft, shifted, varied_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dal_kernels.losses.options import CrossEntropyOptions, LossAndStats, LossOptions, ModuleOptions
    from dal_kernels.losses.ramp import Schedule


@overload
def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    label_smoothing: float = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[CrossEntropyOptions],
) -> Tensor: ...
@overload
def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    label_smoothing: float = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[CrossEntropyOptions],
) -> LossAndStats: ...
@overload
def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    label_smoothing: float = ...,
    *,
    return_stats: bool,
    **options: Unpack[CrossEntropyOptions],
) -> Tensor | LossAndStats: ...
def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    *,
    return_stats: bool = False,
    **options: Unpack[CrossEntropyOptions],
) -> Tensor | LossAndStats:
    r"""Cross-entropy: what :func:`torch.nn.functional.cross_entropy` computes, by the fused kernels.

    .. math:: -(1 - \varepsilon) \ln p_y - \frac{\varepsilon}{C} \sum_k \ln p_k

    Class weights together with label smoothing weigh every class's term, as there: that one case runs as plain
    operations.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        label_smoothing: from 0 to 1.
        return_stats: also return a :class:`dal_kernels.RowStats`.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    check_smoothing(objectives.smoothed_cross_entropy, label_smoothing)
    if is_soft(input, target) or options.get("mix") is not None or label_smoothing == 0:
        plain = objectives.symmetric_cross_entropy
        return varied_loss(
            plain, (1.0, 0.0), input, target, label_smoothing=label_smoothing, return_stats=return_stats, **options
        )
    if options.get("weight") is not None:
        return _weighted_smoothed_cross_entropy(input, target, label_smoothing, return_stats=return_stats, **options)
    return varied_loss(
        objectives.smoothed_cross_entropy, (label_smoothing,), input, target, return_stats=return_stats, **options
    )


def _weighted_smoothed_cross_entropy(
    input: Tensor,
    target: Tensor,
    label_smoothing: float,
    *,
    weight: Tensor | None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    return_stats: bool = False,
    target_shift: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    backend: Backend = "auto",
    **_: Any,
) -> Any:
    """Label smoothing with class weights, as :func:`torch.nn.functional.cross_entropy` has it: by that function."""
    if target_shift is not None:
        input = shifted(input, target, target_shift)
    if scale is not None:
        input = input * checked_scale(scale)
    call = check(
        input, target, objectives.row_statistics_of, (), weight, ignore_index, reduction, return_stats, sample_weight
    )
    check_choice("backend", backend, BACKENDS)
    raise_for_labels(call)
    dtype = loss_dtype(input)
    rows = F.cross_entropy(
        call.logits.to(dtype), call.target, call.weight, ignore_index=call.ignore_index, reduction="none",
        label_smoothing=label_smoothing,
    )  # fmt: skip
    factor = row_factors(call.target, call.logits.shape[1], call.weight, call.ignore_index, dtype)
    if call.sample_weight is not None:
        rows, factor = rows * call.sample_weight, factor * call.sample_weight
    stats = None
    if return_stats:
        place = places_of(call, call.target, call.logits.shape[1])[0]
        row = row_quantities(call.logits.detach().to(dtype), place, {"entropy", "max_log_prob"})
        prob = torch.where(call.target == call.ignore_index, float("nan"), row.prob)
        stats = RowStats(prob, row.entropy, call.logits.argmax(1), row.max_log_prob.exp())
    return call.shaped(reduced(rows, factor, reduction), stats)


class CrossEntropyLoss(RobustLoss):
    """:func:`cross_entropy_loss` as a module, in the place of ``torch.nn.CrossEntropyLoss``.

    Args:
        weight: (C,) class weights.
        label_smoothing: from 0 to 1.
        ignore_index, reduction, target_shift, scale, backend: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        target_shift: float | Tensor | None = None,
        scale: float | Tensor | None = None,
        backend: Backend = "auto",
    ) -> None:
        check_smoothing(objectives.smoothed_cross_entropy, label_smoothing)
        super().__init__(
            {}, weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            target_shift=target_shift, scale=scale, backend=backend,
        )  # fmt: skip

    def bind(self) -> Bound:
        return objectives.symmetric_cross_entropy, (1.0, 0.0)

    def for_form(self, input: Tensor, classes: int) -> tuple[int, tuple[float, ...] | Tensor, dict[str, Any]]:
        objective, knobs, options = super().for_form(input, classes)
        smoothing = options["label_smoothing"]
        if smoothing == 0:
            return objective, knobs, options
        if self.weight is not None:
            raise ValueError(
                "weight must be None with label_smoothing in the linear and class-parallel forms of CrossEntropyLoss, "
                "in which a row has one class weight and not a sum over those of all classes, got both"
            )
        return objectives.smoothed_cross_entropy.id, (smoothing,), {**options, "label_smoothing": 0.0}

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        return_stats: bool = False,
        sample_weight: Tensor | None = None,
        reduction: Reduction | None = None,
        mix: Mix | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """As :meth:`RobustLoss.forward`."""
        self._knobs_for(input)  # moves the class weights
        result: Tensor | tuple[Tensor, RowStats] = cross_entropy_loss(
            input, target, return_stats=return_stats, sample_weight=sample_weight, mix=mix, **self._options(reduction)
        )
        return result


@overload
def focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float | Tensor = ...,
    detach_modulator: bool = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float | Tensor = ...,
    detach_modulator: bool = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> LossAndStats: ...
@overload
def focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float | Tensor = ...,
    detach_modulator: bool = ...,
    *,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats: ...
def focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float | Tensor = 2.0,
    detach_modulator: bool = False,
    *,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats:
    r"""Focal loss: cross-entropy that turns away from what is learnt. Not robust: it stresses wrong labels too.

    .. math:: -(1 - p_y)^\gamma \ln p_y

    Source: arXiv 1708.02002, for dense detection.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        gamma: >= 0; a number, a 0-d tensor or one value a row.
        detach_modulator: count :math:`(1 - p_y)^\gamma` as a constant in the gradient, as several implementations do.
        return_stats: also return a :class:`dal_kernels.RowStats`.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(_focal(detach_modulator), (gamma,), input, target, return_stats=return_stats, **options)


def _focal(detach_modulator: bool) -> Objective:
    return objectives.focal_detached if detach_modulator else objectives.focal


class FocalLoss(RobustLoss):
    """:func:`focal_loss` as a module.

    Args:
        gamma, detach_modulator: as in the function; gamma is a number.
        schedule: a :class:`dal_kernels.Ramp` of gamma, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        detach_modulator: bool = False,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        self.detach_modulator = detach_modulator
        super().__init__({"gamma": gamma}, schedule=schedule, **options)

    def bind(self, gamma: Any) -> Bound:
        return _focal(self.detach_modulator), (gamma,)
