"""What a training step executes and moves on a GPU, counted without one. COUNTS, not times.

    python -m benchmarks.counts                 makes benchmarks/counts.json and counts.md anew

The compiled code (PTX for sm_90) runs in an executor on the CPU, which counts exactly; registers and spills are read
from the binaries. Needs nvcc, Triton, the CUDA extension, and the helper package gpuless, on the path or in a folder
"shared" beside the repository.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cuda_emulator, resources, variants
from benchmarks.cuda_resources import cuda_binaries
from benchmarks.executor import MissingError, load
from dal_kernels import dynamics_aware_loss

__all__ = [
    *("BACKENDS", "FILE", "Count", "Registers"),
    *("count", "count_images", "document", "read", "sentence", "table", "versions"),
]

FILE = Path(__file__).with_name("counts.json")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [
    (rows, classes, dtype)
    for rows, classes in ((128, 10), (128, 100), (64, 1000), (8, 32000))
    for dtype in DTYPES.values()
] + [(4, 131072, torch.bfloat16)]
# Logits of segmentations, (B, C, H, W), as they are made: positions are neighbours in memory, or channels. (Of larger
# ones the executor takes more than ten gigabytes.)
IMAGES = [((8, 21, 128, 128), dtype, channels_last) for dtype in DTYPES.values() for channels_last in (False, True)]
BACKENDS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "triton": lambda: load().install(cuda_emulator.ARCHITECTURE),
    "cuda": cuda_emulator.installed,
}


@dataclass(frozen=True)
class Count:
    """Of one call through the public API, reduced by its mean.

    ``instructions`` are thread-instructions an element of the logits: one lane of one warp instruction, masked or not.
    ``reads`` and ``writes`` are global memory in sizes of the logits (N·C), scalars and labels among them.
    """

    backend: str
    rows: int
    classes: int
    dtype: str
    gradient: bool
    instructions: float
    reads: float
    writes: float
    kernels: list[str]
    images: str = ""  # what the rows are of, and how they lie, if not one beside the other

    @property
    def logits(self) -> str:
        return self.images or f"{self.rows}×{self.classes}"


@dataclass(frozen=True)
class Registers:
    """Of one kernel and variant: registers and spilled bytes a lane, by target."""

    backend: str
    kernel: str
    registers: dict[str, int]
    spill_bytes: dict[str, int]


def count(backend: str, rows: int, classes: int, dtype: torch.dtype, gradient: bool, launches: Any) -> Count:
    """Count a step, or without ``gradient`` a forward that keeps nothing, on random logits of seed 0.

    Args:
        launches: what the executor yields: a list that grows as kernels start. Holds those of this call afterwards.
    """
    torch.manual_seed(0)
    logits, target = torch.randn(rows, classes).to(dtype).requires_grad_(gradient), torch.randint(classes, (rows,))
    return _count(backend, logits, target, launches)


def count_images(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, gradient: bool, launches: Any
) -> Count:
    """:func:`count` of logits (B, C, H, W)."""
    torch.manual_seed(0)
    logits = torch.randn(shape).to(dtype)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    found = _count(backend, logits.requires_grad_(gradient), target, launches)
    return replace(found, images="×".join(map(str, shape)) + (", channels last" if channels_last else ""))


def _count(backend: str, logits: Tensor, target: Tensor, launches: Any) -> Count:
    q, bootstrap_weight, gradient = torch.tensor(1.2), torch.tensor(0.4), logits.requires_grad
    launches.clear()
    loss = dynamics_aware_loss(logits, target, q, bootstrap_weight, backend=backend)
    if gradient:
        loss.backward()
    moved = load().traffic([launch.stats for launch in launches], logits.numel(), logits.element_size())
    instructions = sum(launch.stats.warp_instructions for launch in launches) * 32 / logits.numel()
    name = variants.TYPES[logits.dtype]
    kernels = [launch.name for launch in launches]
    return Count(
        backend, target.numel(), logits.shape[1], name, gradient, instructions, moved.reads, moved.writes, kernels
    )


def registers() -> Iterable[Registers]:
    """Of Triton's kernels in the variants that variants.py takes for a few, then of every CUDA kernel."""
    for variant in variants.QUICK:
        found = {target: resources.compile_variant(variant, target) for target in resources.TARGETS}
        used = {target: binary.registers for target, binary in found.items()}
        yield Registers("triton", str(variant), used, {target: b.spill_bytes for target, b in found.items()})
    by_kernel: dict[str, Registers] = {}
    for binary in cuda_binaries():
        kernel = by_kernel.setdefault(binary.kernel, Registers("cuda", binary.kernel, {}, {}))
        kernel.registers[binary.target] = binary.registers
        kernel.spill_bytes[binary.target] = binary.stack_bytes + binary.local_bytes
    yield from (by_kernel[name] for name in sorted(by_kernel) if name.endswith(("_f32", "_bf16")))


