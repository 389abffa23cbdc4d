"""A loss behind a layer of many classes on a CPU, a block of classes at a time: once for the sums of rows, once for
their gradient.

Chunks of rows (:mod:`dal_kernels.linear_chunks`) add to the whole gradient of the classifier, once a chunk: in a memory
that is small beside that gradient a chunk has few rows, and their products wait for memory. Blocks of classes finish
their part of that gradient before they go on, in its own dtype, and are efficient in a few MiB; but the second time
their logits must be made again. Not those of the first D rows: they wait where the gradient of the classifier will be,
whose memory is that of D rows of logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from dal_kernels.arguments import Call
from dal_kernels.fields import loss_dtype_of
from dal_kernels.layer import FEW_ROWS, MANY_CLASSES, multiplies_halves
from dal_kernels.linear_chunks import Changes, Gradients, LayerGradients, change
from dal_kernels.slices import Statistics, fields_of, finish, gradient, joined, merge, statistics, within
from dal_kernels.tensors import HALVES

# Chunks of fewer rows take longer in float32 than to make the logits twice (measured on an AMD EPYC).
_LEAST_ROWS = 96
# Products with fewer classes wait for memory.
_LEAST_BLOCK = 512
# Of the logits of a block, which stay in a cache.
_BLOCK_BYTES = 4 << 20
# Of a product in the dtype of the sums that it is added to.
_WIDENED_BYTES = 2 << 20


class Blocks(NamedTuple):
    """How many rows and classes of logits are in memory at a time."""

    rows: int
    classes: int


def in_dtype_of_classifier(dtype: torch.dtype, classes: int, backend: str) -> bool:
    """Whether the gradient of the classifier is given in the classifier's dtype, and not in that of the loss."""
    return dtype == torch.bfloat16 and classes >= MANY_CLASSES and backend == "cpu"


