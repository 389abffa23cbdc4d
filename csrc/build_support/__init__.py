"""What setup.py needs to build the compiled extensions. No part of the package that is installed."""

from __future__ import annotations

import os
import subprocess
import sys

# The oldest torch and Python that the binaries of the stable interface must load under.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030a0000")]


class CannotBuildError(Exception):
    """Why an extension will not be there and what to do, in words for the person who installs."""


def jobs() -> int:
    """How many files to compile at once."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def say(message: str) -> None:
    print(f"dal_kernels: {message}", file=sys.stderr, flush=True)


def run(command: list[str]) -> str:
    """The standard output of a command.

    Raises:
        CannotBuildError: it failed, with the line in which a compiler says why, where there is one.
    """
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        say(f"{' '.join(command)} failed:\n{(result.stderr or result.stdout).strip()[-2000:]}")
        said = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        why = next((line for line in said if "error" in line.lower()), said[-1] if said else "it said nothing")
        raise CannotBuildError(f"{command[0]} ended with status {result.returncode}: {why[:300]}")
    return result.stdout
