"""What a training step of the loss costs the host: forward and backward, beside F.cross_entropy's in the same run.

    python -m benchmarks.host_time                       CPU tensors, and CUDA tensors where there is a device
    python -m benchmarks.host_time --sizes 64x14 --devices cuda --rounds 101

On CUDA tensors it is the time until the step is on its way, which no kernel is in; the device is waited for between the
rounds alone. At classifier sizes a GPU takes less than that, and a step is as fast as its host.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import machine
from benchmarks.turns import in_turns
from dal_kernels import DynamicsAwareLoss, available_backends, dynamics_aware_loss

Loss = Callable[[Tensor, Tensor], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = 10  # in a round of one contender: more than a clock's grain, less than a change of the machine's speed

# Fused cross-entropies of others, for CUDA tensors: where to find them if they are installed.
OTHERS = {
    "Liger's cross-entropy": ("liger_kernel.transformers.cross_entropy", "LigerCrossEntropyLoss"),
    "flash-attention's cross-entropy": ("flash_attn.losses.cross_entropy", "CrossEntropyLoss"),
}


def contenders(device: str) -> dict[str, Loss]:
    """By what each is; the first is what the others are measured in."""
    ours: dict[str, Loss] = {
        "F.cross_entropy": F.cross_entropy,
        "nn.CrossEntropyLoss": torch.nn.CrossEntropyLoss(),
        "sum of the logits (autograd alone)": lambda logits, target: logits.sum(),
    }
    names = ("auto", *(name for name in ("cuda", "triton") if device == "cuda"))
    for name in (name for name in names if name == "auto" or available_backends()[name].startswith("available")):
        fixed = DynamicsAwareLoss(total_steps=10**6, pace="fixed", backend=name, watch=False)  # type: ignore[arg-type]
        paced = DynamicsAwareLoss(total_steps=10**6, backend=name, watch=False)  # type: ignore[arg-type]
        ours |= {
            f"dynamics_aware_loss, q a number, {name}": lambda logits, target, name=name: dynamics_aware_loss(  # type: ignore[misc]
                logits, target, 0.7, backend=name
            ),
            f"DynamicsAwareLoss, pace fixed, {name}": fixed,
            f"DynamicsAwareLoss, pace auto, {name}": paced,
        }
    for label, (module, attribute) in OTHERS.items() if device == "cuda" else ():
        try:
            ours[label] = getattr(import_module(module), attribute)()
        except ImportError:
            continue
    return ours


def measure(losses: dict[str, Loss], logits: Tensor, target: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each, in turns: one figure a round."""

    def step(loss: Loss) -> None:
        logits.grad = None
        loss(logits, target).backward()

    def wait() -> None:
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)

    times = in_turns([partial(step, loss) for loss in losses.values()], rounds + 1, STEPS, wait)
    # The first round compiles and warms up.
    return {label: of[1:] for label, of in zip(losses, times, strict=True)}


def rows_of(times: dict[str, list[float]]) -> list[tuple[str, str, str]]:
    """Label, median in microseconds, and median over the rounds of the ratio to the first contender's."""
    first, *_ = times.values()
    return [
        (label, f"{1e6 * statistics.median(of):.1f}", f"{statistics.median(map(float.__truediv__, of, first)):.2f}")
        for label, of in times.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.host_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    parser.add_argument("--sizes", nargs="+", default=["64x14", "256x1000"], metavar="NxC")
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=DTYPES)
    parser.add_argument("--devices", nargs="+", default=here, choices=here)
    parser.add_argument("--rounds", type=int, default=101)
    given = parser.parse_args(argv)
    for device in given.devices:
        losses = contenders(device)
        for size in given.sizes:
            rows, classes = map(int, size.split("x"))
            for dtype in given.dtypes:
                logits = torch.randn(rows, classes, dtype=DTYPES[dtype], device=device, requires_grad=True)
                target = torch.randint(classes, (rows,), device=device)
                times = measure(losses, logits, target, given.rounds)
                print(f"\nhost time of a step, {size} {dtype} on {device}; {machine()}\n")
                print(tabulate(rows_of(times), ("", "µs", "× F.cross_entropy"), tablefmt="pipe", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
