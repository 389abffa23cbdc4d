"""Losses of the probability of the target class alone: they cost what cross-entropy costs."""

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


def generalized_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor = 0.7,
    **options: Unpack[LossOptions],
) -> Any:
    """Generalised cross-entropy (GCE): cross-entropy for q -> 0, mean absolute error for q = 1.

    .. math:: (1 - p_y^q) / q

    Source: arXiv 1805.07836, with 0.7 throughout. The first loss to try: one knob, fits almost as fast as cross-
    entropy.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        q: exponent >= 0; a number, a 0-d tensor or one value a row.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.generalized_cross_entropy, (q,), input, target, **options)


class GeneralizedCrossEntropyLoss(RobustLoss):
    """:func:`generalized_cross_entropy_loss` as a module.

    Args:
        q: numbers, as in the function.
        schedule: a :class:`dal_kernels.Ramp` of it, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        q: float = 0.7,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({"q": q}, schedule=schedule, **options)

    def bind(self, q: Any) -> Bound:
        return objectives.generalized_cross_entropy, (q,)


def mean_absolute_error_loss(
    input: Tensor,
    target: Tensor,
    **options: Unpack[LossOptions],
) -> Any:
    """Mean absolute error, divided by 2: robust against symmetric noise, slow to fit with many classes.

    .. math:: 1 - p_y

    Source: arXiv 1712.09482. Take it where classes are few, or with ``target_shift``.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.symmetric_cross_entropy, (0.0, 1.0), input, target, **options)


class MeanAbsoluteErrorLoss(RobustLoss):
    """:func:`mean_absolute_error_loss` as a module.

    Args:
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({}, **options)

    def bind(self) -> Bound:
        return objectives.symmetric_cross_entropy, (0.0, 1.0)


def reverse_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Reverse cross-entropy (RCE): mean absolute error times A.

    .. math:: A (1 - p_y), \quad A = -\ln 10^{-4}

    Source: arXiv 1908.06112. Mostly a part of others: see :func:`symmetric_cross_entropy_loss` and
    :func:`active_passive_loss`.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.symmetric_cross_entropy, (0.0, objectives.REVERSE_SCALE), input, target, **options)


class ReverseCrossEntropyLoss(RobustLoss):
    """:func:`reverse_cross_entropy_loss` as a module.

    Args:
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({}, **options)

    def bind(self) -> Bound:
        return objectives.symmetric_cross_entropy, (0.0, objectives.REVERSE_SCALE)


def symmetric_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.1,
    beta: float | Tensor = 1.0,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Symmetric cross-entropy (SCE): cross-entropy and reverse cross-entropy.

    .. math:: -\alpha \ln p_y + \beta A (1 - p_y), \quad A = -\ln 10^{-4}

    Source: arXiv 1908.06112, which takes 0.1 and 1 for CIFAR-10 and 6 and 0.1 for CIFAR-100. Take it where GCE
    underfits.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        alpha, beta: >= 0; a number, a 0-d tensor or one value a row.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(
        objectives.symmetric_cross_entropy, (alpha, beta * objectives.REVERSE_SCALE), input, target, **options
    )


class SymmetricCrossEntropyLoss(RobustLoss):
    """:func:`symmetric_cross_entropy_loss` as a module.

    Args:
        alpha, beta: numbers, as in the function.
        schedule: a :class:`dal_kernels.Ramp` of some of them, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 1.0,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta}, schedule=schedule, **options)

    def bind(self, alpha: Any, beta: Any) -> Bound:
        return objectives.symmetric_cross_entropy, (alpha, beta * objectives.REVERSE_SCALE)


def taylor_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    order: float | Tensor = 2,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Taylor cross-entropy: the series of cross-entropy, cut off.

    .. math:: \sum_{i=1}^{t} (1 - p_y)^i / i

    Source: "Can Cross Entropy Loss Be Robust to Label Noise?", IJCAI 2020. Order 1 is mean absolute error, a
    large one cross-entropy.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        order: t, a whole number from 1 to 16.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.taylor_cross_entropy, (order,), input, target, **options)


class TaylorCrossEntropyLoss(RobustLoss):
    """:func:`taylor_cross_entropy_loss` as a module.

    Args:
        order: numbers, as in the function.
        schedule: a :class:`dal_kernels.Ramp` of it, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        order: float = 2,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({"order": order}, schedule=schedule, **options)

    def bind(self, order: Any) -> Bound:
        return objectives.taylor_cross_entropy, (order,)
