"""One network: trained in a folder of its own, from its checkpoint if there is one."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dal_kernels.noise import UNKNOWN, noise_rate
from dal_kernels.training.checkpoint import load_checkpoint, save_checkpoint, usable
from dal_kernels.training.config import TrainingConfig
from dal_kernels.training.config_file import write_config
from dal_kernels.training.corrections import read_corrections
from dal_kernels.training.data import DataSet
from dal_kernels.training.data.base import Images, Part
from dal_kernels.training.errors import UsageError, reason
from dal_kernels.training.inspector import LabelInspector
from dal_kernels.training.loader import skipped_in_words
from dal_kernels.training.loggers import TRACKED, Loggers
from dal_kernels.training.losses import loss_title
from dal_kernels.training.noise import NoisyLabels
from dal_kernels.training.parallel import World
from dal_kernels.training.progress import Progress
from dal_kernels.training.provenance import RUN, other_setting, read_makers, write_makers
from dal_kernels.training.recipes import Recipe
from dal_kernels.training.records import Run, write_classes, write_metrics, write_rows
from dal_kernels.training.train import Trainer

__all__ = ["CHECKPOINT", "Session", "make_folder", "train_run"]

CHECKPOINT, BEST, SKIPPED = "checkpoint.pt", "best.pt", "skipped.csv"
CONFIG, METRICS = "config.yaml", ("metrics.csv", "metrics.jsonl")
AFTERWARDS = ("classes.csv", "confusion.csv", "curves.png", "curves.svg")


@dataclass(frozen=True)
class Session:
    """What the runs of one command share.

    Attributes:
        recipe: that of ``config``, as it suits ``data``.
        folder: holds a folder for each run; None writes nothing.
        made_by: how they are trained, for the record.
        say: prints a line.
    """

    config: TrainingConfig
    recipe: Recipe
    data: DataSet
    world: World
    folder: Path | None
    made_by: dict[str, str]
    say: Callable[[str], None]
    progress: Progress


def train_run(session: Session, labels: NoisyLabels, run: Run) -> None:
    """Train one network, or what is left of its training, and fill ``run.history``.

    Raises:
        UsageError: another run is in its folder, a checkpoint does not fit, or a setting does not suit the data.
    """
    start = time.perf_counter()
    config, recipe, world, say = session.config, session.recipe, session.world, session.say
    folder, made_by, progress = session.folder, session.made_by, session.progress
    data = labels.noise.known(session.data)
    if config.labels is not None and not data.verified:  # whoever puts a wrong one right would seem to spoil it
        data = replace(data, true_labels=torch.full_like(data.true_labels, UNKNOWN))
    corrections = None if config.labels is None else read_corrections(config.labels, data)
    given, weights = labels.labels, None
    if corrections is not None:
        given, weights = corrections.apply(given)
        wrong = noise_rate(given, data.true_labels)
        known = "" if math.isnan(wrong) else f"; {wrong:.1%} are wrong then"
        say(f"  {config.labels} replaces {int((given != labels.labels).sum())} of the labels{known}")
    inspector = LabelInspector(len(data.train), data.classes) if config.inspect else None
    told = {"data": run.data, "noise": str(run.noise), "loss": run.loss, "seed": run.seed, **asdict(recipe)}
    settings: dict[str, Any] = {
        **told,
        "training labels (their hash)": _hash(given, weights),
        "inspected": config.inspect,
        "class_names": data.names,
    }
    trainer = Trainer(recipe, data, given, run.loss, run.seed, config.workers, world, weights, inspector)
    own, source = None if folder is None else folder / run.folder, _source(config, data, trainer)
    if own is not None:

        def open_folder() -> tuple[dict[str, Any] | None, list[dict[str, str]]]:
            """The state to go on from and how it was made, or else a folder for a new run."""
            if config.resume and (own / CHECKPOINT).exists():
                return load_checkpoint(own / CHECKPOINT, settings), read_makers(own / RUN, made_by)
            sources = {name: value for name, value in source.items() if name != "data source"}  # the path says more
            other = other_setting(own / RUN, {**settings, **sources})
            if (own / CHECKPOINT).exists() and other is not None and not config.overwrite:
                raise UsageError(
                    f"there is another run in {own}, with another {other}: give another --output, or --overwrite"
                )
            make_folder(own)
            for left in (CHECKPOINT, BEST, SKIPPED, TRACKED, *METRICS, *AFTERWARDS):  # of a run before this
                (own / left).unlink(missing_ok=True)
            replace(labels, labels=given).save(own / "labels.npz", paths=data.paths("train"), class_names=data.names)
            return None, []

        # The others need not see the folder, which may be on a disk of the first's own.
        state, makers = world.from_main(open_folder)
        run.made_by.extend(makers)
        if state is not None:
            with usable(own / CHECKPOINT):
                trainer.restore(state)
            if world.main:  # whoever was killed after a checkpoint left them without its epoch
                write_metrics(own / "metrics", [replace(run, history=trainer.history)])
            progress.skip(len(trainer.history) * len(trainer.batches))
        elif config.resume:
            say(f"  there is nothing to go on from in {own}: trained from the start")
    if not trainer.done and made_by not in run.made_by:
        run.made_by.append(made_by)
        if own is not None and world.main:
            write_config(own / CONFIG, config, recipe, run)
            write_makers(own / RUN, {**settings, **source}, run.made_by)
    resumed = len(trainer.history)
    with ExitStack() as stack:
        loggers: list[Loggers] = []
        if own is not None and not trainer.done:

            def open_loggers() -> None:
                loggers.append(stack.enter_context(closing(Loggers(config.loggers, own, told, resumed, say))))

            world.from_main(open_loggers)
        while not trainer.done:
            metrics = trainer.run_epoch(progress.tick)
            unreadable = trainer.unreadable()
            progress.tell(trainer)
            if own is not None and world.main:
                for logger in loggers:
                    logger.log(metrics)
                state = {"settings": settings, "shape": trainer.shape, "moments": data.moments, **trainer.state()}
                # The best first: whoever is killed between the two trains this epoch again, and saves both.
                if trainer.held and trainer.best_epoch == len(trainer.history):
                    save_checkpoint(own / BEST, state)
                save_checkpoint(own / CHECKPOINT, state)
                write_metrics(own / "metrics", [replace(run, history=trainer.history)])
                if unreadable:
                    rows = [(part, data.paths(part)[i], why) for part, i, why in unreadable]
                    write_rows(own / SKIPPED, ("part", "path", "reason"), rows)
    progress.skip((recipe.epochs - len(trainer.history)) * len(trainer.batches))
    unreadable = trainer.unreadable()
    images: dict[Part, Images] = {"train": data.train, "validation": data.validation, "test": data.test}
    for words in skipped_in_words((images[name], [i for part, i, _ in unreadable if part == name]) for name in images):
        say(f"  {words} and were left out{'' if own is None else f', see {own / SKIPPED}'}")
    run.history.extend(trainer.history)
    if own is not None and (len(data.test) or trainer.held):
        classified = trainer.classified()
        if world.main:
            write_classes(own, *classified, data.names)
    if inspector is not None:
        run.inspections.append(inspector.inspect())

    last = run.history[-1]
    wrong_ones = "wrong labels" if data.verified else "labels changed"
    memorised = ""
    if not math.isnan(last.memorised):
        memorised = f"{last.memorised:6.1%} of the {trainer.wrong} {wrong_ones} memorised, "
    already = f", {resumed} of {len(run.history)} epochs trained before" if resumed else ""
    best = run.history[trainer.best_epoch - 1]
    validated = f"validation {best.validation_accuracy:6.1%} in epoch {best.epoch}, the best, " if trainer.held else ""
    tested = f"test accuracy {last.test_accuracy:6.1%} (best {last.best_accuracy:6.1%}, by the test labels), "
    if trainer.held:
        tested = f"test accuracy {last.test_accuracy:6.1%}, in the epoch validated best {best.test_accuracy:6.1%}, "
    if not len(data.test):
        tested = ""
    say(f"  {loss_title(run.loss):<13}  {tested}{validated}{memorised}{time.perf_counter() - start:.1f} s{already}")


def _hash(labels: Tensor, weights: Tensor | None) -> str:
    """What tells labels and their weights apart from others."""
    arrays = [labels] if weights is None else [labels, weights]
    return hashlib.sha256(b"".join(array.numpy().tobytes() for array in arrays)).hexdigest()[:16]


def _source(config: TrainingConfig, data: DataSet, trainer: Trainer) -> dict[str, Any]:
    """Where a run's samples come from, so that what it gives can be mapped back."""
    _, _, path = config.data.partition(":")
    place = Path(path) if path else config.data_dir
    return {
        "data source": config.data,
        "data path": None if place is None else str(place.resolve()),
        "input shape": list(trainer.shape),
        "training samples": len(data.train),
        "validation samples": trainer.held,
        "test samples": len(data.test),
        "paths": "labels.npz",
    }


def make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made: {reason(error, folder)}") from error
    return folder
