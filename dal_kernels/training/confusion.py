"""Who is taken for whom, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dal_kernels.training.canvas import pyplot, save

__all__ = ["save_confusion_figure"]

MOST, WITH_NUMBERS = 40, 15  # classes: of more a picture shows nothing
INCHES_PER_CLASS, SMALLEST = 0.42, 2.6


def save_confusion_figure(
    base: Path, labels: Tensor, prediction: Tensor, names: Sequence[str], title: str
) -> list[Path]:
    """Draw the share of each class's samples, in %, that is taken for each class; no file of more than 40 classes.

    Args:
        base: path of the files without their suffix.
        labels, prediction: (M,) int64, in [0, C).
        names: (C,).
    """
    classes = len(names)
    if classes > MOST:
        return []
    counts = torch.bincount(labels * classes + prediction, minlength=classes**2).view(classes, classes).double()
    shares = 100 * counts / counts.sum(1, keepdim=True)  # NaN, so white, of a class without samples
    side = max(SMALLEST, INCHES_PER_CLASS * classes)
    figure, axis = pyplot().subplots(figsize=(side + 2.4, side + 1.2), layout="constrained")
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    short = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
    turned = max(map(len, short)) > 3
    axis.set_xticks(range(classes), short, rotation=90 if turned else 0, parse_math=False)
    axis.set_yticks(range(classes), short, parse_math=False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("label")
    if classes <= WITH_NUMBERS:
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 60 else "black"
            text = f"{shares[row, column]:.0f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, label="of the label's samples, %", shrink=0.8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return save(figure, base)
