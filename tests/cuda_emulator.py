"""The CUDA C++ kernels on CPU tensors: their PTX in an executor that lies beside the repository."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dal_kernels import ops

SOURCES = Path(__file__).parent.parent / "csrc/cuda"
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr"]
ARCHITECTURE = 90

needs_emulator = pytest.mark.skipif(
    ops.cuda_error is not None or importlib.util.find_spec("gpuless") is None or NVCC is None,
    reason="needs nvcc, the CUDA extension and, beside the repository, the executor of compiled GPU code",
)


def compile_ptx(folder: Path, sources: Path = SOURCES, pattern: str = "kernels_*.cu") -> None:
    """PTX into ``folder``, as setup.py compiles it but for the architecture."""
    assert NVCC is not None
    command = [NVCC, "-ptx", f"-arch=sm_{ARCHITECTURE}", "-lineinfo", *FLAGS]
    processes = [
        subprocess.Popen([*command, "-o", str(folder / f"{file.stem}.ptx"), file])
        for file in sorted(sources.glob(pattern))
    ]
    for process in processes:
        assert process.wait() == 0


@functools.cache
def modules() -> dict[str, Any]:
    """Kernel name -> module, from DAL_TEST_PTX (a folder that compile_ptx filled), or compiled now."""
    from gpuless.ptx import Module

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("DAL_TEST_PTX", temporary))
        if folder == Path(temporary):
            compile_ptx(folder)
        loaded = [Module(file.read_text()) for file in sorted(folder.glob("*.ptx"))]
    return {kernel: module for module in loaded for kernel in module.kernels}


@dataclass
class Launch:
    name: str
    grid: tuple[int, int]
    threads: int
    stats: Any


def memory(address: int, size: int) -> np.ndarray[Any, Any]:
    # From a multiple of 16 on, as the executor's own addresses are: an access that is aligned stays so.
    start = address & ~15
    return np.ctypeslib.as_array((ctypes.c_uint8 * (address + size - start)).from_address(start))


@contextmanager
def installed(order: str = "asc", cta_order: str = "asc", multiprocessors: int = 132) -> Iterator[list[Launch]]:
    """Runs backend "cuda" on CPU tensors inside; yields what was launched.

    The executor has no clusters of blocks: the device is one without (sm_80), the code that of sm_90.
    """
    from gpuless.ptx import launch

    from dal_kernels import _cuda

    launches: list[Launch] = []

    def run(
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        arguments: bytes,
        buffers: list[tuple[str, int, int]],
    ) -> None:
        stats = launch(
            modules()[kernel],
            kernel,
            grid,
            threads,
            [arguments],
            shared,
            warp_order=order,
            cta_order=cta_order,
            buffers=[memory(address, size) for _, address, size in buffers],
        )
        launches.append(Launch(kernel, grid, threads, stats))

    _cuda.emulate(run, 80, multiprocessors)
    try:
        yield launches
    finally:
        _cuda.emulate(None)
