"""The loss with its classes split over the devices of a torch.distributed group.

Each rank holds the logits (or the rows of the classifier) of a slice of the classes, the slices in the order of the
ranks. Forward: one all-gather of 4 floats a row (5 with ``return_stats``) and 4 or 5 more that say which slice it is.
Backward: no communication; of the linear form one all-reduce of the input's gradient. Every rank merges the same
statistics in the same order: the loss has the same bits everywhere.

Works on whatever backend the group has: gloo on a CPU, NCCL on GPUs. torch.compile breaks its graph here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from dal_kernels.arguments import BOOTSTRAPS, Backend, Bootstrap, OptionsOfKernels, RowStats
from dal_kernels.collectives import Group
from dal_kernels.fields import Reduction
from dal_kernels.forms import Loss, plain_form
from dal_kernels.objectives import dynamics_aware_of
from dal_kernels.sliced import (
    breaks_graph,
    class_parallel_linear_loss_of,
    class_parallel_loss_of,
    class_parallel_row_statistics,
)
from dal_kernels.tensors import check_choice

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "class_parallel_dynamics_aware_loss",
    "class_parallel_linear_dynamics_aware_loss",
    "class_parallel_linear_loss",
    "class_parallel_loss",
    "class_parallel_row_statistics",
]


class OptionsOfSlices(OptionsOfKernels, total=False):
    """And what those take that are given a slice of the classes."""

    class_offset: int | None
    num_classes: int | None
    group: Group


@overload
def class_parallel_dynamics_aware_loss(
    local_logits: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[OptionsOfSlices],
) -> Tensor: ...
@overload
def class_parallel_dynamics_aware_loss(
    local_logits: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[OptionsOfSlices],
) -> tuple[Tensor, RowStats]: ...
@overload
def class_parallel_dynamics_aware_loss(
    local_logits: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    return_stats: bool,
    **options: Unpack[OptionsOfSlices],
) -> Tensor | tuple[Tensor, RowStats]: ...
@breaks_graph
def class_parallel_dynamics_aware_loss(
    local_logits: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = 0.0,
    *,
    class_offset: int | None = None,
    num_classes: int | None = None,
    group: Group = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    bootstrap: Bootstrap = "soft",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, RowStats]:
    """``dynamics_aware_loss`` of logits whose classes are split over the ranks of a group.

    Args:
        local_logits: this rank's slice, shape (C_r,), (N, C_r) or (N, C_r, d1, ..., dk); C_r may be 0 and differ from
            rank to rank, everything else may not. The first slice is that of rank 0, and so on.
        target: the labels of all rows, as classes of [0, num_classes), the same on every rank.
        class_offset, num_classes: the first class of this slice, and the number of all classes. Without them a second,
            small all-gather finds them and checks that the ranks agree, on a GPU at the cost of a synchronisation.
        group: the group, or None for the default one.
        q, bootstrap_weight, weight, ignore_index, reduction, bootstrap, return_stats, sample_weight, backend: as in
            :func:`dal_kernels.dynamics_aware_loss`, the same on every rank; ``weight`` is (num_classes,).

    Returns:
        What :func:`dal_kernels.dynamics_aware_loss` of the whole logits gives, as plain tensors with the same bits on
        every rank. The gradient of ``local_logits`` is that of the whole loss; each rank calls backward by itself.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dal_kernels.dynamics_aware_loss`; ValueError also where there is
            no such group, where only one of class_offset and num_classes is given, and where the slices do not follow
            each other or the ranks have other labels. A label that is no class is raised for on every rank, even where
            one alone has it. With class_offset given, other devices than a CPU do not look: then the loss is NaN; and
            other numbers of rows fail in torch.distributed. RuntimeError also where a rank has ended, or does not
            answer within the timeout of the group.
    """
    check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    loss: Tensor | tuple[Tensor, RowStats] = class_parallel_loss_of(
        dynamics_aware_of(bootstrap).id, (q, bootstrap_weight), local_logits, target, class_offset=class_offset,
        num_classes=num_classes, group=group, weight=weight, ignore_index=ignore_index, reduction=reduction,
        return_stats=return_stats, sample_weight=sample_weight, backend=backend,
    )  # fmt: skip
    return loss


@overload
def class_parallel_linear_dynamics_aware_loss(
    input: Tensor,
    local_classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    bias: Tensor | None = ...,
    chunk_bytes: int | None = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[OptionsOfSlices],
) -> Tensor: ...
@overload
def class_parallel_linear_dynamics_aware_loss(
    input: Tensor,
    local_classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    bias: Tensor | None = ...,
    chunk_bytes: int | None = ...,
    return_stats: Literal[True],
    **options: Unpack[OptionsOfSlices],
) -> tuple[Tensor, RowStats]: ...
@overload
def class_parallel_linear_dynamics_aware_loss(
    input: Tensor,
    local_classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    bias: Tensor | None = ...,
    chunk_bytes: int | None = ...,
    return_stats: bool,
    **options: Unpack[OptionsOfSlices],
) -> Tensor | tuple[Tensor, RowStats]: ...
@breaks_graph
def class_parallel_linear_dynamics_aware_loss(
    input: Tensor,
    local_classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = 0.0,
    *,
    bias: Tensor | None = None,
    class_offset: int | None = None,
    num_classes: int | None = None,
    group: Group = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    bootstrap: Bootstrap = "soft",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """``linear_dynamics_aware_loss`` with the rows of the classifier split over the ranks of a group.

    The logits of a chunk are made twice, in the forward for their statistics and in the backward for their gradient.

    Args:
        input: features as in :func:`dal_kernels.linear_dynamics_aware_loss`, the same on every rank. Its gradient is
            the sum over the ranks, by the one all-reduce of the backward.
        local_classifier_weight, bias: this rank's slice (C_r, D) and (C_r,) or None; C_r may be 0.
        chunk_bytes: as in :func:`dal_kernels.linear_dynamics_aware_loss`.
        target, class_offset, ...: as in :func:`class_parallel_dynamics_aware_loss`.

    Returns, Raises:
        As :func:`class_parallel_dynamics_aware_loss`. That ``input`` requires grad must be so on all ranks or on none.
    """
    check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    loss: Tensor | tuple[Tensor, RowStats] = class_parallel_linear_loss_of(
        dynamics_aware_of(bootstrap).id, (q, bootstrap_weight), input, local_classifier_weight, target, bias=bias,
        class_offset=class_offset, num_classes=num_classes, group=group, weight=weight, ignore_index=ignore_index,
        reduction=reduction, return_stats=return_stats, sample_weight=sample_weight, backend=backend,
        chunk_bytes=chunk_bytes,
    )  # fmt: skip
    return loss


@breaks_graph
def class_parallel_loss(
    loss: Loss,
    local_logits: Tensor,
    target: Tensor,
    *,
    class_offset: int | None = None,
    num_classes: int | None = None,
    group: Group = None,
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """Any loss of the family of logits whose classes are split over the ranks of a group.

    Args:
        loss: a module of the family, equal on every rank; class weights are (num_classes,).
        local_logits, target, class_offset, num_classes, group, return_stats, sample_weight: as in
            :func:`class_parallel_dynamics_aware_loss`.

    Returns, Raises:
        As :func:`class_parallel_dynamics_aware_loss`; TypeError also where ``loss`` is no module of the family.
    """
    objective, knobs, options = plain_form(loss, local_logits, num_classes)
    learns = loss.learns(local_logits)
    result: Tensor | tuple[Tensor, RowStats] = class_parallel_loss_of(
        objective, knobs, local_logits, target, class_offset=class_offset, num_classes=num_classes, group=group,
        return_stats=return_stats or learns, sample_weight=sample_weight, **options,
    )  # fmt: skip
    return loss.told(result, target, return_stats, num_classes) if learns else result


@breaks_graph
def class_parallel_linear_loss(
    loss: Loss,
    input: Tensor,
    local_linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    class_offset: int | None = None,
    num_classes: int | None = None,
    group: Group = None,
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`dal_kernels.linear_loss` with the rows of the classifier split over the ranks of a group.

    Args:
        loss, target, class_offset, ...: as in :func:`class_parallel_loss`.
        input, local_linear_weight, linear_bias, chunk_bytes: as input, local_classifier_weight, bias and chunk_bytes in
            :func:`class_parallel_linear_dynamics_aware_loss`.

    Returns, Raises:
        As :func:`class_parallel_loss`.
    """
    objective, knobs, options = plain_form(loss, input, num_classes)
    learns = loss.learns(input, local_linear_weight, linear_bias)
    result: Tensor | tuple[Tensor, RowStats] = class_parallel_linear_loss_of(
        objective, knobs, input, local_linear_weight, target, bias=linear_bias, class_offset=class_offset,
        num_classes=num_classes, group=group, return_stats=return_stats or learns, sample_weight=sample_weight,
        chunk_bytes=chunk_bytes, **options,
    )  # fmt: skip
    return loss.told(result, target, return_stats, num_classes) if learns else result
