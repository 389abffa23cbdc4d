"""CIFAR-10 and CIFAR-100, from their pickles for Python."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dal_kernels.training.data.base import DataSet, byte_images
from dal_kernels.training.data.files import find_files, need_folder
from dal_kernels.training.data.transforms import crop_and_flip
from dal_kernels.training.errors import UsageError, need

__all__ = ["cifar10", "cifar100", "read_pickle"]

CIFAR10_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
# Truck for automobile, bird for aeroplane, cat and dog for each other, deer for horse, as the loss's authors flip them.
CIFAR10_FLIPS = {2: 0, 3: 5, 4: 7, 5: 3, 9: 1}


def cifar10(folder: Path | None = None) -> DataSet:
    """CIFAR-10, 50 000 + 10 000 images (3, 32, 32), standardised; moved and mirrored at random in training.

    ``folder`` is cifar-10-batches-py or holds it.

    Raises:
        UsageError: no folder was given, or a file is missing, damaged or of another form.
    """
    *train, test = _find("cifar-10", "cifar-10-batches-py", (*CIFAR10_BATCHES, "test_batch"), folder)
    parts = [_read_part(path, b"labels", 10) for path in train]
    flips = torch.arange(10)
    flips[list(CIFAR10_FLIPS)] = torch.tensor(list(CIFAR10_FLIPS.values()))
    train_pixels, train_labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return _data_set("cifar-10", 10, train_pixels, train_labels, *_read_part(test, b"labels", 10), flips)


def cifar100(folder: Path | None = None) -> DataSet:
    """CIFAR-100, as CIFAR-10; a class is taken for the next one of the five in its superclass.

    ``folder`` is cifar-100-python or holds it.

    Raises:
        UsageError: as of CIFAR-10, or a class has no training image or two superclasses.
    """
    train, test = _find("cifar-100", "cifar-100-python", ("train", "test"), folder)
    pixels, fine = _read_part(train, b"fine_labels", 100)
    _, coarse = _read_part(train, b"coarse_labels", 20)
    return _data_set("cifar-100", 100, pixels, fine, *_read_part(test, b"fine_labels", 100), _next_in(fine, coarse))


def _data_set(
    name: str, classes: int, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, flips: Tensor
) -> DataSet:
    train_images, test_images = byte_images(train, test, crop_and_flip)
    return DataSet(name, classes, train_images, train_labels, train_labels, test_images, test_labels, flips)


def _find(name: str, below: str, files: tuple[str, ...], folder: Path | None) -> list[Path]:
    archive = f"{below.removesuffix('-batches-py').removesuffix('-python')}-python.tar.gz"
    advice = (
        f"unpack {archive} (www.cs.toronto.edu/~kriz/cifar.html) and give as --data-dir the folder that {below} is in"
    )
    folder = need_folder(name, folder, advice)
    return find_files(name, files, [folder / below, folder], advice)


def _read_part(path: Path, key: bytes, classes: int) -> tuple[Tensor, Tensor]:
    """One file's images (N, 3, 32, 32) uint8 and its labels called ``key`` (N,) int64."""
    content = read_pickle(path)
    if not isinstance(content, dict) or not {b"data", key} <= content.keys():
        raise UsageError(f"{path} must hold a dictionary with {b'data'!r} and {key!r}, as CIFAR's files for Python do")
    pixels, labels = content[b"data"], content[key]
    form = f"{getattr(pixels, 'dtype', type(pixels).__name__)} {getattr(pixels, 'shape', '')}"
    if not isinstance(labels, list) or not labels or form != f"uint8 ({len(labels)}, 3072)":
        raise UsageError(
            f"{path}: data must be uint8 (N, 3072) and {key.decode()} a list of N, got {form} and "
            f"{type(labels).__name__} of {len(labels) if isinstance(labels, list) else 'no'} labels"
        )
    for i, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            raise UsageError(f"{path}: {key.decode()}[{i}] must be an integer from 0 to {classes - 1}, got {label!r}")
    return torch.from_numpy(pixels).reshape(-1, 3, 32, 32), torch.tensor(labels)


def _next_in(fine: Tensor, coarse: Tensor) -> Tensor:
    """For each fine class the next one of its coarse class, the last to the first."""
    coarse_of = torch.full((100,), -1)
    coarse_of[fine] = coarse
    if (coarse_of < 0).any() or (coarse_of[fine] != coarse).any():
        raise UsageError("cifar-100: each of the 100 classes must have training images, all of one superclass")
    flips = torch.empty(100, dtype=torch.long)
    for superclass in range(20):
        members = (coarse_of == superclass).nonzero()[:, 0]
        flips[members] = members.roll(-1)
    return flips


def read_pickle(path: Path) -> Any:
    """A pickle of arrays and plain values; strings of Python 2 become bytes.

    Raises:
        UsageError: it asks for anything else, which might run code, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, path).load()
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UsageError(f"{path} cannot be read as a pickle: {error or type(error).__name__}") from error


class _ArraysOnly(pickle.Unpickler):
    """Knows the three names that a pickled array needs, and no other."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="bytes")
        numpy = need("numpy")
        rebuild = numpy.empty(0).__reduce__()[0]  # in another module in numpy 1 than in numpy 2
        self.path = path
        self.known = {
            ("numpy.core.multiarray", "_reconstruct"): rebuild,
            ("numpy._core.multiarray", "_reconstruct"): rebuild,  # numpy 2 writes this name
            ("numpy", "ndarray"): numpy.ndarray,
            ("numpy", "dtype"): numpy.dtype,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise UsageError(f"{self.path} asks for {module}.{name}, and only arrays and plain values are read from it")
        return self.known[module, name]
