"""What is installed: with and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from dal_kernels import extensions
from support.children import ROOT, printed_by

# What the build listens to: a test says it, not the machine.
BUILD_VARIABLES = ("CXX", "CC", "CUDA_HOME", "CUDA_PATH", "DAL_KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST")


def build(source: Path, *what: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *what],
        cwd=source,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_without_a_compiler_it_installs_and_says_what_is_lost(source_tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    hidden = {"CXX": "no-such-compiler", "CC": "no-such-compiler", "CUDA_HOME": str(tmp_path)}
    result = build(source_tree, "bdist_wheel", "-d", str(tmp_path), **hidden)
    (said,) = (line for line in result.stderr.splitlines() if "WITHOUT the compiled CPU kernels" in line)
    assert "no-such-compiler" in said
    assert f"without the CUDA C++ kernels: nvcc was not found in CUDA_HOME, {tmp_path}" in result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # An editable installation's finder would lend the unpacked package the compiled module of this tree.
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, warnings, dal_kernels
assert dal_kernels.__file__.startswith({site!r}), dal_kernels.__file__
reason = dal_kernels.available_backends()["cpu"]
assert reason.startswith("not available") and "CXX names, no-such-compiler, was not found" in reason, reason
reason = dal_kernels.available_backends()["cuda"]
assert reason.startswith("not available") and "nvcc" in reason, reason
logits = torch.randn(4, 5, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        dal_kernels.dynamics_aware_loss(logits, torch.arange(4), 0.7).backward()
assert len(caught) == 1 and "exact but slower" in str(caught[0].message), caught
assert "no-such-compiler" in str(caught[0].message), caught
try:
    dal_kernels.dynamics_aware_loss(logits, torch.arange(4), 0.7, backend="cpu")
except RuntimeError as error:
    assert "no-such-compiler" in str(error)
else:
    raise SystemExit("no error")
"""
    site = str(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": site}
    subprocess.run([sys.executable, "-c", program.format(site=site)], cwd=tmp_path, env=environment, check=True)


def test_the_trainer_comes_with_the_wheel(source_tree: Path, tmp_path: Path) -> None:
    """In an empty folder, with nothing on Python's path but the installed wheel and what torch lies beside."""
    for module in ("setuptools", "sklearn", "tqdm"):
        pytest.importorskip(module)
    build(source_tree, "bdist_wheel", "-d", str(tmp_path), CXX="no-such-compiler", CUDA_HOME=str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), wheel]
    subprocess.run(command, cwd=empty, check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(Path(torch.__file__).parent.parent)])}
    arguments = ["train", "--data", "digits", "--noise", "0.4", "--epochs", "2", "--output", "out"]
    trained = subprocess.run(
        [str(site / "bin" / "dal-train"), *arguments],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert trained.returncode == 0, trained.stderr
    assert "test accuracy" in trained.stdout
    assert len(list(empty.glob("out/digits/*/metrics.csv"))) == 1
    program = "import dal_kernels.training; print(dal_kernels.training.__file__)"
    finder = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
    file = subprocess.check_output([sys.executable, "-c", finder + program], cwd=empty, env=environment, text=True)
    assert file.startswith(str(site))


def test_the_package_imports_nothing_of_the_trainer() -> None:
    program = """
import sys, torch
before = set(sys.modules)
import dal_kernels
heavy = ("dal_kernels.training", "sklearn", "matplotlib", "PIL", "tqdm", "tabulate", "yaml")
found = [name for name in set(sys.modules) - before if name.startswith(heavy)]
assert not found, found
"""
    printed_by("-c", program)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"CUDA_HOME": "/nowhere"}, "nvcc was not found in CUDA_HOME, /nowhere"),
        ({"TORCH_CUDA_ARCH_LIST": "9.0;6.66"}, "TORCH_CUDA_ARCH_LIST names '6.66'; this nvcc knows compute "),
    ],
    ids=["no nvcc", "no such architecture"],
)
def test_cuda_that_is_asked_for_must_be_built(source_tree: Path, environment: dict[str, str], sentence: str) -> None:
    pytest.importorskip("setuptools")
    if "CUDA_HOME" not in environment and shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    with pytest.raises(subprocess.CalledProcessError) as failure:
        build(source_tree, "build_ext", DAL_KERNELS_CUDA="1", CXX="no-such-compiler", **environment)
    assert f"DAL_KERNELS_CUDA=1, but the CUDA kernels cannot be built: {sentence}" in failure.value.stderr


