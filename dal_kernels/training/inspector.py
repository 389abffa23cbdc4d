"""Which labels look wrong, told from the statistics that the losses give of each training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from dal_kernels.arguments import RowStats
from dal_kernels.tensors import moved
from dal_kernels.training.inspection import Inspection, inspect

__all__ = ["LabelInspector"]

# Batches that are taken in together on a CPU, and rows of them that are enough: of more, the numbers on the way would
# not stay in the cache.
WAITING, ENOUGH = 256, 2**14


class LabelInspector:
    """Follows what a network makes of the label of each sample, in a few numbers a sample.

    >>> inspector = LabelInspector(len(dataset), num_classes)
    >>> for epoch in range(epochs):
    ...     for images, labels, indices in loader:
    ...         loss, stats = criterion(model(images), labels, return_stats=True)
    ...         inspector.update(indices, labels, stats)
    ...         loss.backward()  # ... optimiser as always
    >>> inspector.inspect().save_csv("suggested.csv", paths, class_names)

    All losses of the package give these statistics, in the pass that makes loss and gradient. The memory is 33 bytes a
    sample whatever the number of classes, on the device of the statistics; :meth:`update` waits for no device.

    It works in any loop that knows which samples are in a batch. In a distributed training each process follows the
    samples that it sees, and all call :meth:`synchronize` after an epoch. Do not make it a part of the module that
    DistributedDataParallel wraps: that would give all processes the numbers of the first.

    How it tells: a label is suspicious by its margin, p_y less the largest probability where that is another class's,
    and p_y itself where it is the label's, averaged over the visits of the sample with weights that fall by
    ``momentum`` a visit. While a network has not memorised the wrong labels, theirs are below 0. A loss that resists
    memorising (DAL, the default of ``dal-train inspect``) keeps them there to the end of a training.

    Args:
        samples: N, how many there are; an index is in [0, N).
        classes: C, how many there are.
        momentum: in [0, 1).
        device: where the numbers are kept, by default that of the first statistics.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, samples: int, classes: int, momentum: float = 0.9, device: torch.device | str | None = None
    ) -> None:
        if samples < 1 or classes < 2:
            raise ValueError(f"samples must be >= 1 and classes >= 2, got {samples} and {classes}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.samples, self.classes, self.momentum = samples, classes, momentum
        self._placed = device is not None
        # A row a sample, because a gather of rows reads one cache line for each, one of columns eight: in float32 its
        # averaged margin, p_y, agreement and votes for the other class, then in int32 its label, other class, visits
        # and whether it is fresh. Averages lack their early weights, 1 - momentum ** visits in all: who reads them
        # divides by these. The last row is of no sample: it takes what says nothing of any.
        self._rows = torch.zeros(samples + 1, 8, device=device)
        self._classes[:, :2] = -1
        # Of all indices, because nobody waits for a GPU to tell which of them are of no sample.
        self._least, self._most = torch.zeros(2, dtype=torch.int64, device=device)
        self._batches: list[list[Tensor]] = []
        self._waiting = 0  # rows
        self._counts = torch.zeros(samples + 1, dtype=torch.uint8)  # how often each waits, while they are counted

    @property
    def _averages(self) -> Tensor:
        return self._rows[: self.samples, :4]

    @property
    def _classes(self) -> Tensor:
        return self._rows.view(torch.int32)[: self.samples, 4:]

    def update(self, indices: Tensor, target: Tensor, stats: RowStats) -> None:
        """Take in a batch.

        Args:
            indices: (B,) integers in [0, N), which samples; on the device of ``stats``, lest it be waited for.
            target: (B,) class indices, the labels given. Rows that the loss ignores are passed over.
            stats: (B,) each, of a loss called with ``return_stats=True``.

        Raises:
            ValueError: the shapes differ, there are no class indices, or an index is not in [0, N). Of an index on a
                CPU one of the next calls may say so; on a GPU, which is not waited for, :meth:`inspect` does.
        """
        if indices.ndim != 1 or not indices.shape == target.shape == stats.target_prob.shape:
            raise ValueError(
                f"indices, target and stats must be (B,) of one batch, got {tuple(indices.shape)}, "
                f"{tuple(target.shape)} and {tuple(stats.target_prob.shape)}"
            )
        if not self._placed:
            device = stats.target_prob.device
            self._rows, self._placed = self._rows.to(device), True
            self._least, self._most = self._least.to(device), self._most.to(device)
        batch = [indices, target, stats.target_prob, stats.prediction, stats.max_prob]
        if not indices.device == target.device == stats.target_prob.device == self._rows.device:
            batch = [moved(values, self._rows.device) for values in batch]
        if not self._rows.is_cpu:
            self._take_in(self._place(batch[0]), *batch[1:])
            return
        # On a CPU the two dozen operations on a batch would take as long as some layers, so that batches wait for each
        # other. A GPU's wait in its queue as it is. Indices and labels are copied, because who calls may fill their
        # tensors with the next batch.
        self._batches.append([batch[0].clone(), batch[1].clone(), *batch[2:]])
        self._waiting += len(indices)
        if self._waiting >= ENOUGH or len(self._batches) == WAITING:
            self._catch_up()

    def _catch_up(self) -> None:
        """Take in the batches that wait."""
        batches, self._batches, self._waiting = self._batches, [], 0
        if batches:
            self._take_in_together(batches)
            self._refuse_outside()

    def _take_in_together(self, batches: list[list[Tensor]]) -> None:
        """As many at once as have no sample in common, because a visit counts from what the one before has left."""
        indices, *rest = (torch.cat(parts) for parts in zip(*batches, strict=True))
        places = self._place(indices)
        if len(batches) == 1 or self._all_different(places):
            self._take_in(places, *rest)
            return
        half = len(batches) // 2
        self._take_in_together(batches[:half])
        self._take_in_together(batches[half:])

    def _all_different(self, places: Tensor) -> bool:
        """Counted per sample; sorting them takes twice as long."""
        self._counts.index_add_(0, places, torch.ones_like(places, dtype=torch.uint8))
        # A byte says 1 again of 257 visits: of so few batches, one would have the sample twice.
        once = bool((self._counts.index_select(0, places) == 1).all())
        self._counts.index_fill_(0, places, 0)
        return once

    def _place(self, indices: Tensor) -> Tensor:
        """The row of each sample, the last for an index of none, which :meth:`_refuse_outside` tells."""
        if len(indices):
            least, most = indices.aminmax()
            self._least, self._most = torch.minimum(self._least, least), torch.maximum(self._most, most)
        indices = indices.long()
        return torch.where(indices == indices.clamp(0, self.samples - 1), indices, self.samples)

    def _refuse_outside(self) -> None:
        least, most = self._least.item(), self._most.item()
        if least < 0 or most >= self.samples:
            raise ValueError(f"indices must be from 0 to {self.samples - 1}, got {least if least < 0 else most}")

    @torch.no_grad()
    def _take_in(
        self, places: Tensor, target: Tensor, target_prob: Tensor, prediction: Tensor, max_prob: Tensor
    ) -> None:
        # NaN: an ignored row, or logits that are not finite.
        places = places.masked_fill(target_prob.isnan(), self.samples)

        before = self._rows.index_select(0, places)
        averages, (other, visits) = before.unbind(1)[:4], before.view(torch.int32).unbind(1)[5:7]
        target, prediction = target.int(), prediction.int()
        agrees = prediction == target
        preferred = max_prob.masked_fill(agrees, 0.0)
        # The other class is the one that is preferred to the label most often: the votes for another are taken from
        # those of the one in the lead, and give the lead to it when none are left.
        vote = torch.where(prediction == other, preferred, -preferred)
        values = (target_prob - preferred, target_prob, agrees, vote)
        *learnt, votes = (
            torch.lerp(value.float(), average, self.momentum) for value, average in zip(values, averages, strict=True)
        )
        numbers = (target, torch.where(votes < 0, prediction, other), visits + 1, torch.ones_like(target))
        after = torch.stack([*learnt, votes.abs(), *(number.view(torch.float32) for number in numbers)], 1)
        self._rows.index_copy_(0, places, after)

    def synchronize(self) -> None:
        """Give all processes what each has seen since the last call; all of them call this. Alone it does nothing."""
        self._catch_up()
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return
        # A sampler may give a sample to two processes, to make their batches equal: the mean of both then.
        fresh = self._classes[:, 3:]
        processes, summed = fresh.float(), self._averages * fresh
        distributed.all_reduce(processes)
        distributed.all_reduce(summed)
        self._averages.copy_(torch.where(processes > 0, summed / processes.clamp(min=1), self._averages))
        largest = torch.where(fresh > 0, self._classes, -1)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        self._classes.copy_(torch.where(processes > 0, largest, self._classes))
        self._classes[:, 3] = 0

    def inspect(self) -> Inspection:
        """What the labels look like now; this waits for the device.

        Raises:
            ValueError: an index of an :meth:`update` was not in [0, N).
        """
        self._catch_up()
        self._refuse_outside()
        given, other, visits, _ = self._classes.cpu().unbind(1)
        weight = (1 - self.momentum ** visits.double()).clamp(min=1e-12)
        margin, target_prob, agreement, _ = (self._averages.cpu() / weight[:, None]).unbind(1)
        return inspect(given, other, margin, target_prob, agreement, visits)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, to go on from."""
        self._catch_up()
        numbers = {"momentum": self.momentum, "num_classes": self.classes}
        return {**numbers, "averages": self._averages.clone(), "classes": self._classes.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; the numbers stay on their device.

        Raises:
            ValueError: it is of another number of samples or classes, or of another momentum.
        """
        saved = (len(state["averages"]), state.get("num_classes", self.classes), state["momentum"])  # once it said none
        if saved != (self.samples, self.classes, self.momentum):
            raise ValueError(
                f"the state must be of {self.samples} samples, {self.classes} classes and momentum {self.momentum}, "
                f"got {', '.join(map(str, saved))}"
            )
        self._batches, self._waiting = [], 0
        self._least.zero_()
        self._most.zero_()
        self._averages.copy_(state["averages"])
        self._classes.copy_(state["classes"])
