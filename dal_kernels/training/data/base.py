"""What a data set gives to the trainer."""

from __future__ import annotations

import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from dal_kernels.training.data.transforms import ImageTransform
from dal_kernels.training.errors import UsageError, need, reason

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "NOTHING",
    "ByteImages",
    "DataSet",
    "EncodedImages",
    "FileImages",
    "Images",
    "Part",
    "RecordImages",
    "TensorImages",
    "UnreadableError",
    "byte_images",
]


Part = Literal["train", "validation", "test"]
FIRST = 3  # files that are looked for before a training


class UnreadableError(UsageError):
    """One sample cannot be read; others can."""


class Images(Protocol):
    """The inputs of one part of a data set, fetched a batch at a time."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], train: bool) -> Tensor:
        """Inputs (len(indices), ...), float32, standardised; augmented at random (torch's generator) if ``train``."""
        ...


@dataclass(frozen=True)
class TensorImages:
    """Inputs that fit in memory: (N, ...) float32, standardised; ``augment`` takes and gives a batch.

    ``pictures`` is what they look like, where standardising has changed that.
    """

    inputs: Tensor
    augment: Callable[[Tensor], Tensor] | None = None
    pictures: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Sequence[int], train: bool) -> Tensor:
        picked = self.inputs[torch.as_tensor(indices)]
        return self.augment(picked) if train and self.augment is not None else picked


# The part of a data set that it does not have.
NOTHING = TensorImages(torch.empty(0))


@dataclass(frozen=True, kw_only=True)
class ByteImages(TensorImages):
    """Images that fit in memory a byte a pixel: (N, C, H, W) uint8, standardised as they are fetched.

    ``mean`` and ``sd`` are (C,) float32, in the unit of the pixels, 0 to 255; ``augment`` takes and gives a batch of
    uint8.
    """

    mean: Tensor
    sd: Tensor

    def batch(self, indices: Sequence[int], train: bool) -> Tensor:
        return (super().batch(indices, train) - self.mean[:, None, None]) / self.sd[:, None, None]


def byte_images(
    train: Tensor, test: Tensor, augment: Callable[[Tensor], Tensor] | None = None
) -> tuple[ByteImages, ByteImages]:
    """Both parts, (N, C, H, W) uint8, standardised by each channel's mean and deviation over the training part."""
    levels = torch.arange(256, dtype=torch.float64)
    # (C, 256): moments from counts need no copy of the pixels in a wider type
    shares = torch.stack([torch.bincount(train[:, c].flatten(), minlength=256) for c in range(train.shape[1])]).double()
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ levels
    mean, sd = mean.float(), (shares @ levels**2 - mean**2).sqrt().float()
    return ByteImages(train, augment, mean=mean, sd=sd), ByteImages(test, mean=mean, sd=sd)


