"""The loss and the classifier layer before it as one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn

from dal_kernels.arguments import Backend, Bootstrap, RowStats, check_class_weight
from dal_kernels.fields import Reduction
from dal_kernels.forms import linear_form
from dal_kernels.layer import check_budget
from dal_kernels.loss import DynamicsAwareLoss
from dal_kernels.losses.options import PlainOptions
from dal_kernels.mixtures import Mix
from dal_kernels.plain_layer import in_place_of
from dal_kernels.schedule import DynamicsAwareSchedule
from dal_kernels.self_paced import Pace, schedule_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LinearDynamicsAwareLoss"]


class LayerOptions(PlainOptions, total=False):
    """What the module takes beside its schedule, for its overloads."""

    bias: bool
    bootstrap: Bootstrap
    chunk_bytes: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    watch: bool


class LinearDynamicsAwareLoss(DynamicsAwareLoss):
    """The last layer of a classifier and :class:`DynamicsAwareLoss` in one, without the logits of a batch in memory.

    ``forward`` takes features where the loss takes logits. For evaluation, ``classifier(features)`` gives logits.

    Args:
        in_features, num_classes: D and C of the classifier.
        q_start, q_end, total_steps, pace, schedule, watch: as of :class:`DynamicsAwareLoss`.
        bias: whether the classifier has one.
        weight, ignore_index, reduction, bootstrap, backend: as in :func:`dal_kernels.dynamics_aware_loss`.
        chunk_bytes: as in :func:`dal_kernels.linear_dynamics_aware_loss`.
        device, dtype: of the classifier's parameters.

    Attributes:
        classifier: the :class:`torch.nn.Linear` that is trained. The loss reads its weight and its bias and never calls
            its ``forward``. Parametrizations are honoured, and forward pre-hooks are run, as pruning, spectral_norm and
            weight_norm put them there. A module with a forward of its own (an adapter, an nn.Sequential, a quantised
            layer), forward hooks and backward hooks are refused at the call. Global hooks, PyTorch's for debugging
            and profiling, do not see it.
        schedule, q, bootstrap_weight: as of :class:`DynamicsAwareLoss`.

    Raises:
        TypeError, ValueError: as :class:`DynamicsAwareLoss`, and where ``weight`` has not ``num_classes`` values or
            chunk_bytes is not a positive int; at the call, where ``classifier`` is one that the loss cannot look into.
    """

    @overload
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        q_start: float = ...,
        q_end: float = ...,
        *,
        total_steps: float,
        pace: Pace = ...,
        **options: Unpack[LayerOptions],
    ) -> None: ...
    @overload
    def __init__(
        self, in_features: int, num_classes: int, *, schedule: DynamicsAwareSchedule, **options: Unpack[LayerOptions]
    ) -> None: ...
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        q_start: float | None = None,
        q_end: float | None = None,
        *,
        total_steps: float | None = None,
        pace: Pace | None = None,
        schedule: DynamicsAwareSchedule | None = None,
        bias: bool = True,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        bootstrap: Bootstrap = "soft",
        backend: Backend = "auto",
        chunk_bytes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        watch: bool = True,
    ) -> None:
        super().__init__(
            schedule=schedule_of(schedule, q_start, q_end, total_steps, pace),
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            bootstrap=bootstrap,
            backend=backend,
            watch=watch,
        )
        if weight is not None:
            check_class_weight(weight, num_classes)
        check_budget(chunk_bytes)
        self.classifier = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.chunk_bytes = chunk_bytes

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        return_stats: bool = False,
        sample_weight: Tensor | None = None,
        reduction: Reduction | None = None,
        mix: Mix | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of ``input`` (features, D in the place of C) against ``target`` at the schedule's position.

        :class:`dal_kernels.LinearLoss` takes features with D last, as a model gives them, and has more options.

        The other arguments are those of :meth:`DynamicsAwareLoss.forward`.
        """

        def loss_of(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | tuple[Tensor, RowStats]:
            return linear_form(
                self, features, weight, target, bias, return_stats, reduction, classes_last=False,
                sample_weight=sample_weight, mix=mix, chunk_bytes=self.chunk_bytes,
            )  # fmt: skip

        return in_place_of(self.classifier, input, loss_of, classes_last=False)
