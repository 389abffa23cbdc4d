"""Which labels look wrong, told from the statistics that the losses give of each training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from dal_kernels.arguments import RowStats
from dal_kernels.training.inspection import Inspection, inspect

__all__ = ["LabelInspector"]


class LabelInspector:
    """Follows what a network makes of the label of each sample, in a few numbers a sample.

    >>> inspector = LabelInspector(len(dataset), num_classes)
    >>> for epoch in range(epochs):
    ...     for images, labels, indices in loader:
    ...         loss, stats = criterion(model(images), labels, return_stats=True)
    ...         inspector.update(indices, labels, stats)
    ...         loss.backward()  # ... optimiser as always
    >>> inspector.inspect().save_csv("suggested.csv", paths, class_names)

    All losses of the package give these statistics, in the pass that makes loss and gradient. The memory is 28 bytes a
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
        zeros, none = torch.zeros(samples, device=device), torch.full((samples,), -1, dtype=torch.int32, device=device)
        # The averages lack their early weights, 1 - momentum ** visits in all: who reads them divides by these.
        self._margin, self._target_prob, self._agreement = zeros, zeros.clone(), zeros.clone()
        self._given, self._other, self._votes = none, none.clone(), zeros.clone()
        self._visits = torch.zeros(samples, dtype=torch.int32, device=device)
        self._fresh = torch.zeros(samples, dtype=torch.bool, device=device)  # visited here since all agreed

    @torch.no_grad()
    def update(self, indices: Tensor, target: Tensor, stats: RowStats) -> None:
        """Take in a batch.

        Args:
            indices: (B,) integers, which samples; on the device of ``stats``, lest it be waited for.
            target: (B,) class indices, the labels given. Rows that the loss ignores are passed over.
            stats: (B,) each, of a loss called with ``return_stats=True``.

        Raises:
            ValueError: the shapes differ, or there are no class indices.
        """
        if indices.ndim != 1 or not indices.shape == target.shape == stats.target_prob.shape:
            raise ValueError(
                f"indices, target and stats must be (B,) of one batch, got {tuple(indices.shape)}, "
                f"{tuple(target.shape)} and {tuple(stats.target_prob.shape)}"
            )
        if not self._placed:
            self._move(stats.target_prob.device)
        where = self._margin.device
        indices, target = (values.to(where, torch.long, non_blocking=True) for values in (indices, target))
        target_prob, prediction, max_prob = (
            values.to(where, non_blocking=True) for values in (stats.target_prob, stats.prediction, stats.max_prob)
        )
        seen = ~target_prob.isnan()  # NaN: an ignored row, or logits that are not finite
        agrees = prediction == target
        margin = torch.where(agrees, target_prob, target_prob - max_prob)
        for average, value in (
            (self._margin, margin),
            (self._target_prob, target_prob),
            (self._agreement, agrees.float()),
        ):
            before = average[indices]
            average[indices] = torch.where(seen, torch.lerp(value.float(), before, self.momentum), before)

        # The class that the network prefers to the label most often: a vote for another class takes from the votes of
        # the one in the lead, and takes the lead when none are left.
        other, votes = self._other[indices], self._votes[indices]
        voted = seen & ~agrees
        vote = (1 - self.momentum) * max_prob.float()
        after = self.momentum * votes + torch.where(other == prediction, vote, -vote)
        self._other[indices] = torch.where(voted & (after <= 0), prediction.int(), other)
        self._votes[indices] = torch.where(voted, after.abs(), votes)

        self._given[indices] = torch.where(seen, target.int(), self._given[indices])
        self._visits[indices] += seen.int()
        self._fresh[indices] |= seen

    def synchronize(self) -> None:
        """Give all processes what each has seen since the last call; all of them call this. Alone it does nothing."""
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return
        # A sampler may give a sample to two processes, to make their batches equal: the mean of both then.
        seen_by = self._fresh.float()
        distributed.all_reduce(seen_by)
        for average in (self._margin, self._target_prob, self._agreement, self._votes):
            summed = torch.where(self._fresh, average, 0.0)
            distributed.all_reduce(summed)
            average.copy_(torch.where(seen_by > 0, summed / seen_by.clamp(min=1), average))
        for number in (self._given, self._other, self._visits):
            largest = torch.where(self._fresh, number, -1)
            distributed.all_reduce(largest, distributed.ReduceOp.MAX)
            number.copy_(torch.where(seen_by > 0, largest, number))
        self._fresh.zero_()

    def inspect(self) -> Inspection:
        """What the labels look like now; this waits for the device."""
        weight = (1 - self.momentum ** self._visits.double()).clamp(min=1e-12)
        averages = (self._margin, self._target_prob, self._agreement)
        margin, target_prob, agreement = ((average / weight).cpu() for average in averages)
        return inspect(self._given.cpu(), self._other.cpu(), margin, target_prob, agreement, self._visits.cpu())

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, to go on from."""
        return {"momentum": self.momentum, **{name: getattr(self, f"_{name}") for name in BUFFERS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; the numbers stay on their device.

        Raises:
            ValueError: it is of another number of samples, or of another momentum.
        """
        if state["momentum"] != self.momentum or len(state["visits"]) != self.samples:
            raise ValueError(
                f"the state must be of {self.samples} samples with momentum {self.momentum}, got "
                f"{len(state['visits'])} with {state['momentum']}"
            )
        for name in BUFFERS:
            getattr(self, f"_{name}").copy_(state[name])

    def _move(self, device: torch.device) -> None:
        for name in BUFFERS:
            setattr(self, f"_{name}", getattr(self, f"_{name}").to(device))
        self._placed = True


BUFFERS = ("margin", "target_prob", "agreement", "given", "other", "votes", "visits", "fresh")
