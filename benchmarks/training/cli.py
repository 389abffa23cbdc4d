"""The command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.training.data import DATA
from benchmarks.training.errors import UsageError
from benchmarks.training.experiment import TrainingConfig, run_training
from benchmarks.training.losses import LOSSES
from benchmarks.training.report import check_packages, write_report

__all__ = ["main", "parse"]

OUT = Path("demo-output")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    default = TrainingConfig()
    made = OneLineParser(
        prog="benchmarks.training",
        description="Train a small network on wrong labels with cross-entropy, GCE and DAL, and compare them. "
        "Defaults are in parentheses.",
    )
    add = made.add_argument
    add("--data", choices=list(DATA), default=default.data, help=f"data set ({default.data})")
    add("--data-dir", type=Path, metavar="DIR", help="folder of its files, if not the usual place")
    add(
        "--noise", type=float, nargs="+", metavar="RATE", default=default.noise, help="shares of wrong labels (0.4 0.6)"
    )
    add("--losses", nargs="+", choices=list(LOSSES), default=default.losses, help="losses to compare (all)")
    add("--seeds", type=int, nargs="+", metavar="N", default=default.seeds, help="one run each (0 1 2)")
    add("--epochs", type=int, metavar="N", help="length of training (the recipe's); very few starve DAL")
    add("--out", type=Path, metavar="DIR", default=OUT, help=f"folder for metrics, table and figure ({OUT})")
    add("--threads", type=int, metavar="N", default=default.threads, help=f"CPU threads ({default.threads})")
    add("--device", metavar="NAME", default=default.device, help=f"cpu, cuda, cuda:1, ... ({default.device})")
    return made


def parse(argv: Sequence[str] | None = None) -> TrainingConfig:
    """The configuration that a command line asks for.

    Raises:
        UsageError: a value makes no sense, or a package is missing.
        SystemExit: the command line itself is wrong, or asks for help.
    """
    arguments: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser().parse_args(argv)).items()
    }
    check_packages()
    return TrainingConfig(**arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        files, text = write_report(run_training(parse(argv)))
    except UsageError as error:
        print(f"benchmarks.training: {error}", file=sys.stderr)
        return 2
    print(f"\n{text}\nWritten: {', '.join(map(str, files))}")
    return 0
