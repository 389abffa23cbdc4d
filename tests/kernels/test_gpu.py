"""For a machine with a GPU: `pytest -m gpu tests`. None of this has run on one yet.

`make gpu` runs it, and a sample of it under each of compute-sanitizer's tools.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dal_kernels import DynamicsAwareLoss, available_backends, dynamics_aware_loss, node
from dal_kernels.backends.choose import cuda_runs_on
from dal_kernels.layouts import MOST_APART_ON_GPU
from dal_kernels.ops import KERNELS
from support.axes import CLASSES, bootstraps, dtypes, reductions
from support.gpu import LONG, backend, on_gpu, step
from support.truth import check, gradient_bound, make_case, random_upstream, relative_error

__all__ = ["backend"]

pytestmark = pytest.mark.gpu


@dtypes
@pytest.mark.parametrize("classes", [*CLASSES, LONG, 300_000])
@reductions
@bootstraps
def test_matches_truth(backend: str, classes: int, dtype: torch.dtype, reduction: str, bootstrap: str) -> None:
    case = on_gpu(make_case(33, classes, dtype, reduction=reduction, bootstrap=bootstrap))
    case.target[5] = -100
    check(case, random_upstream(case).cuda(), backend)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("classes", "order"), [(100, ("cuda", "triton")), (40_000, ("triton", "cuda"))])
def test_auto_takes_what_it_says(classes: int, order: tuple[str, ...], compiled: bool) -> None:
    there = [name for name in order if available_backends()[name].startswith("available")]
    first = next(name for name in there if name != "cuda" or cuda_runs_on(torch.device("cuda", 0)))
    logits, target = torch.randn(64, classes, device="cuda"), torch.randint(classes, (64,), device="cuda")
    loss = torch.compile(dynamics_aware_loss, fullgraph=True) if compiled else dynamics_aware_loss
    auto, named = (loss(logits, target, 0.7, 0.5, backend=name) for name in ("auto", first))
    assert torch.equal(auto, named)


KNOBS = {
    "numbers": (0.8, 0.4),
    "tensors": (torch.tensor(0.8), torch.tensor(0.4)),
    "one a row": (torch.linspace(0.2, 1.4, 33), torch.linspace(0.5, 0.1, 33)),
    "one a row, and a number": (torch.linspace(0.2, 1.4, 33), 0.4),
}


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_both_ways_give_the_same_bits(
    backend: str, knobs: tuple[float | Tensor, float | Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step by Triton's kernels is launched without Triton."""
    q, weight = (knob.cuda() if isinstance(knob, Tensor) else knob for knob in knobs)

    def steps() -> list[tuple[Tensor, Tensor]]:
        cases = [on_gpu(make_case(33, 100, seed=seed)) for seed in range(3)]
        return [step(case.logits, case.target, q, weight, backend) for case in cases]

    found = steps()
    monkeypatch.setattr(node, "short_way", None)
    assert all(torch.equal(a, b) for pair in zip(found, steps(), strict=True) for a, b in zip(*pair, strict=True))


def test_a_bad_label_is_nan_and_nothing_else_is_touched(backend: str) -> None:
    logits, target = torch.randn(8, 100, device="cuda", requires_grad=True), torch.arange(8, device="cuda")
    target[3], target[5] = 100, -7
    losses = dynamics_aware_loss(logits, target, 0.7, 0.5, reduction="none", backend=backend)
    losses.nan_to_num().sum().backward()
    bad = torch.tensor([row in (3, 5) for row in range(8)], device="cuda")
    assert torch.equal(losses.isnan(), bad)
    assert logits.grad is not None
    assert logits.grad[~bad].isfinite().all()


def test_a_grad_scaler_trains_in_float16(backend: str) -> None:
    scaler, model = torch.amp.GradScaler("cuda"), torch.nn.Linear(32, 1000).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.autocast("cuda", dtype=torch.float16):
        logits = model(torch.randn(512, 32, device="cuda"))
        loss = dynamics_aware_loss(logits, torch.randint(1000, (512,), device="cuda"), 0.7, 0.5, backend=backend)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert model.weight.grad is not None
    assert (model.weight.grad != 0).float().mean() > 0.9


