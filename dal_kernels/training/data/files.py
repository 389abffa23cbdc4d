"""Finding a data set's files, and lists of labels read line by line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dal_kernels.noise import parse_label, read_lines
from dal_kernels.training.errors import UsageError, usage_errors

__all__ = ["class_labels", "find_files", "need_folder", "ordered", "read_label_list", "title_of"]


def need_folder(name: str, folder: Path | None, advice: str) -> Path:
    """The folder given for the data set ``name``.

    Raises:
        UsageError: none was given, or there is none; ``advice`` says what to place in it.
    """
    if folder is None:
        raise UsageError(f"{name} needs the folder of its files as --data-dir: {advice}")
    if not folder.is_dir():
        raise UsageError(f"{name}: the data folder {folder} does not exist; {advice}")
    return folder


def find_files(
    name: str, files: Sequence[str], folders: Sequence[Path], advice: str, suffixes: Sequence[str] = ("",)
) -> list[Path]:
    """The paths of all ``files`` in the first of ``folders`` that has them, each with the first suffix that it has.

    Raises:
        UsageError: no folder has them all; ``advice`` says how to get them.
    """

    def existing(folder: Path, file: str) -> Path | None:
        return next((path for suffix in suffixes if (path := folder / (file + suffix)).is_file()), None)

    for folder in folders:
        found = [existing(folder, file) for file in files]
        if all(found):
            return [path for path in found if path]
    missing = [file for file in files if not any(existing(folder, file) for folder in folders)]
    form = f" ({' or '.join(suffix or 'plain' for suffix in suffixes)})" if len(suffixes) > 1 else ""
    raise UsageError(
        f"{name}: {', '.join(missing or files)}{form} not found in {' or '.join(map(str, folders))}; {advice}"
    )


def title_of(path: Path) -> str:
    """What a file is called without its suffix, or a folder, whose name has none: of set.v1 the dot is a part."""
    return Path(os.path.abspath(path)).name if path.is_dir() else path.stem


def ordered(names: Iterable[str]) -> list[str]:
    """The different names in order; if all are integers in the order of these, for 10 sorts before 2 as a word."""
    different = sorted(set(names))
    return sorted(different, key=int) if all(name.isascii() and name.isdecimal() for name in different) else different


def class_labels(labels: Sequence[str], classes: Sequence[str]) -> Tensor:
    """(N,) int64, the place of each label among ``classes``, -1 where it is none of them, spaces around it or not."""
    place = {name: i for i, name in enumerate(classes)}
    return torch.tensor([place.get(label, place.get(label.strip(), -1)) for label in labels], dtype=torch.long)


def read_label_list(path: Path, classes: int, strip: str = "") -> dict[str, int]:
    """A list with lines ``key label`` as {key: label}, in its order; ``strip`` is taken off the front of each key.

    Raises:
        UsageError: a line is not of that form, its label is no class, or its key had another label before; it names
            the file and the line. Also where there is no line.
    """
    labels: dict[str, int] = {}
    with usage_errors():
        for place, line in read_lines(path):
            if len(parts := line.rsplit(maxsplit=1)) != 2:
                raise UsageError(f"{place}: must be a path and a label, got {line!r}")
            key, label = parts[0].removeprefix(strip), parse_label(parts[1], classes, place)
            if labels.setdefault(key, label) != label:
                raise UsageError(f"{place}: {key} has the label {label}, and had {labels[key]} before")
    if not labels:
        raise UsageError(f"{path} is empty")
    return labels
