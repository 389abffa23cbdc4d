"""Call the C++ operators of the CPU with anything, under the address and undefined-behaviour sanitizers.

    make fuzz                                          ten minutes; first the corpus, then what hypothesis makes up
    make fuzz ARGS="--minutes 1 --seed 7"
    make fuzz ARGS="--replay build/fuzz/found.json"    one call again

The extension is compiled anew with the sanitizers, in build/fuzz. What ends the process is kept as
build/fuzz/found.json; once mended it belongs into tests/fuzz/corpus. Needs Linux and GCC.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
from build_support import MACROS, jobs, run  # noqa: E402
from build_support.find_torch import torch_folder  # noqa: E402

BUILD, CORPUS = ROOT / "build" / "fuzz", Path(__file__).parent / "corpus"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
COMPILE = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w"]


def build() -> Path:
    """A copy of the package with the CPU's extension under the sanitizers, which is compiled once for its sources."""
    compiler, (torch, version) = os.environ.get("CXX", "g++"), torch_folder()
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    content = hashlib.sha256(version.encode())
    for file in sorted((ROOT / "csrc").rglob("*")):
        if file.suffix in (".h", ".cpp"):
            content.update(file.read_bytes())
    folder = BUILD / content.hexdigest()[:16]
    extension = folder / "_native.abi3.so"
    if not extension.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print("compiling with the sanitizers: some minutes", flush=True)
        include = [f"-I{torch / 'include'}", f"-I{sysconfig.get_path('include')}"]
        macros = [f"-D{name}={value}" for name, value in MACROS]

        def compile_one(source: Path) -> str:
            target = str(folder / f"{source.stem}.o")
            run([compiler, *COMPILE, *SANITIZE, *macros, *include, "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(jobs()) as pool:
            objects = list(pool.map(compile_one, sources))
        part = folder / "part.so"
        run([compiler, "-shared", *SANITIZE, *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(part)])
        part.replace(extension)
    package = BUILD / "package" / "dal_kernels"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "dal_kernels", package, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    shutil.copy(extension, package)
    return package.parent


def environment(package: Path) -> dict[str, str]:
    """For a Python that is not under the sanitizers itself: their libraries come first. It leaks on purpose."""
    compiler = os.environ.get("CXX", "g++")
    libraries = [run([compiler, f"-print-file-name=lib{name}.so"]).strip() for name in ("asan", "ubsan")]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": os.pathsep.join([str(package), str(ROOT / "tests")]),
        "PYTHONSAFEPATH": "1",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if nothing was found, 1 if something was, 2 if nothing could be called."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first calls (the time)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="make the call of that file, and no other")
    given = parser.parse_args(argv)
    package = build()
    # Not found.json itself, because that of an earlier run is kept until there is another.
    current, found, corpus, seconds = BUILD / "current.json", BUILD / "found.json", CORPUS, 60 * given.minutes
    if given.replay is not None:
        corpus, seconds, content = BUILD / "replay", 0.0, given.replay.read_bytes()
        shutil.rmtree(corpus, ignore_errors=True)
        corpus.mkdir()
        found = corpus / "call.json"
        found.write_bytes(content)
    current.unlink(missing_ok=True)
    print(f"seed {given.seed}, {seconds:.0f} s", flush=True)
    command = [sys.executable, "-m", "fuzz.worker", *map(str, (current, corpus, seconds, given.seed))]
    status = subprocess.run(command, env=environment(package), cwd=BUILD).returncode
    if status and not current.exists():
        print(f"the worker did not start: its exit status is {status}, and it made no call")
        return 2
    if status:
        current.replace(found)
        print(f"found with seed {given.seed}, exit status {status}: {found}\n{found.read_text(encoding='utf-8')}")
        return 1
    current.unlink(missing_ok=True)
    print("nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
