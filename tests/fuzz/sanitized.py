"""The CPU's extension compiled anew with sanitizers, beside a copy of the package that takes it."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
from build_support import MACROS, jobs, run  # noqa: E402
from build_support.find_torch import torch_folder  # noqa: E402

COMPILE = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w"]


@dataclass(frozen=True)
class Sanitizers:
    """Some that go together in one build.

    Attributes:
        flags: of the compiler.
        libraries: of the sanitizers, which must come before all others of a Python that is not under them itself.
        options: variables of the environment by which they are set.
        changes: (file in csrc, its text, what is put in that text's place).
        sources: what is compiled beside the extension.
    """

    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    options: Mapping[str, str]
    changes: tuple[tuple[str, str, str], ...] = ()
    sources: tuple[Path, ...] = field(default=())

    def build(self, folder: Path) -> Path:
        """A copy of the package in ``folder`` with its extension, which is compiled once for its sources."""
        compiler, (torch, version) = os.environ.get("CXX", "g++"), torch_folder()
        texts = self.texts()
        content = repr((version, self.flags, sorted(texts.items()), [file.read_bytes() for file in self.sources]))
        built = folder / hashlib.sha256(content.encode()).hexdigest()[:16]
        extension = built / "_native.abi3.so"
        if not extension.exists():
            print("compiling with the sanitizers: some minutes", flush=True)
            for name, text in texts.items():
                (built / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
                (built / "csrc" / name).write_text(text, encoding="utf-8")
            include = [f"-I{torch / 'include'}", f"-I{sysconfig.get_path('include')}"]
            macros = [f"-D{name}={value}" for name, value in MACROS]

            def compile_one(source: Path) -> str:
                target = str(built / f"{source.stem}.o")
                run([compiler, *COMPILE, *self.flags, *macros, *include, "-c", str(source), "-o", target])
                return target

            with ThreadPoolExecutor(jobs()) as pool:
                objects = list(pool.map(compile_one, [*sorted((built / "csrc" / "cpu").glob("*.cpp")), *self.sources]))
            part = built / "part.so"
            run([compiler, "-shared", *self.flags, *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(part)])
            part.replace(extension)
        package = folder / "package" / "dal_kernels"
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(ROOT / "dal_kernels", package, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
        shutil.copy(extension, package)
        return package.parent

    def texts(self) -> dict[str, str]:
        """The sources by their paths in csrc, changed."""
        sources, csrc = {}, ROOT / "csrc"
        for file in sorted([*csrc.glob("*.h"), *(csrc / "cpu").iterdir()]):
            sources[file.relative_to(csrc).as_posix()] = file.read_text(encoding="utf-8")
        for name, text, other in self.changes:
            if sources[name].count(text) != 1:
                raise ValueError(f"csrc/{name} must have {text!r} once, to be changed for a sanitizer")
            sources[name] = sources[name].replace(text, other)
        return sources

    def environment(self, package: Path) -> dict[str, str]:
        """For a Python that takes the copy of the package."""
        compiler = os.environ.get("CXX", "g++")
        libraries = [run([compiler, f"-print-file-name=lib{name}.so"]).strip() for name in self.libraries]
        return {
            **os.environ,
            "LD_PRELOAD": " ".join(libraries),
            "PYTHONPATH": os.pathsep.join([str(package), str(ROOT / "tests")]),
            "PYTHONSAFEPATH": "1",
            **self.options,
        }


SANITIZERS = {
    # Python leaks on purpose.
    "memory": Sanitizers(
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
        ("asan", "ubsan"),
        {
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "OMP_NUM_THREADS": "2",
        },
    ),
    # Few elements are shared among threads too, and threads are never done without because the cores are busy.
    "threads": Sanitizers(
        ("-fsanitize=thread",),
        ("tsan",),
        {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1", "OMP_NUM_THREADS": "1"},
        (
            ("cpu/run.h", "kGrain = 16384;", "kGrain = 16;"),
            ("cpu/threads.h", "if (company.is_shunned(start)) return f(0, size);", ""),
        ),
        (Path(__file__).parent / "threads.cpp",),
    ),
}
