"""The CUDA extension with another plan.h, in a folder of its own: what the host reads of it is compiled again, the
kernels are those that the installation left in build/cuda.

    python -m benchmarks.gpu.plan_header kRowThreads 128 FOLDER
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.choices import CUDA, HEADER, Knob
from benchmarks.gpu.process import ROOT

sys.path.insert(0, str(ROOT / "csrc"))
from build_support import CannotBuildError, cuda, run
from build_support.find_torch import torch_folder

__all__ = ["CannotBuildError", "build_with", "ready"]


def _objects() -> list[str]:
    """What the last build linked of the kernels: by its list, because the newest files may be of other sources.

    Raises:
        CannotBuildError: it left nothing, because the package was installed from elsewhere.
    """
    linked = ROOT / cuda.CACHE / cuda.LINKED
    lines = linked.read_text(encoding="utf-8").splitlines() if linked.exists() else []
    found = [ROOT / line for line in lines if Path(line).name.startswith("kernels_")]
    if not found or not all(file.exists() for file in found):
        raise CannotBuildError("build/cuda has no object files of the kernels: install by `pip install -e .` here")
    return list(map(str, found))


def ready() -> None:
    """Miss something before anything is compiled.

    Raises:
        CannotBuildError: nvcc, torch's headers or the object files are not here.
    """
    cuda.find_nvcc()
    torch_folder()
    _objects()


def build_with(knob: Knob, value: int, folder: Path) -> None:
    """Puts a copy of the package below ``folder`` whose CUDA extension has that value, and a link to the benchmarks: a
    program that is started there with -m imports both from there.

    Raises:
        CannotBuildError: it cannot be compiled.
    """
    nvcc, (torch, _) = cuda.find_nvcc(), torch_folder()
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources, dirs_exist_ok=True)
    header = sources / HEADER.relative_to(ROOT / "csrc")
    header.write_text(knob.put(value, header.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copytree(ROOT / "dal_kernels", folder / "dal_kernels", dirs_exist_ok=True)
    (built,) = (folder / "dal_kernels").glob("_cuda*.so")
    built.unlink()
    include = [f"-I{path}" for path in (torch / "include", sysconfig.get_path("include"))]

    def compile_one(source: Path) -> str:
        target = source.with_suffix(".o")
        run([*cuda.compile_command(nvcc), *include, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor() as pool:
        host = list(pool.map(compile_one, sorted((sources / "cuda").glob("*.cpp"))))
    cuda.link(nvcc, [*host, *_objects()], built, [str(torch / "lib")])
    if not (folder / "benchmarks").exists():
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")


def main(argv: Sequence[str]) -> int:
    name, value, folder = argv
    (knob,) = (knob for knob in CUDA if knob.name == name)
    try:
        build_with(knob, int(value), Path(folder))
    except CannotBuildError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
