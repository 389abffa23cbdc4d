"""Where torch's headers are: in any Python that may be the one that installs.

A build front end runs setup.py where torch cannot be seen: pip under the same interpreter with a path of its own, uv
and build in a virtual environment that they made for it. None says for whom it builds; who that may be follows from the
process that started this one and from the environment. Taking another Python's torch does no harm to the kernels,
because they are built against torch's stable ABI and load under every torch from 2.10 on; the autograd node, which has
none, is then set aside, and says so.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from build_support import CannotBuildError

OLDEST = (2, 10)
WHERE = "import importlib.util as u; spec = u.find_spec('torch'); print(spec.origin if spec and spec.origin else '')"


@dataclass(frozen=True)
class FrontEnd:
    """The process that started this one, as far as the system tells: nothing where there is no /proc."""

    arguments: list[str]
    environment: dict[str, str]
    folder: Path | None


def front_end() -> FrontEnd:
    process = Path("/proc") / str(os.getppid())
    try:
        arguments = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
        variables = os.fsdecode((process / "environ").read_bytes()).split("\0")
        folder = (process / "cwd").resolve(strict=True)
    except OSError:
        return FrontEnd([], {}, None)
    return FrontEnd(arguments, dict(line.split("=", 1) for line in variables if "=" in line), folder)


def python_of(place: str | Path) -> str | None:
    """The interpreter that a path names: itself, or that of a virtual environment or of a folder of programs."""
    for name in ("", "bin/python3", "Scripts/python.exe", "python3", "python", "python.exe"):
        path = Path(place, name)
        if path.name.startswith("python") and path.is_file() and os.access(path, os.X_OK):
            return str(path)
    return None


def candidates(front: FrontEnd) -> Iterator[str]:
    """The interpreters that may be installing, the likeliest first, each once."""
    places: list[str | Path] = [sys.executable]
    # "/venv/bin/python -m build", "uv pip install --python /venv ."; a bare name is looked up as a shell would.
    for argument in front.arguments:
        value = argument.rpartition("=")[2]
        places.append(value if os.sep in value else shutil.which(value) or value)
    environment = front.environment or os.environ
    places += [environment[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if environment.get(name)]
    if front.folder is not None:
        # uv takes the .venv of the folder it is started in, or of one above.
        places += [folder / ".venv" for folder in (front.folder, *front.folder.parents)]
    places += [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    places.append(getattr(sys, "_base_executable", sys.executable))
    found = {os.path.dirname(python): python for place in reversed(places) if (python := python_of(place)) is not None}
    yield from reversed(found.values())


def ask(python: str, front: FrontEnd) -> Path | None:
    """The folder of the torch that an interpreter would import, outside of the front end's isolation; or None."""
    # pip hides the installation from this process by PYTHONPATH and PYTHONNOUSERSITE: as it was started itself.
    isolation = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in isolation}
    environment |= {name: front.environment[name] for name in isolation if name in front.environment}
    try:
        answer = subprocess.run(
            [python, "-c", WHERE], capture_output=True, text=True, env=environment, cwd=front.folder, timeout=60
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return Path(answer).parent if answer else None


def is_for_gpus(folder: Path) -> bool:
    """Whether the torch in that folder is a build that takes CUDA tensors."""
    said = runpy.run_path(str(folder / "version.py"))
    return bool(said.get("cuda") or said.get("hip"))


def torch_folder() -> tuple[Path, str]:
    """The folder of an installed torch that is new enough, and its version.

    Raises:
        CannotBuildError: there is none; names every interpreter that was asked.
    """
    here = importlib.util.find_spec("torch")
    found = [Path(here.origin).parent] if here is not None and here.origin is not None else []
    front, asked = front_end(), []
    if not found:
        for python in candidates(front):
            asked.append(python)
            folder = ask(python, front)
            if folder is not None:
                found.append(folder)
                break
    if not found:
        raise CannotBuildError(
            f"torch was not found; asked were {', '.join(asked)}. Install torch first, then dal_kernels again with "
            "--no-build-isolation (of pip and uv; needs setuptools)"
        )
    version = str(runpy.run_path(str(found[0] / "version.py"))["__version__"])
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST:
        raise CannotBuildError(
            f"torch {version} in {found[0]} is older than 2.10. Install a newer one, then dal_kernels again"
        )
    return found[0], version
