"""A run's state on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dal_kernels.training.atomic import replacing
from dal_kernels.training.errors import UsageError

__all__ = ["load_checkpoint", "save_checkpoint", "usable"]


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, tensors and plain values; whoever is killed here leaves the file as it was."""
    with replacing(path) as partial:
        torch.save(dict(state), partial)


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """What goes wrong with the content of the file at ``path`` becomes a sentence that names it.

    Raises:
        UsageError: anything was raised within.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = f"{type(error).__name__} {str(error).partition(chr(10))[0]}"
        raise UsageError(f"{path} cannot be used: {reason}") from error


def load_checkpoint(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state saved at ``path``, of a run with the same ``settings``, which are part of it. Runs no code from it.

    Raises:
        UsageError: it cannot be read, or was saved with another setting, which the message names.
    """
    with usable(path):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in settings.items():
            if state["settings"].get(name) != value:
                raise UsageError(
                    f"{path} was saved with {name} {state['settings'].get(name)!r}, got {value!r}; resume with the "
                    "same settings, or train anew without --resume"
                )
    return state
