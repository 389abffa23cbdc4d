"""The reduction of Triton's losses: by the last program, in whatever order they run, or by a launch of its own."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dal_kernels import dynamics_aware_loss
from dal_kernels.backends.triton import launch, ticket
from dal_kernels.backends.triton.plan import JOINED
from dal_kernels.ops import KERNELS
from support.marks import needs_executor
from support.truth import check, make_case

ORDERS = ("asc", "desc", "random")


@pytest.fixture
def gpuless() -> ModuleType:
    return pytest.importorskip("gpuless")


def step(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
    leaf = logits.clone().requires_grad_()
    loss = dynamics_aware_loss(leaf, target, 1.2, 0.4, weight=weight, backend="triton")
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


# Several rows a program; one, whose 300 sums a warp reads in two steps; rows of 4 warps, of 8 in tiles, and long ones.
@needs_executor
@pytest.mark.parametrize(
    ("rows", "classes", "dtype"),
    [
        (200, 100, torch.float32),
        (300, 300, torch.float64),
        (9, 4099, torch.float32),
        (3, 20_011, torch.float32),
        (256, 8193, torch.float64),
    ],
)
def test_whichever_program_is_the_last_the_bits_are_the_same(
    gpuless: ModuleType, rows: int, classes: int, dtype: torch.dtype
) -> None:
    logits, target = torch.randn(rows, classes).to(dtype), torch.randint(classes, (rows,))
    target[[0, 2, -1]] = -100
    results = []
    for order in ORDERS:
        with gpuless.install(90, warp_order=order, cta_order=order, collect=False) as recorder:
            results.append(step(logits, target))
        assert "reduce_sums" not in [made.name for made in recorder]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_executor
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("classes", [100, 300, 4099])
def test_nan_comes_after_what_the_other_programs_wrote(gpuless: ModuleType, classes: int, order: str) -> None:
    """All weights are 0: the last program writes NaN over the gradient of all rows that count."""
    logits, target = torch.randn(40, classes), torch.randint(1, classes, (40,))
    target[::7] = -100
    weight = torch.ones(classes)
    weight[1:] = 0.0
    with gpuless.install(90, warp_order=order, cta_order=order):
        loss, gradient = step(logits, target, weight)
    leaf = logits.clone().requires_grad_()
    F.cross_entropy(leaf, target, weight).backward()
    assert loss.isnan()
    torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=0, equal_nan=True)


@needs_executor
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(200, 100), (9, 4099)], ids=str)
def test_a_launch_leaves_its_ticket_for_the_next(
    gpuless: ModuleType, shape: tuple[int, int], order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = torch.zeros((), dtype=torch.int32)
    monkeypatch.setattr(launch, "ticket_for", lambda logits: kept)
    logits, target = torch.randn(shape), torch.randint(shape[1], shape[:1])
    with gpuless.install(90, cta_order=order):
        first, second = step(logits, target), step(logits, target)
    assert kept == 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_executor
@pytest.mark.parametrize(
    ("rows", "launches"),
    [(0, ["reduce_sums"]), (1, ["loss_rows"]), (JOINED, ["loss_rows"]), (JOINED + 1, ["loss_rows", "reduce_sums"])],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_so_many_programs_need_so_many_launches(
    gpuless: ModuleType, rows: int, launches: list[str], reduction: str
) -> None:
    case = make_case(rows, 257, reduction=reduction)
    with gpuless.install(90) as recorder:
        if rows:
            check(case, torch.tensor(2.0, dtype=torch.float64), "triton")
        else:
            loss = dynamics_aware_loss(case.logits, case.target, 1.2, backend="triton", reduction=reduction)
            torch.testing.assert_close(loss, torch.tensor(0.0 if reduction == "sum" else torch.nan), equal_nan=True)
    assert [made.name for made in recorder][: len(launches)] == launches
    assert "reduce_sums" not in [made.name for made in recorder][len(launches) :]


@needs_executor
@pytest.mark.parametrize(
    ("rows", "launches"),
    [(1, ["loss_rows"]), (300, ["loss_rows"]), (JOINED + 1, ["loss_rows", "reduce_sums", "follow_rows"])],
)
def test_the_last_program_keeps_the_pace(gpuless: ModuleType, rows: int, launches: list[str]) -> None:
    """From the statistics of all programs, in whatever order they run."""
    case = make_case(rows, 257)
    found = []
    for order in ORDERS:
        numbers = torch.tensor([0.7, 0.0, 0.3, 0.2, 900, 1.2, 0.6, 0.0])
        with gpuless.install(90, warp_order=order, cta_order=order) as recorder:
            KERNELS["triton"].loss_and_pace(
                case.logits, case.target, numbers[:2], None, 0, -100, 1, True, numbers, 1, 1.5, 0.5
            )
        assert [made.name for made in recorder] == launches
        found.append(numbers)
    assert found[0][2] != 0.3
    assert all(torch.equal(found[0], other) for other in found[1:])


# ---- whose the ticket is


def test_an_executor_gets_a_ticket_a_launch() -> None:
    logits = torch.empty(3)
    first, second = ticket.ticket_for(logits), ticket.ticket_for(logits)
    assert first.data_ptr() != second.data_ptr()
    assert (first.dtype, first.item(), second.item()) == (torch.int32, 0, 0)


@pytest.mark.parametrize(("stream", "kept"), [(0, True), (7, False)])
def test_the_default_stream_of_a_device_keeps_its_ticket(
    stream: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticket, "_kept", {})
    monkeypatch.setattr(ticket, "_new", lambda logits: torch.zeros((), dtype=torch.int32))
    active = SimpleNamespace(get_current_stream=lambda device: stream)
    monkeypatch.setattr(ticket, "driver", SimpleNamespace(active=active))
    on_0, on_1 = (SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)) for index in (0, 1))
    first = ticket.ticket_for(on_0)
    assert (ticket.ticket_for(on_0) is first) == kept
    assert ticket.ticket_for(on_1) is not first
