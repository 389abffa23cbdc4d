"""How well wrong labels are found, what that costs, and beside it cleanlab's find_label_issues.

    python -m benchmarks.label_errors --data fashion-mnist --noise asymmetric:0.2 --epochs 10

The inspector follows one training. cleanlab takes probabilities of networks that were not trained on the sample, an
(N, C) matrix: five networks, each trained on four fifths of the data by the recipe of the first. Both are judged by the
same wrong labels. Needs ``pip install cleanlab``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tabulate
import torch
from torch import Tensor

from benchmarks.machine import peak_memory
from benchmarks.subset import with_training_samples
from dal_kernels import training
from dal_kernels.training.data.base import DataSet
from dal_kernels.training.errors import need
from dal_kernels.training.inspect_report import auroc, precision_at
from dal_kernels.training.loader import evaluation_loader
from dal_kernels.training.machine import machine
from dal_kernels.training.noise import parse_noise
from dal_kernels.training.parallel import join_world
from dal_kernels.training.recipes import Recipe
from dal_kernels.training.train import Trainer

FOLDS = 5


class TimedInspector(training.LabelInspector):
    """Adds up the seconds that it takes."""

    seconds = 0.0

    def update(self, *arguments: Any) -> None:
        start = time.perf_counter()
        super().update(*arguments)
        self.seconds += time.perf_counter() - start

    def synchronize(self) -> None:
        start = time.perf_counter()
        super().synchronize()
        self.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class Finding:
    """A ranking of the labels and what it cost.

    Attributes:
        suspicion: (N,), high for labels that look wrong.
        trained: seconds of the trainings, those of a test after each epoch among them.
        followed: seconds added to the trainings.
        judged: seconds after them.
        held: bytes that are held for all samples.
        peak: bytes that making the ranking took.
        named: (M,) int64, the labels that are said to be wrong.
    """

    suspicion: Tensor
    trained: float
    followed: float
    judged: float
    held: int
    peak: int
    named: Tensor


def trained(recipe: Recipe, data: DataSet, labels: Tensor, loss: str, seed: int, inspector: Any = None) -> Trainer:
    trainer = Trainer(recipe, data, labels, loss, seed, 0, join_world("cpu"), None, inspector)
    while not trainer.done:
        trainer.run_epoch(lambda: None)
    return trainer


def by_inspector(recipe: Recipe, data: DataSet, labels: Tensor, seed: int) -> Finding:
    inspector = TimedInspector(len(labels), data.classes)
    seconds = _seconds(trained(recipe, data, labels, "dal", seed, inspector))
    before, start = peak_memory(reset=True), time.perf_counter()
    found = inspector.inspect()
    judged, peak = time.perf_counter() - start, peak_memory() - before
    held = sum(of.nbytes for of in inspector.state_dict().values() if isinstance(of, Tensor))
    named = (found.suggested != found.given).nonzero()[:, 0]
    return Finding(-found.margin, seconds - inspector.seconds, inspector.seconds, judged, held, peak, named)


def by_cleanlab(recipe: Recipe, data: DataSet, labels: Tensor, seed: int, loss: str) -> Finding:
    issues, rank = need("cleanlab.filter", "cleanlab"), need("cleanlab.rank", "cleanlab")
    folds = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).chunk(FOLDS)
    probabilities, seconds = torch.empty(len(labels), data.classes), 0.0
    for fold in folds:
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[fold] = False
        rest = kept.nonzero()[:, 0]
        part = with_training_samples(data, rest)
        trainer = trained(recipe, part, labels[rest], loss, seed)
        seconds += _seconds(trainer)
        network = trainer.evaluated.eval()
        with torch.no_grad():
            for inputs, indices in evaluation_loader(data.train, fold, 512, 0, trainer.world):
                probabilities[indices] = network(inputs).softmax(1)
    given, matrix = labels.numpy(), probabilities.numpy()
    before, start = peak_memory(reset=True), time.perf_counter()
    named = issues.find_label_issues(given, matrix, return_indices_ranked_by="normalized_margin", n_jobs=1)
    quality = rank.get_label_quality_scores(given, matrix, method="normalized_margin")
    judged, peak = time.perf_counter() - start, peak_memory() - before
    named_labels = torch.from_numpy(named.copy())
    return Finding(-torch.from_numpy(quality), seconds, 0.0, judged, probabilities.nbytes, peak, named_labels)


def _seconds(trainer: Trainer) -> float:
    return sum(epoch.seconds for epoch in trainer.history)


def rows_of(name: str, finding: Finding, wrong: Tensor) -> list[str]:
    order = finding.suspicion.argsort(descending=True, stable=True)
    right = wrong[finding.named].double().mean().item() if len(finding.named) else float("nan")
    return [
        name,
        f"{auroc(finding.suspicion, wrong):.4f}",
        f"{precision_at(order, wrong):.1%}",
        f"{len(finding.named)}, {right:.1%} rightly",
        f"{finding.trained:.1f}",
        f"{finding.followed:.2f} ({finding.followed / finding.trained:.1%})",
        f"{finding.judged:.2f}",
        f"{finding.held / 2**20:.1f}",
        f"{finding.peak / 2**20:.0f}",
    ]


HEADERS = ("", "AUROC", "precision at the noise rate", "said to be wrong", "training, s")
HEADERS += ("added in training, s", "after it, s", "held, MiB", "peak of the ranking, MiB")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as dal-train takes it")
    parser.add_argument("--data-dir", type=Path, help="folder of its files, if not the usual place")
    parser.add_argument("--noise", default="asymmetric:0.2")
    parser.add_argument("--epochs", type=int, help="those of the preset, if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folds-by", nargs="*", default=["cross-entropy"], metavar="LOSS", help="for cleanlab")
    given = parser.parse_args(arguments)
    changes = {} if given.epochs is None else {"epochs": given.epochs}
    config = training.TrainingConfig(data=given.data, data_dir=given.data_dir, changes=changes)
    data, noise = config.load(), parse_noise(given.noise)
    torch.set_num_threads(1)
    rows = []
    for seed in given.seeds:
        labels = noise.apply(data, seed).labels
        wrong = labels != data.true_labels
        rows.append(rows_of(f"seed {seed}: LabelInspector", by_inspector(config.recipe, data, labels, seed), wrong))
        for loss in given.folds_by:
            finding = by_cleanlab(config.recipe, data, labels, seed, loss)
            rows.append(rows_of(f"seed {seed}: cleanlab, {FOLDS} × {loss}", finding, wrong))
    print(tabulate.tabulate(rows, HEADERS, "pipe", disable_numparse=True))
    print(f"\n{data.name}, {noise}, {config.recipe.epochs} epochs, one thread; {machine()}")


if __name__ == "__main__":
    main(sys.argv[1:])
