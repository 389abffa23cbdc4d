"""The loss as one operator with an autograd of its own, for what records operators and differentiates them later.

torch.export, make_fx and torch.jit.trace keep operators and forget a torch.autograd.Function around them: what they
record must be differentiable by itself, or a model that was exported with its loss would train nothing, in silence.

    fused_loss(logits, target, knobs, weight, objective, ignore_index, reduction, backend)
        -> (loss, fields, prediction, correction)

``backend`` says whose kernels; the rest is as in :mod:`dal_kernels.ops`, ``correction`` being empty on a CPU. The
gradient is made in the backward, from the logits: 3 passes over them instead of the 2 of an ordinary call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dal_kernels.arguments import Call, RowStats
from dal_kernels.fields import REDUCTION
from dal_kernels.namespace import OPERATORS, operators
from dal_kernels.once import DifferentiableOnce
from dal_kernels.ops import KERNELS


def recorded_loss(call: Call, backend: str) -> tuple[Tensor, RowStats | None]:
    """The reduced loss of a checked call, as an operator that can be recorded; differentiable once."""
    loss, fields, prediction, _ = _fused_loss(
        call.logits,
        call.target,
        call.knobs,
        call.weight,
        call.objective.id,
        call.ignore_index,
        REDUCTION[call.reduction],
        backend,
    )
    if not call.want_stats:
        return loss, None
    return loss, RowStats.of_fields(fields.detach(), prediction)


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *of_call, backend = arguments
    # No gradient is wanted here. The prediction is, because a GPU keeps the fields of the statistics only beside it.
    loss, _, fields, prediction, *correction = KERNELS[backend].loss_and_fields(*of_call, False, True)
    return loss, fields, prediction, *(correction or [loss.new_empty(0)])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, *_, ignore_index, _reduction, ctx.backend = inputs
    _, fields, prediction, correction = output
    ctx.ignore_index = ignore_index
    ctx.save_for_backward(logits, target, fields, prediction, correction)
    ctx.mark_non_differentiable(fields, prediction, correction)


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, target, fields, prediction, correction = ctx.saved_tensors
    corrections = () if ctx.backend == "cpu" else (correction,)
    gradient = KERNELS[ctx.backend].gradient(
        logits, target, fields, prediction, upstream, ctx.ignore_index, *corrections
    )
    if torch.is_grad_enabled():
        gradient = DifferentiableOnce.apply(gradient, logits)
    return gradient, *(None,) * 7


_library = torch.library.Library(OPERATORS, "FRAGMENT")
_library.define(
    "fused_loss(Tensor logits, Tensor target, Tensor knobs, Tensor? weight, int objective, int ignore_index, "
    "int reduction, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("fused_loss", _run, "CompositeExplicitAutograd")
torch.library.register_fake(f"{OPERATORS}::fused_loss", _run, lib=_library)
torch.library.register_autograd(f"{OPERATORS}::fused_loss", _differentiate, setup_context=_remember, lib=_library)
_fused_loss = operators.fused_loss.default
