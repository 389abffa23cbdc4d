"""A classifier layer before a loss, a chunk of rows at a time: their logits, and what their gradient adds to others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dal_kernels.fields import loss_dtype_of
from dal_kernels.layer import adds_up_halves, multiplies_halves
from dal_kernels.tensors import HALVES

# Of a copy of some of the classifier's rows in float32: stays in a cache, and is large enough for a matmul.
_WIDENED_BYTES = 4 << 20


class Changes(NamedTuple):
    """What becomes of the logits z of a layer before the softmax: u = scale (cap(z) + target_shift e_y).

    Attributes:
        softcap: of cap(z) = softcap tanh(z / softcap); 0 for cap(z) = z.
        target_shift: (N,) in the dtype of the loss, or None.
        scale: (), in the dtype of the loss, or None.
    """

    softcap: float = 0.0
    target_shift: Tensor | None = None
    scale: Tensor | None = None

    @property
    def nothing(self) -> bool:
        """Whether logits stay as they are."""
        return self.softcap == 0 and self.target_shift is None and self.scale is None

    @property
    def keeps_logits(self) -> bool:
        """Whether the derivative needs something of a chunk's logits once their gradient has taken their place."""
        return self.softcap != 0


UNCHANGED = Changes()


class Gradients(NamedTuple):
    """Of the features (N, D), the classifier (C, D), its bias (C,), the scale () and the target shift (N,).

    In the dtype of the loss; (0,) where it is not made.
    """

    features: Tensor
    classifier: Tensor
    bias: Tensor
    scale: Tensor
    target_shift: Tensor


def empty_gradients(
    features: Tensor, classifier: Tensor, wanted: Sequence[bool | int], dtype: torch.dtype
) -> Gradients:
    """Room for those gradients that are wanted; what ``wanted`` does not reach is not."""
    shapes = (tuple(features.shape), tuple(classifier.shape), (classifier.shape[0],), (), (features.shape[0],))
    every = [*wanted, *[False] * (len(shapes) - len(wanted))]
    return Gradients(
        *(features.new_empty(s if want else (0,), dtype=dtype) for s, want in zip(shapes, every, strict=True))
    )


