"""The command line: ``train`` and ``compare`` networks, ``inspect`` labels, ``predict`` and ``evaluate``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from torch import distributed

from dal_kernels import ScheduleWarning, __version__
from dal_kernels.training.compare import Results, run_training
from dal_kernels.training.config import TrainingConfig
from dal_kernels.training.config_file import arguments_of
from dal_kernels.training.data import BAD_IMAGES, DATA, SOURCES, DataSet
from dal_kernels.training.errors import UsageError
from dal_kernels.training.evaluate import evaluate
from dal_kernels.training.inspect_report import write_inspection
from dal_kernels.training.loggers import LOGGERS
from dal_kernels.training.losses import FAMILY, FIXED, LOSSES
from dal_kernels.training.parallel import first_to_say
from dal_kernels.training.predict import PredictConfig, predict
from dal_kernels.training.recipes import OFFICIAL, PRESETS, Recipe, preset_values
from dal_kernels.training.report import check_packages, write_curves, write_report

__all__ = ["main", "parse", "sentence"]

OUT = Path("demo-output")
ALIASES = {"logger", "loss", "output", "seed"}  # of options that have another name too
# What applies a network that has been trained.
APPLY = {"predict": predict, "evaluate": evaluate}


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.split()[0]}: {message}\n")


def parser() -> argparse.ArgumentParser:
    made = OneLineParser(
        prog="dal-train",
        description="Train on wrong labels. Defaults are in parentheses. Under torchrun processes share each batch.",
    )
    made.add_argument("--version", action="version", version=f"dal_kernels {__version__}")
    commands = made.add_subparsers(dest="to_do", required=True, metavar="train|compare|inspect|predict|evaluate")
    default = TrainingConfig()

    train = commands.add_parser("train", help="a network", description="Train a network, or one of each asked for.")
    _add_grid(train, noise=("none",), losses=("dal",), seeds=(0,))
    compare = commands.add_parser(
        "compare",
        help="losses x noise x seeds, with a table and figures",
        description="Train a network with each loss, noise and seed, and compare them in a table and figures.",
    )
    _add_grid(compare, default.noise, default.losses, default.seeds)
    inspect = commands.add_parser(
        "inspect",
        help="which labels look wrong",
        description="Train a network and rank the labels that it does not believe: suggested.csv, confusion.csv, "
        "inspect.md and worst.png. Labels of suggested.csv are trained on by train --labels.",
    )
    _add_grid(inspect, noise=("none",), losses=("dal",), seeds=(0,))
    for command in (train, compare):
        command.add_argument("--labels", type=Path, metavar="FILE", help=LABELS)
    for command in (train, compare, inspect):
        command.add_argument("--config", type=Path, metavar="FILE", help=CONFIG)
        _add_common(command, default)
        _add_settings(command, default)
    to_predict = commands.add_parser(
        "predict",
        help="what a trained network says",
        description="Write predictions.csv: path, predicted class and its probability of the samples to test on, or of "
        "all of a folder or table without such a part; where they have labels also two tables of how well.",
    )
    to_evaluate = commands.add_parser(
        "evaluate",
        help="how well a trained network does",
        description="Write evaluation.json, with the accuracy, evaluated-classes.csv, with that of each class, and "
        "evaluated-confusion.csv, with what is taken for what (with a picture, of up to 40 classes); of the labelled "
        "samples that predict would take.",
    )
    for command in (to_predict, to_evaluate):
        command.add_argument("--checkpoint", type=Path, metavar="FILE", help=CHECKPOINT)
        _add_common(command, default)
    return made


def _add_grid(
    command: argparse.ArgumentParser, noise: tuple[str, ...], losses: tuple[str, ...], seeds: tuple[int, ...]
) -> None:
    add = command.add_argument
    add("--noise", nargs="+", default=noise, metavar="NOISE", help=f"{NOISE} ({' '.join(noise)})")
    add("--losses", "--loss", nargs="+", default=losses, metavar="NAME", help=f"{LOSS} ({' '.join(losses)})")
    add(
        "--seeds",
        "--seed",
        nargs="+",
        type=int,
        default=seeds,
        metavar="N",
        help=f"{SEED} ({' '.join(map(str, seeds))})",
    )


NOISE = "wrong labels: none, KIND:RATE, RATE alone for symmetric, file:PATH or cifar-n:LABELS:PATH"
LOSS = (
    f"{', '.join(dict.fromkeys([*LOSSES, *FIXED, *FAMILY]))}, or package.module:attribute; a loss of the family with "
    "settings of its own: symmetric-cross-entropy:alpha=6,beta=0.1"
)
PRESET = (
    "settings to start from (those of the data set; of KIND:PATH images, of npz:PATH features); the authors' own are "
    f"{', '.join(OFFICIAL)}"
)
DATA_HELP = f"{', '.join(DATA)}; or {', '.join(f'{kind}:PATH' for kind in SOURCES)}"
LABELS = (
    "a table with columns path, suggested (or label) and perhaps weight: labels instead of those after the noise, such "
    "as the suggested.csv of inspect"
)
CONFIG = "YAML, TOML or JSON of these options, without their dashes in front; those of the command line override it"
CHECKPOINT = (
    "of a run (that of the newest run below the output, of an inspection's only where there is no other: best.pt if "
    "there is one, else checkpoint.pt)"
)
SEED = "fixes wrong labels, first weights and batches"


def _add_common(command: argparse.ArgumentParser, default: TrainingConfig) -> None:
    add = command.add_argument
    add("--data", metavar="DATA", default=default.data, help=f"{DATA_HELP} ({default.data})")
    add("--data-dir", type=Path, metavar="DIR", help="folder of its files, if not the usual place")
    add(
        "--bad-images",
        choices=BAD_IMAGES,
        default=default.bad_images,
        help=f"what is done about images that cannot be read ({default.bad_images}: go on without them, and list them)",
    )
    add(
        "--output",
        "--out",
        dest="out",
        type=Path,
        metavar="DIR",
        default=OUT,
        help=f"folder for all that is written ({OUT})",
    )
    add("--workers", type=int, metavar="N", default=default.workers, help="processes that load batches (0: none)")
    add("--threads", type=int, metavar="N", default=default.threads, help=f"CPU threads ({default.threads})")
    add("--device", metavar="NAME", default=default.device, help=f"cpu, cuda or cuda:N ({default.device})")


def _add_settings(command: argparse.ArgumentParser, default: TrainingConfig) -> None:
    add = command.add_argument
    add("--preset", choices=list(PRESETS), help=PRESET)
    add("--resume", action="store_true", help="go on with the runs that are in that folder")
    add("--overwrite", action="store_true", help="replace runs in that folder that were trained otherwise")
    add(
        "--logger",
        "--loggers",
        dest="loggers",
        nargs="+",
        choices=LOGGERS,
        default=default.loggers,
        help="where the metrics of each epoch go (csv: metrics.csv, which is always written)",
    )
    settings = command.add_argument_group("settings, each instead of the preset's, which is in parentheses")
    digits = PRESETS["digits"]
    for setting in fields(Recipe):
        kind = type(getattr(digits, setting.name))
        options: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif setting.metadata["names"]:
            options = {"choices": setting.metadata["names"]}
        elif kind is tuple:
            options = {"type": int, "nargs": "*", "metavar": "N"}
        flag = f"--{setting.name.replace('_', '-')}"
        help = f"{setting.metadata['help']} ({preset_values(setting.name)})"
        settings.add_argument(flag, default=argparse.SUPPRESS, help=help, **options)


def parse(argv: Sequence[str] | None = None) -> TrainingConfig:
    """The configuration that a command line asks for.

    Raises:
        UsageError: a value makes no sense, or a package is missing.
        SystemExit: the command line itself is wrong, or asks for help.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = vars(parser().parse_args(argv))
    config_file = arguments.pop("config")
    if config_file is not None:  # what comes later overrides
        recipe = {setting.name: isinstance(setting.default, bool) for setting in fields(Recipe)}
        options = (arguments.keys() | recipe.keys() | ALIASES) - {"config", "to_do"}
        switches = {name: True for name, switch in recipe.items() if switch} | {"resume": False, "overwrite": False}
        arguments = vars(parser().parse_args([argv[0], *arguments_of(config_file, options, switches), *argv[1:]]))
        del arguments["config"]
    to_do = arguments.pop("to_do")
    check_packages(inspect=to_do == "inspect")
    arguments["inspect"] = to_do == "inspect"
    as_tuple = {
        name: tuple(value) if isinstance(value, (list, tuple)) else (value,)
        for name, value in arguments.items()
        if name in ("noise", "losses", "seeds", "loggers", "widths")
    }
    arguments |= as_tuple
    settings = {setting.name for setting in fields(Recipe)}
    changes = {name: value for name, value in arguments.items() if name in settings}
    others = {name: value for name, value in arguments.items() if name not in settings}
    launcher = ["dal-train"]
    if distributed.is_torchelastic_launched():
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "dal_kernels.training"]
    command = shlex.join([*launcher, *argv])
    return TrainingConfig(**others, changes=changes, command=command)


