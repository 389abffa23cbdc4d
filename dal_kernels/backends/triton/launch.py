"""The operators of the Triton backend: buffers, plan, launch. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
from torch import Tensor

from dal_kernels.backends.triton.arguments import (
    check_fields,
    check_logits,
    check_loss,
    check_rows,
    checked_knobs,
    require,
    row_stride,
    unit_class_stride,
)
from dal_kernels.backends.triton.gradient import gradient_rows, reduce_sums, scale_gradient
from dal_kernels.backends.triton.long_rows import loss_long_rows, merge_splits, split_statistics
from dal_kernels.backends.triton.objectives import FUNCTIONS
from dal_kernels.backends.triton.plan import LaunchPlan, plan_backward, plan_forward, plan_statistics
from dal_kernels.backends.triton.short_rows import loss_rows
from dal_kernels.backends.triton.statistics import merge_statistics, row_statistics
from dal_kernels.fields import FIELDS, GRADIENT_FIELDS, NARROW_FIELDS, REDUCTIONS, loss_dtype
from dal_kernels.objectives import OBJECTIVES

_SCALE_BLOCK = 8192


def _warp_size() -> int:
    return 64 if torch.version.hip else 32


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _launch_loss(
    arguments: tuple[Any, ...], want_prediction: bool, want_fields: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits, target, knobs, weight, objective, ignore_index, reduction, want_gradient = arguments
    check_rows(logits, target)
    logits = unit_class_stride(logits)
    rows, classes = logits.shape
    dtype = loss_dtype(logits)
    knobs = checked_knobs(knobs, objective, rows)
    of = OBJECTIVES[objective]
    check_loss(logits, weight, reduction)
    mean, reduced = REDUCTIONS[reduction] == "mean", REDUCTIONS[reduction] != "none"
    new = logits.new_empty
    gradient = new((rows, classes) if want_gradient else (0,))
    loss = new(() if reduced else (rows,), dtype=dtype)
    kept = len(FIELDS) if of.is_wide else NARROW_FIELDS if want_prediction else GRADIENT_FIELDS
    fields = new((kept, rows) if want_fields else (0,), dtype=dtype)
    prediction = new((rows,) if want_prediction else (0,), dtype=torch.int64)
    correction = new(() if reduced else (0,), dtype=dtype)
    plan = plan_forward(rows, classes, logits.element_size(), _warp_size())
    require(not (plan.long and want_gradient), "the gradient of rows this long is made in the backward")
    of_knobs = (knobs, knobs.stride(0) if knobs.dim() == 2 else 0)
    inputs = (
        logits,
        logits.stride(0),
        target,
        target.stride(0),
        *of_knobs,
        None if weight is None else weight.contiguous(),
    )
    needs = {"ENTROPY": "entropy" in of.uses, "ARGMAX": of.needs_argmax}
    shared: dict[str, Any] = {
        "OBJECTIVE": FUNCTIONS[objective],
        "KNOBS": len(of.knobs),
        "WIDE": of.is_wide,
        "CLASSES": classes,
        "LOG_CLASSES": math.log(classes),
        "MEAN": mean,
        "REDUCED": reduced,
        "FIELDS": want_fields,
        "PREDICTION": want_prediction,
        "num_warps": plan.warps,
    }
    packed = logits.stride(0) == classes
    programs = triton.cdiv(rows, plan.rows)
    with _on(logits):
        if plan.splits > 1 and rows:
            parts, places = _launch_splits(
                logits, plan, of_knobs, needs | {"WIDE": of.is_wide, "PREDICTION": want_prediction}
            )
            # One warp: rows times splits are at most 512, a few values a lane.
            merge_splits[(1,)](
                parts,
                places,
                *inputs,
                loss,
                correction,
                fields,
                prediction,
                rows,
                ignore_index,
                BLOCK=plan.block,
                ROWS=triton.next_power_of_2(rows),
                SPLITS=plan.splits,
                **(shared | {"num_warps": 1}),
            )
            return loss, gradient, fields, prediction, correction
        partial = new((2, programs) if reduced else (0,), dtype=dtype)
        outputs = (loss, partial, fields, prediction, rows, ignore_index)
        if plan.long and rows:
            loss_long_rows[(programs,)](*inputs, *outputs, BLOCK=plan.block, PACKED=packed, **needs, **shared)
        elif rows:
            loss_rows[(programs,)](
                *inputs[:2],
                1,
                *inputs[2:],
                gradient,
                *outputs,
                BLOCK=plan.block,
                ROWS=plan.rows,
                TILES=plan.tiles,
                KEPT=plan.kept,
                AXIS=0 if plan.lanes else 1,
                PACKED=packed,
                PER_ROW=knobs.dim() == 2,
                GRADIENT=want_gradient,
                **needs,
                **shared,
            )
        if reduced:
            block = min(1024, max(32, triton.next_power_of_2(max(1, programs))))
            reduce_sums[(1,)](
                partial,
                loss,
                correction,
                inputs[-1],
                target,
                target.stride(0),
                gradient,
                fields,
                programs,
                rows,
                ignore_index,
                CLASSES=classes,
                MEAN=mean,
                GRADIENT=want_gradient,
                FIELDS=want_fields,
                BLOCK=block,
                num_warps=max(1, block // 256),
            )
    return loss, gradient, fields, prediction, correction


def _launch_splits(
    logits: Tensor, plan: LaunchPlan, of_knobs: tuple[Tensor | None, int], needs: dict[str, bool]
) -> tuple[Tensor, Tensor]:
    """Statistics of the shares of long rows: (parts, places) as split_statistics says."""
    rows, classes = logits.shape
    parts = logits.new_empty((5 if needs["WIDE"] else 3, rows, plan.splits), dtype=loss_dtype(logits))
    places = logits.new_empty((2, rows, plan.splits), dtype=torch.int64)
    split_statistics[(rows, plan.splits)](
        logits,
        logits.stride(0),
        *of_knobs,
        parts,
        places,
        CLASSES=classes,
        BLOCK=plan.block,
        SPLITS=plan.splits,
        PACKED=logits.stride(0) == classes,
        num_warps=plan.warps,
        **needs,
    )
    return parts, places


def writes_gradient(logits: Tensor, _: int) -> bool:
    """Whether the forward can write the gradient; of rows that do not fit the registers it is made in the backward."""
    rows, classes = logits.shape
    return not plan_forward(rows, classes, logits.element_size(), _warp_size()).long


def loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    value, written, _, _, correction = _launch_loss(arguments, want_prediction=False, want_fields=False)
    return value, written, correction


def loss_and_fields(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _launch_loss(arguments[:-1], want_prediction=arguments[-1], want_fields=True)


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
    plan = plan_backward(rows, classes, logits.element_size(), _warp_size())
    if rows:
        with _on(logits):
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
        with _on(gradient):
            scale_gradient[(triton.cdiv(size, _SCALE_BLOCK),)](
                gradient, upstream, correction, size, BLOCK=_SCALE_BLOCK, num_warps=8 * 32 // _warp_size()
            )
    return gradient


def statistics(logits: Tensor, want_argmax: bool, wide: bool) -> tuple[Tensor, Tensor]:
    check_logits(logits)
    logits = unit_class_stride(logits)
    rows, classes = logits.shape
    sums = logits.new_empty((5 if wide else 3, rows), dtype=loss_dtype(logits))
    argmax = logits.new_empty((rows,) if want_argmax else (0,), dtype=torch.int64)
    if not rows:
        return sums, argmax
    plan = plan_statistics(rows, classes, logits.element_size(), _warp_size())
    constants: dict[str, Any] = {"ARGMAX": want_argmax, "WIDE": wide, "CLASSES": classes, "BLOCK": plan.block}
    with _on(logits):
        if plan.splits > 1:
            # As with a prediction: W and the first NaN are wanted whatever the loss.
            needs = {"ENTROPY": True, "ARGMAX": want_argmax, "WIDE": wide, "PREDICTION": True}
            parts, places = _launch_splits(logits, plan, (None, 0), needs)
            merge_statistics[(1,)](
                parts,
                places,
                sums,
                argmax,
                rows,
                ROWS=triton.next_power_of_2(rows),
                SPLITS=plan.splits,
                num_warps=1,
                **constants,
            )
        else:
            row_statistics[(rows,)](
                logits,
                logits.stride(0),
                sums,
                argmax,
                rows,
                PACKED=logits.stride(0) == classes,
                num_warps=plan.warps,
                **constants,
            )
    return sums, argmax
