"""What a loss of the family may be asked for beside its knobs: each option against its definition."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dal_kernels
from dal_kernels import (
    CrossEntropyLoss,
    DynamicsAwareLoss,
    GeneralizedCrossEntropyLoss,
    LabelDistributionAwareMarginLoss,
    LinearLoss,
    Ramp,
    SymmetricCrossEntropyLoss,
    cross_entropy_loss,
    dynamics_aware_loss,
    generalized_cross_entropy_loss,
    label_distribution_aware_margin_loss,
    linear_row_statistics,
    row_statistics,
)
from dal_kernels.functional import loss_of
from dal_kernels.losses.base import RobustLoss
from dal_kernels.objective import Objective
from dal_kernels.objectives import OBJECTIVES, row_statistics_of
from dal_kernels.variations import varied_loss
from support.axes import objectives
from support.children import SUPPORT, printed_by
from support.family import FAMILY, KNOBS, gradient_of, module_of, rows_of


def close(found: Tensor, expected: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.linspace(0.5, 2.0, found.numel(), dtype=found.dtype).reshape(found.shape)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, upstream),
        torch.autograd.grad(expected, logits, upstream),
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_cross_entropy_is_torchs(backend: str) -> None:
    """In a process of its own, because torch's samples freeze torch's flags where they are imported."""
    pytest.importorskip("expecttest", reason="torch's samples need it")
    assert int(printed_by(SUPPORT / "torch_samples.py", backend)) > 20


@objectives
def test_smoothed_labels_are_a_mixture_with_the_uniform_one(backend: str, objective: Objective) -> None:
    logits, target = rows_of(8, 6)
    logits.requires_grad_()
    knobs, classes, share = KNOBS[objective.name], 6, 0.2
    if not objective.affine:
        with pytest.raises(ValueError, match="label_smoothing must be 0"):
            varied_loss(objective, knobs, logits, target, label_smoothing=share)
        return
    of_classes = [
        loss_of(objective.id, knobs, logits, torch.full_like(target, k), reduction="none", backend="eager")
        for k in range(classes)
    ]
    own = loss_of(objective.id, knobs, logits, target, reduction="none", backend="eager")
    expected = (1 - share) * own + share / classes * torch.stack(of_classes).sum(0)
    found = varied_loss(objective, knobs, logits, target, label_smoothing=share, reduction="none", backend=backend)
    close(found, expected, logits)


@objectives
@pytest.mark.parametrize("weighted", [False, True])
def test_soft_targets_are_a_sum_over_classes(objective: Objective, weighted: bool) -> None:
    logits, _ = rows_of(8, 6)
    logits.requires_grad_()
    shares = torch.rand(8, 6, dtype=torch.float64).softmax(1)
    shares[0] = F.one_hot(torch.tensor(2), 6)
    weight = torch.linspace(0.5, 1.5, 6, dtype=torch.float64) if weighted else None
    knobs = KNOBS[objective.name]
    of_classes = [
        loss_of(objective.id, knobs, logits, torch.full((8,), k), reduction="none", backend="eager", weight=weight)
        for k in range(6)
    ]
    expected = (shares * torch.stack(of_classes, 1)).sum(1)
    found = varied_loss(objective, knobs, logits, shares, reduction="none", weight=weight)
    close(found, expected, logits)


@objectives
@pytest.mark.parametrize(
    "share",
    [0.3, torch.tensor(0.3, dtype=torch.float64), torch.linspace(0, 1, 8, dtype=torch.float64)],
    ids=["number", "0-d", "rows"],
)
def test_mixed_targets_are_a_sum_of_two_losses(backend: str, objective: Objective, share: Any) -> None:
    logits, target = rows_of(8, 6)
    logits.requires_grad_()
    other = target.roll(3)
    other[2] = -100
    knobs = KNOBS[objective.name]
    first, second = (
        loss_of(objective.id, knobs, logits, of, reduction="none", backend="eager") for of in (target, other)
    )
    expected = share * first + (1 - share) * second
    found = varied_loss(objective, knobs, logits, target, mix=(other, share), reduction="none", backend=backend)
    close(found, expected, logits)
    mean = varied_loss(objective, knobs, logits, target, mix=(other, share), backend=backend)
    counted = torch.as_tensor(share).expand(8) + (1 - torch.as_tensor(share)) * (other != -100)
    torch.testing.assert_close(mean, expected.sum() / counted.double().sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"), [({"reduction": "avg"}, "reduction must be"), ({"backend": "cup"}, "backend must be")]
)
def test_plain_ways_check_what_the_kernels_do(options: dict[str, Any], message: str) -> None:
    """Soft targets, and label smoothing with class weights, run beside the kernels and their checks."""
    logits, target = rows_of(8, 6)
    with pytest.raises(ValueError, match=message):
        generalized_cross_entropy_loss(logits, logits.softmax(1), **options)
    with pytest.raises(ValueError, match=message):
        cross_entropy_loss(logits, target, 0.1, weight=torch.ones(6, dtype=torch.float64), **options)


def test_statistics_of_smoothed_and_weighted_rows_that_are_ignored() -> None:
    logits, target = rows_of(8, 6)
    target[2] = 255
    options: dict[str, Any] = {"weight": torch.linspace(0.5, 2, 6).double(), "ignore_index": 255}
    loss, stats = cross_entropy_loss(logits, target, 0.1, return_stats=True, **options)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, label_smoothing=0.1, **options))
    assert stats.target_prob.isnan().tolist() == [row == 2 for row in range(8)]


def test_dal_takes_what_the_family_takes() -> None:
    logits, target = rows_of(8, 6)
    logits.requires_grad_()
    other, shares = target.roll(1), torch.rand(8, 6, dtype=torch.float64).softmax(1)
    schedule = {"q_start": 1.2, "q_end": 1.2, "total_steps": 1, "pace": "fixed"}
    module = DynamicsAwareLoss(**schedule)
    q, weight = module.q, module.bootstrap_weight
    mixed = 0.3 * dynamics_aware_loss(logits, target, q, weight) + 0.7 * dynamics_aware_loss(logits, other, q, weight)
    close(module(logits, target, mix=(other, 0.3)), mixed, logits)
    close(module(logits, shares), varied_loss(OBJECTIVES[0], (q, weight), logits, shares), logits)
    scaled = dynamics_aware_loss(2 * (logits + F.one_hot(target, 6)), target, q, weight)
    close(DynamicsAwareLoss(**schedule, target_shift=1.0, scale=2.0)(logits, target), scaled, logits)
    form = LinearLoss(DynamicsAwareLoss(**schedule, target_shift=1.0, scale=2.0), 3, 6).double()
    features = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    logits = form.classifier(features)
    scaled = dynamics_aware_loss(2 * (logits + F.one_hot(target, 6)), target, q, weight)
    close(form(features, target), scaled, features)


@pytest.mark.parametrize(
    "shift", [0.7, torch.linspace(-1, 1, 6).double(), torch.linspace(-1, 1, 8).double()], ids=["one", "class", "row"]
)
def test_the_target_is_shifted_and_all_logits_scaled(backend: str, shift: Any) -> None:
    logits, target = rows_of(8, 6)
    logits.requires_grad_()
    of_rows = shift if isinstance(shift, float) or len(shift) == 8 else shift[target]
    moved = 2.0 * (logits + F.one_hot(target, 6) * torch.as_tensor(of_rows, dtype=torch.float64).reshape(-1, 1))
    expected = generalized_cross_entropy_loss(moved, target, backend="eager")
    found = generalized_cross_entropy_loss(logits, target, target_shift=shift, scale=2.0, backend=backend)
    close(found, expected, logits)


def test_margins_grow_with_rarity() -> None:
    logits, target = rows_of(8, 4)
    counts = [1000, 100, 10, 10]
    margins = torch.tensor([0.5 * (10 / n) ** 0.25 for n in counts], dtype=torch.float64)
    lowered = logits - F.one_hot(target, 4) * margins[target].unsqueeze(1)
    expected = F.cross_entropy(30.0 * lowered, target)
    for given in (counts, torch.tensor(counts)):
        torch.testing.assert_close(
            label_distribution_aware_margin_loss(logits, target, given), expected, rtol=1e-6, atol=1e-7
        )
    module = LabelDistributionAwareMarginLoss(counts)
    torch.testing.assert_close(module(logits, target), expected, rtol=1e-6, atol=1e-7)
    assert not module.state_dict()
    with pytest.raises(ValueError, match="class_counts must be one finite number > 0 a class"):
        LabelDistributionAwareMarginLoss([3, 0])


def test_a_scale_may_be_learnt() -> None:
    logits, target = rows_of(8, 6)
    scale = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    module = SymmetricCrossEntropyLoss(scale=scale)
    assert dict(module.named_parameters()) == {"scale": scale}
    module(logits, target).backward()
    assert scale.grad is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be a number from 0 to 1, got 1.5"),
        ({"target_shift": math.inf}, ValueError, "target_shift must be finite"),
        ({"target_shift": torch.zeros(3)}, ValueError, r"target_shift must be .*one a class \(6,\).*got shape \(3,\)"),
        ({"scale": -1.0}, ValueError, "scale must be finite and > 0, got -1.0"),
        ({"scale": torch.ones(2)}, ValueError, "scale must be a number or a 0-d tensor"),
        ({"mix": torch.zeros(8)}, TypeError, r"mix must be a pair"),
        ({"mix": (torch.zeros(3, dtype=torch.long), 0.5)}, ValueError, r"mix\[0\] must be class indices"),
        ({"mix": (torch.zeros(8, dtype=torch.long), 1.5)}, ValueError, r"mix\[1\] must be a weight from 0 to 1"),
        (
            {"mix": (torch.zeros(8, dtype=torch.long), 0.5), "target_shift": 1.0},
            ValueError,
            "target_shift must be None",
        ),
        ({"alpha": -1.0}, ValueError, "alpha must be finite and >= 0, got -1.0"),
        ({"alpha": "1"}, TypeError, "alpha must be a number or a floating-point tensor, got str"),
        ({"beta": torch.tensor([1.0, -2.0, *[0.0] * 6])}, ValueError, "beta must be finite and >= 0, got -.* at row 1"),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
)
def test_bad_options_are_one_clear_error(options: dict[str, Any], error: type[Exception], message: str) -> None:
    logits, target = rows_of(8, 6)
    with pytest.raises(error, match=message):
        dal_kernels.symmetric_cross_entropy_loss(logits, target, **options)


@pytest.mark.parametrize("name", FAMILY)
def test_all_losses_take_the_same_call(name: str) -> None:
    """(N, C, d1) logits, ignored rows, weights, statistics, sample weights; the module gives what the function does."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(6, (4, 3), generator=generator, dtype=torch.int32)
    target[1, 2] = 255
    options: dict[str, Any] = {"weight": torch.linspace(0.5, 2, 6).double(), "ignore_index": 255}
    function, module = getattr(dal_kernels, name), module_of(name, **options)
    sample_weight = torch.linspace(0, 1, 12, dtype=torch.float64).reshape(4, 3)
    rows = function(logits, target, reduction="none", **options)
    assert rows.shape == target.shape
    assert rows[1, 2] == 0
    counts = torch.where(target == 255, 0.0, options["weight"][torch.where(target == 255, 0, target)])
    for given in ({}, {"sample_weight": sample_weight}):
        weights = given.get("sample_weight", torch.ones(()))
        expected = (rows * weights).sum() / (counts * weights).sum()
        for loss, stats in (
            function(logits, target, return_stats=True, **options, **given),
            module(logits, target, return_stats=True, **given),
        ):
            torch.testing.assert_close(loss, expected)
            assert stats.prediction.shape == target.shape
    assert module(logits, target, reduction="none").shape == target.shape
    module.step()
    assert "backend" not in repr(module)


