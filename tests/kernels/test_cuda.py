"""The CUDA C++ kernels without a GPU: what nvcc made of them, and the shared tests under an executor of their PTX.

Nothing here has run on a GPU; test_gpu.py is for when there is one. What the executor cannot run is a cluster of more
than one block (sm_90 and newer): that its blocks see each other's totals, in Cluster::join of csrc/cuda/rows.cuh.
As a cluster of one those kernels do run here; merge_totals and take_share they have in common with split rows.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cuda_emulator
from benchmarks.cuda_resources import cuda_binaries, cuobjdump
from dal_kernels import available_backends, dynamics_aware_loss, node, ops
from dal_kernels.fields import Reduction
from dal_kernels.functional import loss_of
from dal_kernels.objectives import dynamics_aware
from dal_kernels.pace import pace_numbers
from support.axes import bootstraps
from support.children import SHARED, run_pytest
from support.counting import hold_step
from support.marks import needs_emulator
from support.truth import check, make_case, random_upstream, run

built = pytest.mark.skipif(ops.cuda_error is not None, reason=f"the CUDA extension is not built: {ops.cuda_error}")


pytestmark = pytest.mark.usefixtures("ptx")


# ---- what is built


@built
@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump, which CUDA and Triton carry")
def test_no_kernel_spills_on_any_target() -> None:
    """Of every binary in the extension: no stack, which is where spills go, and no local memory."""
    binaries = cuda_binaries()
    assert [binary for binary in binaries if binary.stack_bytes or binary.local_bytes] == []
    assert binaries
    kernels = Counter(binary.target for binary in binaries)
    assert len(set(kernels.values())) == 1, "a target lacks a kernel"


@built
def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert available_backends()["cuda"].startswith("not available: the CUDA C++ kernels are built")
    with pytest.raises(RuntimeError, match="'cuda' is not available"):
        dynamics_aware_loss(torch.randn(3, 4), torch.arange(3), 0.7, backend="cuda")


@needs_emulator
def test_a_gradient_is_not_read_by_the_way_of_constant_memory() -> None:
    """It may take the place of its logits; such a load of memory that the kernel writes is undefined."""
    texts = [file.read_text() for file in Path(os.environ["DAL_TEST_PTX"]).glob("*.ptx")]
    kernels = {kernel.partition("(")[0]: kernel for text in texts for kernel in text.split(".entry ")[1:]}
    loads = {name: "ld.global.nc" in kernel for name, kernel in kernels.items()}
    assert loads["dal_block128w_f32"]  # of logits that stay
    over_logits = {f"dal_gradient{kind}_{dtype}" for kind in ("", "_wide") for dtype in ("f32", "f64", "f16", "bf16")}
    assert {name for name in over_logits if loads[name]} == set()


# ---- the shared tests


@needs_emulator
@pytest.mark.parametrize(("order", "sample"), [("asc", 54), ("desc", 55)])
def test_the_compiled_code_passes_the_shared_tests(order: str, sample: int) -> None:
    """With checks for races, accesses out of bounds and misaligned ones, in both orders of warps."""
    variables = {"DAL_TEST_CUDA": order, "DAL_TEST_SAMPLE": os.environ.get("DAL_TEST_SAMPLE", str(sample))}
    result = run_pytest("-q", "--show-capture=no", *SHARED, **variables)
    assert result.returncode == 0, result.stdout[-5000:]
    assert re.search(r"\d\d passed", result.stdout)
    assert " skipped" not in result.stdout


# Sizes at the edges of the plan, with the kernel that they must take.
LAYOUTS = {
    (200, 1): "short4",
    (200, 5): "short8",
    (200, 12): "lanes16w",
    (200, 13): "short16",
    (200, 9): "short10",
    (130, 32): "lanes32w",
    (130, 33): "lanes64",
    (33, 64): "lanes64w",
    (9, 2048): "lanes64w",
    (9, 2045): "lanes64",
    (9, 2046): "block128",
    (5, 2052): "block128w",
    (3, 20_001): "block128",
    (2, 32_768): "block128w",
    (2, 32_769): "long_rows",
}


@needs_emulator
@bootstraps
@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_every_layout_matches_truth(shape: tuple[int, int], bootstrap: str) -> None:
    case = make_case(*shape, bootstrap=bootstrap)
    case.target[2::7] = -100
    case.options["weight"] = torch.linspace(0.5, 2.0, shape[1])
    with cuda_emulator.installed() as launches:
        check(case, torch.tensor(2.0, dtype=torch.float64), "cuda")
    assert [launch.name for launch in launches] == [f"dal_{LAYOUTS[shape]}_f32", "dal_scale_f32"]


@needs_emulator
@pytest.mark.skipif(node.short_way is None, reason=f"no autograd node: {node.error}")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(9, 7), *LAYOUTS], ids=str)
def test_the_pace_follows_in_the_launch_of_a_loss_that_reduces(shape: tuple[int, int], reduction: Reduction) -> None:
    case = make_case(*shape)
    numbers = pace_numbers(torch.device("cpu")).all
    with cuda_emulator.installed() as launches:
        loss_of(
            dynamics_aware.id, (0.7, 0.2), case.logits.requires_grad_(), case.target, reduction=reduction,
            return_stats=True, backend="cuda", hearer=(numbers, 1, 1.5, 1.0),
        )  # fmt: skip
    names = [launch.name for launch in launches]
    assert names[1:] == (["dal_follow_f32"] if reduction == "none" else [])
    assert numbers[2] > 1e-4


@needs_emulator
@pytest.mark.parametrize("shape", [(200, 10), (130, 32), (5, 2052), (2, 32_769)], ids=str)
def test_the_ticket_is_left_at_zero(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the next launch of a stream counts from what this one leaves."""
    from gpuless import ptx

    launch, left = ptx.launch, []

    def watched(*arguments: Any, buffers: list[Any], **options: Any) -> Any:
        stats = launch(*arguments, buffers=buffers, **options)
        left.append(buffers[-1][:4].tolist())  # of the workspace, in front
        return stats

    monkeypatch.setattr(ptx, "launch", watched)
    logits, target = torch.randn(shape), torch.zeros(shape[0], dtype=torch.long)
    with cuda_emulator.installed():
        ops.KERNELS["cuda"].loss(logits, target, torch.tensor([0.7, 0.5]), None, 0, -100, 1, False)
    assert left == [[0, 0, 0, 0]]


