"""Features that a network or a table has given already: a linear probe or an MLP on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dal_kernels.training.data.base import DataSet
from dal_kernels.training.data.files import title_of
from dal_kernels.training.data.table import split_parts
from dal_kernels.training.errors import UsageError, need, reason

__all__ = ["FeatureRows", "feature_rows", "need_finite", "read_features"]

NAMES = ("features", "labels", "split", "paths", "class_names")
ADVICE = "features (N, ...) and labels (N,), perhaps split (N,), paths (N,) and class_names (C,)"
CHUNK = 4096  # rows looked at at once


@dataclass(frozen=True)
class FeatureRows:
    """``rows`` of a numpy array of features (N, ...), which may be on the disk."""

    array: Any
    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int], train: bool) -> Tensor:
        return torch.from_numpy(self.array[self.rows[list(indices)]].astype("float32"))


def feature_rows(path: Path) -> DataSet:
    """Features (N, ...) with labels (N,), numbers or words; the network standardises them by the training part.

    ``path`` is an .npz file of the arrays features, labels and, perhaps, split (as in a table), paths and class_names
    (of labels that are numbers); or a folder of .npy files with these names, of which the features stay on the disk.
    Nobody verified the labels.

    Raises:
        UsageError: an array is missing, damaged or of another shape, or a feature is not finite; it names the row.
    """
    arrays = read_features(path)
    features, labels = arrays["features"], arrays["labels"]
    names = [str(name) for name in arrays.get("class_names", ())]
    parts = split_parts(path, _words(labels, names, path), None if "split" not in arrays else _text(arrays["split"]))

    def images(rows: Tensor) -> FeatureRows:
        return FeatureRows(features, rows.numpy())

    for rows in parts.rows:
        need_finite(images(rows), path)
    paths = _text(arrays["paths"]) if "paths" in arrays else list(map(str, range(len(labels))))
    return replace(parts.data_set(f"npz-{title_of(path)}", images, paths), moments=_moments(images(parts.train)))


def read_features(path: Path, labelled: bool = True) -> dict[str, Any]:
    """The arrays of :func:`feature_rows` by their names, of one length; without labels, if these need not be.

    Raises:
        UsageError: one cannot be read, is missing, or of another type or shape.
    """
    numpy = need("numpy")
    try:
        if path.is_dir():
            files = [path / f"{name}.npy" for name in NAMES]
            arrays = {file.stem: numpy.load(file, mmap_mode="r") for file in files if file.exists()}
        else:
            content = numpy.load(path, mmap_mode="r")  # of a single array nothing is read
            if isinstance(content, numpy.ndarray):
                raise UsageError(f"{path} is a single array; save it with its labels by numpy.savez: {ADVICE}")
            with content:
                arrays = {name: content[name] for name in NAMES if name in content}
    except UsageError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UsageError(f"{path} cannot be read: {reason(error, path)}; it must hold {ADVICE}") from error
    if not {"features", *(["labels"] if labelled else [])} <= arrays.keys():
        raise UsageError(f"{path} must hold {ADVICE}, got {', '.join(arrays) or 'none of them'}")
    features, labels = arrays["features"], arrays.get("labels")
    fitting = labels is None or labels.shape == features.shape[:1]
    if features.ndim < 2 or features.dtype.kind not in "fiu" or not fitting:
        also = "" if labels is None else f" and labels {labels.dtype} {labels.shape}"
        raise UsageError(f"{path} must hold numbers {ADVICE}, got features {features.dtype} {features.shape}{also}")
    if not len(features):
        raise UsageError(f"{path} has no rows, got features {features.shape}")
    if labels is not None and labels.dtype.kind not in "iuU":
        raise UsageError(f"{path}: labels must be integers or words, got {labels.dtype}")
    for name, shape in (("split", features.shape[:1]), ("paths", features.shape[:1]), ("class_names", None)):
        if name in arrays and (arrays[name].ndim != 1 if shape is None else arrays[name].shape != shape):
            raise UsageError(f"{path}: {name} must be {shape or '(C,)'}, got {arrays[name].shape}")
    return arrays


def _text(values: Any) -> list[str]:
    return [str(value) for value in values.tolist()]


def _words(labels: Any, names: list[str], path: Path) -> list[str]:
    """Each label as a word: of a number its name, if names are given."""
    if labels.dtype.kind == "U" or not names:
        return _text(labels)
    if labels.min() < 0 or labels.max() >= len(names):
        raise UsageError(f"{path}: labels must be from 0 to {len(names) - 1}, as there are class_names, got others")
    return [names[label] for label in labels.tolist()]


def _chunks(part: FeatureRows) -> Iterator[tuple[int, Tensor]]:
    """Features in float64, with the place of the first of them among the rows."""
    for start in range(0, len(part), CHUNK):
        yield start, part.batch(range(start, min(start + CHUNK, len(part))), train=False).double()


def need_finite(part: FeatureRows, path: Path) -> None:
    """Raises UsageError, naming the row, where a feature is not finite: a network makes a class of it all the same."""
    for start, chunk in _chunks(part):
        bad = (~chunk.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise UsageError(f"{path}: features must be finite, got other values in row {part.rows[start + bad[0]]}")


def _moments(train: FeatureRows) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the rows, in float64 from chunks."""
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    for _, chunk in _chunks(train):
        total, squares = total + chunk.sum(0), squares + (chunk**2).sum(0)
    assert isinstance(total, Tensor) and isinstance(squares, Tensor)  # noqa: PT018
    mean = total / len(train)
    sd = (squares / len(train) - mean**2).clamp(min=0).sqrt()
    return mean.float(), torch.where(sd > 1e-6 * (1 + mean.abs()), sd, 1.0).float()