def test_a_schedule_moves_knobs_and_resumes() -> None:
    logits, target = rows_of(8, 6)
    made = lambda: GeneralizedCrossEntropyLoss(schedule=Ramp(4, q=(0.2, 1.0)))  # noqa: E731
    criterion, seen = made(), []
    for _ in range(6):
        seen.append(criterion.knobs["q"])
        exact = generalized_cross_entropy_loss(logits, target, criterion.knobs["q"])
        torch.testing.assert_close(criterion(logits, target), exact, rtol=1e-6, atol=1e-7)
        criterion.step()
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    other = made()
    other.load_state_dict(criterion.state_dict())
    assert other.schedule is not None
    assert other.schedule.position == 6
    assert other.knobs == criterion.knobs
    copied = copy.deepcopy(made())
    copied.step(2.0)
    assert copied.knobs["q"] == pytest.approx(0.6)
    torch.testing.assert_close(
        copied(logits, target), generalized_cross_entropy_loss(logits, target, 0.6), rtol=1e-6, atol=1e-7
    )
    # A state dict of cross-entropy, which has no schedule.
    assert made().load_state_dict({}).missing_keys == []
    assert not GeneralizedCrossEntropyLoss().state_dict()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0, 0, 0.25, 0.5, 0.75, 1, 1]),
        ("cosine", [0, 0, 0.1464, 0.5, 0.8536, 1, 1]),
        ("step", [0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_the_shapes_of_a_ramp(shape: Any, expected: list[float]) -> None:
    ramp = Ramp(5, shape=shape, warmup_steps=1, q=(0, 1), a=(1, 3))
    assert [ramp.at(t)["q"] for t in range(7)] == pytest.approx(expected, abs=1e-4)
    assert ramp.at(5) == {"q": 1, "a": 3}


def test_a_compiled_step_sees_the_schedule_move() -> None:
    logits, target = rows_of(8, 6)
    criterion = GeneralizedCrossEntropyLoss(schedule=Ramp(4, q=(0.2, 1.0)))
    compiled = torch.compile(lambda z: criterion(z, target), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(logits), criterion(logits, target))
        criterion.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GeneralizedCrossEntropyLoss(schedule=Ramp(4, alpha=(0.2, 1.0))),
            "schedule must be of knobs of this loss",
        ),
        (lambda: Ramp(4), "knobs must be given"),
        (lambda: Ramp(0, q=(0, 1)), "total_steps must be finite and > 0"),
        (lambda: Ramp(4, warmup_steps=4, q=(0, 1)), "warmup_steps must be below total_steps"),
        (lambda: dal_kernels.AsymmetricUnhingedLoss(schedule=Ramp(4, a=(2.0, 0.5))), "a must be"),
        (lambda: GeneralizedCrossEntropyLoss(q=-1), "q must be finite and >= 0, got -1"),
    ],
)
def test_bad_schedules_are_one_clear_error(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


LOSSES: list[Any] = [module_of(name) for name in FAMILY] + [
    CrossEntropyLoss(label_smoothing=0.1),
    DynamicsAwareLoss(total_steps=4, pace="fixed"),
    DynamicsAwareLoss(total_steps=4, pace="fixed", bootstrap="hard"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss)[:60])
def test_the_linear_form_takes_every_loss(fused: str, loss: RobustLoss | DynamicsAwareLoss) -> None:
    torch.manual_seed(3)
    loss.step(2.0)
    form = LinearLoss(copy.deepcopy(loss), 5, 40, chunk_bytes=40 * 4 * 3)
    features = torch.randn(10, 5, requires_grad=True)
    target = torch.randint(40, (10,))
    target[3] = -100
    outcomes = []
    for of in (form, lambda x, y: loss(form.classifier(x), y)):
        value = of(features, target)
        outcomes.append([value, *torch.autograd.grad(value, (features, *form.classifier.parameters()))])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)


