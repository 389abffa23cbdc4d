"""How logits lie that an operator is given, (N, C) or (B, C, S).

Row b S + s of logits (B, C, S) is [b, :, s]. Where classes are neighbours in memory, or are copied to be, rows are read
one beside the other, and their gradient has classes that are neighbours too. Where positions are, as in images (N, C,
H, W), lanes lie over those, and the gradient has that layout: nothing is copied.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from dal_kernels.backends.triton.record import empty
from dal_kernels.layouts import lies_apart


class Layout(NamedTuple):
    """Where the rows of a call lie.

    Attributes:
        logits: (N, C) with unit class stride, or where rows lie apart what was given, (B, C, S).
        rows, classes: N = B S, and C.
        row_stride, class_stride: between neighbouring rows (of one image), and between neighbouring classes.
        inner, outer_stride: S and the stride of images where rows lie apart, else 1 and 0.
        apart: whether they do.
        vector: so many neighbouring positions are neighbours in memory, from an address that so many elements divide,
            in the logits and in the gradient: a power of two, at most 16 bytes.
    """

    logits: Tensor
    rows: int
    classes: int
    row_stride: int
    class_stride: int
    inner: int = 1
    outer_stride: int = 0
    apart: bool = False
    vector: int = 1

    def empty_gradient(self, given: Tensor) -> Tensor:
        """Of the shape of the logits as they were given, and with classes apart where theirs are."""
        if given.dim() == 2 or self.apart:
            return empty(given, tuple(given.shape))
        batch, classes, inner = given.shape
        return empty(given, (batch, inner, classes)).transpose(1, 2)

    def of_kernel(self) -> tuple[Any, ...]:
        """What kernels of rows take first."""
        return self.logits, self.row_stride, self.class_stride, self.inner, self.outer_stride


def layout_of(given: Tensor) -> Layout:
    """Logits (N, C) or (B, C, S) are read where they lie, or a copy of them is."""
    if given.dim() == 3 and lies_apart(given):
        batch, classes, inner = given.shape
        outer_stride, class_stride, inner_stride = given.stride()
        # Of one image the stride says nothing, nor does that of one position.
        vector = math.gcd(16 // given.element_size(), inner, class_stride, outer_stride if batch > 1 else 0)
        vector = vector if inner_stride == 1 else 1
        return Layout(given, batch * inner, classes, inner_stride, class_stride, inner, outer_stride, True, vector)
    rows = given if given.dim() == 2 else given.transpose(1, 2).reshape(-1, given.shape[1])
    if rows.stride(1) != 1 and rows.shape[1] != 1:
        rows = rows.contiguous()
    count, classes = rows.shape
    return Layout(rows, count, classes, rows.stride(0), 1)


def lies_as_made(gradient: Tensor, layout: Layout) -> bool:
    """Whether a gradient lies as :meth:`Layout.empty_gradient` makes it."""
    if gradient.dim() == 3 and not layout.apart:
        gradient = gradient.transpose(1, 2)
    return gradient.is_contiguous()


def fills_its_memory(gradient: Tensor) -> bool:
    """Whether a gradient fills its memory, in one of the orders that :meth:`Layout.empty_gradient` makes."""
    return gradient.is_contiguous() or (gradient.dim() == 3 and gradient.transpose(1, 2).is_contiguous())
