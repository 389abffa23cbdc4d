"""What a layer's loss is measured against computes the same, or says why it was not measured."""

from __future__ import annotations

import json
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from benchmarks import layer, rivals


@pytest.mark.parametrize("name", list(rivals.RIVALS)[:2])
def test_a_step_is_measured(name: str) -> None:
    memory, seconds, error = rivals.outcome(name, 64, 16, 500, torch.float32)  # type: ignore[misc]
    assert memory >= 0
    assert seconds > 0
    assert 0 < error < 1e-5


def refused(error: Exception) -> Any:
    def step(*leaves: torch.Tensor) -> Any:
        raise error

    return rivals.Rival("nothing", step)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'x'"), "not installed: No module named 'x'"),
        (RuntimeError("0 active drivers ([])."), "needs CUDA: 0 active drivers"),
        (RuntimeError("another thing"), "failed: another thing"),
    ],
)
def test_what_does_not_run_says_why(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rivals.RIVALS, "new", refused(error))
    assert str(rivals.outcome("new", 8, 4, 20, torch.float32)).startswith(said)


@pytest.mark.parametrize("options", [[], ["--rivals"]], ids=["contenders", "rivals"])
def test_each_process_has_the_threads_that_were_asked_for(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def run(command: list[str], **_: Any) -> CompletedProcess[str]:
        threads.append(command[command.index("--threads") + 1])
        return CompletedProcess(command, 0, json.dumps([2.0, 1.0, 0.0] if options else [2, 1.0]))

    before = torch.get_num_threads()
    monkeypatch.setattr(layer.subprocess, "run", run)
    try:
        assert layer.main(["--sizes", "8x4x20", "--rounds", "2", "--threads", "1", *options]) == 0
    finally:
        torch.set_num_threads(before)
    assert threads == ["1"] * (len(rivals.RIVALS) if options else 2 * len(layer.CONTENDERS))
