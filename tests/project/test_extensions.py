"""Which compiled extension is taken: none that is for another torch, of other sources or for other GPUs."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from build_support import cuda
from dal_kernels import dynamics_aware_loss, extensions, node
from dal_kernels.backends import choose
from support.children import ROOT, printed_by

with_node = pytest.mark.skipif(node.short_way is None, reason=f"no autograd node: {node.error}")


@with_node
def test_an_extension_for_another_torch_is_not_loaded() -> None:
    own = extensions.read_record(extensions.PACKAGE)["torch"]
    with pytest.raises(ImportError) as caught:
        extensions.load("_node", made_for="9.9")
    assert str(caught.value).startswith(
        f"it was built for torch {own}, and this is torch 9.9; install dal_kernels again"
    )


@with_node
def test_one_of_other_sources_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(*arguments: Any) -> None:
        raise RuntimeError("learn takes 3 arguments, got 5")

    monkeypatch.setattr(extensions, "load", lambda *_, **__: types.SimpleNamespace(learn=learn))
    monkeypatch.setattr(node, "error", None)
    assert node._load() is None
    assert node.error is not None
    assert "other sources than these (learn takes 3 arguments, got 5); install" in node.error


@with_node
def test_without_it_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "short_way", None)
    monkeypatch.setattr(node, "error", "no such file")
    monkeypatch.setattr(node, "say_once", functools.cache(node.say_once.__wrapped__))  # as in a new process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            dynamics_aware_loss(torch.randn(3, 4), torch.arange(3), 0.7)
    (warning,) = caught
    assert "no such file" in str(warning.message)
    assert "host" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        ((), (9, 0), False),
        (("sm_90",), (9, 0), True),
        (("sm_80",), (8, 6), True),
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("sm_80", "compute_80"), (12, 0), True),
        (("compute_90",), (8, 9), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),
        (("sm_75", "sm_100"), (10, 0), True),
    ],
)
def test_which_gpus_an_extension_is_for(
    architectures: tuple[str, ...], capability: tuple[int, int], fits: bool
) -> None:
    assert choose._has_code_for(capability, architectures) is fits


def test_what_nvcc_is_told_to_make() -> None:
    flags = ["nvcc", "-gencode", "arch=compute_80,code=[sm_80]", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"]
    assert cuda.codes(flags) == ["sm_80", "sm_90", "compute_90"]


def test_the_record_says_for_which_gpus(tmp_path: Path) -> None:
    file = extensions.write_record(tmp_path, extensions.PACKAGE, {"_cuda": None}, "2.13.0", ["sm_90"])
    assert json.loads(file.read_text(encoding="utf-8"))["architectures"] == ["sm_90"]


IMPORT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, dal_kernels
print(dal_kernels.__file__, dal_kernels.available_backends()["cpu"], sep="\\n")
"""


def imported_from(*path: Path) -> list[str]:
    """Where the package comes from and the reason of its CPU backend, with these folders first on Python's path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, Path(torch.__file__).parent.parent]))}
    command = [sys.executable, "-c", IMPORT]
    result = subprocess.run(command, cwd=path[0], env=environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


@pytest.fixture
def installed(source_tree: Path, tmp_path: Path) -> Path:
    """A folder with an installed copy: this package, its compiled extension and the record of its sources."""
    compiled = list((ROOT / "dal_kernels").glob("_native.abi3.so"))
    if not compiled:
        pytest.skip("needs the compiled CPU kernels")
    site = tmp_path / "site"
    shutil.copytree(source_tree / "dal_kernels", site / "dal_kernels")
    shutil.copy(compiled[0], site / "dal_kernels")
    extensions.write_record(site / "dal_kernels", ROOT / "csrc", {"_native": None, "_cuda": "no nvcc"}, None, [])
    return site


def test_in_a_source_tree_the_installed_kernels_of_the_same_sources_are_taken(
    source_tree: Path, installed: Path
) -> None:
    file, reason = imported_from(source_tree, installed)
    assert file == str(source_tree / "dal_kernels" / "__init__.py")
    assert reason.startswith("available")
    assert reason.endswith(f"from the dal_kernels installed in {installed}")


def test_in_a_source_tree_kernels_of_other_sources_are_not(source_tree: Path, installed: Path) -> None:
    with (source_tree / "csrc" / "objective.h").open("a") as header:
        header.write("// changed\n")
    _, reason = imported_from(source_tree, installed)
    assert reason.startswith("not available")
    assert f"Python imports dal_kernels from the source tree {source_tree}, where it was not built" in reason
    assert f"installed in {installed} has it, but was built from other sources" in reason
    assert "compiler" not in reason


def test_an_extension_that_cannot_be_loaded_is_not_called_missing(installed: Path) -> None:
    (installed / "dal_kernels" / "_native.abi3.so").write_bytes(b"no library")
    _, reason = imported_from(installed)
    assert "it was built, but cannot be loaded: " in reason


def test_an_installation_without_a_record_says_so(installed: Path) -> None:
    (installed / "dal_kernels" / "_native.abi3.so").unlink()
    (installed / "dal_kernels" / extensions.RECORD).unlink()
    assert "has neither it nor a record of why" in imported_from(installed)[1]


@pytest.mark.parametrize("name", ["_native", "_cuda"])
def test_an_extension_of_other_sources_is_one_that_is_missing(name: str) -> None:
    """As where a source tree changed after an editable installation: it loads, and lacks an operator."""
    program = f"""
import sys, types, warnings
sys.modules["dal_kernels.{name}"] = types.ModuleType("dal_kernels.{name}")  # with none of them
import torch, dal_kernels
reason = dal_kernels.available_backends()["{"cpu" if name == "_native" else "cuda"}"]
assert reason.startswith("not available"), reason
assert "built from other sources" in reason and "pip install" in reason, reason
warnings.simplefilter("ignore")
assert dal_kernels.dynamics_aware_loss(torch.zeros(2, 3), torch.tensor([0, 1]), 0.7) > 0
"""
    printed_by("-c", program)
