"""What is done, stage by stage: each gives a text for the report, from commands that have a limit of time."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import counts
from benchmarks.gpu import choices, plan_header, tested
from benchmarks.gpu.device_time import Case
from benchmarks.gpu.outcome import Outcome, code_block
from benchmarks.gpu.process import ROOT, run

__all__ = ["STAGES", "Stage"]

Times = dict[str, float | str]


@dataclass(frozen=True)
class Stage:
    """A part of the work, whose result is kept on disk.

    Attributes:
        limit: seconds that it may take.
        work: given a folder of its own and the seconds that it has.
        judges: whether it says which constants should change.
    """

    name: str
    limit: float
    work: Callable[[Path, float], Outcome]
    judges: bool = False


def _benchmark(size: str) -> Callable[[Path, float], Outcome]:
    def work(folder: Path, limit: float) -> Outcome:
        command = [sys.executable, "-m", "benchmarks.micro", "--device=cuda", "--sizes", size, "--repeats=1"]
        report = folder / "report.md"
        report.unlink(missing_ok=True)
        ended = run([*command, "--out", str(folder)], limit, folder / "output.txt")
        if ended.status != 0 or not report.exists():
            return Outcome("failed", code_block(ended.tail))
        text = report.read_text(encoding="utf-8")
        return Outcome("done", re.sub(r"^#", "###", text, flags=re.MULTILINE))

    return work


def _host(folder: Path, limit: float) -> Outcome:
    command = [sys.executable, "-m", "benchmarks.host_time", "--devices", "cuda", "--rounds", "31"]
    ended = run(command, limit, folder / "output.txt")
    return Outcome(
        "done" if ended.status == 0 else "failed", ended.output if ended.status == 0 else code_block(ended.tail)
    )


def _time(cases: Sequence[str], folder: Path, limit: float, *options: str, **variables: str) -> Times:
    """Seconds by case; of a program that was cut off, those that it had."""
    if limit <= 0:
        return {}
    name = "-".join(["times", *options]).replace("=", "-")
    file = folder / f"{name}.json"
    file.unlink(missing_ok=True)  # because those of an earlier call are none of a program that dies
    command = [sys.executable, "-m", "benchmarks.gpu.device_time", "--out", str(file), *options, *cases]
    ended = run(command, limit, folder / f"{name}.txt", **variables)
    if not file.exists():
        return dict.fromkeys(cases, (ended.tail.splitlines() or ["it said nothing"])[-1])
    found: Times = json.loads(file.read_text(encoding="utf-8"))
    return found


def _microseconds(seconds: float | str | None) -> str:
    return f"{seconds * 1e6:.2f}" if isinstance(seconds, float) else str(seconds or "not timed")


def _ratio(top: Any, bottom: Any, digits: int = 2) -> str:
    there = isinstance(top, float) and isinstance(bottom, float) and bottom > 0
    return f"{top / bottom:.{digits}f}" if there else "—"


LARGE = 2**24  # elements: so many that launches do not count


def _counted() -> Iterator[tuple[counts.Count, Case]]:
    """The steps that benchmarks/counts.json has counts of, each with more rows."""
    for item in counts.read()["counts"]:
        count = counts.Count(**item)
        if count.gradient and not count.images:
            rows = LARGE // count.classes
            yield count, Case(count.backend, (rows, count.classes), count.dtype)


def _counts(folder: Path, limit: float) -> Outcome:
    """What was counted without a device, beside what the device takes for it."""
    steps = list(_counted())
    copies = {case: Case("copy", case.shape, case.dtype) for _, case in steps}
    times = _time([str(case) for case in dict.fromkeys([*(c for _, c in steps), *copies.values()])], folder, limit)
    rows = []
    for count, case in steps:
        took, copy = times.get(str(case)), times.get(str(copies[case]))
        # A copy reads and writes the logits once: twice their size in its time is what the memory gives.
        ideal = copy * (count.reads + count.writes) / 2 if isinstance(copy, float) else None
        per_second = float(count.instructions * case.numel)
        rows.append(
            (
                *(count.backend, case.logits, count.dtype, f"{count.instructions:.1f}"),
                *(f"{count.reads + count.writes:.2f}", _microseconds(took), _ratio(took, copy), _ratio(ideal, took)),
                _ratio(per_second / 1e12, took, 2),
            )
        )
    headers = ["backend", "logits", "dtype", "instructions an element", "reads + writes, N·C", "µs", "× a copy"]
    headers += ["share of the copy's bandwidth", "10¹² thread-instructions a second"]
    done = any(isinstance(of, float) for of in times.values())
    text = "Counts are of benchmarks/counts.json, for an element; times are of replays of a graph, at 2²⁴ elements.\n\n"
    return Outcome("done" if done else "failed", text + tabulate(rows, headers, "pipe", disable_numparse=True))


def _auto(folder: Path, limit: float) -> Outcome:
    """Which backend is faster where, and up to how many classes "auto" should take CUDA C++."""
    cases = [f"{name}:{n}x{c}:{dtype}" for n, c, dtype in choices.AUTO_CASES for name in ("cuda", "triton")]
    times = _time(cases, folder, limit)
    today = choices.AUTO.today
    limits = dict.fromkeys((*choices.AUTO.values, today))
    best, gains = choices.best_limit(times, list(limits), today)
    rows = []
    for n, c, dtype in choices.AUTO_CASES:
        cuda, triton = (times.get(f"{name}:{n}x{c}:{dtype}") for name in ("cuda", "triton"))
        took = "cuda" if c <= today else "triton"
        rows.append((f"{n}×{c}", dtype, _microseconds(cuda), _microseconds(triton), _ratio(triton, cuda), took))
    table = tabulate(rows, ["logits", "dtype", "cuda, µs", "triton, µs", "triton ÷ cuda", "auto takes"], "pipe")
    judged = {choices.AUTO: (best, gains)}
    return Outcome(
        "done" if any(isinstance(of, float) for of in times.values()) else "failed",
        f"{table}\n\n{_verdict(judged)}",
        choices.patch({choices.AUTO: best}),
        _unknown(judged),
    )


Judged = Mapping[choices.Knob, tuple[int, Mapping[int, float | None]]]


def _unknown(judged: Judged) -> tuple[str, ...]:
    return tuple(knob.name for knob, (_, gains) in judged.items() if all(of is None for of in gains.values()))


def _verdict(judged: Judged) -> str:
    rows, unknown = [], _unknown(judged)
    for knob, (best, gains) in judged.items():
        tried = ", ".join(f"{value}: {'not timed' if of is None else f'× {of:.3f}'}" for value, of in gains.items())
        take = "unknown" if knob.name in unknown else "stays" if best == knob.today else best
        rows.append((knob.name, knob.today, tried, take))
    return tabulate(rows, ["constant", "today", "time over today's, by value", "take"], "pipe", disable_numparse=True)


def _sweep(
    knobs: Sequence[choices.Knob], trial: Callable[[choices.Knob, int, Path, float], Times]
) -> Callable[[Path, float], Outcome]:
    def work(folder: Path, limit: float) -> Outcome:
        end = time.monotonic() + limit
        today = _time([case for knob in knobs for case in knob.cases], folder, limit / 3)
        judged, errors = {}, []
        for knob in knobs:
            trials: dict[int, Times] = {}
            for value in knob.values:
                try:
                    trials[value] = trial(knob, value, folder, end - time.monotonic())
                except plan_header.CannotBuildError as error:
                    trials[value] = {}
                    errors.append(f"{knob.name} = {value}: {error}")
            judged[knob] = choices.judge(knob, trials, today)
        done = any(isinstance(of, float) for of in today.values())
        text = "\n\n".join([_verdict(judged), *errors, *(str(of) for of in today.values() if isinstance(of, str))])
        chosen = {knob: best for knob, (best, _) in judged.items()}
        return Outcome("done" if done else "failed", text, choices.patch(chosen), _unknown(judged))

    return work


def _triton_trial(knob: choices.Knob, value: int, folder: Path, left: float) -> Times:
    return _time(knob.cases, folder, left, f"--set={knob.name}={value}")


OF_A_BUILD = 30  # seconds


def _cuda_trial(knob: choices.Knob, value: int, folder: Path, left: float) -> Times:
    if left <= OF_A_BUILD:
        return {}
    place = plan_header.build_with(knob, value, folder / f"{knob.name}-{value}")
    link = place / "benchmarks"
    if not link.exists():
        link.symlink_to(ROOT / "benchmarks")
    return _time(knob.cases, place, left, PYTHONPATH=str(place), PYTHONSAFEPATH="1")


def _cuda_sweep(folder: Path, limit: float) -> Outcome:
    try:
        plan_header.ready()
    except plan_header.CannotBuildError as error:
        return Outcome("left out", str(error))
    return _sweep(choices.CUDA, _cuda_trial)(folder, limit)


SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SIZES = ("64x14", "256x1000", "8192x1000", "64x131072")
# In the order of what one wants to know first.
STAGES = (
    Stage("tests of triton", 220, tested.tests("triton")),
    Stage("tests of cuda", 130, tested.tests("cuda and not triton")),
    Stage("other tests", 60, tested.tests("not cuda and not triton")),
    Stage("counts against times", 80, _counts),
    Stage("auto", 100, _auto, judges=True),
    *(Stage(f"benchmark {size}", 80, _benchmark(size)) for size in SIZES),
    Stage("host time", 45, _host),
    Stage("sweep of plan.py", 160, _sweep(choices.TRITON, _triton_trial), judges=True),
    Stage("sweep of plan.h", 150, _cuda_sweep, judges=True),
    *(Stage(f"sanitizer {tool}", 50, tested.sanitizer(tool)) for tool in SANITIZERS),
)
