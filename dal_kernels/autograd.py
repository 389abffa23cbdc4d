"""Which buffers live from forward to backward. Nothing numeric happens here.

"mean" and "sum" write the gradient in the forward, while the row is in cache; the backward only scales it, and where
the upstream gradient is 1 does nothing. "none", whose upstream gradient is known only later, and float16, in which a
gradient already divided by N would flush to zero before a GradScaler's factor arrives, keep a few coefficients a row
and compute the gradient in the backward.

csrc/autograd is the same in C++, for the common case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dal_kernels.arguments import Call, RowStats
from dal_kernels.fields import REDUCTION
from dal_kernels.once import DifferentiableOnce, anchor_of
from dal_kernels.ops import KERNELS, Kernels
from dal_kernels.recorded import recorded_loss
from dal_kernels.surroundings import graph_is_kept, has_no_value, is_recording


def fused_loss(call: Call, backend: str) -> tuple[Tensor, RowStats | None]:
    """The reduced loss of a checked call by the fused kernels of ``backend``, differentiable once."""
    logits = call.logits
    if is_recording(logits):
        return recorded_loss(call, backend)
    if logits.requires_grad and torch.is_grad_enabled():
        if torch.compiler.is_compiling():
            outputs = _FusedLoss.apply(logits, call, backend, None)
        else:
            outputs = _apply(logits, call, backend, anchor_of(logits))
        if not call.want_stats:
            return outputs, None
        loss, fields, prediction = outputs
    else:
        arguments = _arguments(logits, call, want_gradient=False)
        if not call.want_stats:
            return KERNELS[backend].loss(*arguments)[0], None
        loss, _, fields, prediction, *_ = KERNELS[backend].loss_and_fields(*arguments, True)
    return loss, RowStats.of_fields(fields, prediction)


def _arguments(logits: Tensor, call: Call, want_gradient: bool) -> tuple[Any, ...]:
    return (
        logits,
        call.target,
        call.knobs,
        call.weight,
        call.objective.id,
        call.ignore_index,
        REDUCTION[call.reduction],
        want_gradient,
    )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, call: Call, backend: str, anchor: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        kernels = KERNELS[backend]
        gradient_ready = (
            call.reduction != "none"
            and logits.dtype != torch.float16
            and kernels.writes_gradient(logits, call.objective.id)
        )
        # A bfloat16 gradient has been rounded already: to scale it by anything but 1 it is computed again. Compiled
        # code cannot choose by value, and rounds twice.
        recompute = not gradient_ready or (logits.dtype == torch.bfloat16 and not torch.compiler.is_compiling())
        arguments = _arguments(logits, call, gradient_ready)
        # What ties the gradient to the graph of the logits, should it be differentiated again.
        ctx.anchor = logits if anchor is None else anchor
        ctx.plan = (gradient_ready, recompute, backend, call.ignore_index)
        if not (recompute or call.want_stats):
            loss, gradient, *correction = kernels.loss(*arguments)
            ctx.save_for_backward(gradient, *correction)
            return loss
        loss, gradient, fields, prediction, *correction = kernels.loss_and_fields(*arguments, call.want_prediction)
        ctx.save_for_backward(gradient, *((logits, call.target, fields, prediction) if recompute else ()), *correction)
        if not call.want_stats:
            return loss
        if recompute:  # what the user gets may be edited
            fields, prediction = fields.clone(), prediction.clone()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(fields, prediction)
        return loss, fields, prediction

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Tensor, None, None, None]:
        gradient_ready, recompute, backend, ignore_index = ctx.plan
        kernels = KERNELS[backend]
        compiling = torch.compiler.is_compiling()
        keep_saved = not gradient_ready or compiling or graph_is_kept() or has_no_value(upstream)
        # Read once: hooks (checkpointing, offloading) may refuse to hand out a tensor a second time.
        saved = ctx.saved_tensors
        gradient, *rest = saved
        if not keep_saved:
            # Nobody asks for the saved gradient again, so it may be scaled in place, or given away as it is.
            rescale = _rescale_on_host if kernels.scale_gradient is None else _rescale_on_device
            gradient = rescale(saved, upstream, ignore_index, recompute, kernels)
        elif recompute:
            logits, target, fields, prediction, *correction = rest
            gradient = kernels.gradient(logits, target, fields, prediction, upstream, ignore_index, *correction)
        else:
            gradient = gradient * upstream
            for factor in rest:
                gradient = gradient * factor
        if not compiling and torch.is_grad_enabled():
            gradient = DifferentiableOnce.apply(gradient, ctx.anchor)
        return gradient, None, None, None


def _rescale_on_host(
    saved: tuple[Tensor, ...], upstream: Tensor, ignore_index: int, recompute: bool, kernels: Kernels
) -> Tensor:
    """The saved gradient times the upstream one, whose value costs nothing to look at here."""
    gradient, *rest = saved
    if upstream.item() == 1.0:
        return gradient
    if recompute:
        logits, target, fields, prediction = rest
        return kernels.gradient(logits, target, fields, prediction, upstream, ignore_index)
    return gradient.mul_(upstream)


def _rescale_on_device(
    saved: tuple[Tensor, ...], upstream: Tensor, ignore_index: int, recompute: bool, kernels: Kernels
) -> Tensor:
    """The saved gradient times the upstream one and the correction, whose values are looked at on the device alone."""
    gradient, *rest, correction = saved
    if recompute:
        kernels.rewrite_gradient(gradient, *rest, upstream, ignore_index, correction)
    else:
        kernels.scale_gradient(gradient, upstream, correction)
    return gradient


# Function.apply first looks for torch.func transforms, as long as a kernel takes at classifier sizes. Calls under
# transforms do not come here.
_apply: Callable[..., Any] = getattr(super(torch.autograd.Function, _FusedLoss), "apply", _FusedLoss.apply)
