"""Forward + backward through the public API against its rivals: medians in one run, each size in a fresh process.

    python -m benchmarks.speed                      the sizes of the README's table
    python -m benchmarks.speed --sizes 64x14 --dtype bfloat16 --compile

A fresh process, because what a large allocation costs depends on those before it. Ratios are what to read: all
contenders of a size ran in the same process, one after the other, several times over.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import dynamics_aware_loss, reference

__all__ = ["SIZES", "Timing", "machine", "measure", "table"]

SIZES = ((64, 14), (256, 1000), (8192, 1000), (256, 50000))
OURS, CROSS_ENTROPY, REFERENCE, AUTHORS = "dal_kernels", "F.cross_entropy", "reference", "authors' formula"
COMPILED, COPY, NO_GRAD = "torch.compile(reference)", "logits.clone()", "dal_kernels, no grad"


@dataclass(frozen=True)
class Timing:
    """Median and the quantiles at 20 and 80 %, in seconds a call."""

    median: float
    low: float
    high: float


def contenders(logits: Tensor, target: Tensor, compiled: bool) -> dict[str, Callable[[], object]]:
    """What is timed: a whole step each, but for the copy and the forward without grad."""
    leaf = logits.clone().requires_grad_()
    q, bootstrap_weight = torch.tensor(1.2), torch.tensor(0.4)

    def step(loss_of: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def run() -> None:
            leaf.grad = None
            loss_of(leaf).backward()

        return run

    def plain(z: Tensor) -> Tensor:
        return reference.dynamics_aware_loss(z, target, q, bootstrap_weight)

    made: dict[str, Callable[[], object]] = {
        OURS: step(lambda z: dynamics_aware_loss(z, target, q, bootstrap_weight)),
        CROSS_ENTROPY: step(lambda z: F.cross_entropy(z, target)),
        REFERENCE: step(plain),
        AUTHORS: step(lambda z: reference.dynamics_aware_loss(z, target, q, bootstrap_weight, official=True)),
        COPY: logits.clone,
        NO_GRAD: lambda: dynamics_aware_loss(logits, target, q, bootstrap_weight),
    }
    if compiled:
        made[COMPILED] = step(torch.compile(plain, fullgraph=True))
    return made


def time_calls(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds a call, of as many samples as fit the given time (at least 5), after as long a warm-up as one sample."""
    call()
    start = time.perf_counter()
    call()
    inner = max(1, int(2e-4 / (time.perf_counter() - start)))
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        samples.append((time.perf_counter() - start) / inner)
    return samples


def measure_here(
    rows: int, classes: int, dtype: str = "float32", compiled: bool = False, seconds: float = 0.3
) -> dict[str, Timing]:
    """Time every contender in this process: three rounds of ``seconds`` each."""
    torch.manual_seed(0)
    logits = torch.randn(rows, classes).to(getattr(torch, dtype))
    target = torch.randint(classes, (rows,))
    samples: dict[str, list[float]] = {}
    calls = contenders(logits, target, compiled)
    for _ in range(3):
        for name, call in calls.items():
            samples.setdefault(name, []).extend(time_calls(call, seconds))
    result = {}
    for name, values in samples.items():
        low, _, _, high = statistics.quantiles(values, n=5)
        result[name] = Timing(statistics.median(values), low, high)
    return result


def measure(
    rows: int, classes: int, dtype: str = "float32", compiled: bool = False, seconds: float = 0.3
) -> dict[str, Timing]:
    """:func:`measure_here` in a fresh process."""
    arguments = [f"{rows}x{classes}", "--dtype", dtype, "--seconds", str(seconds), *(["--compile"] if compiled else [])]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--json", "--sizes", *arguments],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {name: Timing(**values) for name, values in json.loads(result.stdout).items()}


def table(timings: dict[tuple[int, int], dict[str, Timing]]) -> str:
    """Markdown: our time, and how many times longer the rivals take."""
    from tabulate import tabulate

    rivals = [name for name in (CROSS_ENTROPY, COMPILED, REFERENCE, AUTHORS) if name in next(iter(timings.values()))]
    rows = []
    for (n, classes), of in timings.items():
        ours = of[OURS].median
        rows.append(
            [
                f"{n}×{classes}",
                f"{ours * 1e6:,.0f} µs",
                *(f"{of[name].median / ours:.1f}×" for name in rivals),
                f"{ours / of[COPY].median:.1f}",
                f"{of[NO_GRAD].median / ours:.2f}",
            ]
        )
    headers = ["N×C", "dal_kernels", *(f"{name} takes" for name in rivals), "in copies of the logits", "without grad"]
    return tabulate(rows, headers, tablefmt="github", colalign=("left", *["right"] * (len(headers) - 1)))


def machine() -> str:
    """What the figures were taken on, in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def _size(text: str) -> tuple[int, int]:
    rows, _, classes = text.partition("x")
    return int(rows), int(classes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_size, nargs="+", default=SIZES, metavar="NxC")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference too (slow to start)")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each contender, three times over")
    parser.add_argument("--json", action="store_true", help="one size, in this process, as JSON")
    arguments = parser.parse_args(argv)
    if arguments.json:
        here = measure_here(*arguments.sizes[0], arguments.dtype, arguments.compile, arguments.seconds)
        print(json.dumps({name: asdict(timing) for name, timing in here.items()}))
        return 0
    timings = {size: measure(*size, arguments.dtype, arguments.compile, arguments.seconds) for size in arguments.sizes}
    print(table(timings))
    print(f"\nForward + backward, {arguments.dtype}, medians; {machine()}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
