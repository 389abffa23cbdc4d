"""The operators of the Triton backend that read rows: buffers, plan, launch. Nothing here waits for the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from dal_kernels.backends.triton import device
from dal_kernels.backends.triton.arguments import (
    check_logits,
    check_loss,
    check_rows,
    checked_knobs,
    require,
    unit_class_stride,
)
from dal_kernels.backends.triton.layouts import Layout, layout_of
from dal_kernels.backends.triton.long_rows import loss_long_rows, merge_splits, split_statistics
from dal_kernels.backends.triton.objectives import FUNCTIONS
from dal_kernels.backends.triton.plan import (
    JOINED,
    REDUCING_WARPS,
    LaunchPlan,
    plan_apart,
    plan_forward,
    plan_statistics,
    sums_at_once,
)
from dal_kernels.backends.triton.record import empty, start
from dal_kernels.backends.triton.reduction import reduce_sums
from dal_kernels.backends.triton.short_rows import loss_rows
from dal_kernels.backends.triton.statistics import merge_statistics, row_statistics
from dal_kernels.backends.triton.ticket import ticket_for
from dal_kernels.fields import FIELDS, GRADIENT_FIELDS, NARROW_FIELDS, REDUCTIONS, loss_dtype
from dal_kernels.layouts import MOST_APART_ON_GPU, lies_apart, rows_of
from dal_kernels.objectives import OBJECTIVES

Made = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# (numbers, every, q_end, max_weight): what :func:`launch_pace.see` takes beside the rows.
Follower = tuple[Tensor | None, int, float, float]
_NOBODY: Follower = (None, 1, 0.0, 0.0)


def launch_loss(
    arguments: Sequence[Any], want_prediction: bool, want_fields: bool, follower: Follower = _NOBODY
) -> tuple[Made, bool]:
    """What loss_and_fields gives, and whether the follower has followed the call."""
    logits, target, knobs, weight, objective, ignore_index, reduction, want_gradient = arguments
    check_rows(logits, target)
    given, layout = logits, layout_of(logits)
    logits, rows, classes = layout[:3]
    dtype = loss_dtype(logits)
    knobs = checked_knobs(knobs, objective, rows)
    traits = OBJECTIVES[objective]
    check_loss(logits, weight, reduction)
    mean, reduced = REDUCTIONS[reduction] == "mean", REDUCTIONS[reduction] != "none"
    new = functools.partial(empty, logits)
    gradient = layout.empty_gradient(given) if want_gradient else new((0,))
    loss = new(() if reduced else (rows,), dtype=dtype)
    field_count = len(FIELDS) if traits.is_wide else NARROW_FIELDS if want_prediction else GRADIENT_FIELDS
    fields = new((field_count, rows) if want_fields else (0,), dtype=dtype)
    prediction = new((rows,) if want_prediction else (0,), dtype=torch.int64)
    correction = new(() if reduced else (0,), dtype=dtype)
    plan = plan_of(layout)
    require(not (plan.long and want_gradient), "the gradient of rows this long is made in the backward")
    of_knobs = (knobs, knobs.stride(0) if knobs.dim() == 2 else 0)
    inputs = (target, target.stride(0), *of_knobs, None if weight is None else weight.contiguous())
    needs = {"ENTROPY": "entropy" in traits.uses, "ARGMAX": traits.needs_argmax}
    shared: dict[str, Any] = {
        "OBJECTIVE": FUNCTIONS[objective],
        "KNOBS": len(traits.knobs),
        "WIDE": traits.is_wide,
        "CLASSES": classes,
        "LOG_CLASSES": math.log(classes),
        "MEAN": mean,
        "REDUCED": reduced,
        "FIELDS": want_fields,
        "PREDICTION": want_prediction,
        "num_warps": plan.warps,
    }
    packed = layout.row_stride == classes
    programs = triton.cdiv(rows, plan.rows)
    with device.current(logits):
        if plan.splits > 1 and rows:
            parts, places = _launch_splits(
                logits, plan, of_knobs, needs | {"WIDE": traits.is_wide, "PREDICTION": want_prediction}
            )
            # One warp: rows times splits are at most 512, a few values a lane.
            start(merge_splits, (1,))(
                parts,
                places,
                logits,
                layout.row_stride,
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
            return (loss, gradient, fields, prediction, correction), False
        partial = new((2, programs), dtype=dtype) if reduced and programs != 1 else None
        ticket = ticket_for(logits) if reduced and 1 < programs <= JOINED else None
        # The last program follows, too.
        followed = follower[0] is not None and reduced and rows > 0 and (partial is None or ticket is not None)
        given = (loss, correction, partial, ticket, fields, prediction, rows, ignore_index)
        outputs = (*given, *(follower if followed else _NOBODY))
        sums = sums_at_once(plan.warps)
        if plan.long and rows:
            start(loss_long_rows, (programs,))(
                logits,
                layout.row_stride,
                *inputs,
                *outputs,
                BLOCK=plan.block,
                PACKED=packed,
                SUMS=sums,
                **needs,
                **shared,
            )
        elif rows:
            start(loss_rows, (programs,))(
                *layout.of_kernel(),
                *inputs,
                gradient,
                *outputs,
                BLOCK=plan.block,
                ROWS=plan.rows,
                TILES=plan.tiles,
                KEPT=plan.kept,
                AXIS=0 if plan.lanes else 1,
                PACKED=packed,
                APART=layout.apart,
                VECTOR=plan.vector,
                PER_ROW=knobs.dim() == 2,
                GRADIENT=want_gradient,
                SUMS=sums,
                **needs,
                **shared,
            )
        if partial is not None and ticket is None:
            start(reduce_sums, (1,))(
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
                layout.inner if layout.apart else None,
                CLASSES=classes,
                MEAN=mean,
                GRADIENT=want_gradient,
                FIELDS=want_fields,
                SUMS=sums_at_once(REDUCING_WARPS),
                num_warps=REDUCING_WARPS,
            )
    return (loss, gradient, fields, prediction, correction), followed


def _launch_splits(
    logits: Tensor, plan: LaunchPlan, of_knobs: tuple[Tensor | None, int], needs: dict[str, bool]
) -> tuple[Tensor, Tensor]:
    """Statistics of the shares of long rows: (parts, places) as split_statistics says."""
    rows, classes = logits.shape
    parts = empty(logits, (5 if needs["WIDE"] else 3, rows, plan.splits), dtype=loss_dtype(logits))
    places = empty(logits, (2, rows, plan.splits), dtype=torch.int64)
    start(split_statistics, (rows, plan.splits))(
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


def plan_of(layout: Layout) -> LaunchPlan:
    """The plan of a forward."""
    size = (layout.rows, layout.classes, layout.logits.element_size())
    if layout.apart:
        return plan_apart(*size, layout.vector, device.warp_size())
    return plan_forward(*size, device.warp_size())


def writes_gradient(logits: Tensor, _: int) -> bool:
    """Whether the forward can write the gradient; of rows that do not fit the registers it is made in the backward."""
    if logits.dim() == 3 and lies_apart(logits, MOST_APART_ON_GPU):
        return True
    classes = logits.shape[1]
    return not plan_forward(rows_of(logits), classes, logits.element_size(), device.warp_size()).long


def loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    (value, written, _, _, correction), _ = launch_loss(arguments, want_prediction=False, want_fields=False)
    return value, written, correction


def loss_and_fields(*arguments: Any) -> Made:
    made, _ = launch_loss(arguments[:-1], want_prediction=arguments[-1], want_fields=True)
    return made


def statistics(logits: Tensor, want_argmax: bool, wide: bool) -> tuple[Tensor, Tensor]:
    check_logits(logits)
    logits = unit_class_stride(logits)
    rows, classes = logits.shape
    sums = empty(logits, (5 if wide else 3, rows), dtype=loss_dtype(logits))
    argmax = empty(logits, (rows,) if want_argmax else (0,), dtype=torch.int64)
    if not rows:
        return sums, argmax
    plan = plan_statistics(rows, classes, logits.element_size(), device.warp_size())
    constants: dict[str, Any] = {"ARGMAX": want_argmax, "WIDE": wide, "CLASSES": classes, "BLOCK": plan.block}
    with device.current(logits):
        if plan.splits > 1:
            # As with a prediction: W and the first NaN are wanted whatever the loss.
            needs = {"ENTROPY": True, "ARGMAX": want_argmax, "WIDE": wide, "PREDICTION": True}
            parts, places = _launch_splits(logits, plan, (None, 0), needs)
            start(merge_statistics, (1,))(
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
            start(row_statistics, (rows,))(
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