def blocks_of(
    features: Tensor, classifier: Tensor, dtype: torch.dtype, chunk: int, wanted: Sequence[bool | int], backend: str
) -> Blocks | None:
    """The blocks to take in the place of chunks of so many rows; None where those are better.

    Gradients of float16 are not made in blocks, because one that was rounded to it would be lost to a GradScaler.
    """
    rows, classes = len(features), len(classifier)
    many = backend == "cpu" and classes >= MANY_CLASSES and rows > 0
    if not many or not (len(wanted) > 1 and wanted[1]) or dtype == torch.float16:
        return None
    logits = min(chunk, rows) * classes
    itemsize = dtype.itemsize
    if dtype == torch.bfloat16:
        itemsize = itemsize if multiplies_halves(dtype, features.device) else loss_dtype_of(dtype).itemsize
    elif chunk >= min(rows, _LEAST_ROWS) and (chunk >= FEW_ROWS or logits * dtype.itemsize <= 2 * _BLOCK_BYTES):
        return None
    room = min(logits, _BLOCK_BYTES // itemsize)
    of_rows = min(rows, max(1, room // _LEAST_BLOCK))
    return Blocks(of_rows, min(classes, max(1, room // of_rows)))


class LayerInBlocks(LayerGradients):
    """Some classes of some rows at a time."""

    def __init__(
        self,
        features: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        blocks: Blocks,
        wanted: Sequence[bool | int],
        target: Tensor,
        changes: Changes,
    ) -> None:
        super().__init__(features, classifier, bias, dtype, wanted, changes, classifier.dtype)
        self.classifier, self.target, self.blocks = classifier, target, blocks
        self.widened = dtype in HALVES and not multiplies_halves(dtype, features.device)
        # In which products are made.
        self.factors = self.sums if self.widened else dtype
        self.inputs = self.scaled(features).to(self.factors)
        # The logits of a block, then their gradient, and in float32 where that is not their own dtype.
        self.room = features.new_empty(blocks.rows * blocks.classes, dtype=dtype)
        self.wide = features.new_empty(len(self.room) if self.widened else 0, dtype=self.sums)
        self.tanh = features.new_empty(len(self.room) if changes.keeps_logits else 0, dtype=dtype)
        # Of how many rows the logits wait for their gradient.
        self.waiting = 0
        self.fitting = min(blocks.rows, classifier.shape[1] * classifier.itemsize // dtype.itemsize)
        # Of a block's gradient, where products are made or added up in a wider dtype than its own.
        apart = classifier.dtype != self.sums and (self.factors == self.sums or blocks.rows < len(features))
        self.total = features.new_empty((blocks.classes if apart else 0, classifier.shape[1]), dtype=self.sums)

    def statistics(self, wide: bool) -> tuple[Statistics, Tensor]:
        """Of all rows, and the logits of their targets; leaves logits waiting where it can."""
        if not self.changes.keeps_logits:  # which are needed in another form
            self.waiting = self.fitting
        found: dict[int, Statistics] = {}
        target_logit = self.features.new_zeros(len(self.features), dtype=self.dtype)
        for classes, rows in self._tiles():
            logits = self._logits(classes, rows, 0)
            target = self.target[rows] - classes.start
            known = (target >= 0) & (target < logits.shape[1])
            own = logits.gather(1, torch.where(known, target, 0).unsqueeze(1)).squeeze(1)
            target_logit[rows] = torch.where(known, own, target_logit[rows])
            if rows.start == 0 and self.waiting:
                self._waiting_logits(classes).copy_(logits[: self.waiting])
            of_block = statistics(logits, "cpu", wide)
            of_block = of_block._replace(argmax=of_block.argmax + classes.start)
            found[rows.start] = _merged(found.get(rows.start), of_block)
        return joined(list(found.values())), target_logit

    def differentiate(
        self,
        fields: Tensor,
        prediction: Tensor,
        upstream: Tensor,
        ignored: Tensor,
        others: Tensor | None = None,
        other_terms: Tensor | None = None,
    ) -> Gradients:
        """The gradients, of ``fields`` of the rows as :func:`dal_kernels.slices.gradient` takes them."""
        for classes, rows in self._tiles():
            logits = self._logits(classes, rows, self.waiting if rows.start == 0 else 0)
            offset, size = classes.start, logits.shape[1]
            argmax = prediction[rows] if prediction.numel() else prediction
            target, at_argmax = within(self.target[rows], ignored[rows], argmax, offset, size)
            part = upstream if upstream.dim() == 0 else upstream[rows]
            made = gradient(logits, target, fields[:, rows].contiguous(), at_argmax, part, "cpu", in_place=True)
            if others is not None and other_terms is not None:
                at = others[:, rows] - offset
                known = (at >= 0) & (at < size)
                terms = torch.where(known, other_terms[:, rows], 0).to(made.dtype)
                made.scatter_add_(1, torch.where(known, at, 0).t(), terms.t())
            self.change_back(rows, made, self.target[rows] - offset, self._tanh(made))
            self._add(classes, rows, made)
        return self.finish()

    def _tiles(self) -> Iterator[tuple[slice, slice]]:
        """(classes, rows) by turns: all rows of some classes, then of the next."""
        for begin in range(0, len(self.classifier), self.blocks.classes):
            classes = slice(begin, min(begin + self.blocks.classes, len(self.classifier)))
            for first in range(0, len(self.features), self.blocks.rows):
                yield classes, slice(first, min(first + self.blocks.rows, len(self.features)))

    def _logits(self, classes: slice, rows: slice, waiting: int) -> Tensor:
        """Of a tile, as the softmax takes them, of which the first rows are waiting."""
        size, count = classes.stop - classes.start, rows.stop - rows.start
        logits = self.room[: count * size].view(count, size)
        if waiting:
            logits[:waiting].copy_(self._waiting_logits(classes))
        if waiting < count:
            rest = slice(rows.start + waiting, rows.stop)
            made, part = logits[waiting:], self.classifier[classes].to(self.factors).t()
            product = self._wide(made) if self.widened else made
            if self.bias is None:
                torch.mm(self.inputs[rest], part, out=product)
            else:
                torch.addmm(self.bias[classes].to(self.factors), self.inputs[rest], part, out=product)
            if self.widened:
                made.copy_(product)
            change(made, self.target[rest] - classes.start, self.changes.of(rest), self._tanh(logits)[waiting:])
        return logits

    def _tanh(self, logits: Tensor) -> Tensor:
        return self.tanh[: logits.numel()].view(-1, logits.shape[1])

    def _wide(self, logits: Tensor) -> Tensor:
        return self.wide[: logits.numel()].view(-1, logits.shape[1])

    def _waiting_logits(self, classes: slice) -> Tensor:
        """(waiting, n) of n classes, in the memory of their gradient."""
        size = classes.stop - classes.start
        memory = self.gradients.classifier[classes].view(-1).view(self.dtype)
        return memory[: self.waiting * size].view(self.waiting, size)

    def _add(self, classes: slice, rows: slice, gradient: Tensor) -> None:
        """What the gradient of the logits of a tile adds."""
        of_features, of_classifier, of_bias, *_ = self.gradients
        inputs = self.inputs[rows]
        first, last = rows.start == 0, rows.stop == len(self.features)
        factors = self._wide(gradient).copy_(gradient) if self.widened else gradient
        if self.makes[0]:
            part = self.classifier[classes].to(self.factors)
            if self.factors == self.sums:
                of_features[rows].addmm_(factors, part, beta=min(1, classes.start))
            else:
                # A few rows at a time, because what is added in a wider dtype is widened in a copy.
                pieces = max(1, _WIDENED_BYTES // (self.sums.itemsize * max(1, part.shape[1])))
                for sums, some in zip(of_features[rows].split(pieces), factors.split(pieces), strict=True):
                    sums.add_(some @ part) if classes.start else sums.copy_(some @ part)
        total = self.total[: factors.shape[1]] if len(self.total) else of_classifier[classes]
        if self.factors == self.sums:
            total.addmm_(factors.t(), inputs, beta=min(1, rows.start))
        elif first and last and total.dtype == self.factors:
            torch.mm(factors.t(), inputs, out=total)
        else:
            product = factors.t() @ inputs
            total.copy_(product) if first else total.add_(product)
        if last and len(self.total):
            of_classifier[classes].copy_(total)
        if self.makes[2]:
            column_sums = gradient.sum(0, dtype=self.sums)
            of_bias[classes].copy_(column_sums) if first else of_bias[classes].add_(column_sums)


def _merged(before: Statistics | None, block: Statistics) -> Statistics:
    """Of rows over the classes of both."""
    if before is None:
        return block
    pairs = zip(before[:6], block[:6], strict=True)
    peak, total, weighted, argmax, differences, squares = (
        None if one is None or other is None else torch.stack([one, other]) for one, other in pairs
    )
    sizes = block.peak.new_tensor([[before.classes], [block.classes]])
    merged = merge(Statistics(peak, total, weighted, argmax, differences, squares, sizes))  # type: ignore[arg-type]
    return merged._replace(classes=before.classes + block.classes)


def finished_rows(call: Call, row_statistics: Statistics, target_logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, fields, predictions) of the rows of a call, from sums over all classes.

    Fields are all those of :data:`dal_kernels.fields.FIELDS`.
    """
    rows = call._replace(reduction="none", want_stats=True)
    # An operator runs below autograd, which finish() asks for slopes of the loss; a thread of its own does not.
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(finish, rows, row_statistics, target_logit, want_gradient=True).result()
    made, stats = done.coefficients, done.stats
    assert made is not None
    assert stats is not None
    of_gradient = fields_of(row_statistics.peak, made, done.loss.dtype, wide=True)
    of_gradient[5:8] = torch.stack([stats.target_prob, stats.entropy, stats.max_prob])
    return done.loss, of_gradient, row_statistics.argmax
