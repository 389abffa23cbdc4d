"""What a call may look like: one clear error for each thing that is wrong, the same with and without kernels."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dal_kernels import DynamicsAwareLoss, dynamics_aware_loss, knobs, reference
from support.axes import bootstraps, reductions

# Both ways, because one of them hands what is wrong to the other.
pytestmark = pytest.mark.usefixtures("way")

N, C = 4, 5
LOGITS = torch.linspace(-2, 3, N * C).sin().mul(3).reshape(N, C)
DENSE = torch.linspace(-2, 3, N * C * 6).sin().mul(3).reshape(N, C, 2, 3)
TARGET = torch.tensor([1, 0, 4, 2])
DENSE_TARGET = torch.arange(N * 6).remainder(C).reshape(N, 2, 3)
SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]

LOSSES = {
    "auto": dynamics_aware_loss,
    "eager": functools.partial(dynamics_aware_loss, backend="eager"),
    "reference": reference.dynamics_aware_loss,
}
everywhere = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)


def call(loss_of: Callable[..., Any], **changes: Any) -> Any:
    arguments = {"input": LOGITS.clone().requires_grad_(), "target": TARGET, "q": 0.7, "bootstrap_weight": 0.4}
    return loss_of(**{**arguments, **changes})


def rows(**entries: float) -> Tensor:
    """One value a row: 0.5, but for the given entries (``row2=...``)."""
    return torch.tensor([entries.get(f"row{row}", 0.5) for row in range(N)])


def schedule_values(name: str) -> list[tuple[dict[str, Any], type[Exception], str]]:
    """What is wrong with q is wrong with bootstrap_weight."""
    bad: list[tuple[Any, type[Exception], str]] = [
        (-0.1, ValueError, r"got -0\.1"),
        (math.nan, ValueError, "got nan"),
        (math.inf, ValueError, "got inf"),
        (10**400, ValueError, "be finite"),
        (1e-40, ValueError, "be 0 or at least 1.18e-38, float32's smallest normal number, got 1e-40"),
        (rows(row1=1e-40), ValueError, "be 0 or at least 1.18e-38, .* row 1"),
        (torch.tensor(-0.5), ValueError, r"got -0\.5"),
        (torch.tensor(math.nan), ValueError, "got nan"),
        (torch.tensor(math.inf), ValueError, "got inf"),
        (rows(row2=-0.5), ValueError, r"got -0\.5.* row 2"),
        (rows(row3=math.nan), ValueError, "got nan.* row 3"),
        (rows(row0=math.inf).double(), ValueError, "got inf.* row 0"),
        ("0.7", TypeError, "got str"),
        (True, TypeError, "got bool"),
        (None, TypeError, "got NoneType"),
        ([0.7] * N, TypeError, "got list"),
        (1j, TypeError, "got complex"),
        (torch.tensor(1), TypeError, "got torch.int64"),
        (torch.tensor(True), TypeError, "got torch.bool"),
        (torch.tensor(0.7, requires_grad=True), ValueError, "not require grad, got"),
        (torch.ones(N + 1), ValueError, r"got shape \(5,\)"),
        (torch.ones(N, C), ValueError, r"got shape \(4, 5\)"),
    ]
    return [({name: value}, error, f"^{name} must .*{message}") for value, error, message in bad]


def labels(row: int, label: int, dtype: torch.dtype = torch.int64, **more: Any) -> tuple[Any, type[Exception], str]:
    target = TARGET.tolist()
    target[row] = label
    ignore_index = more.get("ignore_index", -100)
    message = rf"^target at row {row} is {label}, .*0 to {C - 1} .*ignore_index {ignore_index}$"
    return {"target": torch.tensor(target, dtype=dtype), **more}, ValueError, message


CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": LOGITS.tolist()}, TypeError, "^input .*got list"),
    ({"input": LOGITS.long()}, TypeError, "^input .*got torch.int64"),
    ({"input": torch.tensor(1.0), "target": torch.tensor(0)}, ValueError, "^input .*got a 0-d"),
    ({"input": torch.zeros(N, 0)}, ValueError, r"^input .*class.*got shape \(4, 0\)"),
    ({"input": torch.zeros(0), "target": torch.tensor(0)}, ValueError, r"^input .*class.*got shape \(0,\)"),
    ({"target": TARGET.tolist()}, TypeError, "^target .*got list"),
    ({"target": TARGET.bool()}, TypeError, "^target .*got torch.bool"),
    ({"target": TARGET.float()}, TypeError, "^target .*got torch.float32.*class probabilities.*shape of input"),
    ({"target": TARGET[:3]}, ValueError, r"^target .*\(4,\).*\(4, 5\).*got \(3,\)"),
    ({"target": TARGET[:, None]}, ValueError, r"^target .*got \(4, 1\)"),
    ({"target": torch.tensor(1)}, ValueError, r"^target .*got \(\)"),
    ({"input": LOGITS[0], "target": TARGET[:1]}, ValueError, r"^target .*shape \(\) .*got \(1,\)"),
    ({"input": DENSE, "target": TARGET}, ValueError, r"^target .*\(4, 2, 3\).*got \(4,\)"),
    ({"input": DENSE, "target": DENSE_TARGET.mT}, ValueError, r"^target .*\(4, 2, 3\).*got \(4, 3, 2\)"),
    ({"input": DENSE, "target": DENSE_TARGET, "q": torch.ones(2)}, ValueError, r"^q .*\(4, 2, 3\).*got .*\(2,\)"),
    ({"target": TARGET.to("meta")}, ValueError, "^target .*device of input, cpu, got meta"),
    ({"q": rows().to("meta")}, ValueError, "^q .*device of input, cpu, got meta"),
    ({"weight": torch.ones(C, device="meta")}, ValueError, "^weight .*device of input, cpu, got meta"),
    *schedule_values("q"),
    *schedule_values("bootstrap_weight"),
    ({"q": 0}, ValueError, r"^q .*bootstrap_weight.*got q = 0 and bootstrap_weight = 0\.4"),
    ({"q": 0, "bootstrap_weight": torch.tensor(0.4)}, ValueError, "^q .*bootstrap_weight.*got .*0"),
    ({"q": torch.tensor(0.0)}, ValueError, "^q .*bootstrap_weight.*got .*0"),
    ({"q": rows(row1=0)}, ValueError, "^q .*bootstrap_weight.*got .*0.* row 1"),
    ({"q": 0.0, "bootstrap_weight": rows(row0=0, row1=0)}, ValueError, "^q .*bootstrap_weight.*got .*0.* row 2"),
    ({"weight": [1.0] * C}, TypeError, "^weight .*got list"),
    ({"weight": torch.ones(C, dtype=torch.int64)}, TypeError, "^weight .*got torch.int64"),
    ({"weight": torch.ones(C, requires_grad=True)}, ValueError, "^weight .*require.*got"),
    *[
        ({"weight": torch.ones(shape)}, ValueError, rf"^weight .*\(5,\).*got shape \({got}\)")
        for shape, got in [((N,), "4,"), ((C, 1), "5, 1"), ((), "")]
    ],
    *[
        ({"ignore_index": value}, TypeError, f"^ignore_index .*got {got}")
        for value, got in [(1.0, "float"), ("1", "str"), (None, "NoneType"), (torch.tensor(1), "Tensor")]
    ],
    ({"ignore_index": 2**63}, ValueError, "^ignore_index .*got 9223372036854775808"),
    *[({"reduction": value}, ValueError, f"^reduction .*got {value!r}") for value in ("avg", "MEAN", "", None)],
    *[({"bootstrap": value}, ValueError, f"^bootstrap .*got {value!r}") for value in ("medium", "", None)],
    ({"input": DENSE, "target": DENSE_TARGET + 1}, ValueError, f"^target at row 4 is {C}, accepted"),
    labels(0, C),
    labels(3, -1),
    labels(2, 10**12),
    labels(1, -100, ignore_index=-1),
    labels(1, -1, ignore_index=2),
    labels(3, C, ignore_index=1),
    labels(1, 255, torch.uint8, ignore_index=-1),
    # As int64 this one would be -100.
    ({"target": torch.tensor([1, 0, 2**64 - 100, 2], dtype=torch.uint64)}, ValueError, "^target at row 2 is "),
]


@everywhere
@pytest.mark.parametrize(("changes", "error", "message"), CALLS, ids=[message[:40] for _, _, message in CALLS])
def test_bad_call_is_one_clear_error_and_nothing_is_half_done(
    loss_of: Callable[..., Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    input = changes.get("input", LOGITS)
    if isinstance(input, Tensor):
        input = input.clone()
        if input.is_floating_point():
            input.requires_grad_()
    given = {"target": TARGET, "q": 0.7, **changes, "input": input}
    before = {name: value.detach().clone() for name, value in given.items() if isinstance(value, Tensor)}
    with pytest.raises(error, match=message) as caught:
        call(loss_of, **given)
    assert "\n" not in str(caught.value)
    for name, value in before.items():
        assert given[name].grad is None
        torch.testing.assert_close(given[name].detach(), value, rtol=0, atol=0, equal_nan=True)


@everywhere
@pytest.mark.parametrize("name", ["q", "bootstrap_weight"])
def test_one_bad_row_of_many_makes_a_short_message(loss_of: Callable[..., Any], name: str) -> None:
    value = torch.full((2000,), 0.5)
    value[1234] = -1
    with pytest.raises(ValueError, match=f"^{name} .*row 1234") as caught:
        call(loss_of, input=torch.zeros(2000, C), target=torch.zeros(2000).long(), **{name: value})
    assert len(str(caught.value)) < 200


@everywhere
@pytest.mark.parametrize("ignore_index", [-1, -100, 2, C, 200])
def test_rows_with_ignore_index_count_for_nothing(loss_of: Callable[..., Any], ignore_index: int) -> None:
    target = torch.tensor([1, ignore_index, 4, ignore_index])
    input = LOGITS.clone()
    input[1] = math.nan  # a row nobody looks at
    input.requires_grad_()
    loss = call(loss_of, input=input, target=target, ignore_index=ignore_index)
    torch.testing.assert_close(loss, call(loss_of, input=LOGITS[::2], target=target[::2]))
    loss.backward()
    assert input.grad is not None
    assert input.grad[1::2].eq(0).all()
    assert input.grad[::2].ne(0).all()


def value_and_gradient(loss_of: Callable[..., Any], **changes: Any) -> tuple[Tensor, Tensor]:
    input = changes.pop("input", LOGITS).clone().requires_grad_()
    loss = call(loss_of, input=input, **changes)
    (gradient,) = torch.autograd.grad(loss, input, torch.linspace(1, 2, loss.numel()).reshape(loss.shape))
    return loss.detach(), gradient


def assert_same(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(left, right, **(tolerance or {"rtol": 0, "atol": 0}))


@everywhere
@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED, ids=str)
def test_labels_of_any_integer_dtype_give_the_same(loss_of: Callable[..., Any], dtype: torch.dtype) -> None:
    same = value_and_gradient(loss_of, reduction="none")
    assert_same(value_and_gradient(loss_of, target=TARGET.to(dtype), reduction="none"), same)


# 0.75 and 0.5 have no rounding in any of these dtypes; a whole number is exact as an int.
FORMS: dict[str, Callable[[float], Any]] = {
    "float32 0-d": torch.tensor,
    "float64 0-d": lambda v: torch.tensor(v, dtype=torch.float64),
    "float16 0-d": lambda v: torch.tensor(v, dtype=torch.float16),
    "(1,)": lambda v: torch.tensor([v]),
    "(N,)": lambda v: torch.full((N,), v),
    "(N,) float64": lambda v: torch.full((N,), v, dtype=torch.float64),
    "(N,) bfloat16": lambda v: torch.full((N,), v, dtype=torch.bfloat16),
    "(N,) strided": lambda v: torch.full((2 * N,), v)[::2],
    "(N,) expanded": lambda v: torch.tensor(v).expand(N),
    "int": int,
}


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["q", "bootstrap_weight"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("input", [LOGITS, DENSE], ids=["(N,C)", "(N,C,d)"])
def test_every_form_of_a_schedule_value_means_the_same(
    loss_of: Callable[..., Any], input: Tensor, form: str, name: str, dtype: torch.dtype
) -> None:
    value = 1.0 if form == "int" else 0.75
    shape = {"input": input.to(dtype), "target": TARGET if input is LOGITS else DENSE_TARGET, "reduction": "none"}
    same = value_and_gradient(loss_of, **shape, **{name: value})
    assert_same(value_and_gradient(loss_of, **shape, **{name: FORMS[form](value)}), same)


@everywhere
def test_values_differ_row_by_row(loss_of: Callable[..., Any]) -> None:
    q, bootstrap_weight = torch.linspace(0.25, 1.5, N * 6), torch.linspace(0, 1, N * 6)
    dense = q.reshape(N, 2, 3), bootstrap_weight.reshape(N, 2, 3)
    shaped = call(loss_of, input=DENSE, target=DENSE_TARGET, q=dense[0], bootstrap_weight=dense[1], reduction="none")
    by_row = call(loss_of, input=DENSE, target=DENSE_TARGET, q=q[:N], bootstrap_weight=dense[1], reduction="none")
    for n, i, j in itertools.product(range(N), range(2), range(3)):
        one = functools.partial(call, loss_of, input=DENSE[n, :, i, j], target=DENSE_TARGET[n, i, j])
        torch.testing.assert_close(shaped[n, i, j], one(q=dense[0][n, i, j], bootstrap_weight=dense[1][n, i, j]))
        torch.testing.assert_close(by_row[n, i, j], one(q=q[n].item(), bootstrap_weight=dense[1][n, i, j].item()))


@everywhere
@reductions
@pytest.mark.parametrize(
    ("shape", "ignored"),
    [((0, C), False), ((0, C, 2), False), ((N, C, 0), False), ((N, C), True), ((C,), True)],
    ids=str,
)
def test_nothing_to_learn_from_is_as_in_cross_entropy(
    loss_of: Callable[..., Any], shape: tuple[int, ...], ignored: bool, reduction: str
) -> None:
    target = torch.full(shape[2:] if len(shape) == 1 else (shape[0], *shape[2:]), -100)
    input, plain = torch.ones(shape, requires_grad=True), torch.ones(shape, requires_grad=True)
    loss = call(loss_of, input=input, target=target, reduction=reduction)
    truth = F.cross_entropy(plain, target, reduction=reduction)
    torch.testing.assert_close(loss, truth, rtol=0, atol=0, equal_nan=True)
    assert loss.isnan().all().item() == (reduction == "mean" or loss.numel() == 0)
    loss.sum().backward()
    assert input.grad is not None
    assert torch.equal(input.grad, torch.zeros(shape))


@pytest.mark.parametrize("q", [1e39, 1e308, torch.tensor(1e39, dtype=torch.float64)], ids=str)
def test_a_q_that_float32_cannot_hold_is_a_value_error(q: float | Tensor) -> None:
    with pytest.raises(ValueError, match="q must be finite"):
        dynamics_aware_loss(LOGITS, TARGET, q)


def test_a_ramp_from_zero_is_zero_where_float32_has_few_digits() -> None:
    logits = LOGITS.clone().requires_grad_()
    criterion = DynamicsAwareLoss(0.0, 1.5, total_steps=1, pace="fixed", backend="eager")
    criterion.step(1e-40)
    (gradient,) = torch.autograd.grad(criterion(logits, TARGET), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, TARGET), logits)
    torch.testing.assert_close(gradient, expected)


@everywhere
def test_a_q_that_becomes_zero_in_float32_is_refused_with_a_bootstrap(loss_of: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="q must be > 0"):
        loss_of(LOGITS, TARGET, torch.tensor(1e-50, dtype=torch.float64), 0.5)


def test_numbers_are_checked_at_their_first_call_only(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To check them takes as long as the kernel at classifier sizes; what is equal but no number is still refused."""
    checked: list[Any] = []
    plain = knobs._check_number
    monkeypatch.setattr(knobs, "_check_number", lambda *given: (checked.append(given[1]), plain(*given)))
    q = 0.734 if way == "short way" else 0.735
    for _ in range(3):
        call(dynamics_aware_loss, q=q, bootstrap_weight=1)
    assert checked == [q, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"q must be finite and >= 0, got -0\.734"):
            call(dynamics_aware_loss, q=-0.734)
        with pytest.raises(TypeError, match=r"bootstrap_weight must be a number or .* got Decimal"):
            call(dynamics_aware_loss, q=0.734, bootstrap_weight=Decimal(1))


@bootstraps
@reductions
@pytest.mark.parametrize("backend", ["auto", "cpu", "eager"])
def test_every_backend_gives_what_the_reference_gives(backend: str, reduction: str, bootstrap: str) -> None:
    options = {"reduction": reduction, "bootstrap": bootstrap, "weight": torch.arange(1.0, C + 1), "ignore_index": 4}
    truth = value_and_gradient(reference.dynamics_aware_loss, **options)
    assert_same(value_and_gradient(dynamics_aware_loss, backend=backend, **options), truth, rtol=1e-5, atol=1e-6)
