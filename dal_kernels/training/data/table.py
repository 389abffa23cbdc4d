"""Images listed in a table, CSV or Parquet: columns path, label and (optional) split."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dal_kernels.training.data.base import NOTHING, DataSet, FileImages, Images
from dal_kernels.training.data.files import class_labels, ordered
from dal_kernels.training.data.image_folder import with_side
from dal_kernels.training.data.transforms import IMAGENET, ImageTransform
from dal_kernels.training.errors import UsageError, need

__all__ = ["Parts", "other_rows", "read_table", "split_parts", "table_images", "table_root"]

# What each split is; the test is VALIDATION where no row is of TEST.
TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = {"": TRAIN, "train": TRAIN, "val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION, "test": TEST}


def table_images(path: Path, image_size: int = 0) -> DataSet:
    """The images that a table lists, inputs (3, side, side).

    A path is relative to the table's folder, or to the working folder if it is not there. Labels are any words or
    numbers. Rows whose split is test are tested on, and those of val, valid or validation are to choose an epoch by;
    without any of the test these are tested on. Those of train, or without a split, are trained on. Nobody verified the
    labels.

    Args:
        image_size: side of the inputs in pixels; 0: as ``natural_side``.

    Raises:
        UsageError: the table cannot be read, lacks a column or has a row that says nothing; it names the row.
    """
    columns = read_table(path, ("path", "label"), ("split",))
    names = columns["path"]
    parts = split_parts(path, columns["label"], columns.get("split"))
    root = table_root(path, names[0])

    def images(rows: Tensor) -> FileImages:
        return FileImages(root, [names[i] for i in rows.tolist()], ImageTransform(*IMAGENET))

    return with_side(parts.data_set(f"csv-{path.stem}", images, names), image_size)


def table_root(path: Path, name: str) -> Path:
    """What the paths in a table are relative to: its folder, or the working folder if its first path is there alone."""
    return Path() if Path(name).exists() and not (path.parent / name).exists() else path.parent


@dataclass(frozen=True)
class Parts:
    """What the rows of a table are for.

    Attributes:
        classes: their names, in the order of their numbers.
        labels: (N,) int64.
        train, validation, test: which rows.
    """

    classes: list[str]
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor

    def data_set(self, name: str, images: Callable[[Tensor], Images], paths: Sequence[str]) -> DataSet:
        """The data set ``name`` of these rows, whose labels nobody verified.

        Args:
            images: makes the inputs of rows (M,), of which there is one at least.
            paths: (N,) what tells the rows apart.
        """

        def part(rows: Tensor) -> Images:
            return images(rows) if len(rows) else NOTHING

        train, validation, test = ([paths[i] for i in rows.tolist()] for rows in self.rows)
        return DataSet(
            name,
            len(self.classes),
            part(self.train),
            self.labels[self.train],
            self.labels[self.train],
            part(self.test),
            self.labels[self.test],
            class_names=self.classes,
            train_paths=train,
            test_paths=test,
            validation=part(self.validation),
            validation_labels=self.labels[self.validation],
            validation_paths=validation,
            verified=False,
        )

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.train, self.validation, self.test


def other_rows(split: Sequence[str]) -> tuple[list[int], list[int]]:
    """Rows to choose an epoch by and to test on, by names in ``SPLITS``."""
    parts = [SPLITS.get(part.strip().lower(), TRAIN) for part in split]
    of = {kind: [row for row, part in enumerate(parts) if part == kind] for kind in (TEST, VALIDATION)}
    return (of[VALIDATION], of[TEST]) if of[TEST] else ([], of[VALIDATION])


def split_parts(path: Path, labels: Sequence[str], split: Sequence[str] | None) -> Parts:
    """Rows with a label and, perhaps, a split each, in the order of the file at ``path``; row 1 is the first.

    Raises:
        UsageError: a row has no label or another split than there are, there are fewer than 2 classes, or one of the
            test has no row to train on.
    """
    trained = []
    for row, (label, part) in enumerate(zip(labels, split or [""] * len(labels), strict=True), start=1):
        if not label:
            raise UsageError(f"{path}, row {row}: the label is empty")
        if part.strip().lower() not in SPLITS:
            raise UsageError(f"{path}, row {row}: split must be one of {', '.join(filter(None, SPLITS))}, got {part!r}")
        trained.append(SPLITS[part.strip().lower()] == TRAIN)
    train = torch.tensor(trained, dtype=torch.bool)
    classes = ordered(label for label, used in zip(labels, trained, strict=True) if used)
    if len(classes) < 2:
        raise UsageError(f"{path}: the rows to train on must be of at least 2 classes, got {len(classes)}")
    numbers = class_labels(labels, classes)
    strange = (numbers < 0).nonzero()[:, 0].tolist()
    if strange:
        raise UsageError(f"{path}, row {strange[0] + 1}: no row to train on has the label {labels[strange[0]]!r}")
    validation, test = (torch.tensor(rows, dtype=torch.long) for rows in other_rows(split or ()))
    return Parts(classes, numbers, train.nonzero()[:, 0], validation, test)


def read_table(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """Columns of a CSV file, or of a Parquet file by its suffix, as text; those ``optional`` only if they are there.

    Raises:
        UsageError: the file is missing, damaged or empty, or lacks a column.
    """
    try:
        columns = _read_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else _read_csv(path)
    except UsageError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UsageError(f"{path} cannot be read: {error}") from error
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UsageError(f"{path} must have the columns {', '.join(needed)}, got {', '.join(columns) or 'none'}")
    if not columns[needed[0]]:
        raise UsageError(f"{path} has no rows")
    return {name: columns[name] for name in (*needed, *optional) if name in columns}


def _read_csv(path: Path) -> dict[str, list[str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        names = [name.strip() for name in next(reader, [])]
        rows = [row for row in reader if row]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise UsageError(f"{path}, row {number}: must have {len(names)} values, got {len(row)}")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _read_parquet(path: Path) -> dict[str, list[str]]:
    table = need("pyarrow.parquet", "pyarrow", in_extra=False).read_table(path)
    return {
        name: ["" if value is None else str(value) for value in values] for name, values in table.to_pydict().items()
    }
