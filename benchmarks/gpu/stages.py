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
from benchmarks.gpu.process import ROOT, Ended, run

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

    @property
    def folder(self) -> str:
        """Of that name in the folder of all results."""
        return self.name.replace(" ", "-")


def _without_result(ended: Ended) -> Outcome:
    return Outcome("cut off" if ended.cut else "failed", code_block(ended.tail))


def _benchmark(size: str) -> Callable[[Path, float], Outcome]:
    def work(folder: Path, limit: float) -> Outcome:
        command = [sys.executable, "-m", "benchmarks.micro", "--device=cuda", "--sizes", size, "--repeats=1"]
        report = folder / "report.md"
        report.unlink(missing_ok=True)
        ended = run([*command, "--out", str(folder)], limit, folder / "output.txt")
        if ended.status != 0 or not report.exists():
            return _without_result(ended)
        text = report.read_text(encoding="utf-8")
        text = re.sub(r"(!\[.*?\]\()", rf"\1{folder.name}/", text)  # its figures lie beside it
        return Outcome("done", re.sub(r"^#", "###", text, flags=re.MULTILINE))

    return work


def _host(folder: Path, limit: float) -> Outcome:
    command = [sys.executable, "-m", "benchmarks.host_time", "--devices", "cuda", "--rounds", "31"]
    ended = run(command, limit, folder / "output.txt")
    return Outcome("done", ended.output) if ended.status == 0 else _without_result(ended)


def _time(cases: Sequence[str], folder: Path, limit: float, *options: str, at: Path = ROOT) -> Times:
    """Seconds, or what went wrong, by case; a program that was cut off has no more of them than it came to."""
    if limit <= 0:
        return {}
    name = "-".join(["times", *options]).replace("=", "-")
    file = folder / f"{name}.json"
    file.unlink(missing_ok=True)  # because those of an earlier call are none of a program that dies
    command = [sys.executable, "-m", "benchmarks.gpu.device_time", "--out", str(file), *options, *cases]
    ended = run(command, limit, folder / f"{name}.txt", at)
    found: Times = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if ended.cut:
        return found
    return dict.fromkeys(cases, (ended.tail.splitlines() or ["it said nothing"])[-1]) | found


def _status(times: Times, cases: Sequence[str]) -> str:
    """Of a stage that was to time these: what was cut off is begun again by a later call."""
    if any(case not in times for case in cases):
        return "cut off"
    return "done" if any(isinstance(of, float) for of in times.values()) else "failed"


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
    cases = [str(case) for case in dict.fromkeys([*(c for _, c in steps), *copies.values()])]
    times = _time(cases, folder, limit)
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
    text = "Counts are of benchmarks/counts.json, for an element; times are of replays of a graph, at 2²⁴ elements.\n\n"
    return Outcome(_status(times, cases), text + tabulate(rows, headers, "pipe", disable_numparse=True))


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
        _status(times, cases),
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
    """What a call has timed of all values of a knob stays in the folder, for a call that goes on."""

    def work(folder: Path, limit: float) -> Outcome:
        end, kept = time.monotonic() + limit, folder / "timed.json"
        # By knob and by value, which is a text because JSON has no other keys.
        whole: dict[str, dict[str, Times]] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        parts: dict[str, dict[str, Times]] = {}
        left = [knob for knob in knobs if knob.name not in whole]
        now = _time([case for knob in left for case in knob.cases], folder, limit / 3) if left else {}
        for knob in left:
            of_value = {str(value): trial(knob, value, folder, end - time.monotonic()) for value in knob.values}
            of_value[str(knob.today)] = {case: now[case] for case in knob.cases if case in now}
            timed = all(case in times for times in of_value.values() for case in knob.cases)
            (whole if timed else parts)[knob.name] = of_value
            kept.write_text(json.dumps(whole), encoding="utf-8")
        judged, errors = {}, []
        for knob in knobs:
            of_value = (whole | parts)[knob.name]
            trials = {value: of_value[str(value)] for value in knob.values}
            judged[knob] = choices.judge(knob, trials, of_value[str(knob.today)])
            said = ((value, of) for value, times in of_value.items() for of in times.values() if isinstance(of, str))
            errors += [f"{knob.name} = {value}: {of}" for value, of in dict.fromkeys(said)]
        status = "cut off" if parts else "failed" if len(_unknown(judged)) == len(knobs) else "done"
        chosen = {knob: best for knob, (best, _) in judged.items()}
        text = "\n\n".join([_verdict(judged), *errors])
        return Outcome(status, text, choices.patch(chosen), _unknown(judged))

    return work


def _triton_trial(knob: choices.Knob, value: int, folder: Path, left: float) -> Times:
    return _time(knob.cases, folder, left, f"--set={knob.name}={value}")


def _cuda_trial(knob: choices.Knob, value: int, folder: Path, left: float) -> Times:
    """In the folder of another build of the package, which is found there before any other."""
    if left <= 0:
        return {}
    end, place = time.monotonic() + left, folder / f"{knob.name}-{value}"
    place.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.plan_header", knob.name, str(value), str(place)]
    built = run(command, left, place / "build.txt")
    if built.cut:
        return {}
    if built.status != 0:
        return dict.fromkeys(knob.cases, built.tail.splitlines()[-1])
    return _time(knob.cases, place, end - time.monotonic(), at=place)


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
