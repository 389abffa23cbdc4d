"""Label noise: wrong labels drawn from a generator, read from a file, or given by people (CIFAR-N).

>>> import torch
>>> from dal_kernels.noise import noise_rate, symmetric_noise
>>> labels = torch.arange(1000) % 10
>>> given = symmetric_noise(labels, 0.4, 10, torch.Generator().manual_seed(0))
>>> noise_rate(given, labels)
0.4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Generator, Tensor

__all__ = [
    "CIFAR_N",
    "UNKNOWN",
    "asymmetric_noise",
    "cifar_n_labels",
    "instance_noise",
    "labels_from_file",
    "noise_rate",
    "symmetric_noise",
]

# The true label of a sample of which nobody knows it.
UNKNOWN = -1

# The sets of labels that people gave to CIFAR's training images, and their names in the files of CIFAR-N.
CIFAR_N = {
    "aggregate": "aggre_label",
    "worse": "worse_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
    "cifar-100": "noisy_label",
}

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
SPREAD = 0.1  # standard deviation of a sample's own rate in instance-dependent noise
CHUNK = 256  # samples projected at once: photographs of a whole class may not fit in memory


def symmetric_noise(
    labels: Tensor, rate: float, classes: int, generator: Generator, include_true: bool = False
) -> Tensor:
    """``labels`` (N,) as int64, of which exactly ``round(rate * N)`` are drawn anew.

    They are drawn uniformly from the *other* classes, so that ``rate`` is the share of wrong labels. Some authors,
    DAL's among them, draw from all classes, the true one too, as ``include_true`` does: their "40 %" of 10 classes is
    about 36 % wrong.

    Args:
        labels: (N,) integers of any width, each in [0, ``classes``).
        rate: in [0, 1).

    Raises:
        ValueError: the rate is not in [0, 1), there are fewer than 2 classes, or a label is none of them.
    """
    labels = _check(labels, rate, classes)
    drawn = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
    shift = torch.randint(0 if include_true else 1, classes, (len(drawn),), generator=generator)
    noisy = labels.clone()
    noisy[drawn] = (labels[drawn] + shift) % classes
    return noisy


def asymmetric_noise(labels: Tensor, rate: float, flips: Tensor, generator: Generator) -> Tensor:
    """``labels`` (N,) as int64, in which each class is taken for one other, ``flips`` (C,), at ``rate``.

    Exactly that share (rounded) of the samples of classes that do not map to themselves is wrong; where some do, fewer
    than that of all samples.

    Args:
        labels: (N,) integers of any width, each in [0, C).
        flips: (C,) integers, the class that each class is taken for; a class that maps to itself keeps its labels.

    Raises:
        ValueError: the rate is not in [0, 1), there are fewer than 2 classes, a label or a flip is none of them, or no
            label's class is taken for another.
    """
    labels = _check(labels, rate, len(flips))
    flips = _checked("flips", flips, len(flips))
    movable = (flips[labels] != labels).nonzero()[:, 0]
    if not len(movable):
        raise ValueError("asymmetric noise needs a class of the labels that flips takes for another, got none")
    flipped = movable[torch.randperm(len(movable), generator=generator)[: round(rate * len(movable))]]
    noisy = labels.clone()
    noisy[flipped] = flips[labels[flipped]]
    return noisy


def instance_noise(
    labels: Tensor, rate: float, classes: int, generator: Generator, inputs: Tensor | Callable[[Tensor], Tensor]
) -> Tensor:
    """Labels that are wrong by what the sample shows, as in Xia et al. 2020 (arXiv 2006.07836), algorithm 2.

    Each sample has a rate of its own, normal around ``rate`` with deviation 0.1, truncated to [0, 1]; each true class
    has a random linear map from the input to scores of all classes, and a wrong label is drawn by the softmax of them
    over the other classes. Truncation moves the mean rate inwards where ``rate`` is within 0.2 of 0 or 1: at 0 it would
    be 0.08, so 0 is refused.

    Args:
        labels: (N,) integers of any width, each in [0, ``classes``).
        inputs: (N, ...) floating, best standardised; or what gives them for indices (B,), for those that do not fit
            in memory.

    Returns:
        (N,) int64.

    Raises:
        ValueError: the rate is not in (0, 1), there are fewer than 2 classes, or a label is none of them.
    """
    labels = _check(labels, rate, classes)
    if rate == 0:
        raise ValueError("the rate of instance noise must be above 0: none leaves the labels as they are")
    own_rate = torch.nn.init.trunc_normal_(torch.empty(len(labels)), rate, SPREAD, 0, 1, generator=generator)
    noisy = labels.clone()
    for true in labels.unique().tolist():
        scores_of: Tensor | None = None  # (inputs, C), one class at a time: all would take C times the memory
        for members in (labels == true).nonzero()[:, 0].split(CHUNK):
            shown = (inputs[members] if isinstance(inputs, Tensor) else inputs(members)).flatten(1)
            if scores_of is None:
                scores_of = torch.randn(shown.shape[1], classes, generator=generator)
            scores = shown @ scores_of
            scores[:, true] = -torch.inf
            chances = own_rate[members, None] * scores.softmax(1)
            chances[:, true] = 1 - own_rate[members]
            noisy[members] = torch.multinomial(chances, 1, generator=generator)[:, 0]
    return noisy


def noise_rate(given: Tensor, true: Tensor) -> float:
    """The share of labels that are wrong, in [0, 1], among those whose truth is known; NaN if none is.

    Args:
        given, true: (N,) int64; ``UNKNOWN`` in ``true`` where nobody knows.
    """
    known = true != UNKNOWN
    return (given != true)[known].double().mean().item()


def labels_from_file(path: Path, classes: int, count: int) -> Tensor:
    """(count,) int64 from .npy, from .npz with an array ``labels``, or from .txt with one label a line.

    Raises:
        ValueError: the file is missing, damaged or of another form, has another number of labels, or one that is not
            in [0, ``classes``); it names the file and the place.
    """
    path = Path(path)
    if path.suffix == ".npz":
        arrays = read_arrays(path, archive=True)
        if "labels" not in arrays:
            raise ValueError(f"{path} must hold labels, got {', '.join(arrays)}")
        labels = as_labels(arrays["labels"], path)
    elif path.suffix == ".npy":
        labels = as_labels(read_arrays(path, archive=False), path)
    elif path.suffix == ".txt":
        labels = torch.tensor([parse_label(line, classes, place) for place, line in read_lines(path)])
    else:
        raise ValueError(f"labels must be in a file .npy, .npz or .txt, got {path}")
    if len(labels) != count:
        raise ValueError(f"{path} must have {count} labels, got {len(labels)}")
    outside = ((labels < 0) | (labels >= classes)).nonzero()[:, 0].tolist()
    if outside:
        i = outside[0]
        raise ValueError(f"{path}: label {i} must be from 0 to {classes - 1}, got {labels[i].item()}")
    return labels


def cifar_n_labels(path: Path, labels: str) -> tuple[Tensor, Tensor]:
    """Labels that people gave to CIFAR's training images, of CIFAR-N (Wei et al. 2022, arXiv 2110.12088).

    Args:
        path: CIFAR-10_human.pt or CIFAR-100_human.pt, as their authors publish them: in the order of CIFAR's own files
            for Python. Nothing but arrays is read from it.
        labels: a name in ``CIFAR_N``: "aggregate", "worse", "random1", "random2" or "random3" for CIFAR-10,
            "cifar-100" for CIFAR-100.

    Returns:
        The given labels and the true ones that the file has beside them, each (50000,) int64.

    Raises:
        ValueError: there is no such set of labels in the file, or it cannot be read.
    """
    if labels not in CIFAR_N:
        raise ValueError(f"labels of CIFAR-N must be one of {', '.join(CIFAR_N)}, got {labels!r}")
    import numpy

    rebuild = numpy.empty(0).__reduce__()[0]
    allowed: list[Any] = [
        (rebuild, "numpy.core.multiarray._reconstruct"),  # numpy 1 writes this name
        (rebuild, "numpy._core.multiarray._reconstruct"),
        numpy.ndarray,
        numpy.dtype,
        type(numpy.dtype("int64")),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
        given, true = (torch.as_tensor(content[name]).long() for name in (CIFAR_N[labels], "clean_label"))
    except KeyError as error:
        raise ValueError(f"{path} has no labels called {error}, got {', '.join(map(str, content))}") from error
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from error
    if given.ndim != 1 or given.shape != true.shape:
        raise ValueError(f"{path}: labels must be (N,), got {tuple(given.shape)} and {tuple(true.shape)}")
    return given, true


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line of a text file, with its place for messages: the file and the line's number from 1."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}, line {number}", line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def parse_label(text: str, classes: int, place: str) -> int:
    """The class that ``text`` says.

    Raises:
        ValueError: it is not an integer from 0 to ``classes`` - 1.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < classes):
        raise ValueError(f"{place}: the label must be an integer from 0 to {classes - 1}, got {text!r}")
    return int(text)


