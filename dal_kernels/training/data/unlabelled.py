"""Samples to predict, which may have labels or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dal_kernels.training.data import DATA, load_data
from dal_kernels.training.data.archives import ARCHIVES
from dal_kernels.training.data.base import FileImages, Images
from dal_kernels.training.data.features import FeatureRows, need_finite, read_features
from dal_kernels.training.data.files import need_folder
from dal_kernels.training.data.image_folder import images_below, test_folder
from dal_kernels.training.data.table import other_rows, read_table, table_root
from dal_kernels.training.data.transforms import IMAGENET, ImageTransform
from dal_kernels.training.errors import UsageError, need

__all__ = ["Samples", "samples_of"]


@dataclass(frozen=True)
class Samples:
    """(M,) each: inputs, what tells them apart, and what they are labelled as, "" for those that are not."""

    images: Images
    paths: Sequence[str]
    words: Sequence[str]


def samples_of(name: str, folder: Path | None, shape: Sequence[int], bad_images: str) -> Samples:
    """What the data set ``name`` has to test on; all of it, if it is of the form KIND:PATH and has no such part.

    Raises:
        UsageError: the data is missing or wrong, or there is none.
    """
    if name in DATA:
        data = load_data(name, folder, bad_images=bad_images)
        return Samples(data.test, data.paths("test"), [data.names[label] for label in data.test_labels.tolist()])
    kind, _, place = name.partition(":")
    path = Path(place)
    if kind == "npz":
        return _features(path)
    if len(shape) != 3:
        raise UsageError(f"the network takes samples of shape {tuple(shape)}, and {name} has images")
    if kind in ARCHIVES:
        return _archive(kind, path, ImageTransform(*IMAGENET, side=shape[-1]), bad_images)
    root, names, words = _folder(path) if kind == "folder" else _table(path)
    transform = ImageTransform(*IMAGENET, side=shape[-1])
    images = FileImages(root, names, transform, skip=bad_images == "skip")
    return Samples(images, names if kind == "csv" else images.paths, words)


def _folder(path: Path) -> tuple[Path, list[str], list[str]]:
    """Where the images are, their names below it, and the folder that each is in."""
    need_folder("folder", path, "give a folder of images")
    root = test_folder(path) or path
    names = images_below(root)
    return root, names, [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names]


def _table(path: Path) -> tuple[Path, list[str], list[str]]:
    columns, _ = read_table(path, ("path",), ("label", "split"))
    rows = _tested(columns.get("split"), len(columns["path"]))
    labels = columns.get("label")
    names = [columns["path"][i] for i in rows]
    return table_root(path, names[0]), names, ["" if labels is None else labels[i] for i in rows]


def _archive(kind: str, path: Path, transform: ImageTransform, bad_images: str) -> Samples:
    archive = ARCHIVES[kind](path)
    rows = torch.tensor(_tested(archive.split, len(archive.paths)))
    images = replace(archive.images(rows), transform=transform, skip=bad_images == "skip")
    return Samples(images, images.names, [archive.words[i] for i in rows.tolist()])


def _tested(split: Sequence[str] | None, count: int) -> list[int]:
    """Rows to test on; all, where no row is said to be."""
    return other_rows(split or ())[1] or list(range(count))


def _features(path: Path) -> Samples:
    arrays = read_features(path, labelled=False)
    split = [str(part) for part in arrays["split"].tolist()] if "split" in arrays else None
    count = len(arrays["features"])
    rows = torch.tensor(_tested(split, count))
    paths = [str(path) for path in arrays["paths"].tolist()] if "paths" in arrays else list(map(str, range(count)))
    words = [""] * count
    if "labels" in arrays:
        given = arrays["labels"].tolist()
        known = [str(name) for name in arrays.get("class_names", need("numpy").array([])).tolist()]
        words = [known[label] if isinstance(label, int) and 0 <= label < len(known) else str(label) for label in given]
    images = FeatureRows(arrays["features"], rows.numpy())
    need_finite(images, path)
    return Samples(images, [paths[i] for i in rows.tolist()], [words[i] for i in rows.tolist()])
