"""Images in other people's archives, through their own libraries: Hugging Face datasets and webdataset."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dal_kernels.training.data.base import DataSet, RecordImages
from dal_kernels.training.data.files import title_of
from dal_kernels.training.data.image_folder import SUFFIXES, with_side
from dal_kernels.training.data.table import SPLITS, split_parts
from dal_kernels.training.data.transforms import IMAGENET, ImageTransform
from dal_kernels.training.errors import UsageError, need, reason

__all__ = ["ARCHIVES", "Archive", "archive_images"]

IMAGE_KEYS = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
LABELS = ("label", "labels", "cls")


@dataclass(frozen=True)
class Archive:
    """(N,) images: ``read`` gives the file of one, or what would be in it, by its number.

    ``paths`` tells them apart, ``words`` are their labels, "" where there is none, and ``split`` their parts.
    """

    read: Callable[[int], Path | bytes]
    paths: Sequence[str]
    words: Sequence[str]
    split: Sequence[str]

    def images(self, rows: Tensor) -> RecordImages:
        numbers = rows.tolist()
        return RecordImages(
            partial(_row, self.read, numbers), [self.paths[i] for i in numbers], ImageTransform(*IMAGENET)
        )


def _row(read: Callable[[int], Path | bytes], numbers: list[int], index: int) -> Path | bytes:
    return read(numbers[index])


def archive_images(kind: str, path: Path, image_size: int = 0) -> DataSet:
    """The images of an archive of a ``kind`` in ``ARCHIVES``, inputs (3, side, side); nobody verified the labels.

    Its parts are those of a table: train, val (or valid, validation) and test.

    Args:
        image_size: side of the inputs in pixels; 0: as ``natural_side``.

    Raises:
        UsageError: the library is missing, the archive cannot be read, or has a record without an image or a label.
    """
    archive = ARCHIVES[kind](path)
    parts = split_parts(path, archive.words, archive.split)
    name = f"{kind}-{re.sub(r'[^A-Za-z0-9_.]+', '-', title_of(path)).strip('-')}"
    return with_side(parts.data_set(name, archive.images, archive.paths), image_size)


def _hugging_face(path: Path) -> Archive:
    """What Hugging Face's datasets makes of a place, see ``_parts``. Images stay on the disk."""
    library = need("datasets", in_extra=False)
    parts = _parts(library, path, streaming=False)
    column, label, named = _columns(library, path, parts)
    parts = _undecoded(library, path, parts, column)
    try:
        dataset = library.concatenate_datasets([_kept(part, column, label) for part in parts.values()])
    except Exception as error:
        raise UsageError(
            f"{path}: the splits {', '.join(parts)} must have columns of the same types: {error}"
        ) from error
    words = [""] * len(dataset) if label is None else [_word(value, named) for value in dataset[label]]
    return Archive(
        partial(_hugging_face_record, dataset, column),
        [f"{name}/{row}" for name, part in parts.items() for row in range(len(part))],
        words,
        [name for name, part in parts.items() for _ in range(len(part))],
    )


def _hugging_face_stream(path: Path) -> Archive:
    """The same read once, as a stream, without a copy on the disk. Encoded, all images are kept in memory."""
    library = need("datasets", in_extra=False)
    parts = _parts(library, path, streaming=True)
    column, label, named = _columns(library, path, parts)
    images: list[Path | bytes] = []
    paths, words, split = [], [], []
    for name, part in _undecoded(library, path, parts, column).items():
        try:
            for row, record in enumerate(_kept(part, column, label)):
                images.append(_content(record[column]))
                paths.append(f"{name}/{row}")
                words.append("" if label is None else _word(record[label], named))
                split.append(name)
        except Exception as error:  # the library raises anything
            raise UsageError(f"{path}, split {name} cannot be read: {reason(error, path)}") from error
    return Archive(images.__getitem__, paths, words, split)


def _parts(library: Any, path: Path, streaming: bool) -> dict[str, Any]:
    """The splits of a folder of save_to_disk, or of whatever else load_dataset takes: a folder of Parquet files, of
    images, or a name on the hub.
    """
    place = path.as_posix()
    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            loaded = library.load_from_disk(place)
        else:
            loaded = library.load_dataset(place, streaming=streaming)
    except Exception as error:  # the library raises anything
        raise UsageError(
            f"{path} cannot be read by datasets, as a folder or as a name on the hub: {reason(error, path)}"
        ) from error
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    for name in parts:
        if name.lower() not in SPLITS:
            raise UsageError(f"{path}: splits must be among {', '.join(filter(None, SPLITS))}, got {name!r}")
    return parts


