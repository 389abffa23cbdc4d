"""The package as a hub of kernels loads it: from any folder, under any name, several versions at once.

    python csrc/hub/make_layout.py build/hub

writes build.toml and torch-ext/dal_kernels: the modules without the trainer, other people's trainers and what is
compiled, with their imports of each other made relative. Operators have the name of the copy already.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "dal_kernels"
LEFT_OUT = ("training", "integrations")
ABSOLUTE = re.compile(r"^(\s*)from dal_kernels(?:\.([\w.]+))? import ", re.MULTILINE)


def modules() -> Iterator[Path]:
    """What goes in, relative to the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] not in LEFT_OUT:
            yield relative


def relative_imports(text: str, module: Path) -> str:
    """A module's text with ``from dal_kernels.a import b`` as seen from where it lies.

    Raises:
        ValueError: it imports the package in a way that cannot be made relative.
    """
    dots = "." * len((*module.parent.parts, PACKAGE.name))
    made = ABSOLUTE.sub(lambda found: f"{found[1]}from {dots}{found[2] or ''} import ", text)
    if left := re.search(r"^\s*(?:import|from) dal_kernels\b.*$", made, re.MULTILINE):
        raise ValueError(f"{module} has an import that is not relative: {left[0].strip()}")
    return made


def make(folder: Path) -> Path:
    """Write the layout below a folder; returns that of the package."""
    package = folder / "torch-ext" / PACKAGE.name
    for module in modules():
        target = package / module
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (PACKAGE / module).read_text(encoding="utf-8")
        target.write_text(relative_imports(text, module), encoding="utf-8")
    shutil.copy(Path(__file__).parent / "build.toml", folder)
    shutil.copy(ROOT / "LICENSE", folder)
    return package


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(f"written: {make(Path(sys.argv[1]))}")