def test_more_than_two_to_the_31_elements(backend: str) -> None:
    rows, classes = 70_000, 32_768
    if torch.cuda.mem_get_info()[0] < 3 * rows * classes * 2:
        pytest.skip("needs 14 GiB of free device memory")
    logits = torch.zeros(rows, classes, device="cuda", dtype=torch.bfloat16)
    target = torch.full((rows,), 7, device="cuda")
    logits[-1, 7] = 3.0
    _, gradient = step(logits, target, 0.7, 0.5, backend)
    expected = step(logits[-1:], target[-1:], 0.7, 0.5, backend)[1] / rows
    torch.testing.assert_close(gradient[-1:], expected, rtol=2e-2, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    logits, target = torch.randn(64, 100), torch.randint(100, (64,))
    first, second = (step(logits.to(f"cuda:{i}"), target.to(f"cuda:{i}"), 0.7, 0.5, backend) for i in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def assert_a_step_needs_its_gradient_alone(logits: Tensor, target: Tensor, backend: str) -> None:
    dynamics_aware_loss(logits, target, 0.7, 0.5, backend=backend).backward()
    logits.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dynamics_aware_loss(logits, target, 0.7, 0.5, backend=backend).backward()
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * logits.nbytes


@pytest.mark.parametrize("shape", [(8192, 1000), (256, 50_000)])
def test_a_step_needs_the_gradient_and_nothing_else(backend: str, shape: tuple[int, int]) -> None:
    logits, target = torch.randn(shape, device="cuda", requires_grad=True), torch.zeros(shape[0], device="cuda").long()
    assert_a_step_needs_its_gradient_alone(logits, target, backend)


# Classes of one lane, of several warps, of more than are read where they lie; positions at any addresses.
IMAGES = [(2, 21, 64, 64), (3, 19, 33, 7), (2, 150, 40, 30), (1, MOST_APART_ON_GPU, 9, 64), (2, 500, 31), (300, 7, 3)]


@dtypes
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@bootstraps
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_images_match_truth(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, bootstrap: str, channels_last: bool
) -> None:
    """As their rows do one beside the other, which truth.py holds."""
    logits = 3 * torch.randn(shape, device="cuda").to(dtype)
    if channels_last:
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")
    target[torch.rand(target.shape, device="cuda") < 0.2] = -100
    leaf = logits.detach().requires_grad_()
    options: dict[str, Any] = {"reduction": reduction, "bootstrap": bootstrap, "return_stats": True}
    loss, stats = dynamics_aware_loss(leaf, target, 0.7, 0.5, backend=backend, **options)
    upstream = torch.randn(loss.shape, device="cuda")
    gradient = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))[0]
    rows = logits.double().requires_grad_()
    true_loss, true_stats = dynamics_aware_loss(rows, target, 0.7, 0.5, backend="eager", **options)
    truth = torch.autograd.grad(true_loss, rows, upstream.double())[0]
    torch.testing.assert_close(loss.double(), true_loss, rtol=2e-5, atol=2e-5)
    assert relative_error(gradient, truth) <= gradient_bound(truth, dtype)
    assert torch.equal(stats.prediction, true_stats.prediction)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_of_images_needs_the_gradient_and_nothing_else(backend: str, channels_last: bool) -> None:
    logits, target = torch.randn(8, 21, 256, 256, device="cuda"), torch.zeros(8, 256, 256, device="cuda").long()
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    logits.requires_grad_()
    assert_a_step_needs_its_gradient_alone(logits, target, backend)


@dtypes
@pytest.mark.parametrize("shape", [(300, 10), (300, 777), (20, LONG)])
def test_repeats_have_the_same_bits(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, target = torch.randn(shape, device="cuda").to(dtype), torch.randint(shape[1], shape[:1], device="cuda")
    first = step(logits, target, 1.2, 0.4, backend)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, step(logits, target, 1.2, 0.4, backend), strict=True))


def test_the_raw_cuda_operator_refuses_tensors_of_another_device() -> None:
    if "cuda" not in KERNELS:
        pytest.skip(available_backends()["cuda"])
    logits, target = torch.randn(8, 100, device="cuda"), torch.zeros(8, dtype=torch.long, device="cuda")
    knobs = torch.tensor([0.5, 0.5])
    with pytest.raises((ValueError, RuntimeError), match="knobs must be on the device of logits"):
        KERNELS["cuda"].loss(logits, target, knobs, None, 0, -100, 1, True)


@pytest.mark.parametrize("rows", [64, 20_000])
def test_the_pace_is_that_of_the_cpu(backend: str, rows: int) -> None:
    on_device, on_cpu = (DynamicsAwareLoss(total_steps=10, backend=name) for name in (backend, "auto"))
    target = torch.randint(10, (rows,))
    target[::7] = -100
    for position in (0, 3, 9):
        logits = 3 * torch.randn(rows, 10)
        for criterion, device in ((on_device, "cuda"), (on_cpu, "cpu")):
            criterion.step(position)
            criterion(logits.to(device).requires_grad_(), target.to(device))
        torch.testing.assert_close(on_device.schedule.live.numbers().all.cpu(), on_cpu.schedule.live.numbers().all)
