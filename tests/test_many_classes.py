"""Losses behind a layer of many classes: all that linear_loss takes is what F.linear and the loss give in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given as over
from hypothesis import settings
from hypothesis import strategies as st
from test_family_options import FAMILY, module_of
from torch import Tensor, nn
from torch.nn import functional as F
from truth import HALVES, SLACK, relative_error

from dal_kernels import (
    CrossEntropyLoss,
    DynamicsAwareLoss,
    GeneralizedCrossEntropyLoss,
    LabelDistributionAwareMarginLoss,
    LinearDynamicsAwareLoss,
    LinearLoss,
    Ramp,
    linear_fused,
    linear_loss,
)
from dal_kernels.linear_ops import linear_gradient
from dal_kernels.linear_ops import linear_loss as operator

D, C = 6, 23
fixed: dict[str, Any] = {"total_steps": 4, "pace": "fixed", "watch": False}
LOSSES: list[Any] = [module_of(name) for name in FAMILY] + [
    CrossEntropyLoss(label_smoothing=0.1),
    CrossEntropyLoss(weight=torch.linspace(0.2, 2.0, C), ignore_index=3),
    DynamicsAwareLoss(1.2, 1.2, **fixed),
    DynamicsAwareLoss(1.2, 1.2, bootstrap="hard", **fixed),
    DynamicsAwareLoss(0.4, target_shift="fading", **fixed),
    GeneralizedCrossEntropyLoss(0.7, target_shift=torch.linspace(-1, 1, C), scale=1.5),
    LabelDistributionAwareMarginLoss(torch.arange(1, C + 1), scale=4.0),
]
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss)[:60])


def layer(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Leaves of a layer for targets of that shape, some of them ignored, by the names of linear_loss."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {"input": (*shape, D), "linear_weight": (C, D), "linear_bias": (C,)}
    made: dict[str, Any] = {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, size in leaves.items()
    }
    target = torch.randint(C, shape, generator=generator)
    return {**made, "target": target.masked_fill(torch.rand(shape, generator=generator) < 0.2, -100)}


def unfused(
    loss: Any,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    shift: int = 0,
    softcap: float | None = None,
    scale: Any = 1.0,
    num_items: Any = None,
    sample_weight: Tensor | None = None,
    mix: Any = None,
    reduction: str | None = None,
    **options: Any,
) -> Any:
    """What linear_loss is held against: all logits, in plain operations, and the loss of them."""
    plain = copy.deepcopy(loss)
    del plain.scale
    plain.scale = scale if loss.scale is None else scale * loss.scale
    if isinstance(plain.scale, float) and plain.scale == 1:
        plain.scale = None
    logits = F.linear(input, linear_weight, linear_bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    moved = lambda of: (of[..., shift:] if shift else of).reshape(-1) if isinstance(of, Tensor) else of  # noqa: E731
    logits = logits[..., : logits.shape[-2] - shift, :] if shift else logits
    shape = target[..., shift:].shape if shift else target.shape
    mix = None if mix is None else tuple(map(moved, mix))
    reduced = reduction or plain.reduction
    result = plain(
        logits.reshape(-1, C), moved(target),
        sample_weight=None if sample_weight is None else moved(sample_weight), mix=mix,
        reduction="sum" if num_items is not None else reduced, **options,
    )  # fmt: skip
    stats = None
    if options.get("return_stats"):
        result, stats = result
        stats = type(stats)(*(field.reshape(shape) for field in stats))
    if num_items is not None:
        result = result / (num_items.reshape(()) if isinstance(num_items, Tensor) else num_items)
    if reduced == "none":
        result = result.reshape(shape)
    return (result, stats) if stats is not None else result


def gradients(loss: Tensor, given: dict[str, Any]) -> list[Tensor]:
    leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    return list(torch.autograd.grad(loss, leaves, upstream.to(loss.dtype)))


def of_backend(loss: Any, backend: str) -> Any:
    loss = copy.deepcopy(loss)
    loss.backend = backend
    return loss


def hold(loss: Any, given: dict[str, Any], backend: str, rows_a_chunk: int = 3) -> None:
    """Value, statistics and gradients of float64 leaves, against plain operations."""
    given["target"] = given["target"].where(given["target"] != -100, torch.tensor(loss.ignore_index))
    chunk_bytes = rows_a_chunk * C * 8 * (2 if given.get("softcap") else 1)
    got, stats = linear_loss(of_backend(loss, backend), **given, return_stats=True, chunk_bytes=chunk_bytes)
    expected, true_stats = unfused(of_backend(loss, "eager"), **given, return_stats=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, equal_nan=True)
    torch.testing.assert_close(stats, true_stats, rtol=1e-9, atol=1e-11, equal_nan=True)
    torch.testing.assert_close(gradients(got, given), gradients(expected, given), rtol=1e-8, atol=1e-10)


@losses
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_loss_takes_all_of_it(fused: str, loss: Any, reduction: str) -> None:
    given = layer((3, 7))
    given |= {"shift": 1, "softcap": 2.5, "reduction": reduction}
    given["scale"] = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    given["sample_weight"] = torch.rand(3, 7, dtype=torch.float64).requires_grad_()
    hold(loss, given, fused)


@losses
def test_plain_operations_do_the_same(loss: Any) -> None:
    given = layer((2, 5))
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, dtype=torch.float64)
    hold(loss, {**given, "softcap": 4.0, "scale": scale, "sample_weight": weights, "num_items": 9}, "eager")


SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@over(st.data())
def test_any_shapes_strides_and_options(data: st.DataObject) -> None:
    draw = data.draw
    loss = draw(st.sampled_from(LOSSES))
    shape = draw(SHAPES)
    given = layer(shape, seed=draw(st.integers(0, 9)))
    how = draw(st.sampled_from(["dense", "transposed", "sliced", "expanded", "frozen"]))
    features = given["input"].detach()
    if how == "transposed":
        features = features.movedim(-1, 0).contiguous().movedim(0, -1)
    elif how == "sliced":
        features = torch.stack([features, features], -1)[..., 0]
    elif how == "expanded" and len(shape) > 1:
        features = features[:1].expand(*shape, D)
    given["input"] = features.requires_grad_(how != "frozen")
    if draw(st.booleans()):
        del given["linear_bias"]
    if draw(st.booleans()):
        given["linear_weight"] = torch.stack([given["linear_weight"].detach()] * 2)[1].t().contiguous().t()
        given["linear_weight"].requires_grad_(how == "frozen" or draw(st.booleans()))
    given["softcap"] = draw(st.sampled_from([None, 1.5, 30.0]))
    given["scale"] = draw(st.sampled_from([1.0, 0.7, torch.tensor(1.4, dtype=torch.float64, requires_grad=True)]))
    if len(shape) and shape[-1] > 1:
        given["shift"] = draw(st.integers(0, shape[-1] - 1))
    given["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    if draw(st.booleans()):
        given["sample_weight"] = torch.rand(shape, dtype=torch.float64).requires_grad_(draw(st.booleans()))
    if given["reduction"] == "mean":
        given["num_items"] = draw(st.sampled_from([None, 7, torch.tensor(11), torch.tensor([5.0])]))
    if draw(st.booleans()) and not any(value.requires_grad for value in given.values() if isinstance(value, Tensor)):
        given["input"].requires_grad_()
    hold(loss, given, draw(st.sampled_from(["cpu", "eager"])), draw(st.integers(1, 9)))


AFFINE = [
    CrossEntropyLoss(label_smoothing=0.1),
    CrossEntropyLoss(weight=torch.linspace(0.2, 2.0, C)),
    DynamicsAwareLoss(1.2, 1.2, **fixed),
    module_of("active_passive_loss"),
    module_of("symmetric_cross_entropy_loss", label_smoothing=0.2),
    module_of("brier_loss", label_smoothing=0.3),
]


@pytest.mark.parametrize("loss", AFFINE, ids=lambda loss: str(loss)[:60])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("share", [0.3, "one a row", None], ids=str)
def test_two_labels_and_smoothed_ones(backend: str, loss: Any, reduction: str, share: Any) -> None:
    given = layer((3, 5)) | {"shift": 1, "softcap": 3.0, "reduction": reduction}
    given["scale"] = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    given["sample_weight"] = torch.rand(3, 5, dtype=torch.float64).requires_grad_()
    if share is not None:
        other = layer((3, 5), seed=1)["target"]
        given["mix"] = (other, torch.rand(3, 5, dtype=torch.float64) if isinstance(share, str) else share)
    hold(loss, given, backend)


def test_what_cannot_be_smoothed_or_shifted_says_so() -> None:
    given = layer((3, 5))
    with pytest.raises(ValueError, match="label_smoothing must be 0 for generalized_cross_entropy_loss"):
        linear_loss(GeneralizedCrossEntropyLoss(label_smoothing=0.1), **given)
    with pytest.raises(ValueError, match="target_shift must be None with mix"):
        linear_loss(GeneralizedCrossEntropyLoss(target_shift=0.1), **given, mix=(given["target"], 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 3.0},
        {"scale": 1.7},
        {"softcap": 3.0, "scale": 1.7, "sample_weight": torch.linspace(0, 2, 96)},
        {"num_items": 960},
    ],
    ids=["softcap", "scale", "all", "num_items"],
)
def test_no_further_from_truth_than_the_plain_pair(fused: str, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    given = layer((96,), dtype) | changes
    if "scale" in changes:
        given["scale"] = torch.tensor(changes["scale"], requires_grad=True)
    wide = lambda value: (  # noqa: E731
        value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
    )
    exact = {name: wide(value) for name, value in given.items()}
    loss = LabelDistributionAwareMarginLoss(torch.arange(1, C + 1), scale=2.0, backend=fused)
    true = gradients(unfused(of_backend(loss, "eager"), **exact), exact)
    got = gradients(linear_loss(loss, **given, chunk_bytes=20 * C * 4), given)
    plain = gradients(unfused(loss, **given), given)
    for one, other, truth in zip(got, plain, true, strict=True):
        assert relative_error(one, truth) <= 1.3 * relative_error(other, truth) + SLACK[dtype]


def test_float16_keeps_what_a_large_count_would_flush(fused: str) -> None:
    given = layer((64,), torch.float16)
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items() if name != "target"}
    exact["target"] = given["target"]
    items = 2**20
    (linear_loss(CrossEntropyLoss(backend=fused), **given, num_items=items, reduction="mean") * 65536.0).backward()
    (unfused(CrossEntropyLoss(), **exact, num_items=items) * 65536.0).backward()
    for name in ("input", "linear_weight", "linear_bias"):
        assert relative_error(given[name].grad, exact[name].grad) < 5e-3


@pytest.mark.parametrize("frozen", [("linear_weight", "linear_bias"), ("input",), ("input", "linear_weight")], ids=str)
def test_nothing_is_multiplied_for_what_is_frozen(
    fused: str, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one pass over the logits carries the weights of rows."""
    given = layer((12,), torch.float32) | {"sample_weight": torch.rand(12, requires_grad=True)}
    for name in frozen:
        given[name].requires_grad_(False)
    calls: list[tuple[str, list[bool]]] = []

    def spy(name: str, run: Any, place: int) -> None:
        def noted(*arguments: Any) -> Any:
            calls.append((name, arguments[place]))
            return run(*arguments)

        monkeypatch.setattr(linear_fused, name, noted)

    spy("linear_loss", operator, 13)
    spy("linear_gradient", linear_gradient, 11)
    linear_loss(CrossEntropyLoss(backend=fused), **given).backward()
    wanted = [name not in frozen for name in ("input", "linear_weight", "linear_bias")]
    assert calls == [("linear_loss", [*wanted, False, False])]


