"""Images listed in a table, CSV or Parquet: columns path, label and (optional) split."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dal_kernels.training.data.base import NOTHING, DataSet, FileImages, Images
from dal_kernels.training.data.files import class_labels, ordered, title_of
from dal_kernels.training.data.image_folder import with_side
from dal_kernels.training.data.transforms import IMAGENET, ImageTransform
from dal_kernels.training.errors import UsageError, need, reason

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
    columns, rows = read_table(path, ("path", "label"), ("split",))
    names = columns["path"]
    parts = split_parts(path, columns["label"], columns.get("split"), rows)
    root = table_root(path, names[0])

    def images(rows: Tensor) -> FileImages:
        return FileImages(root, [names[i] for i in rows.tolist()], ImageTransform(*IMAGENET))

    return with_side(parts.data_set(f"csv-{title_of(path)}", images, names), image_size)


def table_root(path: Path, name: str) -> Path:
    """What the paths in a table are relative to: its folder, or the working folder if its first path is there alone."""
    return Path() if Path(name).exists() and not (path.parent / name).exists() else path.parent


@dataclass(frozen=True)
class Parts:
    """What the rows of a table are for.

    Attributes:
        classes: their names, in the order of their numbers.
        labels: (N,) int64, -1 for those that are not given.
        train, validation, test: which rows.
        note: what is not used.
    """

    classes: list[str]
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    note: str

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
            note=self.note,
        )

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.train, self.validation, self.test


def other_rows(split: Sequence[str]) -> tuple[list[int], list[int]]:
    """Rows to choose an epoch by and to test on, by names in ``SPLITS``."""
    parts = [SPLITS.get(part.strip().lower(), TRAIN) for part in split]
    rows_of = {kind: [row for row, part in enumerate(parts) if part == kind] for kind in (TEST, VALIDATION)}
    return (rows_of[VALIDATION], rows_of[TEST]) if rows_of[TEST] else ([], rows_of[VALIDATION])


def split_parts(
    path: Path, labels: Sequence[str], split: Sequence[str] | None, rows: Sequence[int] | None = None
) -> Parts:
    """Rows with a label and, perhaps, a split each, in the order of the file at ``path``.

    Spaces around a label do not count. Rows to choose an epoch by or to test on that have no label are left out, which
    the note says.

    Args:
        rows: (N,) their numbers in the file; None: row 1 is the first.

    Raises:
        UsageError: a row to train on has no label, a row has another split than there are, there are fewer than 2
            classes, or one of the test has no row to train on.
    """
    labels, rows = [label.strip() for label in labels], rows or range(1, len(labels) + 1)
    parts = [part.strip().lower() for part in split or [""] * len(labels)]
    for row, label, part in zip(rows, labels, parts, strict=True):
        if part not in SPLITS:
            raise UsageError(f"{path}, row {row}: split must be one of {', '.join(filter(None, SPLITS))}, got {part!r}")
        if not label and SPLITS[part] == TRAIN:
            raise UsageError(f"{path}, row {row}: the label is empty")
    trained = [SPLITS[part] == TRAIN for part in parts]
    train = torch.tensor(trained, dtype=torch.bool)
    classes = ordered(label for label, used in zip(labels, trained, strict=True) if used)
    if len(classes) < 2:
        raise UsageError(f"{path}: the rows to train on must be of at least 2 classes, got {len(classes)}")
    numbers = class_labels(labels, classes)
    strange = next((i for i in (numbers < 0).nonzero()[:, 0].tolist() if labels[i]), None)
    if strange is not None:
        raise UsageError(f"{path}, row {rows[strange]}: no row to train on has the label {labels[strange]!r}")
    # Those without a label are as if they were not there: a validation is tested on where no row of the test has one.
    known = [part if label else "train" for label, part in zip(labels, parts, strict=True)]
    validation, test = (torch.tensor(found, dtype=torch.long) for found in other_rows(known))
    left = sum(not label for label in labels)
    note = f"{left} rows of validation and test are not used, as they have no label" if left else ""
    return Parts(classes, numbers, train.nonzero()[:, 0], validation, test, note)


def read_table(
    path: Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> tuple[dict[str, list[str]], Sequence[int]]:
    """Columns of a CSV file, or of a Parquet file by its suffix, as text; those ``optional`` only if they are there.

    Also the number of each row in the file: 1 is the first below the names, and empty lines count.

    Raises:
        UsageError: the file is missing, damaged or empty, or lacks a column or has it twice.
    """
    try:
        names, columns, rows = (_read_parquet if path.suffix.lower() in (".parquet", ".pq") else _read_csv)(path)
    except UsageError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UsageError(f"{path} cannot be read: {reason(error, path)}") from error
    if any(name not in names for name in needed):
        raise UsageError(f"{path} must have the columns {', '.join(needed)}, got {', '.join(names) or 'none'}")
    twice = [name for name in (*needed, *optional) if names.count(name) > 1]
    if twice:
        raise UsageError(f"{path} must have one column {twice[0]}, got {names.count(twice[0])}")
    if not rows:
        raise UsageError(f"{path} has no rows")
    return {name: columns[names.index(name)] for name in (*needed, *optional) if name in names}, rows


# Names of the columns, (N,) values of each, and the numbers of the rows.
Content = tuple[list[str], list[list[str]], Sequence[int]]


def _read_csv(path: Path) -> Content:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        names = [name.strip() for name in next(reader, [])]
        rows = {number: row for number, row in enumerate(reader, start=1) if row}
    for number, row in rows.items():
        if len(row) != len(names):
            raise UsageError(f"{path}, row {number}: must have {len(names)} values, got {len(row)}")
    return names, [[row[i] for row in rows.values()] for i in range(len(names))], list(rows)


def _read_parquet(path: Path) -> Content:
    table = need("pyarrow.parquet", "pyarrow", in_extra=False).read_table(path)
    columns = [["" if value is None else str(value) for value in column.to_pylist()] for column in table.columns]
    return table.column_names, columns, range(1, table.num_rows + 1)
