"""What nvcc made of the CUDA C++ kernels: registers, spills and shared memory of every binary in the extension."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.executor import MissingError
from dal_kernels import ops

__all__ = ["CudaBinary", "cuda_binaries", "cuobjdump"]


@dataclass(frozen=True)
class CudaBinary:
    """Registers, stack (spills) and local memory are per thread, shared memory per block, beside the dynamic one."""

    kernel: str
    target: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int


USAGE = re.compile(r"Function (dal_\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def cuobjdump() -> str | None:
    """NVIDIA's tool, from the path or from Triton, which carries it; None where neither has it."""
    triton = importlib.util.find_spec("triton")
    bundled = str(Path(triton.origin).parent / "backends/nvidia/bin") if triton and triton.origin else ""
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=bundled)


def cuda_binaries() -> list[CudaBinary]:
    """Every kernel of the built extension, for every target that it was built for.

    Raises:
        MissingError: the extension is not built, or the tool that reads it is not there.
    """
    tool = cuobjdump()
    if ops.cuda_error is not None:
        raise MissingError(f"the CUDA extension is not built: {ops.cuda_error}")
    if tool is None:
        raise MissingError("cuobjdump, which CUDA and Triton carry, is not installed")
    command = [tool, "-res-usage", str(ops.cuda_module.__file__)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for section in text.split("Fatbin elf code:")[1:]:
        target = re.search(r"arch = (sm_\w+)", section)
        assert target is not None
        found += [CudaBinary(name, target[1], *map(int, numbers)) for name, *numbers in USAGE.findall(section)]
    return found
