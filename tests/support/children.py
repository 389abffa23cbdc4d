"""Processes that tests start, and what they are given to run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from benchmarks.micro.run import environment

__all__ = ["PATIENCE", "ROOT", "SHARED", "SUPPORT", "assert_passed", "made_once", "run_pytest"]

SUPPORT = Path(__file__).parent  # where the programs lie that tests start
ROOT = SUPPORT.parent.parent
PATIENCE = 600  # seconds after which a process hangs, and is not slow

# The tests that each executor of GPU code passes, in a process of its own.
SHARED = tuple(
    f"tests/{name}.py"
    for name in (
        "kernels/test_numerics",
        "kernels/test_fuzz",
        "kernels/test_pace",
        "graph/test_autograd",
        "graph/test_compile",
    )
)


def run_pytest(*arguments: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, with these environment variables more; what it printed is text."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", *map(str, arguments)],
        cwd=cwd,
        env=environment() | variables,
        capture_output=True,
        text=True,
    )


def assert_passed(result: subprocess.CompletedProcess[str]) -> None:
    """Some tests passed and none failed."""
    passed = result.returncode == 0 and " passed" in result.stdout
    assert passed, result.stdout[-3000:] + result.stderr[-2000:]


def made_once(request: pytest.FixtureRequest, name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name``, filled by ``make`` in the first of pytest-xdist's workers that asks for it."""
    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    common = factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        common = common.parent  # that of all workers of this run
    folder, unfinished = common / name, common / f"{name}.unfinished"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)  # there where another worker's attempt failed
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder
