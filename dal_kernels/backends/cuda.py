"""What Python adds to the CUDA C++ operators of csrc/cuda: which of them a training step takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dal_kernels.objectives import OBJECTIVES

# Rows of more classes than a cluster of blocks keeps, and so few of them that a block each leaves a device idle: their
# gradient is made in the backward, by as many blocks as there is work for.
_LONG, _FEW = 262144, 128


def writes_gradient(logits: Tensor, objective: int) -> bool:
    """Whether the forward should write the gradient. The kernels that do know no sums of wide objectives."""
    rows, classes = logits.shape
    return not OBJECTIVES[objective].is_wide and (classes <= _LONG or rows >= _FEW)


def rescale(saved: tuple[Tensor, ...], upstream: Tensor, ignore_index: int, recompute: bool, _: Any) -> Tensor:
    """The written gradient times the upstream gradient and the correction, in place; a factor of 1 touches nothing.

    With ``recompute`` the rows that change are made again from the logits and rounded once, not scaled and rounded
    twice.
    """
    gradient, *rest, correction = saved
    if recompute:
        logits, target, fields, prediction = rest
        torch.ops.dal_kernels.rewrite_gradient_cuda(
            gradient, logits, target, fields, prediction, upstream, ignore_index, correction
        )
    else:
        torch.ops.dal_kernels.scale_gradient_cuda(gradient, upstream, correction)
    return gradient
