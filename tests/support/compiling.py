"""The C++ compiler of this machine: objects of the extension, and small programs that print what a header computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from support.children import ROOT

__all__ = ["COMPILER", "compile_object", "link", "needs_compiler", "output_of"]

COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
TORCH = Path(torch.__file__).parent

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def _run(*arguments: str | Path) -> None:
    subprocess.run([str(COMPILER), *map(str, arguments)], check=True)


def compile_object(source: Path, target: Path) -> None:
    """A part of an extension."""
    include = [f"-isystem{TORCH / 'include'}", f"-I{sysconfig.get_path('include')}"]
    _run(*FLAGS, *include, *DEFINES, "-c", source, "-o", target)


def link(objects: list[Path], library: Path) -> None:
    """An extension of its parts."""
    _run("-shared", *objects, "-o", library, f"-L{TORCH / 'lib'}", "-ltorch_cpu")


def output_of(text: str, folder: Path, *flags: str) -> str:
    """What a program prints that includes headers of csrc/cpu; it is made in ``folder``."""
    source, program = folder / "program.cpp", folder / "program"
    source.write_text(text)
    _run(*FLAGS, *flags, f"-I{ROOT / 'csrc/cpu'}", source, "-o", program)
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout
