"""Triton's kernels without a GPU: the shared tests under an interpreter and under an executor of the compiled code.

Each way runs in its own process, on a sample of the tests that is the same each time (DAL_TEST_SAMPLE=1 in the
environment takes them all: hours). Nothing here has run on a GPU; test_gpu.py is for when there is one.
"""

from __future__ import annotations

import os
import re
from types import ModuleType

import pytest
import torch

from dal_kernels import dynamics_aware_loss
from dal_kernels.backends.triton.plan import LaunchPlan, plan_backward, plan_forward
from support.axes import bootstraps
from support.children import SHARED, run_pytest
from support.counting import hold_step
from support.marks import needs_executor
from support.truth import check, gradient_bound, make_case, relative_error, true_outcome

# And those of the layer forms, which the CUDA C++ kernels have no other part in.
LAYER = ("tests/layer/test_linear.py", "tests/layer/test_linear_graph.py", "tests/kernels/test_slices.py")


def run_sample(mode: str, sample: int, *selection: str) -> None:
    variables = {
        "DAL_TEST_TRITON": mode,
        "DAL_TEST_SAMPLE": os.environ.get("DAL_TEST_SAMPLE", str(sample)),
    }
    if mode == "interpreter":
        variables["TRITON_INTERPRET"] = "1"
    result = run_pytest("-q", "--show-capture=no", *selection, **variables)
    assert result.returncode == 0, result.stdout[-5000:]
    assert re.search(r"\d\d passed", result.stdout)
    assert " skipped" not in result.stdout


@needs_executor
@pytest.mark.parametrize(("order", "sample"), [("asc", 54), ("desc", 55)])
def test_the_compiled_code_passes_the_shared_tests(order: str, sample: int) -> None:
    """With checks for races, accesses out of bounds and misaligned ones, in both orders of warps."""
    run_sample(f"executor {order}", sample, *SHARED, *LAYER)


@needs_executor
def test_the_interpreter_passes_the_shared_tests() -> None:
    # It multiplies and adds with two roundings where a GPU fuses: not for logits of hundreds.
    selection = "not extreme and not scale_of_the_logits and not 33000 and not 9000"
    run_sample("interpreter", 36, "tests/kernels/test_numerics.py", "tests/graph/test_autograd.py", "-k", selection)


@pytest.fixture
def gpuless() -> ModuleType:
    return pytest.importorskip("gpuless")


COUNTS = {
    (128, 10, torch.float32): (65, None, None),
    (128, 100, torch.float32): (40, 1.2, 1.06),
    (64, 1000, torch.float32): (19, 1.05, 1.01),
    (64, 1000, torch.bfloat16): (20, 1.12, 1.06),
    (8, 16000, torch.bfloat16): (22, 1.05, 1.01),
    (8, 32000, torch.bfloat16): (17, 1.05, 1.01),
    (8, 32000, torch.float32): (17, 1.05, 1.01),
    # Longer rows are read twice. The count varies by how often the maximum grows.
    (4, 131072, torch.bfloat16): (26, 2.05, 1.01),
}


def test_products_and_sums_are_fused_whatever_triton_does_by_default() -> None:
    pytest.importorskip("triton")
    from dal_kernels.backends.triton import record

    options: list[dict[str, object]] = []
    record.start({(1,): lambda *arguments, **given: options.append(given)}, (1,))(0, num_warps=1)
    assert options == [{"num_warps": 1, "enable_fp_fusion": True}]


@needs_executor
@pytest.mark.parametrize("case", COUNTS, ids=lambda case: f"{case[0]}x{case[1]} {case[2]}")
def test_a_step_executes_no_more_than_this(gpuless: ModuleType, case: tuple[int, int, torch.dtype]) -> None:
    with gpuless.install(90) as recorder:
        # The programs that share a row leave their sums to a launch of its own.
        hold_step("triton", case, COUNTS[case], recorder, (3, 2) if case[1] == 131072 else (2, 1))
    assert sum(launch.spill_bytes for launch in recorder) == 0


@needs_executor
@pytest.mark.sampled(3)
@bootstraps
@pytest.mark.parametrize("bootstrap_weight", [0.0, 0.5])
def test_many_long_rows_take_a_program_each(gpuless: ModuleType, bootstrap: str, bootstrap_weight: float) -> None:
    case = make_case(260, 33_000, bootstrap=bootstrap)
    case.bootstrap_weight = bootstrap_weight
    case.target[7] = -100
    with gpuless.install(90) as recorder:
        check(case, torch.tensor(2.0, dtype=torch.float64), "triton")
        assert [launch.name for launch in recorder] == ["loss_long_rows", "gradient_rows"]


