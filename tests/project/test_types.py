"""What typical_use.py says to type checkers is true when it runs; the checkers themselves read it in `make lint`."""

from __future__ import annotations

import inspect
from types import UnionType
from typing import get_args, get_origin

import pytest
import torch
import torch.distributed as dist
import typical_use
from torch import Tensor, nn

LOGITS, TARGET = torch.randn(8, 10), torch.arange(8)


def is_instance(value: object, kind: object) -> object:
    """Stands in for assert_type, which looks at nothing when it runs: one of the outermost types."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    assert isinstance(value, tuple(get_origin(kind) or kind for kind in kinds)), (value, kind)
    return value


@pytest.fixture(autouse=True)
def types_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typical_use, "assert_type", is_instance)


@pytest.mark.parametrize("stats_too", [False, True])
def test_functions(stats_too: bool) -> None:
    typical_use.functions(LOGITS, TARGET, stats_too)
    typical_use.family(LOGITS, TARGET, stats_too)
    typical_use.linear(torch.randn(8, 4), nn.Linear(4, 10), TARGET, stats_too)


def test_modules() -> None:
    assert typical_use.training(nn.Linear(4, 10), [(torch.randn(8, 4), TARGET)], epochs=2) > 0
    assert isinstance(typical_use.layer_form(torch.randn(8, 4), TARGET), Tensor)


def test_class_parallel(tmp_path: object) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{tmp_path}/store", 1), rank=0, world_size=1)
    try:
        typical_use.class_parallel(LOGITS, torch.randn(8, 4), torch.randn(10, 4), TARGET)
    finally:
        dist.destroy_process_group()


def test_what_checkers_must_refuse_fails_when_it_runs_too() -> None:
    source, _ = inspect.getsourcelines(typical_use.mistakes)
    for line in source[2:]:
        with pytest.raises((TypeError, ValueError)):
            exec(line.strip(), {**vars(typical_use), "logits": LOGITS, "target": TARGET, "anything": "fused"})
