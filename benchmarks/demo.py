"""The main job of the project in one command (`make demo`): is it there, is it right, is it fast, does it help.

Arguments are those of `dal-train compare`: `make demo ARGS="--data fashion-mnist"`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from benchmarks import micro
from benchmarks.machine import machine
from dal_kernels import available_backends, dynamics_aware_loss, reference, training

SIZES = [micro.Size(*size) for size in ((64, 14), (256, 1000), (8192, 1000), (256, 50000))]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def worst_errors(dtype: torch.dtype) -> tuple[float, float]:
    """Largest relative error of the gradient against the reference in float64, over sizes and both bootstraps.

    And the largest that rounding the true gradients to ``dtype`` would cost.
    """
    ours, rounding = 0.0, 0.0
    for rows, classes in ((64, 10), (32, 1000), (4, 33000)):
        for bootstrap in ("soft", "hard"):
            logits = (3 * torch.randn(rows, classes)).to(dtype)
            target = torch.randint(classes, (rows,))
            fused, exact = logits.clone().requires_grad_(), logits.double().clone().requires_grad_()
            dynamics_aware_loss(fused, target, 1.2, 0.4, bootstrap=bootstrap).backward()
            reference.dynamics_aware_loss(exact, target, 1.2, 0.4, bootstrap=bootstrap).backward()
            assert fused.grad is not None
            truth = exact.grad
            assert truth is not None
            ours = max(ours, ((fused.grad.double() - truth).norm() / truth.norm()).item())
            rounding = max(rounding, ((truth.to(dtype).double() - truth).norm() / truth.norm()).item())
    return ours, rounding


def demonstrate(config: training.TrainingConfig) -> None:
    start = time.perf_counter()
    data = training.load_data(config.data, config.data_dir)  # missing files are said before anything takes time

    print("Backends")
    for name, reason in available_backends().items():
        print(f"  {name:<7} {reason}")

    print("\nGradient against the reference in float64: largest relative error over sizes and bootstraps")
    torch.manual_seed(0)
    for dtype in DTYPES:
        error, rounding = worst_errors(dtype)
        print(f"  {str(dtype).removeprefix('torch.'):<9} {error:.1e}, of which rounding the truth costs {rounding:.1e}")

    print(f"\nForward + backward, medians (20 to 80 %); {machine()}\n", flush=True)
    timings = micro.measure(SIZES, ["fp32"], ["-k", "warm and step and not compile"], memory=False)
    print(micro.ratios(timings, "warm", "step"))
    warning = micro.busy(timings)
    if warning:
        print(f"\n{warning}")

    print("\nTraining with wrong labels\n", flush=True)
    files, text = training.write_report(training.run_training(config, data))
    print(f"\n{text}")
    ratios = [timings.ratio(cell, micro.CROSS_ENTROPY).median for cell in timings.samples]
    speed = (
        "The timings say nothing, because the machine was busy"
        if warning
        else f"F.cross_entropy took {min(ratios):.1f} to {max(ratios):.1f} times as long as our loss, by the size"
    )
    print(
        f"Done in {time.perf_counter() - start:.0f} s. {speed}; what the losses did to training stands above.\n"
        f"Files: {', '.join(map(str, files))}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    # Two seeds, and one share of wrong labels, so that all of it takes two minutes; what comes later overrides. Other
    # data than the digits come with noise of their own.
    short = ["--seeds", "0", "1", *([] if given else ["--noise", "0.6"])]
    try:
        demonstrate(training.parse(["compare", *short, *given]))
    except (training.UsageError, micro.BenchmarkError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
