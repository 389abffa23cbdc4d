"""Builds the compiled kernels where it can; installs without them, and says why, where it cannot.

CPU kernels: a C++17 compiler (GCC or Clang), from CXX or the path.
CUDA kernels: nvcc from CUDA 12 on, from CUDA_HOME or the path, and a host compiler. DAL_KERNELS_CUDA=1 makes their
absence an error, 0 skips them. TORCH_CUDA_ARCH_LIST chooses the architectures, MAX_JOBS how many files are compiled at
once. Object files are kept in build/cuda, and made again only if something that goes into them changed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU_SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.c*") if path.suffix in (".cpp", ".cu"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.*h"))

# The oldest torch and Python that the binary must load under.
TORCH_TARGET = "0x020a000000000000"
PYTHON_TARGET = "0x030a0000"

MACROS = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", PYTHON_TARGET)]
CPU, CUDA = "dal_kernels._native", "dal_kernels._cuda"

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


# Compiled for these, as far as nvcc knows them, and left as PTX for what comes after the last.
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
CUDA_COMPILE = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


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


def cpu_extension(torch: Path, compiler: str) -> Extension:
    os.environ["CXX"] = os.environ.get("CXX", compiler)
    os.environ.setdefault("CC", compiler)  # setuptools compiles .cpp files with CC on some platforms
    return Extension(
        CPU,
        CPU_SOURCES,
        depends=HEADERS,
        include_dirs=[str(torch / "include")],
        define_macros=MACROS,
        extra_compile_args=COMPILE,
        # Found at run time where `import torch` has loaded them: no path is written into the binary.
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        py_limited_api=True,
    )


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if found is None:
        raise CannotBuildError(f"nvcc was not found {f'in CUDA_HOME, {home}' if home else 'on the path'}")
    return found


def architecture_flags(nvcc: str) -> list[str]:
    """For nvcc: binaries of TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") or of all that it knows, and PTX where asked for."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    wanted = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if wanted == [""]:
        wanted = [name for name in CUDA_ARCHITECTURES if name.replace(".", "") in known]
        wanted[-1:] = [f"{name}+PTX" for name in wanted[-1:]]
    flags = []
    for name in wanted:
        number, plus, _ = name.partition("+PTX")
        code = number.replace(".", "")
        if not re.fullmatch(r"\d+\.\d[af]?", number) or code.rstrip("af") not in known:
            accepted = ", ".join(sorted(known, key=int))
            raise CannotBuildError(f"TORCH_CUDA_ARCH_LIST names {name!r}; this nvcc knows compute {accepted}")
        flags += ["-gencode", f"arch=compute_{code},code=[sm_{code}{f',compute_{code}' if plus else ''}]"]
    return flags


def cuda_extension(torch: Path) -> Extension:
    nvcc = find_nvcc()
    return Extension(
        CUDA,
        CUDA_SOURCES,
        depends=HEADERS,
        include_dirs=[str(torch / "include"), sysconfig.get_path("include")],
        define_macros=MACROS,
        extra_compile_args=[nvcc, *architecture_flags(nvcc)],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        py_limited_api=True,
    )


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise CannotBuildError(f"{' '.join(command)} failed:\n{(result.stderr or result.stdout).strip()[-2000:]}")


def build_with_nvcc(ext: Extension, target: Path) -> None:
    """Compiles, in parallel, what was not compiled before, and links; the CUDA runtime goes in as a static library."""
    nvcc, *architectures = ext.extra_compile_args
    host = ["-ccbin", os.environ["CXX"].split()[0]] if os.environ.get("CXX") else []
    common = [nvcc, *host, *CUDA_COMPILE, *(f"-D{name}={value}" for name, value in ext.define_macros)]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    headers = b"".join(Path(header).read_bytes() for header in HEADERS)
    cache = Path("build/cuda")
    cache.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> str:
        device = source.endswith(".cu")  # knows nothing of torch
        flags = architectures if device else [f"-I{folder}" for folder in ext.include_dirs]
        content = repr((common, flags, version)).encode() + headers + Path(source).read_bytes()
        file = cache / f"{Path(source).stem}-{hashlib.sha256(content).hexdigest()[:16]}.o"
        if not file.exists():
            started = file.with_suffix(f".{os.getpid()}.o")
            run([*common, *flags, "-c", source, "-o", str(started)])
            started.replace(file)
        return str(file)

    # The longest first.
    sources = sorted(ext.sources, key=lambda source: not source.endswith(".cu"))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sources))
    target.parent.mkdir(parents=True, exist_ok=True)
    libraries = [*(f"-L{folder}" for folder in ext.library_dirs), *(f"-l{name}" for name in ext.libraries)]
    run([nvcc, *host, "-shared", "-cudart", "static", *objects, "-o", str(target), *libraries, "-ldl"])
    say(f"built the CUDA kernels with {nvcc} for {' '.join(architectures[1::2])}")


class BuildOrGoWithout(build_ext):
    """A failed compilation costs speed, not the installation."""

    def build_extension(self, ext: Any) -> None:
        try:
            if ext.name == CUDA:
                build_with_nvcc(ext, Path(self.get_ext_fullpath(ext.name)))
            else:
                super().build_extension(ext)
                say(f"built the CPU kernels with {os.environ['CXX']}")
        except Exception as error:
            go_without(ext.name, str(error))
            self.extensions = [other for other in self.extensions if other is not ext]


def go_without(name: str, reason: str) -> None:
    if name == CUDA:
        if os.environ.get("DAL_KERNELS_CUDA") == "1":
            raise SystemExit(f"dal_kernels: DAL_KERNELS_CUDA=1, but the CUDA kernels cannot be built: {reason}")
        say(f"installing without the CUDA C++ kernels: {reason}. On a GPU the loss needs Triton then.")
    else:
        say(
            f"WARNING: installing WITHOUT the compiled CPU kernels: {reason}. "
            "On CPU tensors the loss then runs as plain PyTorch operations: exact, but 10 to 30 times slower."
        )


def extensions() -> list[Extension]:
    makers = {
        CPU: lambda: cpu_extension(torch_folder(), working_compiler()),
        CUDA: lambda: cuda_extension(torch_folder()),
    }
    if os.environ.get("DAL_KERNELS_CUDA") == "0":
        del makers[CUDA]
    found = []
    for name, make in makers.items():
        try:
            found.append(make())
        except CannotBuildError as error:
            go_without(name, str(error))
    return found


compiled = extensions()
setup(
    ext_modules=compiled,
    cmdclass={"build_ext": BuildOrGoWithout},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if compiled else {},
)
