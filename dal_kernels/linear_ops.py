"""Operators of the loss fused with its classifier layer: chunks of rows through a matmul, a row kernel and two matmuls.

    linear_loss(features, classifier, bias, target, knobs, weight, objective, ignore_index, reduction,
                backend, chunk, dtype, want_prediction, wanted)
        -> (loss, fields, prediction, features' gradient, classifier's, bias's)
    linear_gradient(features, classifier, bias, target, fields, prediction, upstream, ignore_index,
                    backend, chunk, dtype, wanted) -> (features' gradient, classifier's, bias's)

with features (N, D), classifier (C, D), ``chunk`` rows at a time, logits in ``dtype``, ``wanted`` saying which of the
three gradients to make (the others come back empty) and ``backend`` whose row kernels. Gradients are in the dtype of
the loss, summed over the chunks in it, and divided for a mean. The gradient of a chunk takes the place of its logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dal_kernels.arguments import Call, raise_for_labels
from dal_kernels.fields import GRADIENT_FIELDS, NARROW_FIELDS, REDUCTIONS, loss_dtype_of
from dal_kernels.layer import adds_up_halves, multiplies_halves
from dal_kernels.objectives import OBJECTIVES
from dal_kernels.once import DifferentiableOnce
from dal_kernels.ops import KERNELS, kept_fields
from dal_kernels.reference import row_factors
from dal_kernels.slices import IGNORED, gradient
from dal_kernels.tensors import HALVES

_MEAN = REDUCTIONS.index("mean")

# Of a copy of some of the classifier's rows in float32: stays in a cache, and is large enough for a matmul.
_WIDENED_BYTES = 4 << 20


class LayerInChunks:
    """The classifier in the dtype of the logits, and its gradients as they add up."""

    def __init__(
        self,
        features: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        chunk: int,
        wanted: list[bool],
    ) -> None:
        self.features = features
        self.classifier, self.bias = classifier.to(dtype), None if bias is None else bias.to(dtype)
        self.dtype, self.chunk, self.wanted = dtype, min(chunk, len(features)), wanted
        self.sums = loss_dtype_of(dtype)
        self.widened = dtype in HALVES and not multiplies_halves(dtype, features.device)
        # In which matmuls are made that do not add to anything.
        self.factors = self.sums if self.widened else dtype
        # The logits of a chunk, then their gradient, in float32 where that is not their own dtype.
        self.wide = features.new_empty((self.chunk if self.widened else 0, len(classifier)), dtype=self.sums)
        self.gradients = _empty_gradients(features, classifier, wanted, self.sums)
        if len(features) == 0:
            for made in self.gradients:
                made.zero_()

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their features, their logits) by turns; all logits are in the same memory."""
        count = len(self.features)
        room = self.features.new_empty((self.chunk, len(self.classifier)), dtype=self.dtype)
        bias = None if self.bias is None else self.bias.to(self.factors)
        for begin in range(0, count, max(1, self.chunk)):
            features = self.features[begin : begin + self.chunk].to(self.dtype)
            logits = room[: len(features)]
            products = self.wide[: len(features)] if self.widened else logits
            for classes, part in self._parts():
                if bias is None:
                    torch.mm(features.to(self.factors), part.t(), out=products[:, classes])
                else:
                    torch.addmm(bias[classes], features.to(self.factors), part.t(), out=products[:, classes])
            if self.widened:
                logits.copy_(products)
            yield slice(begin, begin + len(features)), features, logits

    def add(self, rows: slice, features: Tensor, gradient: Tensor) -> None:
        """What the gradient (n, C) of the logits of some rows adds."""
        of_features, of_classifier, of_bias = self.gradients
        halves = self.factors != self.sums
        direct = halves and adds_up_halves(gradient.device)
        factors = self.wide[: len(gradient)].copy_(gradient) if self.widened else gradient
        if self.wanted[0]:
            if direct:
                of_features[rows] = torch.mm(gradient, self.classifier, out_dtype=self.sums)
            elif halves:
                of_features[rows] = gradient @ self.classifier
            else:
                for classes, part in self._parts():
                    of_features[rows].addmm_(factors[:, classes], part, beta=min(1, classes.start))
        if self.wanted[1]:
            if direct:  # not addmm, which in some versions of torch wants the sum in half precision too
                product = torch.mm(gradient.t(), features, out_dtype=self.sums)
                of_classifier.copy_(product) if rows.start == 0 else of_classifier.add_(product)
            else:
                of_classifier.addmm_(factors.t().to(self.sums), features.to(self.sums), beta=min(1, rows.start))
        if self.wanted[2]:
            column_sums = gradient.sum(0, dtype=self.sums)
            of_bias.copy_(column_sums) if rows.start == 0 else of_bias.add_(column_sums)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """(classes, their rows of the classifier) as matmuls take them: all at once, or widened a few at a time."""
        classes, width = self.classifier.shape
        size = max(1, _WIDENED_BYTES // (4 * max(1, width))) if self.widened else classes
        for begin in range(0, max(1, classes), max(1, size)):  # once where there is no class: sums must become 0
            part = self.classifier[begin : begin + size]
            yield slice(begin, begin + len(part)), part.to(self.factors)


def _empty_gradients(
    features: Tensor, classifier: Tensor, wanted: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (tuple(features.shape), tuple(classifier.shape), (classifier.shape[0],))
    made = [features.new_empty(s if want else (0,), dtype=dtype) for s, want in zip(shapes, wanted, strict=True)]
    return made[0], made[1], made[2]


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
) -> tuple[Tensor, ...]:
    kernels = KERNELS[backend]
    loss, fields, prediction, *_ = _fake_loss(
        features, classifier, bias, target, knobs, weight, objective, ignore_index, 0, backend, chunk, dtype,
        want_prediction, wanted
    )  # fmt: skip
    logits = features.new_empty((), dtype=dtype).expand(len(features), len(classifier))
    # Here, because a kernel would name a bad label by its row in the chunk.
    raise_for_labels(
        Call(logits, target, knobs, weight, OBJECTIVES[objective], ignore_index, "none", False, target.shape)
    )
    # Gradients are divided once they are summed, for a half type would lose them before. Where the divisor is 0 they
    # are 0 / 0, but for those of ignored rows: 0.
    upstream, factor = torch.ones((), dtype=loss.dtype, device=loss.device), None
    if reduction == _MEAN:
        divisor = _divisor(target, len(classifier), weight, ignore_index, loss.dtype)
        upstream = torch.where(divisor == 0, torch.nan, upstream)
        factor = torch.where(divisor == 0, 1.0, 1 / divisor).to(loss.dtype)
    with torch.autocast(features.device.type, enabled=False):
        layer = LayerInChunks(features, classifier, bias, dtype, chunk, wanted)
        for rows, inputs, logits in layer.chunks():
            of_knobs = knobs if knobs.dim() == 1 else knobs[rows]
            arguments = (logits, target[rows], of_knobs, weight, objective, ignore_index, 0, False)
            loss[rows], _, of_rows, argmax, *correction = kernels.loss_and_fields(*arguments, want_prediction)
            fields[:, rows] = of_rows
            if want_prediction:
                prediction[rows] = argmax
            if any(wanted):
                arguments = (target[rows], of_rows, argmax, upstream, ignore_index, *correction)
                layer.add(rows, inputs, kernels.overwrite(logits, *arguments))
    if reduction:
        total = loss.sum(dtype=torch.float64)
        if factor is not None:
            total = total / divisor
            for made in layer.gradients:
                made.mul_(factor)
        loss = total.to(loss.dtype)
    return loss, fields, prediction, *layer.gradients


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
) -> tuple[Tensor, ...]:
    # A negative label that is none (on a GPU: its row is NaN) must not be taken for an ignored one.
    target = torch.where(target == ignore_index, IGNORED, torch.where(target < 0, len(classifier), target))
    with torch.autocast(features.device.type, enabled=False):
        layer = LayerInChunks(features, classifier, bias, dtype, chunk, wanted)
        for rows, inputs, logits in layer.chunks():
            # Those of a narrow objective end before what a gradient needs no more.
            wide = len(fields) > NARROW_FIELDS
            of_rows = fields[: None if wide else GRADIENT_FIELDS + 1, rows].contiguous()
            argmax = prediction[rows] if prediction.numel() else prediction
            part = upstream if upstream.dim() == 0 else upstream[rows]
            made = gradient(logits, target[rows], of_rows, argmax, part, backend, in_place=True)
            layer.add(rows, inputs, made)
    return layer.gradients


