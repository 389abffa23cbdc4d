"""A loss of the table: checked arguments in, one backend, the caller's shapes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dal_kernels import node
from dal_kernels.arguments import Backend, check
from dal_kernels.backends.choose import RUN, choose
from dal_kernels.fields import Reduction
from dal_kernels.knobs import KnobValue
from dal_kernels.objectives import OBJECTIVES
from dal_kernels.reference import run_weighted
from dal_kernels.surroundings import hand_over, wants_the_call
from dal_kernels.tensors import is_dtensor

# What the operator ``loss_and_pace`` takes of a schedule that follows its calls: the numbers of the pace, how far apart
# the rows lie that it looks at, q_end and the largest bootstrap weight.
Hearer = tuple[Tensor, int, float, float]


def loss_of(
    objective: int,
    knobs: tuple[KnobValue, ...] | Tensor,
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
    hearer: Hearer | None = None,
) -> Any:
    """The loss of that id in the table: what every public function comes to.

    Args:
        knobs: as :func:`dal_kernels.knobs.knob_tensor` takes them.
        input, target, ...: as in :func:`dal_kernels.dynamics_aware_loss`.
        hearer: may be told the statistics in their place; then the loss comes back alone.
    """
    if node.short_way is not None and not torch.compiler.is_compiling():
        result = node.short_way(
            objective,
            knobs,
            input,
            target,
            weight,
            ignore_index,
            reduction,
            return_stats,
            sample_weight,
            backend,
            hearer,
        )
        if result is not None:
            return result
    given = knobs if isinstance(knobs, tuple) else (knobs,)
    if (handed_over := wants_the_call(input, target, weight, sample_weight, *given)) or is_dtensor(input):
        options: dict[str, Any] = {
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "return_stats": return_stats,
            "sample_weight": sample_weight,
            "backend": backend,
        }
        if handed_over:
            tensors = (input, target, weight, sample_weight, *given)
            return hand_over(loss_of, tensors, objective, knobs, input, target, **options)
        # Imported late: torch.distributed.tensor is not everyone's.
        from dal_kernels.dtensor import dtensor_loss

        return dtensor_loss(objective, knobs, input, target, **options)
    call = check(
        input, target, OBJECTIVES[objective], knobs, weight, ignore_index, reduction, return_stats, sample_weight,
        in_place=True,
    )  # fmt: skip
    name = choose(backend, input, objective)
    if node.short_way is None and name != "eager" and not torch.compiler.is_compiling():
        node.say_once()
    return call.shaped(*run_weighted(RUN[name], call))
