"""Bad arguments of a layer form are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dal_kernels import (
    CrossEntropyLoss,
    LinearLoss,
    linear_loss,
)
from support.unfused import C, D, layer


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shift": 1.0}, TypeError, "shift must be an int, got float"),
        ({"shift": -1}, ValueError, "shift must be >= 0 and below the length of a sequence, 5"),
        ({"shift": 5}, ValueError, "below the length of a sequence, 5.* got 5"),
        ({"softcap": 0.0}, ValueError, "softcap must be finite and > 0, or None, got 0"),
        ({"softcap": torch.ones(())}, TypeError, "softcap must be a number or None, got Tensor"),
        ({"scale": -1.0}, ValueError, "scale must be finite and > 0, got -1"),
        ({"scale": torch.ones(2)}, ValueError, "scale must be a number or a 0-d tensor"),
        ({"num_items": 0}, ValueError, "num_items must be finite and > 0, got 0"),
        ({"num_items": "all"}, TypeError, "num_items must be a number > 0 or a tensor of one, got str"),
        ({"num_items": torch.ones(3)}, ValueError, r"num_items must be a number .* got torch.float32 of shape \(3,\)"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items must be None with reduction 'sum', got 3"),
        ({"target": torch.zeros(3, dtype=torch.long)}, ValueError, r"target must have shape \(3, 5\) for input of sh"),
        ({"target": torch.zeros(3, 5)}, TypeError, "target must hold class indices"),
        ({"target": torch.full((3, 5), C)}, ValueError, f"target at row 0 is {C}, accepted are 0 to {C - 1}"),
        ({"target": [1]}, TypeError, "target must be a tensor, got list"),
        ({"input": torch.zeros(())}, ValueError, r"input must have shape \(\.\.\., D\), got a 0-d tensor"),
        ({"input": torch.zeros(3, 5, D + 1)}, ValueError, rf"linear_weight must have shape \(C, {D + 1}\), C >= 1"),
        ({"linear_weight": torch.zeros(C)}, ValueError, rf"linear_weight must have shape \(C, {D}\)"),
        ({"linear_weight": None}, TypeError, "linear_weight must be a tensor, got NoneType"),
        ({"linear_bias": torch.zeros(C - 1)}, ValueError, rf"linear_bias must have shape \({C},\) or be None"),
        ({"sample_weight": torch.ones(4)}, ValueError, r"sample_weight must be .* shape \(3, 5\)"),
        ({"mix": (torch.zeros(3, dtype=torch.long), 0.5)}, ValueError, r"mix\[0\] must be class indices"),
        ({"loss": nn.CrossEntropyLoss()}, TypeError, "loss must be a module of dal_kernels"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_loss(**{"loss": CrossEntropyLoss(), **layer((3, 5), torch.float32), **changes})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classifier": nn.Linear(D, C + 1)}, ValueError, f"classifier must have in_features {D} and out_features {C}"),
        ({"classifier": nn.Parameter(torch.zeros(D, C))}, ValueError, rf"classifier must have shape \({C}, {D}\)"),
        (
            {"classifier": nn.Embedding(C, D)},
            TypeError,
            "classifier must be an nn.Linear, a parameter .* got Embedding",
        ),
        ({"shift": -1}, ValueError, "shift must be >= 0, got -1"),
        ({"softcap": -1}, ValueError, "softcap must be finite and > 0"),
        ({"scale": 0}, ValueError, "scale must be finite and > 0"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be an int >= 1"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_at_construction(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearLoss(CrossEntropyLoss(), D, C, **options)