def test_the_wheel_of_compiled_kernels_works_on_its_own(source_tree: Path, tmp_path: Path) -> None:
    """One for all Pythons from 3.10 on, installed where nothing of the source tree is, but torch."""
    pytest.importorskip("setuptools")
    compiled = [path for path in (ROOT / "dal_kernels").glob("*.abi3.so") if path.name.startswith("_native")]
    if not compiled or shutil.which("g++") is None:
        pytest.skip("needs the compiled CPU kernels and the compiler that made them")
    # What is there is packed; to compile it once more would take a minute.
    (source_tree / "setup.cfg").write_text("[build]\nbuild_lib = built\n")
    build(source_tree, "build_py", DAL_KERNELS_CUDA="0")
    shutil.copy(compiled[0], source_tree / "built" / "dal_kernels")
    build(source_tree, "bdist_wheel", "--skip-build", "-d", str(tmp_path), DAL_KERNELS_CUDA="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    # torch, which is too large to install twice, from here; but not the finder of an editable installation.
    program = f"""
import sys
sys.path.append({str(Path(torch.__file__).parent.parent)!r})
import torch, dal_kernels
from importlib import resources
assert dal_kernels.__file__.startswith({str(tmp_path / "venv")!r}), dal_kernels.__file__
assert resources.files(dal_kernels).joinpath("py.typed").is_file()
logits = torch.randn(40, 50, requires_grad=True)
criterion = dal_kernels.DynamicsAwareLoss(total_steps=2, pace="fixed", backend="cpu")
criterion(logits, torch.arange(40)).backward()
again = torch.autograd.grad(
    dal_kernels.dynamics_aware_loss(logits, torch.arange(40), 0.6, backend="eager"), logits)[0]
torch.testing.assert_close(logits.grad, again)
"""
    subprocess.run([python, "-c", program], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("same_sources", [False, True])
def test_what_an_earlier_build_left_is_kept_in_place_if_it_is_of_the_same_sources(
    source_tree: Path, inplace: bool, same_sources: bool
) -> None:
    """Else the record says that there is none, or a wheel would be packed with it."""
    pytest.importorskip("setuptools")
    folders = [source_tree / "build/lib/dal_kernels", source_tree / "dal_kernels"]
    earlier = {"_native": None, "_cuda": None, "_node": "no reason"}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("_native", "_cuda"):
            (folder / f"{name}.abi3.so").write_bytes(b"old")
        extensions.write_record(folder, source_tree / "csrc", earlier, "2.13.0", ["sm_90"])
    if not same_sources:
        (source_tree / "csrc" / "new.h").write_text("")
    options = ["--inplace"] if inplace else []
    build(source_tree, "build_ext", "--build-lib", "build/lib", *options, CXX="no-such-compiler", DAL_KERNELS_CUDA="0")
    kept = inplace and same_sources
    left = [folder for folder in folders if list(folder.glob("*.so"))]
    assert left == (folders if kept else [] if inplace else folders[1:])
    record = extensions.read_record(folders[inplace])
    assert record["missing"]["_cuda"] == (None if kept else "DAL_KERNELS_CUDA=0 was set")
    assert record["architectures"] == (["sm_90"] if kept else [])
    assert kept or "no-such-compiler" in record["missing"]["_native"]
    assert record["missing"]["_node"] is not None


def test_the_node_is_built_again_though_its_file_is_newer_than_its_sources(source_tree: Path, tmp_path: Path) -> None:
    """It may be of another torch, of which the times of files know nothing."""
    pytest.importorskip("setuptools")
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\nexit 0\n'
    )
    compiler.chmod(0o755)
    for _ in range(2):
        log.write_text("")
        build(source_tree, "build_ext", "--build-lib", "build/lib", CXX=str(compiler), DAL_KERNELS_CUDA="0")
        (built,) = (source_tree / "build/lib/dal_kernels").glob("_node*")
        os.utime(built, (2**31, 2**31))
        assert "csrc/autograd/bindings.cpp" in log.read_text()


def test_without_a_gpu_an_editable_installation_has_no_cuda_kernels(source_tree: Path, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    no_gpu = tmp_path / "nvidia-smi"
    no_gpu.write_text("#!/bin/sh\nexit 9\n")
    no_gpu.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    result = build(source_tree, "build_ext", "--inplace", CXX="no-such-compiler", PATH=path)
    assert "without the CUDA C++ kernels: this machine shows no NVIDIA GPU" in result.stderr


@pytest.mark.parametrize(
    "environment",
    [{}, {"DAL_KERNELS_CUDA": "0"}, {"CUDA_HOME": "/nowhere", "CXX": "no-such-compiler"}],
    ids=["as here", "no CUDA", "no compilers"],
)
def test_the_source_distribution_has_what_a_build_needs(
    source_tree: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Whatever the machine has on which it is made."""
    pytest.importorskip("setuptools")
    build(source_tree, "sdist", "-d", str(tmp_path), **environment)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    folders = ("csrc", "dal_kernels", "tests", "benchmarks")
    needed = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*")]
    needed = [path for path in needed if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py", ".typed")]
    others = ("LICENSE", "Makefile", "README.md", "requirements-dev.txt", "pyproject.toml", "setup.py")
    missing = [str(path) for path in (*needed, *map(Path, others)) if not (unpacked / path).exists()]
    assert not missing
    assert not [path for path in unpacked.rglob("*") if path.suffix in (".so", ".pyc") or path.name == "_build.json"]
