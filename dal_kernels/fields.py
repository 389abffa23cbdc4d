"""What operators of all backends agree on: names by position, and the dtype of a loss."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)
REDUCTION = {name: index for index, name in enumerate(REDUCTIONS)}

# Of one row, in the order of csrc/batch.h and backends/triton/row.py. The first four make the gradient of most losses;
# on a GPU the next four are there only with the prediction. The last two are there only of losses that sum over all
# classes ("wide" ones, see dal_kernels.objectives), and then all are.
FIELDS = (
    *("max", "scale", "slope", "target_term"),
    *("argmax_term", "target_prob", "entropy", "max_prob"),
    *("square", "constant"),
)
GRADIENT_FIELDS, NARROW_FIELDS = 4, 8
TARGET_PROB, ENTROPY, MAX_PROB = (FIELDS.index(name) for name in ("target_prob", "entropy", "max_prob"))


def loss_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """Of a loss from logits of ``dtype``, and of all that is summed on the way: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def loss_dtype(logits: Tensor) -> torch.dtype:
    """:func:`loss_dtype_of` their dtype."""
    return loss_dtype_of(logits.dtype)
