"""A call of a loss behind a classifier layer: checked, made flat, and given to whoever makes it in chunks of rows."""

from __future__ import annotations

from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from dal_kernels.arguments import Backend, Call, RowStats, check, label_error, looks_at_labels, sample_weight_of
from dal_kernels.backends.choose import choose
from dal_kernels.fields import Reduction, loss_dtype
from dal_kernels.knobs import KnobValue
from dal_kernels.layer import CLASSES_LAST, CLASSES_SECOND, Layer, layer_of
from dal_kernels.linear_chunks import Changes
from dal_kernels.linear_eager import eager_loss
from dal_kernels.linear_fused import fused_loss
from dal_kernels.linear_quantities import linear_quantities
from dal_kernels.linear_rows import Rows
from dal_kernels.mixtures import Mix, mixed_loss, other_of
from dal_kernels.objectives import OBJECTIVES
from dal_kernels.reference import row_factors, run_weighted
from dal_kernels.surroundings import hand_over, is_recording, wants_the_call
from dal_kernels.tensors import is_number, moved, shape_of
from dal_kernels.variations import check_smoothing, checked_scale, shift_of_rows


def linear_loss_of(
    objective: int,
    knobs: tuple[KnobValue, ...] | Tensor,
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    **options: Any,
) -> Any:
    """The loss of that id in the table behind a classifier layer.

    Args:
        knobs: as :func:`dal_kernels.knobs.knob_tensor` takes them.
        options: those of :func:`_linear_loss_of`, of which :func:`dal_kernels.linear_loss` says what they mean.
    """
    given = knobs if isinstance(knobs, tuple) else (knobs,)
    mixed = mix if isinstance(mix := options.get("mix"), tuple) else ()
    named = (options.get(name) for name in _TENSORS)
    tensors = (input, classifier_weight, target, *given, *mixed, *named)
    if wants_the_call(*tensors):
        return hand_over(linear_loss_of, tensors, objective, knobs, input, classifier_weight, target, **options)
    return _linear_loss_of(objective, knobs, input, classifier_weight, target, **options)


# The options that may be tensors.
_TENSORS = ("bias", "weight", "sample_weight", "scale", "target_shift", "num_items")


def _linear_loss_of(
    objective: int,
    knobs: tuple[KnobValue, ...] | Tensor,
    input: Tensor,
    classifier_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
    chunk_bytes: int | None = None,
    classes_last: bool = False,
    shift: int = 0,
    softcap: float | None = None,
    scale: float | Tensor | None = None,
    target_shift: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    mix: Mix | None = None,
    num_items: int | Tensor | None = None,
) -> Any:
    """With ``classes_last`` D is the last dimension of ``input``, as F.linear takes it; else it stands where C does."""
    rows = given = Rows(input, target, sample_weight, mix, target_shift)
    if classes_last:
        classes = classifier_weight.shape[0] if isinstance(classifier_weight, Tensor) and classifier_weight.dim() else 0
        rows = rows.without_last(shift, classes)
    check_softcap(softcap)
    layer, logits = layer_of(
        rows.input, classifier_weight, bias, chunk_bytes, names=CLASSES_LAST if classes_last else CLASSES_SECOND,
        keeps_logits=softcap is not None,
    )  # fmt: skip
    of_table = OBJECTIVES[objective]
    options = (weight, ignore_index, reduction, return_stats)
    if classes_last:
        call = check(logits, rows.flat_target, of_table, knobs, *options)._replace(shape=rows.target.shape)
        if rows.sample_weight is not None:
            call = call._replace(sample_weight=sample_weight_of(rows.sample_weight, logits, call.shape))
    else:
        call = check(logits, rows.target, of_table, knobs, *options, rows.sample_weight)
    other = None if rows.mix is None else other_of(call, logits, rows.target, rows.mix)
    if other is not None and (problem := _label_error(call, given, shift)) is not None:
        raise problem
    changes = _changes(call, softcap, scale, rows.target_shift)
    items = _items(num_items, call)
    name = choose(backend, input)
    mixed = mix is not None or label_smoothing != 0
    if mixed:
        if mix is not None and target_shift is not None:
            raise ValueError("target_shift must be None with mix, which has no one target class")
        check_smoothing(of_table, label_smoothing)
    try:
        if not mixed:
            return call.shaped(*_run(layer, call, changes, items, name))
        quantities = partial(linear_quantities, layer, changes, backend=name)
        if items is None:
            return call.shaped(*mixed_loss(call, label_smoothing, other, quantities))
        loss, stats = mixed_loss(call._replace(reduction="sum"), label_smoothing, other, quantities)
        return call.shaped(loss / items, stats)
    except ValueError:
        # Whoever makes the loss looks at the labels, and knows no rows but those that are left by the shift.
        if shift and (problem := _label_error(call, given, shift)) is not None:
            raise problem from None
        raise


