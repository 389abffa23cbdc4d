"""The operators of the Triton backend that write a gradient: plan, launch. Nothing here waits for the device."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from dal_kernels.backends.triton import device
from dal_kernels.backends.triton.arguments import check_fields, check_rows, require, row_stride
from dal_kernels.backends.triton.gradient import gradient_rows, gradient_rows_apart
from dal_kernels.backends.triton.gradient import scale_gradient as scale_values
from dal_kernels.backends.triton.layouts import Layout, fills_its_memory, layout_of, lies_as_made
from dal_kernels.backends.triton.plan import plan_backward, plan_backward_apart
from dal_kernels.backends.triton.record import start
from dal_kernels.fields import FIELDS

_SCALE_BLOCK = 8192


def gradient(logits: Tensor, *arguments: Any) -> Tensor:
    layout = layout_of(logits)
    out = layout.empty_gradient(logits)
    write_gradient(out, logits, layout, *arguments, if_changed=False)
    return out


def write_gradient(
    out: Tensor,
    given: Tensor,
    layout: Layout,
    target: Tensor,
    fields: Tensor,
    prediction: Tensor,
    upstream: Tensor,
    ignore_index: int,
    correction: Tensor,
    *,
    if_changed: bool,
) -> None:
    """The gradient, again, into ``out``; with ``if_changed`` only where it is not what stands there."""
    check_rows(given, target)
    check_fields(given, fields, prediction, upstream)
    logits, rows, classes = layout[:3]
    if not rows:
        return
    inputs = (
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
    )
    shared: dict[str, Any] = {
        "CLASSES": classes,
        "ARGMAX": prediction.numel() > 0,
        "WIDE": fields.shape[0] == len(FIELDS),
        "IF_CHANGED": if_changed,
    }
    with device.current(logits):
        if layout.apart:
            plan = plan_backward_apart(rows, classes, logits.element_size(), layout.vector, device.warp_size())
            start(gradient_rows_apart, (triton.cdiv(rows, plan.rows), plan.splits))(
                *layout.of_kernel(),
                *inputs,
                BLOCK=plan.block,
                ROWS=plan.rows,
                VECTOR=plan.vector,
                num_warps=plan.warps,
                **shared,
            )
        else:
            plan = plan_backward(rows, classes, logits.element_size(), device.warp_size())
            start(gradient_rows, (triton.cdiv(rows, plan.rows), triton.cdiv(classes, plan.block)))(
                logits,
                layout.row_stride,
                *inputs,
                BLOCK=plan.block,
                ROWS=plan.rows,
                PACKED=layout.row_stride == classes,
                IN_PLACE=out is logits,
                num_warps=plan.warps,
                **shared,
            )


def overwrite(logits: Tensor, *arguments: Any) -> Tensor:
    """:func:`gradient` in the place of contiguous logits (N, C)."""
    write_gradient(logits, logits, layout_of(logits), *arguments, if_changed=False)
    return logits


def rewrite_gradient(written: Tensor, logits: Tensor, *arguments: Any) -> None:
    layout = layout_of(logits)
    if lies_as_made(written, layout):
        write_gradient(written, logits, layout, *arguments, if_changed=True)
    else:  # one of the two has been away, as hooks of saved tensors take them, and has come back in another layout
        written.copy_(gradient(logits, *arguments))


def scale_gradient(gradient: Tensor, upstream: Tensor, correction: Tensor) -> None:
    require(fills_its_memory(gradient), "gradient must fill its memory")
    size = gradient.numel()
    if size:
        with device.current(gradient):
            start(scale_values, (triton.cdiv(size, _SCALE_BLOCK),))(
                gradient, upstream, correction, size, BLOCK=_SCALE_BLOCK, num_warps=8 * 32 // device.warp_size()
            )
