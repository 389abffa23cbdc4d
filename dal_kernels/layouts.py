"""How logits (N, C) or (B, C, S) lie in memory, as all backends see it. Row b S + s of the latter is [b, :, s]."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows whose classes lie apart are read where they lie up to so many classes, and copied from there on: as
# csrc/cpu/layouts.h has it too, and on a GPU csrc/cuda/layouts.h, because more would leave the registers.
MOST_APART_ON_CPU, MOST_APART_ON_GPU = 1 << 14, 384


def rows_of(logits: Tensor) -> int:
    return logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[2]


def lies_apart(logits: Tensor, most: int = MOST_APART_ON_GPU) -> bool:
    """Whether rows of logits (B, C, S) are read, and their gradient written, with classes that are no neighbours."""
    classes = logits.shape[1]
    return 1 < classes <= most and logits.stride(1) != 1 and logits.dtype != torch.float64


def empty_gradient(logits: Tensor, most: int) -> Tensor:
    """As a backend makes it that reads rows of ``most`` classes where they lie apart."""
    if logits.dim() == 2:
        return logits.new_empty(tuple(logits.shape))
    if lies_apart(logits, most):
        return logits.new_empty(tuple(logits.shape))
    batch, classes, inner = logits.shape
    return logits.new_empty((batch, inner, classes)).transpose(1, 2)
