"""The data sets that fit in memory, on small files in their real layouts and, where they are at hand, on real ones."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy
import pytest
import torch
from torch import Tensor

from dal_kernels.training import UsageError
from dal_kernels.training.data import DATA, load_data
from dal_kernels.training.data.base import byte_images
from dal_kernels.training.data.cifar import read_pickle
from dal_kernels.training.data.fashion_mnist import IDX_FILES, fashion_mnist, read_idx
from support.trainings import needs_training

needs_training()


# --- all of them


@pytest.mark.parametrize("name", [name for name in DATA if name != "digits"])
@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_missing_files_are_told_with_what_to_place_where(tmp_path: Path, name: str, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as caught:
        load_data(name, tmp_path / folder)
    message = str(caught.value)
    assert message.startswith(f"{name.partition('-')[0] if 'kanji' in name else name}: ")
    assert str(tmp_path / folder) in message
    assert any(word in message for word in ("unpack", "dpkg -x", "place"))


@pytest.mark.parametrize(
    "name", ["udhr", "cifar-10", "cifar-100", "webvision", "mini-webvision", "clothing1m", "image-folder"]
)
def test_a_data_set_without_a_usual_place_needs_a_folder(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} needs the folder of its files as --data-dir: "):
        load_data(name)


@pytest.mark.parametrize("name", ["mnist", ""])
def test_unknown_data_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="data must be one of digits, fashion-mnist"):
        load_data(name)


# --- digits


def test_digits_are_standardised_by_the_training_part() -> None:
    data = load_data("digits")
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert torch.bincount(data.test_labels).min() >= 40, "the split is not stratified"
    sd = data.train.inputs.std(0)
    assert data.train.inputs.mean(0).abs().max() < 1e-5
    assert torch.allclose(sd[sd > 0], torch.ones(()), atol=1e-4)
    assert data.test.inputs.isfinite().all()


# --- idx files


def write_idx(path: Path, values: Tensor, magic: bytes | None = None, cut: int = 0) -> Path:
    content = (magic or bytes([0, 0, 8, values.ndim])) + struct.pack(f">{values.ndim}I", *values.shape)
    content += values.numpy().tobytes()
    content = content[: len(content) - cut]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 28, 28)])
def test_read_idx_round_trips(tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    values = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read_idx(write_idx(tmp_path / f"file{suffix}", values)), values)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("magic", "cut", "message"),
    [
        (b"\0\0\x0d\x01", 0, "magic number is 0x00000d01"),  # floats
        (b"PK\x03\x04", 0, "magic number"),
        (b"\0\0\x08\0", 0, "magic number"),  # no dimensions
        (None, 1, r"shape \(5,\), 5 bytes, and holds 4"),
        (None, 6, "within its header"),
        (None, 11, "magic number"),
    ],
)
def test_read_idx_refuses(tmp_path: Path, magic: bytes | None, cut: int, message: str, suffix: str) -> None:
    path = write_idx(tmp_path / f"file{suffix}", torch.arange(5, dtype=torch.uint8), magic, cut)
    with pytest.raises(UsageError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b"not gzip", lambda b: b[:-4], lambda b: b[:12] + b"\xff\xff" + b[14:]])
def test_read_idx_refuses_a_damaged_gz(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_idx(tmp_path / "file.gz", torch.zeros(1000, dtype=torch.uint8))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match="cannot be read"):
        read_idx(path)


def write_fashion_mnist(folder: Path, suffix: str, train_labels: int = 40) -> None:
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    shapes = ((40, 4, 4), (train_labels,), (20, 4, 4), (20,))
    for name, shape in zip(IDX_FILES, shapes, strict=True):
        values = torch.randint(10, shape, dtype=torch.uint8, generator=generator)
        write_idx(folder / (name + suffix), values)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", ["", "usr/share/datasets/fashion-mnist"])
def test_fashion_mnist_reads_files_or_an_unpacked_package(tmp_path: Path, below: str, suffix: str) -> None:
    write_fashion_mnist(tmp_path / "root" / below, suffix)
    data = fashion_mnist(tmp_path / "root")
    assert data.train.inputs.shape == (40, 4, 4)
    assert data.test_labels.shape == (20,)
    assert data.train_labels.dtype == torch.int64
    assert torch.equal(data.true_labels, data.train_labels)
    assert data.train.inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train.inputs.std().item() == pytest.approx(1, abs=1e-5)


def test_fashion_mnist_refuses_unequal_counts(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "data", "", train_labels=39)
    with pytest.raises(UsageError, match="one label from 0 to 9 for each image"):
        fashion_mnist(tmp_path / "data")


def test_fashion_mnist_says_what_is_missing_where_and_how_to_get_it(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "data", ".gz")
    (tmp_path / "data" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UsageError) as caught:
        fashion_mnist(tmp_path / "data")
    message = str(caught.value)
    for part in ("t10k-labels-idx1-ubyte", str(tmp_path / "data"), "apt-get download dataset-fashion-mnist", "dpkg -x"):
        assert part in message
    assert "train-images" not in message, "names a file that is there"


def test_real_fashion_mnist() -> None:
    folder = Path(os.environ.get("DAL_TEST_DATA", "nowhere")) / "fashion-mnist"
    if not folder.is_dir():
        pytest.skip("no real data: DAL_TEST_DATA names no folder with fashion-mnist/ in it")
    data = load_data("fashion-mnist", folder)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert torch.bincount(data.train_labels).tolist() == [6000] * 10
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10


# --- images of a byte a pixel


def test_byte_images_are_standardised_by_channel_and_augmented_in_training_only() -> None:
    train = torch.randint(256, (50, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train[:, 1] //= 4
    test = torch.full((2, 3, 4, 5), 100, dtype=torch.uint8)
    train_images, test_images = byte_images(train, test, lambda batch: batch.flip(3))
    everything = train_images.batch(range(50), train=False)
    assert everything.dtype == torch.float32
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(everything.std((0, 2, 3), correction=0), torch.ones(3))
    assert torch.equal(train_images.batch([7, 3], train=True), everything[[7, 3]].flip(3))
    mean, sd = train[:, 2].double().mean(), train[:, 2].double().std(correction=0)
    expected = ((100 - mean) / sd).float().expand(2, 4, 5)
    torch.testing.assert_close(test_images.batch([0, 1], train=True)[:, 2], expected)


# --- CIFAR


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
