"""The tests on a GPU, by themselves and under compute-sanitizer: how they are run, and what their output says."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.outcome import Outcome, code_block
from benchmarks.gpu.process import ROOT, Ended, run

__all__ = ["PYTEST", "sanitizer", "summary", "tests", "verdict"]


PYTEST = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
PYTEST += ["-p", "benchmarks.gpu.told", "-n", "auto", "--maxprocesses", "8"]


def tests(selection: str) -> Callable[[Path, float], Outcome]:
    def work(folder: Path, limit: float) -> Outcome:
        # Only where there are such tests, because collecting all takes as long as many of them.
        files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text("utf-8")]
        return summary(run([*PYTEST, "-k", selection, *files], limit, folder / "output.txt"))

    return work


MARK = "mark.gpu"


def summary(ended: Ended) -> Outcome:
    """Of a verbose pytest, which may have been cut off: then the lines of single tests say how far it came."""
    said = re.findall(r"(PASSED|FAILED|ERROR|SKIPPED) (tests/\S.*?)(?: - (.*))?$", ended.output, re.MULTILINE)
    why = {name: reason for _, name, reason in reversed(said) if reason}  # the first is whole: see told.py
    results = {name.strip(): result for result, name, _ in said}
    counted = Counter(results.values())
    lines = [
        ", ".join(f"{number} {result.lower()}" for result, number in counted.most_common()) or code_block(ended.tail)
    ]
    bad = [name for name, result in results.items() if result in ("FAILED", "ERROR")]
    kind_of = {name: re.split(r"[:\s]", why.get(name, "untold"), maxsplit=1)[0] for name in bad}
    kinds = Counter(kind_of.values())
    bad.sort(key=lambda name: kinds[kind_of[name]])  # what is rare would not be among the first of hundreds
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
SAMPLED_FILES = ("tests/kernels/test_gpu.py", "tests/kernels/test_gpu_streams.py")
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
FOUND_ERRORS = 86
FINDINGS = "Invalid|Race|Uninitialized|Misaligned|Barrier error|Program hit"


def sanitizer(tool: str) -> Callable[[Path, float], Outcome]:
    def work(folder: Path, limit: float) -> Outcome:
        program = shutil.which("compute-sanitizer") or next(
            (found for place in PLACES if (found := shutil.which("compute-sanitizer", path=place))), None
        )
        if program is None:
            return Outcome("left out", "compute-sanitizer is not installed: it comes with the CUDA toolkit.")
        watched = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND_ERRORS)]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=line", "-p", "no:cacheprovider"]
        ended = run([*watched, *command, "-k", SAMPLE, *SAMPLED_FILES], limit, folder / "output.txt")
        return verdict(ended)

    return work


def verdict(ended: Ended) -> Outcome:
    """Of tests under a sanitizer: done only if they passed, all of them, and its summaries are there and clean."""
    summaries = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: .*$", ended.output, re.MULTILINE)
    clean = [line for line in summaries if re.search(r": 0 (errors|hazards)", line)]
    # One that is cut off has no summary, but says each thing as it finds it.
    found = re.findall(rf"^=+ .*\b(?:{FINDINGS})\b.*$", ended.output, re.MULTILINE)
    passed = re.search(r"\b\d+ passed\b", ended.output) is not None
    text = code_block("\n".join([*found[:10], *summaries]) if found or len(clean) < len(summaries) else ended.tail)
    cut = " It was cut off: what it had not reached is unknown." if ended.cut else ""
    bad = bool(found) or clean != summaries or ended.status == FOUND_ERRORS
    return Outcome(_status(ended, ended.status == 0 and passed and bool(summaries), bad), text + cut)
