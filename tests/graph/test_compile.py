"""torch.compile, fake tensors and the operator registrations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dal_kernels import dynamics_aware_loss
from dal_kernels.objective import Objective
from dal_kernels.objectives import dynamics_aware, dynamics_aware_hard, normalized_and_absolute
from dal_kernels.ops import KERNELS
from dal_kernels.surroundings import constant_in_graphs, outside_of_graphs
from support.axes import dtypes
from support.children import printed_by
from support.truth import make_case


def step(loss_of: Any, logits: Tensor, target: Tensor, q: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = loss_of(leaf, target, q, weight)
    loss.sum().mul(2.0).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@dtypes
def test_one_graph_and_one_compilation_while_the_schedule_moves(
    backend: str, reduction: str, dtype: torch.dtype
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    case = make_case(8, 10, dtype)

    def loss_of(logits: Tensor, target: Tensor, q: Tensor, weight: Tensor) -> Tensor:
        return dynamics_aware_loss(logits * 1.5, target, q, weight, reduction=reduction, backend=backend)

    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    q, weight = torch.tensor(0.6), torch.tensor(0.0)
    for value in (0.6, 0.9, 1.2, 1.5):
        q.fill_(value)
        weight.fill_(max(0.0, value - 1.0))
        got, true = (step(f, case.logits, case.target, q, weight) for f in (compiled, loss_of))
        tolerance = {} if dtype not in (torch.bfloat16, torch.float16) else {"rtol": 1e-2, "atol": 1e-4}
        torch.testing.assert_close(got, true, **tolerance)
    assert counter.frame_count == 1


def test_the_compiler_is_not_imported_with_the_package() -> None:
    """It takes four times as long as the package, and most trainings never compile."""
    program = "import sys, torch; before = set(sys.modules); import dal_kernels; print(*set(sys.modules) - before)"
    loaded = printed_by("-c", program).split()
    assert "dal_kernels" in loaded
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor", "sympy"))]


def test_what_is_constant_in_graphs_is_marked_as_torch_marks_it() -> None:
    marked, torchs = constant_in_graphs(lambda: 0), torch.compiler.assume_constant_result(lambda: 0)
    assert vars(marked) == vars(torchs) != {}


def test_what_stays_outside_of_graphs_is_not_compiled_and_says_why() -> None:
    compiling = []

    def told(value: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return value + len(compiling)

    outside = outside_of_graphs(told, "it counts its calls")
    whole = torch.compile(lambda value: outside(2 * value), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="it counts its calls"):
        whole(torch.ones(2))
    assert compiling == []
    broken = torch.compile(lambda value: 3 * outside(2 * value), backend="eager")
    assert [broken(torch.ones(1)).item() for _ in range(3)] == [9.0, 12.0, 15.0]
    assert outside(torch.ones(1)).item() == 5
    assert compiling == [False] * 4


def test_a_python_number_may_change_between_compiled_calls(backend: str) -> None:
    case = make_case(8, 10)

    def loss_of(q: float) -> Tensor:
        return dynamics_aware_loss(case.logits, case.target, q, 0.5, backend=backend)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for q in (0.5, 0.6, 0.7, 0.9):
        torch.testing.assert_close(compiled(q), loss_of(q))


def test_inductor_runs_a_training_step(backend: str) -> None:
    torch.manual_seed(0)
    classifier = torch.nn.Linear(16, 12)
    features, target = torch.randn(32, 16), torch.randint(12, (32,))

    def loss_of(features: Tensor, target: Tensor, q: Tensor, weight: Tensor) -> Tensor:
        return dynamics_aware_loss(classifier(features), target, q, weight, backend=backend)

    q, weight = torch.tensor(1.2), torch.tensor(0.4)
    compiled = torch.compile(loss_of, fullgraph=True)
    gradients = []
    for f in (loss_of, compiled):
        classifier.zero_grad()
        f(features, target, q, weight).backward()
        gradients.append(classifier.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_statistics_come_out_of_a_compiled_call(backend: str) -> None:
    case = make_case(8, 10)

    def loss_of(logits: Tensor) -> Any:
        return dynamics_aware_loss(logits, case.target, 0.7, 0.5, return_stats=True, backend=backend)

    torch.testing.assert_close(
        torch.compile(loss_of, fullgraph=True, backend="aot_eager")(case.logits), loss_of(case.logits)
    )


def test_a_bad_label_is_an_error_or_nan_in_a_compiled_call(fused: str) -> None:
    case = make_case(8, 10)
    case.target[3] = 77
    compiled = torch.compile(
        lambda z, y: dynamics_aware_loss(z, y, 0.7, 0.5, backend=fused), fullgraph=True, backend="aot_eager"
    )
    if fused == "cpu":
        with pytest.raises((ValueError, RuntimeError), match="target at row 3 is 77"):
            compiled(case.logits, case.target)
    else:  # to look at a label on a GPU would be to wait for it
        assert compiled(case.logits, case.target).isnan()


# A narrow objective, one with a term at the predicted class, and a wide one; each has two knobs.
objectives = pytest.mark.parametrize(
    "objective", [dynamics_aware, dynamics_aware_hard, normalized_and_absolute], ids=lambda objective: objective.name
)


def loss_arguments(dtype: torch.dtype, reduction: int, objective: Objective) -> tuple[Any, ...]:
    case = make_case(6, 9, dtype)
    weight = torch.rand(9, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    knobs = torch.stack([torch.full((6,), 1.2), torch.rand(6)], 1)
    return case.logits, case.target, knobs, weight, objective.id, -100, reduction


@pytest.mark.sampled(5)
@dtypes
@pytest.mark.parametrize("reduction", [0, 1, 2])
@objectives
def test_opcheck(fused: str, dtype: torch.dtype, reduction: int, objective: Objective) -> None:
    kernels = KERNELS[fused]
    arguments = loss_arguments(dtype, reduction, objective)
    hard = objective.needs_argmax
    for want_gradient in (False, True) if kernels.writes_gradient(arguments[0], objective.id) else (False,):
        torch.library.opcheck(kernels.loss, (*arguments, want_gradient))
        torch.library.opcheck(kernels.loss_and_fields, (*arguments, want_gradient, hard))
    _, _, fields, prediction, *correction = kernels.loss_and_fields(*arguments, False, hard)
    upstream = torch.rand(6 if reduction == 0 else (), dtype=fields.dtype)
    torch.library.opcheck(kernels.statistics, (arguments[0], hard, objective.is_wide))
    torch.library.opcheck(kernels.gradient, (*arguments[:2], fields, prediction, upstream, -100, *correction))


@dtypes
def test_opcheck_of_losses_of_ones_own(dtype: torch.dtype) -> None:
    if "cpu" not in KERNELS:
        pytest.skip("the CPU kernels are not built")
    kernels, case = KERNELS["cpu"], make_case(6, 9, dtype)
    targets = torch.stack([case.target, case.target.roll(1)])
    torch.library.opcheck(kernels.quantities, (case.logits, targets, -100))
    log_prob, entropy, _, _, _, argmax, sums = kernels.quantities(case.logits, targets, -100)
    one = torch.ones((), dtype=entropy.dtype)  # expanded, as the gradient of a sum
    slopes = (one.expand(log_prob.shape), None, one.expand(entropy.shape), torch.rand_like(entropy), None)
    torch.library.opcheck(kernels.gradient_of_slopes, (case.logits, targets, -100, argmax, sums, *slopes))


# torch 2.15 hands on a ValueError of an operator as a RuntimeError.
REFUSED = (ValueError, RuntimeError)


@pytest.mark.parametrize(
    ("index", "value", "match"),
    [
        (0, torch.zeros(6, 9, dtype=torch.int32), "logits must be"),
        (0, torch.zeros(6), "logits must be"),
        (1, torch.zeros(5, dtype=torch.long), "target must be"),
        (1, torch.zeros(6, dtype=torch.int32), "target must be"),
        (2, torch.zeros(5, 2), "knobs must be"),
        (2, torch.zeros(6, 3), "knobs must be"),
        (2, torch.zeros(1), "knobs must be"),
        (2, torch.zeros(2, dtype=torch.int64), "knobs must be"),
        (3, torch.zeros(8), "weight must be"),
        (3, torch.zeros(9, dtype=torch.float64), "weight must be"),
        (4, 99, "objective must be"),
        (4, -1, "objective must be"),
        (6, 7, "reduction must be"),
    ],
)
def test_the_raw_operator_refuses_what_it_cannot_read(fused: str, index: int, value: object, match: str) -> None:
    """The public function checks first; the operator must be memory-safe by itself."""
    arguments: list[Any] = [*loss_arguments(torch.float32, 1, dynamics_aware), True]
    KERNELS[fused].loss(*arguments)
    arguments[index] = value
    with pytest.raises(REFUSED, match=match):
        KERNELS[fused].loss(*arguments)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (2, torch.zeros(7, 1)),
        (2, torch.zeros(0)),
        (2, torch.zeros(6, 7).T),
        (3, torch.zeros(5, dtype=torch.long)),
        (3, torch.zeros(6, dtype=torch.int32)),
        (3, torch.zeros(12, dtype=torch.long)[::2]),
        (4, torch.zeros(5)),
        (4, torch.zeros(6, dtype=torch.float64)),
    ],
)
def test_the_raw_gradient_refuses_what_it_cannot_read(fused: str, index: int, value: Tensor) -> None:
    case = make_case(6, 9)
    arguments = [case.logits, case.target, torch.zeros(7, 6), torch.zeros(6, dtype=torch.long), torch.ones(6), -100]
    if fused != "cpu":
        arguments.append(torch.ones(()))  # the correction
    KERNELS[fused].gradient(*arguments)
    arguments[index] = value
    with pytest.raises(REFUSED, match=r"(fields|prediction|upstream) .*must be"):
        KERNELS[fused].gradient(*arguments)


def test_an_exported_program_keeps_the_operator(fused: str) -> None:
    class Criterion(torch.nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return dynamics_aware_loss(logits, target, 0.7, 0.5)

    case = make_case(6, 9)
    program = torch.export.export(Criterion(), (case.logits, case.target))
    assert "dal_kernels.fused_loss" in str(program.graph)
    torch.testing.assert_close(
        program.module()(case.logits, case.target), dynamics_aware_loss(case.logits, case.target, 0.7, 0.5)
    )
