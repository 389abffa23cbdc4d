"""Curves against epochs, and accuracy against the noise rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dal_kernels.training.canvas import pyplot, save
from dal_kernels.training.losses import LOSSES, loss_title
from dal_kernels.training.noise import Noise
from dal_kernels.training.records import Run
from dal_kernels.training.summary import Summary

__all__ = ["save_curves", "save_rates"]

# Told apart by the colour-blind as well; by order of LOSSES, so that a loss has its colour in every figure.
COLOURS = (
    *("#D55E00", "#0072B2", "#CC79A7", "#009E73", "#E69F00", "#56B4E9"),
    *("#332288", "#882255", "#999933", "#661100", "#000000", "#BBBBBB"),
)
INCHES_PER_COLUMN, INCHES_PER_ROW = 4.4, 2.4
MOST_NAMED = 3  # noises that a title names
LINE_HEIGHT = 0.075  # of such a name, as a share of the panel's height
EMPTY = "."  # matplotlib's name of a place without a panel


def save_curves(runs: Sequence[Run], base: Path) -> list[Path]:
    """Draw runs on one data set against epochs; gives the files, ``base`` with the suffix of each format.

    A row for each noise, in % on one scale: accuracy of the test (without one, of the validation), and how many wrong
    labels are memorised, where that is known. Below them, once, q with lambda of the losses that move it, and of a
    single run its loss. Lines are means over seeds, bands one standard deviation either way.
    """
    noises = list(dict.fromkeys(run.noise for run in runs))
    losses = list(dict.fromkeys(run.loss for run in runs))
    colours = _colours(losses)
    tested = any(_known(run, "test_accuracy") for run in runs)
    accuracy = "test_accuracy" if tested else "validation_accuracy"
    shares = {accuracy: f"{'test' if tested else 'validation'} accuracy, %"}
    if any(_known(run, "memorised") for run in runs):
        shares["memorised"] = "wrong labels memorised, %"
    below = ["train_loss"] if len(runs) == 1 else []
    moving = [loss for loss in losses if any(_moves(run) for run in runs if run.loss == loss)]
    if moving:
        below.append("q")
    columns = max(len(shares), len(below))

    def drawn(noise: Noise, share: str) -> bool:
        return share == accuracy or any(_known(run, share) for run in runs if run.noise == noise)

    layout = [
        _spread([f"{row} {share}" if drawn(noise, share) else EMPTY for share in shares], columns)
        for row, noise in enumerate(noises)
    ]
    layout += [_spread(below, columns)] if below else []
    size = (INCHES_PER_COLUMN * columns, 0.9 + INCHES_PER_ROW * len(layout))
    figure, axes = pyplot().subplot_mosaic(layout, figsize=size, layout="constrained")
    for row, noise in enumerate(noises):
        for share, title in shares.items():
            if not drawn(noise, share):
                continue
            axis = axes[f"{row} {share}"]
            axis.set_ylim(-3, 103)
            axis.set_title(title if len(noises) == 1 else f"{noise.title}: {title}", fontsize=10, parse_math=False)
            for loss in losses:
                group = [run for run in runs if (run.noise, run.loss) == (noise, loss)]
                _line(axis, _percent(group, share), colours[loss])
                if tested and share == accuracy and len(runs) == 1 and _known(group[0], "validation_accuracy"):
                    _line(axis, _percent(group, "validation_accuracy"), colours[loss], linestyle="--")
                    axis.set_title("accuracy, %: test (solid), validation (dashed)", fontsize=10)
    if "train_loss" in axes:
        axes["train_loss"].set_title("loss while training", fontsize=10)
        _line(axes["train_loss"], _values(runs, "train_loss"), colours[losses[0]])
    if "q" in axes:
        _schedules(axes["q"], runs, noises, moving, colours)
    for axis in axes.values():
        _tidy(axis)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    named = ", ".join(noise.title for noise in noises[:MOST_NAMED]) + (", …" if len(noises) > MOST_NAMED else "")
    _finish(figure, f"{runs[0].data}: {named}", losses, colours)
    return save(figure, base)


def save_rates(summaries: Sequence[Summary], data: str, base: Path) -> list[Path]:
    """Draw the accuracy that one would get against the noise rate, a panel for each kind of noise; gives the files.

    Labels as given count as a rate of 0. Points are means over seeds, bars one standard deviation either way. No file
    where no kind of noise has two rates.
    """
    kinds = list(dict.fromkeys(s.noise.kind for s in summaries if s.noise.rate is not None))
    rates = {kind: sorted({_rate(s.noise) for s in summaries if s.noise.kind in (kind, "none")}) for kind in kinds}
    kinds = [kind for kind in kinds if len(rates[kind]) > 1]
    if not kinds:
        return []
    losses = list(dict.fromkeys(s.loss for s in summaries))
    colours = _colours(losses)
    figure, axes = pyplot().subplots(
        1,
        len(kinds),
        figsize=(max(5.4, 4.6 * len(kinds)), 4.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        for place, loss in enumerate(losses):
            group = sorted(
                (s for s in summaries if s.loss == loss and s.noise.kind in (kind, "none")),
                key=lambda s: _rate(s.noise),
            )
            # Beside each other, lest one bar hide another.
            aside = 0.5 * (place - (len(losses) - 1) / 2)
            axis.errorbar(
                [100 * _rate(s.noise) + aside for s in group],
                [100 * s.got.mean for s in group],
                [0.0 if math.isnan(s.got.sd) else 100 * s.got.sd for s in group],
                color=colours[loss],
                marker="o",
                markersize=4,
                capsize=2.5,
                linewidth=1.6,
            )
        axis.set_title(kind, fontsize=10)
        axis.set_xticks([100 * rate for rate in rates[kind]])
        axis.set_xlabel("noise rate, %")
        _tidy(axis)
    of = "in the epoch chosen by validation" if summaries[0].chosen else "at the last epoch"
    what = f"test accuracy {of}, %" if summaries[0].tested else "validation accuracy, best epoch, %"
    axes[0][0].set_ylabel(what)
    _finish(figure, f"{data}: accuracy against label noise", losses, colours)
    return save(figure, base)


def _rate(noise: Noise) -> float:
    return noise.rate or 0.0


def _colours(losses: Sequence[str]) -> dict[str, str]:
    return dict(zip(dict.fromkeys([*LOSSES, *losses]), cycle(COLOURS)))


def _known(run: Run, metric: str) -> bool:
    return any(not math.isnan(getattr(epoch, metric)) for epoch in run.history)


def _moves(run: Run) -> bool:
    """Whether the loss has a q that is not the same in all epochs."""
    return len({epoch.q for epoch in run.history if not math.isnan(epoch.q)}) > 1


def _spread(names: Sequence[str], columns: int) -> list[str]:
    """A row of so many columns, of which the last panel takes what the others leave."""
    row = [*names, *[names[-1]] * (columns - len(names))]
    return [name for name in row if name != EMPTY] + [EMPTY] * row.count(EMPTY)


def _tidy(axis: Any) -> None:
    axis.margins(x=0.04)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, title: str, losses: Sequence[str], colours: dict[str, str]) -> None:
    handles = [pyplot().Line2D([], [], color=colours[loss], label=loss_title(loss)) for loss in losses]
    columns = min(len(handles), max(2, int(figure.get_size_inches()[0] / 1.5)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(title, fontsize=12, parse_math=False)  # a name with two dollar signs would be taken for a formula


def _values(group: Sequence[Run], metric: str) -> Tensor:
    """(runs, epochs) float64; NaN in the epochs that a run does not have."""
    values = torch.full((len(group), max(len(run.history) for run in group)), math.nan, dtype=torch.float64)
    for row, run in zip(values, group, strict=True):
        row[: len(run.history)] = torch.tensor([getattr(epoch, metric) for epoch in run.history])
    return values


def _percent(group: Sequence[Run], metric: str) -> Tensor:
    return 100 * _values(group, metric)


def _line(axis: Any, values: Tensor, colour: str, linestyle: str = "-") -> None:
    """Mean and band of ``values`` (runs, epochs) that differ in their seed, over those that have the epoch."""
    epochs = range(1, values.shape[1] + 1)
    mean, reached = values.nanmean(0), values.isfinite()
    marker = "o" if values.shape[1] == 1 else None  # a line of one point is invisible
    axis.plot(epochs, mean.numpy(), color=colour, marker=marker, linewidth=1.8, linestyle=linestyle)
    if len(values) > 1:
        # NaN, so no band, where one seed is left.
        sd = (torch.where(reached, values - mean, 0).square().sum(0) / (reached.sum(0) - 1)).sqrt()
        axis.fill_between(epochs, (mean - sd).numpy(), (mean + sd).numpy(), color=colour, alpha=0.2, linewidth=0)


def _schedules(
    axis: Any, runs: Sequence[Run], noises: Sequence[Noise], losses: Sequence[str], colours: dict[str, str]
) -> None:
    """q, and lambda where it ever counts: one line of a loss whose q no noise changes, else one a noise, named."""
    title = "q"
    ends: list[tuple[float, int, str]] = []
    for loss in losses:
        groups = [[run for run in runs if (run.noise, run.loss) == (noise, loss)] for noise in noises]
        curves = [_values(group, "q") for group in groups]
        same = all(str(curve.nanmean(0).tolist()) == str(curves[0].nanmean(0).tolist()) for curve in curves)
        shown = list(zip(noises, groups, curves, strict=True))[: 1 if same else None]
        for noise, group, curve in shown:
            _line(axis, curve, colours[loss])
            weights = _values(group, "bootstrap_weight")
            if (weights > 0).any():
                _line(axis, weights, colours[loss], linestyle="--")
                title = "q (solid), λ (dashed)"
            if not same:
                end = int(curve.isfinite().any(0).nonzero().max())
                ends.append((curve[:, end].nanmean().item(), end + 1, noise.title))
    axis.set_title(title, fontsize=10)
    low, high = axis.get_ylim()
    lowest = -math.inf
    for height, epoch, name in sorted(ends):
        lowest = max(height, lowest + LINE_HEIGHT * (high - low))  # names of lines that end together stand apart
        axis.annotate(f"  {name}", (epoch, lowest), fontsize=7, va="center", annotation_clip=False)
