"""Compiling the CUDA extension with nvcc: for which GPUs, and what has been compiled before."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from build_support import MACROS, CannotBuildError, jobs, run

# Compiled for these, as far as nvcc knows them, and left as PTX for what comes after the last.
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# Where object files are kept, and the list of those that the last build linked: beside them lie those of other sources
# and other flags, which may be newer.
CACHE, LINKED = Path("build/cuda"), "linked.txt"
COMPILE = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if found is None:
        raise CannotBuildError(
            f"nvcc was not found {f'in CUDA_HOME, {home}' if home else 'on the path'}. "
            "Install the CUDA toolkit, then dal_kernels again"
        )
    return found


def visible_gpus() -> list[str]:
    """The compute capabilities of this machine's NVIDIA GPUs, as "9.0", each once."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        printed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted(set(re.findall(r"^\d+\.\d$", printed, re.MULTILINE)), key=float)


def wanted(known: set[str], this_machine_only: bool, torch_is_for_gpus: bool) -> list[str]:
    """The targets as TORCH_CUDA_ARCH_LIST writes them ("9.0", "12.0+PTX"): what it asks for, or all.

    For this machine only: those of its GPUs.

    Raises:
        CannotBuildError: nobody asked for the CUDA kernels, and this machine has no GPU, or torch takes no CUDA
            tensors, beside which the many minutes that those for all GPUs take are lost.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if listed:
        return re.split(r"[;,\s]+", listed)
    names = visible_gpus() if this_machine_only else []
    why = ""
    if this_machine_only and not names:
        why = "this machine shows no NVIDIA GPU (nvidia-smi), and an editable installation is for this machine"
    elif not torch_is_for_gpus:
        why = "torch is its build for CPUs, which takes no CUDA tensors"
    if why and os.environ.get("DAL_KERNELS_CUDA") != "1":
        raise CannotBuildError(f"{why}. DAL_KERNELS_CUDA=1 or TORCH_CUDA_ARCH_LIST builds them all the same")
    names = names or [name for name in ARCHITECTURES if name.replace(".", "") in known]
    return [*names[:-1], f"{names[-1]}+PTX"]


def architecture_flags(nvcc: str, this_machine_only: bool, torch_is_for_gpus: bool) -> list[str]:
    """For nvcc: binaries of the wanted targets, and PTX where asked for."""
    known = set(re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"])))
    flags = []
    for name in wanted(known, this_machine_only, torch_is_for_gpus):
        number, plus, _ = name.partition("+PTX")
        code = number.replace(".", "")
        if not re.fullmatch(r"\d+\.\d[af]?", number) or code.rstrip("af") not in known:
            source = "TORCH_CUDA_ARCH_LIST names" if os.environ.get("TORCH_CUDA_ARCH_LIST") else "the GPU here has"
            raise CannotBuildError(f"{source} {name!r}; this nvcc knows compute {', '.join(sorted(known, key=int))}")
        flags += ["-gencode", f"arch=compute_{code},code=[sm_{code}{f',compute_{code}' if plus else ''}]"]
    return flags


def codes(flags: list[str]) -> list[str]:
    """What nvcc is told to make: sm_90 for binary code, compute_90 for PTX."""
    return [code for flag in flags for listed in re.findall(r"code=\[(.*)\]", flag) for code in listed.split(",")]


def _host_compiler() -> list[str]:
    return ["-ccbin", os.environ["CXX"].split()[0]] if os.environ.get("CXX") else []


def compile_command(nvcc: str) -> list[str]:
    """What compiles any file of the extension, but for where torch's headers are and for which GPUs."""
    return [nvcc, *_host_compiler(), *COMPILE, *(f"-D{name}={value}" for name, value in MACROS)]


def link(nvcc: str, objects: list[str], target: Path, library_dirs: list[str]) -> None:
    """Against torch's library; the CUDA runtime goes in as a static one."""
    libraries = [*(f"-L{folder}" for folder in library_dirs), "-ltorch_cpu", "-ldl"]
    run([nvcc, *_host_compiler(), "-shared", "-cudart", "static", *objects, "-o", str(target), *libraries])


def build(ext: Any, target: Path, headers: list[str]) -> str:
    """Compiles, in parallel, what was not compiled before, and links.

    Returns:
        What was built, by what and for which GPUs.
    """
    nvcc, *architectures = ext.extra_compile_args
    common = compile_command(nvcc)
    version = run([nvcc, "--version"])
    header_bytes = b"".join(Path(header).read_bytes() for header in headers)
    CACHE.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> str:
        device = source.endswith(".cu")  # knows nothing of torch
        flags = architectures if device else [f"-I{folder}" for folder in ext.include_dirs]
        content = repr((common, flags, version)).encode() + header_bytes + Path(source).read_bytes()
        file = CACHE / f"{Path(source).stem}-{hashlib.sha256(content).hexdigest()[:16]}.o"
        if not file.exists():
            started = file.with_suffix(f".{os.getpid()}.o")
            run([*common, *flags, "-c", source, "-o", str(started)])
            started.replace(file)
        return str(file)

    # The longest first.
    sources = sorted(ext.sources, key=lambda source: not source.endswith(".cu"))
    with ThreadPoolExecutor(jobs()) as pool:
        objects = list(pool.map(compile_one, sources))
    target.parent.mkdir(parents=True, exist_ok=True)
    link(nvcc, objects, target, ext.library_dirs)
    (CACHE / LINKED).write_text("\n".join(objects), encoding="utf-8")
    return f"with {nvcc} for {' '.join(architectures[1::2])}"
