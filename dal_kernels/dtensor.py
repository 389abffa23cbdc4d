"""DTensor logits in the plain loss: unwrapped here, run on each rank's part, and joined.

What :func:`dal_kernels.dynamics_aware_loss` takes, for each dimension of the mesh (at most one may split the classes):

    Shard on classes  one all-gather of row statistics, as dal_kernels.distributed
    Shard(0), rows    each rank its rows; "mean" and "sum" add up with one all-reduce of three numbers
    Replicate         nothing to join

The result is a plain tensor: "mean" and "sum" are of all rows and the same on every rank; "none" and statistics are of
this rank's rows. The gradient is a DTensor with the placements of the logits. A target (or a q or bootstrap_weight of
one value a row) may be a DTensor too, or plain: this rank's rows of it. torch.compile takes rows split or replicated
into one graph; where the classes are split it breaks its graph, as in dal_kernels.distributed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from dal_kernels.arguments import RowStats
from dal_kernels.collectives import sum_over_ranks
from dal_kernels.functional import loss_of
from dal_kernels.knobs import KnobValue
from dal_kernels.objectives import OBJECTIVES
from dal_kernels.reference import row_factors
from dal_kernels.sliced import class_parallel_loss_of
from dal_kernels.tensors import of_rows


def dtensor_loss(
    objective: int, knobs: tuple[KnobValue, ...] | Tensor, input: Tensor, target: Tensor, **options: Any
) -> Any:
    """The loss of DTensor logits; arguments as of :func:`dal_kernels.functional.loss_of`.

    Raises:
        ValueError: a placement that is none of the above, an argument on another mesh, or a sample_weight that requires
            grad where rows are split: what it does to other ranks' rows is not told them.
    """
    assert isinstance(input, DTensor)
    by_class, by_row = _split(input)
    split_rows: list[Placement] = [Shard(0) if dim in by_row else Replicate() for dim in range(input.device_mesh.ndim)]
    whole: list[Placement] = [Replicate()] * input.device_mesh.ndim

    def local_of(name: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        if value.device_mesh != input.device_mesh:
            raise ValueError(f"{name} must be on the mesh of input, {input.device_mesh}, got {value.device_mesh}")
        placements = split_rows if value.dim() and name != "weight" else whole
        return value.redistribute(placements=placements).to_local()

    target = local_of("target", target)
    if not isinstance(knobs, Tensor):
        knobs = tuple(
            local_of(knob.name, value) for knob, value in zip(OBJECTIVES[objective].knobs, knobs, strict=True)
        )
    for name in ("weight", "sample_weight"):
        options[name] = local_of(name, options[name])
    weight, sample_weight = options["weight"], options["sample_weight"]
    reduction, ignore_index = options["reduction"], options["ignore_index"]
    logits = input.to_local(grad_placements=input.placements)
    place = int(input.dim() > 1)
    classes = input.shape[place]
    joined = bool(by_row) and reduction != "none"
    if joined:
        options["reduction"] = "sum"
        if sample_weight is not None and sample_weight.requires_grad:
            raise ValueError("sample_weight must not require grad where a DTensor's rows are split, got one that does")
    if by_class is None:
        result: Any = loss_of(objective, knobs, logits, target, **options)
    else:
        # What Shard gives each rank is what torch.chunk would.
        most = -(-classes // input.device_mesh.size(by_class))
        place_of_slice: dict[str, Any] = {
            "class_offset": min(classes, most * input.device_mesh.get_local_rank(by_class)),
            "num_classes": classes,
            "group": input.device_mesh.get_group(by_class),
        }
        result = class_parallel_loss_of(objective, knobs, logits, target, **place_of_slice, **options)
    if not joined:
        return result
    loss, stats = result if options["return_stats"] else (result, None)
    with torch.no_grad():
        counts = row_factors(target.reshape(-1), classes, weight, ignore_index, torch.float64)
        if sample_weight is not None:
            weights = of_rows("sample_weight", sample_weight, logits, target.shape, "one value a row")
            counts = torch.where(counts == 0, 0.0, counts * weights)
        counted = counts.sum()
        sums = torch.stack([loss.detach().double(), counted, (target != ignore_index).sum()])
        for dim in by_row:
            sum_over_ranks(sums, input.device_mesh.get_group(dim))
        total, divisor, rows = sums.to(loss.dtype)
        scale = torch.ones_like(total)
        if reduction == "mean":
            total = total / divisor
            # Where no row counted the gradient is 0; where their weights are all 0 it is 0 / 0.
            scale = torch.where(divisor == 0, torch.where(rows == 0, 0.0, torch.nan), 1 / divisor)
    loss = _OfAllRows.apply(loss, total, scale)
    return (loss, RowStats(*stats)) if stats is not None else loss


def _split(input: DTensor) -> tuple[int | None, list[int]]:
    """The dimension of the mesh that splits the classes, or None, and those that split the rows."""
    by_class: list[int] = []
    by_row: list[int] = []
    for dim, placement in enumerate(input.placements):
        # Not by type(), which torch.compile of torch 2.10 gets wrong for placements.
        at = placement.dim % input.dim() if isinstance(placement, Shard) else None
        if at == int(input.dim() > 1):
            by_class.append(dim)
        elif at == 0:
            by_row.append(dim)
        elif not isinstance(placement, Replicate):
            by_class = [-1, -1]
            break
    if len(by_class) > 1:
        raise ValueError(
            "input must be a DTensor with placements Shard on classes (once), Shard(0) on rows and Replicate, "
            f"got {input.placements}"
        )
    return (by_class[0] if by_class else None), by_row


class _OfAllRows(torch.autograd.Function):
    """The loss of all ranks' rows in the place of that of this rank's, scaled."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, total: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return upstream * scale, None, None
