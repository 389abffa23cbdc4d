"""Builds the compiled CPU kernels where it can; installs without them, and says why, where it cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))

# The oldest torch and Python that the binary must load under.
TORCH_TARGET = "0x020a000000000000"
PYTHON_TARGET = "0x030a0000"

COMPILE = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
]


class CannotBuildError(Exception):
    """Why there will be no compiled kernels, in words for the person who installs."""


def say(message: str) -> None:
    print(f"dal_kernels: {message}", file=sys.stderr, flush=True)


def torch_folder() -> Path:
    """The installed torch, also from within pip's isolated build environment, which does not have it on its path."""
    sys.path.append(sysconfig.get_path("platlib"))
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuildError(f"torch is not installed for {sys.executable}; install torch first, then dal_kernels")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 10):
        raise CannotBuildError(f"torch {version} is older than 2.10")
    return Path(spec.origin).parent


def working_compiler() -> str:
    """A compiler with C++17 and vector extensions: GCC or Clang, from CXX or the path."""
    wanted = os.environ.get("CXX", "").split()[:1]
    tried = [name for name in (*wanted, "g++", "clang++", "c++") if shutil.which(name)]
    if wanted and wanted[0] not in tried:
        raise CannotBuildError(f"the compiler that CXX names, {wanted[0]}, was not found")
    if not tried:
        raise CannotBuildError("no C++ compiler was found (g++, clang++ or c++)")
    program = "typedef float v __attribute__((vector_size(16))); template <class T> constexpr bool b = true;"
    program += " int main() { if constexpr (b<v>) return 0; }"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(program)
        result = subprocess.run(
            [tried[0], "-std=c++17", str(source), "-o", str(Path(folder, "probe"))], capture_output=True, text=True
        )
    if result.returncode != 0:
        raise CannotBuildError(f"{tried[0]} cannot build a C++17 program: {result.stderr.strip()[:500]}")
    return tried[0]


def native_extension(torch: Path, compiler: str) -> Extension:
    os.environ["CXX"] = os.environ.get("CXX", compiler)
    os.environ.setdefault("CC", compiler)  # setuptools compiles .cpp files with CC on some platforms
    return Extension(
        "dal_kernels._native",
        SOURCES,
        depends=HEADERS,
        include_dirs=[str(torch / "include")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", PYTHON_TARGET)],
        extra_compile_args=COMPILE,
        # Found at run time where `import torch` has loaded them: no path is written into the binary.
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        py_limited_api=True,
    )


class BuildOrGoWithout(build_ext):
    """A failed compilation costs speed, not the installation."""

    def build_extension(self, ext: Any) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            warn(str(error))
            self.extensions = [other for other in self.extensions if other is not ext]
        else:
            say(f"built the compiled CPU kernels with {os.environ['CXX']}")


def warn(reason: str) -> None:
    say(
        f"WARNING: installing WITHOUT the compiled CPU kernels: {reason}. "
        "On CPU tensors the loss then runs as plain PyTorch operations: exact, but 10 to 30 times slower."
    )


def extensions() -> list[Extension]:
    try:
        return [native_extension(torch_folder(), working_compiler())]
    except CannotBuildError as error:
        warn(str(error))
        return []


native = extensions()
setup(
    ext_modules=native,
    cmdclass={"build_ext": BuildOrGoWithout},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
)
