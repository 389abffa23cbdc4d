"""Each size in a process of its own: what a large allocation costs depends on those before it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.micro.cases import DTYPES, LARGE, Size
from benchmarks.micro.results import BenchmarkError, Results

__all__ = ["check_packages", "environment", "measure"]

ROOT = Path(__file__).parent.parent.parent
BENCHMARK = Path(__file__).with_name("bench_loss.py")
# Short turns of many samples; what pytest is given later wins.
OPTIONS = [
    "-q",
    "-p",
    "no:cacheprovider",
    "--benchmark-quiet",
    "--benchmark-min-time=5e-4",
    "--benchmark-max-time=0.05",
    "--benchmark-min-rounds=2",
    "--benchmark-warmup=off",
]
USAGE_ERROR, NOTHING_SELECTED = 4, 5  # exit codes of pytest


def check_packages(*modules: str) -> None:
    """Miss an optional package before anything is measured.

    Raises:
        BenchmarkError: one of them is not installed.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise BenchmarkError(f"{module.replace('_', '-')} is missing: install the extra dal_kernels[bench]")


def environment() -> dict[str, str]:
    """The environment of a pytest that another one starts.

    Without the variables that tell the other one's plugins and options: as a worker of pytest-xdist it would measure
    nothing, and of PYTEST_ADDOPTS it would run a selection that was made for other tests.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def measure(
    sizes: Iterable[Size],
    dtypes: Sequence[str] = tuple(DTYPES),
    options: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
    memory: bool = True,
) -> Results:
    """Run the benchmark.

    Args:
        dtypes: names in ``DTYPES``.
        options: more for pytest, such as ``["-k", "warm and step"]``.
        say: given the size that comes next.
        memory: also measure the peak memory of large sizes, each in a process more.

    Raises:
        BenchmarkError: pytest-benchmark is missing, the device cannot be used, pytest failed, or selected nothing, or
            not our loss.
    """
    check_packages("pytest_benchmark")
    documents = []
    for size in sizes:
        say(str(size))
        documents += _measure(size, dtypes, options)
        if memory and size.rows * size.classes >= LARGE:
            documents += _measure(size, dtypes, [*options, "--memory"])
    if not documents:
        raise BenchmarkError(f"no benchmark of these sizes is selected by {' '.join(options)!r}")
    return Results(documents)


def _measure(size: Size, dtypes: Sequence[str], options: Sequence[str]) -> list[dict[str, Any]]:
    """The document of one process; none if nothing was selected."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        selection = [f"--size={size}", *(f"--dtype={dtype}" for dtype in dtypes), f"--benchmark-json={file}"]
        command = [sys.executable, "-m", "pytest", str(BENCHMARK), *OPTIONS, *selection, *options]
        run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        if run.returncode == NOTHING_SELECTED:
            return []
        if run.returncode == USAGE_ERROR:
            raise BenchmarkError(run.stderr.strip().removeprefix("ERROR: "))
        if run.returncode:
            raise BenchmarkError(f"pytest failed at {size}:\n{(run.stdout + run.stderr)[-5000:]}")
        text = file.read_text(encoding="utf-8")
        return [json.loads(text)] if text else []
