"""Logits (N, C, d1, ...) on a GPU, read and their gradient written where they lie: by executors of compiled code.

In this process, one after the other; test_layouts.py has every loss in every layout, of which a sample runs here too.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cuda_emulator
from benchmarks.counts import BACKENDS, count_images
from benchmarks.executor import load
from dal_kernels import dynamics_aware_loss, ops
from dal_kernels.layouts import MOST_APART_ON_GPU
from dal_kernels.pace import pace_numbers
from support.axes import bootstraps
from support.children import run_pytest
from support.marks import needs_emulator, needs_executor
from support.truth import gradient_bound, relative_error

pytestmark = pytest.mark.usefixtures("ptx")
AVAILABLE = [pytest.param("triton", marks=needs_executor), pytest.param("cuda", marks=needs_emulator)]


@pytest.fixture(params=AVAILABLE)
def gpu(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """A backend, and the launches that it has made."""
    with BACKENDS[request.param]() as launches:
        yield request.param, launches


@pytest.mark.parametrize("backend", AVAILABLE)
def test_the_compiled_code_passes_the_tests_of_layouts(backend: str) -> None:
    variables = {"triton": {"DAL_TEST_TRITON": "executor desc"}, "cuda": {"DAL_TEST_CUDA": "desc"}}[backend]
    variables["DAL_TEST_SAMPLE"] = os.environ.get("DAL_TEST_SAMPLE", "225")
    result = run_pytest("-q", "--show-capture=no", "tests/kernels/test_layouts.py", **variables)
    assert result.returncode == 0, result.stdout[-5000:]
    assert re.search(r"\d\d passed", result.stdout)


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = -100
    target.flatten()[:1] = 0
    return logits, target


def outcome(logits: Tensor, target: Tensor, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    result = dynamics_aware_loss(leaf, target, 1.2, 0.4, backend=backend, **options)  # type: ignore[call-overload]
    loss = result[0] if isinstance(result, tuple) else result
    upstream = torch.linspace(0.5, 2.0, max(1, loss.numel()), dtype=torch.float64).reshape(loss.shape).to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


def hold(logits: Tensor, target: Tensor, backend: str, **options: Any) -> Tensor:
    loss, gradient = outcome(logits, target, backend, **options)
    weight = options.get("weight")
    options["weight"] = None if weight is None else weight.double()
    true_loss, true_gradient = outcome(logits.double(), target, "eager", **options)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-5)
    assert relative_error(gradient, true_gradient) <= gradient_bound(true_gradient, logits.dtype)
    return gradient


# At the edges of both plans: classes of one lane, of two warps, of as many as there may be, and of more; programs whose
# rows are of several images, and of a part of one.
SHAPES = {
    (3, 9, 70): torch.bfloat16,
    (2, 22, 64): torch.bfloat16,
    (260, 4, 33): torch.float32,
    (1, 45, 31): torch.float32,
    (1, MOST_APART_ON_GPU, 34): torch.float32,
    (1, MOST_APART_ON_GPU + 1, 9): torch.float32,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_at_the_edges_of_the_plans(gpu: tuple[str, Any], shape: tuple[int, ...]) -> None:
    backend, launches = gpu
    logits, target = make(shape, SHAPES[shape])
    bootstrap = "hard" if shape[1] % 2 else "soft"
    gradient = hold(logits, target, backend, weight=torch.linspace(0.5, 2.0, shape[1]), bootstrap=bootstrap)
    apart = shape[1] <= MOST_APART_ON_GPU
    assert gradient.is_contiguous() == (apart)
    if apart and backend == "cuda":
        assert launches[0].name.startswith("dal_apart")
    assert all(getattr(launch, "spill_bytes", 0) == 0 for launch in launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 21, 32, 32), (3, 19, 9, 7)], ids=str)
def test_logits_are_read_once_and_the_gradient_is_written_once(
    gpu: tuple[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    backend, launches = gpu
    found = count_images(backend, shape, dtype, False, True, launches)
    of_position = 1 / (shape[1] * dtype.itemsize)
    assert 1 <= found.reads - 8 * of_position <= 1.05  # a label a position
    assert 1 <= found.writes - (16 * of_position if dtype == torch.bfloat16 else 0) <= 1.02  # or four fields
    assert len(found.kernels) == 2
    if backend == "triton":  # of which the executor knows buffers by their names
        moved = launches[0].stats.buffers
        size = found.rows * found.classes * dtype.itemsize
        assert (moved["logits_ptr"].bytes_loaded, moved["gradient_ptr"].bytes_stored) == (size, size)


@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_is_allocated_but_what_is_returned(gpu: tuple[str, Any], channels_last: bool) -> None:
    backend, _ = gpu
    logits = torch.randn(2, 21, 64, 64)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    target = torch.randint(21, (2, 64, 64))
    leaf = logits.requires_grad_()
    gc.collect()  # or gradients of earlier tests go in the midst of the call, and are taken off what it allocates
    with torch.profiler.profile(profile_memory=True) as profile:
        dynamics_aware_loss(leaf, target, 1.2, 0.4, backend=backend).backward()
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    (gradient,) = [size for size in sizes if size >= target.nbytes]
    assert logits.nbytes <= gradient <= 1.01 * logits.nbytes  # an operator in C++ also has what a few rows leave
    assert leaf.grad is not None
    assert leaf.grad.stride() == logits.stride()


@pytest.mark.parametrize("ignored", ["none", "some"])
def test_a_mean_over_weights_of_zero_is_nan_where_rows_count(gpu: tuple[str, Any], ignored: str) -> None:
    backend, _ = gpu
    logits, target = make((3, 5, 7))
    if ignored == "none":
        target[target == -100] = 0
    loss, gradient = outcome(logits, target, backend, weight=torch.zeros(5))
    assert loss.isnan()
    counted = (target != -100).unsqueeze(1).expand_as(gradient)
    assert torch.equal(gradient.isnan(), counted)


def test_anything_may_stand_in_an_ignored_row(gpu: tuple[str, Any]) -> None:
    backend, _ = gpu
    logits, target = make((2, 21, 50))
    poisoned = torch.where((target == -100).unsqueeze(1), torch.nan, logits)
    for options in ({"reduction": "mean"}, {"reduction": "none"}, {"return_stats": True}):
        pair = [outcome(each, target, backend, **options) for each in (logits, poisoned)]
        assert all(torch.equal(one, other) for one, other in zip(*pair, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@bootstraps
def test_a_gradient_that_is_made_in_the_backward(gpu: tuple[str, Any], bootstrap: str, dtype: torch.dtype) -> None:
    backend, launches = gpu
    logits, target = make((2, 70, 33), dtype)
    gradient = hold(logits, target, backend, bootstrap=bootstrap, reduction="none")
    assert gradient.is_contiguous()
    assert "apart" in launches[-1].name


def test_labels_that_are_none_are_nan_and_touch_nothing(gpu: tuple[str, Any]) -> None:
    """Straight into the operator, as labels on a GPU are that nobody looked at."""
    backend, _ = gpu
    logits, knobs = torch.randn(1, 12, 5), torch.tensor([0.7, 0.5])
    target = torch.tensor([3, 12, -7, 2**62, 1])
    bad = torch.tensor([False, True, True, True, False])
    loss, gradient, _ = ops.KERNELS[backend].loss(logits, target, knobs, torch.rand(12), 0, -100, 2, True)
    losses, *_ = ops.KERNELS[backend].loss(logits, target, knobs, None, 0, -100, 0, False)
    assert loss.isnan()
    assert torch.equal(losses.isnan(), bad)
    assert gradient[0, :, bad].isnan().all()
    assert gradient[0, :, ~bad].isfinite().all()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("shape", [(3, 21, 150), (1, 65, 70)], ids=str)
def test_repeated_steps_give_the_same_bits(shape: tuple[int, ...], backend: str) -> None:
    def installed(order: str) -> Any:
        if backend == "cuda":
            return cuda_emulator.installed(order, order)
        return load().install(90, warp_order=order, cta_order=order)

    logits, target = make(shape)
    results = []
    for order in ("asc", "desc", "random"):
        with installed(order):
            results.append(outcome(logits, target, backend))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_the_pace_follows_in_the_launch_of_the_loss(gpu: tuple[str, Any]) -> None:
    backend, launches = gpu
    logits, target = make((3, 21, 70))
    numbers = {name: pace_numbers(torch.device("cpu")).all for name in (backend, "cpu")}
    for name, own in numbers.items():
        ops.KERNELS[name].loss_and_pace(
            logits, target.flatten(), torch.tensor([0.7, 0.2]), None, 0, -100, 1, True, own, 3, 1.5, 1.0
        )  # fmt: skip
    assert len(launches) == 1
    torch.testing.assert_close(numbers[backend], numbers["cpu"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_comes_back_from_hooks_in_another_layout(gpu: tuple[str, Any], dtype: torch.dtype) -> None:
    """Hooks that move saved tensors to other memory and back need not keep their strides."""
    backend, _ = gpu
    logits, target = make((2, 21, 5, 9), dtype)
    logits = logits.to(memory_format=torch.channels_last)
    expected = hold(logits, target, backend)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.contiguous(), lambda saved: saved):
        _, found = outcome(logits, target, backend)
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
