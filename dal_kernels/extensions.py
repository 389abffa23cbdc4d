"""Loading the compiled extensions, and saying why one is not there, as the build left it in a record beside them.

setup.py runs this file by itself, without the package and without torch: it writes the record that is read here.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

RECORD = "_build.json"
PACKAGE = Path(__file__).parent


def digest(sources: Path) -> str:
    """Of the names and contents of all files below a folder of sources."""
    content = hashlib.sha256()
    for file in sorted(path for path in sources.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")):
        content.update(repr((file.relative_to(sources).as_posix(), file.read_bytes())).encode())
    return content.hexdigest()


def write_record(
    folder: Path, sources: Path, reasons: dict[str, str | None], torch: str | None, architectures: list[str]
) -> Path:
    """Leaves, beside the extensions, why each is missing (None: it is there), and from what they were made: from which
    sources, with the headers of which version of torch, and for which GPUs.
    """
    file = folder / RECORD
    folder.mkdir(parents=True, exist_ok=True)
    record = {"sources": digest(sources), "torch": torch, "architectures": architectures, "missing": reasons}
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return file


def read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _installed(name: str) -> Iterator[tuple[Path, importlib.machinery.ModuleSpec]]:
    """The other folders of this package on Python's path that have the extension."""
    for folder in dict.fromkeys(Path(entry, PACKAGE.name).resolve() for entry in sys.path):
        spec = importlib.machinery.PathFinder.find_spec(f"{PACKAGE.name}.{name}", [str(folder)])
        if folder != PACKAGE.resolve() and spec is not None and spec.loader is not None:
            yield folder, spec


def _refuse_other_torch(folder: Path, torch: str) -> None:
    """Before it is loaded, because the library of another version may crash, or do something else than it says."""
    built_with = read_record(folder).get("torch")
    if built_with != torch:
        raise ImportError(
            f"it was built for torch {built_with}, and this is torch {torch}; install dal_kernels again without "
            "its cached wheel (--no-cache-dir) to have it"
        )


def load(name: str, made_for: str | None = None) -> ModuleType:
    """The extension of that name. Importing it defines its operators.

    Args:
        made_for: the version of torch that it must have been built for, if it is of use to that alone.

    In a source tree in which nothing is built, that of an installed dal_kernels is taken if it was made from the very
    sources that lie in the tree: the tree hides the installation whenever Python is started in it.

    Raises:
        ImportError: a sentence that says why it is not there, and what to do.
    """
    full = f"{__package__}.{name}"
    if made_for is not None and importlib.util.find_spec(full) is not None:
        _refuse_other_torch(PACKAGE, made_for)
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
    except ImportError as error:
        raise ImportError(f"it was built, but cannot be loaded: {error}") from error
    missing = read_record(PACKAGE).get("missing", {})
    reason = missing.get(name)
    why = f"{PACKAGE} has neither it nor a record of why; install dal_kernels again"
    if reason:
        why = f"it was not built when dal_kernels was installed: {reason}"
    elif name in missing and made_for is not None:
        why = "it was built for another Python; install dal_kernels again without its cached wheel (--no-cache-dir)"
    sources = PACKAGE.parent / "csrc"
    if sources.is_dir() and not reason:
        why = (
            f"Python imports dal_kernels from the source tree {PACKAGE.parent}, where it was not built; "
            "build it there with: pip install --no-build-isolation -e ."
        )
    for folder, spec in _installed(name) if sources.is_dir() else ():
        if read_record(folder).get("sources") == digest(sources):
            if made_for is not None:
                _refuse_other_torch(folder, made_for)
            module = importlib.util.module_from_spec(spec)
            assert spec.loader is not None
            sys.modules[full] = module
            spec.loader.exec_module(module)
            return module
        why += f". The dal_kernels installed in {folder.parent} has it, but was built from other sources"
    raise ImportError(why)
