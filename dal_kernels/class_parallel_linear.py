"""A classifier whose classes are split over ranks, and a loss of the family behind it, as one module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dal_kernels.arguments import Call, RowStats, check, label_error
from dal_kernels.collectives import gathered_rows, rows_of_ranks, sendable
from dal_kernels.fields import Reduction
from dal_kernels.forms import check_fits, plain_form
from dal_kernels.layer import CLASSES_LAST, Layer, check_budget, layer_of
from dal_kernels.objectives import OBJECTIVES
from dal_kernels.sliced import breaks_graph, class_parallel_linear_loss_of
from dal_kernels.tensors import shape_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ClassParallelLinear"]


class ClassParallelLinear(nn.Module):
    """:class:`dal_kernels.LinearLoss` with the classes of its classifier split over the ranks of a mesh.

    Each rank gives rows of its own, as trainers of face recognition do: features and labels are gathered, each rank
    makes the logits of its classes, and one all-gather of 4 to 7 floats a row makes the loss of all rows, which is the
    same on every rank. In the backward one reduce-scatter brings each rank the gradient of its features. With
    ``gather=False`` all ranks give the same rows, as tensor-parallel models do; features that differ are found out.

    The parameters are DTensors of all classes: optimisers take them, and torch.distributed.checkpoint saves them whole
    and loads them on another number of ranks.

    Args:
        loss: a module of the family, equal on every rank, without label_smoothing (but for CrossEntropyLoss without
            class weights), target_shift and scale; class weights are (num_classes,).
        in_features, num_classes: D and C of the whole classifier.
        bias: whether it has one.
        mesh: one-dimensional; by default of all ranks, on the device type of ``device``.
        gather: whether ranks give rows of their own, or all the same. On a CPU a rank may have fewer than others, which
            it then sends rows to ignore for; elsewhere each must have as many.
        averaged: whether what makes the features averages its gradients over the ranks, as DistributedDataParallel
            does: they are multiplied by the number of ranks before.
        chunk_bytes: as in :func:`dal_kernels.linear_loss`.
        device, dtype: of the parameters.

    Attributes:
        loss: as given.
        weight, bias: DTensors (C, D) and (C,) that are split by classes.

    Raises:
        TypeError, ValueError: naming the argument, and where torch.distributed is not initialised.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        loss: Any,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        mesh: DeviceMesh | None = None,
        gather: bool = True,
        averaged: bool = False,
        chunk_bytes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # Imported late: torch.distributed.tensor is not everyone's.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        check_fits(loss, num_classes)
        plain_form(loss, torch.empty(0), num_classes)
        check_budget(chunk_bytes)
        if not dist.is_initialized():
            raise ValueError(
                "mesh must be of an initialised torch.distributed, got none: call init_process_group first"
            )
        device = torch.device(device or torch.get_default_device())
        if mesh is None:
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: pass the one of the classes, mesh[name]")
        self.loss: Any = loss
        self.in_features, self.num_classes = in_features, num_classes
        self.mesh, self.gather, self.averaged, self.chunk_bytes = mesh, gather, averaged, chunk_bytes
        world, rank = mesh.size(), mesh.get_local_rank()
        # As DTensor splits them.
        most = -(-num_classes // world)
        self.class_offset = min(rank * most, num_classes)
        size = min(most, num_classes - self.class_offset)
        # Ranks have the same seed as a rule, and must not have the same classes.
        seed = int(torch.randint(2**62, (), device="cpu"))
        generator = torch.Generator(device).manual_seed(seed + rank)
        bound = 1 / math.sqrt(in_features) if in_features else 0.0

        def split(*shape: int) -> nn.Parameter:
            local = torch.empty((size, *shape[1:]), device=device, dtype=dtype)
            local.uniform_(-bound, bound, generator=generator)
            stride = (shape[1], 1) if len(shape) == 2 else (1,)
            parameter = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size(shape), stride=stride)
            return nn.Parameter(parameter)

        self.weight = split(num_classes, in_features)
        self.register_parameter("bias", split(num_classes) if bias else None)

    @breaks_graph
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        return_stats: bool = False,
        sample_weight: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of all rows of all ranks, the same on each.

        Args:
            input: features (..., D) of this rank's rows; with ``gather=False`` of all.
            target: class indices (...), of all C classes.
            return_stats: also return a :class:`dal_kernels.RowStats` of this rank's rows, shaped like ``target``.
            sample_weight: shaped like ``target``. Must not require grad with ``gather``.
            reduction: in the place of the loss's own; "none" not with ``gather``, because a rank has no upstream
                gradient of the rows of others.

        Raises:
            TypeError, ValueError: as :func:`dal_kernels.linear_loss`; on a CPU on all ranks, naming the one whose call
                is wrong, and where their calls differ. Elsewhere looking would cost a synchronisation: rows with a
                label that is no class are NaN, and other differences fail in torch.distributed.
            RuntimeError: a rank has ended, or does not answer within the timeout of the group.
        """
        group, learns, rows, problem = self.mesh.get_group(), False, None, None
        try:
            learns = self.loss.learns(input, *self._local_parameters())
            rows = self._checked(input, target, sample_weight, reduction, return_stats or learns)
        except Exception as error:  # of which the ranks must hear that would wait for this one
            problem = sendable(error)
        counts = None
        if self.weight.device.type == "cpu":  # elsewhere what the others say would have to be waited for
            same = {} if rows is None else self._same(rows, learns)
            counts = rows_of_ranks(0 if rows is None else len(rows.call.target), same, problem, group)
        if rows is None:
            assert problem is not None
            raise problem
        layer, call = rows.layer, rows.call
        own, labels, weights = layer.features, call.target, call.sample_weight
        features, count = own, len(own)
        if self.gather:
            most = count if counts is None else max(counts)
            own, labels = _padded(own, most, 0.0), _padded(labels, most, call.ignore_index)
            with torch.no_grad():
                features, labels = gathered_rows(own, group), gathered_rows(labels, group)
                weights = None if weights is None else gathered_rows(_padded(weights, most, 0.0), group)
            if self.averaged and own.requires_grad:
                own = own.view_as(own)  # not to leave hooks on what the caller has
                own.register_hook(lambda gradient: gradient * self.mesh.size())
        result = class_parallel_linear_loss_of(
            call.objective.id, rows.knobs, features, layer.classifier, labels, bias=layer.bias,
            class_offset=self.class_offset, num_classes=self.num_classes, group=group, sample_weight=weights,
            return_stats=return_stats or learns, chunk_bytes=self.chunk_bytes, own_rows=own if self.gather else None,
            **rows.options,
        )  # fmt: skip
        if learns:
            result = self.loss.told(result, labels, return_stats, self.num_classes)
        loss, stats = result if return_stats else (result, None)
        loss = loss.reshape(target.shape) if call.reduction == "none" else loss
        if stats is None:
            return loss
        if self.gather:
            begin = self.mesh.get_local_rank() * len(own)
            stats = RowStats(*(field[begin : begin + count] for field in stats))
        return loss, RowStats(*(field.reshape(target.shape) for field in stats))

    def step(self, t: float | None = None) -> None:
        """Advance the loss's schedule by one, or to position ``t``."""
        self.loss.step(t)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, ranks={self.mesh.size()}, "
            f"bias={self.bias is not None}, gather={self.gather}"
        )

    def _local_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of this rank's classes, as parts of the graphs of the DTensors."""
        weight: Any = self.weight
        bias: Any = self.bias
        return weight.to_local(), None if bias is None else bias.to_local()

    def _checked(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None,
        reduction: Reduction | None,
        want_stats: bool,
    ) -> _Rows:
        """This rank's rows, of which nothing is wrong as far as this rank can tell; else TypeError or ValueError."""
        objective, knobs, options = plain_form(self.loss, input, self.num_classes)
        options["reduction"] = options["reduction"] if reduction is None else reduction
        for name, value in (("input", input), ("target", target)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(f"input must have shape (..., {self.in_features}), got shape {shape_of(input)}")
        if target.shape != input.shape[:-1] or target.is_floating_point():
            raise ValueError(
                f"target must be class indices of shape {tuple(input.shape[:-1])} for input of shape "
                f"{shape_of(input)}, got {target.dtype} of shape {shape_of(target)}"
            )
        if sample_weight is not None and (not isinstance(sample_weight, Tensor) or sample_weight.shape != target.shape):
            got = shape_of(sample_weight) if isinstance(sample_weight, Tensor) else type(sample_weight).__name__
            raise ValueError(f"sample_weight must have the shape of target, {shape_of(target)}, got {got}")
        if self.gather and options["reduction"] == "none":
            raise ValueError("reduction must be 'mean' or 'sum' where rows are gathered, got 'none'")
        if self.gather and sample_weight is not None and sample_weight.requires_grad:
            raise ValueError("sample_weight must not require grad where rows are gathered, got one that does")
        flat = input.reshape(target.numel(), self.in_features)
        layer, local = layer_of(flat, *self._local_parameters(), self.chunk_bytes, 0, CLASSES_LAST)
        call = check(
            local.new_empty(()).expand(len(layer.features), self.num_classes), target.reshape(-1),
            OBJECTIVES[objective], knobs, options["weight"], options["ignore_index"], options["reduction"], want_stats,
            None if sample_weight is None else sample_weight.reshape(-1),
        )  # fmt: skip
        problem = label_error(call)
        if problem is not None:
            raise problem
        return _Rows(layer, call, knobs, options)

    def _same(self, rows: _Rows, learns: bool) -> dict[str, str]:
        """What must be the same on every rank: else collectives do not fit each other, or losses differ."""
        call, features = rows.call, rows.layer.features
        learnt = torch.is_grad_enabled() and features.requires_grad
        same = {
            "input": f"{features.dtype}{' that requires grad' if learnt else ''}",
            "sample_weight": "None" if call.sample_weight is None else "a tensor",
            "return_stats": str(call.want_stats),
            "loss": f"{call.objective.name}, reduction {call.reduction!r}, ignore_index {call.ignore_index}",
        }
        if call.knobs.dim() == 1 and not learns:  # ranks that learn agree when they are told to
            same["the loss's knobs"] = str(call.knobs.tolist())
        return same if self.gather else {**same, "the number of rows": str(len(features))}


class _Rows(NamedTuple):
    """Of this rank: its checked layer and call, and the knobs and options of its loss as they were given."""

    layer: Layer
    call: Call
    knobs: Any
    options: dict[str, Any]


def _padded(values: Tensor, most: int, value: float) -> Tensor:
    """Values of rows (n, ...) and of some more."""
    missing = most - len(values)
    return F.pad(values, (*(0, 0) * (values.dim() - 1), 0, missing), value=value) if missing else values
