"""Losses with a margin: the target's logit is lowered before the softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from dal_kernels import objectives
from dal_kernels.losses.base import Bound, RobustLoss
from dal_kernels.variations import varied_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dal_kernels.losses.options import LossAndStats, MarginOptions, PlainOptions


@overload
def label_distribution_aware_margin_loss(
    input: Tensor,
    target: Tensor,
    class_counts: Tensor | Sequence[float],
    max_margin: float = ...,
    scale: float | Tensor = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[MarginOptions],
) -> Tensor: ...
@overload
def label_distribution_aware_margin_loss(
    input: Tensor,
    target: Tensor,
    class_counts: Tensor | Sequence[float],
    max_margin: float = ...,
    scale: float | Tensor = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[MarginOptions],
) -> LossAndStats: ...
@overload
def label_distribution_aware_margin_loss(
    input: Tensor,
    target: Tensor,
    class_counts: Tensor | Sequence[float],
    max_margin: float = ...,
    scale: float | Tensor = ...,
    *,
    return_stats: bool,
    **options: Unpack[MarginOptions],
) -> Tensor | LossAndStats: ...
def label_distribution_aware_margin_loss(
    input: Tensor,
    target: Tensor,
    class_counts: Tensor | Sequence[float],
    max_margin: float = 0.5,
    scale: float | Tensor = 30.0,
    *,
    return_stats: bool = False,
    **options: Unpack[MarginOptions],
) -> Tensor | LossAndStats:
    r"""Label-distribution-aware margin loss (LDAM): cross-entropy with larger margins for rarer classes.

    .. math:: CE(s (z - m_y e_y)), \quad m_j = m_{max} (n_j / n_{min})^{-1/4}

    Source: arXiv 1906.07413, which takes 0.5 and 30 with cosine logits. For classes of very different size.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        class_counts: n, how many samples each of the C classes has; a tensor or a list, each > 0.
        max_margin: margin of the rarest class, >= 0.
        scale: s > 0, a number or a 0-d tensor.
        return_stats: also return a :class:`dal_kernels.RowStats`.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    shift = -margins_of(class_counts, max_margin).to(input.device)
    return varied_loss(
        objectives.symmetric_cross_entropy,
        (1.0, 0.0),
        input,
        target,
        target_shift=shift,
        scale=scale,
        return_stats=return_stats,
        **options,
    )


def margins_of(class_counts: Tensor | Sequence[float], max_margin: float) -> Tensor:
    """(C,) float32: the margin of each class.

    Raises:
        ValueError: a count or ``max_margin`` is not a number that it can be.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float32)
    if counts.dim() != 1 or len(counts) == 0 or not bool((counts > 0).all() & counts.isfinite().all()):
        raise ValueError(f"class_counts must be one finite number > 0 a class, got {class_counts!r:.80}")
    if not 0 <= max_margin < float("inf"):
        raise ValueError(f"max_margin must be finite and >= 0, got {max_margin!r}")
    return max_margin * (counts / counts.min()) ** -0.25


class LabelDistributionAwareMarginLoss(RobustLoss):
    """:func:`label_distribution_aware_margin_loss` as a module.

    Args:
        class_counts, max_margin, scale: as in the function; a scale that is a parameter is learnt.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`; target_shift is the loss's own.
    """

    def __init__(
        self,
        class_counts: Tensor | Sequence[float],
        max_margin: float = 0.5,
        scale: float | Tensor = 30.0,
        **options: Unpack[PlainOptions],
    ) -> None:
        super().__init__({}, target_shift=-margins_of(class_counts, max_margin), scale=scale, **options)

    def bind(self) -> Bound:
        return objectives.symmetric_cross_entropy, (1.0, 0.0)
