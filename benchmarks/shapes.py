"""A training step on a CPU over a grid of shapes, beside F.cross_entropy's and a copy of the logits in the same run.

    python -m benchmarks.shapes                           60 shapes, float32 and bfloat16, one thread and all of them
    python -m benchmarks.shapes --only 4096x14 8x21x128x128 --dtypes fp32 --threads 1

A size is that of the logits, classes second; "last" behind it puts the classes last in memory. Steps are taken in
turns, and a ratio is that of the medians. ATEN_CPU_CAPABILITY=avx2 tells torch and us to do without AVX-512.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import machine
from benchmarks.turns import in_turns
from dal_kernels import dynamics_aware_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = (1, 16, 64, 512, 4096, 65536, 262144)
CLASSES = (2, 10, 14, 32, 100, 1000, 10000, 131072)
MOST = 2**23  # numbers in logits of the grid
IMAGES = ((8, 21, 128, 128), (2, 19, 256, 512), (4, 2, 256, 256), (1, 150, 128, 128), (16, 5, 64, 64), (32, 100, 7, 7))
TURN = 2e-4  # seconds at least, of one contender: more than a clock's grain


class Shape(NamedTuple):
    """The size of logits, and whether their classes are last in memory."""

    size: tuple[int, ...]
    classes_last: bool = False

    def __str__(self) -> str:
        return "x".join(map(str, self.size)) + ("last" if self.classes_last else "")

    def logits(self, dtype: torch.dtype) -> Tensor:
        if self.classes_last:
            first, classes, *inner = self.size
            return torch.randn(first, *inner, classes).to(dtype).movedim(-1, 1).requires_grad_()
        return torch.randn(self.size).to(dtype).requires_grad_()


def grid() -> list[Shape]:
    """60 shapes, from a single row of two classes to rows of 131072."""
    flat = [Shape((rows, classes)) for rows in ROWS for classes in CLASSES if rows * classes <= MOST]
    dense = [Shape(size, last) for size in IMAGES for last in (False, True)]
    return [*flat, *dense, Shape((8, 1000, 32)), Shape((8, 1000, 32), True)]


def parse_shape(text: str) -> Shape:
    """Such as "64x1000" or "8x21x128x128last".

    Raises:
        argparse.ArgumentTypeError: it is nothing like that.
    """
    try:
        size = tuple(int(part) for part in text.removesuffix("last").split("x"))
    except ValueError:
        size = ()
    if len(size) < 2 or min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give at least two whole numbers, like 64x1000")
    return Shape(size, text.endswith("last"))


def medians(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Seconds of each call, taken in turns for about that long."""
    start = time.perf_counter()
    for call in 2 * tuple(calls):
        call()
    each = (time.perf_counter() - start) / 2 / len(calls)
    repeats = max(1, int(TURN / each))
    rounds = min(max(5, int(seconds / (each * repeats * len(calls)))), 500)
    return [statistics.median(of) for of in in_turns(calls, rounds, repeats)]


def measure(shape: Shape, dtype: torch.dtype, seconds: float) -> tuple[float, float, float]:
    """Microseconds of our step, in which F.cross_entropy's step takes that many times as long; and ours in copies."""
    logits = shape.logits(dtype)
    target = torch.randint(logits.shape[1], (logits.shape[0], *logits.shape[2:]))

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        logits.grad = None
        loss(logits, target).backward()

    ours, theirs, copy = medians(
        (
            lambda: step(lambda logits, target: dynamics_aware_loss(logits, target, 0.7)),
            lambda: step(F.cross_entropy),
            lambda: logits.detach().clone(),
        ),
        seconds,
    )
    return 1e6 * ours, theirs / ours, ours / copy


def rows_of(shapes: Sequence[Shape], dtypes: Sequence[str], seconds: float) -> Iterator[tuple[str, ...]]:
    """A row of the table for each shape, as it is measured."""
    for shape in shapes:
        cells = [measure(shape, DTYPES[dtype], seconds) for dtype in dtypes]
        texts = ((f"{ours:.1f}", f"{theirs:.2f}", f"{copies:.1f}") for ours, theirs, copies in cells)
        yield str(shape), *(text for cell in texts for text in cell)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", type=parse_shape, default=grid(), metavar="SIZE")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each size and dtype")
    given = parser.parse_args(argv)
    head = [f"{dtype} {what}" for dtype in given.dtypes for what in ("µs", "F.cross_entropy takes ×", "× a copy")]
    for threads in given.threads:
        torch.set_num_threads(threads)
        print(f"\na training step on {machine()}, {torch.backends.cpu.get_cpu_capability()}\n")
        table = tabulate(
            rows_of(given.only, given.dtypes, given.seconds), ("size", *head), tablefmt="pipe", disable_numparse=True
        )
        print(table, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
