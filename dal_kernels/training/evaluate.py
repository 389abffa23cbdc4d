"""How well a trained network tells samples whose labels are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dal_kernels.training.atomic import replacing
from dal_kernels.training.canvas import pyplot
from dal_kernels.training.confusion import save_confusion_figure
from dal_kernels.training.errors import UsageError
from dal_kernels.training.predict import PredictConfig, predict_samples
from dal_kernels.training.records import write_classes

__all__ = ["class_accuracies", "evaluate"]

WRITTEN = (
    *("evaluation.json", "evaluated-classes.csv", "evaluated-confusion.csv", "evaluated-skipped.csv"),
    *("evaluated-confusion.png", "evaluated-confusion.svg"),
)
SHOWN = 5  # classes and pairs of classes in the text


def evaluate(config: PredictConfig) -> tuple[list[Path], str]:
    """Write evaluation.json, evaluated-classes.csv and evaluated-confusion.csv, with a picture if classes are few.

    evaluation.json holds the accuracy, a share in [0, 1] of the samples whose label is a class of the network; the mean
    over the classes of each one's own accuracy, in which rare classes count as much as others; and how many samples
    there were, were without such a label, and could not be read.

    Returns:
        The files, and what there is to say.

    Raises:
        UsageError: the checkpoint or the data is missing, damaged, or they do not fit each other; or no sample has a
            label of the network's classes; or matplotlib is missing.
    """
    pyplot()  # a missing package is missed before anything is predicted or written
    found, out = predict_samples(config, "evaluate", WRITTEN), config.out
    names, known = found.trained.class_names, found.known
    if not known.any():
        raise UsageError(f"evaluate needs labels, got no sample in {config.data} with one that the network knows")
    labels, prediction = found.labels[known], found.classes[known]
    of_class = class_accuracies(labels, prediction, len(names))
    result: dict[str, Any] = {
        "data": config.data,
        "checkpoint": str(found.checkpoint),
        "epoch": found.trained.epoch,
        "samples": len(labels),
        "accuracy": (labels == prediction).double().mean().item(),
        "mean class accuracy": of_class.nanmean().item(),
        "classes": int((~of_class.isnan()).sum()),
        "without a known label": int((~known).sum()),
        "unreadable": len(found.unreadable),
    }
    with replacing(out / "evaluation.json") as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    title = f"{config.data}: {result['accuracy']:.1%} of {len(labels)} samples right"
    files = [
        out / "evaluation.json",
        *write_classes(out, labels, prediction, names, prefix="evaluated-"),
        *save_confusion_figure(out / "evaluated-confusion", labels, prediction, names, title),
        *found.write_unreadable(out / "evaluated-skipped.csv"),
    ]
    text = (
        f"{len(labels)} samples, by {found.checkpoint} (epoch {found.trained.epoch}): accuracy "
        f"{result['accuracy']:.2%}, mean over {result['classes']} classes {result['mean class accuracy']:.2%}"
        f"{found.remarks()}"
    )
    return files, "\n".join([text, *_worst(labels, prediction, of_class, names)])


def class_accuracies(labels: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """(C,) float64, the share of each class's samples that are told; NaN of a class without samples.

    Args:
        labels, prediction: (M,) int64, in [0, C).
    """
    right = torch.bincount(labels[labels == prediction], minlength=classes)
    return right.double() / torch.bincount(labels, minlength=classes)


def _worst(labels: Tensor, prediction: Tensor, of_class: Tensor, names: list[str]) -> list[str]:
    """The classes that are told worst, and what is taken for what most often, a line each."""
    order = of_class.nan_to_num(2).argsort(stable=True)[:SHOWN].tolist()  # NaN: no samples
    worst = [f"{names[i]} {of_class[i]:.1%}" for i in order if of_class[i] < 1]
    wrong = labels != prediction
    pairs, counts = torch.stack([labels, prediction], 1)[wrong].unique(dim=0, return_counts=True)
    commonest = counts.argsort(descending=True, stable=True)[:SHOWN].tolist()
    taken = [f"{names[pairs[i, 0]]} for {names[pairs[i, 1]]} ({counts[i]})" for i in commonest]
    lists = {"told worst": worst, "taken most": taken}
    return [f"{title}: {', '.join(classes)}" for title, classes in lists.items() if classes]
