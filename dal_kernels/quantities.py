"""Quantities of rows as differentiable vectors: for losses that nobody has put into the table.

One fused pass over the logits gives them, one fused pass gives the gradient of whatever is made of them:

    dL/dz_j = g_l ([j = y] - p_j) - g_H p_j (ln p_j + H) + 2 g_Q p_j (p_j - Q) + g_G (1 - C p_j) + g_M ([j = k] - p_j)

with the upstream gradients g of ln p_y, H, Q = sum p^2, G = sum ln p and M = ln p_k, k being the predicted class.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dal_kernels.arguments import Backend, Call, check, raise_for_labels
from dal_kernels.backends.choose import choose
from dal_kernels.fields import loss_dtype
from dal_kernels.objective import RowQuantities
from dal_kernels.objectives import row_statistics_of
from dal_kernels.once import DifferentiableOnce
from dal_kernels.ops import KERNELS
from dal_kernels.reference import row_quantities
from dal_kernels.slices import (
    IGNORED,
    Slopes,
    Statistics,
    coefficients_of,
    fields_of,
    gradient,
    quantities_of,
    statistics,
)
from dal_kernels.surroundings import hand_over, is_recording, wants_the_call
from dal_kernels.tensors import HALVES

__all__ = ["RowStatistics", "row_statistics"]

_ALL = frozenset({"entropy", "max_log_prob", "sum_log_prob", "square_sum"})


class RowStatistics(NamedTuple):
    """What :func:`row_statistics` gives, each shaped like the target; all but the prediction are differentiable.

    Attributes:
        log_prob: ln p_y of the target class; NaN where the row is ignored.
        entropy: -sum p_k ln p_k, in nats.
        square_sum: sum p_k^2.
        sum_log_prob: sum ln p_k over the C classes.
        max_log_prob: ln of the largest probability.
        prediction: the class that has it, int64; of equal ones the first.
    """

    log_prob: Tensor
    entropy: Tensor
    square_sum: Tensor
    sum_log_prob: Tensor
    max_log_prob: Tensor
    prediction: Tensor


def row_statistics(
    input: Tensor, target: Tensor, *, ignore_index: int = -100, backend: Backend = "auto"
) -> RowStatistics:
    """Differentiable statistics of each row's softmax: a loss of your own is a few lines of them.

    >>> import torch
    >>> from dal_kernels import row_statistics
    >>> logits, target = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
    >>> row = row_statistics(logits, target)
    >>> gate = (row.entropy / row.entropy.max()).detach()  # cross-entropy that listens less where the model is sure
    >>> (-gate * row.log_prob).mean().backward()

    The logits are read once in the forward and once in the backward, in which their gradient is written: 3 passes, of
    which ordinary PyTorch needs a dozen. Nothing of the size of the logits is made but their gradient.

    Args:
        input, target, backend: as in :func:`dal_kernels.dynamics_aware_loss`.
        ignore_index: rows with this target have log_prob NaN and gradient 0. Leave them out of the loss, with
            :func:`torch.where` for instance.

    Returns:
        :class:`RowStatistics`, float32, or float64 for float64 logits.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dal_kernels.dynamics_aware_loss`.
    """
    if wants_the_call(input, target):
        taken: RowStatistics = hand_over(
            row_statistics, (input, target), input, target, ignore_index=ignore_index, backend=backend
        )
        return taken
    call = check(input, target, row_statistics_of, (), None, ignore_index, "none", True)
    (row,), prediction = quantities_of_call(call, (call.target,), choose(backend, input))
    return as_statistics(call, row, prediction)


def as_statistics(call: Call, row: RowQuantities, prediction: Tensor) -> RowStatistics:
    """Quantities of flat rows as the caller gets them."""
    log_prob = torch.where(call.target == call.ignore_index, math.nan, row.log_prob)
    made = (log_prob, row.entropy, row.square_sum, row.sum_log_prob, row.max_log_prob, prediction)
    return RowStatistics(*(value.reshape(call.shape) for value in made))


def places_of(call: Call, target: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(a class to read, whether the label is one or ignored, the class for the gradient) of each row (N,)."""
    valid = (target >= 0) & (target < classes)
    ignored = target == call.ignore_index
    place = torch.where(valid, target, 0)
    return place, valid | ignored, torch.where(ignored, IGNORED, place)


def quantities_of_call(
    call: Call, targets: tuple[Tensor, ...], backend: str
) -> tuple[tuple[RowQuantities, ...], Tensor]:
    """Differentiable quantities of the rows of a call, for each of some targets (N,), and the predicted classes.

    A row is ignored with its first target: it has gradient 0, and the quantities of any class.
    """
    if backend != "eager" and KERNELS[backend].quantities is not None and not is_recording(call.logits):
        return _quantities_by_kernels(call, targets, backend)
    for target in targets:
        raise_for_labels(call._replace(target=target))
    classes = call.logits.shape[1]
    found = [places_of(call, target, classes) for target in targets]
    if backend == "eager" or is_recording(call.logits):
        logits = call.logits.float() if call.logits.dtype in HALVES else call.logits
        ignored = found[0][2] == IGNORED
        # Ignored rows are detached: they get no gradient, whatever is made of them.
        counted_logits = torch.where(ignored.unsqueeze(1), logits.detach(), logits)
        rows = [row_quantities(counted_logits, place, _ALL) for place, _, _ in found]
        prediction = call.logits.argmax(1)
    else:
        places = torch.stack([place for place, _, _ in found])
        with torch.no_grad():
            row_sums = statistics(call.logits, backend, wide=True)
            target_logits = call.logits.gather(1, places.t()).t()
        local = torch.cat([found[0][2].unsqueeze(0), places[1:]])
        rows = differentiable_rows(call.logits, local, target_logits, row_sums.argmax, row_sums, classes, backend)
        prediction = row_sums.argmax
    # A label that is no class, on a device where looking would cost a synchronisation.
    return tuple(
        row._replace(log_prob=torch.where(known, row.log_prob, math.nan))
        for row, (_, known, _) in zip(rows, found, strict=True)
    ), prediction


def _quantities_by_kernels(
    call: Call, targets: tuple[Tensor, ...], backend: str
) -> tuple[tuple[RowQuantities, ...], Tensor]:
    """:func:`quantities_of_call` by a backend whose kernels make the quantities, and look at the labels, themselves."""
    try:
        *values, prediction = _KernelQuantities.apply(call.logits, torch.stack(targets), call.ignore_index, backend)
    except RuntimeError:
        # From torch 2.15 on a kernel's ValueError arrives as a RuntimeError.
        for target in targets:
            raise_for_labels(call._replace(target=target))
        raise
    log_probs, entropy, max_log_prob, sum_log_prob, square_sum = values
    classes = call.logits.shape[1]
    return tuple(
        RowQuantities(log_prob, entropy, max_log_prob, sum_log_prob, square_sum, classes)
        for log_prob in log_probs.unbind()
    ), prediction


class _KernelQuantities(torch.autograd.Function):
    """Quantities that nothing is made of cost nothing in the backward: their upstream gradients are None."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, backend: str) -> tuple[Tensor, ...]:
        *values, prediction, sums = KERNELS[backend].quantities(logits, targets, ignore_index)
        ctx.save_for_backward(logits, targets, prediction.clone(), sums)  # what the user gets may be edited
        ctx.plan = (ignore_index, backend)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(prediction)
        return *values, prediction

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, prediction, sums = ctx.saved_tensors
        ignore_index, backend = ctx.plan
        made = KERNELS[backend].gradient_of_slopes(logits, targets, ignore_index, prediction, sums, *upstream[:-1])
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            made = DifferentiableOnce.apply(made, logits)
        return made, None, None, None


def values_of(row_sums: Statistics, target_logits: Tensor, classes: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """ln p_y for each of some targets (T, N) or of one (N,), entropy, M, G and Q (N,)."""
    return tuple(value.to(dtype) for value in quantities_of(row_sums, target_logits.double(), classes).tensors)


def slope_fields(row_sums: Statistics, classes: int, upstream: tuple[Tensor | None, ...], dtype: torch.dtype) -> Tensor:
    """Of the gradient of whatever was made of the values: their upstream gradients are its slopes.

    Narrow where nothing was made of the sums over all classes, of which the gradient is then spared the terms.
    """
    given = [torch.zeros_like(row_sums.total) if value is None else value.double() for value in upstream]
    by_log_prob, by_entropy, by_max, by_sum, by_square = given
    row = quantities_of(row_sums, row_sums.peak, classes)  # of which the chain rule needs no ln p_y
    first = by_log_prob if by_log_prob.dim() == 1 else by_log_prob[0]
    total = by_log_prob if by_log_prob.dim() == 1 else by_log_prob.sum(0)
    made = coefficients_of(row_sums, row, Slopes(total, by_entropy, by_max, by_sum, by_square))
    wide = upstream[3] is not None or upstream[4] is not None
    return fields_of(row_sums.peak, made._replace(target_term=-first), dtype, wide)


def differentiable_rows(
    logits: Tensor,
    local: Tensor,
    target_logits: Tensor,
    prediction: Tensor,
    row_sums: Statistics,
    classes: int,
    backend: str,
) -> list[RowQuantities]:
    """Quantities of rows for each of T targets, whose gradient goes to ``logits``.

    Args:
        logits: (N, C), or the slice of it that is here.
        local: (T, N), the targets as classes of ``logits``; C where one lies elsewhere, IGNORED in the first for rows
            without a gradient.
        target_logits: (T, N).
        prediction: (N,) as classes of ``logits``, -1 where it lies elsewhere.
        row_sums, classes: sums over all classes, and their number.
    """
    log_probs, entropy, max_log_prob, sum_log_prob, square_sum = _Quantities.apply(
        logits, local, target_logits, prediction, row_sums, classes, backend
    )
    return [
        RowQuantities(log_prob, entropy, max_log_prob, sum_log_prob, square_sum, classes)
        for log_prob in log_probs.unbind()
    ]


class _Quantities(torch.autograd.Function):
    """Of rows whose classes are all here, or a slice of them beside the ``row_sums`` of all."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        local: Tensor,
        target_logits: Tensor,
        prediction: Tensor,
        row_sums: Statistics,
        classes: int,
        backend: str,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits, local, prediction.clone())  # what the user gets may be edited
        ctx.plan = (row_sums, classes, backend)
        ctx.set_materialize_grads(False)
        return values_of(row_sums, target_logits, classes, loss_dtype(logits))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, local, prediction = ctx.saved_tensors
        row_sums, classes, backend = ctx.plan
        fields = slope_fields(row_sums, classes, upstream, loss_dtype(logits))
        at_argmax = prediction if upstream[2] is not None else prediction[:0]
        one = torch.ones((), dtype=fields.dtype, device=fields.device)
        made = gradient(logits, local[0], fields, at_argmax, one, backend, in_place=False)
        if len(local) > 1 and upstream[0] is not None:
            # Of other targets no kernel knows: their terms are added to their classes.
            terms = torch.where(local[0] == IGNORED, 0.0, upstream[0][1:])
            made.scatter_add_(1, local[1:].t(), terms.t().to(made.dtype))
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            made = DifferentiableOnce.apply(made, logits)
        return made, *(None,) * 6
