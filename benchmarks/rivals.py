"""Cross-entropy behind a classifier layer, by this package and by others: memory, processor time and error of a step.

Called by ``python -m benchmarks.layer --rivals``. Packages that are not there are said not to be; Liger's, Apple's and
quack's kernels need a GPU, but Liger's scaled form falls back to plain operations. What each computes stands in
:data:`RIVALS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import peak_memory
from dal_kernels import CrossEntropyLoss, linear_loss

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rival(NamedTuple):
    """Of a mean cross-entropy of features (N, D), a weight (C, D) and labels (N,)."""

    computes: str
    step: Step


def _torch_in_chunks(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):  # of torch 2.13 and newer
        raise ImportError("torch has no F.linear_cross_entropy")
    return F.linear_cross_entropy(x, w, y, options=nn.LinearCrossEntropyOptions())


def _liger(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Any = liger_fused_linear_cross_entropy(x, w, y)
    return loss[0] if isinstance(loss, tuple) else loss


def _liger_scaled(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    losses: Any = LigerFusedLinearScaledCrossEntropyFunction.apply(x, w, y)
    mean: Tensor = (losses[0] if isinstance(losses, tuple) else losses).mean()
    return mean


def _quack(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss: Tensor = chunked_linear_cross_entropy(x, w, y)
    return loss


def _apple(how: str) -> Step:
    def step(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        loss: Tensor = linear_cross_entropy(x, w, y, impl=how)
        return loss

    return step


def _trl(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    log_prob: Tensor = ChunkedLogProbFunction.apply(x, w, None, y, 1.0, 32768, None, 1.0, ())[0]
    return -log_prob.mean()


RIVALS = {
    "dal_kernels.linear_loss": Rival(
        "any loss of the family, here cross-entropy; gradients in the forward",
        lambda x, w, y: linear_loss(CrossEntropyLoss(), x, w, y),  # type: ignore[arg-type,return-value]
    ),
    "F.linear + F.cross_entropy": Rival("all logits", lambda x, w, y: F.cross_entropy(F.linear(x, w), y)),
    "F.linear_cross_entropy": Rival("cross-entropy in chunks of rows, by its default options", _torch_in_chunks),
    "trl, ChunkedLogProbFunction": Rival("ln p_y (and entropy, if asked) in tiles; logits again in the backward", _trl),
    "cut_cross_entropy, torch_compile": Rival("all logits, compiled", _apple("torch_compile")),
    "cut_cross_entropy, cce": Rival(
        "logits in tiles on the chip; leaves out gradients below a threshold", _apple("cce")
    ),
    "liger_kernel": Rival("cross-entropy in chunks of rows; gradients in the forward", _liger),
    "liger_kernel, scaled": Rival(
        "ln p_y of logits over a temperature (and entropy, if asked) in chunks of rows; logits again in the backward",
        _liger_scaled,
    ),
    "quack": Rival("cross-entropy in chunks of rows; gradients in the forward", _quack),
}


def case(rows: int, width: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features and a weight whose logits are of the size of one, and labels."""
    x, w = torch.randn(rows, width), torch.randn(classes, width) / width**0.5
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), torch.randint(classes, (rows,))


def error_of(step: Step, width: int, dtype: torch.dtype) -> float:
    """How far the gradient of the weight is from float64's of the same inputs, relative to its length."""
    x, w, y = case(256, width, 5000, dtype)
    step(x, w, y).backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, w)]
    F.cross_entropy(F.linear(*exact), y).backward()
    assert w.grad is not None
    assert exact[1].grad is not None
    return float((w.grad.double() - exact[1].grad).norm() / exact[1].grad.norm())


def outcome(name: str, rows: int, width: int, classes: int, dtype: torch.dtype) -> tuple[float, float, float] | str:
    """(bytes above parameters and inputs, seconds of the processor, error) of a step in this process, or why not."""
    torch.manual_seed(0)
    step = RIVALS[name].step
    try:
        error = error_of(step, width, dtype)
        x, w, y = case(rows, width, classes, dtype)
        before = peak_memory(reset=True)
        step(x, w, y).backward()
        taken = peak_memory() - before
        x.grad = w.grad = None
        start = time.process_time()  # of a second step, because the first may compile
        step(x, w, y).backward()
        return taken, time.process_time() - start, error
    except ImportError as missing:
        return f"not installed: {missing}"
    except RuntimeError as refused:
        first = str(refused).partition("\n")[0]
        return f"needs CUDA: {first}" if "driver" in first or "CUDA" in first else f"failed: {first}"
