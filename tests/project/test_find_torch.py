"""Where a build looks for torch, with stand-ins for torch and for Pythons: see csrc/build_support/find_torch.py."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from build_support import CannotBuildError, cuda, find_torch
from build_support.find_torch import FrontEnd

NO_FRONT_END = FrontEnd([], {}, None)


def make_torch(folder: Path, version: str = "2.13.0+cpu") -> Path:
    """A torch that can be found, not imported."""
    torch = folder / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text("raise ImportError('nobody should import it')")
    (torch / "version.py").write_text(f"__version__ = {version!r}\n")
    return torch


def make_python(venv: Path, prints: str = "") -> str:
    python = venv / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho '{prints}'\n")
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize(
    ("arguments", "environment", "folder"),
    [
        (["{venv}/bin/python3", "-m", "build"], {}, None),
        (["uv", "pip", "install", "--python", "{venv}"], {}, None),
        (["uv", "pip", "install", "--python={venv}/bin/python3"], {}, None),
        (["uv", "pip", "install"], {"VIRTUAL_ENV": "{venv}"}, None),
        (["uv", "pip", "install"], {"CONDA_PREFIX": "{venv}"}, None),
        (["uv", "sync"], {}, "{project}/below"),
    ],
    ids=["build", "uv --python folder", "uv --python=file", "active venv", "active conda", "uv's .venv"],
)
def test_the_python_of_a_front_end_is_asked(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], folder: str | None
) -> None:
    names = {"project": tmp_path, "venv": tmp_path / ".venv"}
    python = make_python(names["venv"])
    front = FrontEnd(
        [text.format(**names) for text in arguments],
        {name: text.format(**names) for name, text in environment.items()},
        Path(folder.format(**names)) if folder else None,
    )
    assert python not in find_torch.candidates(NO_FRONT_END)
    found = list(find_torch.candidates(front))
    assert found[0] == sys.executable
    assert found[1] == python
    assert len(found) == len(set(found))


def test_pythons_on_the_path_and_the_base_interpreter_are_asked_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = make_python(tmp_path)
    monkeypatch.setenv("PATH", str(Path(python).parent))
    monkeypatch.setattr(sys, "_base_executable", make_python(tmp_path / "base"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    expected = [sys.executable, python, str(tmp_path / "base" / "bin" / "python3")]
    assert list(find_torch.candidates(NO_FRONT_END)) == expected


def test_what_pip_hides_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user site and PYTHONPATH, which pip's isolation takes from the process that builds."""
    base = getattr(sys, "_base_executable", sys.executable)
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "of pip"))
    by_path = make_torch(tmp_path / "path")
    front = FrontEnd([], {"PYTHONPATH": str(by_path.parent)}, tmp_path)
    assert find_torch.ask(base, front) == by_path
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "user"))
    in_user_site = make_torch(tmp_path / "user" / "lib" / version / "site-packages")
    assert find_torch.ask(base, FrontEnd([], {}, tmp_path)) == in_user_site


def test_a_python_that_cannot_run_is_passed_over(tmp_path: Path) -> None:
    python = Path(make_python(tmp_path))
    python.write_text("#!/no/such/interpreter\n")
    assert find_torch.ask(str(python), NO_FRONT_END) is None


def hide_torch(monkeypatch: pytest.MonkeyPatch, *pythons: str) -> None:
    monkeypatch.setattr(find_torch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(find_torch, "candidates", lambda front: iter(pythons))


def test_the_first_python_with_torch_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = make_torch(tmp_path)
    other = make_torch(tmp_path / "other")
    pythons = [("none", ""), ("first", f"{torch}/__init__.py"), ("second", f"{other}/__init__.py")]
    hide_torch(monkeypatch, *(make_python(tmp_path / name, prints) for name, prints in pythons))
    assert find_torch.torch_folder() == (torch, "2.13.0+cpu")


def test_where_torch_is_not_found_the_reason_names_who_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pythons = [make_python(tmp_path / name) for name in "ab"]
    hide_torch(monkeypatch, *pythons)
    with pytest.raises(CannotBuildError) as failure:
        find_torch.torch_folder()
    sentence = str(failure.value)
    assert f"torch was not found; asked were {', '.join(pythons)}." in sentence
    assert "--no-build-isolation" in sentence
    assert "compiler" not in sentence


def test_a_torch_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = make_torch(tmp_path, "2.9.1+cu128")
    hide_torch(monkeypatch, make_python(tmp_path, f"{torch}/__init__.py"))
    with pytest.raises(CannotBuildError, match=r"torch 2\.9\.1\+cu128 in .* is older than 2\.10"):
        find_torch.torch_folder()


# ---- which GPUs are compiled for

KNOWN = {"75", "80", "90", "120"}


@pytest.mark.parametrize(
    ("listed", "asked", "gpus", "this_machine_only", "expected"),
    [
        ("", "", ["8.0"], False, ["7.5", "8.0", "9.0", "12.0+PTX"]),
        ("", "", ["8.0", "9.0"], True, ["8.0", "9.0+PTX"]),
        ("", "1", [], True, ["7.5", "8.0", "9.0", "12.0+PTX"]),
        ("9.0", "", [], True, ["9.0"]),
        ("8.0; 9.0+PTX", "", ["7.5"], False, ["8.0", "9.0+PTX"]),
    ],
    ids=["a wheel: all", "in place: the GPUs here", "in place, insisted on: all", "in place, listed", "listed"],
)
def test_the_cuda_kernels_are_built_for(
    monkeypatch: pytest.MonkeyPatch,
    listed: str,
    asked: str,
    gpus: list[str],
    this_machine_only: bool,
    expected: list[str],
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setenv("DAL_KERNELS_CUDA", asked)
    monkeypatch.setattr(cuda, "visible_gpus", lambda: gpus)
    assert cuda.wanted(KNOWN, this_machine_only, torch_is_for_gpus=True) == expected


def test_in_place_without_a_gpu_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_CUDA_ARCH_LIST", "DAL_KERNELS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda, "visible_gpus", list)
    with pytest.raises(CannotBuildError, match="no NVIDIA GPU"):
        cuda.wanted(KNOWN, this_machine_only=True, torch_is_for_gpus=True)


@pytest.mark.parametrize(
    ("cuda_of_torch", "hip", "is_for_gpus"), [("'13.0'", None, True), (None, "'7'", True), (None, None, False)]
)
def test_beside_a_torch_for_cpus_they_must_be_asked_for(
    cuda_of_torch: str | None, hip: str | None, is_for_gpus: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ncuda = {cuda_of_torch}\nhip = {hip}\n")
    assert find_torch.is_for_gpus(tmp_path) == is_for_gpus
    for asked in ("DAL_KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST"):
        for name in ("TORCH_CUDA_ARCH_LIST", "DAL_KERNELS_CUDA"):
            monkeypatch.delenv(name, raising=False)
        with nullcontext() if is_for_gpus else pytest.raises(CannotBuildError, match="torch is its build for CPUs"):
            cuda.wanted(KNOWN, False, is_for_gpus)
        monkeypatch.setenv(asked, "1" if asked == "DAL_KERNELS_CUDA" else "9.0")
        cuda.wanted(KNOWN, False, is_for_gpus)


def test_the_gpus_of_a_machine_are_read_from_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '12.0\\n9.0\\n9.0\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert cuda.visible_gpus() == ["9.0", "12.0"]
    tool.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert cuda.visible_gpus() == []
