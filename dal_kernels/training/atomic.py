"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of ``path``; whoever is killed before leaves that as it was."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)
