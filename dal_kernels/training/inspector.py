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

WAITING = 64  # batches that are taken in together, on a CPU


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
        # A row a sample, because a gather and a scatter of rows take a fraction of the time of those of many columns.
        # Averages lack their early weights, 1 - momentum ** visits in all: who reads them divides by these.
        self._averages = torch.zeros(samples, 4, device=device)  # margin, p_y, agreement, votes for the other class
        self._classes = torch.zeros(samples, 4, dtype=torch.int32, device=device)  # label, other class, visits, fresh
        self._classes[:, :2] = -1
        self._negative = torch.zeros((), dtype=torch.int64, device=device)
        self._batches: list[list[Tensor]] = []
        self._waits = torch.zeros(samples, dtype=torch.bool)

    @torch.no_grad()
    def update(self, indices: Tensor, target: Tensor, stats: RowStats) -> None:
        """Take in a batch.

        Args:
            indices: (B,) integers in [0, N), which samples; on the device of ``stats``, lest it be waited for.
            target: (B,) class indices, the labels given. Rows that the loss ignores are passed over.
            stats: (B,) each, of a loss called with ``return_stats=True``.

        Raises:
            ValueError: the shapes differ, there are no class indices, or an index is not in [0, N); on a GPU, which is
                not waited for, :meth:`inspect` raises it.
        """
        if indices.ndim != 1 or not indices.shape == target.shape == stats.target_prob.shape:
            raise ValueError(
                f"indices, target and stats must be (B,) of one batch, got {tuple(indices.shape)}, "
                f"{tuple(target.shape)} and {tuple(stats.target_prob.shape)}"
            )
        if not self._placed:
            device = stats.target_prob.device
            self._averages, self._classes, self._placed = self._averages.to(device), self._classes.to(device), True
            self._negative = self._negative.to(device)
        where = self._averages.device
        batch = [
            moved(values, where) for values in (indices, target, stats.target_prob, stats.prediction, stats.max_prob)
        ]
        if where.type != "cpu":
            self._take_in(*batch)
            return
        # On a CPU the two dozen operations on a batch would take as long as some layers, so that batches wait for each
        # other, as long as no sample comes twice. A GPU's wait in its queue as it is.
        indices = batch[0].to(torch.int64)
        least, most = (end.item() for end in indices.aminmax()) if len(indices) else (0, 0)
        if least < 0 or most >= self.samples:
            raise ValueError(f"indices must be from 0 to {self.samples - 1}, got {least if least < 0 else most}")
        if len(self._batches) == WAITING or bool(self._waits.index_select(0, indices).any()):
            self._catch_up()
        self._waits.index_fill_(0, indices, True)
        self._batches.append([indices.clone(), batch[1].clone(), *batch[2:]])

    def _catch_up(self) -> None:
        """Take in the batches that wait."""
        if self._batches:
            self._take_in(*(torch.cat(parts) for parts in zip(*self._batches, strict=True)))
            self._batches.clear()
            self._waits.zero_()

    @torch.no_grad()
    def _take_in(
        self, indices: Tensor, target: Tensor, target_prob: Tensor, prediction: Tensor, max_prob: Tensor
    ) -> None:
        # On a GPU an index below 0 is told by who waits for it; one above N stops the device by itself.
        self._negative += (indices < 0).sum()
        averages, classes = self._averages[indices], self._classes[indices]
        other = classes[:, 1]
        agrees = prediction == target
        preferred = max_prob.masked_fill(agrees, 0.0)
        # The other class is the one that is preferred to the label most often: the votes for another are taken from
        # those of the one in the lead, and give the lead to it when none are left.
        vote = torch.where(prediction == other, preferred, -preferred)
        values = torch.stack([target_prob - preferred, target_prob, agrees.to(target_prob.dtype), vote], 1).float()
        after = torch.lerp(values, averages, self.momentum)
        votes = after[:, 3]
        other = torch.where(votes < 0, prediction, other)
        votes.abs_()
        visited = torch.stack([target, other, classes[:, 2] + 1, torch.ones_like(other)], 1).int()

        seen = ~target_prob.isnan()[:, None]  # NaN: an ignored row, or logits that are not finite
        self._averages[indices] = torch.where(seen, after, averages)
        self._classes[indices] = torch.where(seen, visited, classes)

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
        self._averages = torch.where(processes > 0, summed / processes.clamp(min=1), self._averages)
        largest = torch.where(fresh > 0, self._classes, -1)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        self._classes = torch.where(processes > 0, largest, self._classes)
        self._classes[:, 3] = 0

    def inspect(self) -> Inspection:
        """What the labels look like now; this waits for the device.

        Raises:
            ValueError: an index of an :meth:`update` on a GPU was below 0.
        """
        self._catch_up()
        if self._negative > 0:
            raise ValueError(f"indices must be from 0 to {self.samples - 1}, got {self._negative.item()} below 0")
        given, other, visits, _ = self._classes.cpu().unbind(1)
        weight = (1 - self.momentum ** visits.double()).clamp(min=1e-12)
        margin, target_prob, agreement, _ = (self._averages.cpu() / weight[:, None]).unbind(1)
        return inspect(given, other, margin, target_prob, agreement, visits)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, to go on from."""
        self._catch_up()
        numbers = {"momentum": self.momentum, "num_classes": self.classes}
        return {**numbers, "averages": self._averages, "classes": self._classes}

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
        self._batches.clear()
        self._waits.zero_()
        self._averages.copy_(state["averages"])
        self._classes.copy_(state["classes"])
