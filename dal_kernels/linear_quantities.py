"""Quantities of rows as differentiable vectors behind a linear layer, a chunk of whose logits exists at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dal_kernels.arguments import Backend, check, raise_for_labels
from dal_kernels.backends.choose import choose
from dal_kernels.fields import loss_dtype_of
from dal_kernels.layer import Layer, layer_of
from dal_kernels.linear import anchors_of
from dal_kernels.linear_ops import LayerInChunks, finished, linear_gradient
from dal_kernels.objective import RowQuantities
from dal_kernels.objectives import row_statistics_of
from dal_kernels.quantities import (
    RowStatistics,
    as_statistics,
    places_of,
    quantities_of_call,
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
    layer, logits = layer_of(input, linear_weight, linear_bias, chunk_bytes)
    call = check(logits, target, row_statistics_of, (), None, ignore_index, "none", True)
    name = choose(backend, input)
    if name == "eager" or is_recording(input):
        whole = torch.nn.functional.linear(layer.features, layer.classifier, layer.bias)
        (row,), prediction = quantities_of_call(call._replace(logits=whole), (call.target,), "eager")
        return as_statistics(call, row, prediction)
    raise_for_labels(call)
    classes, tensors = linear_weight.shape[0], layer[:3]
    place, known, local = places_of(call, call.target, classes)
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        chunks, target_logits = [], [place.new_empty(0, dtype=layer.dtype)]
        for rows, _, of_rows in LayerInChunks(*tensors, layer.dtype, layer.chunk, [False] * 3).chunks():
            chunks.append(statistics(of_rows, name, wide=True))
            target_logits.append(of_rows.gather(1, place[rows].unsqueeze(1)).squeeze(1))
        found = joined(chunks or [statistics(logits.reshape(-1, classes)[:0], name, wide=True)])
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors]
    values = _LinearQuantities.apply(
        *tensors, layer, name, wanted, anchors_of(tensors, wanted), local, torch.cat(target_logits), found
    )
    log_prob, entropy, max_log_prob, sum_log_prob, square_sum = values
    log_prob = torch.where(known, log_prob, math.nan)
    row = RowQuantities(log_prob, entropy, max_log_prob, sum_log_prob, square_sum, classes)
    return as_statistics(call, row, found.argmax)


class _LinearQuantities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        layer: Layer,
        backend: str,
        wanted: list[bool],
        anchors: list[Tensor],
        local: Tensor,
        target_logits: Tensor,
        whole: Statistics,
    ) -> tuple[Tensor, ...]:
        # A clone, because what the user gets may be edited.
        ctx.save_for_backward(features, classifier, bias, local, whole.argmax.clone())
        ctx.plan = (layer.chunk, layer.dtype, backend, wanted, anchors, whole)
        ctx.set_materialize_grads(False)
        return values_of(whole, target_logits, classifier.shape[0], loss_dtype_of(layer.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        features, classifier, bias, local, prediction = ctx.saved_tensors
        chunk, dtype, backend, wanted, anchors, whole = ctx.plan
        sums = loss_dtype_of(dtype)
        fields = slope_fields(whole, len(classifier), upstream, sums)
        at_argmax = prediction if upstream[2] is not None else prediction[:0]
        one = torch.ones((), dtype=sums, device=features.device)
        gradients = linear_gradient(
            features, classifier, bias, local, fields, at_argmax, one, IGNORED, backend, chunk, dtype, wanted
        )
        dtypes = [None if tensor is None else tensor.dtype for tensor in (features, classifier, bias)]
        return (*finished(gradients, dtypes, anchors, wanted), *(None,) * 7)
