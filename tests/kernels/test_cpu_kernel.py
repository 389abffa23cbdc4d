"""What only the compiled CPU kernel promises: the same bits always, little memory, every instruction set."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dal_kernels import RowStats, available_backends, dynamics_aware_loss
from dal_kernels.ops import KERNELS
from support.axes import DTYPES, bootstraps, dtypes, halves
from support.capabilities import CAPABILITIES, available_capabilities
from support.children import printed_by, run_pytest
from support.truth import Case, make_case

# Few long rows (threads share a row), many short ones (groups of rows), blocks of 4096 with and without a rest.
SHAPES = [(1, 1), (3, 300_000), (2, 8192), (5, 4097), (40, 4099), (300, 1000), (4000, 14), (64, 257)]


def everything(case: Case, reduction: str, bootstrap: str) -> tuple[Tensor, ...]:
    leaf = case.logits.detach().clone().requires_grad_()
    loss, stats = dynamics_aware_loss(
        leaf, case.target, 1.2, 0.5, reduction=reduction, bootstrap=bootstrap, return_stats=True, backend="cpu"
    )
    loss.sum().backward()
    assert isinstance(stats, RowStats)
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, *stats


def assert_same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@dtypes
def test_bits_do_not_depend_on_the_run_or_the_number_of_threads(
    fused: str, threads: None, shape: tuple[int, int], reduction: str, dtype: torch.dtype
) -> None:
    case = make_case(*shape, dtype)
    torch.set_num_threads(1)
    expected = everything(case, reduction, "soft")
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        # From a new thread, because one that has waited in vain for others goes on without them.
        with ThreadPoolExecutor(1) as caller:
            assert_same_bits(caller.submit(everything, case, reduction, "soft").result(), expected)


@bootstraps
def test_concurrent_calls_give_the_same_bits(fused: str, bootstrap: str) -> None:
    cases = [make_case(*shape, dtype, seed=seed) for seed in range(2) for shape in SHAPES[1:] for dtype in DTYPES[:3]]
    expected = [everything(case, "mean", bootstrap) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            for got, true in zip(
                pool.map(lambda case: everything(case, "mean", bootstrap), cases), expected, strict=True
            ):
                assert_same_bits(got, true)


# Logits whose gradient is all the memory that a step may take.
LARGE = [(8192, 1000), (256, 50000), (2, 4_000_000), (2, 512, 128, 128)]


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    """Peak resident memory of a step above that before it, over the size of the logits, in a process of its own.

    Keys are words: shape, dtype, reduction, and "step" or "forward".
    """
    program = f"""
import json
import torch
from benchmarks.machine import peak_memory
from benchmarks.micro.instruments import return_memory
from dal_kernels import dynamics_aware_loss

def peak(shape, dtype, reduction, part):
    leaf = torch.randn(shape).to(getattr(torch, dtype)).requires_grad_(part == "step")
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    before = peak_memory(reset=True)
    loss = dynamics_aware_loss(leaf, target, 0.7, 0.5, reduction=reduction, backend="cpu")
    if part == "step":
        loss.sum().backward()
    return (peak_memory() - before) / (leaf.numel() * leaf.element_size())

return_memory()
shapes = {[(64, 4096), *LARGE]}  # the first wakes the threads and maps the code
print(json.dumps({{
    f"{{shape}} {{dtype}} {{reduction}} {{part}}": peak(shape, dtype, reduction, part)
    for shape in shapes
    for dtype in ("float32", "bfloat16", "float16")
    for reduction in ("mean", "none")
    for part in ("step", "forward")
}}))
"""
    found: dict[str, float] = json.loads(printed_by("-c", program))
    return found


@pytest.mark.xdist_group("peaks")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_needs_the_gradient_and_nothing_else(
    fused: str, peaks: dict[str, float], reduction: str, shape: tuple[int, ...], dtype: str
) -> None:
    case = f"{shape} {dtype} {reduction}"
    assert 0.9 <= peaks[f"{case} step"] <= 1.1, "the gradient was not seen, or more than it"
    assert peaks[f"{case} forward"] <= 0.05


@pytest.mark.parametrize(
    ("torch_capability", "own", "expected"),
    [
        ("AVX512", "using x86-64-v4, AVX512-BF16 instructions", ["default", "avx2", "avx512"]),
        ("AVX2", "using x86-64-v3 instructions", ["default", "avx2"]),
        ("AVX2", "using baseline instructions", ["default"]),
        ("AVX2", "using x86-64-v4 instructions", ["default", "avx2"]),
        ("DEFAULT", "using baseline instructions", ["default"]),
        ("SVE256", "using baseline instructions", ["default"]),
    ],
)
def test_no_instruction_set_above_the_machine_is_asked_of_torch(
    torch_capability: str, own: str, expected: list[str]
) -> None:
    assert available_capabilities(torch_capability, own) == expected


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_passes_the_numerical_tests(fused: str, capability: str) -> None:
    """ATEN_CPU_CAPABILITY caps our kernels as it sets torch's.

    On a machine with AVX-512, the whole suite under ATEN_CPU_CAPABILITY=avx2 is that of a machine without.
    """
    highest = torch.backends.cpu.get_cpu_capability()
    *below, own = available_capabilities(highest, available_backends()["cpu"])
    if capability not in below:
        pytest.skip("all tests here run with it" if capability == own else f"this machine has {highest} at most")
    selected = "test_matches_truth or poisoned or masked or extreme or ties or any_strides"
    result = run_pytest("tests/kernels/test_numerics.py", "-k", f"cpu and ({selected})", ATEN_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"using {CAPABILITIES[capability]} instructions" in result.stdout
    assert " passed" in result.stdout


def test_forward_without_gradient_allocates_none(fused: str) -> None:
    case = make_case(32, 100)
    arguments = (case.logits, case.target, torch.tensor([0.7, 0.5]), None, 0, -100, 1)
    _, gradient = KERNELS[fused].loss(*arguments, False)
    assert gradient.numel() == 0
    _, gradient = KERNELS[fused].loss(*arguments, True)
    assert gradient.shape == (32, 100)


@halves
def test_every_half_value_is_read_and_written_exactly(fused: str, dtype: torch.dtype) -> None:
    """All 65536 bit patterns as logits of two-class rows whose gradient is known from float32."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    logits = torch.stack([values, torch.zeros_like(values)], dim=1)
    target = torch.ones(len(values), dtype=torch.long)
    results = []
    for z in (logits, logits.float()):
        leaf = z.clone().requires_grad_()
        loss = dynamics_aware_loss(leaf, target, 0.7, 0.3, reduction="none", backend=fused)
        loss.sum().backward()
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0].nan_to_num(-1.0), results[1][0].nan_to_num(-1.0))
    got, expected = results[0][1], results[1][1].to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    if dtype == torch.bfloat16:  # AVX512-BF16 rounds what is below 2^-126 to 0
        expected = torch.where((got == 0) & (expected.abs() < torch.finfo(torch.float32).tiny), got, expected)
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
