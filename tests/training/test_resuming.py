"""A run that was killed and resumed ends as one left alone; what does not fit a checkpoint is named."""

from __future__ import annotations

import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dal_kernels.training import TrainingConfig, UsageError, main, run_training
from dal_kernels.training.data import DATA, load_data
from dal_kernels.training.run import CHECKPOINT
from support.children import SUPPORT, run_python
from support.jittered import jittered
from support.trainings import assert_same, needs_training, saved

needs_training()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_and_resumed_ends_as_one_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    command = "train --data jittered --preset digits --noise 0.4 --epochs 4 --momentum 0.9 --schedule cosine "
    command += f"--loss-step iteration --workers {workers} --out"
    killed, left_alone = tmp_path / "killed", tmp_path / "left alone"
    process = run_python(SUPPORT / "jittered.py", "3", *command.split(), killed, OMP_NUM_THREADS="1")
    assert process.returncode == -signal.SIGKILL
    assert len(saved(killed)["history"]) == 2

    monkeypatch.setitem(DATA, "jittered", jittered)
    torch.manual_seed(99)  # the global generator has no say
    assert main([*command.split(), str(killed), "--resume"]) == 0
    assert main([*command.split(), str(left_alone)]) == 0
    expected, found = saved(left_alone), saved(killed)
    assert_same(found, expected)
    assert len(found["history"]) == 4


def test_resuming_says_where_there_is_nothing_to_go_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--epochs", "1", "--out", str(tmp_path)]
    said = []
    for option in ("--resume", "--resume", "--overwrite"):
        assert main([*command, option]) == 0
        said.append(capsys.readouterr().out)
    (run,) = tmp_path.glob("digits/*")
    assert f"there is nothing to go on from in {run}: trained from the start\n" in said[0]
    assert not any("nothing to go on" in text for text in said[1:])


@pytest.mark.parametrize("change", ["--learning-rate 0.2", "--epochs 3", "--amp bf16"])
def test_resuming_with_another_setting_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    command = ["train", "--epochs", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    assert main([*command, "--resume", *change.split()]) == 2
    error = capsys.readouterr().err
    flag, value = change.split()
    assert f"was saved with {flag[2:].replace('-', '_')}" in error
    assert value in error
    assert error.count("\n") == 1


def test_resuming_with_other_labels_is_refused(tmp_path: Path) -> None:
    digits = load_data("digits")
    config = TrainingConfig(
        noise=("0.4",), losses=("dal",), seeds=(0,), changes={"epochs": 1}, out=tmp_path, verbose=False
    )
    run_training(config, digits)
    other = replace(digits, train_labels=digits.train_labels.flip(0), true_labels=digits.true_labels.flip(0))
    with pytest.raises(UsageError, match="was saved with training labels"):
        run_training(replace(config, resume=True), other)


class Command:
    """What a hostile checkpoint would have run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", pickle.dumps(Command(), 2), pickle.dumps({"epoch": 1}, 2)]
)
def test_a_checkpoint_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    command = ["train", "--epochs", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    (path,) = tmp_path.glob(f"*/*/{CHECKPOINT}")
    path.write_bytes(content)
    assert main([*command, "--resume"]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": []}, "AttributeError"),
        ({"network": None}, "KeyError 'network'"),
        ({"network": {}}, "RuntimeError Error"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "ValueError"),
        ({"history": [{"epoch": 1}]}, "TypeError"),
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], reason: str
) -> None:
    command = ["train", "--epochs", "1", "--widths", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    (path,) = tmp_path.glob(f"*/*/{CHECKPOINT}")
    state = {**torch.load(path, weights_only=True), **change}
    torch.save({name: value for name, value in state.items() if value is not None}, path)
    assert main([*command, "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dal-train: {path} cannot be used: {reason}")
    assert error.count("\n") == 1
