"""Each loss of the family at its best: tuned on noisy labels with one budget for all, then trained with new seeds.

    python -m benchmarks.tuned --data digits --epochs 30 --out tuned

A loss gets twelve trials for each noise, or six with one of ``--weight-decays``: learning rates and weight decays with
settings of its own, from its paper or beside it; cross-entropy's are of label smoothing. A tenth of the training
samples is held out with its labels as given, wrong ones among them, and chooses the trial, and for an early stop the
epoch; so nothing is chosen by the test. What is chosen is trained with each seed. A trial has a seed of its own, 100.
What is done is kept, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import tabulate
import torch
from tqdm import tqdm

from benchmarks.subset import with_training_samples
from dal_kernels import training
from dal_kernels.training.machine import machine
from dal_kernels.training.metrics import EpochMetrics, chosen_epoch
from dal_kernels.training.summary import Spread

# Of the preset's learning rate; a loss without settings of its own has the second.
FEW_RATES, MANY_RATES = (1 / 3, 1.0, 3.0), (1 / 9, 1 / 3, 2 / 3, 1.0, 2.0, 3.0)
WEIGHT_DECAYS = (0.0, 5e-4)
TRIAL_SEED, HELD_OUT = 100, 0.1

# The losses as `dal-train` takes them and changes of the recipe, two of each: what its paper has, and another.
Variant = tuple[str, dict[str, Any]]
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "cross-entropy": (("cross-entropy", {}), ("cross-entropy:label_smoothing=0.3", {})),
    "GCE": (("generalized-cross-entropy:q=0.7", {}), ("generalized-cross-entropy:q=0.4", {})),
    "SCE": (
        ("symmetric-cross-entropy:alpha=0.1,beta=1", {}),
        ("symmetric-cross-entropy:alpha=6,beta=0.1", {}),
    ),
    "AGCE": (
        ("asymmetric-generalized-cross-entropy:a=0.6,q=0.6", {}),
        ("asymmetric-generalized-cross-entropy:a=4,q=0.2", {}),
    ),
    "NCE + RCE": (("active-passive:alpha=1,beta=1", {}), ("active-passive:alpha=10,beta=0.1", {})),
    "JAL": (("joint-asymmetric", {}), ("joint-asymmetric:alpha=10,beta=0.1", {})),
    "epsilon-softmax": (("epsilon-softmax:m=1e4", {}), ("epsilon-softmax:m=1e3,alpha=0.1,beta=1", {})),
    "Fisher-Rao": (("fisher-rao", {}),),
    "Jensen-Shannon": (("jensen-shannon:pi=0.5", {}), ("jensen-shannon:pi=0.9", {})),
    "DAL, fixed": (("dal-fixed", {"q_start": 0.6}), ("dal-fixed", {"q_start": 0.3})),
    "DAL, auto": (("dal", {}),),
}
NOISES = ("0.2", "0.4", "0.6", "0.8", "asymmetric:0.4", "instance:0.4")


@dataclass(frozen=True)
class Trial:
    """A loss with all that is chosen for it."""

    loss: str
    changes: dict[str, Any]

    def __str__(self) -> str:
        return ", ".join([self.loss, *(f"{name} {value:.3g}" for name, value in self.changes.items())])


def trials(name: str, learning_rate: float, weight_decays: Sequence[float]) -> list[Trial]:
    """Six settings a weight decay of the loss called ``name`` in ``VARIANTS``."""
    variants = VARIANTS[name]
    factors = FEW_RATES if len(variants) > 1 else MANY_RATES
    return [
        Trial(loss, {"learning_rate": factor * learning_rate, "weight_decay": decay, **changes})
        for (loss, changes), factor, decay in product(variants, factors, weight_decays)
    ]


class Bench:
    """Trains networks, or reads what they came to from the file of an earlier call."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.config = partial(
            training.TrainingConfig, data=arguments.data, data_dir=arguments.data_dir, preset=arguments.preset
        )
        self.changes = {"epochs": arguments.epochs, "val_fraction": HELD_OUT}
        self.data = self.config().load()
        # What is not in the settings of a run is in the file's name, lest another call take its numbers for its own.
        self.name = self.data.name if arguments.preset is None else f"{self.data.name}-{arguments.preset}"
        if arguments.samples is not None:
            if not 1 <= arguments.samples <= len(self.data.train):
                raise SystemExit(f"--samples must be from 1 to {len(self.data.train)}, got {arguments.samples}")
            self.data = with_training_samples(self.data, torch.arange(arguments.samples))
            self.name += f"-{arguments.samples}"
        self.weight_decays: Sequence[float] = arguments.weight_decays
        self.file = arguments.out / f"{self.name}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, list[dict[str, Any]]] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else ():
            record = json.loads(line)
            self.known[json.dumps(record["settings"])] = record["history"]

    def history(self, trial: Trial, noise: str, seed: int) -> list[EpochMetrics]:
        changes = {**self.changes, **trial.changes}
        settings = [trial.loss, changes, noise, seed]
        key = json.dumps(settings)
        if key not in self.known:
            config = self.config(changes=changes, noise=(noise,), losses=(trial.loss,), seeds=(seed,), verbose=False)
            (run,) = training.run_training(config, self.data).runs
            self.known[key] = [vars(metrics) for metrics in run.history]
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"settings": settings, "history": self.known[key]}) + "\n")
        return [EpochMetrics(**metrics) for metrics in self.known[key]]


