"""Operators of the loss fused with its classifier layer: chunks of rows through a matmul, a row kernel and two matmuls.

    linear_loss(features, classifier, bias, target, knobs, weight, objective, ignore_index, reduction,
                backend, chunk, dtype, want_prediction, wanted, softcap, target_shift, scale, row_weight)
        -> (loss, fields, prediction, *gradients of features, classifier, bias, scale and target_shift, losses of rows)
    linear_gradient(features, classifier, bias, target, fields, prediction, upstream, ignore_index,
                    backend, chunk, dtype, wanted, softcap, target_shift, scale, others, other_terms)
        -> those gradients

with features (N, D), classifier (C, D), ``chunk`` rows at a time, logits in ``dtype``, ``wanted`` saying which of the
gradients to make (the others come back empty) and ``backend`` whose row kernels. Gradients are in the dtype of
the loss, summed over the chunks in it, and divided for a mean. The gradient of a chunk takes the place of its logits.
``softcap``, ``target_shift`` and ``scale`` are those of :class:`dal_kernels.linear_chunks.Changes`. A ``row_weight``
(N,) multiplies the losses of rows before their sum, for whose derivative by it they come back. ``others`` are more
targets (T, N) of rows, whose terms in the gradient are ``other_terms``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dal_kernels.arguments import Call, raise_for_labels
from dal_kernels.fields import GRADIENT_FIELDS, NARROW_FIELDS, REDUCTIONS, loss_dtype_of
from dal_kernels.linear_blocks import LayerInBlocks, blocks_of, finished_rows, in_dtype_of_classifier
from dal_kernels.linear_chunks import Changes, Gradients, LayerInChunks, empty_gradients
from dal_kernels.namespace import OPERATORS, operators
from dal_kernels.objectives import OBJECTIVES
from dal_kernels.once import DifferentiableOnce
from dal_kernels.ops import KERNELS, kept_fields
from dal_kernels.reference import row_factors
from dal_kernels.slices import IGNORED, gradient

_MEAN = REDUCTIONS.index("mean")


def _divisor(target: Tensor, classes: int, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    return row_factors(target, classes, weight, ignore_index, dtype).sum(dtype=torch.float64)


def _linear_loss(
    features: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    target: Tensor,
    knobs: Tensor,
    weight: Tensor | None,
    objective: int,
    ignore_index: int,
    reduction: int,
    backend: str,
    chunk: int,
    dtype: torch.dtype,
    want_prediction: bool,
    wanted: list[bool],
    softcap: float = 0.0,
    target_shift: Tensor | None = None,
    scale: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    kernels = KERNELS[backend]
    losses, fields, prediction, *_ = _fake_loss(
        features, classifier, bias, target, knobs, weight, objective, ignore_index, 0, backend, chunk, dtype,
        want_prediction, [False] * 5
    )  # fmt: skip
    logits = features.new_empty((), dtype=dtype).expand(len(features), len(classifier))
    call = Call(logits, target, knobs, weight, OBJECTIVES[objective], ignore_index, "none", False, target.shape)
    # Here, because a kernel would name a bad label by its row in the chunk.
    raise_for_labels(call)
    changes = Changes(softcap, target_shift, scale)
    divisor = None
    if reduction == _MEAN:
        divisor = _divisor(target, len(classifier), weight, ignore_index, losses.dtype)
    blocks = blocks_of(features, classifier, dtype, chunk, wanted, backend)
    if blocks is not None:
        with torch.autocast(features.device.type, enabled=False):
            in_blocks = LayerInBlocks(features, classifier, bias, dtype, blocks, wanted, target, changes)
            wide = call.objective.is_wide
            losses, of_rows, argmax = finished_rows(call, *in_blocks.statistics(wide))
            fields = of_rows if wide else of_rows[:NARROW_FIELDS]
            prediction = argmax if want_prediction else prediction
            upstream = losses.new_ones(()) if row_weight is None else row_weight
            if divisor is not None:
                upstream = torch.where(divisor == 0, torch.nan, 1 / divisor).to(losses.dtype)
            terms = of_rows if wide else of_rows[: GRADIENT_FIELDS + 1]
            at_argmax = argmax if call.objective.needs_argmax else argmax[:0]
            gradients = in_blocks.differentiate(terms, at_argmax, upstream, target == ignore_index)
        return (
            _reduced(losses, divisor, reduction, row_weight),
            fields,
            prediction,
            *gradients,
            _given(losses, row_weight),
        )
    # Gradients are divided once they are summed, for a half type would lose them before. Where the divisor is 0 they
    # are 0 / 0, but for those of ignored rows: 0.
    upstream, factor = torch.ones((), dtype=losses.dtype, device=losses.device), None
    if divisor is not None:
        upstream = torch.where(divisor == 0, torch.nan, upstream)
        factor = torch.where(divisor == 0, 1.0, 1 / divisor).to(losses.dtype)
    if row_weight is not None:
        upstream = row_weight
        if dtype == torch.float16 and len(row_weight):
            largest = row_weight.abs().amax()
            factor = torch.where(largest > 0, largest, 1.0)
            upstream = row_weight / factor
    with torch.autocast(features.device.type, enabled=False):
        layer = LayerInChunks(features, classifier, bias, dtype, chunk, wanted, target, changes)
        for rows, inputs, logits in layer.chunks():
            of_knobs = knobs if knobs.dim() == 1 else knobs[rows]
            arguments = (logits, target[rows], of_knobs, weight, objective, ignore_index, 0, False)
            losses[rows], _, of_rows, argmax, *correction = kernels.loss_and_fields(*arguments, want_prediction)
            fields[:, rows] = of_rows
            if want_prediction:
                prediction[rows] = argmax
            if any(wanted):
                part = upstream if upstream.dim() == 0 else upstream[rows]
                arguments = (target[rows], of_rows, argmax, part, ignore_index, *correction)
                layer.add(rows, inputs, kernels.overwrite(logits, *arguments))
        gradients = _in_dtypes(layer.finish(factor), classifier, dtype, backend)
    loss = _reduced(losses, divisor, reduction, row_weight)
    return loss, fields, prediction, *gradients, _given(losses, row_weight)


def _reduced(losses: Tensor, divisor: Tensor | None, reduction: int, row_weight: Tensor | None) -> Tensor:
    if reduction == 0:
        return losses
    total = (losses if row_weight is None else losses * row_weight).sum(dtype=torch.float64)
    return (total if divisor is None else total / divisor).to(losses.dtype)


def _given(losses: Tensor, row_weight: Tensor | None) -> Tensor:
    """The losses of rows where there are weights to differentiate by."""
    return losses.new_empty(0) if row_weight is None else losses


def _in_dtypes(gradients: Gradients, classifier: Tensor, dtype: torch.dtype, backend: str) -> Gradients:
    """As fake ones are made."""
    if not in_dtype_of_classifier(dtype, len(classifier), backend):
        return gradients
    return gradients._replace(classifier=gradients.classifier.to(classifier.dtype))


def _linear_gradient(
    features: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    target: Tensor,
    fields: Tensor,
    prediction: Tensor,
    upstream: Tensor,
    ignore_index: int,
    backend: str,
    chunk: int,
    dtype: torch.dtype,
    wanted: list[bool],
    softcap: float = 0.0,
    target_shift: Tensor | None = None,
    scale: Tensor | None = None,
    others: Tensor | None = None,
    other_terms: Tensor | None = None,
) -> tuple[Tensor, ...]:
    # A negative label that is none (on a GPU: its row is NaN) must not be taken for an ignored one.
    target = torch.where(target == ignore_index, IGNORED, torch.where(target < 0, len(classifier), target))
    with torch.autocast(features.device.type, enabled=False):
        changes = Changes(softcap, target_shift, scale)
        # Those of a narrow objective end before what a gradient needs no more.
        fields = fields[: None if len(fields) > NARROW_FIELDS else GRADIENT_FIELDS + 1]
        blocks = blocks_of(features, classifier, dtype, chunk, wanted, backend)
        if blocks is not None:
            in_blocks = LayerInBlocks(features, classifier, bias, dtype, blocks, wanted, target, changes)
            return in_blocks.differentiate(fields, prediction, upstream, target == IGNORED, others, other_terms)
        layer = LayerInChunks(features, classifier, bias, dtype, chunk, wanted, target, changes)
        for rows, inputs, logits in layer.chunks():
            of_rows = fields[:, rows].contiguous()
            argmax = prediction[rows] if prediction.numel() else prediction
            part = upstream if upstream.dim() == 0 else upstream[rows]
            made = gradient(logits, target[rows], of_rows, argmax, part, backend, in_place=True)
            if others is not None and other_terms is not None:
                made.scatter_add_(1, others[:, rows].t(), other_terms[:, rows].t().to(made.dtype))
            layer.add(rows, inputs, made)
        return _in_dtypes(layer.finish(), classifier, dtype, backend)


def _fake_loss(features: Tensor, classifier: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, _, objective, _, reduction, backend, _, dtype, want_prediction, wanted, *rest = arguments
    rows, sums = features.shape[0], loss_dtype_of(dtype)
    loss = features.new_empty((rows,) if reduction == 0 else (), dtype=sums)
    fields = features.new_empty((kept_fields(objective, want_prediction or backend == "cpu"), rows), dtype=sums)
    prediction = features.new_empty((rows,) if want_prediction else (0,), dtype=torch.int64)
    weighted = len(rest) == 4 and rest[3] is not None
    losses = features.new_empty((rows,) if weighted else (0,), dtype=sums)
    return loss, fields, prediction, *_fake_gradients(features, classifier, dtype, wanted, backend), losses


def _fake_gradient(features: Tensor, classifier: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    backend, _, dtype, wanted = arguments[6:10]
    return _fake_gradients(features, classifier, dtype, wanted, backend)


def _fake_gradients(
    features: Tensor, classifier: Tensor, dtype: torch.dtype, wanted: list[bool], backend: str
) -> Gradients:
    of_classifier = classifier.dtype if in_dtype_of_classifier(dtype, classifier.shape[0], backend) else None
    return empty_gradients(features, classifier, wanted, loss_dtype_of(dtype), of_classifier)


_LAYER = "Tensor features, Tensor classifier, Tensor? bias, Tensor target, "
_HOW = "str backend, int chunk, ScalarType dtype, "
_library = torch.library.Library(OPERATORS, "FRAGMENT")
_CHANGES = "float softcap=0., Tensor? target_shift=None, Tensor? scale=None"
_GRADIENTS = ", ".join(["Tensor"] * 5)
_library.define(
    f"linear_loss({_LAYER}Tensor knobs, Tensor? weight, int objective, int ignore_index, int reduction, "
    f"{_HOW}bool want_prediction, int[] wanted, {_CHANGES}, Tensor? row_weight=None)"
    f" -> (Tensor, Tensor, Tensor, {_GRADIENTS}, Tensor)"
)
_library.define(
    f"linear_gradient({_LAYER}Tensor fields, Tensor prediction, Tensor upstream, int ignore_index, {_HOW}int[] wanted, "
    f"{_CHANGES}, Tensor? others=None, Tensor? other_terms=None) -> ({_GRADIENTS})"
)


def finished(
    gradients: Any, dtypes: list[torch.dtype | None], anchors: list[Tensor], wanted: list[bool]
) -> list[Tensor | None]:
    """Summed gradients in the dtypes of what they belong to, able to say that there is no second derivative."""
    made: list[Tensor | None] = []
    for summed, dtype, want in zip(gradients, dtypes, wanted, strict=True):
        if want and anchors and torch.is_grad_enabled():
            made.append(DifferentiableOnce.apply(summed.to(dtype), *anchors))
        else:
            made.append(summed.to(dtype) if want else None)
    return made


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, classifier, bias, target, _, weight, objective, ignore_index, reduction, backend, chunk, dtype, *_ = (
        inputs
    )
    _, fields, prediction, *gradients = output
    if any(gradient.numel() for gradient in gradients) or inputs[14:] != (0.0, None, None, None):
        raise RuntimeError(
            "linear_loss is differentiable only without gradients of its own, row weights, and changes of its logits"
        )
    ctx.plan = (ignore_index, reduction, backend, chunk, dtype)
    ctx.mark_non_differentiable(fields, prediction, *gradients)
    ctx.save_for_backward(
        features,
        classifier,
        bias,
        target,
        weight,
        fields,
        prediction if OBJECTIVES[objective].needs_argmax else prediction.new_empty(0),
    )


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    features, classifier, bias, target, weight, fields, prediction = ctx.saved_tensors
    ignore_index, reduction, backend, chunk, dtype = ctx.plan
    if reduction == _MEAN:
        divisor = _divisor(target, len(classifier), weight, ignore_index, upstream.dtype)
        # Where it is 0 the gradient is 0 / 0, but for that of ignored rows: 0.
        upstream = upstream * torch.where(divisor == 0, torch.nan, 1 / divisor).to(upstream.dtype)
    wanted = list(ctx.needs_input_grad[:3])
    gradients = linear_gradient(
        features, classifier, bias, target, fields, prediction, upstream, ignore_index, backend, chunk, dtype, wanted
    )[:3]
    tensors = (features, classifier, bias)
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    anchors = [tensor for tensor, want in zip(tensors, wanted, strict=True) if want]
    return (*finished(gradients, dtypes, anchors, wanted), *(None,) * 15)


for _name, _run, _fake in (("loss", _linear_loss, _fake_loss), ("gradient", _linear_gradient, _fake_gradient)):
    _library.impl(f"linear_{_name}", _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{OPERATORS}::linear_{_name}", _fake, lib=_library)
linear_loss = operators.linear_loss.default
linear_gradient = operators.linear_gradient.default
# For what records the operator and differentiates it later: see dal_kernels.recorded.
torch.library.register_autograd(f"{OPERATORS}::linear_loss", _differentiate, setup_context=_remember, lib=_library)
