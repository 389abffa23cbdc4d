"""What Python knows of the CUDA C++ operators of csrc/cuda."""

from __future__ import annotations

from torch import Tensor

from dal_kernels.layouts import MOST_APART_ON_GPU, lies_apart, rows_of
from dal_kernels.objectives import OBJECTIVES

# Rows of more classes than a cluster of blocks keeps, and so few of them that a block each leaves a device idle: their
# gradient is made in the backward, by as many blocks as there is work for.
_LONG, _FEW = 262144, 128


def writes_gradient(logits: Tensor, objective: int) -> bool:
    """Whether the forward should write the gradient. Kernels of rows one beside the other do so of no wide loss."""
    if logits.dim() == 3 and lies_apart(logits, MOST_APART_ON_GPU):
        return True
    return not OBJECTIVES[objective].is_wide and (logits.shape[1] <= _LONG or rows_of(logits) >= _FEW)
