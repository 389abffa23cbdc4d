"""What the operators of the Triton backend ask of their arguments, and the layout that the kernels read them in."""

from __future__ import annotations

import torch
from torch import Tensor

from dal_kernels.fields import FIELDS, GRADIENT_FIELDS, REDUCTIONS, loss_dtype
from dal_kernels.layouts import rows_of
from dal_kernels.objectives import OBJECTIVES

_LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unit_class_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def row_stride(value: Tensor) -> int:
    return 0 if value.dim() == 0 else value.stride(0)


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check_logits(logits: Tensor) -> None:
    require(logits.dim() == 2 and logits.shape[1] > 0, "logits must be (N, C) with C >= 1")
    _check_dtype(logits)


def _check_dtype(logits: Tensor) -> None:
    require(logits.dtype in _LOGITS, "logits must be float32, float64, bfloat16 or float16")


def check_rows(logits: Tensor, target: Tensor) -> None:
    require(logits.dim() in (2, 3) and logits.shape[1] > 0, "logits must be (N, C) or (B, C, S), N = B S, with C >= 1")
    _check_dtype(logits)
    require(target.shape == (rows_of(logits),) and target.dtype == torch.int64, "target must be (N,) int64")


def checked_knobs(knobs: Tensor, objective: int, rows: int) -> Tensor:
    """Knobs with those of a row side by side."""
    require(0 <= objective < len(OBJECTIVES), f"objective must be below {len(OBJECTIVES)}")
    count = len(OBJECTIVES[objective].knobs)
    require(
        knobs.dtype in (torch.float32, torch.float64) and knobs.shape in ((count,), (rows, count)),
        f"knobs must be float32 or float64, ({count},) or (N, {count})",
    )
    return knobs if count <= 1 or knobs.stride(-1) == 1 else knobs.contiguous()


def check_loss(logits: Tensor, weight: Tensor | None, reduction: int) -> None:
    require(
        weight is None or (weight.shape == logits.shape[1:2] and weight.dtype == loss_dtype(logits)),
        "weight must be (C,) in the dtype of the loss",
    )
    require(0 <= reduction < len(REDUCTIONS), "reduction must be 0, 1 or 2")


def check_fields(logits: Tensor, fields: Tensor, prediction: Tensor, upstream: Tensor) -> None:
    rows = rows_of(logits)
    require(
        fields.dim() == 2
        and fields.shape[0] >= GRADIENT_FIELDS + (prediction.numel() > 0)
        and fields.shape[1] == rows
        and fields.is_contiguous(),
        f"fields must be contiguous, (5, N) or longer, (4, N) without prediction, ({len(FIELDS)}, N) of wide losses",
    )
    require(
        prediction.dtype == torch.int64 and prediction.shape in ((0,), (rows,)) and prediction.is_contiguous(),
        "prediction must be a contiguous (N,) int64 or empty",
    )
    require(
        fields.dtype == upstream.dtype == loss_dtype(logits) and upstream.shape in ((), (rows,)),
        "upstream must be 0-d or one value a row; it and fields must be in the dtype of the loss",
    )