def read_arrays(path: Path, archive: bool) -> Any:
    """The array of a .npy file, or with ``archive`` the arrays of an .npz file by name; never a pickle."""
    import numpy

    try:
        content = numpy.load(path, allow_pickle=False)
        if isinstance(content, numpy.ndarray) == archive:
            raise ValueError(f"{path} is not an {'.npz' if archive else '.npy'} file")
        return dict(content) if archive else content
    except (OSError, EOFError, BadZipFile, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"{path} is not") else f"{path} cannot be read: {text}") from error


def as_labels(array: Any, path: Path) -> Tensor:
    """A numpy array as (N,) int64 labels."""
    if array.ndim != 1 or array.dtype != "int64":
        raise ValueError(f"{path}: labels must be int64 (N,), got {array.dtype} {array.shape}")
    return torch.from_numpy(array)


def _check(labels: Tensor, rate: float, classes: int) -> Tensor:
    """The labels as int64."""
    check_rate(rate)
    if classes < 2:
        raise ValueError(f"noise needs at least 2 classes, got {classes}")
    return _checked("labels", labels, classes)


def _checked(name: str, labels: Tensor, classes: int) -> Tensor:
    if labels.ndim != 1 or labels.dtype not in INTEGERS:
        raise ValueError(f"{name} must be integers (N,), got {labels.dtype} {tuple(labels.shape)}")
    labels = labels.long()
    outside = ((labels < 0) | (labels >= classes)).nonzero()[:, 0].tolist()
    if outside:
        i = outside[0]
        raise ValueError(f"{name} must be from 0 to {classes - 1}, got {labels[i].item()} at {i}")
    return labels


def check_rate(rate: float) -> None:
    """Raises ValueError for a rate outside of [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"the noise rate must be in [0, 1), got {rate}")
