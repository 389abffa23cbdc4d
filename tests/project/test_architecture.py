"""The page that draws the house is of the house that stands: its modules, its folders, and who imports whom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.children import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# The folders whose modules have a table each.
PARTS = {"dal_kernels": ROOT / "dal_kernels", "training": ROOT / "dal_kernels" / "training"}
parts = pytest.mark.parametrize("part", PARTS)


def cells(headings: str) -> list[list[str]]:
    """Of each row of the table with these headings."""
    rows = PAGE.partition(headings)[2].partition("\n\n")[0].splitlines()[2:]
    return [row.strip("| ").split("|") for row in rows]


def names_in(cell: str) -> Iterator[str]:
    """The modules in a cell: ``folder/`` is that of those behind it, up to a semicolon."""
    for group in cell.split(";"):
        folder = ""
        for name in re.findall(r"`([\w/]+)`", group):
            if name.endswith("/"):
                folder = name
            else:
                yield folder + name


def rows_of(part: str) -> list[list[str]]:
    """The modules of each row of the table of a part, from the top."""
    return [list(names_in(row[1])) for row in cells(f"| row | modules of `{part}/` |")]


def modules_of(part: str) -> dict[str, Path]:
    """By their paths below the folder of the part; those of the trainer are a part of their own."""
    folder = PARTS[part]
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.py")}
    return {name: path for name, path in files.items() if not name.startswith("training/")}


def imports_of(path: Path, part: str) -> Iterator[str]:
    """Modules of the part that a module imports when it is imported: none for types alone, none in a call."""
    names, package = modules_of(part), ".".join(PARTS[part].relative_to(ROOT).parts)
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    for statement in statements:
        if isinstance(statement, ast.Try):
            statements += [*statement.body, *statement.orelse]
        if isinstance(statement, ast.ImportFrom) and f"{statement.module}.".startswith(f"{package}."):
            place = str(statement.module).removeprefix(package).replace(".", "/")
            for alias in statement.names:
                tried = (f"{place}/{alias.name}", place, f"{place}/__init__")
                yield next(name for name in (name.strip("/") for name in tried) if name in names)


@parts
def test_every_module_is_on_the_page_once(part: str) -> None:
    assert sorted(name for row in rows_of(part) for name in row) == sorted(modules_of(part))


@parts
def test_nothing_imports_upwards(part: str) -> None:
    place = {name: index for index, row in enumerate(rows_of(part)) for name in row}
    arrows = [(name, other) for name, path in modules_of(part).items() for other in imports_of(path, part)]
    assert len(arrows) > 100
    assert [arrow for arrow in arrows if place[arrow[1]] < place[arrow[0]]] == []


def test_the_package_imports_nothing_of_the_trainer() -> None:
    for path in modules_of("dal_kernels").values():
        assert "from dal_kernels.training" not in path.read_text(encoding="utf-8"), path


def test_every_folder_is_on_the_page() -> None:
    tree = set(re.findall(r"^ *(\w+)/ ", PAGE.partition("## Who")[0], re.MULTILINE))
    for part in ("dal_kernels", "csrc", "benchmarks"):
        folders = {path.parent.name for path in (ROOT / part).glob("*/*") if path.is_file()} - {"__pycache__"}
        assert folders | {part} <= tree
    assert [path.name for path in (ROOT / "tests").glob("*.py")] == ["conftest.py"]  # each test has a folder
    tests = {path.parent for path in (ROOT / "tests").rglob("*") if path.suffix in (".py", ".json")}
    named = {name for row in cells("| folder | what |") for name in re.findall(r"`([\w/]+)`", row[0])}
    assert {path.relative_to(ROOT / "tests").as_posix() for path in tests} - {"."} == named


def test_every_file_on_the_page_is_there() -> None:
    there = {
        path.name for part in ("dal_kernels", "csrc", "tests", "benchmarks") for path in (ROOT / part).rglob("*.*")
    }
    there.add("setup.py")
    named = re.findall(r"\b(\w+\.(?:py|h|cuh|cpp))\b", PAGE)
    assert named
    assert set(named) <= there
