"""The operators of the Triton backend that write a gradient: plan, launch. Nothing here waits for the device."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from dal_kernels.backends.triton import device
from dal_kernels.backends.triton.arguments import check_fields, check_rows, row_stride, unit_class_stride
from dal_kernels.backends.triton.gradient import gradient_rows
from dal_kernels.backends.triton.gradient import scale_gradient as scale_values
from dal_kernels.backends.triton.plan import plan_backward
from dal_kernels.backends.triton.record import empty, start
from dal_kernels.fields import FIELDS

_SCALE_BLOCK = 8192


def gradient(logits: Tensor, *arguments: Any) -> Tensor:
    return write_gradient(empty(logits, logits.shape), logits, *arguments, if_changed=False)


def write_gradient(
    out: Tensor,
    logits: Tensor,
    target: Tensor,
    fields: Tensor,
    prediction: Tensor,
    upstream: Tensor,
    ignore_index: int,
    correction: Tensor,
    *,
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
            start(gradient_rows, (triton.cdiv(rows, plan.rows), triton.cdiv(classes, plan.block)))(
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


def overwrite(logits: Tensor, *arguments: Any) -> Tensor:
    """:func:`gradient` in the place of contiguous logits."""
    return write_gradient(logits, logits, *arguments, if_changed=False)


def rewrite_gradient(gradient: Tensor, *arguments: Any) -> None:
    write_gradient(gradient, *arguments, if_changed=True)


def scale_gradient(gradient: Tensor, upstream: Tensor, correction: Tensor) -> None:
    size = gradient.numel()
    if size:
        with device.current(gradient):
            start(scale_values, (triton.cdiv(size, _SCALE_BLOCK),))(
                gradient, upstream, correction, size, BLOCK=_SCALE_BLOCK, num_warps=8 * 32 // device.warp_size()
            )
