"""Losses whose classes are split over ranks: statistics of each rank's slice, merged, and the gradient of the slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from dal_kernels.arguments import Backend, Call, RowStats, check, label_error
from dal_kernels.backends.choose import choose
from dal_kernels.collectives import Group, scattered_sum, sum_over_ranks
from dal_kernels.exchange import Slice, exchange, slice_of
from dal_kernels.fields import Reduction
from dal_kernels.knobs import KnobValue
from dal_kernels.layer import Layer, layer_of
from dal_kernels.linear_chunks import LayerInChunks
from dal_kernels.linear_fused import anchors_of, wanted_of
from dal_kernels.linear_ops import finished, linear_gradient
from dal_kernels.objectives import OBJECTIVES, row_statistics_of
from dal_kernels.once import DifferentiableOnce
from dal_kernels.quantities import RowStatistics, as_statistics, differentiable_rows
from dal_kernels.reference import run_weighted
from dal_kernels.slices import IGNORED, Statistics, fields_of, finish, gradient, joined, statistics, within
from dal_kernels.surroundings import outside_of_graphs
from dal_kernels.tensors import refuse_dtensor

# torch.compile gives it as the reason of an error where fullgraph=True.
_NO_GRAPH = "a loss whose classes are split over ranks breaks the graph: compile without fullgraph=True"

_F = TypeVar("_F", bound=Callable[..., Any])


def breaks_graph(function: _F) -> _F:
    """:func:`outside_of_graphs`, for that reason."""
    return outside_of_graphs(function, _NO_GRAPH)


@breaks_graph
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
    logits, own, whole_logits = _slice(local_logits, target, class_offset, num_classes, group)
    call = check(
        whole_logits, target, OBJECTIVES[objective], knobs, weight, ignore_index, reduction, return_stats, sample_weight
    )
    problem = label_error(call)
    name = choose(backend, local_logits)
    wanted = torch.is_grad_enabled() and local_logits.requires_grad

    def run(call: Call) -> tuple[Tensor, RowStats | None]:
        with torch.no_grad():
            target_logit = _target_logit(logits, call.target, own)
            loss, stats, saved = _finish(
                call, statistics(logits, name, call.objective.is_wide), target_logit, own, name, wanted, problem
            )
        return loss if saved is None else _SliceLoss.apply(logits, loss, *saved, name), stats

    return call.shaped(*run_weighted(run, call))


@breaks_graph
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
    own_rows: Tensor | None = None,
) -> Any:
    """A loss of the table behind a classifier whose rows are split over ranks.

    Args:
        own_rows: this rank's rows of ``input``, which is those of all ranks in their order: the gradient is for these.
    """
    layer, local = layer_of(input, local_classifier_weight, bias, chunk_bytes, least_classes=0)
    place = int(input.dim() > 1)
    own = slice_of(local.shape[place], target, input.device, class_offset, num_classes, group)
    whole_logits = local.new_empty(()).expand((*local.shape[:place], own.classes, *local.shape[place + 1 :]))
    call = check(
        whole_logits, target, OBJECTIVES[objective], knobs, weight, ignore_index, reduction, return_stats, sample_weight
    )
    problem = label_error(call)
    name = choose(backend, input)
    leaves = (layer.features if own_rows is None else own_rows, layer.classifier, layer.bias)
    wanted = wanted_of(leaves)

    def run(call: Call) -> tuple[Tensor, RowStats | None]:
        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            found, target_logits = [], []
            in_chunks = LayerInChunks(*layer[:3], layer.dtype, layer.chunk, [False] * 3)
            for rows, _, logits in in_chunks.chunks():
                found.append(statistics(logits, name, call.objective.is_wide))
                target_logits.append(_target_logit(logits, call.target[rows], own))
            if not found:
                empty = local[:0].reshape(0, own.size)
                found, target_logits = [statistics(empty, name, call.objective.is_wide)], [local.new_empty(0)]
            row_sums = joined(found)
            loss, stats, saved = _finish(
                call, row_sums, torch.cat(target_logits), own, name, any(wanted), problem, layer.features
            )
        if saved is not None:
            loss = _SliceLinearLoss.apply(*leaves, loss, *saved, layer, name, wanted, group, anchors_of(leaves, wanted))
        return loss, stats

    return call.shaped(*run_weighted(run, call))


@breaks_graph
def class_parallel_row_statistics(
    local_logits: Tensor,
    target: Tensor,
    *,
    class_offset: int | None = None,
    num_classes: int | None = None,
    group: Group = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> RowStatistics:
    """:func:`dal_kernels.row_statistics` of logits whose classes are split over the ranks of a group.

    Every rank gets the same statistics, and must make the same loss of them.

    Args:
        local_logits, target, class_offset, num_classes, group: as in
            :func:`dal_kernels.distributed.class_parallel_dynamics_aware_loss`.
        ignore_index, backend: as in :func:`dal_kernels.row_statistics`.

    Returns, Raises:
        As those two.
    """
    logits, own, whole_logits = _slice(local_logits, target, class_offset, num_classes, group)
    call = check(whole_logits, target, row_statistics_of, (), None, ignore_index, "none", True)
    problem = label_error(call)
    name = choose(backend, local_logits)
    with torch.no_grad():
        target_logit = _target_logit(logits, call.target, own)
        row_sums, target_logit = exchange(call, statistics(logits, name, wide=True), target_logit, own, problem=problem)
        local, prediction = within(call.target, call.target == call.ignore_index, row_sums.argmax, own.offset, own.size)
    (row,) = differentiable_rows(
        logits, local.unsqueeze(0), target_logit.unsqueeze(0), prediction, row_sums, own.classes, name
    )
    return as_statistics(call, row, row_sums.argmax)


def _slice(
    local_logits: Tensor, target: Tensor, class_offset: int | None, num_classes: int | None, group: Group
) -> tuple[Tensor, Slice, Tensor]:
    """(flat logits of this rank's slice, the slice, a tensor without memory that looks like the whole logits)."""
    if not isinstance(local_logits, Tensor):
        raise TypeError(f"local_logits must be a tensor, got {type(local_logits).__name__}")
    refuse_dtensor("local_logits", local_logits, ": dal_kernels.dynamics_aware_loss takes it; or pass its to_local()")
    if local_logits.dim() == 0:
        raise ValueError("local_logits must have shape (C,), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    place = int(local_logits.dim() > 1)
    own = slice_of(local_logits.shape[place], target, local_logits.device, class_offset, num_classes, group)
    shape = (*local_logits.shape[:place], own.classes, *local_logits.shape[place + 1 :])
    logits = local_logits.movedim(1, -1).flatten(0, -2) if place else local_logits.unsqueeze(0)
    return logits, own, local_logits.new_empty(()).expand(shape)


def _target_logit(logits: Tensor, target: Tensor, own: Slice) -> Tensor:
    """z_y of the rows whose label lies in this slice; anything for the others."""
    if own.size == 0:
        return logits.new_zeros(len(target))
    local = (target - own.offset).clamp(0, own.size - 1)
    return logits.gather(1, local.unsqueeze(1)).squeeze(1)


def _finish(
    call: Call,
    local: Statistics,
    target_logit: Tensor,
    own: Slice,
    backend: str,
    wanted: bool,
    problem: Exception | None,
    features: Tensor | None = None,
) -> tuple[Tensor, RowStats | None, tuple[Tensor, ...] | None]:
    """Reduced loss and statistics, and with ``wanted`` (target, fields, prediction) for the gradient of the slice."""
    row_sums, target_logit = exchange(call, local, target_logit, own, features, problem)
    done = finish(call, row_sums, target_logit, wanted)
    if done.coefficients is None:
        return done.loss, done.stats, None
    fields = fields_of(row_sums.peak, done.coefficients, done.loss.dtype, call.objective.is_wide)

    target, prediction = within(call.target, call.target == call.ignore_index, row_sums.argmax, own.offset, own.size)
    return done.loss, done.stats, (target, fields, prediction if call.objective.needs_argmax else prediction[:0])


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
        ctx.save_for_backward(layer.features, classifier, bias, target, fields, prediction)
        ctx.plan = (backend, layer.chunk, layer.dtype, wanted, group, len(features) != len(layer.features))
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.anchors = anchors
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        backend, chunk, dtype, wanted, group, gathered = ctx.plan
        with torch.no_grad():  # under create_graph too: its products write into what is there
            gradients = linear_gradient(*ctx.saved_tensors, upstream, IGNORED, backend, chunk, dtype, wanted)[:3]
        if wanted[0] and gathered:
            gradients = (scattered_sum(gradients[0], group), *gradients[1:])
        elif wanted[0]:
            sum_over_ranks(gradients[0], group)
        return (*finished(gradients, ctx.dtypes, ctx.anchors, wanted), *(None,) * 9)
