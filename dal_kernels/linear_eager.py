"""A loss behind a classifier layer by plain operations, a chunk of whose logits exists at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dal_kernels import reference
from dal_kernels.arguments import Call, RowStats, raise_for_labels
from dal_kernels.fields import loss_dtype_of
from dal_kernels.layer import Layer
from dal_kernels.linear_chunks import Changes
from dal_kernels.surroundings import is_recording, transforms_active


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
    given = layer.features.dtype

    def losses_of(
        features: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        part: Call,
    ) -> Any:
        parts = features, classifier.to(given), None if bias is None else bias.to(given)
        logits = changed_logits(layer, part.target, Changes(changes.softcap, shift, scale), parts)
        return reference.reduced_loss(part._replace(logits=logits))

    if makes_all_at_once(layer):
        logits = changed_logits(layer, call.target, changes)
        if row_weight is None:
            return reference.reduced_loss(call._replace(logits=logits))
        loss, all_stats = reference.reduced_loss(call._replace(logits=logits, reduction="none"))
        return (loss * row_weight).sum(), all_stats

    # What the chunks add to the gradients of these is added up in float32.
    sums = loss_dtype_of(given)
    classifier, bias = layer.classifier.to(sums), None if layer.bias is None else layer.bias.to(sums)
    _, shift, scale = changes

    losses, stats = [], []
    for begin in range(0, len(layer.features), layer.chunk):
        of = slice(begin, begin + layer.chunk)
        knobs = call.knobs if call.knobs.dim() == 1 else call.knobs[of]
        part = call._replace(target=call.target[of], knobs=knobs, reduction="none")
        of_shift = None if shift is None else shift[of]
        loss, of_rows = checkpoint(
            losses_of, layer.features[of], classifier, bias, scale, of_shift, part, use_reentrant=False
        )
        losses.append(loss)
        stats.append(of_rows)
    loss = torch.cat(losses)
    if row_weight is not None:
        loss = loss * row_weight
    if call.reduction != "none":
        loss = loss.sum()
    if call.reduction == "mean":
        classes = layer.classifier.shape[0]
        loss = loss / reference.row_factors(call.target, classes, call.weight, call.ignore_index, loss.dtype).sum()
    return loss, RowStats(*map(torch.cat, zip(*stats, strict=True))) if call.want_stats else None
