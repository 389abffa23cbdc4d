"""What is said of samples that cannot be read."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from dal_kernels.training.data.base import FileImages, Images

__all__ = ["skipped_in_words"]


def skipped_in_words(parts: Iterable[tuple[Images, Collection[int]]]) -> list[str]:
    """How many there are, files that are missing apart from those that are broken.

    Args:
        parts: images, and which of them could not be read.
    """
    missing, files, broken = [], 0, 0
    for images, indices in parts:
        lost = images.missing(indices) if isinstance(images, FileImages) else []
        missing += lost
        files += len(images) if isinstance(images, FileImages) else 0
        broken += len(indices) - len(lost)
    words = [f"{len(missing)} of {files} files are missing (the first is {missing[0]})"] if missing else []
    return words + ([f"{broken} images could not be read"] if broken else [])
