"""Which backends there are, and what one says that is not."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch

from dal_kernels import available_backends, dynamics_aware_loss, node, ops
from dal_kernels.backends import choose

# Both ways, because one of them hands what is wrong to the other.
pytestmark = pytest.mark.usefixtures("way")

LOGITS, TARGET = torch.linspace(-2, 3, 20).sin().mul(3).reshape(4, 5), torch.tensor([1, 0, 4, 2])


def test_backends_are_listed_with_a_reason() -> None:
    listed = available_backends()
    assert set(listed) == {"triton", "cuda", "cpu", "eager"}
    assert all(text.startswith(("available: ", "not available: ")) for text in listed.values())
    assert listed["eager"].startswith("available")


@pytest.mark.parametrize("backend", ["fused", "", "CPU", None])
def test_unknown_backend_is_named(backend: Any) -> None:
    with pytest.raises(ValueError, match=f"^backend .*'auto', 'triton', 'cuda', 'cpu' or 'eager', got {backend!r}"):
        dynamics_aware_loss(LOGITS, TARGET, 0.7, backend=backend)


@pytest.mark.parametrize("backend", [name for name, text in available_backends().items() if text.startswith("not")])
def test_backend_that_is_not_available_says_why(backend: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        dynamics_aware_loss(LOGITS, TARGET, 0.7, backend=backend)
    assert str(caught.value) == f"backend {backend!r} is {available_backends()[backend]}"


def test_without_the_extension_auto_is_eager_and_cpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    same = dynamics_aware_loss(LOGITS, TARGET, 0.7, backend="eager")
    monkeypatch.setattr(ops, "native_error", "no such file")
    monkeypatch.delitem(ops.KERNELS, "cpu", raising=False)
    monkeypatch.setattr(node, "short_way", None)  # which remembers that there was one
    monkeypatch.setattr(choose, "_warn_once", functools.cache(choose._warn_once.__wrapped__))  # as in a new process
    assert available_backends()["cpu"].startswith("not available: ")
    with pytest.raises(RuntimeError, match=r"^backend 'cpu' is not available: .*no such file"):
        dynamics_aware_loss(LOGITS, TARGET, 0.7, backend="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(dynamics_aware_loss(LOGITS, TARGET, 0.7), same)
        assert torch.equal(dynamics_aware_loss(LOGITS, TARGET, 0.7), same)
    (warning,) = caught
    assert "slower" in str(warning.message)
    assert "no such file" in str(warning.message)
    assert warning.filename == __file__  # the line that called, not the library's and not that line's caller


def test_cpu_backend_takes_no_tensors_of_other_devices() -> None:
    with pytest.raises(ValueError, match=r"^backend 'cpu' .*got input on meta"):
        dynamics_aware_loss(LOGITS.to("meta"), TARGET.to("meta"), 0.7, backend="cpu")
