"""Label noise: which training labels are wrong, seeded by a generator of its own, and kept with its seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Generator, Tensor

from benchmarks.training.data.base import UNKNOWN, DataSet
from benchmarks.training.data.files import parse_label, read_lines
from benchmarks.training.errors import UsageError, need

__all__ = ["Noise", "NoisyLabels", "noise_rate", "parse_noise", "symmetric_noise"]

SPREAD = 0.1  # standard deviation of a sample's own rate in instance-dependent noise
CHUNK = 256  # samples projected at once: photographs of a whole class may not fit in memory


def symmetric_noise(
    labels: Tensor, rate: float, classes: int, generator: Generator, include_true: bool = False
) -> Tensor:
    """A copy of ``labels`` of which exactly ``round(rate * N)`` are drawn anew.

    They are drawn uniformly from the *other* classes, so that ``rate`` is the share of wrong labels. Some authors,
    DAL's among them, draw from all classes, the true one too, as ``include_true`` does: their "40 %" of 10 classes is
    about 36 % wrong.

    Args:
        labels: (N,) int64.

    Raises:
        UsageError: the rate is not in [0, 1), or there are fewer than 2 classes.
    """
    _check(rate, classes)
    drawn = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
    shift = torch.randint(0 if include_true else 1, classes, (len(drawn),), generator=generator)
    noisy = labels.clone()
    noisy[drawn] = (labels[drawn] + shift) % classes
    return noisy


def asymmetric_noise(labels: Tensor, rate: float, flips: Tensor, generator: Generator) -> Tensor:
    """A copy of ``labels`` in which each class is taken for one other, ``flips`` (C,), at ``rate``.

    Exactly that share (rounded) of the samples of classes that do not map to themselves is wrong; where some do, fewer
    than that of all samples.

    Args:
        labels: (N,) int64.

    Raises:
        UsageError: the rate is not in [0, 1), there are fewer than 2 classes, or no label's class is taken for another.
    """
    _check(rate, len(flips))
    movable = (flips[labels] != labels).nonzero()[:, 0]
    if not len(movable):
        raise UsageError("asymmetric noise needs a class of the labels that flips takes for another, got none")
    flipped = movable[torch.randperm(len(movable), generator=generator)[: round(rate * len(movable))]]
    noisy = labels.clone()
    noisy[flipped] = flips[labels[flipped]]
    return noisy


def instance_noise(data: DataSet, rate: float, generator: Generator) -> Tensor:
    """Labels that are wrong by what the image shows, as in Xia et al. 2020 (arXiv 2006.07836), algorithm 2.

    Each sample has a rate of its own, normal around ``rate`` with deviation 0.1, truncated to [0, 1]; each true class
    has a random linear map from the input to scores of all classes, and a wrong label is drawn by the softmax of them
    over the other classes. Truncation moves the mean rate inwards where ``rate`` is within 0.2 of 0 or 1: at 0 it would
    be 0.08, so 0 is refused.

    Returns:
        (N,) int64.

    Raises:
        UsageError: the rate is not in (0, 1), there are fewer than 2 classes, or an image cannot be read.
    """
    _check(rate, data.classes)
    if rate == 0:
        raise UsageError("the rate of instance noise must be above 0: none leaves the labels as they are")
    labels = data.train_labels
    own_rate = torch.nn.init.trunc_normal_(torch.empty(len(labels)), rate, SPREAD, 0, 1, generator=generator)
    noisy = labels.clone()
    for true in labels.unique().tolist():
        scores_of: Tensor | None = None  # (inputs, C), one class at a time: all would take C times the memory
        for members in (labels == true).nonzero()[:, 0].split(CHUNK):
            inputs = data.train.batch(members.tolist(), train=False).flatten(1)
            if scores_of is None:
                scores_of = torch.randn(inputs.shape[1], data.classes, generator=generator)
            scores = inputs @ scores_of
            scores[:, true] = -torch.inf
            chances = own_rate[members, None] * scores.softmax(1)
            chances[:, true] = 1 - own_rate[members]
            noisy[members] = torch.multinomial(chances, 1, generator=generator)[:, 0]
    return noisy


def noise_rate(given: Tensor, true: Tensor) -> float:
    """The share of labels that are wrong, in [0, 1], among those whose truth is known; NaN if none is."""
    known = true != UNKNOWN
    return (given != true)[known].double().mean().item()


def _symmetric(data: DataSet, rate: float, generator: Generator) -> Tensor:
    return symmetric_noise(data.train_labels, rate, data.classes, generator)


def _symmetric_all(data: DataSet, rate: float, generator: Generator) -> Tensor:
    return symmetric_noise(data.train_labels, rate, data.classes, generator, include_true=True)


def _asymmetric(data: DataSet, rate: float, generator: Generator) -> Tensor:
    flips = torch.arange(data.classes).roll(-1) if data.flips is None else data.flips
    return asymmetric_noise(data.train_labels, rate, flips, generator)


# Kinds of noise that are made at a rate.
MADE: dict[str, Callable[[DataSet, float, Generator], Tensor]] = {
    "symmetric": _symmetric,
    "symmetric-all": _symmetric_all,
    "asymmetric": _asymmetric,
    "instance": instance_noise,
}
ACCEPTED = f"a rate, none, {', '.join(f'{kind}:RATE' for kind in MADE)} or file:PATH"


@dataclass(frozen=True)
class Noise:
    """What is done to the training labels; ``str`` gives the form that ``parse_noise`` reads.

    Attributes:
        kind: "symmetric" (wrong labels are uniform over the other classes), "symmetric-all" (over all classes, the true
            one too), "asymmetric" (the class that the data set says each is taken for, else the next), "instance" (by
            what the image shows), "file" or "none": labels as the data set gives them.
        rate: asked for, in [0, 1); None for "file" and "none". What it is a share of, the functions above say.
        path: of the labels, for "file" only.

    Raises:
        UsageError: there is no such kind, it comes with other attributes than it needs, or the rate is not in [0, 1).
    """

    kind: str
    rate: float | None = None
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*MADE, "file", "none"):
            raise UsageError(f"noise must be {ACCEPTED}, got the kind {self.kind!r}")
        if (self.rate is not None) != (self.kind in MADE) or (self.path is not None) != (self.kind == "file"):
            raise UsageError(f"noise must be {ACCEPTED}, got {self.kind} with rate {self.rate} and path {self.path}")
        if self.rate is not None:
            _check_rate(self.rate)

    def __str__(self) -> str:
        detail = self.rate if self.path is None else self.path
        return self.kind if detail is None else f"{self.kind}:{detail}"

    @property
    def title(self) -> str:
        """For tables, such as "symmetric 40 %"."""
        if self.rate is not None:
            kind, _, all_classes = self.kind.partition("-")
            return f"{kind} {100 * self.rate:g} %" + (" (true class too)" if all_classes else "")
        return "labels as given" if self.path is None else f"labels of {self.path.name}"

    def apply(self, data: DataSet, seed: int) -> NoisyLabels:
        """The training labels of ``data`` with this noise; equal seeds give equal labels.

        Labels that are wrong already, of WebVision or Clothing1M, are left as they are or replaced by a file's.

        Raises:
            UsageError: the noise is to be made, and the truth about a training label is not known, or it does
                not suit the classes; or the file is missing, or is not of labels of this data set.
        """
        if self.path is not None:
            labels = _read_labels(self.path, data)
        elif self.rate is None:
            labels = data.train_labels.clone()
        elif not torch.equal(data.train_labels, data.true_labels):
            raise UsageError(f"{data.name} has wrong labels of its own: noise must be none or file:PATH, got {self}")
        else:
            # Ten times the seed, as the first tables had it; the trainer's streams are others.
            labels = MADE[self.kind](data, self.rate, Generator().manual_seed(10 * seed))
        return NoisyLabels(labels, self, seed, noise_rate(labels, data.true_labels), data.name)


def parse_noise(text: str) -> Noise:
    """The noise that a command line names: ``0.4`` is ``symmetric:0.4``.

    Raises:
        UsageError: it names none.
    """
    kind, _, detail = text.partition(":")
    if kind == "file" and detail:
        return Noise("file", path=Path(detail))
    if text == "none":
        return Noise("none")
    kind, number = (kind, detail) if kind in MADE else ("symmetric", text)
    try:
        rate = float(number)
    except ValueError as error:
        raise UsageError(f"noise must be {ACCEPTED}, got {text!r}") from error
    return Noise(kind, rate)


@dataclass(frozen=True)
class NoisyLabels:
    """Training labels and where they come from.

    Attributes:
        labels: (N,) int64.
        noise, seed: what made them.
        measured: the share that is wrong, as ``noise_rate``.
        data: name of the data set.
    """

    labels: Tensor
    noise: Noise
    seed: int
    measured: float
    data: str

    def save(self, path: Path) -> None:
        """Write an .npz file of plain arrays, with the noise as its text."""
        arrays = {"seed": self.seed, "measured": self.measured, "data": self.data}
        with path.open("wb") as file:  # given a path, numpy may add to its name
            need("numpy").savez(file, labels=self.labels.numpy(), noise=str(self.noise), **arrays)

    @staticmethod
    def load(path: Path) -> NoisyLabels:
        """What ``save`` wrote.

        Raises:
            UsageError: the file is missing, damaged or not one of these.
        """
        content, single = _load_arrays(path, archive=True), ("noise", "seed", "measured", "data")
        if "labels" not in content or any(name not in content or content[name].ndim for name in single):
            raise UsageError(f"{path} must hold labels and one each of {', '.join(single)}, got {', '.join(content)}")
        noise, seed, measured, data = (content[name].item() for name in single)
        return NoisyLabels(_as_labels(content["labels"], path), parse_noise(str(noise)), seed, measured, data)


def _check(rate: float, classes: int) -> None:
    _check_rate(rate)
    if classes < 2:
        raise UsageError(f"noise needs at least 2 classes, got {classes}")


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise UsageError(f"the noise rate must be in [0, 1), got {rate}")


def _read_labels(path: Path, data: DataSet) -> Tensor:
    """(N,) int64 from .npy, from .txt with one label a line, or from .npz as ``NoisyLabels`` saves it."""
    if path.suffix == ".npz":
        saved = NoisyLabels.load(path)
        if saved.data != data.name:
            raise UsageError(f"{path} has labels of {saved.data}, not of {data.name}")
        labels = saved.labels
    elif path.suffix == ".npy":
        labels = _as_labels(_load_arrays(path, archive=False), path)
    elif path.suffix == ".txt":
        labels = torch.tensor([parse_label(line, data.classes, place) for place, line in read_lines(path)])
    else:
        raise UsageError(f"labels must be in a file .npy, .npz or .txt, got {path}")
    if len(labels) != len(data.train_labels):
        raise UsageError(f"{path} must have {len(data.train_labels)} labels, as {data.name}, got {len(labels)}")
    outside = ((labels < 0) | (labels >= data.classes)).nonzero()[:, 0].tolist()
    if outside:
        i = outside[0]
        raise UsageError(f"{path}: label {i} must be from 0 to {data.classes - 1}, got {labels[i].item()}")
    return labels


def _load_arrays(path: Path, archive: bool) -> Any:
    """The array of a .npy file, or with ``archive`` the arrays of an .npz file by name; never a pickle."""
    numpy = need("numpy")
    try:
        content = numpy.load(path, allow_pickle=False)
        if isinstance(content, numpy.ndarray) == archive:
            raise UsageError(f"{path} is not an {'.npz' if archive else '.npy'} file")
        return dict(content) if archive else content
    except (OSError, EOFError, BadZipFile, ValueError) as error:
        raise error if isinstance(error, UsageError) else UsageError(f"{path} cannot be read: {error}") from error


def _as_labels(array: Any, path: Path) -> Tensor:
    if array.ndim != 1 or array.dtype != "int64":
        raise UsageError(f"{path}: labels must be int64 (N,), got {array.dtype} {array.shape}")
    return torch.from_numpy(array)
