"""The short way of a call, through C++: what it takes, that it is what the long way is, and when it is set aside."""

from __future__ import annotations

import functools
import json
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from build_support import cuda
from dal_kernels import DynamicsAwareLoss, dynamics_aware_loss, extensions, node, pace
from dal_kernels.arguments import RowStats
from dal_kernels.backends import choose
from dal_kernels.functional import loss_of
from dal_kernels.objectives import dynamics_aware
from dal_kernels.pace import pace_numbers
from support.axes import dtypes, objectives, reductions
from support.truth import make_case

pytestmark = pytest.mark.skipif(node.short_way is None, reason=f"no autograd node: {node.error}")
CASE = make_case(12, 40)


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call so far, whether the short way took it."""
    answers: list[bool] = []
    short_way = node.short_way
    assert short_way is not None

    def spy(*arguments: Any) -> Any:
        result = short_way(*arguments)
        answers.append(result is not None)
        return result

    monkeypatch.setattr(node, "short_way", spy)
    return answers


def longer(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(node, "short_way", None)
        return call()


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    return (result[0], *result[1]) if isinstance(result, tuple) else (result,)


# --- it is what the long way is


@pytest.mark.parametrize("stats", [False, True], ids=["loss", "with statistics"])
@pytest.mark.parametrize("upstream", [1.0, -0.75])
@reductions
@dtypes
def test_both_ways_give_the_same_bits(
    fused: str, dtype: torch.dtype, reduction: str, upstream: float, stats: bool, took: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    case = make_case(9, 21, dtype)
    case.target[3] = 4
    weight = torch.linspace(0.5, 2, 21).to(torch.float64 if dtype == torch.float64 else torch.float32)

    def outcome() -> tuple[Tensor, ...]:
        logits = case.logits.clone().requires_grad_()
        result = dynamics_aware_loss(
            logits, case.target, 0.8, 0.4, weight=weight, ignore_index=4, reduction=reduction, return_stats=stats,
            backend=fused,
        )  # type: ignore[call-overload]  # fmt: skip
        loss, *rest = tensors_of(result)
        loss.backward(torch.full_like(loss, upstream))
        assert not any(tensor.requires_grad for tensor in rest)
        return (loss.detach(), logits.grad, *rest)

    found, expected = outcome(), longer(outcome, monkeypatch)
    assert took == [True]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@objectives
def test_each_loss_of_the_table_takes_the_short_way(
    fused: str, objective: Any, took: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = tuple(2 if knob.whole else min(knob.least + 0.7, knob.most) for knob in objective.knobs)

    def outcome() -> tuple[Tensor, Tensor]:
        logits = CASE.logits.clone().requires_grad_()
        loss = loss_of(objective.id, numbers, logits, CASE.target, backend=fused)
        (3 * loss).backward()
        assert logits.grad is not None
        return loss.detach(), logits.grad

    found, expected = outcome(), longer(outcome, monkeypatch)
    assert took == [True]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8], ids=str)
@reductions
@pytest.mark.parametrize("shape", [(12, 21), (3, 21, 4), (2, 21, 2, 3)], ids=str)
def test_labels_of_images_take_the_short_way(
    fused: str, shape: tuple[int, ...], reduction: str, labels: torch.dtype, took: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    leaf = torch.randn(shape, generator=generator)
    target = torch.randint(21, (shape[0], *shape[2:]), generator=generator)
    target.view(-1)[3] = 255 if labels == torch.uint8 else 100

    def outcome() -> tuple[Tensor, ...]:
        logits = leaf.clone().requires_grad_()
        result = dynamics_aware_loss(
            logits, target.to(labels), 0.8, 0.4, ignore_index=int(target.view(-1)[3]), reduction=reduction,
            return_stats=True, backend=fused,
        )  # type: ignore[call-overload]  # fmt: skip
        loss, *rest = tensors_of(result)
        assert loss.shape == (target.shape if reduction == "none" else ())
        assert {tensor.shape for tensor in rest} == {target.shape}
        loss.sum().backward()
        return (loss.detach(), logits.grad, *rest)

    found, expected = outcome(), longer(outcome, monkeypatch)
    assert took == [True]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_what_the_statistics_are(fused: str) -> None:
    logits = CASE.logits.clone().requires_grad_()
    loss, stats = dynamics_aware_loss(logits, CASE.target, 0.8, return_stats=True, backend=fused)  # type: ignore[call-overload]
    assert type(stats) is RowStats
    stats.target_prob.zero_()  # theirs who got it
    loss.backward()
    again = CASE.logits.clone().requires_grad_()
    dynamics_aware_loss(again, CASE.target, 0.8, backend=fused).backward()  # type: ignore[call-overload]
    torch.testing.assert_close(logits.grad, again.grad, rtol=0, atol=0)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient(grad: Any, fused: str, took: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = CASE.logits.clone().requires_grad_()

    def outcome() -> Any:
        with grad():
            result = dynamics_aware_loss(logits, CASE.target, 0.8, return_stats=True, backend=fused)  # type: ignore[call-overload]
        return tensors_of(result)

    found = outcome()
    assert took == [True]
    assert not found[0].requires_grad
    torch.testing.assert_close(found, longer(outcome, monkeypatch), rtol=0, atol=0)


@pytest.mark.parametrize("leaf", [True, False], ids=["with a gradient", "without"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@dtypes
def test_a_schedule_is_told_on_the_way(
    fused: str, dtype: torch.dtype, reduction: Any, leaf: bool, took: list[bool]
) -> None:
    """Of the call with the knobs from before it, which the telling writes over."""
    case = make_case(9, 21, dtype)
    case.target[3] = -100
    results = []
    for told in (True, False):
        numbers = pace_numbers(torch.device("cpu"))
        numbers.all.copy_(torch.tensor([0.7, 0.2, 0.8, 0.4, 1.4, 0.0]))
        logits = case.logits.clone().requires_grad_(leaf)
        hearer = (numbers.all, 1, 1.5, 0.8) if told else None
        result: Any = loss_of(
            dynamics_aware.id, numbers.knobs, logits, case.target, reduction=reduction, return_stats=True,
            backend=fused, hearer=hearer,
        )  # type: ignore[arg-type]  # fmt: skip
        loss, stats = (result, None) if told else result
        if leaf:
            loss.sum().backward()
        if stats is not None:
            pace.see(numbers, stats, case.target, 1.5, 0.8)
        results.append((loss.detach(), logits.grad, numbers.all))
    (loss, gradient, numbers), expected = results
    assert took == [True, True]
    torch.testing.assert_close((loss, gradient), expected[:2], rtol=0, atol=0)
    torch.testing.assert_close(numbers, expected[2], rtol=1e-5, atol=1e-6)


# --- knobs


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["numbers", "tensors"])
def test_numbers_that_change_are_seen(kind: Callable[[float], Any], took: list[bool]) -> None:
    for q in (0.3, 0.9, 0.3, 1.2):
        found = dynamics_aware_loss(CASE.logits, CASE.target, kind(q), kind(0.2))
        expected = dynamics_aware_loss(CASE.logits, CASE.target, q, 0.2, backend="eager")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert took[::2] == [True] * 4


def test_more_numbers_than_are_remembered() -> None:
    first = dynamics_aware_loss(CASE.logits, CASE.target, 0.25)
    for step in range(1500):
        dynamics_aware_loss(CASE.logits, CASE.target, 0.3 + step / 1500)
    assert torch.equal(dynamics_aware_loss(CASE.logits, CASE.target, 0.25), first)


# --- what it leaves to the long way


class Subclass(Tensor):
    pass


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


UNCOMMON: dict[str, dict[str, Any]] = {
    "1-d": {"input": CASE.logits[0], "target": CASE.target[0]},
    "labels without a sign": {"target": CASE.target.to(torch.uint64)},
    "labels of another shape": {"input": CASE.logits.reshape(3, 40, 4), "target": CASE.target.reshape(4, 3)},
    "one row a label": {"target": CASE.target[:3]},
    "a label that is none": {"target": torch.full_like(CASE.target, 40)},
    "a subclass": {"input": CASE.logits.as_subclass(Subclass)},
    "a knob a row": {"q": torch.full((12,), 0.7)},
    "a knob that learns": {"q": torch.tensor(0.7, requires_grad=True)},
    "a NaN": {"q": float("nan")},
    "a NaN in a tensor": {"q": torch.tensor(float("nan")), "bootstrap_weight": torch.tensor(0.2)},
    "return_stats that is no bool": {"return_stats": torch.tensor([True, False])},
    "no number": {"q": "0.7"},
    "a bool": {"q": True},
    "a knob below 0": {"q": -1.0},
    "sample_weight": {"sample_weight": torch.ones(12)},
    "weight of another dtype": {"weight": torch.ones(40, dtype=torch.float64)},
    "weights too few": {"weight": torch.ones(39)},
    "reduction": {"reduction": "median"},
    "ignore_index no int": {"ignore_index": 1.0},
    "ignore_index too large": {"ignore_index": 2**64},
    "backend": {"backend": "none such"},
    "eager": {"backend": "eager"},
    "integers": {"input": CASE.logits.int()},
    "no classes": {"input": CASE.logits[:, :0]},
    "meta": {"input": CASE.logits.to("meta"), "target": CASE.target.to("meta")},
    "no tensor": {"input": [[1.0]]},
    "conjugated": {"input": torch.complex(CASE.logits, CASE.logits).conj().imag},
}


@pytest.mark.parametrize("changes", UNCOMMON.values(), ids=UNCOMMON)
def test_the_uncommon_and_the_wrong_are_as_the_long_way_has_them(
    changes: dict[str, Any], took: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"input": CASE.logits, "target": CASE.target, "q": 0.7, "bootstrap_weight": 0.2, **changes}

    def outcome() -> Any:
        try:
            return dynamics_aware_loss(**arguments)
        except Exception as error:
            return type(error), str(error)

    found, expected = outcome(), longer(outcome, monkeypatch)
    assert not any(took)
    if isinstance(expected, tuple):
        assert found == expected
    else:
        assert type(found) is type(expected)
        assert found.device.type == "meta" or torch.equal(found, expected)


@pytest.mark.parametrize("mode", [SeesFunctions, SeesOperators, FakeTensorMode, forward_ad.dual_level])
def test_modes_around_a_call_see_it(mode: Callable[[], Any], took: list[bool]) -> None:
    with mode():
        logits = torch.zeros(3, 4) if mode is FakeTensorMode else CASE.logits
        target = torch.zeros(3, dtype=torch.long) if mode is FakeTensorMode else CASE.target
        dynamics_aware_loss(logits, target, 0.7)
    assert took[0] is False  # what a mode of functions then calls itself is a call without it


def test_transforms_see_it(took: list[bool]) -> None:
    torch.func.grad(lambda logits: dynamics_aware_loss(logits, CASE.target, 0.7))(CASE.logits)
    torch.vmap(lambda logits: dynamics_aware_loss(logits, CASE.target, 0.7))(CASE.logits.expand(2, -1, -1))
    torch.jit.trace(lambda logits: dynamics_aware_loss(logits, CASE.target, 0.7), (CASE.logits,), check_trace=False)
    assert not any(took)


# --- with modules, and set aside


def test_a_module_takes_it(took: list[bool]) -> None:
    criterion = DynamicsAwareLoss(total_steps=10)
    for _ in range(3):
        criterion(CASE.logits.clone().requires_grad_(), CASE.target).backward()
    functional_call(criterion, {}, (CASE.logits, CASE.target))
    assert took == [True] * 4


def test_a_threads_backward(took: list[bool]) -> None:
    # Autograd walks a CUDA graph in a thread of its own, without the GIL; here a thread of Python's does the same.
    from concurrent.futures import ThreadPoolExecutor

    logits = CASE.logits.clone().requires_grad_()
    loss = dynamics_aware_loss(logits, CASE.target, 0.7)
    expected = CASE.logits.clone().requires_grad_()
    dynamics_aware_loss(expected, CASE.target, 0.7, backend="eager").backward()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    torch.testing.assert_close(logits.grad, expected.grad)


def test_an_extension_for_another_torch_is_not_loaded() -> None:
    own = extensions.read_record(extensions.PACKAGE)["torch"]
    with pytest.raises(ImportError) as caught:
        extensions.load("_node", made_for="9.9")
    assert str(caught.value).startswith(
        f"it was built for torch {own}, and this is torch 9.9; install dal_kernels again"
    )


def test_one_of_other_sources_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(*arguments: Any) -> None:
        raise RuntimeError("learn takes 3 arguments, got 5")

    monkeypatch.setattr(extensions, "load", lambda *_, **__: types.SimpleNamespace(learn=learn))
    monkeypatch.setattr(node, "error", None)
    assert node._load() is None
    assert node.error is not None
    assert "other sources than these (learn takes 3 arguments, got 5); install" in node.error


def test_without_it_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "short_way", None)
    monkeypatch.setattr(node, "error", "no such file")
    monkeypatch.setattr(node, "say_once", functools.cache(node.say_once.__wrapped__))  # as in a new process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            dynamics_aware_loss(CASE.logits, CASE.target, 0.7)
    (warning,) = caught
    assert "no such file" in str(warning.message)
    assert "host" in str(warning.message)
    assert warning.filename == __file__


# --- which backend "auto" takes on a GPU


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        ((), (9, 0), False),
        (("sm_90",), (9, 0), True),
        (("sm_80",), (8, 6), True),
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("sm_80", "compute_80"), (12, 0), True),
        (("compute_90",), (8, 9), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),
        (("sm_75", "sm_100"), (10, 0), True),
    ],
)
def test_which_gpus_an_extension_is_for(
    architectures: tuple[str, ...], capability: tuple[int, int], fits: bool
) -> None:
    assert choose._has_code_for(capability, architectures) is fits


def test_what_nvcc_is_told_to_make() -> None:
    flags = ["nvcc", "-gencode", "arch=compute_80,code=[sm_80]", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"]
    assert cuda.codes(flags) == ["sm_80", "sm_90", "compute_90"]


def test_the_record_says_for_which_gpus(tmp_path: Path) -> None:
    file = extensions.write_record(tmp_path, extensions.PACKAGE, {"_cuda": None}, "2.13.0", ["sm_90"])
    assert json.loads(file.read_text(encoding="utf-8"))["architectures"] == ["sm_90"]
