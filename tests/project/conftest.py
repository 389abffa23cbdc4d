"""The sources that several tests build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.children import ROOT


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns(
        ".*", "build", "*.so", "*.egg-info", "__pycache__", "demo-output", "bench-output", "gpu-output"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy
