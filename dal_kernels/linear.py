"""The loss fused with the classifier layer before it: rows go through in chunks, their logits never exist at once."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dal_kernels import reference
from dal_kernels.arguments import Rows, RowStats, check, check_layer, raise_for_labels, transforms_active
from dal_kernels.autograd import (
    ENTROPY,
    REDUCTION,
    TARGET_PROB,
    DifferentiableOnce,
    anchor_of,
    graph_is_kept,
    has_no_value,
)
from dal_kernels.backends.choose import choose
from dal_kernels.linear_ops import chunk_row_bytes, linear_gradient, linear_loss, loss_dtype_of

__all__ = ["linear_dynamics_aware_loss"]

# The smallest default budget of a chunk: matmuls of fewer bytes leave a device idle.
_LEAST_BYTES = 64 << 20


class Layer(NamedTuple):
    """A checked layer: features (N, D), classifier (C, D), bias (C,) or None; ``dtype`` of the logits."""

    features: Tensor
    classifier: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    chunk: int


def layer_of(
    input: Tensor, classifier_weight: Tensor, bias: Tensor | None, chunk_bytes: int | None, least_classes: int = 1
) -> tuple[Layer, Tensor]:
    """The layer as flat rows, and a tensor without memory that looks like its logits.

    Raises:
        TypeError, ValueError: a type, dtype, shape or device that :func:`torch.nn.functional.linear` would not take,
            or a budget that is none.
    """
    dtype = check_layer(input, classifier_weight, bias, chunk_bytes, least_classes)
    classes = classifier_weight.shape[0]
    shape = (classes,) if input.dim() == 1 else (input.shape[0], classes, *input.shape[2:])
    logits = input.new_empty((), dtype=dtype).expand(shape)
    features = input
    if input.dim() != 2:
        features = input.unsqueeze(0) if input.dim() == 1 else input.movedim(1, -1).reshape(-1, input.shape[1])
    budget = chunk_bytes or max(_LEAST_BYTES, classifier_weight.numel() * dtype.itemsize // 2)
    most = max(1, budget // max(1, chunk_row_bytes(classes, dtype, input.device)))
    count = features.shape[0]
    # As many chunks as it takes, of equal size.
    chunks = max(1, -(-count // most))
    return Layer(features, classifier_weight, bias, dtype, max(1, -(-count // chunks))), logits


@overload
def linear_dynamics_aware_loss(
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    bootstrap: str = ...,
    return_stats: Literal[False] = ...,
    backend: str = ...,
    chunk_bytes: int | None = ...,
) -> Tensor: ...
@overload
def linear_dynamics_aware_loss(
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    bootstrap: str = ...,
    return_stats: Literal[True],
    backend: str = ...,
    chunk_bytes: int | None = ...,
) -> tuple[Tensor, RowStats]: ...
def linear_dynamics_aware_loss(
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = 0.0,
    *,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    bootstrap: str = "soft",
    return_stats: bool = False,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """``dynamics_aware_loss(F.linear(input, classifier_weight, bias), target, ...)`` without its logits in memory.

    A chunk of rows at a time goes through the classifier; its logits become their own gradient, and that the gradients
    of input, weight and bias, all in the forward ("none" does it in the backward, when the upstream gradient is known,
    at the cost of a second pass through the classifier). Above its arguments and their gradients a step takes one
    chunk. Gradients are summed in float32 (float64 for float64) whatever the dtype of the weight, and kept in it until
    the backward; on a CPU and on ROCm half types multiply in float32 for it, and on a CPU without instructions for half
    types all products are made in float32.

    Args:
        input: features of shape (D,), (N, D) or (N, D, d1, ..., dk), D standing where C stands in logits; float16,
            bfloat16, float32 or float64.
        classifier_weight: (C, D), as of :class:`torch.nn.Linear`; same dtype. Under autocast the dtypes may differ, and
            logits are made in autocast's, as by F.linear.
        bias: (C,), or None.
        target, q, bootstrap_weight, weight, ignore_index, reduction, bootstrap, return_stats, backend: as in
            :func:`dal_kernels.dynamics_aware_loss`. Under the backend "eager" and in torch.func transforms plain
            operations do the same; there are derivatives of any order, and the transforms make all logits at once.
        chunk_bytes: memory for a chunk. Default: half of what the weight takes in the dtype of the logits, at least
            64 MiB. Larger chunks make larger matmuls and pass over the weight's gradient less often.

    Returns:
        As :func:`dal_kernels.dynamics_aware_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dal_kernels.dynamics_aware_loss`, and where shapes, dtypes or
            devices of input, classifier_weight and bias do not fit, or chunk_bytes is not a positive int.
    """
    layer, logits = layer_of(input, classifier_weight, bias, chunk_bytes)
    rows = check(logits, target, q, bootstrap_weight, weight, ignore_index, reduction, bootstrap, return_stats)
    name = choose(backend, input)
    loss, stats = _eager(layer, rows) if name == "eager" else _fused(layer, rows, name)
    return rows.shaped(loss, stats)


def _eager(layer: Layer, rows: Rows) -> tuple[Tensor, RowStats | None]:
    """By plain operations; a chunk's logits are made again in the backward."""
    raise_for_labels(rows)
    count = len(layer.features)
    if count <= layer.chunk or transforms_active() or torch.compiler.is_compiling():
        logits = F.linear(layer.features, layer.classifier, layer.bias)
        return reference.reduced_loss(rows._replace(logits=logits))

    given = layer.features.dtype

    def losses_of(features: Tensor, classifier: Tensor, bias: Tensor | None, part: Rows) -> Any:
        logits = F.linear(features, classifier.to(given), None if bias is None else bias.to(given))
        return reference.reduced_loss(part._replace(logits=logits))

    # What the chunks add to the gradients of these is added up in float32.
    sums = loss_dtype_of(given)
    classifier, bias = layer.classifier.to(sums), None if layer.bias is None else layer.bias.to(sums)

    losses, stats = [], []
    for begin in range(0, count, layer.chunk):
        of = slice(begin, begin + layer.chunk)
        q, bootstrap_weight = (v[of] if v.dim() else v for v in (rows.q, rows.bootstrap_weight))
        part = rows._replace(target=rows.target[of], q=q, bootstrap_weight=bootstrap_weight, reduction="none")
        loss, of_rows = checkpoint(losses_of, layer.features[of], classifier, bias, part, use_reentrant=False)
        losses.append(loss)
        stats.append(of_rows)
    loss = torch.cat(losses)
    if rows.reduction != "none":
        loss = loss.sum()
    if rows.reduction == "mean":
        classes = layer.classifier.shape[0]
        loss = loss / reference.row_factors(rows.target, classes, rows.weight, rows.ignore_index, loss.dtype).sum()
    return loss, RowStats(*map(torch.cat, zip(*stats, strict=True))) if rows.want_stats else None


