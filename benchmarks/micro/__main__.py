"""Measure the loss against its rivals and write a report with figures.

    python -m benchmarks.micro                                   every size, some minutes
    python -m benchmarks.micro --sizes 64x14 --dtypes fp32 -k "warm and step" --benchmark-max-time=1

What is not listed here is given to pytest: -k chooses by method (warm, cold, graph, host, memory), part (step, forward,
no-grad) and contender; --repeats and --device are options of the benchmark. A size of 2x3 measures the host's time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.micro.cases import DTYPES, SIZES, TINY, parse_size
from benchmarks.micro.results import BenchmarkError
from benchmarks.micro.run import check_packages, measure
from benchmarks.micro.tables import busy, document

OUT = Path("bench-output")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.micro",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--sizes", type=parse_size, nargs="+", default=(TINY, *SIZES), metavar="NxC")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"folder of the report ({OUT})")
    arguments, options = parser.parse_known_args(argv)
    start = time.perf_counter()

    def say(size: str) -> None:
        print(f"{time.perf_counter() - start:4.0f} s: {size}", flush=True)

    try:
        check_packages("matplotlib", "tabulate")
        results = measure(arguments.sizes, arguments.dtypes, options, say)
    except BenchmarkError as error:
        print(f"benchmarks.micro: {error}", file=sys.stderr)
        return 1
    from benchmarks.micro.figures import save_figures  # needs matplotlib

    arguments.out.mkdir(parents=True, exist_ok=True)
    data, report = arguments.out / "benchmark.json", arguments.out / "report.md"
    data.write_text(json.dumps(results.document), encoding="utf-8")
    report.write_text(document(results), encoding="utf-8")
    files = [report, *save_figures(results, arguments.out), data]
    if warning := busy(results):
        print(warning)
    print(f"Done in {time.perf_counter() - start:.0f} s. Written: {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
