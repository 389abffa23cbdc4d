"""Processes that tests start, and what they are given to run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from benchmarks.micro.run import environment

__all__ = [
    "PATIENCE",
    "ROOT",
    "SHARED",
    "SUPPORT",
    "assert_passed",
    "made_once",
    "printed_by",
    "run_pytest",
    "run_python",
    "start_python",
    "torchrun",
]

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


def run_python(
    *arguments: str | Path, cwd: Path = ROOT, timeout: float | None = PATIENCE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with these environment variables more; what it printed is text.

    It finds the package and the modules of this folder, wherever it runs.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=_environment(variables),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start_python(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    """As ``run_python``, not waited for."""
    pipe = subprocess.PIPE
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=_environment(variables), stdout=pipe, stderr=pipe, text=True)


def _environment(variables: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return environment() | {"PYTHONPATH": path.rstrip(os.pathsep)} | variables


def printed_by(*arguments: str | Path, **variables: str) -> str:
    """What Python printed, which must have ended well."""
    result = run_python(*arguments, **variables)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return result.stdout


def run_pytest(*arguments: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """pytest, for as long as it takes."""
    options = ("-p", "no:cacheprovider", "-p", "no:randomly")
    return run_python("-m", "pytest", *options, *arguments, cwd=cwd, timeout=None, **variables)


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Two processes, of one thread each."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return run_python(*launcher, *arguments, OMP_NUM_THREADS="1")


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
