"""A training killed at random moments and resumed ends with the numbers of one left alone, bit for bit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dal_kernels.training import main
from dal_kernels.training.checkpoint import save_checkpoint
from dal_kernels.training.metrics import TIMINGS
from support.children import SUPPORT, printed_by
from support.trainings import needs_training, rows_of

needs_training()
if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

KILLS = int(os.environ.get("DAL_TEST_KILLS", "2"))


def untimed(rows: list[dict[str, Any]]) -> str:
    """As text, for NaN does not equal itself."""
    return str([{name: value for name, value in row.items() if name not in TIMINGS} for row in rows])


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a checkpoint by their places."""
    if isinstance(value, dict):
        return {leaf: part for key, inner in value.items() for leaf, part in flat(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {leaf: part for i, inner in enumerate(value) for leaf, part in flat(inner, f"{name}/{i}").items()}
    return {name: value}


def test_a_training_killed_at_random_moments_ends_as_one_left_alone(tmp_path: Path) -> None:
    hit = json.loads(printed_by(SUPPORT / "killed.py", str(KILLS), str(os.getpid()), tmp_path, OMP_NUM_THREADS="1"))
    print(f"kills after so many epochs: {hit}")  # pytest -s shows it
    assert hit, "no kill came before the end"
    folders = [next((tmp_path / name).glob("*/*")) for name in ("alone", "killed")]
    for name in ("checkpoint.pt", "best.pt"):
        alone, killed = (torch.load(folder / name, weights_only=True) for folder in folders)
        assert untimed(killed.pop("history")) == untimed(alone.pop("history")), (name, hit)
        expected, found = flat(alone), flat(killed)
        assert found.keys() == expected.keys()
        for place, value in expected.items():
            same = torch.equal(found[place], value) if isinstance(value, torch.Tensor) else found[place] == value
            assert same, (name, place, hit)
    for name in ("metrics.csv", "classes.csv", "confusion.csv"):
        alone, killed = (rows_of(folder / name) for folder in folders)
        assert untimed(killed) == untimed(alone), (name, hit)
    assert {path.name for path in folders[1].iterdir()} == {path.name for path in folders[0].iterdir()}, "no scraps"


def test_a_kill_between_the_best_checkpoint_and_the_last_leaves_no_stale_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "--epochs", "2", "--learning-rate", "0.5", "--val-fraction", "0.2", "--output", str(tmp_path)]
    saved: list[str] = []

    def save(path: Path, state: dict[str, Any]) -> None:
        saved.append(path.name)
        save_checkpoint(path, state) if len(saved) < 4 else 1 / 0

    with monkeypatch.context() as context:
        context.setattr("dal_kernels.training.run.save_checkpoint", save)
        with pytest.raises(ZeroDivisionError):
            main(command)
    assert sorted(saved) == ["best.pt", "best.pt", "checkpoint.pt", "checkpoint.pt"], "the second epoch is better"
    assert main([*command, "--resume"]) == 0
    (best,) = tmp_path.glob("*/*/best.pt")
    assert len(torch.load(best, weights_only=True)["history"]) == 2
