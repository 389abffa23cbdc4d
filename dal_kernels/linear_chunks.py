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

    def of(self, rows: slice) -> Changes:
        """Those of some rows."""
        return self if self.target_shift is None else self._replace(target_shift=self.target_shift[rows])


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
    features: Tensor,
    classifier: Tensor,
    wanted: Sequence[bool | int],
    dtype: torch.dtype,
    of_classifier: torch.dtype | None = None,
) -> Gradients:
    """Room for those gradients that are wanted; what ``wanted`` does not reach is not.

    Args:
        of_classifier: dtype of the classifier's gradient, if it is another one.
    """
    shapes = (tuple(features.shape), tuple(classifier.shape), (classifier.shape[0],), (), (features.shape[0],))
    dtypes = (dtype, of_classifier or dtype, dtype, dtype, dtype)
    of_each = zip(shapes, dtypes, [*wanted, *[False] * (len(shapes) - len(wanted))], strict=True)
    return Gradients(*(features.new_empty(shape if want else (0,), dtype=of) for shape, of, want in of_each))


def change(logits: Tensor, target: Tensor, changes: Changes, tanh: Tensor) -> None:
    """Logits (n, C) of rows as the softmax takes them, in their place, but for an outer scale: see LayerGradients.

    Args:
        target: (n,), of which any that is no class of these logits has no shift.
        changes: of these rows.
        tanh: room (n, C) for what :func:`change_back` needs of a capped logit.
    """
    softcap, shift, scale = changes
    if softcap:
        torch.div(logits, softcap, out=tanh).tanh_()
        torch.mul(tanh, softcap if scale is None else softcap * scale, out=logits)
    if shift is not None:
        place, known = _places(logits, target)
        value = torch.where(known, shift if scale is None else shift * scale, 0).to(logits.dtype)
        logits.scatter_add_(1, place.unsqueeze(1), value.unsqueeze(1))


