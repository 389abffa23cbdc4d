"""From cross-entropy to mean absolute error by one knob: they cost what cross-entropy costs."""

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
def generalized_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def generalized_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> LossAndStats: ...
@overload
def generalized_cross_entropy_loss(
    input: Tensor, target: Tensor, q: float | Tensor = ..., *, return_stats: bool, **options: Unpack[LossOptions]
) -> Tensor | LossAndStats: ...
def generalized_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor = 0.7,
    *,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats:
    """Generalised cross-entropy (GCE): cross-entropy for q -> 0, mean absolute error for q = 1.

    .. math:: (1 - p_y^q) / q

    Source: arXiv 1805.07836, with 0.7 throughout. The first loss to try: one knob, fits almost as fast as cross-
    entropy.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        q: exponent >= 0; a number, a 0-d tensor or one value a row.
        return_stats: also return a :class:`dal_kernels.RowStats`.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.generalized_cross_entropy, (q,), input, target, return_stats=return_stats, **options)


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


@overload
def taylor_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    order: float | Tensor = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def taylor_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    order: float | Tensor = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> LossAndStats: ...
@overload
def taylor_cross_entropy_loss(
    input: Tensor, target: Tensor, order: float | Tensor = ..., *, return_stats: bool, **options: Unpack[LossOptions]
) -> Tensor | LossAndStats: ...
def taylor_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    order: float | Tensor = 2,
    *,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats:
    r"""Taylor cross-entropy: the series of cross-entropy, cut off.

    .. math:: \sum_{i=1}^{t} (1 - p_y)^i / i

    Source: "Can Cross Entropy Loss Be Robust to Label Noise?", IJCAI 2020. Order 1 is mean absolute error, a
    large one cross-entropy.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        order: t, a whole number from 1 to 16.
        return_stats: also return a :class:`dal_kernels.RowStats`.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.taylor_cross_entropy, (order,), input, target, return_stats=return_stats, **options)


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
