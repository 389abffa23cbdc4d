"""What operators of all backends agree on: names by position, and the dtype of a loss."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)
REDUCTION = {name: index for index, name in enumerate(REDUCTIONS)}

# Of one row, in the order of csrc/batch.h and backends/triton/kernels.py. The first make the gradient of a soft
# bootstrap; on a GPU the others are there only with the prediction, as a hard one has it.
FIELDS = ("max", "scale", "slope", "target_term", "argmax_term", "target_prob", "entropy")
GRADIENT_FIELDS = 4
TARGET_PROB, ENTROPY = FIELDS.index("target_prob"), FIELDS.index("entropy")


def loss_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
