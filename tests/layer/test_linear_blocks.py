"""Many classes on a CPU: blocks of them in the place of chunks of rows give the same, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import peak_memory
from dal_kernels import CrossEntropyLoss, linear_blocks, linear_loss
from dal_kernels.linear_blocks import Blocks, LayerInBlocks, blocks_of
from dal_kernels.linear_chunks import Changes
from dal_kernels.linear_ops import _linear_loss
from support.truth import SLACK, relative_error
from support.unfused import affine_losses, hold, layer, losses


@pytest.fixture(params=[1, 8, 512], ids=lambda least: f"blocks of {least} and more")
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Blocks]:
    """All calls go in blocks: of a row, of some, of all rows; those that were taken."""
    monkeypatch.setattr(linear_blocks, "MANY_CLASSES", 8)
    monkeypatch.setattr(linear_blocks, "_LEAST_BLOCK", request.param)
    taken: list[Blocks] = []

    def noted(*arguments: Any) -> Blocks | None:
        found = blocks_of(*arguments)
        if found is not None:
            taken.append(found)
        return found

    monkeypatch.setattr("dal_kernels.linear_ops.blocks_of", noted)
    return taken


@pytest.mark.sampled(7)
@losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_every_loss_in_blocks(blocks: list[Blocks], loss: Any, reduction: str, softcap: float | None) -> None:
    given = layer((3, 7)) | {"shift": 1, "reduction": reduction, "softcap": softcap}
    given["scale"] = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    given["sample_weight"] = torch.rand(3, 7, dtype=torch.float64).requires_grad_()
    hold(loss, given, "cpu")
    assert blocks


@affine_losses
def test_two_labels_in_blocks(blocks: list[Blocks], loss: Any) -> None:
    hold(loss, layer((3, 7)) | {"mix": (layer((3, 7), seed=1)["target"], 0.3)}, "cpu")
    assert blocks


@pytest.mark.parametrize("rows", [1, 40, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("reduction", "factor"), [("mean", 1.0), ("mean", 0.7), ("none", 0.7)])
@pytest.mark.parametrize("instructions", [True, False])
def test_no_further_from_truth_than_the_plain_pair(
    rows: int, dtype: torch.dtype, reduction: str, factor: float, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer rows than D, whose logits wait, and more; in one product a block and in several, of halves or widened."""
    monkeypatch.setattr("dal_kernels.linear_blocks.multiplies_halves", lambda *_: instructions)
    monkeypatch.setattr(linear_blocks, "_LEAST_ROWS", 10_000)
    generator = torch.Generator().manual_seed(0)
    width, classes = 48, 5000
    exact = [torch.randn(rows, width, generator=generator), torch.randn(classes, width, generator=generator) / 7]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in (*exact, torch.randn(classes, generator=generator))]
    truths = [leaf.detach().double().requires_grad_() for leaf in leaves]
    target = torch.randint(classes, (rows,), generator=generator)
    upstream = torch.linspace(0.3, 2.0, rows) if reduction == "none" else torch.tensor(factor)
    halves = dtype == torch.bfloat16
    # A gradient that is ready in bfloat16 is rounded once more by a factor that is no power of 2.
    again = int(halves and reduction == "mean" and factor != 1)
    losses = [F.cross_entropy(F.linear(x, w, b).to(s), target, reduction=reduction) for (x, w, b), s in (
        (truths, torch.float64), (leaves, torch.float32))]  # fmt: skip
    input, linear_weight, linear_bias = leaves
    for chunk_bytes in (None, 100_000):
        got = linear_loss(
            CrossEntropyLoss(backend="cpu"), input, linear_weight, target, linear_bias=linear_bias,
            reduction=reduction, chunk_bytes=chunk_bytes,
        )  # fmt: skip
        torch.testing.assert_close(got.double(), losses[0], rtol=2e-3, atol=2e-3)
        truth, plain, made = (
            torch.autograd.grad(loss, of, upstream.to(loss.dtype), retain_graph=True)
            for loss, of in zip((*losses, got), (truths, leaves, leaves), strict=True)
        )
        for one, other, true in zip(made, plain, truth, strict=True):
            assert one.dtype == dtype
            # Products of a few rows are rounded before they are added up. Roundings add as squares do.
            roundings = 1 + again + int(halves and chunk_bytes is not None)
            assert relative_error(one, true) <= 1.3 * roundings**0.5 * relative_error(other, true) + SLACK[dtype]