def versions() -> dict[str, str]:
    """Of the compilers, which the counts depend on."""
    import triton

    nvcc = subprocess.run([str(cuda_emulator.NVCC), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release \S+ V(\S+)", nvcc)
    return {"triton": triton.__version__, "nvcc": found[1] if found else "unknown"}


def table(counts: Sequence[Count]) -> str:
    """Markdown; one line for a step and one for a forward without gradient."""
    from tabulate import tabulate

    headers = ["logits", "dtype", "backend", "pass", "instructions an element", "reads, N·C", "writes, N·C", "launches"]
    lines = [
        [
            c.logits,
            c.dtype,
            c.backend,
            "forward + backward" if c.gradient else "forward, no grad",
            f"{c.instructions:.1f}",
            f"{c.reads:.2f}",
            f"{c.writes:.2f}",
            f"{len(c.kernels)}: {', '.join(c.kernels)}",
        ]
        for c in counts
    ]
    align = ("left", "left", "left", "left", "right", "right", "right", "left")
    return tabulate(lines, headers, tablefmt="github", colalign=align, disable_numparse=True)


def _registers_table(kernels: Sequence[Registers]) -> str:
    from tabulate import tabulate

    # By age, AMD's last.
    targets = sorted({t for kernel in kernels for t in kernel.registers}, key=lambda t: (t[0] == "g", len(t), t))
    lines = [[kernel.kernel, *(kernel.registers.get(target, "") for target in targets)] for kernel in kernels]
    return tabulate(lines, ["kernel", *targets], tablefmt="github")


def _spills(kernels: Sequence[Registers]) -> str:
    spilling = [f"{k.kernel} ({target}: {n} bytes)" for k in kernels for target, n in k.spill_bytes.items() if n]
    binaries = sum(len(kernel.registers) for kernel in kernels)
    return f"Of these {binaries} binaries, " + (f"these spill: {'; '.join(spilling)}." if spilling else "none spills.")


def sentence(versions: dict[str, str]) -> str:
    """What the table of counts is and is not."""
    return (
        f"COUNTS of compiled code that an executor ran on a CPU, NOT times: PTX for sm_{cuda_emulator.ARCHITECTURE} "
        f"from Triton {versions['triton']} and nvcc {versions['nvcc']}. An instruction is one lane of one warp "
        "instruction, masked or not; reads and writes are all global memory traffic, in sizes of the logits (N·C)."
    )


def document(content: dict[str, Any]) -> str:
    """counts.md from what counts.json holds."""
    kernels = [Registers(**item) for item in content["registers"]]
    triton, cuda = ([k for k in kernels if k.backend == name] for name in ("triton", "cuda"))
    return f"""# Counts of the GPU kernels

Made by `python -m benchmarks.counts`; counts.json beside this file holds the same.

{sentence(content["versions"])}
Few rows of more classes than a block keeps take a cluster of blocks on sm_90 and newer, which the executor does not
have: the CUDA backend's row of 131072 classes is counted as on older GPUs, which read it twice. Of an image the 21
logits of a position are read with a label of 8 bytes: 0.10 of their size in fp32, 0.19 in bf16, which also writes 16
bytes a position, from which the gradient is made again should it be multiplied by anything but 1.

{table([Count(**item) for item in content["counts"]])}

## Registers

Facts of the compiled binaries, not times: registers a lane. {_spills(kernels)}

Triton (`python -m benchmarks.resources` has more: widths of accesses, every variant):

{_registers_table(triton)}

CUDA C++ (those of clusters are empty where there are none):

{_registers_table(cuda)}
"""


def read(file: Path = FILE) -> dict[str, Any]:
    """What the command wrote: "versions", "counts" and "registers", the latter two lists of fields."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def make() -> dict[str, Any]:
    """Count and compile everything; some minutes.

    Raises:
        MissingError: something for it is not installed.
    """
    reason = cuda_emulator.missing()
    if reason is not None:
        raise MissingError(reason)
    found = []
    for case in CASES:
        for backend, installed in BACKENDS.items():
            with installed() as launches:
                found += [count(backend, *case, gradient, launches) for gradient in (True, False)]
    for images in IMAGES:
        for backend, installed in BACKENDS.items():
            with installed() as launches:
                found += [count_images(backend, *images, gradient, launches) for gradient in (True, False)]
    return {
        "versions": versions(),
        "counts": [asdict(item) for item in found],
        "registers": [asdict(item) for item in registers()],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="the JSON; the table lies beside it")
    arguments = parser.parse_args(argv)
    try:
        content = make()
    except MissingError as error:
        print(f"counts: {error}", file=sys.stderr)
        return 2
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(document(content), encoding="utf-8")
    print(f"Written: {arguments.out} and {arguments.out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
