"""Builds the compiled kernels where it can; installs without them, and says why, where it cannot.

CPU kernels: a C++17 compiler (GCC or Clang), from CXX or the path.
The autograd node, which makes calls cheaper: the same compiler, with C++20; for the torch and the Python that are here.
CUDA kernels: nvcc from CUDA 12 on, from CUDA_HOME or the path, and a host compiler. A wheel is for every GPU that nvcc
knows, an editable installation for the GPUs of this machine; beside a torch for CPUs they are left out, unless asked
for. TORCH_CUDA_ARCH_LIST chooses the architectures, and asks for them; DAL_KERNELS_CUDA=1 makes it an error if the CUDA
kernels cannot be built, 0 skips them. Object files are kept in build/cuda, and made again only if something that goes
into them changed. MAX_JOBS files are compiled at once.

On Windows nothing is compiled. On a Mac nobody has tried yet (Apple's clang takes the flags of Clang). See
csrc/build_support/platforms.py.

All extensions are always declared, whatever can be built here: a source distribution is the same on every machine.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

sys.path.insert(0, str(Path(__file__).parent / "csrc"))

if int(setuptools.__version__.split(".")[0]) < 77:  # nobody looks at what pyproject.toml requires without isolation
    raise SystemExit(
        f"dal_kernels: setuptools {setuptools.__version__} is too old to build it without isolation; "
        "first: pip install --upgrade 'setuptools>=77'"
    )

from setuptools.command.bdist_wheel import bdist_wheel

from build_support import MACROS, CannotBuildError, archive, cuda, jobs, platforms, run, say
from build_support.find_torch import is_for_gpus, torch_folder

CPU_SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.c*") if path.suffix in (".cpp", ".cu"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.*h") if path.parent.name != "autograd")
NODE_SOURCES, NODE_HEADERS = (sorted(map(str, Path("csrc/autograd").glob(f"*.{kind}"))) for kind in ("cpp", "h"))

CPU, CUDA, NODE = "dal_kernels._native", "dal_kernels._cuda", "dal_kernels._node"

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

# torch's own headers are C++20 in its newest versions. There is nothing in it for an optimiser.
NODE_COMPILE = ["-std=c++20", "-O2", "-g0", "-fvisibility=hidden"]

# Python's builds without a global lock have had no stable ABI so far.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

# By path: the package itself cannot be imported without torch.
extensions = runpy.run_path("dal_kernels/extensions.py")


def working_compiler() -> str:
    """A compiler with C++17 and vector extensions: GCC or Clang, from CXX or the path."""
    wanted = os.environ.get("CXX", "").split()[:1]
    tried = [name for name in (*wanted, "g++", "clang++", "c++") if shutil.which(name)]
    if wanted and wanted[0] not in tried:
        raise CannotBuildError(f"the compiler that CXX names, {wanted[0]}, was not found")
    if not tried:
        raise CannotBuildError(
            "no C++ compiler was found (g++, clang++ or c++). Install GCC or Clang, then dal_kernels again"
        )
    program = "typedef float v __attribute__((vector_size(16))); template <class T> constexpr bool b = true;"
    program += " int main() { if constexpr (b<v>) return 0; }"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(program)
        try:
            run([tried[0], "-std=c++17", str(source), "-o", str(Path(folder, "probe"))])
        except CannotBuildError as error:
            raise CannotBuildError(f"{tried[0]} cannot build a C++17 program: {error}") from error
    return tried[0]


class BuildOrGoWithout(build_ext):
    """A compilation that is not possible, or fails, costs speed, not the installation; the reason is recorded."""

    def run(self) -> None:
        platforms.for_this_machine_only(sys.platform, platform.machine(), os.environ)
        self.for_this_machine = bool(self.inplace)
        self.missing: dict[str, str | None] = {}
        self.torch_version: str | None = None
        self.architectures: list[str] = []
        # What an earlier build left in place: of the same sources it is as good as what would be built now.
        before = extensions["read_record"](Path("dal_kernels")) if self.inplace else {}
        self.earlier = before if before.get("sources") == extensions["digest"](Path("csrc")) else {}
        declared, self.extensions = self.extensions, []
        for ext in declared:
            try:
                self.prepare(ext)
            except CannotBuildError as error:
                self.go_without(ext, str(error))
            else:
                self.extensions.append(ext)
                self.missing[ext.name.rpartition(".")[2]] = None
        super().run()
        folder = Path(self.get_ext_fullpath(CPU)).parent
        extensions["write_record"](folder, Path("csrc"), self.missing, self.torch_version, self.architectures)

    def prepare(self, ext: Extension) -> None:
        """Says to an extension where torch and its compiler are.

        Raises:
            CannotBuildError: something for it is not there, or it is not wanted.
        """
        if ext.name == CUDA and os.environ.get("DAL_KERNELS_CUDA") == "0":
            raise CannotBuildError("DAL_KERNELS_CUDA=0 was set")
        platforms.check(sys.platform)
        if FREE_THREADED:
            raise CannotBuildError("this Python runs without a global lock and has no stable ABI to build for")
        torch, self.torch_version = torch_folder()
        if ext.name == CUDA:
            ext.include_dirs = [sysconfig.get_path("include")]
            nvcc = cuda.find_nvcc()
            flags = cuda.architecture_flags(nvcc, self.for_this_machine, is_for_gpus(torch))
            ext.extra_compile_args = [nvcc, *flags]
        else:
            compiler = working_compiler()
            os.environ["CXX"] = os.environ.get("CXX", compiler)
            os.environ.setdefault("CC", compiler)  # setuptools compiles .cpp files with CC on some platforms
        ext.include_dirs.append(str(torch / "include"))
        # Found at run time where `import torch` has loaded it: no path is written into the binary.
        ext.library_dirs = [str(torch / "lib")]

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name == CUDA:
                how = cuda.build(ext, Path(self.get_ext_fullpath(ext.name)), HEADERS)
                self.architectures = cuda.codes(ext.extra_compile_args)
                say(f"built the CUDA kernels {how}")
            else:
                if ext.name == NODE:
                    # setuptools compares times, and would take one that was built for another torch for up to date.
                    Path(self.get_ext_fullpath(NODE)).unlink(missing_ok=True)
                self.compile_in_parallel()
                super().build_extension(ext)
                what = "CPU kernels" if ext.name == CPU else "autograd node"
                say(f"built the {what} with {os.environ['CXX']} and the headers of torch {self.torch_version}")
        except Exception as error:
            self.go_without(ext, str(error))

    def compile_in_parallel(self) -> None:
        """setuptools takes one file after the other."""
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(jobs()) as pool:
                return [made for [made] in pool.map(lambda source: compile_all([source], **options), sources)]

        self.compiler.compile = compile_each

    def go_without(self, ext: Extension, reason: str) -> None:
        self.extensions = [other for other in self.extensions if other is not ext]
        if ext.name == CUDA and os.environ.get("DAL_KERNELS_CUDA") == "1":
            raise SystemExit(f"dal_kernels: DAL_KERNELS_CUDA=1, but the CUDA kernels cannot be built: {reason}")
        name = ext.name.rpartition(".")[2]
        if self.keeps(ext, name):
            self.missing[name] = None
            say(f"keeping {name} of an earlier build, which was made from the same sources; it was not built: {reason}")
            return
        self.missing[name] = reason
        # One from an earlier build of other sources would be packed, or imported.
        for inplace in {False, self.for_this_machine}:
            self.inplace = inplace
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        if ext.name == CUDA:
            say(f"installing without the CUDA C++ kernels: {reason}. On a GPU the loss needs Triton then.")
        elif ext.name == NODE:
            say(f"installing without the autograd node: {reason}. A call of the loss costs the host more time then.")
        else:
            say(
                f"WARNING: installing WITHOUT the compiled CPU kernels: {reason}. "
                "On CPU tensors the loss then runs as plain PyTorch operations: exact, but 10 to 30 times slower."
            )

    def keeps(self, ext: Extension, name: str) -> bool:
        """Whether an earlier build of the same sources is in place and of use: the autograd node to its torch alone."""
        built = self.earlier.get("missing", {}).get(name, "not known") is None
        there = built and Path("dal_kernels", Path(self.get_ext_fullpath(ext.name)).name).exists()
        if ext.name == CUDA and there:
            self.architectures = self.earlier["architectures"]
        return there and (ext.name != NODE or self.earlier["torch"] == self.torch_version)

    def get_output_mapping(self) -> dict[str, str]:
        """Of what is built to where it lies in place: also the record, for an editable installation of links."""
        mapping: dict[str, str] = super().get_output_mapping()
        record = f"dal_kernels/{extensions['RECORD']}"
        return {**mapping, str(Path(self.build_lib, record)): record} if self.inplace else mapping


class TagByContent(bdist_wheel):
    """The wheel is for one platform if an extension is in it, for all if none could be built."""

    def get_tag(self) -> tuple[str, str, str]:
        where = self.get_finalized_command("build_ext")
        self.root_is_pure = not any(Path(where.get_ext_fullpath(name)).exists() for name in (CPU, CUDA, NODE))
        return super().get_tag()


class SameBytes(sdist):
    """The source distribution of the same sources is the same file where SOURCE_DATE_EPOCH says of when it is."""

    def make_archive(self, base_name: Any, format: str, *arguments: Any, **options: Any) -> Any:
        time = os.environ.get("SOURCE_DATE_EPOCH")
        if format != "gztar" or time is None:
            return super().make_archive(base_name, format, *arguments, **options)
        target = Path(f"{base_name}.tar.gz")
        target.parent.mkdir(parents=True, exist_ok=True)
        archive.write_tar(Path(options["base_dir"]), target, int(time))
        return str(target)


shared = {"depends": HEADERS, "define_macros": MACROS, "libraries": ["torch_cpu"], "py_limited_api": True}
setup(
    ext_modules=[
        Extension(CPU, CPU_SOURCES, extra_compile_args=COMPILE, **shared),
        Extension(CUDA, CUDA_SOURCES, **shared),
        Extension(
            NODE,
            NODE_SOURCES,
            depends=[*HEADERS, *NODE_HEADERS],
            extra_compile_args=NODE_COMPILE,
            libraries=["torch_python", "torch", "torch_cpu", "c10"],
        ),
    ],
    cmdclass={"build_ext": BuildOrGoWithout, "bdist_wheel": TagByContent, "sdist": SameBytes},
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
