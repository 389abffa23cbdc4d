"""Trainings over processes: they train as one, resume from what the first one finds, and say an error once."""

from __future__ import annotations

import shlex
import socket
import time
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from dal_kernels.training import UsageError, main, parallel
from dal_kernels.training.parallel import World
from support.children import PATIENCE, SUPPORT, start_python, torchrun
from support.trainings import assert_same, needs_training, saved

needs_training()


def closed_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    # 1347 samples do not divide by 2, so one counts twice in an epoch; with batches of 54 in a last batch of 51.
    command = shlex.split("train --loss gce --noise 0.4 --epochs 10 --learning-rate 0.2 --batch-size 54 --out")
    result = torchrun("-m", "dal_kernels.training", *command, str(tmp_path / "two"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("test accuracy") == 1, "one process prints"
    assert main([*command, str(tmp_path / "one")]) == 0
    two, one = saved(tmp_path / "two"), saved(tmp_path / "one")
    assert one["history"][-1]["test_accuracy"] > 0.8
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=3.5 / 450)
        assert ours["memorised"] == pytest.approx(theirs["memorised"], abs=3.5 / 539)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.005)
        assert ours["target_prob"] == pytest.approx(theirs["target_prob"], rel=0.005)
    for name, weights in one["network"].items():
        assert (two["network"][name] - weights).norm() < 0.02 * weights.norm(), name


def test_processes_go_on_from_what_the_first_one_finds(tmp_path: Path) -> None:
    result = torchrun(SUPPORT / "nodes.py", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same(saved(tmp_path / "0" / "stopped"), saved(tmp_path / "0" / "left alone"))
    assert not (tmp_path / "1").exists(), "one process writes"
    first, second = (path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("*.error")))
    assert first == second
    assert str(tmp_path / "0" / "spoilt") in first


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_with_one_sentence(lost: int, tmp_path: Path) -> None:
    """As on two machines, each with a torchrun of its own: nobody is there to end the process that is left."""
    variables = {"TORCHELASTIC_RUN_ID": "one", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(closed_port())}
    variables |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = shlex.split("-m dal_kernels.training train --noise 0.4 --widths 8 --epochs 100000 --output")
    processes = [start_python(*command, tmp_path / str(rank), RANK=str(rank), **variables) for rank in range(2)]
    left = processes[1 - lost]
    try:
        while not list((tmp_path / "0").rglob("checkpoint.pt")):
            assert left.poll() is None, left.communicate()
            time.sleep(0.1)
        processes[lost].kill()
        _, said = left.communicate(timeout=PATIENCE)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert left.returncode == 2, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("dal-train")]
    assert line.startswith("dal-train: one of the 2 processes has ended or cannot be reached (")
    assert line.endswith("; once all are started again, --resume goes on")


def test_an_error_is_said_where_the_machine_with_the_store_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a second machine once the first has ended, which it would wait for half an hour."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(closed_port()), "RANK": "1", "WORLD_SIZE": "2"}
    for name, value in {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "STORE_PATIENCE", timedelta(seconds=1))
    assert parallel.first_to_say("lost")


def test_networks_go_before_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    # The last owner of a gloo group must not be garbage: of some 15 such processes, one hung at its end.
    network = torch.nn.Linear(1, 1)
    network.__dict__["itself"] = network
    alive = weakref.ref(network)
    del network
    assert alive() is not None, "a cycle stays until it is collected"
    found = []
    monkeypatch.setattr(parallel.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.distributed, "destroy_process_group", lambda: found.append(alive()))
    parallel._leave_group()
    assert found == [None]


def test_an_error_of_all_processes_is_said_once(tmp_path: Path) -> None:
    result = torchrun("-m", "dal_kernels.training", "train", "--device", "cuda:1", "--out", str(tmp_path))
    assert result.returncode == 1
    (said,) = (line for line in result.stderr.splitlines() if line.startswith("dal-train: "))
    assert said.endswith("device must be cpu or cuda under torchrun, which is a GPU for each process, got 'cuda:1'")


def test_batch_norm_over_processes_needs_gpus() -> None:
    with pytest.raises(UsageError, match="sync_batch_norm needs GPUs"):
        World(0, 2, torch.device("cpu")).wrap(torch.nn.BatchNorm1d(3), sync_batch_norm=True)
