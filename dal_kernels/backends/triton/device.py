"""The device that Triton launches on."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def warp_size() -> int:
    return 64 if torch.version.hip else 32


def current(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
