"""A loss is added as CONTRIBUTING says, to a copy of the sources: one formula, and one function a language."""

from __future__ import annotations

from pathlib import Path

from support.compiling import compile_object, needs_compiler
from support.marks import needs_executor
from support.mutants import BY_EXECUTOR, run_cpu_tests, run_triton_tests, tree

__all__ = ["tree"]

TOY = "tests/losses/test_toy.py"

ADDED = {
    "dal_kernels/objectives.py": [
        (
            "\n\ndef dynamics_aware_of(",
            """
\n
@register("squared_miss", Knob("power"))
def squared_miss(row: RowQuantities, power: Tensor) -> Tensor:
    return power * row.miss**2
\n
def dynamics_aware_of(""",
        )
    ],
    "csrc/objective.h": [
        ("  kEpsilonSoftmax,\n", "  kEpsilonSoftmax,\n  kSquaredMiss,\n"),
        (
            "    case kEpsilonSoftmax: slopes =",
            """    case kSquaredMiss: {
      const A prob = exponential(log_prob), miss = miss_of(log_prob, prob);
      slopes.loss = knobs[0] * miss * miss;
      slopes.by_log_prob = -2 * knobs[0] * miss * prob;
      break;
    }
    case kEpsilonSoftmax: slopes =""",
        ),
    ],
    "dal_kernels/backends/triton/objectives.py": [
        (
            "\n\n# By the ids of the table",
            """
\n
@triton.jit
def squared_miss(row, knobs, LOG_CLASSES: tl.constexpr):
    prob, miss = target_of(row)
    return Slopes(knobs[0] * miss * miss, -2.0 * knobs[0] * miss * prob)
\n
# By the ids of the table""",
        )
    ],
}

TEST = """
import pytest
import torch

from dal_kernels import LinearLoss
from dal_kernels.losses.base import RobustLoss
from dal_kernels.objectives import OBJECTIVES


class SquaredMissLoss(RobustLoss):
    def __init__(self, power=2.0, **options):
        super().__init__({"power": power}, **options)

    def bind(self, power):
        return OBJECTIVES[-1], (power,)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_is_its_formula(fused, reduction):
    logits, target = torch.randn(9, 50, requires_grad=True), torch.randint(50, (9,))
    p = logits.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    expected = 2 * (1 - p) ** 2
    expected = expected.mean() if reduction == "mean" else expected
    found = SquaredMissLoss(backend=fused, reduction=reduction)(logits, target)
    torch.testing.assert_close(found, expected)
    upstream = torch.rand_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, upstream) for loss in (found, expected)))


def test_it_has_the_linear_form(fused):
    form = LinearLoss(SquaredMissLoss(backend=fused), 6, 50)
    features, target = torch.randn(9, 6), torch.randint(50, (9,))
    torch.testing.assert_close(form(features, target), form.loss(form.classifier(features), target))
"""


def add_loss(tree: Path) -> None:
    for name, changes in ADDED.items():
        path = tree / name
        if not path.exists():
            continue
        text = path.read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"the source moved: {old}"
            text = text.replace(old, new)
        path.write_text(text)
    (tree / TOY).write_text(TEST)


@needs_compiler
def test_a_new_loss_runs_on_the_cpu(tree: Path) -> None:
    add_loss(tree)
    compile_object(tree / "csrc/cpu/bindings.cpp", tree / "bindings.o")  # which knows how many losses there are
    result = run_cpu_tests(tree, TOY)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "3 passed" in result.stdout


@needs_executor
def test_a_new_loss_runs_by_triton(tmp_path: Path) -> None:
    result = run_triton_tests("triton", (TOY,), tmp_path, add_loss, **BY_EXECUTOR)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "3 passed" in result.stdout
