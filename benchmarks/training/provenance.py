"""How results were made, so that they can be made again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

import dal_kernels
from benchmarks.machine import machine
from benchmarks.training.config import TrainingConfig
from benchmarks.training.parallel import World

__all__ = ["provenance"]


def provenance(config: TrainingConfig, world: World) -> dict[str, str]:
    """Command, commit, versions and machine, as text."""
    gpu = f", {torch.cuda.get_device_name(world.device)}" if world.device.type == "cuda" else ""
    return {
        "command": config.command or f"run_training({config!r})",
        "commit": _commit(),
        "dal_kernels": dal_kernels.__version__,
        "machine": f"{machine()}{gpu}, {world.size} process{'es' * (world.size > 1)}",
    }


def _commit() -> str:
    """Of the checkout that this file is in."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
