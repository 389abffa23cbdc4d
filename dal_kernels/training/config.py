"""What to train, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dal_kernels.training.data import BAD_IMAGES, DataSet, check_name, load_data
from dal_kernels.training.errors import UsageError
from dal_kernels.training.loggers import check_loggers
from dal_kernels.training.losses import LOSSES, build_loss
from dal_kernels.training.noise import parse_noise
from dal_kernels.training.recipes import Recipe, recipe_for
from dal_kernels.training.typed import check_least, check_types

__all__ = ["TrainingConfig", "check_common"]


def check_common(settings: Any) -> None:
    """Raises UsageError where data, bad_images, workers or threads make no sense, or a field is of another type."""
    check_types(settings)
    check_name(settings.data)
    if settings.bad_images not in BAD_IMAGES:
        raise UsageError(f"bad_images must be one of {', '.join(BAD_IMAGES)}, got {settings.bad_images!r}")
    check_least(workers=(settings.workers, 0), threads=(settings.threads, 1))


@dataclass(frozen=True)
class TrainingConfig:
    """A grid of runs: each noise with each seed and each loss.

    Attributes:
        data: a name in ``DATA``, of which ``data_dir`` is where its files are, if it has any; or KIND:PATH, with a kind
            in ``SOURCES``.
        bad_images: "skip" or "error", what is done about images that cannot be read.
        preset: a name in ``PRESETS``, None for that of the data set; ``changes`` are settings that replace its own.
            DAL's schedule spans the epochs: below about 10 on digits its q passes 1 before anything has been learnt.
        noise: how training labels are made wrong, each as ``parse_noise`` takes it.
        losses: each as ``build_loss`` takes it.
        labels: a table of labels that replace those after the noise, as ``read_corrections`` takes it.
        inspect: follow what the network makes of each label; ``Run.inspections`` says it.
        seeds: one run each. A seed fixes the wrong labels, the first weights and the batches, the same for each loss.
            Equal seeds give equal numbers, on one kind of machine with the same threads, processes and workers.
        out: folder for what is written, in a folder of the data set a folder for each run; None writes nothing.
        resume: go on with the runs that are there already; otherwise they are trained anew.
        overwrite: replace runs there of the same names that were trained otherwise, which are refused without it.
        loggers: names in ``LOGGERS``, where metrics go besides metrics.csv, which is always written.
        workers: processes that load batches; 0 for data that is in memory.
        threads: of PyTorch on the CPU; more than one does not pay for small networks.
        device: cpu, cuda or cuda:N; under torchrun cuda is a GPU for each process.
        verbose: say what is going on, with a progress bar on a terminal.
        command: what to type for these runs, for the record.

    Raises:
        UsageError: a value makes no sense.
    """

    data: str = "digits"
    data_dir: Path | None = None
    bad_images: str = "skip"
    preset: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    noise: tuple[str, ...] = ("0.4", "0.6")
    losses: tuple[str, ...] = tuple(LOSSES)
    seeds: tuple[int, ...] = (0, 1, 2)
    labels: Path | None = None
    inspect: bool = False
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    loggers: tuple[str, ...] = ("csv",)
    workers: int = 0
    threads: int = 1
    device: str = "cpu"
    verbose: bool = True
    command: str | None = None

    def __post_init__(self) -> None:
        check_common(self)
        noise = [str(parse_noise(text)) for text in self.noise]  # 0.4 and symmetric:0.4 are the same
        for name, values in (("noise", noise), ("losses", self.losses), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise UsageError(f"{name} must be one or more different values, got {list(values)}")
        for name in ("val_fraction", "patience"):
            if self.inspect and self.changes.get(name):
                raise UsageError(f"inspect trains on all labels to the last epoch: {name} must be 0")
        for loss in self.losses:
            build_loss(loss, self.recipe, total_steps=1)
        check_least(seeds=(min(self.seeds), 0))
        if self.inspect and len(noise) * len(self.losses) * len(self.seeds) > 1:
            raise UsageError("inspect trains one network: noise, losses and seeds must be one each")
        check_loggers(self.loggers)
        for name, used in (("resume", self.resume), ("loggers", set(self.loggers) - {"csv"})):
            if used and self.out is None:
                raise UsageError(f"{name} needs the folder of the runs, got no out")

    def load(self) -> DataSet:
        """The data set.

        Raises:
            UsageError: its files are missing or wrong.
        """
        return load_data(self.data, self.data_dir, self.recipe.image_size, self.bad_images, tested=not self.inspect)

    @property
    def recipe(self) -> Recipe:
        return recipe_for(self.data, self.preset, **self.changes)
