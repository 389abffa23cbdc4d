"""Classes split over ranks: each rank names what is wrong on any, or where looking would cost, the loss is NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dal_kernels import (
    CrossEntropyLoss,
    exchange,
    sliced,
)
from dal_kernels.distributed import (
    class_parallel_dynamics_aware_loss,
    class_parallel_linear_loss,
    class_parallel_loss,
    class_parallel_row_statistics,
)
from support.ranks import SLICES, C, N, Place, case, finished_ranks, names_of, raises, report

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


D = 12


def check_errors(world: int) -> None:
    place = Place(SLICES[world][0])
    logits, target = case(7)
    local = place.of(logits, 1).requires_grad_()

    def call(labels: Tensor = target, z: Any = local, **changes: Any) -> Tensor:
        return class_parallel_dynamics_aware_loss(z, labels, 0.8, 0.6, **{**place.told, **changes})

    everywhere = target.clone()
    everywhere[3] = C
    raises(f"target at row 3 is {C}", lambda: call(everywhere))
    if place.rank:
        everywhere = target
    message = rf"^rank 0 of the group: target at row 3 is {C}, accepted are 0 to {C - 1} and ignore_index -100$"
    for told in (place.told, {}):
        raises(message, lambda told=told: class_parallel_loss(CrossEntropyLoss(), local, everywhere, **told))
    weight = place.of(torch.zeros(C, D), 0)
    raises(message, lambda: class_parallel_linear_loss(CrossEntropyLoss(), torch.zeros(N, D), weight, everywhere))
    raises(message, lambda: class_parallel_row_statistics(local, everywhere))
    mine = target.clone()
    mine[3] = place.rank
    raises("target must be the same on every rank", lambda: call(mine))
    differing = torch.linspace(0.5, 2.0, C)
    differing[C - 1] += place.rank
    for weight in (differing, torch.ones(C) if place.rank else None):
        raises("weight must be the same on every rank", lambda weight=weight: call(target, weight=weight))
    raises("class_offset and num_classes must be those of slices that follow", lambda: call(num_classes=C + 1))
    raises("class_offset and num_classes must be given both", lambda: call(num_classes=None))
    raises("class_offset must be such that", lambda: call(num_classes=place.size - 1, class_offset=0))
    raises("class_offset must be an int, got float", lambda: call(class_offset=1.0), TypeError)
    raises("local_logits must be a tensor", lambda: call(z=None), TypeError)
    raises("local_logits must have shape", lambda: call(z=torch.tensor(0.0)))
    raises("target must have as many labels on every rank", lambda: class_parallel_dynamics_aware_loss(
        local[place.rank:], target[place.rank:], 0.8))  # fmt: skip
    raises("target must have shape", lambda: call(target[1:]))
    raises("together", lambda: class_parallel_dynamics_aware_loss(local[:, :0], target, 0.8))
    others = dist.new_group([0])
    if place.rank:
        raises("group must be one that this rank belongs to", lambda: call(group=others))
    loss = call(group=dist.new_group(list(range(world))))
    (gradient,) = torch.autograd.grad(loss, local, create_graph=True)
    raises("second derivative", gradient.square().sum().backward, RuntimeError)


def check_where_looking_would_cost_a_synchronisation(world: int) -> None:
    """As on a GPU: what a CPU raises for becomes NaN, of the row or of everything."""
    place = Place(SLICES[world][1])
    logits, target = case(7)
    look = exchange.agreement
    with (
        mock.patch.object(sliced, "label_error", return_value=None),
        mock.patch.object(exchange, "agreement", lambda header, _, *call: look(header, False, *call)),
    ):

        def outcome(labels: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
            local = place.of(logits, 1).requires_grad_()
            options = {**place.told, "reduction": "none", **changes}
            loss = class_parallel_dynamics_aware_loss(local, labels, 0.8, 0.6, **options)
            loss.sum().backward()
            return loss.isnan(), local.grad.isnan()

        for label in (C, C + 7, -1, -5):
            nobodys = target.clone()
            nobodys[3] = label
            row = torch.arange(N) == 3
            lost, lost_gradient = outcome(nobodys)
            assert torch.equal(lost, row)
            assert torch.equal(lost_gradient, row.unsqueeze(1).expand(N, place.size))
        mine = target.clone()
        mine[3] = place.rank
        weight = torch.ones(C) + place.rank
        for lost, lost_gradient in (outcome(mine), outcome(target, num_classes=C + 1), outcome(target, weight=weight)):
            counted = target != -100
            assert lost[counted].all()
            assert lost_gradient[counted].all()


finished = finished_ranks(__name__)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", names_of(__name__))
def test_every_rank(finished: tuple[int, Path], name: str) -> None:
    report(name, *finished)
