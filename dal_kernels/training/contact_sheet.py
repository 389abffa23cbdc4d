"""The samples whose labels look worst, as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dal_kernels.training.data.base import ByteImages, DataSet, EncodedImages, Images, TensorImages
from dal_kernels.training.errors import UsageError, need
from dal_kernels.training.inspection import Inspection

__all__ = ["picture_of", "save_contact_sheet"]

COLUMNS, MOST, INCHES = 8, 64, 1.25
THUMBNAIL = 160  # pixels of a side


def save_contact_sheet(path: Path, data: DataSet, inspection: Inspection) -> Path | None:
    """Write a PNG of up to 64 suspicious samples, the worst first, with given and suggested label; None if the samples
    are no images, or no label is replaced.
    """
    shown: list[tuple[int, Any]] = []
    for i in inspection.order[: 2 * MOST].tolist():
        if inspection.suggested[i] != inspection.given[i] and len(shown) < MOST:
            try:
                picture = picture_of(data.train, i)
            except UsageError:  # gone since it was trained on
                continue
            if picture is None:
                return None
            shown.append((i, picture))
    if not shown:
        return None
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot", "matplotlib")
    rows = -(-len(shown) // COLUMNS)
    figure, axes = pyplot.subplots(
        rows, COLUMNS, figsize=(INCHES * COLUMNS, (INCHES + 0.35) * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (i, picture) in zip(axes.flat, shown, strict=False):
        axis.imshow(picture, cmap="gray", interpolation="nearest")
        given, suggested = (_short(data.names[labels[i]]) for labels in (inspection.given, inspection.suggested))
        axis.set_title(f"{given}\n→ {suggested}  {inspection.confidence[i]:.0%}", fontsize=7, parse_math=False)
    title = f"{data.name}: given label → suggested label, and how likely the given one is wrong"
    figure.suptitle(title, fontsize=9, parse_math=False)  # a name with two dollar signs would be taken for a formula
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def picture_of(images: Images, index: int) -> Any:
    """An array (H, W) or (H, W, 3) to be shown; None if the sample is no image."""
    numpy = need("numpy")
    if isinstance(images, EncodedImages):
        image = images.open(index)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return numpy.asarray(image)
    if not isinstance(images, TensorImages | ByteImages):
        return None
    pixels = (images.inputs if images.pictures is None else images.pictures)[index].float()
    if pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0).squeeze(2)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        return None
    low, high = pixels.min(), pixels.max()
    return ((pixels - low) / torch.where(high > low, high - low, 1.0)).numpy()


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
