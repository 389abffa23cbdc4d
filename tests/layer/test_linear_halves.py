"""Half types of the linear form on CPUs: multiplied as they are where there are instructions for it, or in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dal_kernels import linear_chunks, ops
from dal_kernels.layer import chunk_row_bytes
from dal_kernels.linear_ops import _linear_gradient, _linear_loss, linear_gradient, linear_loss
from support.axes import halves
from support.layers import C, D, fused_layer, gradients, layer, two_steps
from support.truth import SLACK, relative_error

instructions = pytest.mark.parametrize("instructions", [False, True])


def set_instructions(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """As on a CPU that has those for half types, or as on one without; several parts of the classifier a chunk."""
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: there, raising=False)
    monkeypatch.setattr(ops, "bfloat16_products_are_fast", there)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(linear_chunks, "_WIDENED_BYTES", 4 * D * 16)


@halves
@instructions
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [1, 16, 150])
def test_matches_truth(
    fused: str,
    dtype: torch.dtype,
    instructions: bool,
    reduction: str,
    classes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_instructions(monkeypatch, instructions)
    given = layer(dtype, classes=classes)
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items() if name != "target"}
    exact["target"] = given["target"]
    calls = ((fused_layer, given, fused), (two_steps, given, fused), (two_steps, exact, "eager"))
    fused_loss, plain_loss, true_loss = (f(call, backend=name, reduction=reduction) for f, call, name in calls)
    # The sums of a logit are added up in other orders: now and then it is rounded to the other side.
    torch.testing.assert_close(fused_loss, plain_loss, rtol=1e-3, atol=1e-4)
    losses = ((fused_loss, given), (plain_loss, given), (true_loss, exact))
    every = zip(*(gradients(loss, call) for loss, call in losses), strict=True)
    for got, plain, true in every:
        assert got.dtype == dtype
        assert relative_error(got, true) <= 1.3 * relative_error(plain, true) + SLACK[dtype]


class Products(TorchDispatchMode):
    """Dtypes of matmuls, and the largest of all that is made, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplied: list[torch.dtype] = []
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = {linear_loss: _linear_loss, linear_gradient: _linear_gradient}.get(func)
        if inside:
            with self:
                return inside(*args)
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] in ("mm", "addmm", "addmm_"):
            self.multiplied.append(args[-1].dtype)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.largest[leaf.dtype] = max(self.largest.get(leaf.dtype, 0), elements)
        return result


@halves
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_instructions_nothing_is_multiplied_in_halves(
    fused: str, dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own loops for them take up to a hundred times as long as float32."""
    given = layer(dtype, rows=40)
    found = {}
    for there in (True, False):
        set_instructions(monkeypatch, there)
        with Products() as products:
            fused_layer(given, backend=fused, reduction=reduction).sum().backward()
        found[there] = products.multiplied
    assert dtype in found[True]
    assert set(found[False]) == {torch.float32}
    given["classifier_weight"].requires_grad_(False)
    with Products() as products:
        fused_layer(given, 8, backend=fused, reduction=reduction).sum().backward()
    assert products.largest[torch.float32] == 8 * C  # the logits of a chunk: not all, nor the whole classifier
    assert chunk_row_bytes(C, dtype, torch.device("cpu")) == C * (2 + 4)


@halves
def test_a_torch_without_onednn_has_no_instructions(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    set_instructions(monkeypatch, True)
    assert linear_chunks.multiplies_halves(dtype, cpu)
    with monkeypatch.context() as switched_off:
        switched_off.setattr(torch.backends.mkldnn, "enabled", False)
        assert not linear_chunks.multiplies_halves(dtype, cpu)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not linear_chunks.multiplies_halves(dtype, cpu)
    assert linear_chunks.multiplies_halves(dtype, torch.device("cuda"))


@pytest.mark.parametrize(("ours", "amx", "fast"), [(False, False, False), (False, True, True), (True, False, True)])
def test_bfloat16_needs_instructions_that_are_faster_than_those_of_float32(
    ours: bool, amx: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN takes it on any processor with AVX-512, four times as slowly as float32."""
    set_instructions(monkeypatch, True)
    monkeypatch.setattr(ops, "bfloat16_products_are_fast", ours)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert linear_chunks.multiplies_halves(torch.bfloat16, torch.device("cpu")) == fast
    assert linear_chunks.multiplies_halves(torch.float16, torch.device("cpu"))
