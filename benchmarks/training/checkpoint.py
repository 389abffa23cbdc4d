"""A run's state on disk."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.atomic import replacing
from benchmarks.training.errors import UsageError

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, tensors and plain values; whoever is killed here leaves the file as it was."""
    with replacing(path) as partial:
        torch.save(dict(state), partial)


def load_checkpoint(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state saved at ``path``, of a run with the same ``settings``, which are part of it. Runs no code from it.

    Raises:
        UsageError: it cannot be read, or was saved with another setting, which the message names.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__} {str(error).partition(chr(10))[0]}"
        raise UsageError(f"the checkpoint {path} cannot be read: {reason}") from error
    for name, value in settings.items():
        if saved.get(name) != value:
            raise UsageError(
                f"{path} was saved with {name} {saved.get(name)!r}, got {value!r}; resume with the same settings, or "
                "train anew without --resume"
            )
    return state
