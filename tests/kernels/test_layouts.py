"""Logits of few classes, and logits (N, C, d1, ...) where they lie, which a CPU kernel reads row beside row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dal_kernels import RowStats, dynamics_aware_loss
from dal_kernels.functional import loss_of
from dal_kernels.objective import Objective
from dal_kernels.ops import KERNELS
from support.axes import bootstraps, dtypes, objectives
from support.family import KNOBS
from support.family_truth import upstream_of
from support.truth import LOSS_SLACK, gradient_bound, relative_error

# The shape of a leaf, and the view of it that are the logits.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "one class": ((5, 1), lambda z: z),
    "two classes": ((70, 2), lambda z: z),
    "few classes": ((67, 14), lambda z: z),
    "just above a vector": ((131, 17), lambda z: z),
    "rows apart": ((70, 40), lambda z: z[::2, 3:24]),
    "classes apart": ((70, 40), lambda z: z[:, ::3]),
    "transposed": ((20, 70), lambda z: z.t()),
    "transposed, of thousands": ((10_000, 3), lambda z: z.t()),
    "more classes than are read apart": ((1, 16_385, 3), lambda z: z),
    "images": ((3, 7, 5, 9), lambda z: z),
    "small images": ((40, 7, 3), lambda z: z),
    "channels last": ((3, 5, 9, 7), lambda z: z.movedim(-1, 1)),
    "channels last of many classes": ((3, 5, 250), lambda z: z.movedim(-1, 1)),
    "many classes": ((2, 1100, 21), lambda z: z),
    "classes of a larger tensor": ((3, 12, 80), lambda z: z[:, 2:9]),
    "positions of a larger tensor": ((3, 7, 90), lambda z: z[:, :, 5:83]),
    "every other position": ((3, 7, 90), lambda z: z[:, :, ::2]),
    "one image again and again": ((1, 7, 33), lambda z: z.expand(4, 7, 33)),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def make(layout: str, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
    """(leaf, view, target), of which some rows are ignored."""
    shape, view = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(3)
    leaf = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    logits = view(leaf)
    target = torch.randint(logits.shape[1], (logits.shape[0], *logits.shape[2:]), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = -100
    return leaf, view, target


def outcome(run: Callable[[Tensor], Tensor], leaf: Tensor, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    logits = view(leaf).requires_grad_()
    loss = run(logits)
    return loss.detach(), torch.autograd.grad(loss, logits, upstream_of(loss).to(loss.dtype))[0]


@layouts
@dtypes
@pytest.mark.parametrize("reduction", ["mean", "none"])
@objectives
def test_every_loss_matches_truth(
    objective: Objective, reduction: str, dtype: torch.dtype, layout: str, fused: str
) -> None:
    leaf, view, target = make(layout, dtype)
    knobs = KNOBS[objective.name]

    def run(backend: str) -> Callable[[Tensor], Tensor]:
        options: Any = {"reduction": reduction, "backend": backend}
        return lambda logits: loss_of(objective.id, knobs, logits, target, **options)

    loss, gradient = outcome(run(fused), leaf, view)
    true_loss, true_gradient = outcome(run("eager"), leaf.double(), view)
    allowed = LOSS_SLACK[dtype] * true_loss.norm() + 4 * torch.finfo(loss.dtype).eps
    assert (loss.double() - true_loss).abs().max() <= allowed
    if true_gradient.any():
        assert relative_error(gradient, true_gradient) <= gradient_bound(true_gradient, dtype)
    else:  # Of a single class: what is left of the difference of two coefficients, of the size of twice the knobs.
        assert gradient.abs().max() <= 2 * torch.finfo(loss.dtype).eps * 2 * max((1.0, *knobs))


@layouts
@bootstraps
def test_statistics_are_those_of_flat_rows(layout: str, bootstrap: str, fused: str) -> None:
    leaf, view, target = make(layout, torch.float32)
    logits = view(leaf).clone()
    if logits.shape[1] > 2:  # the first NaN is the prediction, else the first of equals; nothing is known of -inf alone
        rows = logits.movedim(1, -1)
        flat = rows.reshape(-1, logits.shape[1])
        flat[0, 1:3], flat[1, :], flat[2, 1:] = torch.nan, -torch.inf, 1e3
        logits = flat.reshape(rows.shape).movedim(-1, 1)
    _, found = dynamics_aware_loss(logits, target, 0.7, 0.5, return_stats=True, bootstrap=bootstrap, backend=fused)  # type: ignore[call-overload]
    _, wanted = dynamics_aware_loss(
        logits.double(), target, 0.7, 0.5, return_stats=True, bootstrap=bootstrap, backend="eager"
    )  # type: ignore[call-overload]
    assert isinstance(found, RowStats)
    assert torch.equal(found.prediction, wanted.prediction)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), equal_nan=True)


@layouts
@dtypes
def test_a_fake_gradient_lies_as_the_gradient_does(layout: str, dtype: torch.dtype, fused: str) -> None:
    leaf, view, target = make(layout, dtype)
    logits = view(leaf)
    if logits.dim() > 3:
        logits = logits.flatten(2)
    writes = KERNELS[fused].writes_gradient(logits, 0)
    arguments = (target.flatten(), torch.tensor([0.7, 0.5]), None, 0, -100, 1, writes)
    _, gradient, *_ = KERNELS[fused].loss(logits, *arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in (logits, *arguments)]
        _, fake, *_ = KERNELS[fused].loss(*fakes)
    assert (fake.shape, fake.stride()) == (gradient.shape, gradient.stride())


def test_a_row_has_the_same_bits_wherever_it_lies(fused: str, threads: None) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(200, 14, generator=generator), torch.randint(14, (200,), generator=generator)

    def run(order: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits[order].requires_grad_()
        losses = dynamics_aware_loss(leaf, target[order], 0.7, 0.5, reduction="none", backend=fused)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    expected = run(torch.arange(200))
    for count in (1, 3):
        torch.set_num_threads(count)
        order = torch.randperm(200, generator=generator)[: 200 - count]
        for one, other in zip(run(order), expected, strict=True):
            assert torch.equal(one, other[order])
