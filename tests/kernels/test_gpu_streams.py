"""On a GPU, what runs at once: threads, streams, captured graphs, and that nothing waits for the device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from dal_kernels import DynamicsAwareLoss, dynamics_aware_loss
from support.gpu import LONG, backend, on_gpu, step
from support.truth import make_case

__all__ = ["backend"]

pytestmark = pytest.mark.gpu


def test_threads_and_streams_of_their_own(backend: str) -> None:
    """In a new thread there is no context yet; on another stream the launches are others."""
    case = on_gpu(make_case(33, 100))
    expected = step(case.logits, case.target, 0.8, 0.4, backend)

    def elsewhere() -> tuple[Tensor, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            found = step(case.logits, case.target, 0.8, 0.4, backend)
        stream.synchronize()
        return found

    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(elsewhere) for _ in range(8)]
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result.result(), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [10, 1000, LONG])
def test_a_captured_graph_sees_new_schedule_values(backend: str, classes: int, dtype: torch.dtype) -> None:
    logits = torch.randn(64, classes, device="cuda", dtype=dtype)
    target = torch.randint(classes, (64,), device="cuda")
    q, weight = torch.tensor(0.6, device="cuda"), torch.tensor(0.0, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(logits, target, q, weight, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(logits, target, q, weight, backend)
    for new_q, new_weight in ((0.6, 0.0), (1.2, 0.4), (1.5, 1.0)):
        q.fill_(new_q)
        weight.fill_(new_weight)
        graph.replay()
        for got, true in zip(captured, step(logits, target, q, weight, backend), strict=True):
            assert torch.equal(got, true)


def test_calls_on_two_streams_at_once_do_not_disturb_each_other(backend: str) -> None:
    """Whatever the programs of a call share, those of another must not count in it."""
    logits, target = torch.randn(512, 1000, device="cuda"), torch.randint(1000, (512,), device="cuda")
    expected = step(logits, target, 0.7, 0.5, backend)[0]
    torch.cuda.synchronize()
    streams = (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream())
    losses = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                losses.append(dynamics_aware_loss(logits, target, 0.7, 0.5, backend=backend))
    torch.cuda.synchronize()
    assert all(torch.equal(loss, expected) for loss in losses)


def test_a_step_that_torch_compile_captures_runs_before_it_too(backend: str) -> None:
    """On the stream of that run nothing may be allocated that outlives it."""
    logits, target = torch.randn(64, 1000, device="cuda"), torch.randint(1000, (64,), device="cuda")
    captured = torch.compile(
        lambda z: dynamics_aware_loss(z, target, 0.7, 0.5, backend=backend), mode="reduce-overhead"
    )
    expected = step(logits, target, 0.7, 0.5, backend)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        leaf = logits.clone().requires_grad_()
        loss = captured(leaf)
        loss.backward()
        torch.testing.assert_close((loss.detach(), leaf.grad), expected)


def test_no_call_waits_for_the_device(backend: str) -> None:
    criterion = DynamicsAwareLoss(total_steps=10, backend=backend)
    logits = torch.randn(64, 1000, device="cuda", requires_grad=True)
    target = torch.randint(1000, (64,), device="cuda")
    criterion(logits, target).backward()  # compiles, and moves the schedule
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion.step()
        (2.0 * criterion(logits, target)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_and_graphs_count_their_blocks_apart(backend: str) -> None:
    """At the same time, on streams that do not wait for each other, and eager calls beside replays of a graph."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    cases = [(torch.randn(4096, 100, device="cuda"), torch.randint(100, (4096,), device="cuda")) for _ in streams]
    expected = [step(*case, 0.7, 0.4, backend) for case in cases]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=streams[0]):
        captured = step(*cases[0], 0.7, 0.4, backend)
    for _ in range(20):
        found = []
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                found.append(step(*case, 0.7, 0.4, backend))
        torch.cuda.synchronize()
        for one, other in zip([captured, *found], [expected[0], *expected], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_captured_step_paces_itself(backend: str) -> None:
    """Each replay is a call: the averages go on from the last."""
    criterion, other = (DynamicsAwareLoss(total_steps=10, backend=backend) for _ in range(2))
    logits = torch.randn(64, 10, device="cuda", requires_grad=True)
    target = torch.randint(10, (64,), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        criterion(logits, target).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        criterion(logits, target).backward()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        other(logits, target)
    torch.testing.assert_close(criterion.schedule.live.numbers().all, other.schedule.live.numbers().all)
