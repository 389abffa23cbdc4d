"""The loss fused with the classifier layer before it: rows go through in chunks, their logits never exist at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from dal_kernels.arguments import BOOTSTRAPS, Backend, Bootstrap, OptionsOfKernels, RowStats
from dal_kernels.fields import Reduction
from dal_kernels.linear_call import linear_loss_of
from dal_kernels.objectives import dynamics_aware_of
from dal_kernels.tensors import check_choice

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["linear_dynamics_aware_loss"]


@overload
def linear_dynamics_aware_loss(
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    bias: Tensor | None = ...,
    return_stats: Literal[False] = ...,
    chunk_bytes: int | None = ...,
    **options: Unpack[OptionsOfKernels],
) -> Tensor: ...
@overload
def linear_dynamics_aware_loss(
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    bias: Tensor | None = ...,
    return_stats: Literal[True],
    chunk_bytes: int | None = ...,
    **options: Unpack[OptionsOfKernels],
) -> tuple[Tensor, RowStats]: ...
@overload
def linear_dynamics_aware_loss(
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    bias: Tensor | None = ...,
    return_stats: bool,
    chunk_bytes: int | None = ...,
    **options: Unpack[OptionsOfKernels],
) -> Tensor | tuple[Tensor, RowStats]: ...
def linear_dynamics_aware_loss(
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = 0.0,
    *,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    bootstrap: Bootstrap = "soft",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """``dynamics_aware_loss(F.linear(input, classifier_weight, bias), target, ...)`` without its logits in memory.

    A chunk of rows at a time goes through the classifier, or on a CPU from 4,096 classes on a block of classes; its
    logits become their own gradient, and that the gradients of input, weight and bias, all in the forward ("none" does
    it in the backward, when the upstream gradient is known, at the cost of a second pass through the classifier). Above
    its arguments and their gradients a step takes one chunk. Gradients are summed in float32 (float64 for float64)
    whatever the dtype of the weight, and kept in it until the backward; but that of a bfloat16 weight, where blocks of
    classes are taken, is rounded when its block is finished. On a CPU and on ROCm half types multiply in float32 for
    such sums, and on a CPU without instructions for half types all products are made in float32.

    Args:
        input: features of shape (D,), (N, D) or (N, D, d1, ..., dk), D standing where C stands in logits; float16,
            bfloat16, float32 or float64.
        classifier_weight: (C, D), as of :class:`torch.nn.Linear`; same dtype. Under autocast the dtypes may differ, and
            logits are made in autocast's, as by F.linear.
        bias: (C,), or None.
        target, q, bootstrap_weight, weight, ignore_index, reduction, bootstrap, return_stats, sample_weight, backend:
            as in :func:`dal_kernels.dynamics_aware_loss`. Under the backend "eager" and in torch.func transforms plain
            operations do the same; there are derivatives of any order, and the transforms make all logits at once.
        chunk_bytes: memory for a chunk. Default: half of what the weight takes in the dtype of the logits, at least
            64 MiB, and with blocks of classes a few MiB. Larger chunks make larger matmuls and pass over the weight's
            gradient less often; from 128 rows of logits on, on a CPU, chunks of rows are taken.

    Returns:
        As :func:`dal_kernels.dynamics_aware_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dal_kernels.dynamics_aware_loss`, and where shapes, dtypes or
            devices of input, classifier_weight and bias do not fit, or chunk_bytes is not a positive int.
    """
    check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    result: Tensor | tuple[Tensor, RowStats] = linear_loss_of(
        dynamics_aware_of(bootstrap).id, (q, bootstrap_weight), input, classifier_weight, target, bias=bias,
        weight=weight, ignore_index=ignore_index, reduction=reduction, return_stats=return_stats,
        sample_weight=sample_weight, backend=backend, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    return result
