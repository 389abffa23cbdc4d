"""Which training labels are wrong: noise as the command line names it, seeded, and kept with its seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from dal_kernels.noise import (
    CIFAR_N,
    UNKNOWN,
    as_labels,
    asymmetric_noise,
    check_rate,
    cifar_n_labels,
    instance_noise,
    labels_from_file,
    noise_rate,
    read_arrays,
    symmetric_noise,
)
from dal_kernels.training.data.base import DataSet, EncodedImages, UnreadableError
from dal_kernels.training.errors import UsageError, need, usage_errors
from dal_kernels.training.loader import first_input

__all__ = ["Noise", "NoisyLabels", "parse_noise"]


def _symmetric(data: DataSet, rate: float, generator: Generator) -> Tensor:
    return symmetric_noise(data.train_labels, rate, data.classes, generator)


def _symmetric_all(data: DataSet, rate: float, generator: Generator) -> Tensor:
    return symmetric_noise(data.train_labels, rate, data.classes, generator, include_true=True)


def _asymmetric(data: DataSet, rate: float, generator: Generator) -> Tensor:
    flips = torch.arange(data.classes).roll(-1) if data.flips is None else data.flips
    return asymmetric_noise(data.train_labels, rate, flips, generator)


def _instance(data: DataSet, rate: float, generator: Generator) -> Tensor:
    def inputs(indices: Tensor) -> Tensor:
        try:
            return data.train.batch(indices.tolist(), train=False)
        except UnreadableError:
            if not (isinstance(data.train, EncodedImages) and data.train.skip):
                raise
        # Those that cannot be read are not trained on, so their labels do not count; zeros are the mean input.
        found = torch.zeros(len(indices), *first_input(data.train).shape)
        for place, index in enumerate(indices.tolist()):
            with suppress(UnreadableError):
                found[place] = data.train.batch([index], train=False)[0]
        return found

    return instance_noise(data.train_labels, rate, data.classes, generator, inputs)


# Kinds of noise that are made at a rate.
MADE: dict[str, Callable[[DataSet, float, Generator], Tensor]] = {
    "symmetric": _symmetric,
    "symmetric-all": _symmetric_all,
    "asymmetric": _asymmetric,
    "instance": _instance,
}
ACCEPTED = f"a rate, none, {', '.join(f'{kind}:RATE' for kind in MADE)}, file:PATH or cifar-n:LABELS:PATH"


@dataclass(frozen=True)
class Noise:
    """What is done to the training labels; ``str`` gives the form that ``parse_noise`` reads.

    Attributes:
        kind: "symmetric" (wrong labels are uniform over the other classes), "symmetric-all" (over all classes, the true
            one too), "asymmetric" (the class that the data set says each is taken for, else the next), "instance" (by
            what the image shows), "file", "cifar-n" (by people) or "none": labels as the data set gives them.
        rate: asked for, in [0, 1); None for the kinds that are not made. What it is a share of, the functions of
            ``dal_kernels.noise`` say.
        path: of the labels, for "file" and "cifar-n" only.
        labels: which of the sets of CIFAR-N, for "cifar-n" only.

    Raises:
        UsageError: there is no such kind, it comes with other attributes than it needs, or the rate is not in [0, 1).
    """

    kind: str
    rate: float | None = None
    path: Path | None = None
    labels: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*MADE, "file", "cifar-n", "none"):
            raise UsageError(f"noise must be {ACCEPTED}, got the kind {self.kind!r}")
        given = (self.rate is not None, self.path is not None, self.labels is not None)
        if given != (self.kind in MADE, self.kind in ("file", "cifar-n"), self.kind == "cifar-n"):
            raise UsageError(f"noise must be {ACCEPTED}, got {self.kind} with rate {self.rate} and path {self.path}")
        if self.labels is not None and self.labels not in CIFAR_N:
            raise UsageError(f"LABELS of cifar-n must be one of {', '.join(CIFAR_N)}, got {self.labels!r}")
        if self.rate is not None:
            with usage_errors():
                check_rate(self.rate)

    def __str__(self) -> str:
        details = (detail for detail in (self.labels, self.rate, self.path) if detail is not None)
        return ":".join(map(str, (self.kind, *details)))

    @property
    def title(self) -> str:
        """For tables, such as "symmetric 40 %"."""
        if self.rate is not None:
            kind, _, all_classes = self.kind.partition("-")
            return f"{kind} {100 * self.rate:g} %" + (" (true class too)" if all_classes else "")
        if self.labels is not None:
            return f"labels by people ({self.labels})"
        return "labels as given" if self.path is None else f"labels of {self.path.name}"

    def apply(self, data: DataSet, seed: int) -> NoisyLabels:
        """The training labels of ``data`` with this noise; equal seeds give equal labels.

        Labels that are wrong already, of WebVision or Clothing1M, are left as they are or replaced by a file's.

        Raises:
            UsageError: the noise is to be made, and the truth about a training label is not known, or it does
                not suit the classes; or the file is missing, or is not of labels of this data set.
        """
        if self.path is not None:
            with usage_errors():
                labels = self._read(self.path, data)
        elif self.rate is None:
            labels = data.train_labels.clone()
        elif data.verified and not torch.equal(data.train_labels, data.true_labels):
            raise UsageError(f"{data.name} has wrong labels of its own: noise must be none or file:PATH, got {self}")
        else:
            # Ten times the seed, as the first tables had it; the trainer's streams are others.
            with usage_errors():
                labels = MADE[self.kind](data, self.rate, Generator().manual_seed(10 * seed))
        return NoisyLabels(labels, self, seed, noise_rate(labels, self.known(data).true_labels), data.name)

    def known(self, data: DataSet) -> DataSet:
        """``data`` with the truth as far as it is known to labels of this noise.

        Labels that nobody verified are the truth for noise that is made from them, and for no other.
        """
        if data.verified or self.rate is not None:
            return data
        return replace(data, true_labels=torch.full_like(data.true_labels, UNKNOWN))

    def _read(self, path: Path, data: DataSet) -> Tensor:
        if self.labels is not None:
            labels, true = cifar_n_labels(path, self.labels)
            if not torch.equal(true, data.true_labels):
                raise UsageError(f"{path} has labels of other images, or in another order, than {data.name}")
            return labels
        if path.suffix == ".npz" and (saved := NoisyLabels.load(path)).data != data.name:
            raise UsageError(f"{path} has labels of {saved.data}, not of {data.name}")
        return labels_from_file(path, data.classes, len(data.train_labels))


def parse_noise(text: str) -> Noise:
    """The noise that a command line names: ``0.4`` is ``symmetric:0.4``.

    Raises:
        UsageError: it names none.
    """
    kind, _, detail = text.partition(":")
    if kind == "file" and detail:
        return Noise("file", path=Path(detail))
    if kind == "cifar-n" and ":" in detail:
        labels, _, path = detail.partition(":")
        return Noise("cifar-n", path=Path(path), labels=labels)
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

    def save(self, path: Path, paths: Sequence[str], class_names: Sequence[str]) -> None:
        """Write an .npz file of plain arrays, with the noise as its text, what tells the N samples apart, and what the
        C classes are called.
        """
        numpy = need("numpy")
        arrays = {"seed": self.seed, "measured": self.measured, "data": self.data}
        words = {"paths": numpy.array(paths, dtype=str), "class_names": numpy.array(class_names, dtype=str)}
        with path.open("wb") as file:  # given a path, numpy may add to its name
            numpy.savez_compressed(file, labels=self.labels.numpy(), noise=str(self.noise), **arrays, **words)

    @staticmethod
    def load(path: Path) -> NoisyLabels:
        """What ``save`` wrote.

        Raises:
            UsageError: the file is missing, damaged or not one of these.
        """
        single = ("noise", "seed", "measured", "data")
        with usage_errors():
            content = read_arrays(path, archive=True)
        if "labels" not in content or any(name not in content or content[name].ndim for name in single):
            raise UsageError(f"{path} must hold labels and one each of {', '.join(single)}, got {', '.join(content)}")
        noise, seed, measured, data = (content[name].item() for name in single)
        with usage_errors():
            labels = as_labels(content["labels"], path)
        return NoisyLabels(labels, parse_noise(str(noise)), seed, measured, data)
