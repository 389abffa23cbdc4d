"""How results were made, so that they can be made again."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dal_kernels
from dal_kernels.training.atomic import replacing
from dal_kernels.training.checkpoint import usable
from dal_kernels.training.config import TrainingConfig
from dal_kernels.training.machine import machine
from dal_kernels.training.parallel import World

__all__ = ["RUN", "distinct", "other_setting", "provenance", "read_makers", "was_inspected", "write_makers"]

RUN = "run.json"  # in the folder of each run
RESUMED = "resumed by"


def provenance(config: TrainingConfig, world: World) -> dict[str, str]:
    """Command, commit, versions and machine, as text."""
    gpu = f", {torch.cuda.get_device_name(world.device)}" if world.device.type == "cuda" else ""
    return {
        "command": config.command or f"run_training({config!r})",
        "commit": _commit(),
        "dal_kernels": dal_kernels.__version__,
        "machine": f"{machine()}{gpu}, {world.size} process{'es' * (world.size > 1)}",
    }


def write_makers(path: Path, settings: Mapping[str, Any], makers: Sequence[dict[str, str]]) -> None:
    """Write the settings of a run, null for infinity, and the provenance of all that trained it, in order."""
    content = {**_finite(settings), **makers[0], RESUMED: makers[1:]}
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def other_setting(path: Path, settings: Mapping[str, Any]) -> str | None:
    """Which of ``settings`` a run had otherwise, by what :func:`write_makers` wrote; if that is lost, the first one."""
    content = _written(path)
    ours = json.loads(json.dumps(_finite(settings)))
    return next((name for name, value in ours.items() if name not in content or content[name] != value), None)


def was_inspected(folder: Path) -> bool:
    """Whether the run in a folder was an inspection of labels, by what :func:`write_makers` wrote."""
    return _written(folder / RUN).get("inspected") is True


def _written(path: Path) -> dict[str, Any]:
    """What :func:`write_makers` wrote; nothing, if that is lost."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _finite(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value == math.inf else value for name, value in settings.items()}


def read_makers(path: Path, names: Iterable[str]) -> list[dict[str, str]]:
    """The provenance that :func:`write_makers` wrote, each with the values called ``names``.

    Raises:
        UsageError: the file is missing or damaged.
    """
    with usable(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        # The first versions wrote no list of those that resumed.
        return [{name: maker[name] for name in names} for maker in (content, *content.get(RESUMED, []))]


def distinct(makers: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """All values of each name, in order, each once."""
    return {name: list(dict.fromkeys(maker[name] for maker in makers)) for name in makers[0]}


def _commit() -> str:
    """Of the checkout that this file is in; an installed copy may lie in a checkout of something else."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
