"""Curves of accuracy, memorisation and schedule against epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from dal_kernels.training.errors import need
from dal_kernels.training.losses import LOSSES, loss_title
from dal_kernels.training.records import Run

__all__ = ["save_figure"]

# Told apart by the colour-blind as well; by order of LOSSES, so that a loss has its colour in every figure.
COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#009E73", "#E69F00", "#56B4E9")
INCHES_PER_COLUMN, INCHES_PER_ROW = 4.2, 2.6


def save_figure(runs: Sequence[Run], path: Path) -> None:
    """A row for each noise; from left to right test accuracy, memorisation, and q with lambda.

    Lines are means over seeds, bands one standard deviation either way.
    """
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot", "matplotlib")
    noises = list(dict.fromkeys(run.noise for run in runs))
    losses = list(dict.fromkeys(run.loss for run in runs))
    colours = dict(zip(dict.fromkeys([*LOSSES, *losses]), cycle(COLOURS)))
    titles = ["test accuracy, %", "wrong labels memorised, %"]
    if not all(math.isnan(run.history[0].q) for run in runs):
        titles.append("q (solid), λ (dashed)")
    size = (INCHES_PER_COLUMN * len(titles), 0.6 + INCHES_PER_ROW * len(noises))
    figure, axes = pyplot.subplots(
        len(noises), len(titles), figsize=size, sharex=True, sharey="col", squeeze=False, layout="constrained"
    )
    for row, noise in zip(axes, noises, strict=True):
        row[0].set_ylabel(noise.title)
        for loss in losses:
            group = [run for run in runs if (run.noise, run.loss) == (noise, loss)]
            _shares(row[0], group, "test_accuracy", colours[loss])
            _shares(row[1], group, "memorised", colours[loss])
            if len(titles) == 3:
                _schedule(row[2], max(group, key=lambda run: len(run.history)), colours[loss])
        for axis in row:
            axis.margins(x=0.02)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles = [pyplot.Line2D([], [], color=colours[loss], label=loss_title(loss)) for loss in losses]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _shares(axis: Any, group: Sequence[Run], metric: str, colour: str) -> None:
    """Mean and band, in %, of runs that differ in their seed, over those that have the epoch."""
    longest = max((run.history for run in group), key=len)
    epochs = [epoch.epoch for epoch in longest]
    values = torch.full((len(group), len(epochs)), math.nan)
    for row, run in zip(values, group, strict=True):
        row[: len(run.history)] = 100 * torch.tensor([getattr(epoch, metric) for epoch in run.history])
    mean, there = values.nanmean(0), values.isfinite()
    marker = "o" if len(epochs) == 1 else None  # a line of one point is invisible
    axis.plot(epochs, mean, color=colour, marker=marker, linewidth=1.8)
    if len(group) > 1:
        # NaN, so no band, where one seed is left.
        sd = (torch.where(there, values - mean, 0).square().sum(0) / (there.sum(0) - 1)).sqrt()
        low, high = ((mean + sign * sd).clamp(0, 100) for sign in (-1, 1))
        axis.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)


def _schedule(axis: Any, run: Run, colour: str) -> None:
    """q, and lambda where it ever counts; no seed changes them."""
    epochs = [epoch.epoch for epoch in run.history]
    axis.plot(epochs, [epoch.q for epoch in run.history], color=colour)
    weights = [epoch.bootstrap_weight for epoch in run.history]
    if any(weight > 0 for weight in weights):
        axis.plot(epochs, weights, color=colour, linestyle="--")