def _label_error(call: Call, given: Rows, shift: int) -> ValueError | None:
    """What is wrong with labels that are none, by the rows and the names that the caller gave them."""
    if not looks_at_labels(call):
        return None
    for name, labels in (("target", given.target), ("mix[0]", given.mix[0] if given.mix is not None else None)):
        if labels is not None:
            held = labels.long().clone()
            if shift and held.dim():
                held[..., :shift] = call.ignore_index
            problem = label_error(call._replace(target=held.reshape(-1)), name)
            if problem is not None:
                return problem
    return None


def check_softcap(softcap: float | None) -> None:
    """Raise TypeError or ValueError for what cannot cap logits."""
    if softcap is None:
        return
    if not is_number(softcap):
        raise TypeError(f"softcap must be a number or None, got {type(softcap).__name__}")
    if not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be finite and > 0, or None, got {softcap}")


def check_shift(shift: int) -> None:
    """Raise TypeError or ValueError for what is no shift, whatever the length of a sequence."""
    if not isinstance(shift, Integral) or isinstance(shift, bool):
        raise TypeError(f"shift must be an int, got {type(shift).__name__}")
    if shift < 0:
        raise ValueError(f"shift must be >= 0, got {shift}")


def _changes(
    call: Call, softcap: float | None, scale: float | Tensor | None, target_shift: float | Tensor | None
) -> Changes:
    """Of the logits of a checked call."""
    dtype, device = loss_dtype(call.logits), call.logits.device
    if scale is not None:
        scale = checked_scale(scale)
        if isinstance(scale, Tensor):
            scale = moved(scale, device, dtype)
        else:
            scale = None if scale == 1 else torch.full((), float(scale), dtype=dtype, device=device)
    rows = None
    if target_shift is not None:
        rows = shift_of_rows(target_shift, call.target, call.logits.shape[1], call.shape, dtype)
    return Changes(0.0 if softcap is None else float(softcap), rows, scale)


def _items(num_items: int | Tensor | None, call: Call) -> Tensor | float | None:
    """The divisor of a mean that the caller has counted, beside the logits."""
    if num_items is None:
        return None
    if call.reduction != "mean":
        raise ValueError(f"num_items must be None with reduction {call.reduction!r}, got {num_items!r:.60}")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1 or num_items.dtype == torch.bool or num_items.is_complex():
            raise ValueError(
                f"num_items must be a number > 0 or a tensor of one, got {num_items.dtype} of shape "
                f"{shape_of(num_items)}"
            )
        return moved(num_items.detach().reshape(()), call.logits.device, loss_dtype(call.logits))
    if not is_number(num_items):
        raise TypeError(f"num_items must be a number > 0 or a tensor of one, got {type(num_items).__name__}")
    if not 0 < num_items < float("inf"):
        raise ValueError(f"num_items must be finite and > 0, got {num_items}")
    return float(num_items)


def _run(
    layer: Layer, call: Call, changes: Changes, items: Tensor | float | None, backend: str
) -> tuple[Tensor, RowStats | None]:
    """The reduced loss of flat rows, weighted and divided as the caller wants it, and statistics."""
    run = partial(eager_loss, layer, changes)
    # The operator has no gradient by itself but for plain logits.
    plain = changes.nothing and call.sample_weight is None and items is None
    if backend != "eager" and (plain or not is_recording(layer.features)):
        run = partial(fused_loss, layer, changes, backend=backend)
    if call.reduction == "none" or (call.sample_weight is None and items is None):
        return run_weighted(run, call)
    # What each row counts is known before the pass: no second one is needed for the weights.
    weights = call.sample_weight
    if weights is None:
        weights = torch.ones(len(layer.features), dtype=loss_dtype(call.logits), device=layer.features.device)
    weights = torch.where(call.target == call.ignore_index, 0.0, weights)
    if items is not None:
        weights = weights / items
    elif call.reduction == "mean":
        classes = call.logits.shape[1]
        weights = weights / (weights * row_factors(
            call.target, classes, call.weight, call.ignore_index, weights.dtype
        )).sum()  # fmt: skip
    return run(call._replace(reduction="sum", sample_weight=None), row_weight=weights)
