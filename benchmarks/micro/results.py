"""What pytest-benchmark wrote, as timings that can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.micro.cases import MODES, Size, parse_size
from benchmarks.micro.contenders import OURS, RULERS

__all__ = ["BenchmarkError", "Cell", "Results", "Spread"]


@dataclass(frozen=True)
class Spread:
    """Median and the quantiles at 20 and 80 %."""

    median: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Distance of the quantiles, over the median: above 1 the figure says no more than its order of magnitude."""
        return (self.high - self.low) / self.median

    @classmethod
    def of(cls, values: Iterable[float] | torch.Tensor) -> Spread:
        low, median, high = torch.as_tensor(values, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8]).double()
        )
        return cls(median.item(), low.item(), high.item())


class Cell(NamedTuple):
    """What was measured: of which logits, how, which part of a step."""

    size: Size
    dtype: str
    method: str
    mode: str


MOST = 512  # samples of a turn that are compared with each other


class BenchmarkError(Exception):
    """A benchmark failed, or not all that is needed was selected; the message says which, or what pytest said."""


class Results:
    """Samples in seconds a call by cell, contender and turn; peak memory in bytes; launches on a GPU.

    Args:
        documents: what ``pytest --benchmark-json`` writes for bench_loss.py, of runs on one machine.

    Raises:
        BenchmarkError: our own loss was not measured where a rival was.
    """

    def __init__(self, documents: Sequence[dict[str, Any]]) -> None:
        benchmarks = [benchmark for document in documents for benchmark in document["benchmarks"]]
        #: All of them as one, in pytest-benchmark's format.
        self.document = {**documents[0], "benchmarks": benchmarks}
        absent = {name: why for document in documents for name, why in document["machine_info"]["absent"].items()}
        self.machine: dict[str, Any] = {**documents[0]["machine_info"], "absent": absent}
        self.samples: dict[Cell, dict[str, dict[int, torch.Tensor]]] = {}
        self.memory: dict[tuple[Size, str], dict[str, int]] = {}
        self.launches: dict[tuple[Cell, str], int] = {}
        for benchmark in benchmarks:
            of, extra = benchmark["params"], benchmark["extra_info"]
            size, name = parse_size(of["size"]), of["contender"]
            cell = Cell(size, of["dtype"], of["method"], of["mode"])
            if cell.method == "memory":
                self.memory.setdefault((size, cell.dtype), {})[name] = extra["peak_bytes"]
                continue
            data = torch.tensor(benchmark["stats"]["data"], dtype=torch.float64) / extra.get("calls", 1)
            self.samples.setdefault(cell, {}).setdefault(name, {})[of["repeat"]] = data
            if "launches" in extra:
                self.launches[cell, name] = extra["launches"]
        for cell, measured in self.samples.items():
            if OURS not in measured:
                raise BenchmarkError(f"{OURS}, which all are compared with, is not selected at {cell}: change -k")

    def cells(self, method: str, mode: str) -> list[Cell]:
        """Those measured in this way, in the order of measurement."""
        return [cell for cell in self.samples if (cell.method, cell.mode) == (method, mode)]

    def names(self, cells: Iterable[Cell]) -> list[str]:
        """All contenders of these cells, ours first."""
        return list(dict.fromkeys(name for cell in cells for name in self.samples[cell]))

    def time(self, cell: Cell, name: str) -> Spread:
        """Seconds a call, over all turns."""
        return Spread.of(torch.cat(list(self.samples[cell][name].values())))

    def ratio(self, cell: Cell, name: str) -> Spread:
        """How many times longer ``name`` takes than we do.

        Every sample of one against every one of the other, within a turn: a machine that slows down between turns
        changes both.
        """
        ours, theirs = (self.samples[cell][of] for of in (OURS, name))
        ratios = [(_thinned(theirs[turn])[:, None] / _thinned(ours[turn])).flatten() for turn in ours if turn in theirs]
        return Spread.of(torch.cat(ratios))

    def copy_share(self, cell: Cell, name: str = OURS) -> float:
        """The bandwidth that ``name`` would need for nothing but what must move, over that of a copy of the logits.

        A copy reads and writes them once; it takes new memory but where it is compared with a forward without gradient.
        NaN where no copy was measured.
        """
        at = cell if cell.mode in RULERS else cell._replace(mode="step")
        if RULERS[at.mode] not in self.samples.get(at, {}):
            return math.nan
        return MODES[cell.mode] / 2 * self.time(at, RULERS[at.mode]).median / self.time(cell, name).median


def _thinned(samples: torch.Tensor) -> torch.Tensor:
    return samples[:: math.ceil(len(samples) / MOST)]
