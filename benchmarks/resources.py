"""What the compilers make of the Triton kernels, for many GPUs and without one: registers, spills, width of accesses.

    python -m benchmarks.resources                       a few variants for every target
    python -m benchmarks.resources --all                 every variant (some ten minutes of one core)
    python -m benchmarks.resources --only "x1000 classes" --targets sm_90 gfx942 --out resources.md

Facts of the compiled binaries, and NOT timings; of what is compiled, see variants.py. Needs Triton and the helper
package gpuless, on the path or in a folder "shared" beside the repository.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.executor import MissingError, load
from benchmarks.variants import QUICK, Launch, Variant, every_variant, kernels

__all__ = ["TARGETS", "MissingError", "Resources", "compile_variant"]

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")


@dataclass(frozen=True)
class Resources:
    """Of one binary. Registers and spills are per lane, shared memory per program, accesses static instructions."""

    variant: Variant
    target: str
    launch: Launch
    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int


def lanes_of(target: str) -> int:
    return 64 if target.startswith("gfx") else 32


def load_compiler() -> Any:
    """gpuless.aot; raises MissingError."""
    return load("gpuless.aot")


def _accesses(row: Any, what: str) -> tuple[int, int]:
    """All global loads or stores of a binary, and those of at least 16 bytes a lane."""
    if row.target.startswith("sm_"):
        widths = {"load": row.global_loads, "store": row.global_stores}[what]
        return sum(widths.values()), sum(number for width, number in widths.items() if width >= 128)
    of = {name: number for name, number in row.opcodes.items() if re.match(rf"(global|buffer|flat)_{what}_", name)}
    return sum(of.values()), sum(number for name, number in of.items() if re.search(r"(x4|b128)$", name))


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile ahead of time; raises gpuless.aot.CompileError, or MissingError without the helper."""
    compiler = load_compiler()
    launch = variant.launch(lanes_of(target))
    row = compiler.compile_one(kernels()[launch.kernel], launch.signature, target, num_warps=launch.warps)
    loads, stores = _accesses(row, "load"), _accesses(row, "store")
    return Resources(variant, target, launch, row.registers, row.spill_bytes, row.shared_bytes, *loads, *stores)


def table(rows: Iterable[Resources]) -> str:
    """Markdown, with what it is and is not."""
    from tabulate import tabulate

    headers = ["kernel", "dtype", "N×C", "variant", "target", "BLOCK", "ROWS", "AXIS", "warps"]
    headers += ["registers", "spill bytes", "shared bytes", "16-byte loads", "16-byte stores"]
    lines = [
        [
            row.launch.kernel,
            row.variant.dtype,
            f"{row.variant.rows}×{row.variant.classes}",
            row.variant.way,
            row.target,
            *(row.launch.signature.get(name, "-") for name in ("BLOCK", "ROWS", "AXIS")),
            row.launch.warps,
            row.registers,
            row.spill_bytes,
            row.shared_bytes,
            f"{row.wide_loads} of {row.loads}",
            f"{row.wide_stores} of {row.stores}",
        ]
        for row in rows
    ]
    return (
        "Facts of the compiled binaries, NOT timings.\n\n"
        f"{tabulate(lines, headers, tablefmt='github')}\n\n"
        "Registers and spills (stores and loads) are per lane, shared memory per program. Loads and stores are static\n"
        "instructions in global memory, of elements and scalars alike; those of at least 16 bytes a lane, of all.\n"
        "Compiled for packed rows, from pointers aligned to 16 bytes. On AMD (gfx...) a warp has 64 lanes,\n"
        "registers and spills are the vector ones, and that tensors are below 2 GiB, as the JIT tells, is not told.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every variant, not a few")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose description contains this")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, metavar="TARGET")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too")
    arguments = parser.parse_args(argv)
    variants = [v for v in (every_variant() if arguments.all else QUICK) if arguments.only in str(v)]
    if not variants:
        parser.error(f"no variant is described by {arguments.only!r}")
    rows = []
    try:
        load_compiler()
        for number, variant in enumerate(variants, 1):
            if sys.stderr.isatty():
                print(f"{number} of {len(variants)}: {variant}", file=sys.stderr)
            rows += [compile_variant(variant, target) for target in arguments.targets]
    except MissingError as error:
        print(f"resources: {error}", file=sys.stderr)
        return 2
    text = table(rows)
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
