"""Pictures of the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks import counts
from benchmarks.micro.cases import DTYPES
from benchmarks.micro.contenders import AUTHORS, COMPILED, COMPILED_CROSS_ENTROPY, COPY, CROSS_ENTROPY, OURS, REFERENCE
from benchmarks.micro.results import Results, Spread

mpl.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["save_figures"]

# Told apart by the colour-blind as well.
COLOURS = {
    OURS: "#0072B2",
    CROSS_ENTROPY: "#D55E00",
    COMPILED_CROSS_ENTROPY: "#E69F00",
    COMPILED: "#009E73",
    REFERENCE: "#56B4E9",
    AUTHORS: "#CC79A7",
    COPY: "#000000",
}
OTHERS = ("#882255", "#999933", "#666666")
ITEMSIZE = {name: dtype.itemsize for name, dtype in DTYPES.items()}
BACKENDS = {"triton": "#0072B2", "cuda": "#E69F00"}


def save_figures(results: Results, folder: Path) -> list[Path]:
    """Write time.png, ratios.png, memory.png and counts.png, as far as there is anything for them."""
    made = {"time": _times(results), "ratios": _ratios(results), "memory": _memory(results), "counts": _counts()}
    paths = []
    for name, figure in made.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
            plt.close(figure)
    return paths


def _colours(names: Iterable[str]) -> dict[str, str]:
    others = iter(OTHERS)
    return {name: COLOURS.get(name) or next(others) for name in names}


def _shape(rows: int, classes: int) -> str:
    return f"{rows}×{classes}"


def _exactly(value: float) -> Spread:
    return Spread(value, value, value)


def _panels(dtypes: Sequence[str], size: tuple[float, float], **options: Any) -> tuple[Any, list[Any]]:
    rows, columns = options.pop("grid", (1, len(dtypes)))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for axis, dtype in zip(axes.flat, dtypes, strict=True):
        axis.set_title(dtype, loc="left", fontsize=11)
        axis.grid(alpha=0.3, which="major")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def _legend(figure: Any, axis: Any) -> None:
    """Above the panels, in as few lines as the figure is wide enough for: what is wider would be cut off."""
    handles, labels = axis.get_legend_handles_labels()
    for lines in range(1, len(labels) + 1):
        columns = math.ceil(len(labels) / lines)
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def _times(results: Results) -> Any:
    """A step against N·C; lines join sizes, whatever their shape."""
    cells = results.cells("warm", "step")
    if not cells:
        return None
    dtypes = list(dict.fromkeys(cell.dtype for cell in cells))
    figure, axes = _panels(dtypes, (5.5 * len(dtypes), 5.2), sharey=True)
    for axis, dtype in zip(axes, dtypes, strict=True):
        mine = sorted((c for c in cells if c.dtype == dtype), key=lambda c: c.size.rows * c.size.classes)
        for name, colour in _colours(results.names(cells)).items():
            there = [cell for cell in mine if name in results.samples[cell]]
            elements = [cell.size.rows * cell.size.classes for cell in there]
            spreads = [results.time(cell, name) for cell in there]
            style = {"linestyle": "--", "marker": None} if name == COPY else {"marker": "o", "markersize": 4}
            width = 2.6 if name == OURS else 1.4
            axis.plot(elements, [s.median for s in spreads], color=colour, label=name, linewidth=width, **style)
            errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            axis.errorbar(elements, [s.median for s in spreads], errors, fmt="none", ecolor=colour, elinewidth=0.9)
        axis.set(xscale="log", yscale="log", xlabel="N·C, elements of the logits")
        axis.yaxis.set_major_formatter(mpl.ticker.EngFormatter("s"))
    axes[0].set_ylabel("forward + backward, warm")
    _legend(figure, axes[0])
    return figure


def _bars(
    axis: Any,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Spread | None]],
    colours: Mapping[str, str],
    base: float = 0.0,
) -> None:
    width = 0.84 / len(series)
    for number, (name, values) in enumerate(series.items()):
        there = [(group, value) for group, value in enumerate(values) if value is not None]
        x = [group + (number - (len(series) - 1) / 2) * width for group, _ in there]
        heights = [value.median for _, value in there]
        errors = [[v.median - v.low for _, v in there], [v.high - v.median for _, v in there]]
        axis.bar(x, [height - base for height in heights], 0.92 * width, base, color=colours[name], label=name)
        if any(map(any, errors)):
            axis.errorbar(x, heights, errors, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=1.5)
    axis.set_xticks(range(len(groups)), groups)
    axis.tick_params(axis="x", length=0)
    axis.grid(visible=False, axis="x")


def _ratios(results: Results) -> Any:
    """How many times our time each rival takes, of a warm step."""
    cells = results.cells("warm", "step")
    names = [name for name in results.names(cells) if name not in (OURS, COPY)]
    if not names:
        return None
    dtypes = list(dict.fromkeys(cell.dtype for cell in cells))
    figure, axes = _panels(dtypes, (11, 1 + 3 * len(dtypes)), grid=(len(dtypes), 1), sharey=True)
    for axis, dtype in zip(axes, dtypes, strict=True):
        mine = [cell for cell in cells if cell.dtype == dtype]
        series = {
            name: [results.ratio(cell, name) if name in results.samples[cell] else None for cell in mine]
            for name in names
        }
        _bars(axis, [_shape(*cell.size) for cell in mine], series, _colours(names), base=1)
        axis.axhline(1, color=COLOURS[OURS], linewidth=1.6)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g×"))
        axis.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        axis.set_ylabel(f"time of a step ÷ {OURS}")
    _legend(figure, axes[0])
    return figure


def _memory(results: Results) -> Any:
    if not results.memory:
        return None
    dtypes = list(dict.fromkeys(dtype for _, dtype in results.memory))
    names = list(dict.fromkeys(name for of in results.memory.values() for name in of))
    figure, axes = _panels(dtypes, (5.5 * len(dtypes), 4.2), sharey=True)
    for axis, dtype in zip(axes, dtypes, strict=True):
        mine = {size: of for (size, other), of in results.memory.items() if other == dtype}
        series = {
            name: [_exactly(of[name] / (size.rows * size.classes * ITEMSIZE[dtype])) for size, of in mine.items()]
            for name in names
        }
        _bars(axis, [_shape(*size) for size in mine], series, _colours(names))
    axes[0].set_ylabel("peak of a step ÷ size of the logits")
    _legend(figure, axes[0])
    return figure


def _counts() -> Any:
    """Of the committed counts: instructions, and traffic by direction."""
    steps = [counts.Count(**item) for item in counts.read()["counts"] if item["gradient"] and not item["images"]]
    groups = list(dict.fromkeys(f"{_shape(step.rows, step.classes)}\n{step.dtype}" for step in steps))
    figure, axes = _panels(
        ["Instructions an element (a lane of a warp instruction)", "Global memory traffic, sizes of the logits"],
        (11, 6.6),
        grid=(2, 1),
    )
    by_backend = {name: [step for step in steps if step.backend == name] for name in BACKENDS}
    for axis, value in zip(axes, (lambda s: s.instructions, lambda s: s.reads + s.writes), strict=True):
        _bars(axis, groups, {n: [_exactly(value(s)) for s in of] for n, of in by_backend.items()}, BACKENDS)
    axes[1].axhline(2, color="#333333", linewidth=1.2, linestyle="--", label="least: read once, gradient written once")
    _legend(figure, axes[1])
    figure.supxlabel("Forward + backward. Counts under an executor of compiled code, NOT times.", fontsize=10)
    return figure
