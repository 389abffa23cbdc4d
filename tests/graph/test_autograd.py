"""What lives from forward to backward, and what callers may do in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dal_kernels import dynamics_aware_loss
from support.axes import bootstraps, dtypes, reductions
from support.truth import make_case

# Both ways, because each makes a node of the autograd graph.
pytestmark = pytest.mark.usefixtures("way")


def leaf_and_loss(backend: str, dtype: torch.dtype, reduction: str, **options: object) -> tuple[Tensor, Tensor]:
    case = make_case(12, 40, dtype)
    leaf = case.logits.requires_grad_()
    loss = dynamics_aware_loss(leaf, case.target, 0.8, 0.4, reduction=reduction, backend=backend, **options)  # type: ignore[call-overload]
    return leaf, loss


@dtypes
@reductions
def test_two_backwards_over_a_kept_graph_are_independent(backend: str, dtype: torch.dtype, reduction: str) -> None:
    leaf, loss = leaf_and_loss(backend, dtype, reduction)
    (unit,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss), retain_graph=True)
    expected = unit.clone()
    unit.fill_(77.0)  # a caller may edit what it was given
    (tripled,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 4.0), retain_graph=True)
    torch.testing.assert_close(tripled, 4 * expected)
    tripled.zero_()
    (again,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    torch.testing.assert_close(again, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf, torch.ones_like(loss))


@dtypes
def test_gradients_accumulate_in_grad(backend: str, dtype: torch.dtype) -> None:
    leaf, loss = leaf_and_loss(backend, dtype, "mean")
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    once = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)


def test_the_schedule_may_step_between_forward_and_backward(backend: str) -> None:
    case = make_case(12, 40)
    for reduction in ("mean", "none"):
        q, weight = torch.tensor(0.7), torch.tensor(0.5)
        gradients = []
        for step in (False, True):
            leaf = case.logits.clone().requires_grad_()
            loss = dynamics_aware_loss(leaf, case.target, q, weight, reduction=reduction, backend=backend).sum()
            if step and backend != "eager":  # autograd itself refuses a changed input
                q.fill_(1.4)
                weight.fill_(1.0)
            loss.backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("size", [(12, 40), (64, 5000)], ids=["small", "large"])
@pytest.mark.parametrize("leaf_logits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_second_derivative_is_refused_aloud(
    fused: str, size: tuple[int, int], leaf_logits: bool, dtype: torch.dtype
) -> None:
    leaf = torch.randn(size, dtype=dtype).requires_grad_()
    logits = leaf if leaf_logits else leaf * 2
    loss = dynamics_aware_loss(logits, torch.zeros(size[0], dtype=torch.long), 0.7, 0.5, backend=fused)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match=r"second derivative.*eager"):
        gradient.square().sum().backward(retain_graph=True)
    # Also where the penalty reaches the leaf by another way, which would hide a missing part.
    with pytest.raises(RuntimeError, match=r"second derivative.*eager"):
        torch.autograd.grad((gradient * leaf).sum(), leaf)


def test_the_eager_backend_has_second_derivatives() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 3])
    assert torch.autograd.gradgradcheck(lambda z: dynamics_aware_loss(z, target, 1.2, 0.5, backend="eager"), (logits,))


@reductions
def test_without_grad_nothing_is_recorded(backend: str, reduction: str) -> None:
    case = make_case(12, 40)
    leaf = case.logits.clone().requires_grad_()
    recorded = dynamics_aware_loss(leaf, case.target, 0.7, 0.5, reduction=reduction, backend=backend)
    assert recorded.requires_grad
    with torch.no_grad():
        loss = dynamics_aware_loss(leaf, case.target, 0.7, 0.5, reduction=reduction, backend=backend)
    with torch.inference_mode():
        inferred = dynamics_aware_loss(leaf, case.target, 0.7, 0.5, reduction=reduction, backend=backend)
    plain = dynamics_aware_loss(case.logits, case.target, 0.7, 0.5, reduction=reduction, backend=backend)
    for value in (loss, inferred, plain):
        assert not value.requires_grad
        assert torch.equal(value, recorded.detach())


@dtypes
def test_the_input_is_left_alone(backend: str, dtype: torch.dtype) -> None:
    leaf, loss = leaf_and_loss(backend, dtype, "mean")
    before, version = leaf.detach().clone(), leaf._version
    (3 * loss).backward()
    assert torch.equal(leaf, before)
    assert leaf._version == version


@pytest.mark.parametrize("scale", [65536.0, 1024.0])
def test_float16_gradients_survive_a_grad_scaler(backend: str, scale: float) -> None:
    """Divided by N first, most float16 gradients would be 0 before the scale arrives."""
    case = make_case(4096, 100, torch.float16)
    leaf = case.logits.requires_grad_()
    (dynamics_aware_loss(leaf, case.target, 0.7, 0.5, backend=backend) * scale).backward()
    truth = case.logits.detach().double().requires_grad_()
    (dynamics_aware_loss(truth, case.target, 0.7, 0.5, backend="eager") * scale).backward()
    assert leaf.grad is not None
    assert truth.grad is not None
    error = (leaf.grad.double() - truth.grad).norm() / truth.grad.norm()
    assert error < 5e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_loss_is_float32(backend: str, dtype: torch.dtype) -> None:
    features, classifier = torch.randn(8, 16), torch.nn.Linear(16, 5)
    target = torch.randint(5, (8,))
    with torch.autocast("cpu", dtype=dtype):
        logits = classifier(features)
        assert logits.dtype == dtype
        loss = dynamics_aware_loss(logits, target, 0.7, 0.5, backend=backend)
    assert loss.dtype == torch.float32
    loss.backward()
    assert classifier.weight.grad is not None
    assert classifier.weight.grad.isfinite().all()


def test_statistics_are_detached_and_do_not_disturb_the_gradient(backend: str) -> None:
    case = make_case(12, 40)
    gradients = []
    for return_stats in (False, True):
        leaf = case.logits.clone().requires_grad_()
        result = dynamics_aware_loss(leaf, case.target, 0.7, 0.5, return_stats=return_stats, backend=backend)
        loss = result[0] if isinstance(result, tuple) else result
        if isinstance(result, tuple):
            assert not any(value.requires_grad for value in result[1])
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]


def per_row(z: Tensor, y: Tensor) -> Tensor:
    return dynamics_aware_loss(z, y, 0.7, 0.5)


TRANSFORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad": lambda z, y: torch.func.grad(lambda x: per_row(x, y))(z),
    "vmap": lambda z, y: torch.vmap(per_row)(z, y),
    "per-sample grad": lambda z, y: torch.vmap(torch.func.grad(per_row))(z, y),
    "jvp": lambda z, y: torch.func.jvp(lambda x: per_row(x, y), (z,), (torch.ones_like(z),))[1],
    "hessian": lambda z, y: torch.func.hessian(lambda x: per_row(x, y))(z),
}
EXPECTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad": lambda z, y: torch.autograd.functional.jacobian(lambda x: per_row(x, y), z),
    "vmap": lambda z, y: dynamics_aware_loss(z, y, 0.7, 0.5, reduction="none"),
    "per-sample grad": lambda z, y: 6 * torch.autograd.functional.jacobian(lambda x: per_row(x, y), z),
    "jvp": lambda z, y: torch.autograd.functional.jacobian(lambda x: per_row(x, y), z).sum(),
    "hessian": lambda z, y: torch.autograd.functional.hessian(
        lambda x: dynamics_aware_loss(x, y, 0.7, 0.5, backend="eager"), z
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_are_right_under_auto_and_refused_by_name(fused: str, name: str) -> None:
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    torch.testing.assert_close(TRANSFORMS[name](logits, target), EXPECTED[name](logits, target))
    with pytest.raises(RuntimeError, match="eager"):
        torch.func.grad(lambda x: dynamics_aware_loss(x, target, 0.7, 0.5, backend=fused))(logits)


def test_forward_mode_differentiation_is_not_lost(fused: str) -> None:
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
        tangent = torch.autograd.forward_ad.unpack_dual(dynamics_aware_loss(dual, target, 0.7, 0.5)).tangent
        with pytest.raises(RuntimeError, match="eager"):
            dynamics_aware_loss(dual, target, 0.7, 0.5, backend=fused)
    assert tangent is not None
    torch.testing.assert_close(tangent, EXPECTED["jvp"](logits, target))


@reductions
def test_batched_jacobians(fused: str, reduction: str) -> None:
    """vmap over the backward: there is no value of the upstream gradient to look at."""
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))

    def loss(z: Tensor) -> Tensor:
        return dynamics_aware_loss(z, target, 0.7, 0.5, reduction=reduction, backend=fused).reshape(-1)

    plain = torch.autograd.functional.jacobian(loss, logits)
    batched = torch.autograd.functional.jacobian(loss, logits, vectorize=True)
    torch.testing.assert_close(batched, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@bootstraps
def test_statistics_may_be_edited_before_the_backward(
    fused: str, dtype: torch.dtype, reduction: str, bootstrap: str
) -> None:
    gradients = []
    for edit in (False, True):
        case = make_case(12, 40, dtype)
        leaf = case.logits.requires_grad_()
        loss, stats = dynamics_aware_loss(
            leaf, case.target, 0.7, 0.5, reduction=reduction, bootstrap=bootstrap, return_stats=True, backend=fused
        )
        if edit:
            for value in stats:
                value.zero_()
        (3 * loss).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_edited_before_a_backward_that_needs_them_are_an_error(fused: str, reduction: str) -> None:
    leaf = torch.randn(6, 5, requires_grad=True)
    logits = leaf * 1.0
    loss = dynamics_aware_loss(logits, torch.zeros(6, dtype=torch.long), 0.7, reduction=reduction, backend=fused).sum()
    logits.detach().zero_()
    if reduction == "mean":
        loss.backward()  # the gradient is written already
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
