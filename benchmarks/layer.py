"""A training step of a classifier layer and its loss: peak memory and time, fused against one after the other.

    python -m benchmarks.layer                                the sizes of the README's figures
    python -m benchmarks.layer --sizes 512x128x1000000 --only fused
    python -m benchmarks.layer --rivals --sizes 2048x1024x32768 --threads 1

Each contender runs in a process of its own, by turns, several rounds. Memory is the peak resident set of the step above
that before it: parameters and inputs do not count, their gradients do. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import machine, peak_memory
from benchmarks.rivals import RIVALS, outcome
from dal_kernels import dynamics_aware_loss, linear_dynamics_aware_loss

SIZES = ((4096, 512, 131072),)
CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fused": lambda x, w, y: linear_dynamics_aware_loss(x, w, y, 0.7, 0.4),
    "F.linear + F.cross_entropy": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
    "F.linear + dal_kernels": lambda x, w, y: dynamics_aware_loss(F.linear(x, w), y, 0.7, 0.4),
}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and newer; without options it makes all logits
    CONTENDERS["F.linear_cross_entropy, in chunks"] = lambda x, w, y: F.linear_cross_entropy(
        x, w, y, options=nn.LinearCrossEntropyOptions()
    )


def measure_here(name: str, rows: int, width: int, classes: int, dtype: str) -> tuple[int, float]:
    """(bytes, seconds) of one step in this process, after a small one."""

    def case(rows: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        x, w = torch.randn(rows, width), torch.randn(classes, width) / width**0.5
        target = torch.randint(classes, (rows,))
        return *(leaf.to(getattr(torch, dtype)).requires_grad_() for leaf in (x, w)), target  # type: ignore[return-value]

    step = CONTENDERS[name]
    torch.manual_seed(0)
    step(*case(64, 64, 4096)).backward()
    leaves = case(rows, width, classes)
    before = peak_memory(reset=True)
    start = time.perf_counter()
    step(*leaves).backward()
    return peak_memory() - before, time.perf_counter() - start


def of_step(name: str, size: Sequence[int], dtype: str, threads: int, *options: str) -> list[float] | str:
    """What one contender in a fresh process says of a step, or how it failed."""
    command = [sys.executable, "-m", "benchmarks.layer", "--dtype", dtype, "--threads", str(threads), *options]
    command += ["--sizes", "x".join(map(str, size)), "--json", name]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
    found: list[float] | str = (
        json.loads(run.stdout) if run.returncode == 0 else f"failed: exit status {run.returncode}"
    )
    return found


def measure(
    names: Sequence[str], size: Sequence[int], dtype: str, rounds: int, threads: int
) -> dict[str, tuple[float, float]]:
    """Median (bytes, seconds) of each contender, in fresh processes by turns."""
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            step = of_step(name, size, dtype, threads)
            if isinstance(step, str):
                raise SystemExit(f"benchmarks.layer: {name} {step}")
            found[name].append(step)
    return {
        name: (statistics.median(b for b, _ in of), statistics.median(s for _, s in of)) for name, of in found.items()
    }


def compare_rivals(sizes: Sequence[Sequence[int]], dtype: str, threads: int) -> None:
    """Print what a step of cross-entropy takes by each of :data:`benchmarks.rivals.RIVALS`, in fresh processes."""
    print(
        "| N×D×C | | computes | peak memory, MiB | processor, s | error of the weight's gradient |\n"
        "|:---|:---|:---|---:|---:|---:|"
    )
    for size in sizes:
        for name, rival in RIVALS.items():
            found = of_step(name, size, dtype, threads, "--rivals")
            row = f"{found} | | " if isinstance(found, str) else "{:,.0f} | {:.1f} | {:.1e}".format(
                found[0] / 2**20, *found[1:]
            )  # fmt: skip
            print(f"| {'×'.join(map(str, size))} | {name} | {rival.computes} | {row} |", flush=True)
    print(f"\n{dtype}, {threads} thread(s), processor time of all threads; {machine()}.")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=SIZES, metavar="NxDxC", type=lambda s: tuple(map(int, s.split("x")))
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rivals", action="store_true", help="cross-entropy by this package and by others")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", choices=[*CONTENDERS, *RIVALS], help="one contender, in this process, as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.rivals and arguments.json:
        print(json.dumps(outcome(arguments.json, *arguments.sizes[0], getattr(torch, arguments.dtype))))
        return 0
    if arguments.rivals:
        compare_rivals(arguments.sizes, arguments.dtype, arguments.threads)
        return 0
    if arguments.json:
        print(json.dumps(measure_here(arguments.json, *arguments.sizes[0], arguments.dtype)))
        return 0
    print(
        "| N×D×C | | peak memory, MiB | seconds | fused takes of its memory | of its time |\n"
        "|:---|:---|---:|---:|---:|---:|"
    )
    for size in arguments.sizes:
        found = measure(arguments.only, size, arguments.dtype, arguments.rounds, arguments.threads)
        ours = found.get("fused")
        for name, (peak, seconds) in found.items():
            ratios = f"{ours[0] / peak:.1%} | {ours[1] / seconds:.2f}" if ours else " | "
            print(
                f"| {'×'.join(map(str, size))} | {name} | {peak / 2**20:,.0f} | {seconds:.2f} | {ratios} |", flush=True
            )
    print(f"\n{arguments.dtype}, medians of {arguments.rounds}; {machine()}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