@needs_emulator
@bootstraps
@pytest.mark.parametrize(("classes", "dtype"), [(2052, "f32"), (20_001, "f32"), (32_768, "bf16"), (2049, "f16")])
def test_a_cluster_of_one_block_matches_truth(classes: int, dtype: str, bootstrap: str) -> None:
    case = make_case(3, classes, {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype])
    case.options["bootstrap"] = bootstrap
    case.target[2] = -100
    with cuda_emulator.installed(instead=("block128", "cluster128")) as launches:
        check(case, torch.ones((), dtype=torch.float64), "cuda")
    assert launches[0].name in (f"dal_cluster128_{dtype}", f"dal_cluster128w_{dtype}")


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("offset", "apart"), [(0, 0), (1, 0), (0, 3), (5, 1)])
@pytest.mark.parametrize("classes", [11, 40, 333, 2500])
def test_any_alignment_of_rows(classes: int, offset: int, apart: int, dtype: torch.dtype) -> None:
    """Rows that begin anywhere and lie ``apart`` elements from each other give what packed ones do, up to rounding."""
    wide = make_case(6, classes + apart, dtype).logits
    logits = torch.empty(wide.numel() + offset, dtype=dtype)[offset:].view_as(wide).copy_(wide)[:, :classes]
    target = torch.randint(classes, (6,))
    results = []
    with cuda_emulator.installed():
        for layout in (logits, logits.contiguous()):
            for gradient in (True, False):
                leaf = layout.detach().requires_grad_(gradient)
                loss = dynamics_aware_loss(leaf, target, 0.7, 0.5, reduction="sum", backend="cuda")
                results.append((loss.detach(), *(torch.autograd.grad(loss, leaf) if gradient else ())))
    rtol = 4 * torch.finfo(dtype).eps
    for other in results[1:]:
        torch.testing.assert_close(results[0][: len(other)], other, rtol=rtol, atol=rtol / 100)


@needs_emulator
@pytest.mark.sampled(3)
@bootstraps
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_few_long_rows_are_shared(dtype: torch.dtype, bootstrap: str, reduction: str) -> None:
    """More than a cluster keeps: statistics by several blocks a row, the gradient in the backward."""
    case = make_case(3, 270_000, dtype, bootstrap=bootstrap, reduction=reduction)
    case.target[1] = -100
    with cuda_emulator.installed() as launches:
        check(case, random_upstream(case), "cuda")
    assert [launch.name.rsplit("_", 1)[0] for launch in launches] == ["dal_split_rows", "dal_gradient"]


