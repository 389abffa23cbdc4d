"""The loss fused with the classifier layer before it: rows go through in chunks, their logits never exist at once."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dal_kernels import reference
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
from dal_kernels.fields import REDUCTION, Reduction, loss_dtype_of
from dal_kernels.knobs import KnobValue
from dal_kernels.layer import Layer, layer_of
from dal_kernels.linear_ops import finished, linear_gradient, linear_loss
from dal_kernels.objectives import OBJECTIVES, dynamics_aware_of
from dal_kernels.once import anchor_of
from dal_kernels.surroundings import (
    graph_is_kept,
    hand_over,
    has_no_value,
    is_recording,
    transforms_active,
    wants_the_call,
)
from dal_kernels.tensors import check_choice

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["linear_dynamics_aware_loss"]


@overload
def linear_dynamics_aware_loss(
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    bias: Tensor | None = ...,
    return_stats: Literal[False] = ...,
    chunk_bytes: int | None = ...,
    **options: Unpack[OptionsOfKernels],
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
    return_stats: Literal[True],
    chunk_bytes: int | None = ...,
    **options: Unpack[OptionsOfKernels],
) -> tuple[Tensor, RowStats]: ...
@overload
def linear_dynamics_aware_loss(
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    bias: Tensor | None = ...,
    return_stats: bool,
    chunk_bytes: int | None = ...,
    **options: Unpack[OptionsOfKernels],
) -> Tensor | tuple[Tensor, RowStats]: ...
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
    reduction: Reduction = "mean",
    bootstrap: Bootstrap = "soft",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
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
        target, q, bootstrap_weight, weight, ignore_index, reduction, bootstrap, return_stats, sample_weight, backend:
            as in :func:`dal_kernels.dynamics_aware_loss`. Under the backend "eager" and in torch.func transforms plain
            operations do the same; there are derivatives of any order, and the transforms make all logits at once.
        chunk_bytes: memory for a chunk. Default: half of what the weight takes in the dtype of the logits, at least
            64 MiB. Larger chunks make larger matmuls and pass over the weight's gradient less often.

    Returns:
        As :func:`dal_kernels.dynamics_aware_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dal_kernels.dynamics_aware_loss`, and where shapes, dtypes or
            devices of input, classifier_weight and bias do not fit, or chunk_bytes is not a positive int.
    """
    check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    result: Tensor | tuple[Tensor, RowStats] = linear_loss_of(
        dynamics_aware_of(bootstrap).id, (q, bootstrap_weight), input, classifier_weight, target, bias=bias,
        weight=weight, ignore_index=ignore_index, reduction=reduction, return_stats=return_stats,
        sample_weight=sample_weight, backend=backend, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    return result


def linear_loss_of(
    objective: int,
    knobs: tuple[KnobValue, ...] | Tensor,
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
    chunk_bytes: int | None = None,
) -> Any:
    """The loss of that id in the table behind a classifier layer. Knobs as :func:`dal_kernels.knobs.knob_tensor`."""
    given = knobs if isinstance(knobs, tuple) else (knobs,)
    tensors = (input, classifier_weight, target, bias, weight, sample_weight, *given)
    if wants_the_call(*tensors):
        return hand_over(
            linear_loss_of, tensors, objective, knobs, input, classifier_weight, target, bias=bias, weight=weight,
            ignore_index=ignore_index, reduction=reduction, return_stats=return_stats, sample_weight=sample_weight,
            backend=backend, chunk_bytes=chunk_bytes,
        )  # fmt: skip
    layer, logits = layer_of(input, classifier_weight, bias, chunk_bytes)
    call = check(
        logits, target, OBJECTIVES[objective], knobs, weight, ignore_index, reduction, return_stats, sample_weight
    )
    name = choose(backend, input)
    run = partial(_eager, layer) if name == "eager" else partial(_fused, layer, backend=name)
    return call.shaped(*reference.run_weighted(run, call))


def _eager(layer: Layer, call: Call) -> tuple[Tensor, RowStats | None]:
    """By plain operations; a chunk's logits are made again in the backward."""
    raise_for_labels(call)
    at_once = transforms_active() or torch.compiler.is_compiling() or is_recording(layer.features)
    if at_once or len(layer.features) <= layer.chunk:
        logits = F.linear(layer.features, layer.classifier, layer.bias)
        return reference.reduced_loss(call._replace(logits=logits))

    given = layer.features.dtype

    def losses_of(features: Tensor, classifier: Tensor, bias: Tensor | None, part: Call) -> Any:
        logits = F.linear(features, classifier.to(given), None if bias is None else bias.to(given))
        return reference.reduced_loss(part._replace(logits=logits))

    # What the chunks add to the gradients of these is added up in float32.
    sums = loss_dtype_of(given)
    classifier, bias = layer.classifier.to(sums), None if layer.bias is None else layer.bias.to(sums)

    losses, stats = [], []
    for begin in range(0, len(layer.features), layer.chunk):
        of = slice(begin, begin + layer.chunk)
        knobs = call.knobs if call.knobs.dim() == 1 else call.knobs[of]
        part = call._replace(target=call.target[of], knobs=knobs, reduction="none")
        loss, of_rows = checkpoint(losses_of, layer.features[of], classifier, bias, part, use_reentrant=False)
        losses.append(loss)
        stats.append(of_rows)
    loss = torch.cat(losses)
    if call.reduction != "none":
        loss = loss.sum()
    if call.reduction == "mean":
        classes = layer.classifier.shape[0]
        loss = loss / reference.row_factors(call.target, classes, call.weight, call.ignore_index, loss.dtype).sum()
    return loss, RowStats(*map(torch.cat, zip(*stats, strict=True))) if call.want_stats else None


def _fused(layer: Layer, call: Call, backend: str) -> tuple[Tensor, RowStats | None]:
    """By the row kernels of ``backend``, differentiable once."""
    tensors = (layer.features, layer.classifier, layer.bias)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors]
    if is_recording(layer.features):
        # The operator itself is recorded, and differentiable where it makes no gradient.
        wanted = [False] * 3
    if any(wanted):
        loss, fields, prediction = _FusedLinear.apply(
            *tensors, layer, call, backend, wanted, anchors_of(tensors, wanted)
        )
    else:
        loss, fields, prediction, *_ = linear_loss(*_loss_arguments(layer, call, backend), wanted)
    return loss, RowStats.of_fields(fields, prediction) if call.want_stats else None


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
        layer: Layer,
        call: Call,
        backend: str,
        wanted: list[bool],
        anchors: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer = layer._replace(features=features, classifier=classifier, bias=bias)
        gradients_ready = call.reduction != "none"
        loss, fields, prediction, *gradients = linear_loss(
            *_loss_arguments(layer, call, backend), wanted if gradients_ready else [False] * 3
        )
        tensors = (features, classifier, bias)
        ctx.plan = (gradients_ready, call.ignore_index, backend, layer.chunk, layer.dtype, wanted)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.anchors = anchors
        if gradients_ready:
            ctx.save_for_backward(*gradients)
        else:
            # What the user gets of them may be edited.
            ctx.save_for_backward(*tensors, call.target, fields.clone(), prediction.clone())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(fields, prediction)
        return loss, fields, prediction

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        gradients_ready, ignore_index, backend, chunk, dtype, wanted = ctx.plan
        rest = (None,) * 5
        if upstream is None:
            return (None, None, None, *rest)
        if gradients_ready:
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
