"""The operators of the Triton backend that write a gradient: plan, launch. Nothing here waits for the device."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from dal_kernels.backends.triton import device
from dal_kernels.backends.triton.arguments import check_fields, check_rows, row_stride, unit_class_stride
from dal_kernels.backends.triton.gradient import gradient_rows, scale_gradient
from dal_kernels.backends.triton.plan import plan_backward
from dal_kernels.fields import FIELDS

_SCALE_BLOCK = 8192


def gradient(
    logits: Tensor,
    target: Tensor,
    fields: Tensor,
    prediction: Tensor,
    upstream: Tensor,
    ignore_index: int,
    correction: Tensor,
) -> Tensor:
    return rewrite_gradient(
        logits.new_empty(logits.shape), logits, target, fields, prediction, upstream, ignore_index, correction, False
    )


def rewrite_gradient(
    out: Tensor,
    logits: Tensor,
    target: Tensor,
    fields: Tensor,
    prediction: Tensor,
    upstream: Tensor,
    ignore_index: int,
    correction: Tensor,
    if_changed: bool,
) -> Tensor:
    """The gradient, again, into ``out``; with ``if_changed`` only where it is not what stands there."""
    check_rows(logits, target)
    logits = unit_class_stride(logits)
    rows, classes = logits.shape
    check_fields(logits, fields, prediction, upstream)
    plan = plan_backward(rows, classes, logits.element_size(), device.warp_size())
    if rows:
        with device.current(logits):
            gradient_rows[(triton.cdiv(rows, plan.rows), triton.cdiv(classes, plan.block))](
                logits,
                logits.stride(0),
                target,
                target.stride(0),
                fields,
                prediction,
                upstream,
                row_stride(upstream),
                correction if correction.numel() else None,
                out,
                rows,
                ignore_index,
                CLASSES=classes,
                BLOCK=plan.block,
                ROWS=plan.rows,
                PACKED=logits.stride(0) == classes,
                ARGMAX=prediction.numel() > 0,
                WIDE=fields.shape[0] == len(FIELDS),
                IF_CHANGED=if_changed,
                IN_PLACE=out is logits,
                num_warps=plan.warps,
            )
    return out


def overwrite(
    logits: Tensor,
    target: Tensor,
    fields: Tensor,
    prediction: Tensor,
    upstream: Tensor,
    ignore_index: int,
    correction: Tensor,
) -> Tensor:
    """:func:`gradient` in the place of contiguous logits."""
    return rewrite_gradient(
        logits, logits, target, fields, prediction, upstream, ignore_index, correction, if_changed=False
    )


def rescale(saved: tuple[Tensor, ...], upstream: Tensor, ignore_index: int, recompute: bool, _: Any) -> Tensor:
    """The written gradient times the upstream gradient and the correction, in place; a factor of 1 touches nothing.

    With ``recompute`` the rows that change are made from the logits and rounded once, not scaled and rounded twice.
    """
    gradient, *rest, correction = saved
    if recompute:
        logits, target, fields, prediction = rest
        return rewrite_gradient(
            gradient, logits, target, fields, prediction, upstream, ignore_index, correction, if_changed=True
        )
    size = gradient.numel()
    if size:
        with device.current(gradient):
            scale_gradient[(triton.cdiv(size, _SCALE_BLOCK),)](
                gradient, upstream, correction, size, BLOCK=_SCALE_BLOCK, num_warps=8 * 32 // device.warp_size()
            )
    return gradient
