"""Which of the constants that nobody could time should change: what is tried, how it is judged, and the patch."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.process import ROOT

__all__ = ["AUTO", "AUTO_CASES", "CUDA", "TRITON", "Knob", "best_limit", "judge", "patch"]

# What a change must gain, in the geometric mean over its cases, to be worth a change of code: more than runs differ.
WORTH = 0.97

Times = Mapping[str, float | str]


@dataclass(frozen=True)
class Knob:
    """A constant, other values for it, and the steps that it is about.

    Attributes:
        pattern: finds its value, a group, in its file.
    """

    name: str
    file: Path
    pattern: str
    values: tuple[int, ...]
    cases: tuple[str, ...]

    @property
    def today(self) -> int:
        found = re.search(self.pattern, self.file.read_text(encoding="utf-8"))
        if found is None:
            raise LookupError(f"{self.file.name} has no {self.name} as {self.pattern} finds it")
        return int(found[1])

    def put(self, value: int, text: str) -> str:
        """The file's text, which may have been changed elsewhere, with another value."""
        found = re.search(self.pattern, text)
        assert found is not None
        start, end = found.span(1)
        return f"{text[:start]}{value}{text[end:]}"


PLAN = ROOT / "dal_kernels" / "backends" / "triton" / "plan.py"
HEADER = ROOT / "csrc" / "cuda" / "plan.h"
AUTO_FILE = ROOT / "dal_kernels" / "backends" / "choose.py"


def _triton(name: str, pattern: str, values: tuple[int, ...], *cases: str) -> Knob:
    return Knob(name, PLAN, pattern, values, tuple(f"triton:{case}" for case in cases))


def _cuda(name: str, values: tuple[int, ...], *cases: str) -> Knob:
    return Knob(name, HEADER, rf"\b{name} = (\d+)", values, tuple(f"cuda:{case}" for case in cases))


TRITON = (
    _triton("FILLED", r"FILLED = (\d+)", (128, 512), "8x131072:bf16", "64x131072:fp32"),
    _triton("JOINED", r"JOINED = (\d+)", (256, 4096), "8192x1000:fp32", "65536x100:bf16"),
    _triton("TILE", r"TILE = \d+, (\d+)", (1024, 4096), "256x32000:bf16", "256x32000:fp32"),
    _triton("REGISTER_CLASSES", r"REGISTER_CLASSES = (\d+)", (8192,), "256x16000:bf16", "256x16000:fp32"),
    _triton("KEPT_VALUES", r"KEPT_VALUES, MOST_SHARES = (\d+)", (24, 32), "8x21x128x128:fp32", "8x150x64x64:bf16"),
    _triton("REDUCING_WARPS", r"REDUCING_WARPS = (\d+)", (2, 8), "262144x10:fp32", "65536x100:bf16"),
)
# Of plan.h those that the host alone reads: the kernels need not be compiled again for them.
CUDA = (
    _cuda("kRowThreads", (128,), "256x32000:bf16", "256x32000:fp32"),
    _cuda("kLoopThreads", (256,), "64x300000:bf16", "64x300000:fp32"),
    _cuda("kMostBlocks", (1, 4), "64x131072:bf16", "256x50000:fp32"),
)
# Up to how many classes "auto" takes CUDA C++.
AUTO = Knob(
    "_MOST_CLASSES_OF_CUDA", AUTO_FILE, r"_MOST_CLASSES_OF_CUDA = (\d+)", (0, 128, 2048, 16384, 65536, 2**20), ()
)
AUTO_CASES = tuple(
    (rows, classes, dtype)
    for rows, classes in (
        *((64, 10), (65536, 10), (128, 100), (65536, 100), (256, 1000), (8192, 1000)),
        *((512, 8192), (256, 32000), (256, 50000), (64, 131072)),
    )
    for dtype in ("fp32", "bf16")
)


def gain(times: Times, today: Times, cases: Sequence[str]) -> float | None:
    """The geometric mean of new time over old; None if a case was not timed in both."""
    logs = []
    for case in cases:
        new, old = times.get(case), today.get(case)
        if not isinstance(new, float) or not isinstance(old, float) or new <= 0 or old <= 0:
            return None
        logs.append(math.log(new / old))
    return math.exp(sum(logs) / len(logs)) if logs else None


def judge(knob: Knob, trials: Mapping[int, Times], today: Times) -> tuple[int, dict[int, float | None]]:
    """The value to take, and of each value tried its time over today's."""
    gains = {value: gain(times, today, knob.cases) for value, times in trials.items()}
    timed = {value: of for value, of in gains.items() if of is not None}
    best = min(timed, key=timed.__getitem__, default=knob.today)
    return (best if timed and timed[best] < WORTH else knob.today), gains


def best_limit(times: Times, limits: Sequence[int], today: int) -> tuple[int, dict[int, float | None]]:
    """The number of classes up to which CUDA C++ is to be taken, and of each its time over today's."""

    def chosen(limit: int) -> dict[str, float | str]:
        return {
            f"{rows}x{classes}:{dtype}": times.get(
                f"{'cuda' if classes <= limit else 'triton'}:{rows}x{classes}:{dtype}", "not timed"
            )
            for rows, classes, dtype in AUTO_CASES
        }

    now = chosen(today)
    gains = {limit: gain(chosen(limit), now, list(now)) for limit in limits}
    timed = {limit: of for limit, of in gains.items() if of is not None}
    best = min(timed, key=timed.__getitem__, default=today)
    return (best if timed and timed[best] < WORTH else today), gains


def patch(chosen: Mapping[Knob, int]) -> str:
    """A unified diff of the constants that are to change, for ``git apply``; empty if none is."""
    diffs = []
    for file in dict.fromkeys(knob.file for knob in chosen):
        old = new = file.read_text(encoding="utf-8")
        for knob, value in chosen.items():
            if knob.file == file:
                new = knob.put(value, new)
        name = file.relative_to(ROOT).as_posix()
        lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{name}", f"b/{name}")
        diffs.append("".join(lines))
    return "".join(diffs)
