"""Operators of the loss fused with its classifier layer: chunks of rows through a matmul, a row kernel and two matmuls.

    linear_loss(features, classifier, bias, target, q, bootstrap_weight, weight, ignore_index, reduction, hard,
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

from dal_kernels.arguments import HALVES, Rows, raise_for_labels
from dal_kernels.fields import FIELDS, GRADIENT_FIELDS, REDUCTIONS
from dal_kernels.ops import KERNELS
from dal_kernels.reference import row_factors
from dal_kernels.slices import IGNORED, gradient

_MEAN = REDUCTIONS.index("mean")


def loss_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """Of a loss from logits of ``dtype``, and of all that is summed on the way."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_row_bytes(classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """What a row of a chunk takes: its logits, and where half matmuls cannot add up in float32, their copy that can."""
    copied = dtype in HALVES and not _adds_up_halves(device)
    return classes * (dtype.itemsize + (4 if copied else 0))


def _adds_up_halves(device: torch.device) -> bool:
    """Whether matmuls of half types can give and add to float32 there."""
    return device.type == "cuda" and torch.version.hip is None


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
        self.dtype, self.chunk, self.wanted = dtype, chunk, wanted
        self.sums = loss_dtype_of(dtype)
        self.gradients = _empty_gradients(features, classifier, wanted, self.sums)
        if len(features) == 0:
            for made in self.gradients:
                made.zero_()

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their features, their logits) by turns; all logits are in the same memory."""
        count, classes = len(self.features), len(self.classifier)
        room = self.features.new_empty((min(self.chunk, count), classes), dtype=self.dtype)
        for begin in range(0, count, self.chunk):
            features = self.features[begin : begin + self.chunk].to(self.dtype)
            logits = room[: len(features)]
            if self.bias is None:
                torch.mm(features, self.classifier.t(), out=logits)
            else:
                torch.addmm(self.bias, features, self.classifier.t(), out=logits)
            yield slice(begin, begin + len(features)), features, logits

    def add(self, rows: slice, features: Tensor, gradient: Tensor) -> None:
        """What the gradient (n, C) of the logits of some rows adds."""
        of_features, of_classifier, of_bias = self.gradients
        native = gradient.dtype == self.sums
        direct = not native and _adds_up_halves(gradient.device)
        if self.wanted[0]:
            if direct:
                of_features[rows] = torch.mm(gradient, self.classifier, out_dtype=self.sums)
            elif native:
                torch.mm(gradient, self.classifier, out=of_features[rows])
            else:
                of_features[rows] = gradient @ self.classifier
        if self.wanted[1]:
            if direct:  # not addmm, which in some versions of torch wants the sum in half precision too
                product = torch.mm(gradient.t(), features, out_dtype=self.sums)
                of_classifier.copy_(product) if rows.start == 0 else of_classifier.add_(product)
            else:
                of_classifier.addmm_(gradient.t().to(self.sums), features.to(self.sums), beta=min(1, rows.start))
        if self.wanted[2]:
            column_sums = gradient.sum(0, dtype=self.sums)
            of_bias.copy_(column_sums) if rows.start == 0 else of_bias.add_(column_sums)


def _empty_gradients(
    features: Tensor, classifier: Tensor, wanted: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (tuple(features.shape), tuple(classifier.shape), (classifier.shape[0],))
    made = [features.new_empty(s if want else (0,), dtype=dtype) for s, want in zip(shapes, wanted, strict=True)]
    return made[0], made[1], made[2]


def _of_rows(value: Tensor, rows: slice) -> Tensor:
    return value if value.dim() == 0 else value[rows]


def _kept_fields(want_prediction: bool, backend: str) -> int:
    return len(FIELDS) if want_prediction or backend == "cpu" else GRADIENT_FIELDS


def _linear_loss(
    features: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    target: Tensor,
    q: Tensor,
    bootstrap_weight: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    hard: bool,
    backend: str,
    chunk: int,
    dtype: torch.dtype,
    want_prediction: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    kernels = KERNELS[backend]
    loss, fields, prediction, *_ = _fake_loss(
        features, classifier, bias, target, q, bootstrap_weight, weight, ignore_index, 0, hard, backend, chunk, dtype,
        want_prediction, wanted
    )  # fmt: skip
    logits = features.new_empty((), dtype=dtype).expand(len(features), len(classifier))
    # Here, because a kernel would name a bad label by its row in the chunk.
    raise_for_labels(Rows(logits, target, q, bootstrap_weight, weight, ignore_index, "none", hard, False, target.shape))
    # Gradients are divided once they are summed, for a half type would lose them before. Where the divisor is 0 they
    # are 0 / 0, but for those of ignored rows: 0.
    upstream, factor = torch.ones((), dtype=loss.dtype, device=loss.device), None
    if reduction == _MEAN:
        divisor = row_factors(target, len(classifier), weight, ignore_index, loss.dtype).sum(dtype=torch.float64)
        upstream = torch.where(divisor == 0, torch.nan, upstream)
        factor = torch.where(divisor == 0, 1.0, 1 / divisor).to(loss.dtype)
    with torch.autocast(features.device.type, enabled=False):
        layer = LayerInChunks(features, classifier, bias, dtype, chunk, wanted)
        for rows, inputs, logits in layer.chunks():
            arguments = (
                logits, target[rows], _of_rows(q, rows), _of_rows(bootstrap_weight, rows), weight, ignore_index, 0,
                hard, False
            )  # fmt: skip
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
            of_rows = fields[: GRADIENT_FIELDS + 1, rows].contiguous()
            argmax = prediction[rows] if prediction.numel() else prediction
            part = _of_rows(upstream, rows)
            made = gradient(logits, target[rows], of_rows, argmax, part, backend, in_place=True)
            layer.add(rows, inputs, made)
    return layer.gradients


def _fake_loss(features: Tensor, classifier: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, reduction, _, backend, _, dtype, want_prediction, wanted = arguments
    rows, sums = features.shape[0], loss_dtype_of(dtype)
    loss = features.new_empty((rows,) if reduction == 0 else (), dtype=sums)
    fields = features.new_empty((_kept_fields(want_prediction, backend), rows), dtype=sums)
    prediction = features.new_empty((rows,) if want_prediction else (0,), dtype=torch.int64)
    return loss, fields, prediction, *_empty_gradients(features, classifier, wanted, sums)


def _fake_gradient(features: Tensor, classifier: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, dtype, wanted = arguments
    return _empty_gradients(features, classifier, wanted, loss_dtype_of(dtype))


_LAYER = "Tensor features, Tensor classifier, Tensor? bias, Tensor target, "
_HOW = "str backend, int chunk, ScalarType dtype, "
_library = torch.library.Library("dal_kernels", "FRAGMENT")
_library.define(
    f"linear_loss({_LAYER}Tensor q, Tensor bootstrap_weight, Tensor? weight, int ignore_index, int reduction, "
    f"bool hard, {_HOW}bool want_prediction, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_gradient({_LAYER}Tensor fields, Tensor prediction, Tensor upstream, int ignore_index, {_HOW}bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)"
)
for _name, _run, _fake in (("loss", _linear_loss, _fake_loss), ("gradient", _linear_gradient, _fake_gradient)):
    _library.impl(f"linear_{_name}", _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dal_kernels::linear_{_name}", _fake, lib=_library)
linear_loss = torch.ops.dal_kernels.linear_loss.default
linear_gradient = torch.ops.dal_kernels.linear_gradient.default
