"""The grid of runs: each noise, seed and loss, every run in a folder of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from dal_kernels.training.config import TrainingConfig
from dal_kernels.training.data import DataSet
from dal_kernels.training.data.base import NOTHING
from dal_kernels.training.errors import need
from dal_kernels.training.noise import NoisyLabels, parse_noise
from dal_kernels.training.parallel import join_world
from dal_kernels.training.progress import Progress
from dal_kernels.training.provenance import provenance
from dal_kernels.training.records import Run
from dal_kernels.training.run import Session, make_folder, train_run

__all__ = ["Results", "run_training"]

HELD_OUT = 0.1  # of the training samples, where there are no others to test on


@dataclass(frozen=True)
class Results:
    """All runs in the order they were trained, the time they took in seconds, and the command that asked for them.

    Of the processes that torchrun starts, one ``writes``. ``verified`` is whether the labels of the test are.
    """

    config: TrainingConfig
    runs: list[Run]
    seconds: float
    command: str
    writes: bool
    verified: bool


def run_training(config: TrainingConfig, data: DataSet | None = None) -> Results:
    """Train each loss with each noise and each seed, and measure after each epoch.

    Below ``config.out`` each run leaves its metrics, labels, settings and last checkpoint, from which ``config.resume``
    goes on. Under torchrun all processes call this, and one of them writes.

    Args:
        data: the data set ``config.data``, if it has been loaded already.

    Raises:
        UsageError: the data or a package is missing, the folder cannot be written, a checkpoint does not fit, a setting
            does not suit the data, or another process has ended.
    """
    start = time.perf_counter()
    bar_of = need("tqdm").tqdm
    data = data or config.load()
    recipe = config.recipe
    if config.inspect:
        recipe = replace(recipe, val_fraction=0.0)  # all labels are looked at
        data = replace(data, validation=NOTHING)  # and to the last epoch
    elif not len(data.test) and not recipe.val_fraction:
        recipe = replace(recipe, val_fraction=HELD_OUT)
    runs: list[Run] = []
    world = join_world(config.device)
    with _own_state(config.threads, world.device), world.all_needed():
        folder = None if config.out is None else world.from_main(partial(make_folder, config.out / data.name))
        made_by = provenance(config, world)
        trained = len(data.train) - round(recipe.val_fraction * len(data.train))
        steps = -(-trained // recipe.batch_size) * recipe.epochs
        total = len(config.noise) * len(config.seeds) * len(config.losses) * steps
        silent = not (config.verbose and world.main)
        # disable=None: no bar where the output is not a terminal.
        with bar_of(total=total, unit="batch", disable=True if silent else None) as bar:

            def say(line: str) -> None:
                if not silent:
                    bar.write(line)

            if data.note:
                say(f"{data.name}: {data.note}")
            progress = Progress(total, say if bar.disable else lambda line: None, bar.update)
            session = Session(config, recipe, data, world, folder, made_by, say, progress)
            for noise, seed in product(map(parse_noise, config.noise), config.seeds):
                made = partial(noise.apply, data, seed)
                labels = made() if noise.path is None else world.from_main(made)  # a file need be on one disk only
                say(f"{data.name}, noise {noise}, seed {seed}: {_in_words(labels, data)}")
                for loss in config.losses:
                    run = Run(
                        data.name,
                        noise,
                        labels.measured,
                        loss,
                        seed,
                        corrected=config.labels is not None,
                        inspected=config.inspect,
                    )
                    train_run(session, labels, run)
                    runs.append(run)
    return Results(config, runs, time.perf_counter() - start, made_by["command"], world.main, data.verified)


def _in_words(labels: NoisyLabels, data: DataSet) -> str:
    """How many labels are wrong, as far as anybody knows."""
    if math.isnan(labels.measured):
        return "how many of the training labels are wrong is unknown"
    if not data.verified:
        return f"{labels.measured:.1%} of the training labels were changed; how many were wrong before is unknown"
    return f"{labels.measured:.1%} of the training labels are wrong"


@contextmanager
def _own_state(threads: int, device: torch.device) -> Iterator[None]:
    """Threads as asked for, and random numbers of our own; the caller's come back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(before)
