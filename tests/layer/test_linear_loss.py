"""The layer form as a module: its classifier as it would be called, with all that hooks make of it, or an error."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from dal_kernels import DynamicsAwareLoss, LinearDynamicsAwareLoss, dynamics_aware_loss

N, D, C = 24, 12, 31


def data(rows: tuple[int, ...] = (N,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(rows[0], D, *rows[1:], generator=generator)
    return features, torch.randint(C, rows, generator=generator)


def criterion_of(change: Callable[[nn.Module], object] = lambda criterion: None, **options: Any) -> Any:
    """A criterion whose classifier is changed; equal ones for equal arguments."""
    torch.manual_seed(0)
    criterion = LinearDynamicsAwareLoss(D, C, **{"q_start": 1.2, "total_steps": 4, "pace": "fixed", **options})
    change(criterion)
    return criterion


def called(criterion: Any, features: Tensor, target: Tensor) -> Tensor:
    """What the criterion is held against: its classifier is called, then comes the loss."""
    logits = criterion.classifier(features.movedim(1, -1)).movedim(-1, 1)
    return dynamics_aware_loss(logits, target, criterion.q, criterion.bootstrap_weight)


@pytest.mark.parametrize("bias", [True, False])
def test_module_is_a_linear_layer_and_the_loss(bias: bool) -> None:
    options = {"total_steps": 10, "reduction": "sum", "bootstrap": "hard", "ignore_index": 3}
    module = LinearDynamicsAwareLoss(D, C, bias=bias, chunk_bytes=10_000, **options)
    plain = DynamicsAwareLoss(**options)
    features, target = data()
    parameters = [features.requires_grad_(), *module.parameters()]
    for _ in range(3):
        loss, expected = module(features, target), plain(module.classifier(features), target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))
        module.step(4.0 + module.schedule.position)
        plain.step(4.0 + plain.schedule.position)
    twin = LinearDynamicsAwareLoss(D, C, bias=bias, **options)
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(twin(features, target), module(features, target))
    half = module.bfloat16()
    assert half.classifier.weight.dtype == torch.bfloat16
    assert half.q.dtype == torch.float32
    assert isinstance(half(features.bfloat16(), target), Tensor)
    assert isinstance(module.classifier, nn.Linear)


def pruned(criterion: Any) -> None:
    for name in ("weight", "bias"):
        prune.l1_unstructured(criterion.classifier, name, 0.5)


def spectrally_normed(criterion: Any) -> None:
    nn.utils.spectral_norm(criterion.classifier, n_power_iterations=1)


def weight_normed(criterion: Any) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(criterion.classifier)


def parametrized(criterion: Any) -> None:
    parametrizations.weight_norm(criterion.classifier)


def with_other_features(criterion: Any) -> None:
    for hook in (lambda _, args: F.normalize(args[0], dim=-1), lambda _, args: (3 * args[0],), lambda _, args: None):
        criterion.classifier.register_forward_pre_hook(hook)


def with_keywords(criterion: Any) -> None:
    for hook in (lambda *_: None, lambda _, args, kwargs: ((), {"input": args[0] + 1})):
        criterion.classifier.register_forward_pre_hook(hook, with_kwargs=True)


def lazy(criterion: Any) -> None:
    criterion.classifier = nn.LazyLinear(C)


SEEN = [pruned, spectrally_normed, weight_normed, parametrized, with_other_features, with_keywords, lazy]
seen = pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)


@seen
@pytest.mark.parametrize("rows", [(N,), (6, 4)], ids=str)
def test_trains_as_if_the_classifier_were_called(change: Any, rows: tuple[int, ...]) -> None:
    features, target = data(rows)
    outcomes = []
    for loss_of in (lambda criterion, *batch: criterion(*batch), called):
        body, criterion = nn.Parameter(features.clone()), criterion_of(change)
        torch.manual_seed(1)  # a lazy classifier is made at its first call
        losses = [loss_of(criterion, body, target)]
        optimizer = torch.optim.SGD([body, *criterion.parameters()], lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
            criterion.step()
            losses.append(loss_of(criterion, body, target))
        criterion.eval()
        outcomes.append([*losses, loss_of(criterion, body, target), body, *criterion.parameters()])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)
    assert len({loss.item() for loss in outcomes[0][:4]}) == 4


@seen
def test_copies_functional_calls_and_compiled_code_see_it_too(change: Any) -> None:
    features, target = data()
    criterion = criterion_of(change).eval()
    with torch.no_grad():
        criterion(features, target)  # makes what a lazy layer has, and a pruned weight without a graph: torch copies it
        expected = called(copy.deepcopy(criterion), features, target)
        copied = copy.deepcopy(criterion)
        torch.testing.assert_close(copied(features, target), expected)
        others = {name: value / 2 for name, value in copied.named_parameters()}
        halved = torch.func.functional_call(copied, others, (features, target))
        for name, value in copied.named_parameters():
            value.copy_(others[name])
        torch.testing.assert_close(halved, called(copied, features, target))
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(features, target), expected)


class Adapter(nn.Module):
    """Shaped like the adapters of fine-tuning libraries: the frozen layer's weight under its name."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(D, 2), nn.Linear(2, C)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.base(features) + self.up(self.down(features))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replaced(make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    def change(criterion: Any) -> None:
        criterion.classifier = make(criterion.classifier)

    return change


