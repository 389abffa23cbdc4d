"""What is done, stage by stage: each gives a text for the report, from commands that have a limit of time."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import counts
from benchmarks.gpu import choices, plan_header
from benchmarks.gpu.device_time import Case
from benchmarks.gpu.process import ROOT, Ended, run

__all__ = ["STAGES", "Outcome", "Stage"]

Times = dict[str, float | str]


@dataclass(frozen=True)
class Outcome:
    """What a stage found.

    Attributes:
        status: "done", "failed", "cut off" where its time was over before anything failed, or "left out" where
            something for it is not here.
        text: Markdown for the report.
        patch: changes that it asks for.
        unknown: constants that it was to judge and has no times of.
    """

    status: str
    text: str
    patch: str = ""
    unknown: tuple[str, ...] = ()


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


def _code(text: str) -> str:
    return f"```\n{text}\n```"


def _tests(selection: str) -> Callable[[Path, float], Outcome]:
    def work(folder: Path, limit: float) -> Outcome:
        # Only where there are such tests, because collecting all takes as long as many of them.
        files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text("utf-8")]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
        workers = ["-n", "auto", "--maxprocesses", "8"]
        ended = run([*command, *workers, "-k", selection, *files], limit, folder / "output.txt")
        return _summary(ended)

    return work


MARK = "mark.gpu"


def _summary(ended: Ended) -> Outcome:
    """Of a verbose pytest, which may have been cut off: then the lines of single tests say how far it came."""
    said = re.findall(r"(PASSED|FAILED|ERROR|SKIPPED) (tests/\S.*?)(?: - (.*))?$", ended.output, re.MULTILINE)
    why = {name: reason for _, name, reason in said if reason}
    results = {name.strip(): result for result, name, _ in said}
    counted = Counter(results.values())
    lines = [", ".join(f"{number} {result.lower()}" for result, number in counted.most_common()) or _code(ended.tail)]
    bad = [name for name, result in results.items() if result in ("FAILED", "ERROR")]
    kinds = Counter(re.split(r"[:\s]", why[name], maxsplit=1)[0] if name in why else "untold" for name in bad)
    if bad:
        lines.append("Failures: " + ", ".join(f"{number} {kind}" for kind, number in kinds.most_common()) + ".")
        lines.append("\n".join(f"- `{name}`: {why.get(name, 'untold')[:160]}" for name in bad[:30]))
    if ended.cut:
        lines.append(f"It was cut off after {ended.seconds:.0f} s; what it had not reached is not counted.")
    return Outcome(_status(ended, ended.status == 0, bool(bad)), "\n\n".join(lines))


def _status(ended: Ended, good: bool, bad: bool) -> str:
    """Of a command that may have been cut off, which shows nothing of what it had not reached."""
    if bad or not (good or ended.cut):
        return "failed"
    return "cut off" if ended.cut else "done"


# Every kernel once: short rows, rows in registers, clusters, images, streams; of the sanitizers' slowness no more.
SAMPLE = (
    "(test_matches_truth and soft and mean and float32) or (test_images_match_truth and soft and mean and bfloat16)"
    " or two_streams or bad_label"
)
WATCHED = ("tests/kernels/test_gpu.py", "tests/kernels/test_gpu_streams.py")
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
FOUND_ERRORS = 86
FINDINGS = "Invalid|Race|Uninitialized|Misaligned|Barrier error|Program hit"


def _sanitizer(tool: str) -> Callable[[Path, float], Outcome]:
    def work(folder: Path, limit: float) -> Outcome:
        program = shutil.which("compute-sanitizer") or next(
            (found for place in PLACES if (found := shutil.which("compute-sanitizer", path=place))), None
        )
        if program is None:
            return Outcome("left out", "compute-sanitizer is not installed: it comes with the CUDA toolkit.")
        watched = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND_ERRORS)]
        tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=line", "-p", "no:cacheprovider"]
        ended = run([*watched, *tests, "-k", SAMPLE, *WATCHED], limit, folder / "output.txt")
        return _watched(ended)

    return work


def _watched(ended: Ended) -> Outcome:
    """Of tests under a sanitizer: done only if they passed, all of them, and its summaries are there and clean."""
    summaries = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: .*$", ended.output, re.MULTILINE)
    clean = [line for line in summaries if re.search(r": 0 (errors|hazards)", line)]
    # One that is cut off has no summary, but says each thing as it finds it.
    found = re.findall(rf"^=+ .*\b(?:{FINDINGS})\b.*$", ended.output, re.MULTILINE)
    passed = re.search(r"\b\d+ passed\b", ended.output) is not None
    text = _code("\n".join([*found[:10], *summaries]) if found or len(clean) < len(summaries) else ended.tail)
    cut = " It was cut off: what it had not reached is unknown." if ended.cut else ""
    bad = bool(found) or clean != summaries or ended.status == FOUND_ERRORS
    return Outcome(_status(ended, ended.status == 0 and passed and bool(summaries), bad), text + cut)


def _benchmark(size: str) -> Callable[[Path, float], Outcome]:
    def work(folder: Path, limit: float) -> Outcome:
        command = [sys.executable, "-m", "benchmarks.micro", "--device=cuda", "--sizes", size, "--repeats=1"]
        report = folder / "report.md"
        report.unlink(missing_ok=True)
        ended = run([*command, "--out", str(folder)], limit, folder / "output.txt")
        if ended.status != 0 or not report.exists():
            return Outcome("failed", _code(ended.tail))
        text = report.read_text(encoding="utf-8")
        return Outcome("done", re.sub(r"^#", "###", text, flags=re.MULTILINE))

    return work


def _host(folder: Path, limit: float) -> Outcome:
    command = [sys.executable, "-m", "benchmarks.host_time", "--devices", "cuda", "--rounds", "31"]
    ended = run(command, limit, folder / "output.txt")
    return Outcome("done" if ended.status == 0 else "failed", ended.output if ended.status == 0 else _code(ended.tail))


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
    Stage("tests of triton", 220, _tests("triton")),
    Stage("tests of cuda", 130, _tests("cuda and not triton")),
    Stage("other tests", 60, _tests("not cuda and not triton")),
    Stage("counts against times", 80, _counts),
    Stage("auto", 100, _auto, judges=True),
    *(Stage(f"benchmark {size}", 80, _benchmark(size)) for size in SIZES),
    Stage("host time", 45, _host),
    Stage("sweep of plan.py", 160, _sweep(choices.TRITON, _triton_trial), judges=True),
    Stage("sweep of plan.h", 150, _cuda_sweep, judges=True),
    *(Stage(f"sanitizer {tool}", 50, _sanitizer(tool)) for tool in SANITIZERS),
)
