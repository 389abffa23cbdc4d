"""The examples in docs/ run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from children import ROOT

from dal_kernels import GeneralizedCrossEntropyLoss

PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text(encoding="utf-8")]
# What examples of a page take for given.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "many_classes": lambda: {
        "GeneralizedCrossEntropyLoss": GeneralizedCrossEntropyLoss,
        "epochs": 2,
        "features": torch.randn(3, 512),
        "labels": torch.randint(100, (3,)),
        "D": 8,
        "vocabulary": 100,
        "embedding": torch.nn.Embedding(100, 8),
        "hidden_states": torch.randn(2, 5, 8),
        "num_items_in_batch": 7,
        "weight_of_tokens": torch.ones(2, 5),
    }
}
# Of these test_language_models.py and test_class_parallel_linear.py run more, where there is what they need.
ELSEWHERE = ("apply_to(", "ClassParallelLinear(")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Any) -> None:
    if page.stem == "trainer":
        pytest.importorskip("sklearn")
    torch.manual_seed(0)
    names = GIVEN.get(page.stem, dict)()
    text = page.read_text(encoding="utf-8").replace("num_classes=1_000_000", "num_classes=100")
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if not any(name in example for name in ELSEWHERE):
            if "hidden_states" in example:
                names["labels"] = torch.randint(100, (2, 5))
            exec(example, names)
    if page.stem == "trainer":
        assert (names["suspicious"] < 25).double().mean() > 0.8
    elif page.stem == "segmentation":
        assert names["stats"].target_prob.shape == names["masks"].shape
        assert not names["doubtful"][:, :2].any()
        assert names["criterion"].schedule.position == names["epochs"]
    if page.stem == "many_classes":
        assert names["loss"].isfinite()
        assert names["adjusted"] > max(0.9, names["plain"] + 0.01)
        similarity = names["similarity"].detach()
        assert similarity.diag().mean() > 0.8
        assert abs(similarity.mean()) < 0.2


def test_there_are_pages() -> None:
    assert {page.stem for page in PAGES} >= {"many_classes", "segmentation", "trainer"}
