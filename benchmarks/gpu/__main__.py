"""Everything there is to do on a GPU, in one command: tests, sanitizers, timings, and which constants should change.

    python -m benchmarks.gpu                      all that is not done yet; at most 25 minutes
    python -m benchmarks.gpu --only auto "sweep of plan.py"
    python -m benchmarks.gpu --again auto         that once more, and what is not done yet

Each stage leaves its result in gpu-output, and a later call goes on with what is missing, failed or cut off, unless
sources, torch or GPU have changed: then it begins anew. It ends with gpu-output/report.md, and
gpu-output/constants.patch where constants should change (git apply gpu-output/constants.patch).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.process import ROOT
from benchmarks.gpu.stages import STAGES, Stage
from dal_kernels import __version__, available_backends

OUT = Path("gpu-output")
MINUTES = 24.5
FINISHED = ("done", "left out")


def machine() -> list[str]:
    """The device and what computes on it, a line each."""
    device = torch.cuda.get_device_properties(0)
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    return [
        f"{torch.cuda.device_count()} × {device.name}, {device.multi_processor_count} multiprocessors, "
        f"{device.total_memory / 2**30:.0f} GiB",
        f"torch {torch.__version__}, {toolkit}, dal_kernels {__version__}",
        *(f"backend {name}: {reason}" for name, reason in available_backends().items()),
    ]


def key() -> str:
    """Of what the results depend on: sources, torch, GPU."""
    content = hashlib.sha256(repr(machine()).encode())
    for folder in ("csrc", "dal_kernels", "benchmarks", "tests"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".h", ".cuh", ".cu", ".cpp"):
                content.update(repr((file.relative_to(ROOT).as_posix(), file.read_bytes())).encode())
    return content.hexdigest()


def work(stage: Stage, folder: Path, limit: float, goes_on: bool) -> tuple[Outcome, float]:
    """A stage's outcome and its seconds. What breaks one stage stops no other.

    Args:
        goes_on: the stage was cut off, and goes on with what it left in its folder; else that is of no use.
    """
    begin = time.monotonic()
    if not goes_on:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        outcome = stage.work(folder, limit)
    except Exception as error:
        outcome = Outcome("failed", f"The stage itself broke: {type(error).__name__}: {error}")
    return outcome, time.monotonic() - begin


def constants(results: dict[str, dict[str, Any]], patch: str) -> str:
    """The patch, and of which constants it cannot be known whether they should change."""
    unknown = []
    for stage in (stage for stage in STAGES if stage.judges):
        result = results.get(stage.name, {"status": "not reached"})
        if result["status"] != "done":
            unknown.append(f"those of {stage.name} ({result['status']})")
        else:
            unknown += result["unknown"]
    lines = [f"```diff\n{patch}```"] if patch else []
    if unknown:
        lines.append(f"Not timed, and so not known: {', '.join(unknown)}.")
    return "\n\n".join(lines) or "No constant was found that should change."


def report(results: dict[str, dict[str, Any]], patch: str) -> str:
    """All results as Markdown."""
    lines = ["# What the GPU says", "", *(f"- {line}" for line in machine()), ""]
    lines += ["| stage | result | seconds |", "|:---|:---|---:|"]
    for stage in STAGES:
        result = results.get(stage.name)
        lines.append(
            f"| {stage.name} | {result['status']} | {result['seconds']:.0f} |"
            if result
            else f"| {stage.name} | not reached | |"
        )
    lines += ["", "## Constants", "", constants(results, patch), ""]
    for stage in STAGES:
        if stage.name in results:
            lines += [f"## {stage.name}", "", str(results[stage.name]["text"]), ""]
            if results[stage.name]["status"] in ("failed", "cut off"):
                lines += [f"All that was printed lies in [{stage.folder}]({stage.folder}).", ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all that was to be done is done, and nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--again", nargs="+", choices=names, default=[], metavar="STAGE")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"stages end by then ({MINUTES})")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: there is no GPU here: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    end, mine = time.monotonic() + 60 * given.minutes, key()
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    file = out / "results.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    results = kept["results"] if kept.get("key") == mine else {}
    for stage in STAGES:
        before = results.get(stage.name)
        if stage.name not in given.only or (before and before["status"] in FINISHED and stage.name not in given.again):
            continue
        left = end - time.monotonic()
        if left <= 0:
            break
        print(f"{stage.name}: at most {min(stage.limit, left):.0f} s", flush=True)
        goes_on = before is not None and before["status"] == "cut off" and stage.name not in given.again
        outcome, seconds = work(stage, out / stage.folder, min(stage.limit, left), goes_on)
        results[stage.name] = {**asdict(outcome), "seconds": seconds}
        print(f"{stage.name}: {outcome.status} in {seconds:.0f} s", flush=True)
        file.write_text(json.dumps({"key": mine, "results": results}), encoding="utf-8")
    patch = "".join(results[stage.name]["patch"] for stage in STAGES if stage.name in results)
    (out / "constants.patch").write_text(patch, encoding="utf-8")
    (out / "report.md").write_text(report(results, patch), encoding="utf-8")
    print(f"\n{constants(results, patch)}\nWritten: {out / 'report.md'}")
    finished = [results.get(name, {}).get("status") in FINISHED for name in given.only]
    return 0 if all(finished) else 1


if __name__ == "__main__":
    sys.exit(main())
