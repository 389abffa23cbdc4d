"""More losses of the probability of the target class alone: divergences, and cross-entropy made gentler."""

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


def jensen_shannon_loss(
    input: Tensor,
    target: Tensor,
    pi: float | Tensor = 0.5,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Jensen-Shannon divergence of label and prediction: cross-entropy for pi -> 0, mean absolute error for pi -> 1.

    .. math::
        \frac{\pi \, KL(e_y \| m) + (1 - \pi) KL(p \| m)}{-(1 - \pi) \ln(1 - \pi)}, \quad m = \pi e_y + (1 - \pi)
        p

    Source: arXiv 2105.04522. A bounded loss with one knob that means the same for any number of classes.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        pi: weight of the label, between 0 and 1; a number, a 0-d tensor or one value a row.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.jensen_shannon, (pi,), input, target, **options)


class JensenShannonLoss(RobustLoss):
    """:func:`jensen_shannon_loss` as a module.

    Args:
        pi: numbers, as in the function.
        schedule: a :class:`dal_kernels.Ramp` of it, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        pi: float = 0.5,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({"pi": pi}, schedule=schedule, **options)

    def bind(self, pi: Any) -> Bound:
        return objectives.jensen_shannon, (pi,)


def fisher_rao_loss(
    input: Tensor,
    target: Tensor,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Squared Fisher-Rao distance between label and prediction, divided by 4.

    .. math:: \arccos(\sqrt{p_y})^2

    Source: arXiv 2210.16401. Between cross-entropy and MAE without a knob: fits fast and stays bounded.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.fisher_rao, (), input, target, **options)


class FisherRaoLoss(RobustLoss):
    """:func:`fisher_rao_loss` as a module.

    Args:
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({}, **options)

    def bind(self) -> Bound:
        return objectives.fisher_rao, ()


def partially_huberised_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    tau: float | Tensor = 10.0,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Partially Huberised cross-entropy (PHuber-CE): cross-entropy whose gradient is clipped.

    .. math:: -\ln p_y \text{ if } p_y > 1 / \tau, \text{ else } -\tau p_y + \ln \tau + 1

    Source: "Can gradient clipping mitigate label noise?", ICLR 2020. The mildest change of cross-entropy here.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        tau: >= 1; a number, a 0-d tensor or one value a row.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.partially_huberised_cross_entropy, (tau,), input, target, **options)


class PartiallyHuberisedCrossEntropyLoss(RobustLoss):
    """:func:`partially_huberised_cross_entropy_loss` as a module.

    Args:
        tau: numbers, as in the function.
        schedule: a :class:`dal_kernels.Ramp` of it, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        tau: float = 10.0,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({"tau": tau}, schedule=schedule, **options)

    def bind(self, tau: Any) -> Bound:
        return objectives.partially_huberised_cross_entropy, (tau,)


def epsilon_softmax_loss(
    input: Tensor,
    target: Tensor,
    m: float | Tensor = 1e4,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Cross-entropy of a softmax that is pushed towards one-hot, and mean absolute error.

    .. math:: -\alpha \ln \frac{p_y + m [y = k]}{1 + m} + \beta (1 - p_y), \quad k = \arg\max p

    Source: "epsilon-Softmax: Approximating One-Hot Vectors for Mitigating Label Noise", NeurIPS 2024. Its CE +
    MAE form has beta > 0.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        m: how far it is pushed, >= 0; a number, a 0-d tensor or one value a row.
        alpha, beta: >= 0; a number, a 0-d tensor or one value a row.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    return varied_loss(objectives.epsilon_softmax, (m, alpha, beta), input, target, **options)


class EpsilonSoftmaxLoss(RobustLoss):
    """:func:`epsilon_softmax_loss` as a module.

    Args:
        m, alpha, beta: numbers, as in the function.
        schedule: a :class:`dal_kernels.Ramp` of some of them, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        m: float = 1e4,
        alpha: float = 1.0,
        beta: float = 0.0,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__({"m": m, "alpha": alpha, "beta": beta}, schedule=schedule, **options)

    def bind(self, m: Any, alpha: Any, beta: Any) -> Bound:
        return objectives.epsilon_softmax, (m, alpha, beta)
