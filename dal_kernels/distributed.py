"""The loss with its classes split over the devices of a torch.distributed group.

Each rank holds the logits (or the rows of the classifier) of a slice of the classes, the slices in the order of the
ranks. Forward: one all-gather of 4 floats a row (5 with ``return_stats``) and 4 or 5 more that say which slice it is.
Backward: no communication; of the linear form one all-reduce of the input's gradient. Every rank merges the same
statistics in the same order: the loss has the same bits everywhere.

Works on whatever backend the group has: gloo on a CPU, NCCL on GPUs. torch.compile breaks its graph here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor

from dal_kernels.arguments import (
    BOOTSTRAPS,
    Backend,
    Bootstrap,
    Call,
    OptionsOfKernels,
    RowStats,
    check,
    raise_for_labels,
)
from dal_kernels.backends.choose import choose
from dal_kernels.exchange import Group, Slice, exchange, slice_of
from dal_kernels.fields import Reduction
from dal_kernels.knobs import KnobValue
from dal_kernels.layer import Layer, layer_of
from dal_kernels.linear import anchors_of
from dal_kernels.linear_ops import LayerInChunks, finished, linear_gradient
from dal_kernels.objectives import OBJECTIVES, dynamics_aware_of
from dal_kernels.once import DifferentiableOnce
from dal_kernels.reference import run_weighted
from dal_kernels.slices import IGNORED, Statistics, fields_of, finish, gradient, statistics
from dal_kernels.tensors import check_choice, refuse_dtensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["class_parallel_dynamics_aware_loss", "class_parallel_linear_dynamics_aware_loss"]

# torch.compile gives it as the reason of an error where fullgraph=True.
_NO_GRAPH = "a loss whose classes are split over ranks breaks the graph: compile without fullgraph=True"


class OptionsOfSlices(OptionsOfKernels, total=False):
    """And what those take that are given a slice of the classes."""

    class_offset: int | None
    num_classes: int | None
    group: Group


_F = TypeVar("_F", bound=Callable[..., Any])


def _breaks_graph(function: _F) -> _F:
    """:func:`torch.compiler.disable`, which would forget the types."""
    return cast(_F, torch.compiler.disable(function, reason=_NO_GRAPH))


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
@_breaks_graph
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
            each other or the ranks have other labels. With class_offset given, other devices than a CPU do not look:
            then the loss is NaN; and other numbers of rows fail in torch.distributed.
    """
    check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    loss: Tensor | tuple[Tensor, RowStats] = class_parallel_loss_of(
        dynamics_aware_of(bootstrap).id, (q, bootstrap_weight), local_logits, target, class_offset=class_offset,
        num_classes=num_classes, group=group, weight=weight, ignore_index=ignore_index, reduction=reduction,
        return_stats=return_stats, sample_weight=sample_weight, backend=backend,
    )  # fmt: skip
    return loss


@_breaks_graph
def class_parallel_loss_of(
    objective: int,
    knobs: tuple[KnobValue, ...] | Tensor,
    local_logits: Tensor,
    target: Tensor,
    *,
    class_offset: int | None = None,
    num_classes: int | None = None,
    group: Group = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
) -> Any:
    """A loss of the table with its classes split over ranks."""
    if not isinstance(local_logits, Tensor):
        raise TypeError(f"local_logits must be a tensor, got {type(local_logits).__name__}")
    refuse_dtensor("local_logits", local_logits, ": dal_kernels.dynamics_aware_loss takes it; or pass its to_local()")
    if local_logits.dim() == 0:
        raise ValueError("local_logits must have shape (C,), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    place = int(local_logits.dim() > 1)
    own = slice_of(local_logits.shape[place], target, local_logits.device, class_offset, num_classes, group)
    shape = (*local_logits.shape[:place], own.classes, *local_logits.shape[place + 1 :])
    whole = local_logits.new_empty(()).expand(shape)
    call = check(
        whole, target, OBJECTIVES[objective], knobs, weight, ignore_index, reduction, return_stats, sample_weight
    )
    raise_for_labels(call)
    name = choose(backend, local_logits)
    logits = local_logits.movedim(1, -1).flatten(0, -2) if place else local_logits.unsqueeze(0)
    wanted = torch.is_grad_enabled() and local_logits.requires_grad

    def run(call: Call) -> tuple[Tensor, RowStats | None]:
        with torch.no_grad():
            target_logit = _target_logit(logits, call.target, own)
            loss, stats, kept = _finish(
                call, statistics(logits, name, call.objective.is_wide), target_logit, own, name, wanted
            )
        return loss if kept is None else _SliceLoss.apply(logits, loss, *kept, name), stats

    return call.shaped(*run_weighted(run, call))


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
@_breaks_graph
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


@_breaks_graph
def class_parallel_linear_loss_of(
    objective: int,
    knobs: tuple[KnobValue, ...] | Tensor,
    input: Tensor,
    local_classifier_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_offset: int | None = None,
    num_classes: int | None = None,
    group: Group = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
    chunk_bytes: int | None = None,
) -> Any:
    """A loss of the table behind a classifier whose rows are split over ranks."""
    layer, local = layer_of(input, local_classifier_weight, bias, chunk_bytes, least_classes=0)
    place = int(input.dim() > 1)
    own = slice_of(local.shape[place], target, input.device, class_offset, num_classes, group)
    whole = local.new_empty(()).expand((*local.shape[:place], own.classes, *local.shape[place + 1 :]))
    call = check(
        whole, target, OBJECTIVES[objective], knobs, weight, ignore_index, reduction, return_stats, sample_weight
    )
    raise_for_labels(call)
    name = choose(backend, input)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in layer[:3]]

    def run(call: Call) -> tuple[Tensor, RowStats | None]:
        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            found, target_logits = [], []
            in_chunks = LayerInChunks(*layer[:3], layer.dtype, layer.chunk, [False] * 3)
            for of, _, logits in in_chunks.chunks():
                found.append(statistics(logits, name, call.objective.is_wide))
                target_logits.append(_target_logit(logits, call.target[of], own))
            if not found:
                empty = local[:0].reshape(0, own.size)
                found, target_logits = [statistics(empty, name, call.objective.is_wide)], [local.new_empty(0)]
            of_rows = _joined(found)
            loss, stats, kept = _finish(call, of_rows, torch.cat(target_logits), own, name, any(wanted))
        if kept is not None:
            loss = _SliceLinearLoss.apply(
                *layer[:3], loss, *kept, layer, name, wanted, group, anchors_of(layer[:3], wanted)
            )
        return loss, stats

    return call.shaped(*run_weighted(run, call))


