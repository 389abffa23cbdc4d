"""The loss fused with its classifier layer: what F.linear and the loss give, without the logits in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.layer import measure
from dal_kernels import dynamics_aware_loss, linear_dynamics_aware_loss
from dal_kernels.fields import GRADIENT_FIELDS, NARROW_FIELDS
from dal_kernels.linear_ops import _linear_gradient, _linear_loss, linear_gradient, linear_loss
from dal_kernels.objectives import OBJECTIVES
from dal_kernels.ops import KERNELS
from support.axes import HALVES, bootstraps, dtypes, halves, reductions
from support.layers import C, D, N, fused_layer, gradients, layer, two_steps
from support.truth import SLACK, make_case, relative_error


@pytest.mark.sampled(5)
@dtypes
@reductions
@bootstraps
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_truth(backend: str, dtype: torch.dtype, reduction: str, bootstrap: str, weighted: bool) -> None:
    """No further from float64 truth than F.linear and the loss, one after the other, in the same dtype."""
    given = layer(dtype)
    options = {"reduction": reduction, "bootstrap": bootstrap, "return_stats": True}
    if weighted:
        options["weight"] = torch.linspace(0.1, 2.0, C)
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items() if name != "target"}
    true_loss, true_stats = two_steps({**exact, "target": given["target"]}, backend="eager", **options)
    truth = gradients(true_loss, exact)
    (loss, stats), (plain_loss, plain_stats) = (f(given, backend=backend, **options) for f in (fused_layer, two_steps))
    assert loss.dtype == plain_loss.dtype
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    for got, plain, true in zip(gradients(loss, given), gradients(plain_loss, given), truth, strict=True):
        assert got.dtype == dtype
        # Plain operations round what each chunk adds.
        factor = 2.0 if backend == "eager" and dtype in HALVES else 1.3
        assert relative_error(got, true) <= factor * relative_error(plain, true) + SLACK[dtype]
    assert torch.equal(stats.prediction, plain_stats.prediction)
    torch.testing.assert_close(stats[:2], plain_stats[:2], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert stats.target_prob.shape == true_stats.target_prob.shape


@halves
def test_sums_of_halves_are_kept_in_float32(fused: str, dtype: torch.dtype) -> None:
    """256 chunks added up in the dtype of the weight lose what float32 keeps."""
    given = layer(dtype, rows=512, classes=20)
    given["target"] = torch.zeros(512, dtype=torch.long)  # contributions that do not cancel
    exact = {name: given[name].detach().double().requires_grad_() for name in ("input", "classifier_weight", "bias")}
    two_steps({**exact, "target": given["target"]}, backend="eager", reduction="sum").backward()
    true = exact["classifier_weight"].grad
    fused_layer(given, 2, backend=fused, reduction="sum").backward()
    error = relative_error(given["classifier_weight"].grad, true)
    given["classifier_weight"].grad = None
    for begin in range(0, 512, 2):
        part = {**given, "input": given["input"][begin : begin + 2], "target": given["target"][begin : begin + 2]}
        two_steps(part, backend=fused, reduction="sum").backward()  # .grad adds up in the dtype of the weight
    assert error <= relative_error(given["classifier_weight"].grad, true) / 2


@pytest.mark.parametrize("wanted", [("input",), ("classifier_weight",), ("bias",), ("input", "bias"), ()], ids=str)
@reductions
def test_only_the_gradients_that_are_wanted(backend: str, wanted: tuple[str, ...], reduction: str) -> None:
    given = layer()
    all_of = dict(zip(("input", "classifier_weight", "bias"), gradients(two_steps(given), given), strict=True))
    for name in all_of:
        given[name].requires_grad_(name in wanted)
    loss = fused_layer(given, backend=backend, reduction=reduction)
    assert loss.requires_grad == bool(wanted)
    if not wanted:
        return
    counted = (given["target"] != -100).sum()
    (loss.mean() if reduction == "mean" else loss.sum() / counted).backward()
    for name in all_of:
        if name in wanted:
            expected = all_of[name] / torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            torch.testing.assert_close(given[name].grad, expected.float(), rtol=1e-4, atol=1e-6)
        else:
            assert given[name].grad is None


class Sizes(TorchDispatchMode):
    """Numbers of elements of all that is made, views of what was given aside."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = {linear_loss: _linear_loss, linear_gradient: _linear_gradient}.get(func)
        if inside:
            with self:
                result = inside(*args)
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.given:
                self.made.add(leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@reductions
def test_no_more_than_a_chunk_of_logits_is_ever_made(fused: str, reduction: str) -> None:
    given = layer(rows=640)
    with Sizes(given) as sizes:
        fused_layer(given, backend=fused, reduction=reduction, return_stats=True)[0].sum().backward()
    assert {8 * C, C * D, 640 * D} <= sizes.made
    assert max(sizes.made) == 640 * D  # of 640 * C
    with Sizes(given) as sizes, torch.no_grad():
        fused_layer(given, backend=fused, reduction=reduction)
    fields = NARROW_FIELDS if fused == "cpu" else GRADIENT_FIELDS
    assert max(sizes.made) == 640 * fields  # of its rows: nothing is made for a gradient


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_takes_the_gradients_and_a_chunk(fused: str, dtype: str) -> None:
    """The logits would take 128 MiB in float32, their gradient as much; a chunk may take 64."""
    found = measure(["fused"], (2048, 64, 16384), dtype, rounds=1, threads=2)
    # Processors without instructions for bfloat16 multiply float32 copies of the classifier and of its gradient.
    copies = 0 if dtype == "float32" else 2 * 16384 * 64 * 4
    assert found["fused"][0] <= ((64 + 20) << 20) + copies


def test_the_budget_sets_the_chunk_and_not_the_result(backend: str) -> None:
    given = layer(torch.float64)
    outcomes = []
    for chunk_bytes in (None, 1, 8 * C * 10, 1 << 40):
        loss = linear_dynamics_aware_loss(
            **given, q=0.7, bootstrap_weight=0.4, chunk_bytes=chunk_bytes, backend=backend
        )
        outcomes.append((loss.detach(), *gradients(loss, given)))
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ignored", ["all", "no rows"])
@reductions
def test_no_row_to_learn_from(backend: str, ignored: str, reduction: str) -> None:
    given = layer(rows=0 if ignored == "no rows" else 9)
    given["target"][:] = -100
    loss, plain = (f(given, backend=backend, reduction=reduction) for f in (fused_layer, two_steps))
    torch.testing.assert_close(loss, plain, equal_nan=True)
    for gradient in gradients(loss, given):
        assert not gradient.any()


@pytest.mark.parametrize("shape", [(D,), (5, D), (5, D, 3), (5, D, 3, 2)], ids=str)
@reductions
def test_features_stand_where_classes_stand_in_logits(backend: str, shape: tuple[int, ...], reduction: str) -> None:
    given = layer(torch.float64)
    given["input"] = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    given["target"] = torch.randint(C, shape[:1] + shape[2:] if len(shape) > 1 else ())
    loss, stats = fused_layer(given, backend=backend, reduction=reduction, return_stats=True)
    place = int(len(shape) > 1)
    logits = F.linear(given["input"].movedim(place, -1), given["classifier_weight"], given["bias"]).movedim(-1, place)
    plain = dynamics_aware_loss(logits, given["target"], 0.7, 0.4, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients(loss, given), gradients(plain, given))
    assert stats.prediction.shape == given["target"].shape


@reductions
@halves
def test_autocast_makes_logits_as_f_linear_does(fused: str, dtype: torch.dtype, reduction: str) -> None:
    given = layer()
    with torch.autocast("cpu", dtype=dtype):
        loss, plain = (f(given, backend=fused, reduction=reduction) for f in (fused_layer, two_steps))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain)
    for got, expected in zip(gradients(loss, given), gradients(plain, given), strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, expected.double()) < 2e-2
    exact = layer(torch.float64)
    with torch.autocast("cpu", dtype=dtype):  # which leaves float64 alone
        torch.testing.assert_close(fused_layer(exact, backend=fused), two_steps(exact, backend=fused))


