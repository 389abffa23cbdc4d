"""The losses of all rows added up: by the last program that is done, or by a launch of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dal_kernels.backends.triton.pace import follow
from dal_kernels.backends.triton.row import MAX_PROB, SCALE, TARGET_PROB


class Reduction(NamedTuple):
    """What a reduction reads and writes.

    ``partial`` (2, programs): the losses and the weights of each program's rows; None of a program that is alone.
    ``ticket`` counts the programs that are done, from 0; None where a launch of its own comes after them.
    ``numbers``: of the pace, which follows the statistics of the call with the three behind it; None where it does not.
    ``inner``: S of a gradient (B, C, S); None where that is (N, C).
    """

    loss: Any
    correction: Any
    partial: Any
    ticket: Any
    weight: Any
    target: Any
    target_stride: Any
    gradient: Any
    fields: Any
    count: Any
    ignore_index: Any
    prediction: Any
    numbers: Any
    every: Any
    q_end: Any
    max_weight: Any
    inner: Any


@triton.jit
def store_sums(of, loss, weight):
    """The losses and weights of this program's rows, for whichever program adds up."""
    if of.partial is not None:
        tl.store(of.partial + tl.program_id(0), loss)
        tl.store(of.partial + tl.num_programs(0) + tl.program_id(0), weight)


@triton.jit
def reduce_losses(
    of, loss, weight,
    CLASSES: tl.constexpr, MEAN: tl.constexpr, GRADIENT: tl.constexpr, FIELDS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Called last by each program, with the sums that it has stored. The last program adds up those of all.

    Apart from :func:`store_sums`, which comes as soon as the sums are known: while the gradient is stored they need no
    registers then, unless the program is alone.
    """
    if of.partial is None:
        store_loss(of, loss.to(tl.float64), weight.to(tl.float64), CLASSES, MEAN, GRADIENT, FIELDS)
        follow_call(of, SUMS)
    elif of.ticket is not None:
        programs = tl.num_programs(0)
        # One lane takes the ticket, for what all warps have stored: they wait for each other first.
        tl.debug_barrier()
        if tl.atomic_add(of.ticket, 1, sem="acq_rel", scope="gpu") == programs - 1:
            add_programs(of, programs, CLASSES, MEAN, GRADIENT, FIELDS, SUMS)
            follow_call(of, SUMS)
            tl.store(of.ticket, 0)  # for the next launch


@triton.jit
def follow_call(of, SUMS: tl.constexpr):
    """The pace follows the call, whose rows are all done. Each of them has read its knobs, which may be the numbers."""
    if of.numbers is not None:
        tl.debug_barrier()  # for what other warps of this program have stored
        follow(
            of.numbers, of.fields + MAX_PROB * of.count, of.fields + TARGET_PROB * of.count, of.prediction, of.target,
            of.target_stride, of.count, of.every, of.q_end, of.max_weight, SUMS // 2,
        )  # fmt: skip


@triton.jit
def add_programs(
    of, programs,
    CLASSES: tl.constexpr, MEAN: tl.constexpr, GRADIENT: tl.constexpr, FIELDS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The sums that the programs left, SUMS at a time, in their order: the same bits whichever program adds them."""
    lane = tl.arange(0, SUMS)
    loss = tl.zeros((SUMS,), tl.float64)
    weight = tl.zeros((SUMS,), tl.float64)
    for first in range(0, programs, SUMS):
        inside = first + lane < programs
        # From the cache that all programs share: what one of them had of its own could be older.
        at = of.partial + first + lane
        loss += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        weight += tl.load(at + programs, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
    store_loss(of, tl.sum(loss, 0), tl.sum(weight, 0), CLASSES, MEAN, GRADIENT, FIELDS)


@triton.jit(do_not_specialize=["inner"])
def reduce_sums(
    partial_ptr, loss_ptr, correction_ptr, weight_ptr, target_ptr, target_stride, gradient_ptr, fields_ptr, programs,
    count, ignore_index, inner,
    CLASSES: tl.constexpr, MEAN: tl.constexpr, GRADIENT: tl.constexpr, FIELDS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """One program, after those of the rows where they are many, or none."""
    of = Reduction(
        loss_ptr, correction_ptr, partial_ptr, None, weight_ptr, target_ptr, target_stride, gradient_ptr, fields_ptr,
        count, ignore_index, None, None, 1, 0.0, 0.0, inner,
    )  # fmt: skip
    add_programs(of, programs, CLASSES, MEAN, GRADIENT, FIELDS, SUMS)


@triton.jit
def store_loss(of, total, divisor, CLASSES: tl.constexpr, MEAN: tl.constexpr, GRADIENT: tl.constexpr,
               FIELDS: tl.constexpr):  # fmt: skip
    """The reduced loss. A mean's gradient was divided by N so far: N / divisor is left for the backward.

    Where the true divisor is 0 no row counted, and the gradient stays 0; or their weights are all 0, and it is 0 / 0.
    """
    if MEAN:
        tl.store(of.loss, (total / divisor).to(of.loss.dtype.element_ty))
        correction = tl.where(divisor == 0.0, 1.0, of.count / tl.where(divisor == 0.0, 1.0, divisor))
        tl.store(of.correction, correction.to(of.correction.dtype.element_ty))
        if of.weight is not None:
            if divisor == 0.0:
                spoil_counted_rows(of, CLASSES, GRADIENT, FIELDS)
    else:
        tl.store(of.loss, total.to(of.loss.dtype.element_ty))
        tl.store(of.correction, 1.0)


@triton.jit
def spoil_counted_rows(of, CLASSES: tl.constexpr, GRADIENT: tl.constexpr, FIELDS: tl.constexpr):
    """NaN for the gradient of each row that is not ignored, and for what it is made from again."""
    tl.debug_barrier()
    for first in range(0, of.count, 128):
        row = first + tl.arange(0, 128).to(tl.int64)
        target = tl.load(of.target + row * of.target_stride, mask=row < of.count, other=of.ignore_index)
        counted = target != of.ignore_index
        if FIELDS:
            tl.store(of.fields + SCALE * of.count + row, float("nan"), mask=counted)
        if GRADIENT:
            step = 1
            place = row * CLASSES
            if of.inner is not None:
                step = of.inner.to(tl.int64)
                place = row // step * (step * CLASSES) + row % step
            for column in range(0, CLASSES):
                tl.store(of.gradient + place + column * step, float("nan"), mask=counted)
