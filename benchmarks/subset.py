"""A data set with some of its training samples alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dal_kernels.training.data.base import DataSet, Images


@dataclass(frozen=True)
class Subset:
    """Some of the images, by their numbers (n,)."""

    images: Images
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Sequence[int], train: bool) -> Tensor:
        return self.images.batch(self.indices[torch.as_tensor(indices)].tolist(), train)


def with_training_samples(data: DataSet, indices: Tensor) -> DataSet:
    """Of its training samples those with the numbers ``indices``, (n,) int64; test and validation stay whole."""
    return replace(
        data,
        train=Subset(data.train, indices),
        train_labels=data.train_labels[indices],
        true_labels=data.true_labels[indices],
        train_paths=None,
    )