def test_a_mixture_of_dtypes_is_autocast_s_to_take(fused: str) -> None:
    given = layer()
    given["input"] = given["input"].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fused_layer(given, backend=fused), two_steps(given, backend=fused))


def test_float16_gradients_survive_a_grad_scaler(fused: str) -> None:
    given = layer(torch.float16, rows=4096, classes=20)
    (fused_layer(given, 512, backend=fused) * 65536.0).backward()
    exact = {name: given[name].detach().double().requires_grad_() for name in ("input", "classifier_weight", "bias")}
    (two_steps({**exact, "target": given["target"]}, backend="eager") * 65536.0).backward()
    for name, leaf in exact.items():
        assert relative_error(given[name].grad, leaf.grad) < 5e-3


@dtypes
@pytest.mark.parametrize("objective", ["dynamics_aware", "dynamics_aware_hard", "brier"])
@pytest.mark.parametrize(("rows", "classes"), [(9, 1), (9, 17), (9, 4099), (200, 5), (200, 30)])
def test_a_gradient_in_the_place_of_its_logits_has_the_same_bits(
    fused: str, dtype: torch.dtype, objective: str, rows: int, classes: int
) -> None:
    case = make_case(rows, classes, dtype)
    (of_table,) = (entry for entry in OBJECTIVES if entry.name == objective)
    hard, knobs = of_table.needs_argmax, torch.tensor([0.7, 0.4])[: len(of_table.knobs)]
    arguments = (case.logits, case.target, knobs, None, of_table.id, 2, 0, False, hard)
    _, _, *kept = KERNELS[fused].loss_and_fields(*arguments)
    fields, prediction, *correction = kept
    upstream = torch.linspace(0.1, 1.0, rows, dtype=fields.dtype)
    arguments = (case.target, fields, prediction, upstream, 2, *correction)
    expected = KERNELS[fused].gradient(case.logits, *arguments)
    room = case.logits.clone()
    got = KERNELS[fused].overwrite(room, *arguments)
    assert torch.equal(got, expected)
    assert got.data_ptr() == room.data_ptr()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bad_label_is_named_by_its_row(backend: str, compiled: bool) -> None:
    if compiled and backend == "eager":
        pytest.skip("plain operations under compile make its row NaN")
    given = layer()
    given["target"][30] = C
    call = lambda: fused_layer(given, backend=backend)  # noqa: E731
    with pytest.raises((ValueError, RuntimeError), match=f"target at row 30 is {C}"):
        torch.compile(call, fullgraph=True, backend="aot_eager")() if compiled else call()