def _fake_loss(features: Tensor, classifier: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, objective, _, reduction, backend, _, dtype, want_prediction, wanted = arguments
    rows, sums = features.shape[0], loss_dtype_of(dtype)
    loss = features.new_empty((rows,) if reduction == 0 else (), dtype=sums)
    fields = features.new_empty((kept_fields(objective, want_prediction or backend == "cpu"), rows), dtype=sums)
    prediction = features.new_empty((rows,) if want_prediction else (0,), dtype=torch.int64)
    return loss, fields, prediction, *_empty_gradients(features, classifier, wanted, sums)


def _fake_gradient(features: Tensor, classifier: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, dtype, wanted = arguments
    return _empty_gradients(features, classifier, wanted, loss_dtype_of(dtype))


_LAYER = "Tensor features, Tensor classifier, Tensor? bias, Tensor target, "
_HOW = "str backend, int chunk, ScalarType dtype, "
_library = torch.library.Library("dal_kernels", "FRAGMENT")
_library.define(
    f"linear_loss({_LAYER}Tensor knobs, Tensor? weight, int objective, int ignore_index, int reduction, "
    f"{_HOW}bool want_prediction, int[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_gradient({_LAYER}Tensor fields, Tensor prediction, Tensor upstream, int ignore_index, {_HOW}int[] wanted)"
    " -> (Tensor, Tensor, Tensor)"
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
    if any(gradient.numel() for gradient in gradients):
        raise RuntimeError("linear_loss makes the gradients it is asked for: only without them is it differentiable")
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
    )
    tensors = (features, classifier, bias)
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    anchors = [tensor for tensor, want in zip(tensors, wanted, strict=True) if want]
    return (*finished(gradients, dtypes, anchors, wanted), *(None,) * 11)


for _name, _run, _fake in (("loss", _linear_loss, _fake_loss), ("gradient", _linear_gradient, _fake_gradient)):
    _library.impl(f"linear_{_name}", _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dal_kernels::linear_{_name}", _fake, lib=_library)
linear_loss = torch.ops.dal_kernels.linear_loss.default
linear_gradient = torch.ops.dal_kernels.linear_gradient.default
# For what records the operator and differentiates it later: see dal_kernels.recorded.
torch.library.register_autograd("dal_kernels::linear_loss", _differentiate, setup_context=_remember, lib=_library)
