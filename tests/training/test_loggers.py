"""Metrics of each epoch in TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dal_kernels.training import TrainingConfig, UsageError, main
from dal_kernels.training.checkpoint import save_checkpoint
from dal_kernels.training.metrics import EpochMetrics
from dal_kernels.training.train import Trainer
from support.trainings import needs_training, rows_of

needs_training()


def train(out: Path, logger: str, *arguments: str, epochs: int = 2) -> int:
    command = ["train", "--epochs", str(epochs), "--schedule", "constant", "--output", str(out), "--logger", logger]
    return main([*command, *arguments])


def measured(out: Path) -> dict[int, float]:
    """Test accuracies by epoch, of the one run."""
    (path,) = out.glob("*/*/metrics.csv")
    return {int(row["epoch"]): float(row["test_accuracy"]) for row in rows_of(path)}


class Service:
    """wandb and mlflow, as far as they are used: what is logged by run and step."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.running = ""
        self.broken_at = 0

    def begin(self, name: str | None) -> str:
        self.running = name or f"run{len(self.runs)}"
        self.runs.setdefault(self.running, {})
        return self.running

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.broken_at:
            raise ConnectionError("no network")
        self.runs[self.running][step] = values

    def end(self) -> None:
        self.running = ""

    # wandb
    def init(self, *, id: str | None, config: dict[str, Any], **_: Any) -> Any:
        self.settings[self.begin(id)] = config
        return SimpleNamespace(id=self.running, log=self.log, finish=self.end)

    # MLflow
    def set_experiment(self, name: str) -> None:
        assert name == "dal-train"

    def start_run(self, *, run_id: str | None, **_: Any) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=self.begin(run_id)))

    def log_params(self, settings: dict[str, Any]) -> None:
        self.settings[self.running] = settings

    log_metrics = log
    end_run = end


@pytest.fixture(params=["wandb", "mlflow"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Service]:
    made = Service()
    monkeypatch.setitem(sys.modules, request.param, made)
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    return request.param, made


def stop_in_second_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Trainer.run_epoch

    def run_epoch(trainer: Trainer, tick: Any) -> EpochMetrics:
        if trainer.history:
            raise KeyboardInterrupt
        return whole(trainer, tick)

    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)


def test_a_service_gets_each_epoch_and_goes_on_in_the_run_that_is_resumed(
    tmp_path: Path, service: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, made = service
    with monkeypatch.context() as context:
        stop_in_second_epoch(context)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, name)
    assert (list(made.runs["run0"]), made.running) == ([1], "")
    assert train(tmp_path, name, "--resume") == 0
    logged = {step: values["test_accuracy"] for step, values in made.runs["run0"].items()}
    assert logged == measured(tmp_path)
    assert list(logged) == [1, 2]
    assert all(value == value for values in made.runs["run0"].values() for value in values.values()), "no NaN"
    assert (made.settings["run0"]["epochs"], made.settings["run0"]["loss"]) == (2, "dal")
    assert train(tmp_path, name) == 0, "trained anew, which is another run there"
    assert list(made.runs) == ["run0", "run1"]


def test_an_epoch_is_logged_before_its_checkpoint(
    tmp_path: Path, service: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, made = service
    monkeypatch.setattr("dal_kernels.training.run.save_checkpoint", lambda path, state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, name)
    assert list(made.runs["run0"]) == [1], "killed after the checkpoint it would be missing for ever"


def test_a_logger_that_fails_is_left_and_the_training_goes_on(
    tmp_path: Path, service: tuple[str, Service], capsys: pytest.CaptureFixture[str]
) -> None:
    name, made = service
    made.broken_at = 2
    assert train(tmp_path, name, epochs=3) == 0
    assert f"the logger {name} failed and is left: no network; metrics.csv has all" in capsys.readouterr().out
    assert list(made.runs["run0"]) == [1]
    assert list(measured(tmp_path)) == [1, 2, 3]


def test_a_logger_that_cannot_be_opened_is_an_error(
    tmp_path: Path, service: tuple[str, Service], capsys: pytest.CaptureFixture[str]
) -> None:
    name, made = service
    made.begin = lambda name: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    assert train(tmp_path, name) == 2
    assert capsys.readouterr().err == f"dal-train: the logger {name} cannot be used: division by zero\n"


@pytest.mark.parametrize(
    ("logger", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_missing_logger_is_said_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logger: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert train(tmp_path, logger) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith(f"dal-train: {logger} is missing")
    assert error.endswith(f": pip install {logger}\n")


def test_loggers_are_checked(tmp_path: Path) -> None:
    assert train(tmp_path, "csv") == 0
    with pytest.raises(UsageError, match="loggers must be among csv, tensorboard, wandb, mlflow, got 'excel'"):
        TrainingConfig(loggers=("excel",))
    with pytest.raises(SystemExit):
        train(tmp_path, "excel")


def test_tensorboard_shows_each_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    saved: list[Path] = []

    def save(path: Path, state: dict[str, Any]) -> None:
        """Not in the second epoch: the training stops between its log and its checkpoint."""
        saved.append(path)
        save_checkpoint(path, state) if len(saved) == 1 else 1 / 0

    with monkeypatch.context() as context:
        context.setattr("dal_kernels.training.run.save_checkpoint", save)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, "tensorboard")
    assert train(tmp_path, "tensorboard", "--resume") == 0
    (folder,) = tmp_path.glob("*/*/tensorboard")
    events = reader.EventAccumulator(str(folder)).Reload()
    accuracies = [(event.step, event.value) for event in events.Scalars("test_accuracy")]
    assert accuracies == [(epoch, pytest.approx(accuracy)) for epoch, accuracy in measured(tmp_path).items()]
    assert "memorised" not in events.Tags()["scalars"], "there were no wrong labels"
