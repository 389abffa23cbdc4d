"""Where a kernel finds rows that lie apart: row b S + s of logits (B, C, S), and of their gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def image_and_position(first, row, live, inner):
    """Where rows first + row are among the images and in one. A row past the last is where the first one is.

    So whatever is read of it is there to be read, and needs no mask.
    """
    image = first // inner
    position = (first - image * inner).to(inner.dtype) + tl.where(live, row, 0)
    further = position // inner
    return image + further, position - further * inner


@triton.jit
def apart_at(image, position, outer_stride, inner_stride, VECTOR: tl.constexpr):
    """The offsets of rows, and what the compiler is to know of them: :attr:`plan.LaunchPlan.vector`."""
    offset = image * outer_stride + position.to(tl.int64) * inner_stride
    return tl.max_contiguous(tl.multiple_of(offset, VECTOR), VECTOR)


@triton.jit
def class_step(stride, VECTOR: tl.constexpr):
    """The stride of classes, likewise: a product, because the compiler takes no hints of scalars."""
    return stride.to(tl.int64) // VECTOR * VECTOR