def patched(criterion: Any) -> None:
    criterion.classifier.forward = lambda features: torch.zeros(len(features), C)


REFUSED: dict[str, Callable[[Any], None]] = {
    "Adapter": replaced(Adapter),
    "Sequential": replaced(lambda linear: nn.Sequential(nn.Dropout(0.5), linear)),
    "OptimizedModule": replaced(functools.partial(torch.compile, backend="eager")),
    "Scaled with another forward": replaced(lambda linear: Scaled(D, C)),
    "Linear with another forward": patched,
    "NoneType": replaced(lambda linear: None),
}


@pytest.mark.parametrize("got", REFUSED)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_classifier_of_another_kind_is_refused(got: str, compiled: bool) -> None:
    criterion = criterion_of(REFUSED[got])
    if compiled and got == "OptimizedModule":
        torch.testing.assert_close(torch.compile(criterion, backend="eager")(*data()), called(criterion, *data()))
        return
    message = f"classifier must be an nn.Linear .* got {got}: merge .* dynamics_aware_loss"
    with pytest.raises(TypeError, match=message):
        (torch.compile(criterion, backend="eager") if compiled else criterion)(*data())


def noticing(*_: Any) -> None:
    raise AssertionError("a hook was run in spite of the error")


@pytest.mark.parametrize(
    "method", ["register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_hooks_that_would_see_logits_are_refused(method: str) -> None:
    criterion = criterion_of(with_other_features)
    criterion.classifier.register_forward_pre_hook(noticing)
    handle = getattr(criterion.classifier, method)(noticing)
    message = (
        "classifier must have neither forward hooks nor backward hooks.* got noticing: remove.*dynamics_aware_loss"
    )
    with pytest.raises(ValueError, match=message):
        criterion(*data())
    handle.remove()
    with pytest.raises(AssertionError, match="in spite"):
        criterion(*data())


def test_global_hooks_do_not_see_the_classifier() -> None:
    """Profilers enter a module by one and leave it by another: both or none must be run."""
    criterion, seen = criterion_of(with_other_features), []
    handles = [
        nn.modules.module.register_module_forward_pre_hook(lambda module, _: seen.append(module)),
        nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)),
    ]
    try:
        criterion(*data())
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [criterion, criterion]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(D)}, rf"weight must have one value a class, shape \({C},\), got shape \({D},\)"),
        ({"weight": torch.ones(1, C)}, rf"weight must have one value a class, .*got shape \(1, {C}\)"),
        ({"chunk_bytes": 0}, "chunk_bytes must be an int >= 1 or None, got 0"),
        ({"chunk_bytes": "64 MiB"}, "chunk_bytes must be an int >= 1 or None, got '64 MiB'"),
    ],
)
def test_bad_settings_are_refused_at_construction(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        criterion_of(**changes)
