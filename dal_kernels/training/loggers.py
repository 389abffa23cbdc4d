"""Metrics of each epoch to where people watch them: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from dal_kernels.training.atomic import replacing
from dal_kernels.training.checkpoint import usable
from dal_kernels.training.errors import UsageError, need
from dal_kernels.training.metrics import EpochMetrics

__all__ = ["LOGGERS", "TRACKED", "Loggers", "check_loggers"]

PROJECT = "dal-train"
# Which run of each service a run of ours is, so that it goes on there when it is resumed.
TRACKED = "tracked.json"


class Logger(Protocol):
    """Takes the metrics of one run; ``id`` is what its service knows the run by, None if it needs no name."""

    id: str | None

    def log(self, epoch: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Events in tensorboard/ of the run's folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: str | None, done: int) -> None:
        writer = need("torch.utils.tensorboard", "tensorboard", in_extra=False).SummaryWriter
        # What a killed training wrote of an epoch that it left no checkpoint of is not shown twice.
        self._writer = writer(folder / "tensorboard", purge_step=done + 1)
        self._writer.add_text("settings", f"    {json.dumps(settings)}", done)
        self.id: str | None = None

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of the project "dal-train"; wandb's own variables give another, and say where it is and whether at all."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: str | None, done: int) -> None:
        wandb, project = need("wandb", in_extra=False), os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(
            project=project, name=folder.name, dir=folder, config=dict(settings), id=known, resume="allow"
        )
        self.id: str | None = self._run.id

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=epoch)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of the experiment "dal-train"; MLflow's own variables give another, and say where it is."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: str | None, done: int) -> None:
        self._mlflow = need("mlflow", in_extra=False)
        if known is None and not os.environ.keys() & {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"}:
            self._mlflow.set_experiment(PROJECT)
        self.id: str | None = self._mlflow.start_run(run_id=known, run_name=folder.name, nested=True).info.run_id
        if known is None:
            self._mlflow.log_params(settings)

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=epoch)

    def close(self) -> None:
        self._mlflow.end_run()


# By the names of the command line; csv is metrics.csv, which every run writes.
LOGGERS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any], str | None, int], Logger]] | None] = {
    "csv": None,
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "wandb": ("wandb", _Wandb),
    "mlflow": ("mlflow", _MLflow),
}


def check_loggers(names: Sequence[str]) -> None:
    """Miss a package before the training, not in it.

    Raises:
        UsageError: there is no such logger, or its package is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise UsageError(f"loggers must be among {', '.join(LOGGERS)}, got {name!r}")
        if entry := LOGGERS[name]:
            need(entry[0], name, in_extra=False)


class Loggers:
    """The loggers of one run, of which each goes on where the run does.

    An epoch is to be logged before it is in a checkpoint: a training that is killed between the two trains and logs it
    again, with the same numbers, where it would otherwise be missing.

    Args:
        names: in ``LOGGERS``.
        folder: the run's.
        settings: plain values, told once.
        done: epochs that have been logged before.
        say: is told when a logger fails, which ends the logger and not the training.

    Raises:
        UsageError: a logger cannot be opened.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], done: int, say: Callable[[str], None]
    ) -> None:
        self._say, self._open = say, dict[str, Logger]()
        known: dict[str, str] = {}
        if (folder / TRACKED).exists():
            with usable(folder / TRACKED):
                known = json.loads((folder / TRACKED).read_text(encoding="utf-8"))
        for name in names:
            if entry := LOGGERS[name]:
                try:
                    self._open[name] = entry[1](folder, settings, known.get(name), done)
                except Exception as error:  # a service may fail in any way
                    self.close()
                    raise UsageError(f"the logger {name} cannot be used: {_first_line(error)}") from error
        known |= {name: logger.id for name, logger in self._open.items() if logger.id is not None}
        if known:
            with replacing(folder / TRACKED) as partial:
                partial.write_text(json.dumps(known) + "\n", encoding="utf-8")

    def log(self, metrics: EpochMetrics) -> None:
        """Log an epoch, but for what is NaN, because there was nothing to measure."""
        values = {name: float(value) for name, value in asdict(metrics).items() if name != "epoch" and value == value}
        self._each(lambda logger: logger.log(metrics.epoch, values))

    def close(self) -> None:
        """All epochs are logged."""
        self._each(lambda logger: logger.close())
        self._open.clear()

    def _each(self, use: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            try:
                use(logger)
            except Exception as error:  # a network that is gone must not end days of training
                del self._open[name]
                self._say(f"  the logger {name} failed and is left: {_first_line(error)}; metrics.csv has all")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
