"""A loss behind a classifier layer by the row kernels of a backend, as a node of the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dal_kernels.arguments import Call, RowStats
from dal_kernels.fields import REDUCTION
from dal_kernels.layer import Layer
from dal_kernels.linear_chunks import Changes
from dal_kernels.linear_ops import finished, linear_gradient, linear_loss
from dal_kernels.once import anchor_of
from dal_kernels.surroundings import graph_is_kept, has_no_value, is_recording


def fused_loss(
    layer: Layer, changes: Changes, call: Call, row_weight: Tensor | None = None, *, backend: str
) -> tuple[Tensor, RowStats | None]:
    """By the row kernels of ``backend``, differentiable once. ``row_weight`` as of an eager loss."""
    tensors = (*layer[:3], changes.scale, changes.target_shift, row_weight)
    wanted = wanted_of(tensors)
    if is_recording(layer.features):
        # The operator itself is recorded, and differentiable where it makes no gradient.
        wanted = [False] * len(tensors)
    if any(wanted):
        loss, fields, prediction = _FusedLinear.apply(
            *tensors, layer, changes.softcap, call, backend, wanted, anchors_of(tensors, wanted)
        )
    else:
        loss, fields, prediction, *_ = linear_loss(
            *_loss_arguments(layer, call, backend), wanted[:5], *changes, row_weight
        )
    return loss, RowStats.of_fields(fields, prediction) if call.want_stats else None


def wanted_of(tensors: Sequence[Tensor | None]) -> list[bool]:
    """Which tensors want a gradient."""
    return [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors]


def _loss_arguments(layer: Layer, call: Call, backend: str) -> tuple[Any, ...]:
    return (
        *layer[:3],
        call.target,
        call.knobs,
        call.weight,
        call.objective.id,
        call.ignore_index,
        REDUCTION[call.reduction],
        backend,
        layer.chunk,
        layer.dtype,
        call.want_prediction,
    )


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        target_shift: Tensor | None,
        row_weight: Tensor | None,
        layer: Layer,
        softcap: float,
        call: Call,
        backend: str,
        wanted: list[bool],
        anchors: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer = layer._replace(features=features, classifier=classifier, bias=bias)
        gradients_ready = call.reduction != "none"
        loss, fields, prediction, *gradients = linear_loss(
            *_loss_arguments(layer, call, backend), wanted[:5] if gradients_ready else [False] * 5,
            softcap, target_shift, scale, row_weight,
        )  # fmt: skip
        tensors = (features, classifier, bias, scale, target_shift, row_weight)
        ctx.plan = (gradients_ready, call.ignore_index, backend, layer.chunk, layer.dtype, wanted, softcap)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.anchors = anchors
        if gradients_ready:
            ctx.save_for_backward(*gradients)
        else:
            # What the user gets of them may be edited.
            ctx.save_for_backward(*tensors[:5], call.target, fields.clone(), prediction.clone())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(fields, prediction)
        return loss, fields, prediction

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        gradients_ready, ignore_index, backend, chunk, dtype, wanted, softcap = ctx.plan
        rest = (None,) * 6
        if upstream is None:
            return (*(None,) * len(wanted), *rest)
        if gradients_ready:
            gradients = [scaled(gradient, upstream) for gradient in ctx.saved_tensors]
        else:
            features, classifier, bias, scale, target_shift, *kept = ctx.saved_tensors
            with torch.no_grad():  # under create_graph too: its products write into what is there
                made = linear_gradient(
                    features, classifier, bias, *kept, upstream, ignore_index, backend, chunk, dtype, wanted[:5],
                    softcap, target_shift, scale,
                )  # fmt: skip
            gradients = [*made, upstream.new_empty(0)]
        return (*finished(gradients, ctx.dtypes, ctx.anchors, wanted), *rest)


def anchors_of(tensors: Sequence[Tensor | None], wanted: list[bool]) -> list[Tensor]:
    """What ties the gradients to the graphs of those tensors that want one. Not in a Function, which records none."""
    if torch.compiler.is_compiling():
        return []
    found = [tensor for tensor, want in zip(tensors, wanted, strict=True) if want and tensor is not None]
    return [tensor if (anchor := anchor_of(tensor)) is None else anchor for tensor in found]


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """A saved gradient times the upstream one: in its place where nobody asks for it again."""
    if torch.compiler.is_compiling() or graph_is_kept() or has_no_value(upstream):
        return gradient * upstream
    if upstream.is_cpu and upstream.item() == 1.0:  # looking is free
        return gradient
    return gradient.mul_(upstream)
