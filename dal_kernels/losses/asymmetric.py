"""Asymmetric losses of the probability of the target class alone (arXiv 2106.03110)."""

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


def asymmetric_generalized_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    a: float | Tensor = 0.6,
    q: float | Tensor = 0.6,
    **options: Unpack[LossOptions],
) -> Any:
    """Asymmetric generalised cross-entropy (AGCE).

    .. math:: ((a + 1)^q - (a + p_y)^q) / q

    Source: arXiv 2106.03110. For noise below which the true label is still the likeliest.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        a, q: > 0; a number, a 0-d tensor or one value a row.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.asymmetric_generalized_cross_entropy, (a, q), input, target, **options)


class AsymmetricGeneralizedCrossEntropyLoss(RobustLoss):
    """:func:`asymmetric_generalized_cross_entropy_loss` as a module.

    Args:
        a, q: numbers, as in the function.
        schedule: a :class:`dal_kernels.Ramp` of some of them, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        a: float = 0.6,
        q: float = 0.6,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({"a": a, "q": q}, schedule=schedule, **options)

    def bind(self, a: Any, q: Any) -> Bound:
        return objectives.asymmetric_generalized_cross_entropy, (a, q)


def asymmetric_unhinged_loss(
    input: Tensor,
    target: Tensor,
    a: float | Tensor = 5.5,
    q: float | Tensor = 3.0,
    **options: Unpack[LossOptions],
) -> Any:
    """Asymmetric unhinged loss (AUL).

    .. math:: ((a - p_y)^q - (a - 1)^q) / q

    Source: arXiv 2106.03110. As AGCE; q = 1 is mean absolute error.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        a: > 1; a number, a 0-d tensor or one value a row.
        q: > 0; a number, a 0-d tensor or one value a row.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.asymmetric_unhinged, (a, q), input, target, **options)


class AsymmetricUnhingedLoss(RobustLoss):
    """:func:`asymmetric_unhinged_loss` as a module.

    Args:
        a, q: numbers, as in the function.
        schedule: a :class:`dal_kernels.Ramp` of some of them, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        a: float = 5.5,
        q: float = 3.0,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({"a": a, "q": q}, schedule=schedule, **options)

    def bind(self, a: Any, q: Any) -> Bound:
        return objectives.asymmetric_unhinged, (a, q)


def asymmetric_exponential_loss(
    input: Tensor,
    target: Tensor,
    a: float | Tensor = 2.5,
    **options: Unpack[LossOptions],
) -> Any:
    """Asymmetric exponential loss (AEL).

    .. math:: e^{-p_y / a}

    Source: arXiv 2106.03110. As AGCE.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        a: > 0; a number, a 0-d tensor or one value a row.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.asymmetric_exponential, (a,), input, target, **options)


class AsymmetricExponentialLoss(RobustLoss):
    """:func:`asymmetric_exponential_loss` as a module.

    Args:
        a: numbers, as in the function.
        schedule: a :class:`dal_kernels.Ramp` of it, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        a: float = 2.5,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({"a": a}, schedule=schedule, **options)

    def bind(self, a: Any) -> Bound:
        return objectives.asymmetric_exponential, (a,)
