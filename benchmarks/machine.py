"""What figures were taken on, and the memory that a step takes there."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from dal_kernels.training.machine import machine, processor

__all__ = ["cache_bytes", "machine", "peak_memory", "processor"]

# glibc's, where it is: Python has no name for it.
_give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def cache_bytes(device: torch.device) -> int | None:
    """Size of the last cache before memory; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * UNITS[size[-1]] for size in sizes), default=None)


def peak_memory(reset: bool = False) -> int:
    """Bytes of this process's peak resident set, since the last reset. Linux only."""
    if reset:
        if _give_back is not None:
            _give_back(0)  # or a step would find room in what was freed before it
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
