"""Faults put into a copy of the sources, and the tests that must catch them there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from support.children import ROOT, made_once, run_pytest
from support.compiling import compile_object, link

# The tests that catch most of them, whichever kernel they are in.
NUMERICS = "tests/kernels/test_numerics.py"
PACE = "tests/kernels/test_pace.py"
LAYOUTS = "tests/kernels/test_gpu_layouts.py"


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        file: the source, below the folder that its kernel's sources lie in.
        old: what stands there, in as many ``places``.
        new: what is put there.
        selection: the tests that must catch it, as ``pytest -k`` takes them.
    """

    file: str
    old: str
    new: str
    selection: str = ""
    places: int = 1

    def text(self, sources: Path) -> str:
        """The source with the fault in it."""
        text = (sources / self.file).read_text()
        assert text.count(self.old) == self.places, f"the source of the mutant moved: {self.old}"
        return text.replace(self.old, self.new)

    def put_into(self, sources: Path) -> None:
        (sources / self.file).write_text(self.text(sources))


def copy_sources(names: tuple[str, ...], folder: Path, *ignored: str) -> None:
    """Folders of the repository, without what Python has made of them and without what is ``ignored``."""
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", *ignored))


# ---- the CPU kernels

# Only the portable instruction set is built: the others compile the same source.
STUB = '#include "batch.h"\nnamespace dal {{ namespace {name} {{ extern const {kernels} = {{}}; }} }}\n'
STUBS = {"x86_v3": "RowKernels kernels", "x86_v4": "RowKernels kernels", "x86_v4_bf16": "RowKernel<BFloat16> kernel"}


def _make_tree(copy: Path) -> None:
    copy_sources(("csrc", "dal_kernels", "tests"), copy, "*.so")
    for name, kernels in STUBS.items():
        (copy / "csrc/cpu" / f"isa_{name}.cpp").write_text(STUB.format(name=name, kernels=kernels))
    for source in (copy / "csrc/cpu").glob("*.cpp"):
        if source.stem != "isa_baseline":
            compile_object(source, copy / f"{source.stem}.o")


@pytest.fixture
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of package, sources and tests, with everything compiled that no mutant touches."""
    return shutil.copytree(made_once(request, "mutants", _make_tree), tmp_path / "tree")


def run_cpu_tests(tree: Path, *files: str) -> subprocess.CompletedProcess[str]:
    """Compiled as it is now, tests of the backend "cpu" up to the first that fails."""
    for name in ("isa_baseline", *(("pace", "bindings") if PACE in files else ())):
        compile_object(tree / f"csrc/cpu/{name}.cpp", tree / f"{name}.o")
    link(list(tree.glob("*.o")), tree / "dal_kernels/_native.abi3.so")
    return run_pytest("-q", "-x", "-k", "cpu", *files, cwd=tree, ATEN_CPU_CAPABILITY="default", PYTHONPATH=str(tree))


# ---- the Triton kernels

TRITON_SOURCES = "dal_kernels/backends/triton"
BY_EXECUTOR = {"DAL_TEST_TRITON": "executor asc"}


def run_triton_tests(
    selection: str, files: tuple[str, ...], folder: Path, prepare: Callable[[Path], None], **variables: str
) -> subprocess.CompletedProcess[str]:
    """Selected tests, up to the first that fails, of a copy of the sources that ``prepare`` has changed."""
    copy_sources(("dal_kernels", "tests", "benchmarks"), folder, "*.so")
    prepare(folder)
    # The copy lies elsewhere: the executor is found from here.
    paths = os.pathsep.join([str(folder), str(ROOT.parent / "shared")])
    return run_pytest("-q", "-x", "-k", selection, *files, cwd=folder, PYTHONPATH=paths, **variables)


# ---- what pytest says


# What a test raises that a faulty kernel fails: its own assertion, or what the executor of GPU code has found.
FAULTS = {
    "AssertionError",
    "Failed",
    "GlobalConflict",
    "GlobalRace",
    "Misaligned",
    "OutOfBounds",
    "SharedRace",
    "UninitializedShared",
}


def assert_caught(result: subprocess.CompletedProcess[str]) -> None:
    """One test failed by what it asserts: not by an import or a compilation, which any change to a source may break."""
    raised = re.findall(r"^\S+:\d+: (\w+)$", result.stdout, re.MULTILINE)
    found = re.findall(r"the emulator failed: (\w+)\(", result.stdout) or raised
    caught = result.returncode == 1 and "1 failed" in result.stdout and found and found[-1] in FAULTS
    assert caught, result.stdout[-3000:] + result.stderr[-2000:]
