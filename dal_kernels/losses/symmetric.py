"""Mean absolute error, which is symmetric and so robust, and what is made of it: they cost what cross-entropy costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from dal_kernels import objectives
from dal_kernels.losses.base import Bound, RobustLoss
from dal_kernels.variations import varied_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dal_kernels.losses.options import LossAndStats, LossOptions, ModuleOptions
    from dal_kernels.losses.ramp import Schedule


@overload
def mean_absolute_error_loss(
    input: Tensor, target: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[LossOptions]
) -> Tensor: ...
@overload
def mean_absolute_error_loss(
    input: Tensor, target: Tensor, *, return_stats: Literal[True], **options: Unpack[LossOptions]
) -> LossAndStats: ...
@overload
def mean_absolute_error_loss(
    input: Tensor, target: Tensor, *, return_stats: bool, **options: Unpack[LossOptions]
) -> Tensor | LossAndStats: ...
def mean_absolute_error_loss(
    input: Tensor,
    target: Tensor,
    *,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats:
    """Mean absolute error, divided by 2: robust against symmetric noise, slow to fit with many classes.

    .. math:: 1 - p_y

    Source: arXiv 1712.09482. Take it where classes are few, or with ``target_shift``.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        return_stats: also return a :class:`dal_kernels.RowStats`.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(
        objectives.symmetric_cross_entropy, (0.0, 1.0), input, target, return_stats=return_stats, **options
    )


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


@overload
def reverse_cross_entropy_loss(
    input: Tensor, target: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[LossOptions]
) -> Tensor: ...
@overload
def reverse_cross_entropy_loss(
    input: Tensor, target: Tensor, *, return_stats: Literal[True], **options: Unpack[LossOptions]
) -> LossAndStats: ...
@overload
def reverse_cross_entropy_loss(
    input: Tensor, target: Tensor, *, return_stats: bool, **options: Unpack[LossOptions]
) -> Tensor | LossAndStats: ...
def reverse_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    *,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats:
    r"""Reverse cross-entropy (RCE): mean absolute error times A.

    .. math:: A (1 - p_y), \quad A = -\ln 10^{-4}

    Source: arXiv 1908.06112. Mostly a part of others: see :func:`symmetric_cross_entropy_loss` and
    :func:`active_passive_loss`.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        return_stats: also return a :class:`dal_kernels.RowStats`.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(
        objectives.symmetric_cross_entropy,
        (0.0, objectives.REVERSE_SCALE),
        input,
        target,
        return_stats=return_stats,
        **options,
    )


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


@overload
def symmetric_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor = ...,
    beta: float | Tensor = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def symmetric_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor = ...,
    beta: float | Tensor = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> LossAndStats: ...
@overload
def symmetric_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor = ...,
    beta: float | Tensor = ...,
    *,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats: ...
def symmetric_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.1,
    beta: float | Tensor = 1.0,
    *,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats:
    r"""Symmetric cross-entropy (SCE): cross-entropy and reverse cross-entropy.

    .. math:: -\alpha \ln p_y + \beta A (1 - p_y), \quad A = -\ln 10^{-4}

    Source: arXiv 1908.06112, which takes 0.1 and 1 for CIFAR-10 and 6 and 0.1 for CIFAR-100. Take it where GCE
    underfits.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        alpha, beta: >= 0; a number, a 0-d tensor or one value a row.
        return_stats: also return a :class:`dal_kernels.RowStats`.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(
        objectives.symmetric_cross_entropy,
        (alpha, beta * objectives.REVERSE_SCALE),
        input,
        target,
        return_stats=return_stats,
        **options,
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
