"""Active-passive losses: one that pushes the label up, one that pushes the rest down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from torch import Tensor

from dal_kernels import objectives
from dal_kernels.losses.base import Bound, RobustLoss
from dal_kernels.tensors import check_choice
from dal_kernels.variations import varied_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dal_kernels.losses.options import LossAndStats, LossOptions, ModuleOptions
    from dal_kernels.losses.ramp import Schedule


Active = Literal["nce"]
Passive = Literal["rce", "mae", "agce"]


@overload
def active_passive_loss(
    input: Tensor,
    target: Tensor,
    active: Active = ...,
    passive: Passive = ...,
    alpha: float | Tensor = ...,
    beta: float | Tensor = ...,
    a: float | Tensor = ...,
    q: float | Tensor = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def active_passive_loss(
    input: Tensor,
    target: Tensor,
    active: Active = ...,
    passive: Passive = ...,
    alpha: float | Tensor = ...,
    beta: float | Tensor = ...,
    a: float | Tensor = ...,
    q: float | Tensor = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> LossAndStats: ...
@overload
def active_passive_loss(
    input: Tensor,
    target: Tensor,
    active: Active = ...,
    passive: Passive = ...,
    alpha: float | Tensor = ...,
    beta: float | Tensor = ...,
    a: float | Tensor = ...,
    q: float | Tensor = ...,
    *,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats: ...
def active_passive_loss(
    input: Tensor,
    target: Tensor,
    active: Active = "nce",
    passive: Passive = "rce",
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    a: float | Tensor = 6.0,
    q: float | Tensor = 1.5,
    *,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | LossAndStats:
    r"""Active-passive loss (APL): normalised cross-entropy and a passive loss.

    .. math:: \alpha \frac{\ln p_y}{\sum_k \ln p_k} + \beta \, L_{passive}

    Source: arXiv 2006.13554, which takes alpha = beta = 1 for CIFAR-10 and 10 and 0.1 for CIFAR-100; with "agce" arXiv
    2106.03110, which takes alpha = 1, beta = 4, a = 6, q = 1.5 for CIFAR-10 and 10, 0.1, 1.8, 3 for CIFAR-100.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        target: class indices shaped like ``input`` without its class dimension, or, summed over, probabilities shaped
            like ``input``.
        active: "nce".
        passive: "rce" (:func:`reverse_cross_entropy_loss`), "mae" (:func:`mean_absolute_error_loss`) or "agce"
            (:func:`asymmetric_generalized_cross_entropy_loss`).
        alpha, beta: >= 0; a number, a 0-d tensor or one value a row.
        a, q: of "agce" alone; > 0.
        return_stats: also return a :class:`dal_kernels.RowStats`.
        options: see :class:`dal_kernels.losses.options.LossOptions`.

    Returns, Raises:
        As :func:`dal_kernels.dynamics_aware_loss`.
    """
    objective, knobs = _bound(active, passive, alpha, beta, a, q)
    return varied_loss(objective, knobs, input, target, return_stats=return_stats, **options)


def _bound(active: str, passive: str, alpha: Any, beta: Any, a: Any, q: Any) -> Bound:
    if active != "nce":
        raise ValueError(f"active must be 'nce', got {active!r}")
    check_choice("passive", passive, get_args(Passive))
    if passive == "agce":
        return objectives.normalized_and_asymmetric, (alpha, beta, a, q)
    scaled = beta * objectives.REVERSE_SCALE if passive == "rce" else beta
    return objectives.normalized_and_absolute, (alpha, scaled)


class ActivePassiveLoss(RobustLoss):
    """:func:`active_passive_loss` as a module.

    Args:
        active, passive, alpha, beta, a, q: as in the function; numbers.
        schedule: a :class:`dal_kernels.Ramp` of some of the numbers, or None.
        options: see :class:`dal_kernels.losses.options.ModuleOptions`.
    """

    def __init__(
        self,
        active: Active = "nce",
        passive: Passive = "rce",
        alpha: float = 1.0,
        beta: float = 1.0,
        a: float = 6.0,
        q: float = 1.5,
        *,
        schedule: Schedule | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        self.active, self.passive = active, passive
        numbers = {"alpha": alpha, "beta": beta} | ({"a": a, "q": q} if passive == "agce" else {})
        super().__init__(numbers, schedule=schedule, **options)

    def bind(self, alpha: Any, beta: Any, a: Any = 6.0, q: Any = 1.5) -> Bound:
        return _bound(self.active, self.passive, alpha, beta, a, q)

    def extra_repr(self) -> str:
        return f"active={self.active!r}, passive={self.passive!r}, {super().extra_repr()}"
