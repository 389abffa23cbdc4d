"""Where another device is the default for new tensors, as in a model that is laid out on the meta device or for
torch.set_default_device: what the losses make of their own lies where it must, as it does with F.cross_entropy.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dal_kernels import DynamicsAwareLoss, linear_blocks
from support.layers import fused_layer, gradients, layer

LOGITS, TARGET = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5


def trained(criterion: DynamicsAwareLoss, **options: Any) -> list[Tensor]:
    """Loss and gradient of each of two epochs."""
    found = []
    for _ in range(2):
        logits = LOGITS.clone().requires_grad_()
        loss = criterion(logits, TARGET, **options)
        found += [loss.detach(), *torch.autograd.grad(loss.sum(), logits)]
        criterion.step()
    return found


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for here, there in zip(found, expected, strict=True):
        assert here.device.type == "cpu"
        assert torch.equal(here, there)


@pytest.mark.parametrize("pace", ["auto", "fixed"])
def test_a_loss_trains_is_copied_and_resumes(pace: Any, backend: str) -> None:
    first = DynamicsAwareLoss(total_steps=4, pace=pace, watch=False, backend=backend)
    with torch.device("meta"):
        criterion = DynamicsAwareLoss(total_steps=4, pace=pace, watch=False, backend=backend)
        assert_equal(trained(criterion), trained(first))
        copied = copy.deepcopy(criterion)
        resumed = DynamicsAwareLoss(total_steps=4, pace=pace, watch=False, backend=backend)
        resumed.load_state_dict(criterion.state_dict())
        expected = trained(first)
        assert_equal(trained(copied), expected)
        assert_equal(trained(resumed), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_layer_in_blocks_of_classes(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_blocks, "MANY_CLASSES", 2)
    given = layer()
    expected = gradients(fused_layer(given, reduction=reduction), given)
    with torch.device("meta"):
        loss = fused_layer(given, reduction=reduction)
    assert_equal(gradients(loss, given), expected)
