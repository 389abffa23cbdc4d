"""Layers to try, what the fused form makes of them, and what it is held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import dynamics_aware_loss, linear_dynamics_aware_loss
from dal_kernels.layer import chunk_row_bytes

N, D, C = 45, 24, 150


def layer(dtype: torch.dtype = torch.float32, rows: int = N, classes: int = C, seed: int = 0) -> dict[str, Tensor]:
    """Leaves of a layer, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    leaves = {"input": make(rows, D), "classifier_weight": make(classes, D) / 2, "bias": make(classes)}
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    target = torch.randint(classes, (rows,), generator=generator)
    target[::7] = -100
    return {**leaves, "target": target}


def fused_layer(given: dict[str, Any], rows_a_chunk: int = 8, **options: Any) -> Any:
    dtype, classes = given["input"].dtype, len(given["classifier_weight"])
    chunk_bytes = rows_a_chunk * chunk_row_bytes(classes, dtype, torch.device("cpu"))
    call = {"q": 0.7, "bootstrap_weight": 0.4, "chunk_bytes": chunk_bytes, **given, **options}
    return linear_dynamics_aware_loss(**call)


def two_steps(given: dict[str, Any], **options: Any) -> Any:
    """What the fused layer is held against."""
    leaves = {name: given[name] for name in ("input", "target")}
    logits = F.linear(leaves.pop("input"), given["classifier_weight"], given.get("bias"))
    return dynamics_aware_loss(logits, **{"q": 0.7, "bootstrap_weight": 0.4, **leaves, **options})


def gradients(loss: Tensor, given: dict[str, Any]) -> list[Tensor]:
    leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad(loss, leaves, upstream.to(loss)))
