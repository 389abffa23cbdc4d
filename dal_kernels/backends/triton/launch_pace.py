"""The operators of the Triton backend that keep the pace of DAL. Nothing here waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dal_kernels.backends.triton import device
from dal_kernels.backends.triton.arguments import require
from dal_kernels.backends.triton.launch import Made, launch_loss
from dal_kernels.backends.triton.pace import follow_rows, set_bound
from dal_kernels.backends.triton.record import start
from dal_kernels.fields import MAX_PROB, TARGET_PROB

_BLOCK = 1024


def _check_numbers(numbers: Tensor) -> None:
    require(
        numbers.shape == (8,) and numbers.dtype == torch.float32 and numbers.is_contiguous(),
        "numbers must be (8,) contiguous float32",
    )


def _check_follower(numbers: Tensor, every: int) -> None:
    _check_numbers(numbers)
    require(every >= 1, "every must be at least 1")


def see(
    numbers: Tensor,
    max_prob: Tensor,
    target_prob: Tensor,
    prediction: Tensor,
    target: Tensor,
    every: int,
    q_end: float,
    max_weight: float,
) -> None:
    _check_follower(numbers, every)
    count = max_prob.numel()
    for values in (max_prob, target_prob, prediction, target):
        require(
            values.numel() == count and values.is_contiguous(), "statistics and target must be contiguous, of N rows"
        )
    require(
        max_prob.dtype == target_prob.dtype and max_prob.dtype in (torch.float32, torch.float64),
        "max_prob and target_prob must be float32 or float64, and both the same",
    )
    require(prediction.dtype == target.dtype == torch.int64, "prediction and target must be int64")
    with device.current(numbers):
        start(follow_rows, (1,))(
            numbers, max_prob, target_prob, prediction, target, count, every, q_end, max_weight, BLOCK=_BLOCK
        )


def loss_and_pace(logits: Tensor, target: Tensor, *arguments: Any) -> Made:
    """``loss_and_fields`` with the prediction, and :func:`see`: in its launch where the last program adds up."""
    *of_loss, numbers, every, q_end, max_weight = arguments
    _check_follower(numbers, every)
    require(target.is_contiguous(), "statistics and target must be contiguous, of N rows")
    follower = (numbers, every, q_end, max_weight)
    made, followed = launch_loss((logits, target, *of_loss), want_prediction=True, want_fields=True, follower=follower)
    if not followed:
        _, _, fields, prediction, _ = made
        see(numbers, fields[MAX_PROB], fields[TARGET_PROB], prediction, target, *follower[1:])
    return made


def keep_pace(numbers: Tensor, bound: float, q_start: float, opening: float, q_end: float, max_weight: float) -> None:
    _check_numbers(numbers)
    with device.current(numbers):
        start(set_bound, (1,))(numbers, bound, q_start, opening, q_end, max_weight, num_warps=1)
