"""A form takes a loss: any loss of the family behind a classifier layer, without the logits of a batch in memory."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dal_kernels.arguments import RowStats
from dal_kernels.fields import Reduction
from dal_kernels.knobs import KnobValue
from dal_kernels.layer import check_budget
from dal_kernels.linear import linear_loss_of
from dal_kernels.plain_layer import plain_layer

__all__ = ["LinearLoss", "linear_loss"]


class Loss(Protocol):
    """What a form asks of a loss: :class:`dal_kernels.DynamicsAwareLoss` and all modules of the family have it."""

    def for_form(self, input: Tensor) -> tuple[int, tuple[KnobValue, ...] | Tensor, dict[str, Any]]: ...
    def learns(self, *tensors: Tensor | None) -> bool: ...
    def told(self, result: Any, target: Tensor, return_stats: bool, classes: int | None) -> Any: ...


def check_loss(loss: Loss) -> None:
    """Raise TypeError for what is no loss of the family."""
    if not hasattr(loss, "for_form"):
        raise TypeError(f"loss must be a module of dal_kernels, as DynamicsAwareLoss(...), got {type(loss).__name__}")


def linear_loss(
    loss: Loss,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    reduction: Reduction | None = None,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """``loss(F.linear(input, linear_weight, linear_bias), target)`` without its logits in memory.

    Args:
        loss: a module of the family: its knobs where they are, its class weights, ignore_index, reduction and backend.
            label_smoothing is there for :class:`dal_kernels.CrossEntropyLoss`; target_shift and scale are not.
        input, linear_weight, linear_bias, chunk_bytes: as input, classifier_weight, bias and chunk_bytes in
            :func:`dal_kernels.linear_dynamics_aware_loss`.
        target, return_stats, sample_weight: as in :func:`dal_kernels.dynamics_aware_loss`.
        reduction: in the place of the loss's own.

    Returns, Raises:
        As :func:`dal_kernels.linear_dynamics_aware_loss`; TypeError also where ``loss`` is no module of the family.
    """
    check_loss(loss)
    objective, knobs, options = loss.for_form(input)
    if reduction is not None:
        options["reduction"] = reduction
    learns = loss.learns(input, linear_weight, linear_bias)
    result: Tensor | tuple[Tensor, RowStats] = linear_loss_of(
        objective, knobs, input, linear_weight, target, bias=linear_bias, return_stats=return_stats or learns,
        sample_weight=sample_weight, chunk_bytes=chunk_bytes, **options,
    )  # fmt: skip
    return loss.told(result, target, return_stats, linear_weight.shape[0]) if learns else result


class LinearLoss(nn.Module):
    """A loss of the family and the classifier before it as one module.

    >>> from dal_kernels import LinearLoss, SymmetricCrossEntropyLoss
    >>> criterion = LinearLoss(SymmetricCrossEntropyLoss(), in_features=16, num_classes=1000)

    Args:
        loss: a module of the family.
        in_features, num_classes: D and C of the classifier.
        bias: whether it has one.
        classifier: an :class:`torch.nn.Linear` to take in the place of a new one; an embedding's weight may be tied to
            it. See :class:`dal_kernels.LinearDynamicsAwareLoss` for what it may be.
        chunk_bytes: as in :func:`dal_kernels.linear_dynamics_aware_loss`.
        device, dtype: of a new classifier's parameters.

    Attributes:
        loss, classifier: as given or made. For evaluation, ``classifier(features)`` gives logits.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        loss: Any,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        classifier: nn.Linear | None = None,
        chunk_bytes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_loss(loss)
        check_budget(chunk_bytes)
        if classifier is None:
            classifier = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        elif (classifier.in_features, classifier.out_features) != (in_features, num_classes):
            raise ValueError(
                f"classifier must have in_features {in_features} and out_features {num_classes}, "
                f"got {classifier.in_features} and {classifier.out_features}"
            )
        self.loss: Any = loss
        self.classifier = classifier
        self.chunk_bytes = chunk_bytes

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        return_stats: bool = False,
        sample_weight: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of ``input`` (features, D in the place of C) against ``target``; as :func:`linear_loss`."""
        features, weight, bias = plain_layer(self.classifier, input)
        return linear_loss(
            self.loss, features, weight, target, linear_bias=bias, return_stats=return_stats,
            sample_weight=sample_weight, reduction=reduction, chunk_bytes=self.chunk_bytes,
        )  # fmt: skip

    def step(self, t: float | None = None) -> None:
        """Advance the loss's schedule by one, or to position ``t``."""
        self.loss.step(t)
