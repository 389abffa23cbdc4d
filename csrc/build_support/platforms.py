"""What the flags in setup.py mean on other systems than Linux. Nobody has built the kernels on those yet."""

from __future__ import annotations

from collections.abc import MutableMapping

from build_support import CannotBuildError


def check(platform: str) -> None:
    """Refuses, before anything is compiled, where it could only fail.

    Args:
        platform: as ``sys.platform``.

    Raises:
        CannotBuildError: it is Windows, where setuptools takes MSVC whatever CXX says. The kernels are written in GCC's
            vector extensions, which MSVC lacks, and it would ignore most of the flags with a warning each.
    """
    if platform == "win32":
        raise CannotBuildError(
            "on Windows setuptools compiles with MSVC, which lacks the vector extensions that the kernels are written "
            "in; WSL has GCC"
        )


def for_this_machine_only(platform: str, machine: str, environment: MutableMapping[str, str]) -> None:
    """On a Mac, one architecture: Python of python.org compiles for two, and torch has libraries for this one alone.

    Args:
        platform, machine: as ``sys.platform`` and ``platform.machine()``.
        environment: where ARCHFLAGS is put, which setuptools reads, unless somebody has set it.
    """
    if platform == "darwin":
        environment.setdefault("ARCHFLAGS", f"-arch {machine}")