def test_the_forms_refuse_what_they_do_not_have() -> None:
    smoothed = CrossEntropyLoss(label_smoothing=0.1, weight=torch.ones(4))
    with pytest.raises(ValueError, match="weight must be None with label_smoothing in the linear and class-parallel"):
        LinearLoss(smoothed, 3, 4)(torch.randn(2, 3), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="loss must be a module of dal_kernels"):
        LinearLoss(torch.nn.CrossEntropyLoss(), 3, 4)


def a_loss_of_ones_own(row: Any) -> Tensor:
    known = ~row.log_prob.isnan()
    loss = -(1 - row.square_sum) * torch.where(known, row.log_prob, 0.0) + 0.1 * row.entropy
    return (loss + 0.01 * row.sum_log_prob + row.max_log_prob.exp())[known].mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_row_statistics_make_a_loss_of_ones_own(fused: str, dtype: torch.dtype) -> None:
    logits, target = rows_of(9, 50, 2.0, dtype)
    target[4] = -100
    given, exact = logits.clone().requires_grad_(), logits.double().clone().requires_grad_()
    made = gradient_of(a_loss_of_ones_own(row_statistics(given, target, backend=fused)), given)
    true = gradient_of(a_loss_of_ones_own(row_statistics(exact, target, backend="eager")), exact)
    p = exact.softmax(1)
    own = p.gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1).log()
    loss = -(1 - p.square().sum(1)) * own - 0.1 * (p * p.log()).sum(1) + 0.01 * p.log().sum(1) + p.amax(1)
    torch.testing.assert_close(gradient_of(loss[target != -100].mean(), exact), true, rtol=1e-10, atol=1e-12)
    bound = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3}[dtype]
    assert (made.double() - true).norm() <= bound * true.norm()


