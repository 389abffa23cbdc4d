"""The grid of runs: each noise rate, seed and loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Generator

from benchmarks.training.data import DATA, DataSet, load_data
from benchmarks.training.errors import UsageError, need
from benchmarks.training.losses import LOSSES
from benchmarks.training.models import mlp
from benchmarks.training.noise import noise_rate, symmetric_noise
from benchmarks.training.recipes import RECIPES
from benchmarks.training.records import Run, append_csv
from benchmarks.training.train import train

__all__ = ["Results", "TrainingConfig", "run_training"]


@dataclass(frozen=True)
class TrainingConfig:
    """What to train.

    Attributes:
        data: a name in ``DATA``; ``data_dir`` is where its files are, if it has any.
        noise: symmetric noise rates, the shares of training labels that are wrong, in [0, 1).
        losses: names in ``LOSSES``.
        seeds: one run each. A seed fixes the wrong labels, the first weights and the batch order, the same for each
            loss. Equal seeds give equal numbers, on one machine with one number of threads.
        epochs: None for the recipe's. DAL's schedule spans them: below about 10 on digits its q passes 1 before the
            network has learnt anything, and it ends at chance.
        out: folder for the CSV of metrics, written run by run; None writes nothing.
        threads: of PyTorch on the CPU; more than one does not pay for networks this small.
        device: where to train.
        verbose: say what is going on, with a progress bar on a terminal.
    """

    data: str = "digits"
    data_dir: Path | None = None
    noise: tuple[float, ...] = (0.4, 0.6)
    losses: tuple[str, ...] = tuple(LOSSES)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int | None = None
    out: Path | None = None
    threads: int = 1
    device: str = "cpu"
    verbose: bool = True

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise UsageError(f"data must be one of {', '.join(DATA)}, got {self.data!r}")
        for name in ("noise", "losses", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UsageError(f"{name} must be one or more different values, got {list(values)}")
        for loss in self.losses:
            if loss not in LOSSES:
                raise UsageError(f"losses must be among {', '.join(LOSSES)}, got {loss!r}")
        for rate in self.noise:
            if not 0 <= rate < 1:
                raise UsageError(f"noise must be rates in [0, 1), got {rate}")
        if min(self.seeds) < 0:
            raise UsageError(f"seeds must be >= 0, got {min(self.seeds)}")
        for name, value in (("epochs", self.epochs), ("threads", self.threads)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be >= 1, got {value}")
        _check_device(self.device)


@dataclass(frozen=True)
class Results:
    """All runs in the order they were trained, the time they took in seconds, and the file of metrics, if written."""

    config: TrainingConfig
    runs: list[Run]
    seconds: float
    csv: Path | None


def run_training(config: TrainingConfig) -> Results:
    """Train each loss at each noise rate with each seed, and measure after each epoch.

    Raises:
        UsageError: the data or a package is missing, or the folder cannot be written.
    """
    start = time.perf_counter()
    bar_of = need("tqdm").tqdm
    data = load_data(config.data, config.data_dir)
    epochs = config.epochs or RECIPES[config.data].epochs
    total = len(config.noise) * len(config.seeds) * len(config.losses) * epochs
    csv_path = None if config.out is None else _make_folder(config.out) / f"{config.data}.csv"
    runs = []
    # disable=None: no bar where the output is not a terminal.
    with _threads(config.threads), bar_of(total=total, unit="epoch", disable=None if config.verbose else True) as bar:

        def say(line: str) -> None:
            if config.verbose:
                bar.write(line)

        for run in _runs(config, data, epochs, say, bar.update):
            runs.append(run)
            if csv_path is not None:
                append_csv(csv_path, run, new=len(runs) == 1)
    return Results(config, runs, time.perf_counter() - start, csv_path)


def _runs(
    config: TrainingConfig, data: DataSet, epochs: int, say: Callable[[str], None], tick: Callable[[], object]
) -> Iterator[Run]:
    recipe = RECIPES[config.data]
    on_device = data.to(config.device)
    for noise, seed in product(config.noise, config.seeds):
        given = symmetric_noise(data.train_labels, noise, data.classes, _generator(seed, "labels"))
        measured = noise_rate(given, data.train_labels)
        say(f"{data.name}, seed {seed}: {measured:.1%} of {len(given)} training labels wrong, {noise:.1%} asked for")
        for loss in config.losses:
            started = time.perf_counter()
            run = Run(data.name, noise, measured, loss, seed)
            model = mlp(data.train_inputs[0].numel(), recipe.hidden, data.classes, _stream(seed, "weights"))
            steps = train(
                model.to(config.device),
                LOSSES[loss].build(epochs),
                on_device,
                given.to(config.device),
                recipe,
                epochs,
                _generator(seed, "batches"),
            )
            for metrics in steps:
                run.history.append(metrics)
                tick()
            last, best = run.history[-1], max(epoch.test_accuracy for epoch in run.history)
            memorised = f"{last.memorised:6.1%} of the wrong labels memorised, " if measured else ""
            say(
                f"  {LOSSES[loss].title:<13}  test accuracy {last.test_accuracy:6.1%} (best {best:6.1%}), {memorised}"
                f"{time.perf_counter() - started:.1f} s"
            )
            yield run


def _stream(seed: int, use: str) -> int:
    """A seed for each use: one seed for all would put the flipped samples first in the first epoch's order."""
    return 10 * seed + ("labels", "weights", "batches").index(use)


def _generator(seed: int, use: str) -> Generator:
    return Generator().manual_seed(_stream(seed, use))


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made: {error}") from error
    return folder


def _check_device(name: str) -> None:
    try:
        torch.zeros((), device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
