"""Fashion-MNIST, from idx files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from zlib import error as zlib_error

import torch
from torch import Tensor

from dal_kernels.training.data.base import DataSet, TensorImages
from dal_kernels.training.data.files import find_files
from dal_kernels.training.errors import UsageError, reason

__all__ = ["fashion_mnist", "read_idx"]

# Where the Debian package dataset-fashion-mnist puts its files, below the root it is unpacked to.
DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")
ADVICE = (
    "on Debian or Ubuntu run, without root, 'apt-get download dataset-fashion-mnist && dpkg -x "
    "dataset-fashion-mnist_*.deb FOLDER' and give that FOLDER as --data-dir"
)
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# Look-alikes: T-shirt and shirt, pullover and coat, sandal to sneaker to ankle boot. Trousers, dresses, bags and ankle
# boots are like none of the others and keep their labels.
NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FLIPS = (6, 1, 4, 3, 2, 7, 0, 9, 8, 9)


def fashion_mnist(folder: Path | None = None) -> DataSet:
    """Fashion-MNIST, 60 000 + 10 000 images of 28 x 28, standardised by the training pixels' one mean and deviation.

    ``folder`` holds the four idx files, .gz or plain, or is where the Debian package was unpacked.

    Raises:
        UsageError: a file is missing or damaged, or labels and images do not fit.
    """
    folders = [Path("/") / DEBIAN_FOLDER] if folder is None else [folder, folder / DEBIAN_FOLDER]
    paths = find_files("fashion-mnist", IDX_FILES, folders, ADVICE, suffixes=(".gz", ""))
    train_images, train_labels, test_images, test_labels = map(read_idx, paths)
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if len(images) != len(labels) or images.ndim != 3 or labels.ndim != 1 or int(labels.max()) > 9:
            raise UsageError(
                f"fashion-mnist must have one label from 0 to 9 for each image, got images {tuple(images.shape)} and "
                f"labels {tuple(labels.shape)} up to {int(labels.max())}"
            )
    train, test = train_images.float(), test_images.float()
    mean, sd = train.mean(), train.std()
    return DataSet(
        "fashion-mnist",
        10,
        TensorImages((train - mean) / sd),
        train_labels.long(),
        train_labels.long(),
        TensorImages((test - mean) / sd),
        test_labels.long(),
        torch.tensor(FLIPS),
        class_names=NAMES,
    )


def read_idx(path: Path) -> Tensor:
    """An idx file of unsigned bytes, gzipped if its name ends in .gz, as a uint8 tensor of the shape it declares.

    Layout: two zero bytes, the type (8: unsigned byte), the number of dimensions, each size as a big-endian uint32,
    then the values in row-major order.

    Raises:
        UsageError: the file cannot be read, or is not one of these.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib_error) as error:
        raise UsageError(f"{path} cannot be read: {reason(error, path)}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or content[3] == 0:
        raise UsageError(f"{path} is not an idx file of bytes: its magic number is 0x{content[:4].hex()}")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise UsageError(f"{path} ends within its header of {header} bytes")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    values = torch.tensor(shape).prod().item()
    if len(content) - header != values or values == 0:
        raise UsageError(f"{path} declares the shape {shape}, {values} bytes, and holds {len(content) - header}")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)
