"""Curves of accuracy, memorisation and schedule against epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.errors import need
from benchmarks.training.losses import LOSSES
from benchmarks.training.records import Run

__all__ = ["save_figure"]

# Told apart by the colour-blind as well; by order of LOSSES, so that a loss has its colour in every figure.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INCHES_PER_COLUMN, INCHES_PER_ROW = 4.2, 2.6


def save_figure(runs: Sequence[Run], path: Path) -> None:
    """A column for each noise rate; from top to bottom test accuracy, memorisation, and q with lambda.

    Lines are means over seeds, bands one standard deviation either way.
    """
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot", "matplotlib")
    rates = list(dict.fromkeys(run.noise for run in runs))
    losses = list(dict.fromkeys(run.loss for run in runs))
    labels = ["test accuracy, %", "wrong labels\nmemorised, %"]
    if not all(math.isnan(run.history[0].q) for run in runs):
        labels.append("q (solid)\nλ (dashed)")
    size = (2 + INCHES_PER_COLUMN * len(rates), INCHES_PER_ROW * len(labels))
    figure, axes = pyplot.subplots(
        len(labels), len(rates), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for column, rate in enumerate(rates):
        axes[0, column].set_title(f"{rate:.0%} of training labels wrong")
        axes[-1, column].set_xlabel("epoch")
        axes[-1, column].xaxis.get_major_locator().set_params(integer=True)
        for loss in losses:
            group = [run for run in runs if (run.noise, run.loss) == (rate, loss)]
            _shares(axes[0, column], group, "test_accuracy")
            _shares(axes[1, column], group, "memorised")
            if len(labels) == 3:
                _schedule(axes[2, column], group[0])
    for row, label in zip(axes, labels, strict=True):
        row[0].set_ylabel(label)
        for axis in row:
            axis.margins(x=0.02)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    handles = [pyplot.Line2D([], [], color=_colour(loss), label=LOSSES[loss].title) for loss in losses]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _shares(axis: Any, group: Sequence[Run], metric: str) -> None:
    """Mean and band, in %, of runs that differ in their seed."""
    values = 100 * torch.tensor([[getattr(epoch, metric) for epoch in run.history] for run in group])
    epochs, mean = [epoch.epoch for epoch in group[0].history], values.mean(0)
    marker = "o" if len(epochs) == 1 else None  # a line of one point is invisible
    axis.plot(epochs, mean, color=_colour(group[0].loss), marker=marker, linewidth=1.8)
    if len(group) > 1:
        low, high = ((mean + sign * values.std(0)).clamp(0, 100) for sign in (-1, 1))
        axis.fill_between(epochs, low, high, color=_colour(group[0].loss), alpha=0.2, linewidth=0)


def _schedule(axis: Any, run: Run) -> None:
    """q, and lambda where it ever counts; no seed changes them."""
    epochs = [epoch.epoch for epoch in run.history]
    axis.plot(epochs, [epoch.q for epoch in run.history], color=_colour(run.loss))
    weights = [epoch.bootstrap_weight for epoch in run.history]
    if any(weight > 0 for weight in weights):
        axis.plot(epochs, weights, color=_colour(run.loss), linestyle="--")


def _colour(loss: str) -> str:
    return COLOURS[list(LOSSES).index(loss) % len(COLOURS)]