class EncodedImages(ABC):
    """Images in a format that Pillow knows, opened as they are fetched.

    Attributes:
        skip: whether who fetches goes on without those that cannot be read.

    Raises:
        UnreadableError: by ``batch``, of a file that is missing, empty, no image, or one of so many pixels that it may
            be meant to fill the memory (by Pillow's limit, 89 million).
    """

    transform: ImageTransform
    skip: bool

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def source(self, index: int) -> Path | bytes:
        """An image's file, or what would be in it."""

    @abstractmethod
    def title(self, index: int) -> str:
        """What an image is called in a message."""

    def batch(self, indices: Sequence[int], train: bool) -> Tensor:
        return torch.stack([self.transform(self.open(i), train) for i in indices])

    def open(self, index: int) -> Image:
        """A photograph in RGB, as it is in its file."""
        with self._opened(index) as image:
            return _eight_bits(image).convert("RGB")

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, which decodes nothing else."""
        with self._opened(index) as image:
            return image.size

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image]:
        library = need("PIL.Image", "pillow")
        try:
            source = self.source(index)
            if (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0:
                raise ValueError("the file is empty")
            with warnings.catch_warnings():
                warnings.simplefilter("error", library.DecompressionBombWarning)
                with library.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                    yield image
        except Exception as error:  # a damaged image can raise anything
            raise UnreadableError(
                f"the image {self.title(index)} cannot be read: {reason(error, self.title(index))}"
            ) from error


@dataclass(frozen=True)
class FileImages(EncodedImages):
    """Images in files, ``names`` below the folder ``root``.

    Raises:
        UsageError: there is no name, or the first files are missing; looking for a million would take minutes.
    """

    root: Path
    names: Sequence[str]
    transform: ImageTransform
    skip: bool = False

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError(f"no images are named for {self.root}")
        missing = self.missing()
        if len(missing) == len(self.names[:FIRST]):
            raise UsageError(f"the image {missing[0]} is missing")

    def __len__(self) -> int:
        return len(self.names)

    def missing(self, indices: Iterable[int] | None = None) -> list[Path]:
        """Which of these files are; None: of the first ones."""
        looked_for = range(len(self.names[:FIRST])) if indices is None else indices
        return [path for i in looked_for if not (path := self.source(i)).is_file()]

    @property
    def paths(self) -> list[str]:
        """Absolute, so that they are found from another working folder too."""
        root = os.path.abspath(self.root)
        return [os.path.join(root, name) for name in self.names]

    def source(self, index: int) -> Path:
        return self.root / self.names[index]

    def title(self, index: int) -> str:
        return str(self.source(index))


@dataclass(frozen=True)
class RecordImages(EncodedImages):
    """Images that are records of an archive, called ``names`` (M,) in messages; ``read`` gives one by its number."""

    read: Callable[[int], Path | bytes]
    names: Sequence[str]
    transform: ImageTransform
    skip: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def source(self, index: int) -> Path | bytes:
        return self.read(index)

    def title(self, index: int) -> str:
        return self.names[index]


def _eight_bits(image: Image) -> Image:
    """Grey of 16 bits, which converting alone would cut off at 255, so that all were white; others as they are."""
    if not image.mode.startswith("I"):
        return image
    grey = need("numpy").asarray(image).clip(0, 65535) / 257  # of 65535 it makes 255
    return need("PIL.Image", "pillow").fromarray(grey.round().astype("uint8"))


@dataclass(frozen=True)
class DataSet:
    """A data set as it lies on the disk, before any label is made wrong.

    Attributes:
        name: in the registry.
        classes: how many.
        train, test: the images.
        train_labels: (N,) int64, as the data set gives them; wrong already where it was labelled by the web.
        true_labels: (N,) int64, the truth about the training samples, ``UNKNOWN`` where nobody knows it; for a clean
            data set the same as ``train_labels``.
        test_labels: (M,) int64, clean.
        validation, validation_labels: what the data set has to choose an epoch by, neither trained nor tested on; (V,)
            int64.
        flips: (C,) int64, the class that each class is taken for in asymmetric noise; a class that maps to itself is
            not flipped. None: the next class, the last to the first.
        class_names: (C,) what the classes are called; None: by their numbers.
        train_paths, test_paths, validation_paths: what tells the samples apart outside of a training, such as their
            files; None: their numbers.
        verified: whether ``true_labels`` is what somebody made sure of. Where it is not, it is the labels given, from
            which noise can be made and measured, but of which nobody knows how many are wrong.
        moments: mean and deviation, each shaped like an input, that the network itself takes off its inputs.
        note: what whoever trains on it is to be told, such as what of it is not used.
    """

    name: str
    classes: int
    train: Images
    train_labels: Tensor
    true_labels: Tensor
    test: Images
    test_labels: Tensor
    flips: Tensor | None = None
    class_names: Sequence[str] | None = None
    train_paths: Sequence[str] | None = None
    test_paths: Sequence[str] | None = None
    validation: Images = NOTHING
    validation_labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    validation_paths: Sequence[str] | None = None
    verified: bool = True
    moments: tuple[Tensor, Tensor] | None = None
    note: str = ""

    @property
    def names(self) -> list[str]:
        """What the classes are called, (C,)."""
        return list(map(str, range(self.classes))) if self.class_names is None else list(self.class_names)

    def with_images(self, change: Callable[[Images], Images]) -> DataSet:
        """With what ``change`` makes of the images of each part."""
        train, validation, test = (change(images) for images in (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)

    def paths(self, part: Part) -> list[str]:
        """What tells the samples of a part apart."""
        images, known = {
            "train": (self.train, self.train_paths),
            "validation": (self.validation, self.validation_paths),
            "test": (self.test, self.test_paths),
        }[part]
        return list(map(str, range(len(images)))) if known is None else list(known)
