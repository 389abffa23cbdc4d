"""Where figures are drawn, and the files they are saved to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dal_kernels.training.atomic import replacing
from dal_kernels.training.errors import need

__all__ = ["FORMATS", "pyplot", "save"]

FORMATS = ("png", "svg")


def pyplot() -> Any:
    """matplotlib's, which needs no screen then.

    Raises:
        UsageError: matplotlib is not installed.
    """
    need("matplotlib").use("Agg")
    return need("matplotlib.pyplot", "matplotlib")


def save(figure: Any, base: Path) -> list[Path]:
    """Save a figure as PNG and SVG, ``base`` with the suffix of each, and close it."""
    files = [base.with_name(f"{base.name}.{kind}") for kind in FORMATS]
    # Names of its parts by chance and the hour would make each SVG another file.
    with pyplot().rc_context({"svg.hashsalt": base.name}):
        for path, kind in zip(files, FORMATS, strict=True):
            with replacing(path) as partial:
                figure.savefig(partial, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    pyplot().close(figure)
    return files
