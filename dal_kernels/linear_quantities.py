"""Quantities of rows as differentiable vectors behind a linear layer, a chunk of whose logits exists at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dal_kernels.arguments import Backend, Call, check, raise_for_labels
from dal_kernels.backends.choose import choose
from dal_kernels.fields import loss_dtype_of
from dal_kernels.layer import CLASSES_LAST, Layer, layer_of
from dal_kernels.linear_chunks import UNCHANGED, Changes, LayerInChunks
from dal_kernels.linear_eager import eager_quantities
from dal_kernels.linear_fused import anchors_of, wanted_of
from dal_kernels.linear_ops import finished, linear_gradient
from dal_kernels.linear_rows import Rows
from dal_kernels.objective import RowQuantities
from dal_kernels.objectives import row_statistics_of
from dal_kernels.quantities import (
    RowStatistics,
    as_statistics,
    places_of,
    slope_fields,
    values_of,
)
from dal_kernels.slices import IGNORED, Statistics, joined, statistics
from dal_kernels.surroundings import is_recording

__all__ = ["linear_row_statistics"]


def linear_row_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
    chunk_bytes: int | None = None,
) -> RowStatistics:
    """:func:`dal_kernels.row_statistics` of ``F.linear(input, linear_weight, linear_bias)``, a chunk of it in memory.

    A chunk of rows at a time goes through the classifier, once in the forward and once in the backward.

    Args:
        input, linear_weight, linear_bias, chunk_bytes: as in :func:`dal_kernels.linear_loss`.
        target, ignore_index, backend: as in :func:`dal_kernels.row_statistics`.

    Returns, Raises:
        As :func:`dal_kernels.row_statistics` and :func:`dal_kernels.linear_loss`.
    """
    rows = Rows(input, target, None, None).without_last(0, 0)
    layer, logits = layer_of(input, linear_weight, linear_bias, chunk_bytes, names=CLASSES_LAST)
    call = check(logits, rows.flat_target, row_statistics_of, (), None, ignore_index, "none", True)
    call = call._replace(shape=target.shape)
    (row,), prediction = linear_quantities(layer, UNCHANGED, call, (call.target,), backend=choose(backend, input))
    return as_statistics(call, row, prediction)


def linear_quantities(
    layer: Layer, changes: Changes, call: Call, targets: tuple[Tensor, ...], *, backend: str
) -> tuple[tuple[RowQuantities, ...], Tensor]:
    """:func:`dal_kernels.quantities.quantities_of_call` of the logits of a layer."""
    for target in targets:
        raise_for_labels(call._replace(target=target))
    if backend == "eager" or is_recording(layer.features):
        return eager_quantities(layer, changes, call, targets)
    classes = layer.classifier.shape[0]
    found_places = [places_of(call, target, classes) for target in targets]
    places = torch.stack([place for place, _, _ in found_places])
    with torch.no_grad(), torch.autocast(layer.features.device.type, enabled=False):
        chunks, target_logits = [], [places.new_empty((0, len(targets)), dtype=layer.dtype)]
        in_chunks = LayerInChunks(*layer[:3], layer.dtype, layer.chunk, [], call.target, changes)
        for rows, _, logits in in_chunks.chunks():
            chunks.append(statistics(logits, backend, wide=True))
            target_logits.append(logits.gather(1, places[:, rows].t()))
        found = joined(chunks or [statistics(call.logits.new_empty((0, classes)), backend, wide=True)])
    tensors = (*layer[:3], changes.scale, changes.target_shift)
    wanted = wanted_of(tensors)
    local = torch.cat([found_places[0][2].unsqueeze(0), places[1:]])
    log_probs, entropy, max_log_prob, sum_log_prob, square_sum = _LinearQuantities.apply(
        *tensors, layer, changes.softcap, backend, wanted, anchors_of(tensors, wanted), local,
        torch.cat(target_logits).t(), found,
    )  # fmt: skip
    row = RowQuantities(log_probs[0], entropy, max_log_prob, sum_log_prob, square_sum, classes)
    of_targets = (
        row._replace(log_prob=torch.where(known, log_prob, math.nan))
        for log_prob, (_, known, _) in zip(log_probs.unbind(), found_places, strict=True)
    )
    return tuple(of_targets), found.argmax


class _LinearQuantities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        target_shift: Tensor | None,
        layer: Layer,
        softcap: float,
        backend: str,
        wanted: list[bool],
        anchors: list[Tensor],
        local: Tensor,
        target_logits: Tensor,
        row_statistics: Statistics,
    ) -> tuple[Tensor, ...]:
        # A clone, because what the user gets may be edited.
        ctx.save_for_backward(features, classifier, bias, scale, target_shift, local, row_statistics.argmax.clone())
        ctx.plan = (layer.chunk, layer.dtype, softcap, backend, wanted, anchors, row_statistics)
        ctx.set_materialize_grads(False)
        return values_of(row_statistics, target_logits, classifier.shape[0], loss_dtype_of(layer.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, local, prediction = ctx.saved_tensors
        features, classifier, bias, scale, target_shift = tensors
        chunk, dtype, softcap, backend, wanted, anchors, row_statistics = ctx.plan
        sums = loss_dtype_of(dtype)
        fields = slope_fields(row_statistics, len(classifier), upstream, sums)
        at_argmax = prediction if upstream[2] is not None else prediction[:0]
        one = torch.ones((), dtype=sums, device=features.device)
        others: tuple[Tensor, ...] = ()
        if len(local) > 1 and upstream[0] is not None:
            # Of other targets no kernel knows: their terms are added to their classes.
            others = (local[1:], torch.where(local[0] == IGNORED, 0.0, upstream[0][1:]))
        with torch.no_grad():  # under create_graph too: its products write into what is there
            gradients = linear_gradient(
                features, classifier, bias, local[0], fields, at_argmax, one, IGNORED, backend, chunk, dtype, wanted,
                softcap, target_shift, scale, *others,
            )  # fmt: skip
        dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        return (*finished(gradients, dtypes, anchors, wanted), *(None,) * 8)
