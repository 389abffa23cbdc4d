"""The data sets that fit in memory, on small files in their real layouts and, where they are at hand, on real ones."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dal_kernels.training import UsageError
from dal_kernels.training.data import DATA, load_data
from dal_kernels.training.data.base import byte_images
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
