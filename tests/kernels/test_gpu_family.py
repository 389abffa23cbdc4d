"""On a GPU, every loss of the family, and the loss fused with its layer. None of this has run on one yet."""

from __future__ import annotations

import pytest
import torch

from dal_kernels.objective import Objective
from support.axes import dtypes, objectives
from support.family import KNOBS
from support.family_truth import hold, knobs_per_row, make_batch
from support.gpu import backend
from support.layers import fused_layer, gradients, layer, two_steps
from support.truth import SLACK, relative_error

__all__ = ["backend"]

pytestmark = pytest.mark.gpu


# Rows that a lane, a warp and several blocks take; with knobs of every row, and with numbers.
BATCHES = {
    (300, 10): (torch.bfloat16, "mean"),
    (40, 1000): (torch.float32, "none"),
    (4, 40_001): (torch.bfloat16, "mean"),
}


@pytest.mark.parametrize("shape", BATCHES, ids=str)
@objectives
def test_every_loss_matches_its_formula(backend: str, objective: Objective, shape: tuple[int, int]) -> None:
    dtype, reduction = BATCHES[shape]
    logits, target = (tensor.cuda() for tensor in make_batch(*shape, dtype))
    target[-1] = -100
    of_rows = tuple(knob.cuda() for knob in knobs_per_row(objective, shape[0]))
    knobs = of_rows if reduction == "none" else KNOBS[objective.name]
    hold(objective, knobs, logits, target, backend, reduction=reduction)


@objectives
def test_every_loss_of_images_matches_its_formula(backend: str, objective: Objective) -> None:
    logits = 3 * torch.randn(2, 21, 33, 17, device="cuda")
    target = torch.randint(21, (2, 33, 17), device="cuda")
    hold(objective, KNOBS[objective.name], logits, target, backend, reduction="mean")


@dtypes
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_layer_is_no_further_from_truth_than_its_two_steps(backend: str, dtype: torch.dtype, reduction: str) -> None:
    given = {name: value.detach().cuda() for name, value in layer(dtype).items()}
    target = given.pop("target")
    exact = {name: leaf.double().requires_grad_() for name, leaf in given.items()}
    for leaf in given.values():
        leaf.requires_grad_()
    truth = gradients(two_steps({**exact, "target": target}, backend="eager", reduction=reduction), exact)
    fused, plain = (
        gradients(of({**given, "target": target}, backend=backend, reduction=reduction), given)
        for of in (fused_layer, two_steps)
    )
    for got, two, true in zip(fused, plain, truth, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, true) <= 1.3 * relative_error(two, true) + SLACK[dtype]
