"""The examples in docs/ run."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from children import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Any) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(example, names)
    if page.stem == "segmentation":
        assert names["stats"].target_prob.shape == names["masks"].shape
        assert not names["doubtful"][:, :2].any()
        assert names["criterion"].schedule.position == names["epochs"]


def test_there_are_pages() -> None:
    assert PAGES
