"""Whether a call took the short way, through C++, and the same call by the long one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dal_kernels import node
from support.truth import make_case

CASE = make_case(12, 40)


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call so far, whether the short way took it."""
    answers: list[bool] = []
    short_way = node.short_way
    assert short_way is not None

    def spy(*arguments: Any) -> Any:
        result = short_way(*arguments)
        answers.append(result is not None)
        return result

    monkeypatch.setattr(node, "short_way", spy)
    return answers


def longer(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(node, "short_way", None)
        return call()
