"""What the user can put right, said in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

__all__ = ["UsageError", "need", "reason", "usage_errors"]


class UsageError(ValueError):
    """A wrong setting, a missing file or a missing package; the message says what to do."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """What the public functions refuse as a ValueError is something that the user of the trainer can put right."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def reason(error: Exception, named: Path | str) -> str:
    """What went wrong, for a sentence that names a file or a folder already.

    An ``OSError`` names its file too: that is left out where it is ``named``, and not where it is another one.
    """
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    is_another = error.filename is not None and str(error.filename) != str(named)
    return f"{error.strerror}: {error.filename}" if is_another else error.strerror


def need(module: str, package: str | None = None, in_extra: bool = True) -> ModuleType:
    """Import an optional module; ``package`` is what pip calls it, if that differs; not all are ``in_extra``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        advice = "install the extra dal_kernels[training], in a checkout: pip install '.[training]'"
        raise UsageError(f"{name} is missing ({error}): {advice if in_extra else f'pip install {name}'}") from error
