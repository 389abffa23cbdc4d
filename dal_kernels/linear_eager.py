"""A loss behind a classifier layer by plain operations, a chunk of whose logits exists at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dal_kernels import reference
from dal_kernels.arguments import Call, RowStats, raise_for_labels
from dal_kernels.fields import loss_dtype_of
from dal_kernels.layer import Layer
from dal_kernels.linear_chunks import Changes
from dal_kernels.objective import RowQuantities
from dal_kernels.quantities import quantities_of_call
from dal_kernels.surroundings import is_recording, transforms_active

_Made = TypeVar("_Made")


def changed_logits(
    layer: Layer, target: Tensor, changes: Changes, parts: tuple[Tensor, Tensor, Tensor | None] | None = None
) -> Tensor:
    """The logits (n, C) of flat rows as the softmax takes them; of ``parts`` in the place of the layer's."""
    logits = F.linear(*(layer[:3] if parts is None else parts))
    softcap, shift, scale = changes
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if shift is not None:
        known = (target >= 0) & (target < logits.shape[1])
        value = torch.where(known, shift, 0).to(logits.dtype)
        logits = logits.scatter_add(1, torch.where(known, target, 0).unsqueeze(1), value.unsqueeze(1))
    return logits if scale is None else logits * scale


def makes_all_at_once(layer: Layer) -> bool:
    """Whether a call is one that chunks would be in the way of, or has but one."""
    at_once = transforms_active() or torch.compiler.is_compiling() or is_recording(layer.features)
    return at_once or len(layer.features) <= layer.chunk


def eager_loss(
    layer: Layer, changes: Changes, call: Call, row_weight: Tensor | None = None
) -> tuple[Tensor, RowStats | None]:
    """By plain operations; a chunk's logits are made again in the backward.

    Args:
        row_weight: (N,), which multiplies the losses of rows; the reduction is "sum" then.
    """
    raise_for_labels(call)
    if makes_all_at_once(layer):
        logits = changed_logits(layer, call.target, changes)
        if row_weight is None:
            return reference.reduced_loss(call._replace(logits=logits))
        loss, all_stats = reference.reduced_loss(call._replace(logits=logits, reduction="none"))
        return (loss * row_weight).sum(), all_stats

    def losses_of(logits: Tensor, rows: slice) -> tuple[Tensor, RowStats | None]:
        knobs = call.knobs if call.knobs.dim() == 1 else call.knobs[rows]
        part = call._replace(logits=logits, target=call.target[rows], knobs=knobs, reduction="none")
        return reference.reduced_loss(part)

    losses, stats = zip(*_of_chunks(layer, changes, call.target, losses_of), strict=True)
    loss = torch.cat(losses)
    if row_weight is not None:
        loss = loss * row_weight
    if call.reduction != "none":
        loss = loss.sum()
    if call.reduction == "mean":
        classes = layer.classifier.shape[0]
        loss = loss / reference.row_factors(call.target, classes, call.weight, call.ignore_index, loss.dtype).sum()
    return loss, RowStats(*map(torch.cat, zip(*stats, strict=True))) if call.want_stats else None


def eager_quantities(
    layer: Layer, changes: Changes, call: Call, targets: tuple[Tensor, ...]
) -> tuple[tuple[RowQuantities, ...], Tensor]:
    """:func:`dal_kernels.quantities.quantities_of_call` by plain operations, in the same way."""

    def quantities_of(logits: Tensor, rows: slice) -> tuple[tuple[RowQuantities, ...], Tensor]:
        part = call._replace(logits=logits, target=call.target[rows])
        return quantities_of_call(part, tuple(target[rows] for target in targets), "eager")

    if makes_all_at_once(layer):
        return quantities_of(changed_logits(layer, call.target, changes), slice(None))
    chunks, predictions = zip(*_of_chunks(layer, changes, call.target, quantities_of), strict=True)
    of_targets = []
    for of_chunks in zip(*chunks, strict=True):
        tensors = [torch.cat(column) for column in zip(*(row.tensors for row in of_chunks), strict=True)]
        of_targets.append(RowQuantities._make([*tensors, of_chunks[0].classes]))
    return tuple(of_targets), torch.cat(predictions)


def _of_chunks(
    layer: Layer, changes: Changes, target: Tensor, make: Callable[[Tensor, slice], _Made]
) -> Iterator[_Made]:
    """What ``make`` makes of the logits of some rows, of all chunks in their order."""
    dtype = layer.features.dtype
    # What the chunks add to the gradients of these is added up in float32.
    sums = loss_dtype_of(dtype)
    classifier, bias = layer.classifier.to(sums), None if layer.bias is None else layer.bias.to(sums)
    softcap, shift, scale = changes

    def made(
        features: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        rows: slice,
    ) -> _Made:
        parts = features, classifier.to(dtype), None if bias is None else bias.to(dtype)
        return make(changed_logits(layer, target[rows], Changes(softcap, shift, scale), parts), rows)

    for begin in range(0, len(layer.features), layer.chunk):
        rows = slice(begin, begin + layer.chunk)
        of_shift = None if shift is None else shift[rows]
        of_rows: Any = checkpoint(
            made, layer.features[rows], classifier, bias, scale, of_shift, rows, use_reentrant=False
        )
        yield of_rows
