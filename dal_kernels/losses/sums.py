"""Losses that sum over all classes of a row: normalised and squared ones, and what is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dal_kernels import objectives
from dal_kernels.losses.base import Bound, RobustLoss
from dal_kernels.variations import varied_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dal_kernels.losses.options import LossOptions, ModuleOptions
    from dal_kernels.losses.ramp import Schedule


def normalized_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Normalised cross-entropy (NCE): cross-entropy by its sum over all labels.

    .. math:: \frac{\ln p_y}{\sum_k \ln p_k}

    Source: arXiv 2006.13554. Robust and slow to fit: mostly a part of :func:`active_passive_loss`.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.normalized_and_absolute, (1.0, 0.0), input, target, **options)


class NormalizedCrossEntropyLoss(RobustLoss):
    """:func:`normalized_cross_entropy_loss` as a module.

    Args:
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({}, **options)

    def bind(self) -> Bound:
        return objectives.normalized_and_absolute, (1.0, 0.0)


def joint_asymmetric_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    a: float | Tensor = 30.0,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Joint asymmetric loss (JAL-CE): normalised cross-entropy and the asymmetric mean squared error.

    .. math:: \alpha \, NCE + \frac{\beta}{C} \left( \sum_k p_k^2 - 2 a p_y + a^2 \right)

    Source: "Joint Asymmetric Loss for Learning with Noisy Labels", ICCV 2025. An active and a passive loss as in
    :func:`active_passive_loss`.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        alpha, beta, a: >= 0; a number, a 0-d tensor or one value a row.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.joint_asymmetric, (alpha, beta, a), input, target, **options)


class JointAsymmetricLoss(RobustLoss):
    """:func:`joint_asymmetric_loss` as a module.

    Args:
        alpha, beta, a: numbers, as in the function.
        schedule: a :class:`dal_kernels.Ramp` of some of them, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        a: float = 30.0,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "a": a}, schedule=schedule, **options)

    def bind(self, alpha: Any, beta: Any, a: Any) -> Bound:
        return objectives.joint_asymmetric, (alpha, beta, a)


def brier_loss(
    input: Tensor,
    target: Tensor,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Brier score: the squared distance of the probabilities from the label.

    .. math:: \sum_k p_k^2 - 2 p_y + 1

    Source: Brier, "Verification of forecasts expressed in terms of probability", 1950. Bounded and proper: its
    minimum is the true distribution.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.brier, (), input, target, **options)


class BrierLoss(RobustLoss):
    """:func:`brier_loss` as a module.

    Args:
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({}, **options)

    def bind(self) -> Bound:
        return objectives.brier, ()
