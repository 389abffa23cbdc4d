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
from dal_kernels.fields import FIELDS, loss_dtype
from dal_kernels.objectives import RowQuantities, row_statistics_of
from dal_kernels.once import DifferentiableOnce
from dal_kernels.ops import KERNELS
from dal_kernels.reference import row_quantities
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
    row, prediction = quantities_of_call(call, (call.target,), choose(backend, input))
    ignored = call.target == call.ignore_index
    log_prob = torch.where(ignored, math.nan, row[0].log_prob)
    made = (log_prob, row[0].entropy, row[0].square_sum, row[0].sum_log_prob, row[0].max_log_prob, prediction)
    return RowStatistics(*(value.reshape(call.shape) for value in made))


def quantities_of_call(
    call: Call, targets: tuple[Tensor, ...], backend: str
) -> tuple[tuple[RowQuantities, ...], Tensor]:
    """Differentiable quantities of the rows of a call, for each of some targets (N,), and the predicted classes.

    A row with an ignored target has gradient 0, and the quantities of any class.
    """
    for target in targets:
        raise_for_labels(call._replace(target=target))
    classes = call.logits.shape[1]
    valid = [(target >= 0) & (target < classes) for target in targets]
    places = tuple(torch.where(ok, target, 0) for ok, target in zip(valid, targets, strict=True))
    ignored = call.target == call.ignore_index
    if backend == "eager" or is_recording(call.logits):
        logits = call.logits.float() if call.logits.dtype in HALVES else call.logits
        kept = torch.where(ignored.unsqueeze(1), logits.detach(), logits)  # no gradient, whatever is made of them
        rows = [row_quantities(kept, place, _ALL) for place in places]
        prediction = call.logits.argmax(1)
    else:
        log_probs, entropy, max_log_prob, sum_log_prob, square_sum, prediction = _Quantities.apply(
            call.logits, torch.stack(places, 1), ignored, backend
        )
        others = (entropy, max_log_prob, sum_log_prob, square_sum, classes)
        rows = [RowQuantities(log_prob, *others) for log_prob in log_probs.unbind(1)]
    # A label that is no class, on a device where looking would cost a synchronisation.
    known = [ok | (target == call.ignore_index) for ok, target in zip(valid, targets, strict=True)]
    return tuple(
        row._replace(log_prob=torch.where(ok, row.log_prob, math.nan)) for row, ok in zip(rows, known, strict=True)
    ), prediction


class Sums(NamedTuple):
    """Sums of rows (N,) as the operators give them, in the dtype of the loss: m, S, W, D and P of csrc/row_sums.h."""

    peak: Tensor
    total: Tensor
    weighted: Tensor
    differences: Tensor
    squares: Tensor

    def quantities(self, target_logits: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """ln p_y (N, T), entropy, M, G and Q (N,)."""
        log_sum = self.total.log()
        origin = torch.where(self.peak == -math.inf, 0.0, self.peak)
        return (
            target_logits - origin.unsqueeze(1) - log_sum.unsqueeze(1),
            log_sum - self.weighted / self.total,
            -log_sum,
            self.differences - classes * log_sum,
            self.squares / (self.total * self.total),
        )

    def fields(self, classes: int, ignored: Tensor, by_log_prob: Tensor, *by_others: Tensor) -> tuple[Tensor, Tensor]:
        """(fields (9, N), terms (N, T)) of the gradient, from upstream gradients as :meth:`quantities` orders them."""
        by_entropy, by_max, by_sum, by_square = by_others
        total = self.total
        a = -(by_log_prob.sum(1) + by_max + classes * by_sum + 2 * by_square * self.squares / (total * total))
        b = -by_entropy
        fields = torch.zeros((len(FIELDS), len(total)), dtype=total.dtype, device=total.device)
        made = {
            "max": torch.where(self.peak == -math.inf, 0.0, self.peak),
            "scale": (a - b * (self.weighted / total)) / total,
            "slope": b / total,
            "target_term": -by_log_prob[:, 0],
            "argmax_term": -by_max,
            "square": 2 * by_square / (total * total),
            "constant": by_sum,
        }
        for name, value in made.items():
            fields[FIELDS.index(name)] = torch.where(ignored, 0.0, value)
        return fields, torch.where(ignored.unsqueeze(1), 0.0, by_log_prob)


def add_other_targets(gradient: Tensor, targets: Tensor, terms: Tensor) -> Tensor:
    """The terms of all targets but the first, which the kernels know nothing of, added to their classes."""
    if targets.shape[1] > 1:
        gradient.scatter_add_(1, targets[:, 1:], terms[:, 1:].to(gradient.dtype))
    return gradient


class _Quantities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: Tensor, backend: str) -> tuple[Tensor, ...]:
        sums, prediction = KERNELS[backend].statistics(logits, True, True)
        target_logits = logits.gather(1, targets).to(loss_dtype(logits))
        ctx.save_for_backward(logits, targets, ignored, sums, prediction)
        ctx.backend = backend
        ctx.mark_non_differentiable(prediction)
        ctx.set_materialize_grads(False)
        return *Sums(*sums).quantities(target_logits, logits.shape[1]), prediction.clone()

    @staticmethod
    def backward(ctx: Any, by_log_prob: Tensor | None, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, ignored, sums, prediction = ctx.saved_tensors
        if by_log_prob is None:
            by_log_prob = sums.new_zeros(targets.shape)
        others = [sums.new_zeros(len(targets)) if value is None else value for value in upstream[:4]]
        fields, terms = Sums(*sums).fields(logits.shape[1], ignored, by_log_prob, *others)
        has_argmax = upstream[1] is not None
        gradient = gradient_from_fields(logits, targets[:, 0], fields, prediction, has_argmax, ctx.backend)
        gradient = add_other_targets(gradient, targets, terms)
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            gradient = DifferentiableOnce.apply(gradient, logits)
        return gradient, None, None, None


def gradient_from_fields(
    logits: Tensor, target: Tensor, fields: Tensor, prediction: Tensor, has_argmax: bool, backend: str
) -> Tensor:
    """The gradient (N, C) that fields (9, N) describe; their rows are all counted."""
    kernels = KERNELS[backend]
    correction = () if backend == "cpu" else (fields.new_empty(0),)
    one = torch.ones((), dtype=fields.dtype, device=fields.device)
    made: Tensor = kernels.gradient(
        logits, target, fields, prediction if has_argmax else prediction[:0], one, -1, *correction
    )
    return made