def test_nan_is_not_hidden(backend: str) -> None:
    given = layer()
    given["input"] = given["input"].detach().clone()
    given["input"][3, 5] = float("nan")
    loss = fused_layer(given, backend=backend, reduction="none")
    assert loss.isnan().tolist() == [row == 3 for row in range(N)]
    assert fused_layer(given, backend=backend).isnan()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": None}, TypeError, "input must be a tensor, got NoneType"),
        ({"input": torch.zeros(N, D, dtype=torch.int64)}, TypeError, "input must be float16.*got torch.int64"),
        ({"input": torch.tensor(0.0)}, ValueError, "input must have shape .*0-d"),
        ({"input": torch.zeros(N, D + 1)}, ValueError, rf"classifier_weight must have shape \(C, {D + 1}\).*got"),
        ({"classifier_weight": torch.zeros(D)}, ValueError, r"classifier_weight must have shape.*got shape \(24,\)"),
        ({"classifier_weight": torch.zeros(0, D)}, ValueError, "classifier_weight must have shape"),
        ({"classifier_weight": torch.zeros(C, D).half()}, TypeError, "classifier_weight must have the dtype of input"),
        (
            {"classifier_weight": torch.zeros(C, D, device="meta")},
            ValueError,
            "classifier_weight must be on the device",
        ),
        ({"bias": torch.zeros(C - 1)}, ValueError, rf"bias must have shape \({C},\).*got shape \({C - 1},\)"),
        ({"bias": 3.0}, TypeError, "bias must be a tensor, got float"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be an int >= 1 or None, got 0"),
        ({"chunk_bytes": 1.5}, ValueError, "chunk_bytes must be"),
        ({"target": torch.zeros(N + 1, dtype=torch.long)}, ValueError, rf"target must have shape \({N},\)"),
        ({"q": -1.0}, ValueError, "q must be finite and >= 0"),
        ({"backend": "fast"}, ValueError, "backend must be"),
        ({"weight": torch.ones(D)}, ValueError, rf"weight must have one value a class, shape \({C},\)"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_dynamics_aware_loss(**{**layer(), "q": 0.7, **changes})
