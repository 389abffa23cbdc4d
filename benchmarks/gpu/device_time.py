"""The device's time of training steps, by replays of a CUDA graph.

    python -m benchmarks.gpu.device_time --out times.json cuda:8192x1000:fp32 triton:8x21x128x128:bf16 copy:64x10:fp32
    python -m benchmarks.gpu.device_time --set FILLED=512 --out times.json triton:64x131072:bf16

A case is a backend, the shape of the logits, and their dtype; the backend "copy" is logits.clone(). ``--set`` changes a
constant of the plans of Triton's kernels before anything is launched by them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.micro.cases import DTYPES
from benchmarks.micro.instruments import GRAPH_CALLS, capture, clock

__all__ = ["Case", "seconds_of"]

TURNS = 9


@dataclass(frozen=True)
class Case:
    """A step, forward and backward, of one backend on logits of one shape."""

    backend: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def parse(cls, text: str) -> Case:
        backend, shape, dtype = text.split(":")
        return cls(backend, tuple(int(size) for size in shape.split("x")), dtype)

    def __str__(self) -> str:
        return f"{self.backend}:{self.logits}:{self.dtype}"

    @property
    def logits(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def call(self) -> Callable[[], object]:
        from dal_kernels import dynamics_aware_loss

        torch.manual_seed(0)
        logits = torch.randn(self.shape, device="cuda").to(DTYPES[self.dtype])
        if self.backend == "copy":
            return logits.clone
        leaf = logits.requires_grad_()
        target = torch.randint(self.shape[1], (self.shape[0], *self.shape[2:]), device="cuda")
        knobs = [torch.tensor(value, device="cuda") for value in (1.2, 0.4)]
        loss = lambda: dynamics_aware_loss(leaf, target, *knobs, backend=self.backend)  # type: ignore[call-overload]  # noqa: E731
        return lambda: torch.autograd.grad(loss(), leaf)


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call on the device, the median of some replays; a device that tells no time gives 0."""
    replay, now = capture(call), clock("cuda", "graph")
    replay()
    times = []
    for _ in range(TURNS):
        start = now()
        replay()
        times.append((now() - start) / GRAPH_CALLS)  # type: ignore[operator]
    return statistics.median(times)


def set_constant(name: str, value: int) -> None:
    """Of dal_kernels.backends.triton.plan, there and wherever it has been imported to."""
    from dal_kernels.backends.triton import launch, plan

    assert launch  # which imports all that reads them
    if not hasattr(plan, name):
        raise SystemExit(f"dal_kernels.backends.triton.plan has no constant {name}")
    for module in [module for key, module in sys.modules.items() if key.startswith("dal_kernels.backends.triton")]:
        if hasattr(module, name):
            setattr(module, name, value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Case.parse, nargs="+")
    parser.add_argument("--set", dest="constant", metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path, required=True, help="JSON: seconds, or the error, by case")
    given = parser.parse_args(argv)
    if given.constant is not None:
        name, _, value = given.constant.partition("=")
        set_constant(name, int(value))
    found: dict[str, float | str] = {}
    for case in given.cases:
        try:
            found[str(case)] = seconds_of(case.call())
        except (
            RuntimeError
        ) as error:  # too little memory, a backend that is not there, a launch that the device refuses
            found[str(case)] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(case, found[str(case)], flush=True)
        given.out.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