@pytest.mark.parametrize("length", [1, 5])
def test_a_schedule_follows_the_rows_that_count(length: int) -> None:
    """The pace "auto" hears of shifted rows, as of the same rows in a plain call."""
    formed, plain = (DynamicsAwareLoss(total_steps=4) for _ in range(2))
    given = layer((4, 1 + length), torch.float32)
    form = LinearLoss(formed, D, C, shift=1)
    logits = form.classifier(given["input"])[:, :-1].reshape(-1, C)
    for _ in range(3):
        form(given["input"], given["target"]).backward()
        plain(logits.detach().requires_grad_(), given["target"][:, 1:].reshape(-1)).backward()
        form.step()
        plain.step()
    torch.testing.assert_close(formed.schedule.state_dict(), plain.schedule.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(formed.q, plain.q, rtol=1e-5, atol=1e-6)


def test_a_ramp_moves_its_knobs() -> None:
    given = layer((8,), torch.float32)
    loss = GeneralizedCrossEntropyLoss(schedule=Ramp(4, q=(0.2, 1.0)))
    seen = set()
    for _ in range(3):
        got = linear_loss(loss, **given)
        torch.testing.assert_close(got, unfused(GeneralizedCrossEntropyLoss(loss.knobs["q"]), **given))
        seen.add(got.item())
        loss.step()
    assert len(seen) == 3


class Language(nn.Module):
    """A causal language model whose embedding is its head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(C, D)
        self.body = nn.Linear(D, D)
        self.criterion = LinearLoss(
            CrossEntropyLoss(),
            D,
            C,
            classifier=self.embedding.weight,
            shift=1,
            softcap=5.0,
            scale=nn.Parameter(torch.ones(())),
        )

    def forward(self, tokens: Tensor, fused: bool = True) -> Tensor:
        features = self.body(self.embedding(tokens))
        if fused:
            return self.criterion(features, tokens)
        logits = self.criterion.logits(features)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_a_tied_embedding_is_trained_by_both_of_its_uses() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(C, (4, 9))
    models = [Language(), Language()]
    models[1].load_state_dict(models[0].state_dict())
    assert {name for name, _ in models[0].named_parameters()} == {
        "embedding.weight", "body.weight", "body.bias", "criterion.scale"
    }  # fmt: skip
    outcomes: list[list[float]] = []
    for model, fused in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        outcomes.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(tokens, fused)
            loss.backward()
            optimizer.step()
            outcomes[-1].append(loss.item())
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-6)
    assert outcomes[0][-1] < outcomes[0][0]
    assert models[0].criterion.classifier is models[0].embedding.weight


def test_an_existing_head_is_taken_as_it_is() -> None:
    head = nn.Linear(D, C, bias=False)
    form = LinearLoss(CrossEntropyLoss(), D, C, classifier=head)
    assert form.classifier is head
    given = layer((3, 5), torch.float32)
    got = form(given["input"], given["target"])
    torch.testing.assert_close(got, unfused(CrossEntropyLoss(), given["input"], head.weight, given["target"]))


def test_class_priors_are_a_bias(fused: str) -> None:
    """Logit adjustment, and sampled softmax's correction: rows of the classifier with a bias of -ln q."""
    given = layer((30,))
    prior = torch.rand(C, dtype=torch.float64).softmax(0)
    bias = given.pop("linear_bias")
    loss = of_backend(CrossEntropyLoss(), fused)
    got = linear_loss(loss, **given, linear_bias=bias + prior.log())
    expected = F.cross_entropy(F.linear(given["input"], given["linear_weight"], bias) + prior.log(), given["target"])
    torch.testing.assert_close(got, expected)
    leaves = [given["input"], given["linear_weight"], bias]
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "scale": 2.0}, {"num_items": 7}, {"reduction": "none"}], ids=str
)
def test_compiles_to_one_graph(fused: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    given = layer((4, 6), torch.float32) | {"shift": 1} | options
    given["sample_weight"] = torch.rand(4, 6, requires_grad=True)
    loss = GeneralizedCrossEntropyLoss(0.7, target_shift=0.5, backend=fused)
    compiled = torch.compile(lambda **named: linear_loss(loss, **named), fullgraph=True, backend="aot_eager")
    got, expected = compiled(**given), linear_loss(loss, **given)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, given), gradients(expected, given))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 2.0}, {"num_items": 7}], ids=str)
