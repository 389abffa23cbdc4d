"""The reference against finite differences, hand-computed rows, and the authors' arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dal_kernels import reference
from support.axes import bootstraps, reductions


@bootstraps
@reductions
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(("q", "bootstrap_weight"), [(0.0, 0.0), (0.4, 0.0), (1.0, 0.3), (1.5, 1.0)])
def test_gradient_is_that_of_finite_differences(
    bootstrap: str, reduction: str, official: bool, q: float, bootstrap_weight: float
) -> None:
    torch.manual_seed(3)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, 3, -100, 2])
    weight = torch.rand(7, dtype=torch.float64)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return reference.dynamics_aware_loss(
            z, target, q, bootstrap_weight, weight=weight, reduction=reduction, bootstrap=bootstrap, official=official
        )

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradgradcheck(loss, (logits,))


# p = (1/2, 1/4, 1/4) and logits its logarithms, so that every value can be written down.
LOGITS = [math.log(2.0), 0.0, 0.0]
ENTROPY = 1.5 * math.log(2.0)


@pytest.mark.parametrize(
    ("target", "q", "bootstrap_weight", "bootstrap", "expected"),
    [
        (0, 1.0, 0.0, "soft", 0.5),
        (1, 1.0, 0.0, "soft", 0.75),
        (1, 0.5, 0.0, "soft", 1.0),
        (0, 2.0, 0.0, "soft", 0.375),
        (1, 0.0, 0.0, "soft", math.log(4.0)),
        (0, 1.0, 1.0, "soft", 0.5 + ENTROPY / math.log(3.0)),
        (1, 2.0, 0.5, "soft", 0.46875 + 0.25 * ENTROPY / math.log(3.0)),
        (1, 2.0, 0.5, "hard", 0.46875 + 0.25 * math.log(2.0) / math.log(3.0)),
    ],
)
def test_hand_computed_rows(target: int, q: float, bootstrap_weight: float, bootstrap: str, expected: float) -> None:
    logits = torch.tensor([LOGITS], dtype=torch.float64)
    loss, stats = reference.dynamics_aware_loss(
        logits, torch.tensor([target]), q, bootstrap_weight, bootstrap=bootstrap, return_stats=True
    )
    assert loss.item() == pytest.approx(expected, abs=1e-14)
    assert stats.target_prob.item() == pytest.approx([0.5, 0.25, 0.25][target], abs=1e-15)
    assert stats.entropy.item() == pytest.approx(ENTROPY, abs=1e-15)
    assert stats.prediction.item() == 0


def test_hand_computed_gradient() -> None:
    """q = 1: dL/dz = p_y (p - e_y); the entropy adds -n p (ln p + H)."""
    logits = torch.tensor([LOGITS], dtype=torch.float64, requires_grad=True)
    reference.dynamics_aware_loss(logits, torch.tensor([1]), 1.0, 1.0).backward()
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    expected = 0.25 * (p - torch.tensor([0.0, 1.0, 0.0])) - p * (p.log() + ENTROPY) / math.log(3.0)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], expected, rtol=0, atol=1e-15)


def authors_loss(logits: torch.Tensor, target: torch.Tensor, q: float, bootstrap_weight: float) -> torch.Tensor:
    """The published arithmetic, step by step: clamped probabilities, one-hot targets, ln(p + 1e-6)."""
    classes = logits.shape[1]
    clamped = F.softmax(logits, dim=1).clamp(min=1e-6, max=1.0)
    picked = (F.one_hot(target, classes) * clamped).sum(dim=1)
    gce = ((1.0 - picked**q) / q).mean()
    p = F.softmax(logits, dim=1)
    entropy = -(p * torch.log(p + 1e-6)).sum(dim=1).mean()
    return gce + bootstrap_weight / (q * math.log(classes)) * entropy


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize(("q", "bootstrap_weight"), [(0.6, 0.0), (1.2, 0.4), (1.5, 1.0)])
def test_official_is_the_authors_arithmetic(scale: float, q: float, bootstrap_weight: float) -> None:
    torch.manual_seed(1)
    logits = (scale * torch.randn(32, 12, dtype=torch.float64)).requires_grad_()
    target = torch.randint(12, (32,))
    got = reference.dynamics_aware_loss(logits, target, q, bootstrap_weight, official=True)
    expected = authors_loss(logits, target, q, bootstrap_weight)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    (g,), (e,) = (torch.autograd.grad(value, logits) for value in (got, expected))
    torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-17)


def test_exact_and_official_differ_by_no_more_than_the_clamps_allow() -> None:
    torch.manual_seed(2)
    logits, target = 8 * torch.randn(200, 50, dtype=torch.float64), torch.randint(50, (200,))
    exact, official = (
        reference.dynamics_aware_loss(logits, target, 1.2, 1.0, reduction="none", official=flag)
        for flag in (False, True)
    )
    entropy_part = 50 * 1e-6 / (1.2 * math.log(50))
    clamp_part = (1e-6) ** 1.2 / 1.2
    difference = exact - official
    assert difference.max() <= entropy_part + clamp_part
    assert difference.min() >= -1e-15
    assert (difference != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits, target = torch.randn(16, 8).to(dtype), torch.randint(8, (16,))
    loss = reference.dynamics_aware_loss(logits, target, 0.7, 0.5)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, reference.dynamics_aware_loss(logits.float(), target, 0.7, 0.5))


def test_a_label_out_of_range_is_nan_where_it_cannot_be_looked_at() -> None:
    """On a GPU looking would synchronise. torch.func stands in for it here: it cannot look either."""
    logits, target = torch.randn(3, 5), torch.tensor([1, 7, -3])
    losses = torch.vmap(lambda z, y: reference.dynamics_aware_loss(z, y, 0.7))(logits, target)
    assert losses.isnan().tolist() == [False, True, True]
