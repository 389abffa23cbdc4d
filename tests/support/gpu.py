"""Calls on a GPU, where approximate exponentials and logarithms are off by 1 or 2 ulp: truth.py allows for it."""

from __future__ import annotations

import pytest
from torch import Tensor

from dal_kernels import available_backends, dynamics_aware_loss
from support.truth import Case

LONG = 100_000  # a cluster of blocks a row, where there are clusters


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend for GPU tensors that is available here."""
    reason = available_backends()[request.param]
    if not reason.startswith("available"):
        pytest.skip(reason)
    return request.param


def on_gpu(case: Case) -> Case:
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in case.options.items()}
    return Case(case.logits.cuda(), case.target.cuda(), case.q, case.bootstrap_weight, moved)


def step(
    logits: Tensor, target: Tensor, q: float | Tensor, weight: float | Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = dynamics_aware_loss(leaf, target, q, weight, backend=backend)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad
