"""What the short way of a call leaves to Python: the uncommon and the wrong, modes and transforms around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dal_kernels import dynamics_aware_loss, node
from support.short_way import CASE, longer, took

__all__ = ["took"]

pytestmark = pytest.mark.skipif(node.short_way is None, reason=f"no autograd node: {node.error}")


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