class LayerInChunks:
    """The classifier in the dtype of the logits, and its gradients as they add up."""

    def __init__(
        self,
        features: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        chunk: int,
        wanted: Sequence[bool | int],
        target: Tensor | None = None,
        changes: Changes = UNCHANGED,
    ) -> None:
        self.features, self.target, self.changes = features, target, changes
        self.dtype, self.chunk, self.wanted = dtype, min(chunk, len(features)), wanted
        self.sums = loss_dtype_of(dtype)
        self.classifier, self.bias = classifier.to(dtype), None if bias is None else bias.to(dtype)
        # A scale is that of the features and the bias where nothing else comes in between.
        self.outer_scale = None if changes.softcap else changes.scale
        if self.outer_scale is not None and self.bias is not None:
            self.bias = (self.bias.to(self.sums) * self.outer_scale).to(dtype)
        self.widened = dtype in HALVES and not multiplies_halves(dtype, features.device)
        # In which matmuls are made that do not add to anything.
        self.factors = self.sums if self.widened else dtype
        # The logits of a chunk, then their gradient, in float32 where that is not their own dtype.
        self.wide = features.new_empty((self.chunk if self.widened else 0, len(classifier)), dtype=self.sums)
        kept = self.chunk if changes.keeps_logits else 0
        self.tanh = features.new_empty((kept, len(classifier)), dtype=dtype)
        self.makes = self._made(wanted, bias)
        self.gradients = empty_gradients(features, classifier, self.makes, self.sums)
        if len(features) == 0:
            for made in self.gradients:
                made.zero_()
        self.of_scale = features.new_zeros((), dtype=self.sums)

    def _made(self, wanted: Sequence[bool | int], bias: Tensor | None) -> list[bool]:
        """Which gradients to make: those that are wanted, and those that the gradient of the scale is made of."""
        makes = [bool(want) for want in wanted] + [False] * (5 - len(wanted))
        if makes[3] and self.outer_scale is not None:
            makes[0], makes[2] = True, bias is not None
        return makes

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their features, their logits) by turns; all logits are in the same memory."""
        count = len(self.features)
        room = self.features.new_empty((self.chunk, len(self.classifier)), dtype=self.dtype)
        bias = None if self.bias is None else self.bias.to(self.factors)
        for begin in range(0, count, max(1, self.chunk)):
            rows = slice(begin, min(begin + self.chunk, count))
            features = self.features[rows].to(self.dtype)
            if self.outer_scale is not None:
                features = (features.to(self.sums) * self.outer_scale).to(self.dtype)
            logits = room[: len(features)]
            products = self.wide[: len(features)] if self.widened else logits
            for classes, part in self._parts():
                if bias is None:
                    torch.mm(features.to(self.factors), part.t(), out=products[:, classes])
                else:
                    torch.addmm(bias[classes], features.to(self.factors), part.t(), out=products[:, classes])
            if self.widened:
                logits.copy_(products)
            self._change(rows, logits)
            yield rows, features, logits

    def add(self, rows: slice, features: Tensor, gradient: Tensor) -> None:
        """What the gradient (n, C) of the logits of some rows adds."""
        of_features, of_classifier, of_bias, *_ = self.gradients
        self._change_back(rows, gradient)
        halves = self.factors != self.sums
        direct = halves and adds_up_halves(gradient.device)
        factors = self.wide[: len(gradient)].copy_(gradient) if self.widened else gradient
        if self.makes[0]:
            if direct:
                of_features[rows] = torch.mm(gradient, self.classifier, out_dtype=self.sums)
            elif halves:
                of_features[rows] = gradient @ self.classifier
            else:
                for classes, part in self._parts():
                    of_features[rows].addmm_(factors[:, classes], part, beta=min(1, classes.start))
        if self.makes[1]:
            if direct:  # not addmm, which in some versions of torch wants the sum in half precision too
                product = torch.mm(gradient.t(), features, out_dtype=self.sums)
                of_classifier.copy_(product) if rows.start == 0 else of_classifier.add_(product)
            else:
                of_classifier.addmm_(factors.t().to(self.sums), features.to(self.sums), beta=min(1, rows.start))
        if self.makes[2]:
            column_sums = gradient.sum(0, dtype=self.sums)
            of_bias.copy_(column_sums) if rows.start == 0 else of_bias.add_(column_sums)

    def finish(self, factor: Tensor | None = None) -> Gradients:
        """The gradients of all rows, times ``factor``."""
        made, scale = self.gradients, self.outer_scale
        if self.makes[3]:
            # z is linear in what makes it, so that sum g z is what the gradients of features and bias say of them.
            if scale is not None:
                self.of_scale += (made.features * self.features).sum()
                if self.bias is not None:
                    self.of_scale += (made.bias * self.bias).sum() / scale
            made.scale.copy_(self.of_scale)
        if scale is not None:
            # Of the classifier it stands in the features.
            for inner in (made.features, made.bias):
                inner.mul_(scale)
        if factor is not None:
            for inner in made:
                inner.mul_(factor)
        wanted = [*self.wanted, *[False] * (5 - len(self.wanted))]
        return Gradients(*(inner if want else inner.new_empty(0) for inner, want in zip(made, wanted, strict=True)))

    def _change(self, rows: slice, logits: Tensor) -> None:
        """Logits as the softmax takes them, in their place."""
        softcap, shift, scale = self.changes
        if softcap:
            tanh = self.tanh[: len(logits)]
            torch.div(logits, softcap, out=tanh).tanh_()
            torch.mul(tanh, softcap if scale is None else softcap * scale, out=logits)
        if shift is not None:
            place, known = self._places(rows)
            value = shift[rows] if scale is None else shift[rows] * scale
            value = torch.where(known, value, 0).to(logits.dtype)
            logits.scatter_add_(1, place.unsqueeze(1), value.unsqueeze(1))

    def _change_back(self, rows: slice, gradient: Tensor) -> None:
        """The gradient of changed logits -> that of what the layer gives (without an outer scale), in its place."""
        softcap, shift, scale = self.changes
        of_scale, of_shift = self.makes[3:]
        if shift is not None and (of_scale or of_shift):
            place, known = self._places(rows)
            at_target = torch.where(known, gradient.gather(1, place.unsqueeze(1)).squeeze(1), 0).to(self.sums)
            if of_shift:
                self.gradients.target_shift[rows] = at_target if scale is None else at_target * scale
            if of_scale:
                self.of_scale += (at_target * shift[rows]).sum()
        if softcap:
            tanh = self.tanh[: len(gradient)]
            if of_scale:
                self.of_scale += softcap * torch.linalg.vecdot(gradient, tanh).sum(dtype=self.sums)
            gradient.addcmul_(gradient, tanh.square_(), value=-1)
            if scale is not None:
                gradient.mul_(scale)

    def _places(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(a class to look at, whether it is the target) of each row."""
        assert self.target is not None
        target = self.target[rows]
        known = (target >= 0) & (target < len(self.classifier))
        return torch.where(known, target, 0), known

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """(classes, their rows of the classifier) as matmuls take them: all at once, or widened a few at a time."""
        classes, width = self.classifier.shape
        size = max(1, _WIDENED_BYTES // (4 * max(1, width))) if self.widened else classes
        for begin in range(0, max(1, classes), max(1, size)):  # once where there is no class: sums must become 0
            part = self.classifier[begin : begin + size]
            yield slice(begin, begin + len(part)), part.to(self.factors)