@needs_executor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@bootstraps
@pytest.mark.parametrize("classes", [16_385, 32_768])
def test_a_row_in_tiles_is_read_once(gpuless: ModuleType, classes: int, bootstrap: str, dtype: torch.dtype) -> None:
    """As it is trained with: the shared tests ask for statistics too, which is another variant."""
    case = make_case(3, classes, dtype, bootstrap=bootstrap)
    case.logits[0, ::3] = -torch.inf
    case.logits[0, case.target[0]] = 1.0
    case.target[1] = -100
    upstream = torch.ones((), dtype=torch.float64)
    leaf = case.logits.clone().requires_grad_()
    with gpuless.install(90) as recorder:
        loss = dynamics_aware_loss(
            leaf, case.target, case.q, case.bootstrap_weight, backend="triton", **case.options
        )  # fmt: skip
        assert [launch.name for launch in recorder] == ["loss_rows"]
        moved = gpuless.traffic(recorder, leaf.numel(), leaf.element_size())
        loss.backward()
    assert moved.reads < 1.01
    assert moved.writes < 1.01
    assert leaf.grad is not None
    truth = true_outcome(case, upstream).gradient
    assert relative_error(leaf.grad, truth) <= gradient_bound(truth, dtype)


@needs_executor
@pytest.mark.parametrize("classes", [1000, 20_011])
def test_the_first_nan_is_the_prediction(gpuless: ModuleType, classes: int) -> None:
    logits = torch.randn(4, classes)
    logits[0, [70, 900]] = torch.nan
    logits[1, [17, 999]] = torch.nan
    logits[1, 5] = torch.inf
    logits[2] = torch.nan
    logits[3, [classes - 1, classes // 2]] = 50.0
    with gpuless.install(90):
        _, stats = dynamics_aware_loss(logits, torch.zeros(4).long(), 1.2, backend="triton", return_stats=True)
    assert stats.prediction.tolist() == logits.argmax(dim=1).tolist() == [70, 17, 0, classes // 2]


@needs_executor
@pytest.mark.parametrize("shape", [(70, 33), (5, 3000), (3, 20_000), (3, 40_000)], ids=str)
def test_repeated_steps_give_the_same_bits(gpuless: ModuleType, shape: tuple[int, int]) -> None:
    logits, target = torch.randn(shape), torch.randint(shape[1], shape[:1])
    results = []
    for order in ("asc", "desc", "random"):
        with gpuless.install(90, warp_order=order, cta_order=order):
            leaf = logits.clone().requires_grad_()
            loss = dynamics_aware_loss(leaf, target, 1.2, 0.4, backend="triton")
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize(
    "classes", [1, 2, 10, 16, 17, 256, 257, 1024, 1025, 8192, 8193, 16384, 16385, 32768, 32769, 10**6]
)
def test_plans_are_sound_at_their_edges(classes: int, itemsize: int, warp_size: int) -> None:
    for plan in (plan_forward(100, classes, itemsize, warp_size), plan_backward(100, classes, itemsize, warp_size)):
        assert plan.block & (plan.block - 1) == 0
        assert plan.rows & (plan.rows - 1) == 0
        assert 1 <= plan.warps * warp_size <= 1024
        assert plan.warps & (plan.warps - 1) == 0
    forward = plan_forward(100, classes, itemsize, warp_size)
    assert forward.long or forward.block * forward.tiles >= classes > forward.block * (forward.tiles - 1)
    assert forward.tiles == 1 or (forward.rows == 1 and not forward.long and not forward.lanes)
    assert forward.rows == 1 or not forward.long
    assert forward.splits == 1 or forward.splits * forward.block <= classes
    # What a lane must hold, in 255 registers: exponents of its share of the tiles, and of one or all exponentials.
    values = forward.block * forward.rows / (forward.warps * warp_size)
    assert forward.long or forward.tiles * values * max(1, itemsize // 4) * (1 + forward.kept / 4) <= 160


def test_the_plan_of_few_classes_gives_each_lane_a_row() -> None:
    assert plan_forward(4096, 10, 4) == LaunchPlan(block=16, rows=32, warps=1, lanes=True)
    assert plan_forward(4096, 1000, 4) == LaunchPlan(block=128, rows=1, warps=1, tiles=8)


def test_a_row_of_32_k_classes_stays_in_registers_unless_float64() -> None:
    assert plan_forward(8, 32_768, 2) == LaunchPlan(block=2048, rows=1, warps=8, tiles=16, kept=False)
    assert plan_forward(8, 17_000, 4) == LaunchPlan(block=2048, rows=1, warps=8, tiles=9, kept=False)
    assert plan_forward(8, 32_769, 2).long
    assert plan_forward(8, 8193, 8).long


def test_few_long_rows_are_shared_and_many_are_not() -> None:
    assert plan_forward(8, 10**6, 2) == LaunchPlan(block=8192, rows=1, warps=8, long=True, splits=32)
    assert plan_forward(256, 10**6, 2).splits == 1