@dataclass(frozen=True)
class Outcome:
    """What tuning chose for one loss and noise, and the test accuracy of each seed; with an early stop and without."""

    stopped_by: Trial
    stopped: Spread
    last_by: Trial
    last: Spread


def outcome(bench: Bench, name: str, noise: str, seeds: Sequence[int]) -> Outcome:
    settings = trials(name, bench.config().recipe.learning_rate, bench.weight_decays)
    tried = [(trial, bench.history(trial, noise, TRIAL_SEED)) for trial in settings]
    stopped_by, _ = max(tried, key=lambda one: chosen_epoch(one[1]).validation_accuracy)
    last_by, _ = max(tried, key=lambda one: one[1][-1].validation_accuracy)
    stopped = [chosen_epoch(bench.history(stopped_by, noise, seed)).test_accuracy for seed in seeds]
    last = [bench.history(last_by, noise, seed)[-1].test_accuracy for seed in seeds]
    return Outcome(stopped_by, Spread.of(stopped), last_by, Spread.of(last))


def report(outcomes: dict[tuple[str, str], Outcome], names: Sequence[str], noises: Sequence[str]) -> Iterator[str]:
    """Two tables, the best of each noise in bold, and what was chosen."""
    for title, of in (("early stop", "stopped"), ("last epoch", "last")):
        rows = []
        for name in names:
            row = [name]
            for noise in noises:
                got: Spread = getattr(outcomes[name, noise], of)
                best = max(getattr(outcomes[other, noise], of).mean for other in names)
                row.append(f"**{got.percent()}**" if got.mean == best else got.percent())
            rows.append(row)
        yield f"## Test accuracy in %, {title}\n\n{tabulate.tabulate(rows, ['loss', *noises], 'github')}\n"
    chosen = [
        [name, noise, outcomes[name, noise].stopped_by, outcomes[name, noise].last_by]
        for name, noise in product(names, noises)
    ]
    yield f"## Chosen\n\n{tabulate.tabulate(chosen, ['loss', 'noise', 'early stop', 'last epoch'], 'github')}\n"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as dal-train takes it")
    parser.add_argument("--data-dir", type=Path, help="folder of its files, if not the usual place")
    parser.add_argument("--preset", help="settings to start from, as dal-train takes it")
    parser.add_argument("--samples", type=int, metavar="N", help="train on the first N samples, not on all")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--weight-decays", nargs="+", type=float, default=WEIGHT_DECAYS)
    parser.add_argument("--noise", nargs="+", default=NOISES)
    parser.add_argument("--losses", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("tuned-output"))
    given = parser.parse_args(arguments)
    bench = Bench(given)
    cells = [(name, noise) for noise, name in product(given.noise, given.losses)]
    outcomes = {
        (name, noise): outcome(bench, name, noise, given.seeds)
        for name, noise in tqdm(cells, unit="cell", disable=None)
    }
    text = "\n".join(report(outcomes, given.losses, given.noise))
    name = bench.data.name if given.samples is None else f"{bench.data.name}, {given.samples} samples"
    said = f"{name}, {given.epochs} epochs, seeds {given.seeds}; {machine()}\n\n{text}"
    (given.out / f"{bench.name}.md").write_text(said, encoding="utf-8")
    print(said)


if __name__ == "__main__":
    main(sys.argv[1:])