def _fused(layer: Layer, rows: Rows, backend: str) -> tuple[Tensor, RowStats | None]:
    """By the row kernels of ``backend``, differentiable once."""
    tensors = (layer.features, layer.classifier, layer.bias)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors]
    if any(wanted):
        loss, fields, prediction = _FusedLinear.apply(
            *tensors, layer, rows, backend, wanted, anchors_of(tensors, wanted)
        )
    else:
        loss, fields, prediction, *_ = linear_loss(*_loss_arguments(layer, rows, backend), wanted)
    return loss, RowStats(fields[TARGET_PROB], fields[ENTROPY], prediction) if rows.want_stats else None


def _loss_arguments(layer: Layer, rows: Rows, backend: str) -> tuple[Any, ...]:
    return (
        *layer[:3],
        rows.target,
        rows.q,
        rows.bootstrap_weight,
        rows.weight,
        rows.ignore_index,
        REDUCTION[rows.reduction],
        rows.hard,
        backend,
        layer.chunk,
        layer.dtype,
        rows.hard or rows.want_stats,
    )


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        layer: Layer,
        rows: Rows,
        backend: str,
        wanted: list[bool],
        anchors: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer = layer._replace(features=features, classifier=classifier, bias=bias)
        written = rows.reduction != "none"
        loss, fields, prediction, *gradients = linear_loss(
            *_loss_arguments(layer, rows, backend), wanted if written else [False] * 3
        )
        tensors = (features, classifier, bias)
        ctx.plan = (written, rows.ignore_index, backend, layer.chunk, layer.dtype, wanted)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.anchors = anchors
        if written:
            ctx.save_for_backward(*gradients)
        else:
            # What the user gets of them may be edited.
            ctx.save_for_backward(*tensors, rows.target, fields.clone(), prediction.clone())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(fields, prediction)
        return loss, fields, prediction

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        written, ignore_index, backend, chunk, dtype, wanted = ctx.plan
        rest = (None,) * 5
        if upstream is None:
            return (None, None, None, *rest)
        if written:
            gradients = [scaled(gradient, upstream) for gradient in ctx.saved_tensors]
        else:
            gradients = linear_gradient(*ctx.saved_tensors, upstream, ignore_index, backend, chunk, dtype, wanted)
        return (*finished(gradients, ctx.dtypes, ctx.anchors, wanted), *rest)


def anchors_of(tensors: tuple[Tensor | None, ...], wanted: list[bool]) -> list[Tensor]:
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


def finished(
    gradients: Any, dtypes: list[torch.dtype | None], anchors: list[Tensor], wanted: list[bool]
) -> list[Tensor | None]:
    """Summed gradients in the dtypes of what they belong to, able to say that there is no second derivative."""
    made: list[Tensor | None] = []
    for gradient, dtype, want in zip(gradients, dtypes, wanted, strict=True):
        if want and anchors and torch.is_grad_enabled():
            made.append(DifferentiableOnce.apply(gradient.to(dtype), *anchors))
        else:
            made.append(gradient.to(dtype) if want else None)
    return made
