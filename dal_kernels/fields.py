"""What operators of all backends agree on: names by position, and the dtype of a loss."""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")

# Of one row, in the order of csrc/batch.h and backends/triton/kernels.py. The first make the gradient of a soft
# bootstrap; on a GPU the others are there only with the prediction, as a hard one has it.
FIELDS = ("max", "scale", "slope", "target_term", "argmax_term", "target_prob", "entropy")
GRADIENT_FIELDS = 4


def loss_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
