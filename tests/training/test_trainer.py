"""A training in one process: its optimisation, in low precision too, and where DAL is known to fail."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dal_kernels import ScheduleWarning
from dal_kernels.noise import UNKNOWN
from dal_kernels.training import TrainingConfig, UsageError, main, progress, run_training
from dal_kernels.training.data import DATA, DataSet
from dal_kernels.training.data.base import TensorImages
from dal_kernels.training.train import Trainer
from support.trainings import needs_training, trainer_on

needs_training()


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


def parameters(trainer: Trainer) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trainer.evaluated.parameters()).detach()


def test_a_batch_in_parts_gives_the_step_of_the_whole(digits: DataSet) -> None:
    whole, parts = (trainer_on(digits, "gce", batch_size=100, accumulate=count, epochs=1) for count in (1, 3))
    metrics = [trainer.run_epoch(lambda: None) for trainer in (whole, parts)]
    torch.testing.assert_close(parameters(parts), parameters(whole), rtol=1e-4, atol=1e-5)
    assert metrics[1].train_loss == pytest.approx(metrics[0].train_loss, rel=1e-5)
    assert metrics[1].target_prob == pytest.approx(metrics[0].target_prob, rel=1e-5)


def test_averaged_weights_are_measured_and_resumed(digits: DataSet) -> None:
    trainer = trainer_on(digits, "gce", ema_decay=0.9, batch_size=450, epochs=2)
    average = parameters(trainer)
    step = trainer.optimizer.step
    seen = []

    def watched(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        seen.append(torch.nn.utils.parameters_to_vector(trainer.network.parameters()).detach().clone())
        return result

    trainer.optimizer.step = watched  # type: ignore[method-assign]
    trainer.run_epoch(lambda: None)
    average = seen[0]  # the first is taken as it is
    for weights in seen[1:]:
        average = 0.9 * average + 0.1 * weights
    torch.testing.assert_close(parameters(trainer), average)
    resumed = trainer_on(digits, "gce", ema_decay=0.9, batch_size=450, epochs=2)
    resumed.restore(trainer.state())
    assert torch.equal(parameters(resumed), parameters(trainer))


def test_lines_say_how_far_a_training_is_where_no_bar_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0)
    assert main(["train", "--epochs", "3", "--output", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "all done in" in line]
    assert len(lines) == 3
    assert re.search(r"dal, epoch 1 of 3: loss [\d.]+, test accuracy [\d.]+%; all done in 0:00:\d\d", lines[0])