def test_logits_are_made_once_where_they_can_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of N rows, D wait; the others are multiplied twice."""
    monkeypatch.setattr(linear_blocks, "_LEAST_ROWS", 10_000)
    multiplied = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func == torch.ops.aten.mm.out:
                multiplied.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    width, classes, rows = 16, 4096, 40
    tensors = torch.randn(rows, width), torch.randn(classes, width), None, torch.arange(rows)
    arguments = (*tensors, torch.tensor([1.0, 0.0]), None, 3, -100, 1, "cpu", 20, torch.float32, False, [True] * 2)
    with Products():
        _linear_loss(*arguments)
    assert set(multiplied) == {rows, rows - width}


def test_which_calls_go_in_blocks() -> None:
    features, few, many, more = torch.zeros(500, 8), *(torch.zeros(classes, 8) for classes in (4095, 4096, 65536))
    both, every = [True, True], torch.float32
    assert blocks_of(features, many, every, 50, both, "cpu") == Blocks(400, 512)
    assert blocks_of(features[:50], many, every, 50, both, "cpu") is None  # all rows are one chunk
    assert blocks_of(features, many, every, 96, both, "cpu") is None
    assert blocks_of(features, more, every, 127, both, "cpu") == Blocks(500, 2097)
    assert blocks_of(features, more, every, 128, both, "cpu") is None  # so much memory was asked for
    assert blocks_of(features, few, every, 50, both, "cpu") is None
    assert blocks_of(features, many, every, 50, [True, False], "cpu") is None  # a frozen head has no gradient
    assert blocks_of(features, many, every, 50, both, "triton") is None
    assert blocks_of(features, many, torch.float16, 50, both, "cpu") is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_takes_little_more_than_its_gradients(
    dtype: torch.dtype, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits would take 128 MiB in float32, the widened classifier of bfloat16 32 MiB."""
    monkeypatch.setattr("dal_kernels.linear_blocks.multiplies_halves", lambda *_: instructions)
    rows, width, classes = 512, 128, 65536
    features, weight = torch.randn(rows, width).to(dtype), torch.randn(classes, width).to(dtype)
    target = torch.randint(classes, (rows,))

    def step(features: Tensor, weight: Tensor, target: Tensor) -> None:
        linear_loss(CrossEntropyLoss(backend="cpu"), features, weight, target).backward()

    step(features[:8].clone().requires_grad_(), weight[:4096].clone().requires_grad_(), target[:8] % 4096)
    before = peak_memory(reset=True)
    step(features.requires_grad_(), weight.requires_grad_(), target)
    taken = peak_memory() - before
    assert taken <= weight.nbytes + (16 << 20)


def test_without_fast_instructions_blocks_are_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: set[torch.dtype] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                multiplied.add(args[-1].dtype)
            return func(*args, **(kwargs or {}))

    features, weight = torch.randn(40, 16).bfloat16(), torch.randn(4096, 16).bfloat16()
    target = torch.arange(40)
    found = {}
    for instructions in (True, False):
        monkeypatch.setattr("dal_kernels.linear_blocks.multiplies_halves", lambda *_, there=instructions: there)
        layer = LayerInBlocks(features, weight, None, torch.bfloat16, Blocks(40, 512), [True, True], target, Changes())
        multiplied.clear()
        with Products():
            whole, _ = layer.statistics(False)
            fields = torch.zeros(5, 40)
            layer.differentiate(fields, whole.argmax[:0], torch.ones(()), target < 0)
        found[instructions] = set(multiplied)
    assert found == {True: {torch.bfloat16}, False: {torch.float32}}


def test_products_that_are_widened_are_made_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all rows would take as much as the gradient of the features, and twice that in float32."""
    monkeypatch.setattr("dal_kernels.linear_blocks.multiplies_halves", lambda *_: True)
    monkeypatch.setattr(linear_blocks, "_WIDENED_BYTES", 4 * 8 * 16)
    features, weight, gradient = (torch.randn(shape).bfloat16() for shape in ((50, 16), (30, 16), (50, 30)))
    blocks = (torch.bfloat16, Blocks(50, 30), [True, True], torch.zeros(50, dtype=torch.long), Changes())
    layer = LayerInBlocks(features, weight, None, *blocks)
    sizes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                sizes.append(len(made))
            return made

    with Products():
        layer._add(slice(0, 30), slice(0, 50), gradient)
    assert max(sizes) == 8
    torch.testing.assert_close(layer.finish().features, (gradient @ weight).float())
