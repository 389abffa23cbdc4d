"""The benchmark of tuned losses: one budget for all, nothing chosen by the test, and nothing trained twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tuned
from dal_kernels.training.data.base import DataSet
from dal_kernels.training.losses import build_loss
from dal_kernels.training.recipes import recipe_for


@pytest.mark.parametrize("name", tuned.VARIANTS)
def test_every_loss_has_the_same_number_of_trials_all_different(name: str) -> None:
    trials = tuned.trials(name, 0.1, tuned.WEIGHT_DECAYS)
    assert len({str(trial) for trial in trials}) == len(trials) == 12
    for trial in trials:
        build_loss(trial.loss, recipe_for("digits", **trial.changes), total_steps=3)


def test_the_validation_chooses_and_a_second_call_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuned, "MANY_RATES", (1e-4, 1.0))  # the first learns nothing in an epoch
    call = ["--epochs", "1", "--noise", "0.2", "--losses", "Fisher-Rao", "--seeds", "0", "--out", str(tmp_path)]
    call += ["--weight-decays", "0"]
    tuned.main(call)
    said = capsys.readouterr().out
    assert "fisher-rao, learning_rate 0.1, weight_decay 0" in said
    trained = (tmp_path / "digits.jsonl").read_bytes()
    assert trained.count(b"\n") == 3  # two trials, and one seed of the chosen
    monkeypatch.setattr(tuned.training, "run_training", None)
    tuned.main(call)
    assert capsys.readouterr().out == said
    assert (tmp_path / "digits.jsonl").read_bytes() == trained
    assert (tmp_path / "digits.md").read_text(encoding="utf-8") == said.rstrip("\n") + "\n"


def test_some_of_the_samples_are_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["--samples", "200", "--epochs", "1", "--noise", "0.2", "--losses", "Fisher-Rao", "--seeds", "0"]
    trained_on = []
    run = tuned.training.run_training

    def watched(config: Any, data: DataSet) -> Any:
        trained_on.append(data)
        return run(config, data)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuned.training, "run_training", watched)
        tuned.main([*call, "--weight-decays", "0", "--out", str(tmp_path)])
    assert capsys.readouterr().out.startswith("digits, 200 samples, 1 epochs")
    whole = tuned.training.TrainingConfig().load()
    for data in trained_on:
        assert len(data.train) == len(data.true_labels) == 200
        assert torch.equal(data.train_labels, whole.train_labels[:200])
        assert torch.equal(data.train.batch([7], False), whole.train.batch([7], False))
        assert len(data.test) == len(whole.test)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["digits-200.jsonl"], "of other samples another file"


@pytest.mark.parametrize("samples", [0, 1348])
def test_samples_that_are_not_there_are_refused(tmp_path: Path, samples: int) -> None:
    with pytest.raises(SystemExit, match=rf"--samples must be from 1 to 1347, got {samples}"):
        tuned.main(["--samples", str(samples), "--out", str(tmp_path)])
