"""What a trained network says of samples, with labels or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dal_kernels.training.checkpoint import usable
from dal_kernels.training.config import check_common
from dal_kernels.training.data.files import class_labels
from dal_kernels.training.data.unlabelled import Samples, samples_of
from dal_kernels.training.errors import UsageError
from dal_kernels.training.loader import evaluation_loader, first_input, skipped_in_words
from dal_kernels.training.metrics import predictions
from dal_kernels.training.models import build_model
from dal_kernels.training.parallel import join_world
from dal_kernels.training.provenance import was_inspected
from dal_kernels.training.recipes import Recipe
from dal_kernels.training.records import write_classes, write_rows

__all__ = ["PredictConfig", "Predicted", "Trained", "find_checkpoint", "load_trained", "predict", "predict_samples"]

BATCH = 256
SHOWN = 5  # names of classes in a sentence
WRITTEN = ("predictions.csv", "predicted-classes.csv", "predicted-confusion.csv", "predicted-skipped.csv")


@dataclass(frozen=True)
class PredictConfig:
    """What to predict or evaluate with what.

    Attributes:
        data: as of ``TrainingConfig``; of a folder or a table that has a part to test on, that part, else all of it,
            with or without labels.
        checkpoint: of a run; None: as ``find_checkpoint`` finds it below ``out``.
        out: folder for what is written.
    """

    data: str
    out: Path
    data_dir: Path | None = None
    checkpoint: Path | None = None
    bad_images: str = "skip"
    workers: int = 0
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_common(self)


@dataclass(frozen=True)
class Trained:
    """A network from a checkpoint, what its classes are called, and the shape of a sample."""

    network: nn.Module
    class_names: list[str]
    shape: tuple[int, ...]
    epoch: int


def find_checkpoint(out: Path, to_do: str = "predict") -> Path:
    """Of the newest run below ``out`` the checkpoint of the best epoch, else of the last; of an inspection's run, which
    was to doubt labels and not to be kept, only where there is no other.

    Raises:
        UsageError: there is none.
    """
    runs = sorted(
        out.glob("*/*/checkpoint.pt"), key=lambda path: (not was_inspected(path.parent), path.stat().st_mtime)
    )
    if not runs:
        raise UsageError(f"{to_do} needs a checkpoint: none was given, and there is no run below {out}")
    best = runs[-1].with_name("best.pt")
    return best if best.exists() else runs[-1]


def load_trained(path: Path) -> Trained:
    """The network that a run of ``dal-train`` saved; runs no code from the file.

    Raises:
        UsageError: it cannot be read, or is no checkpoint of a run.
    """
    with usable(path):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        settings = state["settings"]
        recipe = Recipe(**{field.name: settings[field.name] for field in fields(Recipe)})
        names, shape = list(settings["class_names"]), tuple(state["shape"])
        recipe = replace(recipe, pretrained=False)  # its own weights are to come
        network = build_model(recipe, shape, len(names), 0, state["moments"])
        weights: dict[str, Tensor] = state["network"]
        if "average" in state:
            saved = state["average"].items()
            weights = {name.removeprefix("module."): value for name, value in saved if name.startswith("module.")}
        network.load_state_dict(weights)
        return Trained(network.eval(), names, shape, len(state["history"]))


@dataclass(frozen=True)
class Predicted:
    """What a network says of samples.

    Attributes:
        checkpoint: where the network is from.
        indices: (M,) int64, which of the samples, those that can be read.
        classes: (M,) int64, what the network takes them for, ``confidences`` (M,) float32 its probability.
        labels: (M,) int64, what they are labelled as; -1 where that is nothing, or no class of the network.
        unreadable: the other samples, and why they cannot be read.
    """

    checkpoint: Path
    trained: Trained
    samples: Samples
    indices: Tensor
    classes: Tensor
    confidences: Tensor
    labels: Tensor
    unreadable: dict[int, str]

    @property
    def known(self) -> Tensor:
        """(M,) bool, whether the label is a class of the network."""
        return self.labels >= 0

    def remarks(self) -> str:
        """What is to be said of labels that the network does not know, and of samples that cannot be read."""
        names, text = self.trained.class_names, ""
        words = [self.samples.words[i] for i in self.indices[~self.known].tolist()]
        unknown = sorted(set(filter(None, words)))
        if unknown:
            count = sum(map(bool, words))
            some = ", ".join(unknown[:SHOWN]) + (", …" if len(unknown) > SHOWN else "")
            text += (
                f"; the labels of {count} samples ({some}) are no classes of the network, which knows "
                f"{', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}: how well these are told is unknown"
            )
        return "; ".join([text, *skipped_in_words([(self.samples.images, self.unreadable)])])

    def write_unreadable(self, path: Path) -> list[Path]:
        """A table of the samples that cannot be read; no file, if all can."""
        rows = [("test", self.samples.paths[i], reason) for i, reason in sorted(self.unreadable.items())]
        return [write_rows(path, ("part", "path", "reason"), rows)] if rows else []


def predict_samples(config: PredictConfig, to_do: str, written: Sequence[str]) -> Predicted:
    """Apply the network, and take away the files ``written`` that were left in ``config.out`` by another time.

    Raises:
        UsageError: the checkpoint or the data is missing, damaged, or they do not fit each other; there is more than
            one process to do what is ``to_do``.
    """
    path = config.checkpoint or find_checkpoint(config.out, to_do)
    trained = load_trained(path)
    world = join_world(config.device)
    if world.size > 1:
        raise UsageError(f"{to_do} runs in one process, got {world.size}; split the samples instead")
    torch.set_num_threads(config.threads)
    samples = samples_of(config.data, config.data_dir, trained.shape, config.bad_images)
    shape = tuple(first_input(samples.images).shape)
    if shape != trained.shape:
        raise UsageError(f"{path} takes samples of shape {trained.shape}, got {shape} of {config.data}")
    everything = torch.arange(len(samples.images))
    loader = evaluation_loader(samples.images, everything, BATCH, config.workers, world)
    indices, classes, confidences = predictions(trained.network.to(world.device), loader, world.device)
    config.out.mkdir(parents=True, exist_ok=True)
    for left in written:
        (config.out / left).unlink(missing_ok=True)
    labels = class_labels([samples.words[i] for i in indices.tolist()], trained.class_names)
    return Predicted(path, trained, samples, indices, classes, confidences, labels, loader.unreadable)


def predict(config: PredictConfig) -> tuple[list[Path], str]:
    """Write predictions.csv (path, predicted, confidence) and, where labels are known, predicted-classes.csv and
    predicted-confusion.csv.

    Returns:
        The files, and what there is to say.

    Raises:
        UsageError: the checkpoint or the data is missing, damaged, or they do not fit each other.
    """
    found, out = predict_samples(config, "predict", WRITTEN), config.out
    names, known = found.trained.class_names, found.known
    rows = [
        (found.samples.paths[i], names[label], f"{sure:.6f}")
        for i, label, sure in zip(
            found.indices.tolist(), found.classes.tolist(), found.confidences.tolist(), strict=True
        )
    ]
    files = [write_rows(out / "predictions.csv", ("path", "predicted", "confidence"), rows)]
    text = f"{len(rows)} samples, by {found.checkpoint} (epoch {found.trained.epoch})"
    if known.any():
        labels, prediction = found.labels[known], found.classes[known]
        files += write_classes(out, labels, prediction, names, prefix="predicted-")
        of = "" if known.all() else f" of the {len(labels)} that have a label of the network's classes"
        text += f": {(labels == prediction).double().mean().item():.1%}{of} as their labels say"
    return files + found.write_unreadable(out / "predicted-skipped.csv"), text + found.remarks()
