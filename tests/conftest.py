"""What every test shares: one thread setting, and which backends can read CPU tensors here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dal_kernels import available_backends


def pytest_configure(config: pytest.Config) -> None:
    torch.manual_seed(0)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"dal_kernels backend {name}: {reason}" for name, reason in available_backends().items()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def _available(name: str) -> bool:
    return available_backends()[name].startswith("available")


@pytest.fixture(params=["cpu", "eager"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that takes CPU tensors."""
    if not _available(request.param):
        pytest.skip(available_backends()[request.param])
    return request.param


@pytest.fixture
def fused() -> str:
    """The fused CPU backend, for tests of what only fused kernels promise."""
    if not _available("cpu"):
        pytest.skip(available_backends()["cpu"])
    return "cpu"


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's thread count back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
