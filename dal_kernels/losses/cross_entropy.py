"""Cross-entropy by the same kernels, and its focal form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dal_kernels import objectives
from dal_kernels.losses.base import Bound, RobustLoss
from dal_kernels.variations import check_smoothing, varied_loss, weighted_smoothed_cross_entropy

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dal_kernels.losses.options import CrossEntropyOptions, LossOptions, ModuleOptions, ShiftOptions
    from dal_kernels.losses.ramp import Schedule


def cross_entropy_loss(
    input: Tensor, target: Tensor, label_smoothing: float = 0.0, **options: Unpack[CrossEntropyOptions]
) -> Any:
    r"""Cross-entropy: what :func:`torch.nn.functional.cross_entropy` computes, by the fused kernels.

    .. math:: -(1 - \varepsilon) \ln p_y - \frac{\varepsilon}{C} \sum_k \ln p_k

    Class weights together with label smoothing weigh every class's term, as there: that one case runs as plain
    operations.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        label_smoothing: from 0 to 1.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    check_smoothing(objectives.smoothed_cross_entropy, label_smoothing)
    soft = isinstance(target, Tensor) and target.is_floating_point()
    if soft or options.get("mix") is not None or label_smoothing == 0:
        plain = objectives.symmetric_cross_entropy
        return varied_loss(plain, (1.0, 0.0), input, target, label_smoothing=label_smoothing, **options)
    if options.get("weight") is not None:
        return weighted_smoothed_cross_entropy(input, target, label_smoothing, **options)
    return varied_loss(objectives.smoothed_cross_entropy, (label_smoothing,), input, target, **options)


class CrossEntropyLoss(RobustLoss):
    """:func:`cross_entropy_loss` as a module.

    Args:
        label_smoothing: from 0 to 1.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(self, label_smoothing: float = 0.0, **options: Unpack[ShiftOptions]) -> None:
        check_smoothing(objectives.smoothed_cross_entropy, label_smoothing)
        super().__init__({}, **options)
        self.label_smoothing = label_smoothing

    def bind(self) -> Bound:
        return objectives.symmetric_cross_entropy, (1.0, 0.0)

    def for_form(self, input: Tensor) -> tuple[int, tuple[float, ...] | Tensor, dict[str, Any]]:
        if self.label_smoothing == 0 or self.weight is not None:
            return super().for_form(input)
        smoothing, self.label_smoothing = self.label_smoothing, 0.0
        try:
            _, _, options = super().for_form(input)
        finally:
            self.label_smoothing = smoothing
        return objectives.smoothed_cross_entropy.id, (smoothing,), options

    def compute(self, input: Tensor, target: Tensor, **options: Any) -> Any:
        return cross_entropy_loss(input, target, **options)


def focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float | Tensor = 2.0,
    detach_modulator: bool = False,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Focal loss: cross-entropy that turns away from what is learnt. Not robust: it stresses wrong labels too.

    .. math:: -(1 - p_y)^\gamma \ln p_y

    Source: arXiv 1708.02002, for dense detection.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        gamma: >= 0; a number, a 0-d tensor or one value a row.
        detach_modulator: count :math:`(1 - p_y)^\gamma` as a constant in the gradient, as several implementations do.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(_focal(detach_modulator), (gamma,), input, target, **options)


def _focal(detach_modulator: bool) -> objectives.Objective:
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
