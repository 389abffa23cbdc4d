"""What is measured in an epoch and after it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dal_kernels.training.loader import Batches

__all__ = ["TIMINGS", "EpochMetrics", "StepClock", "chosen_epoch", "count_hits", "predictions", "share"]


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch, counted from 1. Shares are in [0, 1] and NaN where there is nothing to count.

    Attributes:
        train_loss: mean over the epoch's samples while the weights move; not comparable between losses.
        test_accuracy: on the test set, after the epoch; ``best_accuracy`` is the highest so far.
        validation_accuracy: on training samples held out, against their given labels, wrong ones among them; or on
            the part that the data has for it; NaN where there is neither.
        memorised: share of the training samples known to be labelled wrong that are predicted as their wrong label,
            after the epoch.
        mislabelled_right: share of the same samples predicted as their true class.
        target_prob: p_y, the probability of the given label, mean over the epoch's samples while the weights move; NaN
            if the loss does not tell.
        q, bootstrap_weight: what the loss used as the epoch began; NaN if it has no such parameter.
        learning_rate: used in the epoch.
        loss_time_share: of the time of a training step (forward, loss, backward, optimiser), the share that the loss
            and its gradient by the logits take.
        seconds: of the epoch, evaluation included.
    """

    epoch: int
    train_loss: float
    test_accuracy: float
    best_accuracy: float
    validation_accuracy: float
    memorised: float
    mislabelled_right: float
    target_prob: float
    q: float
    bootstrap_weight: float
    learning_rate: float
    loss_time_share: float
    seconds: float


# The only metrics that differ when a run is repeated.
TIMINGS = ("loss_time_share", "seconds")


def chosen_epoch(history: Sequence[EpochMetrics]) -> EpochMetrics:
    """The first epoch with the highest validation accuracy; the last one without a validation."""
    if math.isnan(history[-1].validation_accuracy):
        return history[-1]
    return max(history, key=lambda epoch: epoch.validation_accuracy)


def share(part: float, whole: float) -> float:
    """``part / whole``; NaN of nothing."""
    return part / whole if whole else float("nan")


@torch.no_grad()
def count_hits(model: nn.Module, loader: Batches, *labels: Tensor) -> Tensor:
    """How many predictions, in evaluation mode, equal each of ``labels`` (N,), in which batches have their indices.

    Returns one float64 count for each, and at the end of how many predictions, on the labels' device; the model's mode
    is restored.
    """
    training = model.training
    model.eval()
    hits = torch.zeros(len(labels) + 1, dtype=torch.float64, device=labels[0].device)
    for inputs, indices in loader:
        indices = indices.to(hits.device, non_blocking=True)
        prediction = model(inputs.to(hits.device, non_blocking=True)).argmax(1)
        equal = [(prediction == classes[indices]).sum() for classes in labels]
        hits += torch.stack([*equal, torch.full_like(prediction[0], len(prediction))])
    model.train(training)
    return hits


@torch.no_grad()
def predictions(model: nn.Module, loader: Batches, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """In evaluation mode: which samples (M,) int64, their classes (M,) int64, and the probabilities of these (M,)
    float32, on the CPU; the model's mode is restored.
    """
    training = model.training
    model.eval()
    found = []
    for inputs, indices in loader:
        confidence, prediction = model(inputs.to(device, non_blocking=True)).float().softmax(1).max(1)
        found.append((indices, prediction.cpu(), confidence.cpu()))
    model.train(training)
    if not found:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0)
    indices, classes, confidences = (torch.cat(parts) for parts in zip(*found, strict=True))
    return indices, classes, confidences


class StepClock:
    """How much of the steps' time the loss takes; on a GPU by events, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start: Any, loss_start: Any, loss_end: Any) -> None:
        """A step ends now; the rest was told by :meth:`now`."""
        self.steps.append((start, loss_start, loss_end, self.now()))

    def loss_share(self) -> float:
        """Over the steps since the last call."""
        if self.on_gpu:
            torch.cuda.synchronize()
        loss = sum(self._between(loss_start, loss_end) for _, loss_start, loss_end, _ in self.steps)
        total = sum(self._between(start, end) for start, _, _, end in self.steps)
        self.steps.clear()
        return share(loss, total)

    def _between(self, first: Any, second: Any) -> float:
        elapsed: float = first.elapsed_time(second) if self.on_gpu else second - first
        return elapsed