def test_row_statistics_compile_to_one_graph(fused: str) -> None:
    logits, target = rows_of(9, 50, 2.0, torch.float32)
    logits.requires_grad_()
    plain = a_loss_of_ones_own(row_statistics(logits, target, backend=fused))

    def loss_of_logits(z: Tensor) -> Tensor:
        row = row_statistics(z, target, backend=fused)
        return (-row.log_prob + row.entropy).mean()

    compiled = torch.compile(loss_of_logits, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(gradient_of(compiled, logits), gradient_of(loss_of_logits(logits), logits))
    assert plain.isfinite()


def test_the_linear_form_has_row_statistics(fused: str) -> None:
    torch.manual_seed(0)
    layer, features, target = torch.nn.Linear(5, 40), torch.randn(10, 5, requires_grad=True), torch.randint(40, (10,))
    target[3] = -100
    fused_row = linear_row_statistics(
        features, layer.weight, target, linear_bias=layer.bias, chunk_bytes=40 * 4 * 3, backend=fused
    )
    row = row_statistics(layer(features), target, backend="eager")
    torch.testing.assert_close(fused_row, row, rtol=1e-5, atol=1e-5, equal_nan=True)
    leaves = (features, layer.weight, layer.bias)
    torch.testing.assert_close(
        torch.autograd.grad(a_loss_of_ones_own(fused_row), leaves),
        torch.autograd.grad(a_loss_of_ones_own(row), leaves),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", FAMILY)
def test_a_loss_is_pickled(name: str) -> None:
    loss = module_of(name)
    again = pickle.loads(pickle.dumps(loss))
    logits, target = torch.randn(4, 6), torch.arange(4)
    assert torch.equal(again(logits, target), loss(logits, target))


def test_what_a_pickle_asks_for_is_there_or_named() -> None:
    assert copy.deepcopy(row_statistics_of) is row_statistics_of
    unknown = pickle.dumps(row_statistics_of).replace(b"row_statistics", b"no_statistics_")
    with pytest.raises(ValueError, match="has no loss 'no_statistics_'"):
        pickle.loads(unknown)


def test_a_pickled_schedule_moves_the_loss_that_it_was_pickled_with() -> None:
    loss = GeneralizedCrossEntropyLoss(schedule=Ramp(4, q=(0.2, 1.0)))
    again = pickle.loads(pickle.dumps(loss))
    again.step()
    assert again.knobs["q"] == pytest.approx(0.4)
    assert loss.knobs["q"] == 0.2
