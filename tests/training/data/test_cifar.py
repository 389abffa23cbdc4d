"""CIFAR-10 and CIFAR-100, in Python's pickles, of which none may call anything."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy
import pytest
import torch

from dal_kernels.training import UsageError
from dal_kernels.training.data import load_data
from dal_kernels.training.data.cifar import read_pickle
from support.trainings import needs_training

needs_training()


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 did, which CIFAR's files are from: all strings are bytes, numpy has its old name."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text: str | bytes) -> None:
        raw = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = save_string


def write_pickle(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))


def pixels_of(count: int, seed: int) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(256, size=(count, 3072), dtype=numpy.uint8)


def write_cifar10(folder: Path) -> None:
    for i, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]):
        write_pickle(folder / name, {"batch_label": name, "labels": [i, 9 - i], "data": pixels_of(2, i)})
    write_pickle(folder / "test_batch", {"labels": [4, 0, 7], "data": pixels_of(3, 9)})


def write_cifar100(folder: Path, coarse: Callable[[int], int] = lambda fine: fine % 20) -> None:
    for part in ("train", "test"):
        fine = [*range(100), 0]
        labels = {"fine_labels": fine, "coarse_labels": [coarse(i) for i in range(100)] + [0]}
        write_pickle(folder / part, {**labels, "data": pixels_of(101, 0)})


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar10(tmp_path: Path, below: str) -> None:
    write_cifar10(tmp_path / below)
    data = load_data("cifar-10", tmp_path)
    assert data.train_labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert data.test_labels.tolist() == [4, 0, 7]
    assert data.flips is not None
    assert data.flips.tolist() == [0, 1, 0, 5, 7, 3, 6, 7, 8, 1]
    second = torch.from_numpy(pixels_of(2, 1)).view(2, 3, 32, 32)
    assert torch.equal(data.train.inputs[2:4], second)
    assert data.test.batch([2, 0], train=False).shape == (2, 3, 32, 32)
    assert torch.equal(data.train.batch([0], train=False), data.train.batch([0], train=False))
    assert not torch.equal(data.train.batch(range(10), train=True), data.train.batch(range(10), train=False))


@pytest.mark.parametrize("below", ["", "cifar-100-python"])
def test_cifar100_flips_stay_in_the_superclass(tmp_path: Path, below: str) -> None:
    write_cifar100(tmp_path / below)
    data = load_data("cifar-100", tmp_path)
    assert data.train_labels.tolist() == [*range(100), 0]
    # written with superclass = class modulo 20
    assert data.flips is not None
    assert data.flips.tolist() == [(i + 20) % 100 for i in range(100)]


def test_cifar100_with_a_class_of_two_superclasses_is_refused(tmp_path: Path) -> None:
    write_cifar100(tmp_path, coarse=lambda fine: (fine + 1) % 20)  # the last image, of class 0, is of superclass 0
    with pytest.raises(UsageError, match="all of one superclass"):
        load_data("cifar-100", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a dictionary"),
        ({"data": pixels_of(1, 0)}, "must hold a dictionary with b'data' and b'labels'"),
        ({"data": pixels_of(1, 0), "labels": [0, 1]}, r"got uint8 \(1, 3072\) and list of 2 labels"),
        ({"data": pixels_of(1, 0).astype(float), "labels": [0]}, r"must be uint8 \(N, 3072\)"),
        ({"data": pixels_of(1, 0)[:, :100], "labels": [0]}, r"got uint8 \(1, 100\)"),
        ({"data": [0] * 3072, "labels": [0]}, "got list"),
        ({"data": pixels_of(0, 0), "labels": []}, "list of 0 labels"),
        ({"data": pixels_of(1, 0), "labels": 0}, "int of no labels"),
        ({"data": pixels_of(2, 0), "labels": [0, 10]}, r"labels\[1\] must be an integer from 0 to 9, got 10"),
        ({"data": pixels_of(2, 0), "labels": [-1, 0]}, r"labels\[0\] must be"),
        ({"data": pixels_of(1, 0), "labels": [None]}, r"labels\[0\] must be"),
    ],
)
def test_a_wrong_cifar_file_is_refused(tmp_path: Path, content: object, message: str) -> None:
    write_cifar10(tmp_path)
    write_pickle(tmp_path / "data_batch_3", content)
    with pytest.raises(UsageError, match=message) as caught:
        load_data("cifar-10", tmp_path)
    assert str(tmp_path / "data_batch_3") in str(caught.value)


class Calls:
    """Its pickle calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "named"),
    [(os.system, "system"), (eval, "eval"), (getattr, "getattr"), (numpy.load, "load"), (numpy.memmap, "memmap")],
)
def test_a_pickle_that_calls_anything_is_refused(
    tmp_path: Path, function: Callable[..., object], named: str, protocol: int
) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": Calls(function, f"touch {tmp_path / 'ran'}")}, protocol=protocol))
    with pytest.raises(UsageError, match=rf"data_batch_1 asks for [\w.]+\.{named}, and only arrays"):
        read_pickle(path)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_cannot_reach_through_an_array(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.")
    with pytest.raises(UsageError, match=r"asks for numpy.ndarray.__class__"):
        read_pickle(path)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"labels": [0] * 100})[:-20], b"c"])
def test_a_damaged_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UsageError, match=r"file cannot be read as a pickle: \w"):
        read_pickle(tmp_path / "file")


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_of_this_numpy_are_read(tmp_path: Path, protocol: int) -> None:
    array = numpy.arange(6, dtype=numpy.int16).reshape(2, 3)
    (tmp_path / "file").write_bytes(pickle.dumps([array, 1.5, None, b"x"], protocol=protocol))
    got, *rest = read_pickle(tmp_path / "file")
    assert rest == [1.5, None, b"x"]
    assert got.dtype == array.dtype
    assert (got == array).all()
