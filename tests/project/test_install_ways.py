"""Installs the project in eight ways, as users do, and prints backend and reason of each; minutes, and needs an index.

    python -m pytest -m slow -s tests/project/test_install_ways.py

torch is lent to the new environments by links to the running interpreter's, because it is too large to install again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow

REPORT = "import dal_kernels; print(dal_kernels.__file__); print(dal_kernels.available_backends()['cpu'])"


@dataclass(frozen=True)
class Place:
    """A source tree, a new environment that sees torch, another with the front ends, and an empty folder."""

    source: Path
    python: Path
    tools: Path
    work: Path
    lent: Path

    def call(self, *command: object, cwd: Path | None = None, **environment: str) -> str:
        """What a command prints, on both streams; outside of every environment but those that it names."""
        kept = {name: value for name, value in os.environ.items() if name not in HIDDEN}
        result = subprocess.run(
            [str(part) for part in command],
            cwd=cwd or self.work,
            env={**kept, "DAL_KERNELS_CUDA": "0", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}"
        return result.stdout

    def pip(self, *arguments: object, **environment: str) -> str:
        return self.call(self.python, "-m", "pip", "install", "--no-deps", *arguments, **environment)


HIDDEN = ("PYTHONPATH", "VIRTUAL_ENV", "CXX", "CC", "TORCH_CUDA_ARCH_LIST", "PYTHONNOUSERSITE")


def pip(place: Place) -> str:
    return place.pip("--no-build-isolation", place.source)


def pip_isolated(place: Place) -> str:
    return place.pip(place.source)


def editable(place: Place) -> str:
    return place.pip("--no-build-isolation", "--editable", place.source)


def uv(place: Place) -> str:
    return place.call(place.tools / "uv", "pip", "install", "--python", place.python, "--no-deps", place.source)


def build_and_wheel(place: Place) -> str:
    said = place.call(place.tools / "python", "-m", "build", "--wheel", "--outdir", place.work, place.source)
    (wheel,) = place.work.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    return said + place.pip(wheel)


def sdist(place: Place) -> str:
    said = place.call(place.tools / "python", "-m", "build", "--sdist", "--outdir", place.work, place.source)
    (archive,) = place.work.glob("*.tar.gz")
    return said + place.pip(archive)


def user_torch(place: Place) -> str:
    """torch only in the user site, which pip hides from a build."""
    (lending,) = place.python.parent.parent.glob("lib/python*/site-packages/lent.pth")
    version = lending.parent.parent.name
    user_site = place.work / "user" / "lib" / version / "site-packages"
    user_site.mkdir(parents=True)
    lending.rename(user_site / "lent.pth")
    configuration = place.python.parent.parent / "pyvenv.cfg"
    text = configuration.read_text(encoding="utf-8")
    configuration.write_text(text.replace("system-site-packages = false", "system-site-packages = true"))
    return place.pip(place.source, PYTHONUSERBASE=str(place.work / "user"))


def no_compiler(place: Place) -> str:
    return place.pip("--no-build-isolation", place.source, CXX="no-such-compiler")


KERNELS = "available: compiled kernels"
WAYS: dict[Callable[[Place], str], str] = {
    pip: KERNELS,
    pip_isolated: KERNELS,
    editable: KERNELS,
    uv: KERNELS,
    build_and_wheel: KERNELS,
    sdist: KERNELS,
    user_torch: KERNELS,
    no_compiler: "it was not built when dal_kernels was installed: the compiler that CXX names, no-such-compiler, was",
}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    venv.create(folder, with_pip=True)
    subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "-q", "uv", "build"], check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is installed where torch is, but this project."""
    folder = tmp_path_factory.mktemp("lent")
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if "dal_kernels" not in entry.name and not entry.name.endswith(".pth"):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def place(tmp_path: Path, tools: Path, lent: Path) -> Place:
    ignored = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__", "_build.json", "*-output")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(f"{lent}\n")
    work = tmp_path / "work"
    work.mkdir()
    # Python's own, before 3.12, is too old to build without isolation, and would hide the lent one.
    subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True, cwd=work)
    tools_site = next(tools.parent.glob("lib/python*/site-packages"))
    (tools_site / "lent.pth").write_text(f"{lent}\n")
    return Place(source, python, tools, work, lent)


@pytest.mark.parametrize(("way", "expected"), WAYS.items(), ids=[way.__name__ for way in WAYS])
def test_it_installs_and_says_what_it_has(way: Callable[[Place], str], expected: str, place: Place) -> None:
    said = way(place)
    environment = {"PYTHONUSERBASE": str(place.work / "user")} if way is user_torch else {}
    *_, file, reason = place.call(place.python, "-W", "ignore", "-c", REPORT, **environment).splitlines()
    warned = [line for line in said.splitlines() if "WITHOUT the compiled CPU kernels" in line]
    print(f"\n{way.__name__}: cpu {reason}\n  {file}\n  the front end shows: {warned or 'no warning'}")
    assert expected in reason
    assert str(place.source if way is editable else place.python.parent.parent) in file
    # In the source tree, which hides the installed package, the same holds.
    if way in (pip, no_compiler):
        *_, reason = place.call(place.python, "-W", "ignore", "-c", REPORT, cwd=place.source).splitlines()
        print(f"  in the source tree: {reason}")
        assert reason.startswith("available") == (way is pip)


def test_a_front_end_that_shows_the_build_shows_what_is_lost(place: Place) -> None:
    said = place.call(
        place.tools / "python", "-m", "build", "--wheel", "--outdir", place.work, place.source, CXX="no-such-compiler"
    )
    assert "WARNING: installing WITHOUT the compiled CPU kernels: the compiler that CXX names" in said
    (wheel,) = place.work.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
