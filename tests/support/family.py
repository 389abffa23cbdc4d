"""The losses of the table with knobs to try them at, and the modules that the package has of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dal_kernels
from dal_kernels.losses.base import RobustLoss

KNOBS: dict[str, tuple[float, ...]] = {
    "dynamics_aware": (1.2, 0.4),
    "dynamics_aware_hard": (1.2, 0.4),
    "generalized_cross_entropy": (0.7,),
    "symmetric_cross_entropy": (0.1, 9.2),
    "taylor_cross_entropy": (4,),
    "asymmetric_generalized_cross_entropy": (0.6, 0.6),
    "asymmetric_unhinged": (5.5, 3.0),
    "asymmetric_exponential": (2.5,),
    "jensen_shannon": (0.5,),
    "fisher_rao": (),
    "focal": (2.0,),
    "focal_detached": (2.0,),
    "partially_huberised_cross_entropy": (10.0,),
    "smoothed_cross_entropy": (0.1,),
    "normalized_and_absolute": (1.0, 2.0),
    "normalized_and_asymmetric": (1.0, 4.0, 0.6, 0.6),
    "joint_asymmetric": (1.0, 1.0, 30.0),
    "brier": (),
    "epsilon_softmax": (1e4, 1.0, 0.5),
}

NAMES = sorted(name for name in dal_kernels.__all__ if name.endswith("_loss") and "linear" not in name)
FAMILY = [name for name in NAMES if name not in ("dynamics_aware_loss", "label_distribution_aware_margin_loss")]


def module_of(name: str, **options: Any) -> RobustLoss:
    words = name.removesuffix("_loss").split("_")
    made: RobustLoss = getattr(dal_kernels, "".join(word.capitalize() for word in words) + "Loss")(**options)
    return made


def rows_of(rows: int = 12, classes: int = 7, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(classes)
    logits = (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    target[: rows // 3] = logits[: rows // 3].float().argmax(1)
    return logits, target


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def close(found: Tensor, expected: Tensor, logits: Tensor) -> None:
    """Of a loss and of its gradient for an upstream gradient that varies."""
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.linspace(0.5, 2.0, found.numel(), dtype=found.dtype).reshape(found.shape)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, upstream),
        torch.autograd.grad(expected, logits, upstream),
        rtol=1e-9,
        atol=1e-11,
    )