def _columns(library: Any, path: Path, parts: dict[str, Any]) -> tuple[str, str | None, Any]:
    """The column of images; that of labels, called label or labels, or the only one of the type ClassLabel; and this
    type, which names the classes. None for what is not there.
    """
    features = next(iter(parts.values())).features or {}
    images = [name for name, feature in features.items() if isinstance(feature, library.Image)]
    if len(images) != 1:
        raise UsageError(f"{path} must have one column of images, got {len(images)} of {', '.join(features)}")
    classes = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
    labels = [name for name in LABELS if name in features] or classes
    if len(labels) > 1 and labels == classes:
        raise UsageError(f"{path} must have one column of labels, got {', '.join(labels)}; call it label")
    label = labels[0] if labels else None
    return images[0], label, features[label] if label in classes else None


def _undecoded(library: Any, path: Path, parts: dict[str, Any], column: str) -> dict[str, Any]:
    """With the files of the images, so that one that cannot be read is told from the others."""
    try:
        return {name: part.cast_column(column, library.Image(decode=False)) for name, part in parts.items()}
    except Exception as error:  # the library raises anything
        raise UsageError(f"{path} cannot be read by datasets: {error}") from error


def _kept(part: Any, column: str, label: str | None) -> Any:
    """Without the columns that nobody asks for, which need not be read."""
    return part.select_columns([column] if label is None else [column, label])


def _word(value: Any, named: Any) -> str:
    """A label as a word: of a number its name, if the column has names; nothing of those that mean no label."""
    if value is None or (named is not None and value < 0):
        return ""
    return str(value if named is None else named.int2str(value))


def _hugging_face_record(dataset: Any, column: str, index: int) -> Path | bytes:
    return _content(dataset[index][column])


def _content(record: dict[str, Any]) -> Path | bytes:
    """The image of an undecoded record; that of a stream may have a path into an archive or to another machine."""
    if record["bytes"] is not None:
        return record["bytes"]
    if "://" not in record["path"]:
        return Path(record["path"])
    with need("fsspec", in_extra=False).open(record["path"], "rb") as file:
        return file.read()


def _webdataset(path: Path) -> Archive:
    """The samples of webdataset's tars: an image and, in .cls, its label. Encoded, all are kept in memory.

    ``path`` is a tar, a folder of some, or a pattern as webdataset's own, such as data-{000..009}.tar. Tars with a word
    in their name that is a part, as in data-val-000.tar, are of that part, others are to train on.
    """
    library = need("webdataset", in_extra=False)
    tars = sorted(map(str, path.glob("*.tar"))) if path.is_dir() else library.shardlists.expand_urls(str(path))
    missing = [tar for tar in tars if not Path(tar).is_file()]
    if missing or not tars:
        what = f"{missing[0]} is missing" if missing else "there is no tar"
        raise UsageError(f"wds:{path}: {what}; give a tar, a folder of some, or a pattern")
    images: list[bytes] = []
    paths, words, split = [], [], []
    for tar in tars:
        named = re.split("[^a-z]+", Path(tar).stem.lower())
        part = next((word for word in named if word and word in SPLITS), "")
        try:
            for sample in library.WebDataset([tar], shardshuffle=False, empty_check=False):
                key = next((name for name in sample if name.rpartition(".")[2].lower() in IMAGE_KEYS), None)
                if key is None:
                    raise UsageError(f"{tar}: {sample['__key__']} has no image ({', '.join(IMAGE_KEYS)})")
                images.append(sample[key])
                paths.append(f"{os.path.abspath(tar)}/{sample['__key__']}.{key}")
                words.append(next((sample[name].decode().strip() for name in sample if name in LABELS), ""))
                split.append(part)
        except UsageError:
            raise
        except Exception as error:  # the library raises anything
            raise UsageError(f"{tar} cannot be read: {reason(error, tar)}") from error
    return Archive(images.__getitem__, paths, words, split)


# Kinds of KIND:PATH, and what opens the path.
ARCHIVES: dict[str, Callable[[Path], Archive]] = {
    "hf": _hugging_face,
    "hf-stream": _hugging_face_stream,
    "wds": _webdataset,
}
