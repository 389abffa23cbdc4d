"""Every loss of the family by the CUDA C++ kernels, under the executor of their PTX: test_cuda.py says what that is."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cuda_emulator
from dal_kernels import ops
from dal_kernels.objective import Objective
from dal_kernels.objectives import OBJECTIVES
from support.axes import objectives
from support.family import KNOBS
from support.family_truth import hold
from support.marks import needs_emulator
from support.truth import LOSS_SLACK, Case, make_case

pytestmark = [pytest.mark.usefixtures("ptx"), needs_emulator]

WIDE = [objective for objective in OBJECTIVES if objective.is_wide]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def check_loss_of(objective: Objective, knobs: tuple[float | torch.Tensor, ...], case: Case) -> None:
    hold(objective, knobs, case.logits, case.target, "cuda", **case.options)


def varied(objective: Objective, rows: int) -> tuple[torch.Tensor, ...]:
    """Knobs that differ by row, from half of what is usual to that; whole ones rounded up."""
    values = [torch.linspace(0.5, 1.0, rows, dtype=torch.float64) * value for value in KNOBS[objective.name]]
    return tuple(value.ceil() if knob.whole else value for knob, value in zip(objective.knobs, values, strict=True))


@pytest.mark.sampled(7)
@dtypes
@pytest.mark.parametrize("shape", [(40, 10), (9, 100), (9, 1000), (3, 20_011)], ids=str)
@objectives
def test_every_loss_matches_its_formula(objective: Objective, shape: tuple[int, int], dtype: torch.dtype) -> None:
    mean = make_case(*shape, dtype, ignore_index=1, reduction="mean")
    mean.target[-1] = 1
    mean.target[0] = mean.logits[0].argmax()
    by_row = make_case(*shape, dtype, seed=1, reduction="none")
    with cuda_emulator.installed():
        check_loss_of(objective, KNOBS[objective.name], mean)
        check_loss_of(objective, varied(objective, shape[0]), by_row)


@pytest.mark.sampled(5)
@dtypes
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("objective", WIDE, ids=lambda objective: objective.name)
def test_few_long_rows_of_losses_over_all_classes_are_shared(
    objective: Objective, reduction: str, dtype: torch.dtype
) -> None:
    case = make_case(2, 40_001, dtype, reduction=reduction)
    case.target[1] = case.logits[1].argmax()
    with cuda_emulator.installed() as launches:
        check_loss_of(objective, KNOBS[objective.name], case)
    assert [launch.name.rsplit("_", 1)[0] for launch in launches] == ["dal_split_rows_wide", "dal_gradient_wide"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_all_classes_move_with_the_largest_logit(dtype: torch.dtype, masked: bool) -> None:
    """Rising logits, so many that a thread reads twice, whose first are far below the last; ``masked``: at -inf."""
    classes = 20_011
    case = make_case(3, classes, dtype, reduction="none")
    rising = torch.linspace(-500.0, 0.0, classes) + torch.tensor([[0.0], [300.0], [-300.0]])
    case.logits[:] = rising.to(dtype)
    case.target[:] = classes - 1
    if masked:
        case.logits[:, : classes // 2] = -torch.inf
    with cuda_emulator.installed():
        for objective in WIDE:
            # Label smoothing of a class that cannot be is infinite.
            if not (masked and objective.name == "smoothed_cross_entropy"):
                check_loss_of(objective, KNOBS[objective.name], case)


def test_a_forward_refuses_to_write_the_gradient_of_a_loss_over_all_classes() -> None:
    logits, knobs = torch.randn(3, 4), torch.empty(0)
    brier = next(objective.id for objective in OBJECTIVES if objective.name == "brier")
    with cuda_emulator.installed(), pytest.raises(ValueError, match="it is made from the fields"):
        ops.KERNELS["cuda"].loss(logits, torch.arange(3), knobs, None, brier, -100, 1, True)


@dtypes
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(40, 1), (40, 10), (5, 1001), (2, 20_011)], ids=str)
def test_statistics_are_those_of_the_cpu(shape: tuple[int, int], wide: bool, dtype: torch.dtype) -> None:
    logits = make_case(shape[0], shape[1] + 3, dtype).logits[:, 3:]
    logits[1] = -torch.inf
    with cuda_emulator.installed():
        sums, argmax = ops.KERNELS["cuda"].statistics(logits, True, wide)
        again, nothing = ops.KERNELS["cuda"].statistics(logits, False, wide)
    expected, largest = ops.KERNELS["cpu"].statistics(logits, True, wide)
    assert torch.equal(again, sums)
    assert nothing.numel() == 0
    assert torch.equal(argmax, largest)
    tolerance = LOSS_SLACK[dtype]
    torch.testing.assert_close(sums, expected, rtol=tolerance, atol=tolerance)