def _target_logit(logits: Tensor, target: Tensor, own: Slice) -> Tensor:
    """z_y of the rows whose label lies in this slice; anything for the others."""
    if own.size == 0:
        return logits.new_zeros(len(target))
    local = (target - own.offset).clamp(0, own.size - 1)
    return logits.gather(1, local.unsqueeze(1)).squeeze(1)


def _finish(
    call: Call, local: Statistics, target_logit: Tensor, own: Slice, backend: str, wanted: bool
) -> tuple[Tensor, RowStats | None, tuple[Tensor, ...] | None]:
    """Reduced loss and statistics, and with ``wanted`` (target, fields, prediction) for the gradient of the slice."""
    whole, target_logit = exchange(call, local, target_logit, own)
    done = finish(call, whole, target_logit, wanted)
    if done.coefficients is None:
        return done.loss, done.stats, None
    fields = fields_of(whole.peak, done.coefficients, done.loss.dtype, call.objective.is_wide)

    def within(classes: Tensor, elsewhere: int) -> Tensor:
        at = classes - own.offset
        return torch.where((at >= 0) & (at < own.size), at, elsewhere)

    target = torch.where(call.target == call.ignore_index, IGNORED, within(call.target, own.size))
    prediction = within(whole.argmax, -1) if call.objective.needs_argmax else whole.argmax.new_empty(0)
    return done.loss, done.stats, (target, fields, prediction)


def _joined(chunks: list[Statistics]) -> Statistics:
    """Of all rows, from those of chunks of them over the same classes."""
    columns = zip(*(chunk[:-1] for chunk in chunks), strict=True)
    joined: list[Any] = [None if column[0] is None else torch.cat(cast(Any, column)) for column in columns]
    return Statistics(*joined[:6], chunks[0].classes)


class _SliceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, loss: Tensor, target: Tensor, fields: Tensor, prediction: Tensor, backend: str
    ) -> Tensor:
        ctx.save_for_backward(logits, target, fields, prediction)
        ctx.backend = backend
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, fields, prediction = ctx.saved_tensors
        made = gradient(logits, target, fields, prediction, upstream, ctx.backend, in_place=False)
        if torch.is_grad_enabled():
            made = DifferentiableOnce.apply(made, logits)
        return made, None, None, None, None, None


class _SliceLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        target: Tensor,
        fields: Tensor,
        prediction: Tensor,
        layer: Layer,
        backend: str,
        wanted: list[bool],
        group: Group,
        anchors: list[Tensor],
    ) -> Tensor:
        tensors = (features, classifier, bias)
        ctx.save_for_backward(*tensors, target, fields, prediction)
        ctx.plan = (backend, layer.chunk, layer.dtype, wanted, group)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.anchors = anchors
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        backend, chunk, dtype, wanted, group = ctx.plan
        gradients = linear_gradient(*ctx.saved_tensors, upstream, IGNORED, backend, chunk, dtype, wanted)
        if wanted[0]:
            dist.all_reduce(gradients[0], group=group)
        return (*finished(gradients, ctx.dtypes, ctx.anchors, wanted), *(None,) * 9)
