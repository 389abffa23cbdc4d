"""What a data set gives to the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["UNKNOWN", "DataSet", "Images", "TensorImages"]

# The true label of a training sample of which nobody knows it.
UNKNOWN = -1


class Images(Protocol):
    """The inputs of one part of a data set, fetched a batch at a time."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], train: bool) -> Tensor:
        """Inputs (len(indices), ...), float32, standardised; augmented at random (torch's generator) if ``train``."""
        ...


@dataclass(frozen=True)
class TensorImages:
    """Inputs that fit in memory: (N, ...) float32, standardised; ``augment`` takes and gives a batch."""

    inputs: Tensor
    augment: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Sequence[int], train: bool) -> Tensor:
        picked = self.inputs[torch.as_tensor(indices)]
        return self.augment(picked) if train and self.augment is not None else picked


@dataclass(frozen=True)
class DataSet:
    """A data set as it lies on the disk, before any label is made wrong.

    Attributes:
        name: in the registry.
        classes: how many.
        train, test: the images.
        train_labels: (N,) int64, as the data set gives them; wrong already where it was labelled by the web.
        true_labels: (N,) int64, the truth about the training samples, ``UNKNOWN`` where nobody knows it; for a clean
            data set the same as ``train_labels``.
        test_labels: (M,) int64, clean.
        flips: (C,) int64, the class that each class is taken for in asymmetric noise; a class that maps to itself is
            not flipped. None: the next class, the last to the first.
    """

    name: str
    classes: int
    train: Images
    train_labels: Tensor
    true_labels: Tensor
    test: Images
    test_labels: Tensor
    flips: Tensor | None = None