def _places(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(a class to look at, whether it is the target) of each row."""
    known = (target >= 0) & (target < logits.shape[1])
    return torch.where(known, target, 0), known


class LayerGradients:
    """The gradients of a layer, as parts of its logits add to them.

    A scale is that of the features and of the bias where no cap comes in between: an outer one.
    """

    def __init__(
        self,
        features: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        wanted: Sequence[bool | int],
        changes: Changes,
        of_classifier: torch.dtype | None = None,
    ) -> None:
        self.features, self.changes, self.dtype = features, changes, dtype
        self.sums = loss_dtype_of(dtype)
        self.outer_scale = None if changes.softcap else changes.scale
        self.given_bias, self.bias = bias, None if bias is None else self.scaled(bias)
        self.wanted = [bool(want) for want in wanted] + [False] * (5 - len(wanted))
        self.makes = list(self.wanted)
        if self.wanted[3] and self.outer_scale is not None:  # whose gradient is made of those of features and bias
            self.makes[0], self.makes[2] = True, bias is not None
        self.gradients = empty_gradients(features, classifier, self.makes, self.sums, of_classifier)
        self.gradients.target_shift.zero_()
        if len(features) == 0:
            for made in self.gradients:
                made.zero_()
        self.of_scale = features.new_zeros((), dtype=self.sums)

    def scaled(self, values: Tensor) -> Tensor:
        """Features or the bias in the dtype of the logits, times an outer scale."""
        if self.outer_scale is None:
            return values.to(self.dtype)
        return (values.to(self.sums) * self.outer_scale).to(self.dtype)

    def change_back(self, rows: slice, gradient: Tensor, target: Tensor, tanh: Tensor) -> None:
        """The gradient of changed logits of rows -> that of logits before their change, in its place."""
        softcap, shift, scale = self.changes.of(rows)
        *_, of_scale, of_shift = self.makes
        if shift is not None and (of_scale or of_shift):
            place, known = _places(gradient, target)
            at_target = torch.where(known, gradient.gather(1, place.unsqueeze(1)).squeeze(1), 0).to(self.sums)
            if of_shift:
                self.gradients.target_shift[rows] += at_target if scale is None else at_target * scale
            if of_scale:
                self.of_scale += (at_target * shift).sum()
        if softcap:
            if of_scale:
                # A few rows at a time where they are widened first: the sum of a row of halves would be rounded to one.
                size = len(gradient) if gradient.dtype == self.sums else 8
                for some, those in zip(gradient.split(size), tanh.split(size), strict=True):
                    self.of_scale += softcap * torch.linalg.vecdot(some.to(self.sums), those.to(self.sums)).sum()
            gradient.addcmul_(gradient, tanh.square_(), value=-1)
            if scale is not None:
                gradient.mul_(scale)

    def finish(self, factor: Tensor | None = None) -> Gradients:
        """The gradients that are wanted, times ``factor``."""
        made, scale = self.gradients, self.outer_scale
        if self.makes[3]:
            # z is linear in what makes it, so that sum g z is what the gradients of features and bias say of them.
            if scale is not None:
                self.of_scale += (made.features * self.features).sum()
                if self.given_bias is not None:  # not the scaled one, which at a scale of 0 says nothing
                    self.of_scale += (made.bias * self.given_bias).sum()
            made.scale.copy_(self.of_scale)
        if scale is not None:  # in that of the classifier it is already: it stands in the features
            made.features.mul_(scale)
            made.bias.mul_(scale)
        if factor is not None:
            for gradient in made:
                gradient.mul_(factor)
        of_each = zip(made, self.wanted, strict=True)
        return Gradients(*(gradient if want else gradient.new_empty(0) for gradient, want in of_each))


class LayerInChunks(LayerGradients):
    """All classes of some rows at a time."""

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
        super().__init__(features, classifier, bias, dtype, wanted, changes)
        self.target = features.new_empty(len(features), dtype=torch.int64) if target is None else target
        self.chunk = min(chunk, len(features))
        self.classifier = classifier.to(dtype)
        self.widened = dtype in HALVES and not multiplies_halves(dtype, features.device)
        # In which matmuls are made that do not add to anything.
        self.factors = self.sums if self.widened else dtype
        # The logits of a chunk, then their gradient, in float32 where that is not their own dtype.
        self.wide = features.new_empty((self.chunk if self.widened else 0, len(classifier)), dtype=self.sums)
        self.tanh = features.new_empty((self.chunk if changes.keeps_logits else 0, len(classifier)), dtype=dtype)

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their features, their logits) by turns; all logits are in the same memory."""
        count = len(self.features)
        room = self.features.new_empty((self.chunk, len(self.classifier)), dtype=self.dtype)
        bias = None if self.bias is None else self.bias.to(self.factors)
        for begin in range(0, count, max(1, self.chunk)):
            rows = slice(begin, min(begin + self.chunk, count))
            features = self.scaled(self.features[rows])
            logits = room[: len(features)]
            products = self.wide[: len(features)] if self.widened else logits
            for classes, part in self._parts():
                if bias is None:
                    torch.mm(features.to(self.factors), part.t(), out=products[:, classes])
                else:
                    torch.addmm(bias[classes], features.to(self.factors), part.t(), out=products[:, classes])
            if self.widened:
                logits.copy_(products)
            change(logits, self.target[rows], self.changes.of(rows), self.tanh[: len(logits)])
            yield rows, features, logits

    def add(self, rows: slice, features: Tensor, gradient: Tensor) -> None:
        """What the gradient (n, C) of the logits of some rows adds."""
        of_features, of_classifier, of_bias, *_ = self.gradients
        self.change_back(rows, gradient, self.target[rows], self.tanh[: len(gradient)])
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

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """(classes, their rows of the classifier) as matmuls take them: all at once, or widened a few at a time."""
        classes, width = self.classifier.shape
        size = max(1, _WIDENED_BYTES // (4 * max(1, width))) if self.widened else classes
        for begin in range(0, max(1, classes), max(1, size)):  # once where there is no class: sums must become 0
            part = self.classifier[begin : begin + size]
            yield slice(begin, begin + len(part)), part.to(self.factors)
