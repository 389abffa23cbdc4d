"""scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

import torch

from dal_kernels.training.data.base import DataSet, TensorImages
from dal_kernels.training.errors import UsageError, need

__all__ = ["digits"]


def digits(folder: Path | None = None) -> DataSet:
    """scikit-learn's digits, 1797 images of 8 x 8: three quarters train, the split fixed, each pixel standardised.

    Raises:
        UsageError: a folder was given, or scikit-learn is missing.
    """
    if folder is not None:
        raise UsageError("digits comes with scikit-learn and takes no data folder")
    bunch = need("sklearn.datasets", "scikit-learn").load_digits()
    split = need("sklearn.model_selection", "scikit-learn").train_test_split
    images, labels = torch.from_numpy(bunch.images).float(), torch.from_numpy(bunch.target).long()
    train, test = split(torch.arange(len(labels)).numpy(), test_size=0.25, stratify=bunch.target, random_state=0)
    train, test = torch.from_numpy(train), torch.from_numpy(test)
    mean, sd = images[train].mean(0), images[train].std(0)
    inputs = (images - mean) / torch.where(sd > 0, sd, 1.0)  # some corner pixels are always 0
    return DataSet(
        "digits",
        10,
        TensorImages(inputs[train], pictures=images[train]),
        labels[train],
        labels[train],
        TensorImages(inputs[test]),
        labels[test],
    )
