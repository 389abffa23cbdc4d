"""What every test shares: one thread setting, and which backends can read CPU tensors here."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dal_kernels import available_backends

# Beside the repository there may be an executor of compiled GPU code.
sys.path.append(str(Path(__file__).parent.parent.parent / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    torch.manual_seed(0)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"dal_kernels backend {name}: {reason}" for name, reason in available_backends().items()]


# How Triton's kernels run on CPU tensors in this process: "interpreter", or "executor asc" and "executor desc" (the
# order of warps); or how the CUDA C++ kernels do: "asc" or "desc". test_triton.py and test_cuda.py start processes with
# them; they run a sample of the tests, the same each time.
TRITON_MODE = os.environ.get("DAL_TEST_TRITON", "")
CUDA_ORDER = os.environ.get("DAL_TEST_CUDA", "")
EMULATED = ["triton"] if TRITON_MODE else ["cuda"] if CUDA_ORDER else []
SAMPLE = int(os.environ.get("DAL_TEST_SAMPLE", "1"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    for name in EMULATED:
        mine = [item for item in items if getattr(item, "callspec", None) and name in item.callspec.params.values()]
        items[:] = [item for item in mine if zlib.crc32(item.nodeid.encode()) % SAMPLE == 0]


def _available(name: str) -> bool:
    return available_backends()[name].startswith("available")


@pytest.fixture(scope="session")
def triton_on_cpu() -> Iterator[None]:
    """Triton's kernels on CPU tensors, in the way that DAL_TEST_TRITON names."""
    import gpuless

    mode, _, order = TRITON_MODE.partition(" ")
    if mode == "interpreter":
        from gpuless import interpreter_fixes

        interpreter_fixes.apply()
        yield
    else:
        with gpuless.install(90, warp_order=order):
            yield


@pytest.fixture(scope="session")
def cuda_on_cpu() -> Iterator[None]:
    """The CUDA C++ kernels on CPU tensors, with warps in the order that DAL_TEST_CUDA names."""
    from benchmarks import cuda_emulator

    with cuda_emulator.installed(CUDA_ORDER):
        yield


def _usable(request: pytest.FixtureRequest) -> str:
    """The backend that a fixture is parametrised with, ready to run; skips where it is not available."""
    if request.param in EMULATED:
        request.getfixturevalue(f"{request.param}_on_cpu")
    if not _available(request.param):
        pytest.skip(available_backends()[request.param])
    return request.param


@pytest.fixture(params=["cpu", "eager", *EMULATED])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that takes CPU tensors."""
    return _usable(request)


@pytest.fixture(params=["cpu", *EMULATED])
def fused(request: pytest.FixtureRequest) -> str:
    """Each fused backend that takes CPU tensors, for what only fused kernels promise."""
    return _usable(request)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's thread count back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
