"""The report: Markdown from what was measured, computed alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from benchmarks import counts
from benchmarks.micro.cases import METHODS, MODES
from benchmarks.micro.contenders import COPY, OURS, REFILL, RULERS
from benchmarks.micro.instruments import GRAPH_CALLS
from benchmarks.micro.results import Cell, Results, Spread

__all__ = ["busy", "document", "ratios", "times"]

TITLES = {"step": "forward + backward", "forward": "forward of a step", "no-grad": "forward without gradient"}


def times(spread: Spread) -> str:
    """Such as "12.3 µs (12.1 to 12.6)"."""
    low, median, high = (
        f"{1e6 * value:,.{1 if value < 1e-4 else 0}f}" for value in (spread.low, spread.median, spread.high)
    )
    return f"{median} µs ({low} to {high})"


def _factor(spread: Spread) -> str:
    low, median, high = (f"{value:.{2 if value < 10 else 0}f}" for value in (spread.low, spread.median, spread.high))
    return f"{median} ({low} to {high})"


def ratios(results: Results, method: str, mode: str) -> str:
    """Our time, and how many times longer each rival takes: medians, and the quantiles at 20 and 80 % in brackets."""
    cells = results.cells(method, mode)
    rivals = [name for name in results.names(cells) if name not in (OURS, *RULERS.values())]
    copied = any(not math.isnan(results.copy_share(cell)) for cell in cells)
    headers = [
        "N×C",
        "dtype",
        OURS,
        *(["of copy bandwidth"] if copied else []),
        *(f"{name} takes ×" for name in rivals),
    ]
    rows = []
    for cell in cells:
        shares = [f"{results.copy_share(cell):.0%}"] if copied else []
        measured = results.samples[cell]
        others = [_factor(results.ratio(cell, name)) if name in measured else "–" for name in rivals]
        rows.append([_size(cell), cell.dtype, times(results.time(cell, OURS)), *shares, *others])
    return _table(rows, headers)


IMPOSSIBLE = 2.0  # of a copy's bandwidth: what is in a cache is read somewhat faster than it is copied, not so much


def busy(results: Results) -> str | None:
    """What to say where figures spread by more than they are, or are impossible; None where none is."""
    found = [
        (spread, f"{_size(cell)}, {cell.dtype}, {TITLES[cell.mode]}, {cell.method}: {name}")
        for cell, measured in results.samples.items()
        for name in measured
        for spread in ([results.time(cell, name)] if name == OURS else [results.ratio(cell, name)])
    ]
    wide = [(spread, of) for spread, of in found if spread.width > 1]
    words = []
    if wide:
        spread, of = max(wide, key=lambda one: one[0].width)
        words.append(
            f"{len(wide)} of {len(found)} figures spread by more than they are (quantiles at 20 and 80 %), most of "
            f"all by {spread.width:.1f} times ({of})"
        )
    for cell in results.samples:
        if (share := results.copy_share(cell)) > IMPOSSIBLE:
            words.append(f"at {_size(cell)} our loss seems to have {share:.0%} of a copy's bandwidth, which cannot be")
    return f"This machine is busy: {'; '.join(words)}. Measure again when nothing else runs." if words else None


def _size(cell: Cell) -> str:
    return f"{cell.size.rows}×{cell.size.classes}"


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str], words: int = 2) -> str:
    """Markdown; all but the first ``words`` columns are numbers."""
    from tabulate import tabulate

    align = ("left",) * words + ("right",) * (len(headers) - words)
    return str(tabulate(rows, headers, tablefmt="github", colalign=align, disable_numparse=True))


def _machine(results: Results) -> str:
    of = results.machine
    size = of["cache_bytes"]
    lines = {
        "processor": f"{of['processor']}, {of['threads']} threads",
        "GPU": of["gpu"] and f"{of['gpu']}, CUDA {of['cuda']}",
        "measured on": of["device"],
        "last cache": f"{size / 2**20:.0f} MiB" if size else "of unknown size",
        "system": of["system"],
        "versions": f"dal_kernels {of['dal_kernels']}, torch {of['torch']}, Python {of['python']}",
        **{f"backend {name}": reason for name, reason in of["backends"].items()},
        **{f"{name} not measured": reason for name, reason in of["absent"].items()},
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items() if value)


def _timings(results: Results) -> Iterator[str]:
    for method, how in METHODS.items():
        for mode in MODES:
            if results.cells(method, mode):
                yield f"## {TITLES[mode].capitalize()}, {method}\n\n{how}"
                if (method, mode) == ("warm", "step"):
                    yield "![time against N·C](time.png)\n\n![ratios](ratios.png)"
                yield ratios(results, method, mode)


def _memory(results: Results) -> str:
    names = list(dict.fromkeys(name for of in results.memory.values() for name in of))
    rows = [
        [f"{size.rows}×{size.classes}", dtype, *(f"{of[name] / 2**20:,.0f}" if name in of else "–" for name in names)]
        for (size, dtype), of in results.memory.items()
    ]
    table = _table(rows, ["N×C", "dtype", *names])
    return f"## Memory of a step, MiB\n\n{METHODS['memory']}\n\n![memory](memory.png)\n\n{table}"


def _launches(results: Results) -> str:
    cells = list(dict.fromkeys(cell for cell, _ in results.launches))
    names = list(dict.fromkeys(name for _, name in results.launches))
    rows = [
        [_size(cell), cell.dtype, TITLES[cell.mode], *(str(results.launches.get((cell, name), "–")) for name in names)]
        for cell in cells
    ]
    return f"## Launches\n\nBy the profiler.\n\n{_table(rows, ['N×C', 'dtype', 'part', *names], words=3)}"


def _counts() -> str:
    content = counts.read()
    table = counts.table([counts.Count(**item) for item in content["counts"]])
    return f"## Counts\n\nNot measured here. {counts.sentence(content['versions'])}\n\n![counts](counts.png)\n\n{table}"


def document(results: Results) -> str:
    """The whole report."""
    warning = busy(results)
    sections = [
        f"# Speed on {results.machine['gpu'] or results.machine['processor']}",
        *([f"**{warning}**"] if warning else []),
        _machine(results),
        f"""## How to read this

Medians, and in brackets the quantiles at 20 and 80 %. Contenders took turns in one process for each size; a ratio
compares samples of the same turn, and says how many times our time a rival takes: above 1 we are faster. "reference",
its torch.compile and the authors' formula compute what we do; cross-entropy and whatever is marked proxy compute less.
"of copy bandwidth": the bytes that any implementation must move ({MODES["step"]} N·C for forward + backward,
{MODES["no-grad"]} N·C for a forward, which is all a forward of a step needs too, though ours makes the gradient in it)
in our time, against a copy of the logits (2 N·C) in its time. For a forward without gradient that is {REFILL}, else
{COPY}, which takes new memory as a gradient does: where pages of it are costly, we can be above 100 % by
asking for large ones. Those have been touched before: a virtual machine may get each late, at ten times the cost.
A dash: not measured here.
On a GPU times are of CUDA events around calls made back to back, of a graph's replays ({GRAPH_CALLS} calls each), or
of the host.""",
        *_timings(results),
    ]
    if results.memory:
        sections.append(_memory(results))
    if results.launches:
        sections.append(_launches(results))
    return "\n\n".join([*sections, _counts()]) + "\n"
