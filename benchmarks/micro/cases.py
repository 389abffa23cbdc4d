"""What is measured: sizes, dtypes, parts of a training step, and ways to measure."""

from __future__ import annotations

import argparse
import re
from typing import NamedTuple

import torch

__all__ = ["DTYPES", "METHODS", "MODES", "SIZES", "TINY", "Size", "methods", "parse_size"]


class Size(NamedTuple):
    """Rows and classes of the logits."""

    rows: int
    classes: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes}"


SIZES = tuple(
    Size(*size)
    for size in (
        (64, 10),
        (64, 14),
        (128, 100),
        (256, 1000),
        (1024, 1000),
        (8192, 1000),
        (256, 50000),
        (64, 131072),
    )
)
TINY = Size(2, 3)  # for the time of the host
LARGE = 2**22  # elements from which the peak memory is that of the logits and gradients
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Parts of a step, with what any implementation must read and write of it, in sizes of the logits.
MODES = {"step": 2, "forward": 1, "no-grad": 1}

METHODS = {
    "warm": "Called over and over: logits that fit a cache are in it.",
    "cold": "Before each call a buffer as large as the last cache, or larger, is read: the code is out of it too.",
    "graph": "Replays of a CUDA graph of many calls: the device's own time.",
    "host": "Of logits too small to count: Python, dispatcher and, on a GPU, the launches.",
    "memory": "Peak above what was there before the step.",
}


def methods(size: Size, device: str, memory: bool) -> dict[str, tuple[str, ...]]:
    """The ways to measure logits of this size, each with the parts of a step that it is of; or of memory only."""
    if memory:
        return {"memory": ("step",)}
    if size == TINY:
        return {"host": ("step", "no-grad")}
    found: dict[str, tuple[str, ...]] = {"warm": tuple(MODES), "cold": ("step",)}
    if device == "cuda":
        found["graph"] = ("step", "no-grad")
    return found


def parse_size(text: str) -> Size:
    """Such as "64x1000".

    Raises:
        argparse.ArgumentTypeError: it is nothing like that.
    """
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give rows x classes of at least 1, like 64x1000")
    rows, _, classes = text.partition("x")
    return Size(int(rows), int(classes))
