"""The loss against its rivals, by pytest-benchmark: ``python -m benchmarks.micro``."""

from __future__ import annotations

from benchmarks.micro.cases import SIZES, Size
from benchmarks.micro.contenders import AUTHORS, COMPILED, COPY, CROSS_ENTROPY, OURS
from benchmarks.micro.results import BenchmarkError, Results
from benchmarks.micro.run import measure
from benchmarks.micro.tables import busy, ratios

__all__ = [
    "AUTHORS",
    "COMPILED",
    "COPY",
    "CROSS_ENTROPY",
    "OURS",
    "SIZES",
    "BenchmarkError",
    "Results",
    "Size",
    "busy",
    "measure",
    "ratios",
]
