"""Dynamics-Aware Loss as a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from dal_kernels.arguments import BOOTSTRAPS, Backend, Bootstrap, OptionsOfKernels, RowStats
from dal_kernels.fields import Reduction
from dal_kernels.mixtures import Mix
from dal_kernels.objectives import dynamics_aware_of
from dal_kernels.tensors import check_choice
from dal_kernels.variations import varied_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["dynamics_aware_loss"]


class OptionsOfFunction(OptionsOfKernels, total=False):
    """And what only the loss of logits takes."""

    target_shift: float | Tensor | None
    scale: float | Tensor | None
    mix: Mix | None


@overload
def dynamics_aware_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[OptionsOfFunction],
) -> Tensor: ...
@overload
def dynamics_aware_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[OptionsOfFunction],
) -> tuple[Tensor, RowStats]: ...
@overload
def dynamics_aware_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = ...,
    *,
    return_stats: bool,
    **options: Unpack[OptionsOfFunction],
) -> Tensor | tuple[Tensor, RowStats]: ...
def dynamics_aware_loss(
    input: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor = 0.0,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    bootstrap: Bootstrap = "soft",
    return_stats: bool = False,
    sample_weight: Tensor | None = None,
    target_shift: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    mix: Mix | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Dynamics-Aware Loss between logits and class indices, with its gradient computed in the same pass.

    .. math::
        L = \frac{1 - p_y^q}{q} + \frac{\lambda}{q \ln C} \, B(p), \qquad p = \mathrm{softmax}(z)

    ``q -> 0`` with ``bootstrap_weight = 0`` is cross-entropy, ``q = 1`` mean absolute error, any q between them
    generalised cross-entropy (GCE). Formula: arXiv 2303.11562, computed exactly, without the clamps of its authors'
    code (:func:`dal_kernels.reference.dynamics_aware_loss` has those under ``official=True``).

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64. (N, C) logits
            with unit class stride are read where they lie, on a CPU, and on a GPU up to 384 classes, also
            (N, C, d1, ...), contiguous or ``channels_last``; any other layout is copied once.
            Half precision, "none" and ``sample_weight`` read them again in the backward: to edit logits in place
            before it is an error of autograd's there (edit a clone), as with every operation that saves its input.
            A DTensor may be split by classes, by rows (dimension 0) or be replicated; the loss is a plain tensor, that
            of all rows on every rank ("none": of this rank's rows). See :mod:`dal_kernels.dtensor`.
        target: class indices shaped like ``input`` without its class dimension, any integer dtype; or, summed over by
            plain operations, probabilities shaped like ``input``.
        q: exponent >= 0. A number, a 0-d or (1,) tensor, or one value a row. Tensors are read by the kernel: changing
            one in place neither recompiles nor synchronises (a number that changes recompiles). 0 only where
            ``bootstrap_weight`` is 0.
        bootstrap_weight: weight lambda >= 0 of the bootstrap term; as ``q``.
        weight: (C,) class weights; they multiply both terms of a row, and "mean" divides by their sum over the rows.
        ignore_index: rows with this target have loss 0 and gradient 0 and are not counted.
        reduction: "mean", "sum" or "none".
        bootstrap: B is the entropy of p ("soft") or the negative log-likelihood of the predicted class ("hard").
        return_stats: also return what the pass learnt of each row.
        sample_weight: one value a row, shaped like ``target`` or (N,), or None. It multiplies the row's loss, and
            "mean" divides by the sum of what each row counts: its sample weight times its class weight. It may require
            grad. The gradient of the logits is then made in the backward, as with "none".
        target_shift, scale, mix: see :class:`dal_kernels.losses.options.LossOptions`.
        backend: "auto", or the name of one to insist on; see :func:`dal_kernels.available_backends`.

    Returns:
        The loss, 0-d or shaped like ``target``; float32, or float64 for float64 logits. With ``return_stats`` the pair
        of it and a :class:`dal_kernels.RowStats`. "mean" over no rows is NaN with gradient 0, as in
        :func:`torch.nn.functional.cross_entropy`. A row with NaN or +inf logits has loss NaN and gradient NaN.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or value; on a CPU also a label that is neither in [0, C) nor ``ignore_index``. On
            other devices, where looking would cost a synchronisation, the row's loss is NaN.
        RuntimeError: the named backend is not available here; a second derivative through a fused kernel (the backend
            "eager" has them); under torch.compile, a bad label.
    """
    check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    result: Tensor | tuple[Tensor, RowStats] = varied_loss(
        dynamics_aware_of(bootstrap), (q, bootstrap_weight), input, target, weight=weight, ignore_index=ignore_index,
        reduction=reduction, return_stats=return_stats, sample_weight=sample_weight, target_shift=target_shift,
        scale=scale, mix=mix, backend=backend,
    )  # fmt: skip
    return result
