"""The trainer: killed and resumed, over processes, in low precision, and where DAL is known to fail."""

from __future__ import annotations

import math
import os
import pickle
import shlex
import signal
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dal_kernels import ScheduleWarning
from dal_kernels.noise import UNKNOWN
from dal_kernels.training import TrainingConfig, UsageError, main, parallel, run_training
from dal_kernels.training.data import DATA, DataSet, load_data
from dal_kernels.training.data.base import TensorImages
from dal_kernels.training.metrics import TIMINGS
from dal_kernels.training.parallel import World
from dal_kernels.training.recipes import recipe_for
from dal_kernels.training.run import CHECKPOINT
from dal_kernels.training.train import Trainer
from support.children import SUPPORT, run_python, torchrun
from support.jittered import jittered
from support.trainings import needs_training

needs_training()


def saved(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob(f"*/*/{CHECKPOINT}")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    state["history"] = [{k: v for k, v in epoch.items() if k not in TIMINGS} for epoch in state["history"]]
    return state


def trainer_on(data: DataSet, loss: str = "dal", **changes: Any) -> Trainer:
    return Trainer(
        recipe_for("digits", **changes), data, data.train_labels, loss, 0, 0, World(0, 1, torch.device("cpu"))
    )


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load_data("digits")


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same history and state, bit by bit."""
    assert str(found["history"]) == str(expected["history"]), "as text, for NaN does not equal itself"
    assert found["scheduler"] == expected["scheduler"]
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=0, atol=0)
    for name, weights in expected["network"].items():
        assert torch.equal(found["network"][name], weights), name
    for name, state in expected["optimizer"]["state"].items():
        assert torch.equal(found["optimizer"]["state"][name]["momentum_buffer"], state["momentum_buffer"])


# --- killed and resumed


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


def test_resuming_with_other_labels_is_refused(tmp_path: Path, digits: DataSet) -> None:
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


# --- processes


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


# --- optimisation


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]),
        ({"schedule": "step", "decay": 0.1, "decay_every": 2}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "exponential", "decay": 0.5}, [0.5**i for i in range(6)]),
        ({"schedule": "constant", "warmup_epochs": 3}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"schedule": "cosine", "warmup_epochs": 2}, [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    digits: DataSet, changes: dict[str, Any], expected: list[float]
) -> None:
    trainer = trainer_on(digits, "gce", epochs=6, batch_size=1347, learning_rate=0.01, **changes)
    rates = [trainer.run_epoch(lambda: None).learning_rate for _ in range(6)]
    assert rates == pytest.approx([0.01 * factor for factor in expected], rel=1e-5)


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_clipping_bounds_the_step(digits: DataSet, amp: str) -> None:
    trainer = trainer_on(digits, epochs=1, batch_size=1347, clip_norm=0.01, amp=amp)
    before = torch.nn.utils.parameters_to_vector(trainer.network.parameters()).detach().clone()
    trainer.run_epoch(lambda: None)
    moved = torch.nn.utils.parameters_to_vector(trainer.network.parameters()).detach() - before
    assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=0.01)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_almost_as_float32(digits: DataSet, amp: str) -> None:
    trained = {name: trainer_on(digits, "cross-entropy", epochs=2, amp=name) for name in ("none", amp)}
    accuracies = {name: [t.run_epoch(lambda: None).test_accuracy for _ in range(2)][-1] for name, t in trained.items()}
    assert accuracies[amp] > 0.7
    assert accuracies[amp] == pytest.approx(accuracies["none"], abs=0.02)
    weights, exact = (dict(t.network.named_parameters())["1.weight"] for t in (trained[amp], trained["none"]))
    assert not torch.equal(weights, exact)
    assert (weights - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("loss_step", "steps"), [("epoch", 2), ("iteration", 2 * 43)])
@pytest.mark.parametrize("loss", ["support.own_losses:Stepping", "dal-fixed"])
def test_the_loss_is_stepped_as_asked(digits: DataSet, loss: str, loss_step: str, steps: int) -> None:
    trainer = trainer_on(digits, loss, epochs=2, loss_step=loss_step)
    metrics = [trainer.run_epoch(lambda: None) for _ in range(2)]
    if loss == "dal-fixed":
        assert trainer.loss.schedule.position == trainer.loss.schedule.total_steps == steps
        assert [epoch.q for epoch in metrics] == pytest.approx([0.6, 1.05])
    else:
        assert trainer.loss.steps == steps
        assert all(math.isnan(epoch.q) and math.isnan(epoch.target_prob) for epoch in metrics)


@pytest.mark.parametrize("loss", ["cross-entropy", "dal"])
def test_the_loss_time_is_a_share(digits: DataSet, loss: str) -> None:
    metrics = trainer_on(digits, loss, epochs=1).run_epoch(lambda: None)
    assert 0 < metrics.loss_time_share < 1


def test_the_mean_probability_of_the_labels_is_that_of_the_loss(digits: DataSet) -> None:
    metrics = trainer_on(digits, "mae", epochs=1).run_epoch(lambda: None)
    assert metrics.target_prob == pytest.approx(1 - metrics.train_loss, rel=1e-5)


def test_a_truth_that_nobody_knows_is_not_counted(digits: DataSet) -> None:
    true = digits.train_labels.clone()
    true[:10] = UNKNOWN
    true[10:15] = (true[10:15] + 1) % 10
    trainer = trainer_on(replace(digits, true_labels=true), epochs=1)
    assert trainer.wrong == 5


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("torch.nn.functional.mse_loss", r"cannot be used on logits \(32, 10\) and labels \(32,\): RuntimeError: "),
        ("torch.nn.functional.one_hot", r"cannot be used .*: "),
        ("support.own_losses:per_sample", r"must give one number with a gradient, got shape \(32,\)"),
        ("support.own_losses:detached", r"must give one number with a gradient, got shape \(\)"),
        ("support.own_losses:a_float", "must give one number with a gradient, got float"),
    ],
)
def test_a_loss_that_gives_no_loss_is_named(digits: DataSet, loss: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"loss {loss} {message}"):
        trainer_on(digits, loss, epochs=1).run_epoch(lambda: None)


# --- batches of one sample


def test_batch_normalisation_trains_where_the_last_sample_is_alone(digits: DataSet) -> None:
    trainer = trainer_on(digits, model="cnn", widths=(8, 8, 8), batch_size=673, epochs=1)
    assert len(trainer.batches) == 2
    assert math.isfinite(trainer.run_epoch(lambda: None).train_loss)


def test_batch_normalisation_of_single_samples_is_refused_in_a_line(digits: DataSet) -> None:
    trainer = trainer_on(digits, model="cnn", widths=(8, 8, 8), batch_size=1, epochs=1)
    with pytest.raises(UsageError, match=r"batch_size must be at least 2, 2 for each process, got 1, of 1347 training"):
        trainer.run_epoch(lambda: None)


# --- many classes


def clusters(classes: int) -> DataSet:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 64, generator=generator)
    train, test = torch.arange(classes).repeat(20), torch.arange(classes).repeat(2)
    images, unseen = (
        TensorImages(centres[labels] + 0.5 * torch.randn(len(labels), 64, generator=generator))
        for labels in (train, test)
    )
    return DataSet("clusters", classes, images, train, train, unseen, test)


@pytest.fixture(scope="module")
def thousand() -> DataSet:
    return clusters(1000)


@pytest.mark.parametrize(
    ("loss", "classes", "changes", "stalls"),
    [
        ("dal-fixed", 1000, {"q_start": 0.6, "learning_rate": 0.1}, True),
        ("dal", 1000, {"q_start": 0.6, "learning_rate": 0.1}, False),
        ("dal-fixed", 1000, {"q_start": 0.2, "learning_rate": 1.0}, False),
        ("dal-fixed", 1000, {"q_start": 0.6, "learning_rate": 2e-3, "optimizer": "adamw"}, False),
        ("dal-fixed", 10, {"q_start": 0.6, "learning_rate": 0.1}, False),
    ],
)
def test_with_many_classes_sgd_stalls_with_a_warning_at_a_fixed_pace_unless_q_starts_low(
    thousand: DataSet, monkeypatch: pytest.MonkeyPatch, loss: str, classes: int, changes: dict[str, Any], stalls: bool
) -> None:
    data = thousand if classes == 1000 else clusters(classes)
    monkeypatch.setitem(DATA, "clusters", lambda folder: data)
    changes = {"widths": (), "schedule": "constant", "epochs": 10, **changes}
    config = TrainingConfig(
        data="clusters",
        preset="fashion-mnist",
        changes=changes,
        noise=("0.4",),
        losses=(loss,),
        seeds=(0,),
        verbose=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accuracy = run_training(config, data).runs[0].history[-1].test_accuracy
    said = [str(warning.message) for warning in caught if warning.category is ScheduleWarning]
    assert len(said) == stalls, "once a run"
    assert accuracy < 0.05 if stalls else accuracy > 0.9
    assert all("lower q_start" in message and "0.001" in message for message in said)