def test_what_is_exported_or_transformed_is_the_same(options: dict[str, Any]) -> None:
    given = layer((4, 6), torch.float32) | options
    loss = GeneralizedCrossEntropyLoss(0.7)
    others = {name: value for name, value in given.items() if name != "input"}
    of_input = lambda x: linear_loss(loss, x, **others)  # noqa: E731
    expected = torch.autograd.grad(of_input(given["input"]), given["input"])[0]
    torch.testing.assert_close(torch.func.grad(of_input)(given["input"].detach()), expected, rtol=1e-4, atol=1e-6)
    recorded = torch.fx.experimental.proxy_tensor.make_fx(of_input)(given["input"].detach())
    leaf = given["input"].detach().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(recorded(leaf), leaf)[0], expected, rtol=1e-4, atol=1e-6)


def test_autocast_makes_halves(fused: str) -> None:
    given = layer((4, 6), torch.float32) | {"softcap": 3.0, "scale": torch.tensor(2.0, requires_grad=True)}
    loss = CrossEntropyLoss(backend=fused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = linear_loss(loss, **given), unfused(loss, **given)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-3)
    for one, other in zip(gradients(got, given), gradients(expected, given), strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, other.double()) < 3e-2


@pytest.mark.parametrize("by", ["input", "linear_weight", "linear_bias", "scale", "sample_weight"])
def test_a_second_derivative_is_refused_aloud(fused: str, by: str) -> None:
    given = layer((8,)) | {"scale": torch.tensor(1.5, dtype=torch.float64, requires_grad=True)}
    given["sample_weight"] = torch.rand(8, dtype=torch.float64, requires_grad=True)
    loss = linear_loss(CrossEntropyLoss(backend=fused), **given)
    (gradient,) = torch.autograd.grad(loss, given[by], create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*eager"):
        torch.autograd.grad(gradient.square().sum(), given["linear_weight"])


def test_the_operators_are_what_torch_takes_them_for(fused: str) -> None:
    given = layer((9,), torch.float32)
    target = given["target"].clamp_min(0)
    tensors = [given[name].detach() for name in ("input", "linear_weight", "linear_bias")]
    rows = torch.linspace(-1, 1, 9)
    changes = (2.0, rows, torch.tensor(1.5))
    wanted = [True] * 5
    arguments = (*tensors, target, torch.tensor([0.7]), None, 2, -100, 2, fused, 4, torch.float32, True, wanted)
    torch.library.opcheck(operator, (*arguments, *changes, rows.square()))
    _, fields, prediction, *_ = operator(*arguments)
    one = torch.ones(())
    more = (target.flip(0).unsqueeze(0), rows.unsqueeze(0))
    how = (-100, fused, 4, torch.float32, wanted)
    torch.library.opcheck(linear_gradient, (*tensors, target, fields, prediction, one, *how, *changes, *more))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shift": 1.0}, TypeError, "shift must be an int, got float"),
        ({"shift": -1}, ValueError, "shift must be >= 0 and below the length of a sequence, 5"),
        ({"shift": 5}, ValueError, "below the length of a sequence, 5.* got 5"),
        ({"softcap": 0.0}, ValueError, "softcap must be finite and > 0, or None, got 0"),
        ({"softcap": torch.ones(())}, TypeError, "softcap must be a number or None, got Tensor"),
        ({"scale": -1.0}, ValueError, "scale must be finite and > 0, got -1"),
        ({"scale": torch.ones(2)}, ValueError, "scale must be a number or a 0-d tensor"),
        ({"num_items": 0}, ValueError, "num_items must be finite and > 0, got 0"),
        ({"num_items": "all"}, TypeError, "num_items must be a number > 0 or a tensor of one, got str"),
        ({"num_items": torch.ones(3)}, ValueError, r"num_items must be a number .* got torch.float32 of shape \(3,\)"),
        ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items must be None with reduction 'sum', got 3"),
        ({"target": torch.zeros(3, dtype=torch.long)}, ValueError, r"target must have shape \(3, 5\) for input of sh"),
        ({"target": torch.zeros(3, 5)}, TypeError, "target must hold class indices"),
        ({"target": torch.full((3, 5), C)}, ValueError, f"target at row 0 is {C}, accepted are 0 to {C - 1}"),
        ({"target": [1]}, TypeError, "target must be a tensor, got list"),
        ({"input": torch.zeros(())}, ValueError, r"input must have shape \(\.\.\., D\), got a 0-d tensor"),
        ({"input": torch.zeros(3, 5, D + 1)}, ValueError, rf"linear_weight must have shape \(C, {D + 1}\), C >= 1"),
        ({"linear_weight": torch.zeros(C)}, ValueError, rf"linear_weight must have shape \(C, {D}\)"),
        ({"linear_weight": None}, TypeError, "linear_weight must be a tensor, got NoneType"),
        ({"linear_bias": torch.zeros(C - 1)}, ValueError, rf"linear_bias must have shape \({C},\) or be None"),
        ({"sample_weight": torch.ones(4)}, ValueError, r"sample_weight must be .* shape \(3, 5\)"),
        ({"mix": (torch.zeros(3, dtype=torch.long), 0.5)}, ValueError, r"mix\[0\] must be class indices"),
        ({"loss": nn.CrossEntropyLoss()}, TypeError, "loss must be a module of dal_kernels"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_loss(**{"loss": CrossEntropyLoss(), **layer((3, 5), torch.float32), **changes})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classifier": nn.Linear(D, C + 1)}, ValueError, f"classifier must have in_features {D} and out_features {C}"),
        ({"classifier": nn.Parameter(torch.zeros(D, C))}, ValueError, rf"classifier must have shape \({C}, {D}\)"),
        (
            {"classifier": nn.Embedding(C, D)},
            TypeError,
            "classifier must be an nn.Linear, a parameter .* got Embedding",
        ),
        ({"shift": -1}, ValueError, "shift must be >= 0, got -1"),
        ({"softcap": -1}, ValueError, "softcap must be finite and > 0"),
        ({"scale": 0}, ValueError, "scale must be finite and > 0"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be an int >= 1"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_at_construction(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearLoss(CrossEntropyLoss(), D, C, **options)


def test_features_of_the_older_module_stand_where_classes_do() -> None:
    older = LinearDynamicsAwareLoss(D, C, 1.2, 1.2, **fixed)
    given = layer((4, 5), torch.float32)
    newer = LinearLoss(DynamicsAwareLoss(1.2, 1.2, **fixed), D, C, classifier=older.classifier)
    torch.testing.assert_close(
        older(given["input"].movedim(-1, 1), given["target"]), newer(given["input"], given["target"])
    )
