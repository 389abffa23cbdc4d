"""The layout of a hub of kernels: relative imports, and several copies in one process."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from support.children import ROOT, printed_by

sys.path.append(str(ROOT / "csrc" / "hub"))
import make_layout

TWICE = """
import importlib.util, sys
from pathlib import Path
import torch

def load(name, folder):
    file = Path(folder, "__init__.py")
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[folder])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

logits, target = torch.randn(5, 7, requires_grad=True), torch.arange(5)
found = []
for name, folder in zip(("first_1a", "second_2b"), sys.argv[1:]):
    copy = load(name, folder)
    assert all(hasattr(copy, public) for public in copy.__all__)
    assert not copy.available_backends()["cpu"].startswith("available")
    loss = copy.DynamicsAwareLoss(total_steps=3, backend="eager")(logits, target)
    loss.backward()
    found.append(loss)
    with torch._subclasses.FakeTensorMode():
        features, classifier = torch.empty(4, 6), torch.empty(9, 6, requires_grad=True)
        copy.linear_loss(copy.CrossEntropyLoss(), features, classifier, torch.zeros(4, dtype=torch.long)).backward()
    operators = {op for op in dir(getattr(torch.ops, name)) if not op.startswith("_")} - {"name"}
    assert "linear_loss" in operators
    assert ("loss_triton" in operators) == (importlib.util.find_spec("triton") is not None)
assert torch.equal(*found)
strange = [name for name in sys.modules if name.partition(".")[0] == "dal_kernels"]
assert not strange, strange
"""


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [make_layout.make(tmp_path_factory.mktemp(name)) for name in ("one", "other")]


def test_two_copies_live_in_one_process(copies: list[Path], tmp_path: Path) -> None:
    """Where dal_kernels can be imported too, which neither may do."""
    printed_by("-c", TWICE, *copies)


def test_it_needs_the_standard_library_torch_and_triton_alone(copies: list[Path]) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in copies[0].rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # what a module imports when it is imported
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            assert {name.partition(".")[0] for name in names} <= allowed, path


def test_what_cannot_be_made_relative_is_an_error() -> None:
    with pytest.raises(ValueError, match="import dal_kernels"):
        make_layout.relative_imports("import dal_kernels\n", Path("a.py"))
    text = "from dal_kernels.b import c\nfrom dal_kernels import d\n"
    assert make_layout.relative_imports(text, Path("x/a.py")) == "from ..b import c\nfrom .. import d\n"


def test_the_manifest_names_files_that_are_there() -> None:
    tomllib = pytest.importorskip("tomllib")
    compiled = tomllib.loads((ROOT / "csrc" / "hub" / "compiled" / "build.toml").read_text(encoding="utf-8"))
    named = [*compiled["torch"]["src"], *compiled["kernel"]["dal"]["src"]]
    assert all((ROOT / name).is_file() for name in named)
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cuda").glob("*.c*")}
    assert {name for name in there if name.endswith((".cpp", ".cu"))} == set(named)
    noarch = tomllib.loads((ROOT / "csrc" / "hub" / "build.toml").read_text(encoding="utf-8"))
    assert "torch-noarch" in noarch
    for manifest in (noarch, compiled):  # without one of these the hub's builder refuses it
        general = manifest["general"]
        assert general["name"].startswith("dal-kernels")
        assert isinstance(general["version"], int)
        assert general["license"]
        assert {"cuda"} <= set(general["backends"]) <= {"cpu", "cuda", "rocm"}