def _write_inspection(results: Results, data: DataSet) -> tuple[list[Path], str]:
    (run,), out = results.runs, results.config.out
    assert out is not None  # it has a default here
    test_error = 1 - run.history[-1].test_accuracy
    return write_inspection(out, run.noise.known(data), run.inspections[0], test_error, results.command)


def _apply(argv: Sequence[str]) -> int:
    arguments = vars(parser().parse_args(argv))
    apply = APPLY[arguments.pop("to_do")]
    files, text = apply(PredictConfig(**arguments))
    print(f"{text}\nWritten: {', '.join(map(str, files))}")
    return 0


def sentence(error: UsageError | OSError) -> str:
    """What went wrong, in a line; from a process that loads batches it comes below that one's traceback."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1].removeprefix(f"{UsageError.__module__}.UsageError: ")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    warnings.simplefilter("always", ScheduleWarning)  # for each run, not once for all
    try:
        if argv and argv[0] in APPLY:
            return _apply(argv)
        config = parse(argv)
        data = config.load()
        results = run_training(config, data)
        if results.writes and argv[0] in ("compare", "inspect"):
            files, text = write_report(results) if argv[0] == "compare" else _write_inspection(results, data)
            print(f"\n{text}\nWritten: {', '.join(map(str, files))}")
        elif results.writes and config.out is not None:
            write_curves(results)
            print(f"Written: {', '.join(str(config.out / run.data / run.folder) for run in results.runs)}")
    except (UsageError, OSError) as error:  # of files: what cannot be written
        if first_to_say(said := f"dal-train: {sentence(error)}"):
            print(said, file=sys.stderr)
        return 2
    return 0
