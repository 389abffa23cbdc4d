"""The axes along which tests of several folders run, each said once."""

from __future__ import annotations

import pytest
import torch

from dal_kernels.objectives import OBJECTIVES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
BOOTSTRAPS = ("soft", "hard")
# Of a row: few of them, powers of two and what lies beside them, and more than one block, tile or program takes.
CLASSES = (1, 2, 3, 10, 14, 17, 50, 100, 1000, 1025, 4099, 20011, 33000)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=_name)
halves = pytest.mark.parametrize("dtype", HALVES, ids=_name)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
bootstraps = pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
objectives = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
