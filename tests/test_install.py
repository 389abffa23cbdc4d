"""What is installed: with and without a compiler, and the example of the README."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__", "demo-output", "bench-output")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def build(source: Path, *what: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *what],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_without_a_compiler_it_installs_and_says_what_is_lost(source_tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    hidden = {"CXX": "no-such-compiler", "CC": "no-such-compiler", "CUDA_HOME": str(tmp_path)}
    result = build(source_tree, "bdist_wheel", "-d", str(tmp_path), **hidden)
    assert "WITHOUT the compiled CPU kernels" in result.stderr
    assert "no-such-compiler" in result.stderr
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
assert reason.startswith("not available") and "compiler" in reason, reason
reason = dal_kernels.available_backends()["cuda"]
assert reason.startswith("not available") and "nvcc" in reason, reason
logits = torch.randn(4, 5, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        dal_kernels.dynamics_aware_loss(logits, torch.arange(4), 0.7).backward()
assert len(caught) == 1 and "exact but slower" in str(caught[0].message), caught
try:
    dal_kernels.dynamics_aware_loss(logits, torch.arange(4), 0.7, backend="cpu")
except RuntimeError as error:
    assert "compiler" in str(error)
else:
    raise SystemExit("no error")
"""
    site = str(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": site}
    subprocess.run([sys.executable, "-c", program.format(site=site)], cwd=tmp_path, env=environment, check=True)


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
        build(source_tree, "--name", DAL_KERNELS_CUDA="1", **environment)
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
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    # torch, which is too large to install twice, from here; but not the finder of an editable installation.
    program = f"""
import sys
sys.path.append({str(Path(torch.__file__).parent.parent)!r})
import torch, dal_kernels
from importlib import resources
assert dal_kernels.__file__.startswith({str(tmp_path / "venv")!r}), dal_kernels.__file__
assert resources.files(dal_kernels).joinpath("py.typed").is_file()
logits = torch.randn(40, 50, requires_grad=True)
criterion = dal_kernels.DynamicsAwareLoss(total_steps=2, backend="cpu")
criterion(logits, torch.arange(40)).backward()
again = torch.autograd.grad(
    dal_kernels.dynamics_aware_loss(logits, torch.arange(40), 0.6, backend="eager"), logits)[0]
torch.testing.assert_close(logits.grad, again)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-c", program], cwd=tmp_path, env=environment, check=True)


def test_the_source_distribution_has_what_a_build_needs(source_tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    build(source_tree, "sdist", "-d", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    needed = [path.relative_to(ROOT) for folder in ("csrc", "dal_kernels") for path in (ROOT / folder).rglob("*")]
    needed = [path for path in needed if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py", ".typed")]
    missing = [str(path) for path in (*needed, Path("LICENSE"), Path("setup.py")) if not (unpacked / path).exists()]
    assert not missing


def test_the_example_of_the_readme_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    model = torch.nn.Linear(3, 4)
    names = {"epochs": 2, "loader": [(torch.randn(5, 3), torch.randint(4, (5,)))], "model": model}
    exec(example, names)
    assert names["criterion"].schedule.position == 2  # type: ignore[attr-defined]
    assert model.weight.grad is not None
