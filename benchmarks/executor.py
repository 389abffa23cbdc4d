"""Where the executor of compiled GPU code is found: a helper package that the project works without."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["MissingError", "load"]

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


class MissingError(Exception):
    """What is needed to compile or to run GPU code here is not installed; the message says what."""


def load(module: str = "gpuless") -> ModuleType:
    """Import a module of gpuless, from the path or from the folder "shared" beside the repository.

    Raises:
        MissingError: it or Triton is not there, or Triton compiles nothing.
    """
    if str(SHARED) not in sys.path:
        sys.path.append(str(SHARED))
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise MissingError("TRITON_INTERPRET=1 leaves no kernels to compile: unset it")
    if importlib.util.find_spec("triton") is None:
        raise MissingError("compiling for other machines needs Triton, which is not installed")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError(
            f"compiling for other machines needs Triton and the helper package gpuless, on PYTHONPATH or in a folder "
            f"'shared' beside the repository ({error})"
        ) from error
