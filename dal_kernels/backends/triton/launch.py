"""The operators of the Triton backend: buffers, plan, launch. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
from torch import Tensor

from dal_kernels.backends.triton import kernels
from dal_kernels.backends.triton.plan import plan_backward, plan_forward
from dal_kernels.fields import FIELDS, GRADIENT_FIELDS, REDUCTIONS, loss_dtype

_SCALE_BLOCK = 8192
_LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _warp_size() -> int:
    return 64 if torch.version.hip else 32


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _unit_class_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _row_stride(value: Tensor) -> int:
    return 0 if value.dim() == 0 else value.stride(0)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_rows(logits: Tensor, target: Tensor) -> None:
    _require(logits.dim() == 2 and logits.shape[1] > 0, "logits must be (N, C) with C >= 1")
    _require(logits.dtype in _LOGITS, "logits must be float32, float64, bfloat16 or float16")
    _require(target.shape == logits.shape[:1] and target.dtype == torch.int64, "target must be (N,) int64")


def _is_one_or_per_row(value: Tensor, logits: Tensor) -> bool:
    return value.dim() == 0 or value.shape == logits.shape[:1]


def _launch_loss(
    arguments: tuple[Any, ...], want_prediction: bool, want_fields: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits, target, q, bootstrap_weight, weight, ignore_index, reduction, hard, want_gradient = arguments
    _check_rows(logits, target)
    logits = _unit_class_stride(logits)
    rows, classes = logits.shape
    dtype = loss_dtype(logits)
    for value in (q, bootstrap_weight):
        _require(
            value.dtype in (torch.float32, torch.float64) and _is_one_or_per_row(value, logits),
            "q and bootstrap_weight must be float32 or float64, 0-d or one value a row",
        )
    if weight is not None:
        _require(weight.shape == (classes,) and weight.dtype == dtype, "weight must be (C,) in the dtype of the loss")
    _require(0 <= reduction < len(REDUCTIONS), "reduction must be 0, 1 or 2")
    mean, reduced = REDUCTIONS[reduction] == "mean", REDUCTIONS[reduction] != "none"
    new = logits.new_empty
    gradient = new((rows, classes) if want_gradient else (0,))
    loss = new(() if reduced else (rows,), dtype=dtype)
    kept = len(FIELDS) if want_prediction else GRADIENT_FIELDS
    fields = new((kept, rows) if want_fields else (0,), dtype=dtype)
    prediction = new((rows,) if want_prediction else (0,), dtype=torch.int64)
    correction = new(() if reduced else (0,), dtype=dtype)
    plan = plan_forward(rows, classes, logits.element_size(), _warp_size())
    _require(not (plan.long and want_gradient), "the gradient of rows this long is made in the backward")
    inputs = (
        logits,
        logits.stride(0),
        target,
        target.stride(0),
        q,
        _row_stride(q),
        bootstrap_weight,
        _row_stride(bootstrap_weight),
        None if weight is None else weight.contiguous(),
    )
    shared: dict[str, Any] = {
        "CLASSES": classes,
        "LOG_CLASSES": math.log(classes),
        "HARD": hard,
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
            parts = new((3, rows, plan.splits), dtype=dtype)
            places = new((2, rows, plan.splits), dtype=torch.int64)
            kernels.split_statistics[(rows, plan.splits)](
                logits,
                logits.stride(0),
                bootstrap_weight,
                _row_stride(bootstrap_weight),
                parts,
                places,
                CLASSES=classes,
                BLOCK=plan.block,
                SPLITS=plan.splits,
                PACKED=packed,
                HARD=hard,
                PREDICTION=want_prediction,
                num_warps=plan.warps,
            )
            # One warp: rows times splits are at most 512, a few values a lane.
            kernels.merge_splits[(1,)](
                parts,
                places,
                *inputs,
                loss,
                correction,
                fields,
                prediction,
                rows,
                ignore_index,
                ROWS=triton.next_power_of_2(rows),
                SPLITS=plan.splits,
                **(shared | {"num_warps": 1}),
            )
            return loss, gradient, fields, prediction, correction
        partial = new((2, programs) if reduced else (0,), dtype=dtype)
        outputs = (loss, partial, fields, prediction, rows, ignore_index)
        if plan.long and rows:
            kernels.loss_long_rows[(programs,)](*inputs, *outputs, BLOCK=plan.block, PACKED=packed, **shared)
        elif rows:
            kernels.loss_rows[(programs,)](
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
                PER_ROW=q.dim() + bootstrap_weight.dim() > 0,
                GRADIENT=want_gradient,
                **shared,
            )
        if reduced:
            block = min(1024, max(32, triton.next_power_of_2(max(1, programs))))
            kernels.reduce_sums[(1,)](
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


def writes_gradient(logits: Tensor) -> bool:
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
    _check_rows(logits, target)
    logits = _unit_class_stride(logits)
    rows, classes = logits.shape
    _require(
        fields.dim() == 2
        and fields.shape[0] >= GRADIENT_FIELDS + (prediction.numel() > 0)
        and fields.shape[1] == rows
        and fields.is_contiguous(),
        "fields must be contiguous, (5, N) or longer, (4, N) without prediction",
    )
    _require(
        prediction.dtype == torch.int64 and prediction.shape in ((0,), (rows,)) and prediction.is_contiguous(),
        "prediction must be a contiguous (N,) int64 or empty",
    )
    _require(
        fields.dtype == upstream.dtype == loss_dtype(logits) and _is_one_or_per_row(upstream, logits),
        "upstream must be 0-d or one value a row; it and fields must be in the dtype of the loss",
    )
    plan = plan_backward(rows, classes, logits.element_size(), _warp_size())
    if rows:
        with _on(logits):
            kernels.gradient_rows[(triton.cdiv(rows, plan.rows), triton.cdiv(classes, plan.block))](
                logits,
                logits.stride(0),
                target,
                target.stride(0),
                fields,
                prediction,
                upstream,
                _row_stride(upstream),
                correction if correction.numel() else None,
                out,
                rows,
                ignore_index,
                CLASSES=classes,
                BLOCK=plan.block,
                ROWS=plan.rows,
                PACKED=logits.stride(0) == classes,
                HARD=prediction.numel() > 0,
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


def rescale(saved: tuple[Tensor, ...], upstream: Tensor, ignore_index: int, again: bool, _: Any) -> Tensor:
    """The written gradient times the upstream gradient and the correction, in place; a factor of 1 touches nothing.

    With ``again`` the rows that change are made again from the logits and rounded once, not scaled and rounded twice.
    """
    gradient, *rest, correction = saved
    if again:
        logits, target, fields, prediction = rest
        return rewrite_gradient(
            gradient, logits, target, fields, prediction, upstream, ignore_index, correction, if_changed=True
        )
    size = gradient.numel()
    if size:
        with _on(gradient):
            kernels.scale_gradient[(triton.cdiv(size, _SCALE_BLOCK),)](
                gradient, upstream, correction, size, BLOCK=_SCALE_BLOCK, num_warps=8 * 32 // _warp_size()
            )
    return gradient


def statistics(logits: Tensor, want_argmax: bool, wide: bool) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
