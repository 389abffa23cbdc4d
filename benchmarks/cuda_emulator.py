"""The CUDA C++ kernels on CPU tensors: their PTX in an executor that lies beside the repository."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.executor import MissingError, load
from dal_kernels import ops

SOURCES = Path(__file__).parent.parent / "csrc/cuda"
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr"]
ARCHITECTURE = 90


def missing() -> str | None:
    """What the emulator lacks here; None if nothing."""
    if ops.cuda_error is not None:
        return f"the CUDA extension is not built: {ops.cuda_error}"
    if NVCC is None:
        return "the emulator needs nvcc on the path"
    try:
        load()
    except MissingError as error:
        return str(error)
    return None


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


# The executor has no clusters of blocks. As a cluster of one, their kernels do all but exchange.
CLUSTER_OF_ONE = {
    r"%cluster_nctarank": "1",
    r"%cluster_ctarank": "0",
    r"mapa\.u64\s+(\S+), (\S+), \S+;": r"mov.u64 \1, \2;",
    r"barrier\.cluster\.arrive[^;]*;": "",
    r"barrier\.cluster\.wait[^;]*;": "bar.sync 0;",
}


def without_clusters(ptx: str) -> str:
    for pattern, replacement in CLUSTER_OF_ONE.items():
        ptx = re.sub(pattern, replacement, ptx)
    return ptx


@functools.cache
def modules() -> dict[str, Any]:
    """Kernel name -> module, from DAL_TEST_PTX (a folder that compile_ptx filled), or compiled now."""
    from gpuless.ptx import Module

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("DAL_TEST_PTX", temporary))
        if folder == Path(temporary):
            compile_ptx(folder)
        loaded = [Module(without_clusters(file.read_text())) for file in sorted(folder.glob("*.ptx"))]
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
def installed(
    order: str = "asc", cta_order: str = "asc", instead: tuple[str, str] = ("", "")
) -> Iterator[list[Launch]]:
    """Runs backend "cuda" on CPU tensors inside; yields what was launched.

    The device is one without clusters (sm_80), the code that of sm_90. ``instead``: part of a kernel's name, and what
    to run in its place.
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
        kernel = kernel.replace(*instead)
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

    _cuda.emulate(run, 80)
    try:
        yield launches
    finally:
        _cuda.emulate(None)
