"""Gradients of the fused kernels, which can be differentiated no further: they say so, where others would be silent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits of more bytes are not kept alive only so that a second derivative can be refused.
_SMALL_BYTES = 1 << 20


def anchor_of(tensor: Tensor) -> Tensor | None:
    """What ties gradients to the graph of a tensor without keeping its memory, where that is worth it; else None."""
    large = not tensor.is_leaf and tensor.nbytes > _SMALL_BYTES
    return tensor[:0].clone() if large else None


class DifferentiableOnce(torch.autograd.Function):
    """Identity on a gradient that says so when it is differentiated again.

    ``anchors`` tie it to the graph of what it is a gradient through: without an edge there, a gradient penalty would
    skip this part in silence.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "the fused kernels of dynamics_aware_loss have no second derivative: "
            "pass backend='eager' for gradient penalties and other uses of create_graph=True"
        )