@needs_emulator
@pytest.mark.parametrize("shape", [(300, 10), (70, 33), (300, 100), (5, 3000), (3, 40_000)], ids=str)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_repeated_steps_give_the_same_bits(shape: tuple[int, int], with_gradient: bool) -> None:
    logits, target = torch.randn(shape), torch.randint(shape[1], shape[:1])
    results = []
    for order in ("asc", "desc", "random"):
        with cuda_emulator.installed(order, order):
            leaf = logits.clone().requires_grad_(with_gradient)
            loss = dynamics_aware_loss(leaf, target, 1.2, 0.4, backend="cuda")
            results.append((loss.detach(), *(torch.autograd.grad(loss, leaf) if with_gradient else ())))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_emulator
def test_labels_that_are_none_are_nan_and_touch_nothing() -> None:
    """Straight into the operator, as labels on a GPU are that nobody looked at."""
    for classes in (10, 100, 3000, 40_000):
        target = torch.tensor([3, classes, -7, 2**62, 1])
        logits = torch.randn(5, classes)
        knobs = torch.tensor([0.7, 0.5])
        with cuda_emulator.installed():
            loss, gradient, _ = ops.KERNELS["cuda"].loss(logits, target, knobs, torch.rand(classes), 0, -100, 2, True)
            losses, *_ = ops.KERNELS["cuda"].loss(logits, target, knobs, None, 0, -100, 0, False)
        bad = torch.tensor([False, True, True, True, False])
        assert loss.isnan()
        assert torch.equal(losses.isnan(), bad)
        assert gradient[bad].isnan().all()
        assert gradient[~bad].isfinite().all()


@built
@pytest.mark.parametrize(
    ("classes", "capability", "kernel", "blocks"),
    [
        (32_776, 90, "cluster128w", 4),
        (131_072, 90, "cluster128w", 8),
        (131_065, 100, "cluster128", 8),
        (262_144, 120, "cluster128w", 16),
        (262_152, 90, "long_rows", 2),
        (131_072, 89, "long_rows", 2),
    ],
)
def test_rows_of_32_k_to_262_k_classes_take_a_cluster_where_there_are_any(
    classes: int, capability: int, kernel: str, blocks: int
) -> None:
    """Of the plan only: nothing is run."""
    from dal_kernels import _cuda

    launches: list[tuple[object, ...]] = []
    _cuda.emulate(lambda *launch: launches.append(launch[:3]), capability)
    try:
        logits, knobs = torch.zeros(2, classes, dtype=torch.bfloat16), torch.tensor([0.5, 0.5])
        ops.KERNELS["cuda"].loss(logits, torch.zeros(2, dtype=torch.long), knobs, None, 0, -100, 1, True)
    finally:
        _cuda.emulate(None)
    threads = 512 if kernel == "long_rows" else 160 if classes == 32_776 else 256
    assert launches == [(f"dal_{kernel}_bf16", (blocks, 1), threads)]


@needs_emulator
def test_an_error_of_the_emulator_reaches_the_caller() -> None:
    from dal_kernels import _cuda

    def fail(*_: object) -> None:
        raise ValueError("no such kernel")

    _cuda.emulate(fail)
    try:
        with pytest.raises(RuntimeError, match=r"ValueError\('no such kernel'\)"):
            dynamics_aware_loss(torch.randn(3, 4), torch.arange(3), 0.7, backend="cuda")
    finally:
        _cuda.emulate(None)


# ---- counts

COUNTS = {
    (128, 10, torch.float32): (48, None, None),
    (128, 100, torch.float32): (24, 1.2, 1.06),
    (64, 1000, torch.float32): (18, 1.05, 1.01),
    (64, 1000, torch.bfloat16): (19.2, 1.05, 1.01),
    (8, 32000, torch.float32): (15.7, 1.05, 1.01),
    (8, 32000, torch.bfloat16): (16.5, 1.05, 1.01),
    # Without clusters, which the executor does not have, a row so long is read twice.
    (4, 131072, torch.bfloat16): (34, 2.05, 1.01),
}


@needs_emulator
@pytest.mark.parametrize("case", COUNTS, ids=lambda case: f"{case[0]}x{case[1]} {case[2]}")
def test_a_step_executes_no_more_than_this(case: tuple[int, int, torch.dtype]) -> None:
    with cuda_emulator.installed() as launches:
        hold_step("cuda", case, COUNTS[case], launches, (2, 1))


@needs_emulator
def test_statistics_come_from_the_same_launch() -> None:
    case = make_case(40, 333)
    with cuda_emulator.installed() as launches:
        run(case, torch.ones(()), "cuda")
    assert len(launches) == 2
