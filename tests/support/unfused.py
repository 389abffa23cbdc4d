"""What linear_loss is held against: F.linear, a cap, a scale and the loss one after the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import (
    CrossEntropyLoss,
    DynamicsAwareLoss,
    GeneralizedCrossEntropyLoss,
    LabelDistributionAwareMarginLoss,
    linear_loss,
)
from support.family import FAMILY, module_of

D, C = 6, 23
fixed: dict[str, Any] = {"total_steps": 4, "pace": "fixed", "watch": False}
LOSSES: list[Any] = [module_of(name) for name in FAMILY] + [
    CrossEntropyLoss(label_smoothing=0.1),
    CrossEntropyLoss(weight=torch.linspace(0.2, 2.0, C), ignore_index=3),
    DynamicsAwareLoss(1.2, 1.2, **fixed),
    DynamicsAwareLoss(1.2, 1.2, bootstrap="hard", **fixed),
    DynamicsAwareLoss(0.4, target_shift="fading", **fixed),
    GeneralizedCrossEntropyLoss(0.7, target_shift=torch.linspace(-1, 1, C), scale=1.5),
    LabelDistributionAwareMarginLoss(torch.arange(1, C + 1), scale=4.0),
]


def layer(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Leaves of a layer for targets of that shape, some of them ignored, by the names of linear_loss."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {"input": (*shape, D), "linear_weight": (C, D), "linear_bias": (C,)}
    made: dict[str, Any] = {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, size in leaves.items()
    }
    target = torch.randint(C, shape, generator=generator)
    return {**made, "target": target.masked_fill(torch.rand(shape, generator=generator) < 0.2, -100)}


def unfused(
    loss: Any,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    shift: int = 0,
    softcap: float | None = None,
    scale: Any = 1.0,
    num_items: Any = None,
    sample_weight: Tensor | None = None,
    mix: Any = None,
    reduction: str | None = None,
    **options: Any,
) -> Any:
    """What linear_loss is held against: all logits, in plain operations, and the loss of them."""
    plain = copy.deepcopy(loss)
    del plain.scale
    plain.scale = scale if loss.scale is None else scale * loss.scale
    if isinstance(plain.scale, float) and plain.scale == 1:
        plain.scale = None
    logits = F.linear(input, linear_weight, linear_bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    moved = lambda of: (of[..., shift:] if shift else of).reshape(-1) if isinstance(of, Tensor) else of  # noqa: E731
    logits = logits[..., : logits.shape[-2] - shift, :] if shift else logits
    shape = target[..., shift:].shape if shift else target.shape
    mix = None if mix is None else tuple(map(moved, mix))
    reduced = reduction or plain.reduction
    result = plain(
        logits.reshape(-1, C), moved(target),
        sample_weight=None if sample_weight is None else moved(sample_weight), mix=mix,
        reduction="sum" if num_items is not None else reduced, **options,
    )  # fmt: skip
    stats = None
    if options.get("return_stats"):
        result, stats = result
        stats = type(stats)(*(field.reshape(shape) for field in stats))
    if num_items is not None:
        result = result / (num_items.reshape(()) if isinstance(num_items, Tensor) else num_items)
    if reduced == "none":
        result = result.reshape(shape)
    return (result, stats) if stats is not None else result


def gradients(loss: Tensor, given: dict[str, Any]) -> list[Tensor]:
    leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    return list(torch.autograd.grad(loss, leaves, upstream.to(loss.dtype)))


def of_backend(loss: Any, backend: str) -> Any:
    loss = copy.deepcopy(loss)
    loss.backend = backend
    return loss


def hold(loss: Any, given: dict[str, Any], backend: str, rows_a_chunk: int = 3) -> None:
    """Value, statistics and gradients of float64 leaves, against plain operations."""
    given["target"] = given["target"].where(given["target"] != -100, torch.tensor(loss.ignore_index))
    chunk_bytes = rows_a_chunk * C * 8 * (2 if given.get("softcap") else 1)
    got, stats = linear_loss(of_backend(loss, backend), **given, return_stats=True, chunk_bytes=chunk_bytes)
    expected, true_stats = unfused(of_backend(loss, "eager"), **given, return_stats=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, equal_nan=True)
    torch.testing.assert_close(stats, true_stats, rtol=1e-9, atol=1e-11, equal_nan=True)
    torch.testing.assert_close(gradients(got, given), gradients(expected, given), rtol=1e-8, atol=1e-10)


AFFINE = [
    CrossEntropyLoss(label_smoothing=0.1),
    CrossEntropyLoss(weight=torch.linspace(0.2, 2.0, C)),
    DynamicsAwareLoss(1.2, 1.2, **fixed),
    module_of("active_passive_loss"),
    module_of("symmetric_cross_entropy_loss", label_smoothing=0.2),
    module_of("brier_loss", label_smoothing=0.3),
]


def _name(loss: Any) -> str:
    return str(loss)[:60]


losses = pytest.mark.parametrize("loss", LOSSES, ids=_name)
affine_losses = pytest.mark.parametrize("loss", AFFINE, ids=_name)
