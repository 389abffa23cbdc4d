"""What every test shares: random numbers that do not depend on the order of tests, its part of the cores, and which
backends can read CPU tensors here.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dal_kernels import ScheduleWarning, available_backends, node

# Beside the repository there may be an executor of compiled GPU code.
sys.path.append(str(Path(__file__).parent.parent.parent / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    """Under pytest-xdist the workers share the cores, and so do the processes that they start. Triton, which keeps what
    it compiles in the home folder, gets another where that cannot be written to.
    """
    try:
        Path.home().joinpath(".triton").mkdir(exist_ok=True)
    except OSError:
        os.environ.setdefault("TRITON_HOME", tempfile.mkdtemp())
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What a test compiled is forgotten, because torch takes the code of one module for another of its class that has
    other hooks, and compiles a function a few times and no more: a test would depend on those before it.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Again, because a fixture that a test shares with others may have been made for an earlier one."""
    torch.manual_seed(0)


# glibc's, where it is: Python has no name for it.
_give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Freed memory goes back to the system, because an executor of GPU code frees gigabytes in small pieces, which
    glibc keeps: a worker of long rows in float64 grew to 20 GB, and the system killed it.
    """
    if _give_back is not None and (EMULATED or "cuda" in nodeid or "triton" in nodeid):
        _give_back(0)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"dal_kernels backend {name}: {reason}" for name, reason in available_backends().items()]


# How Triton's kernels run on CPU tensors in this process: "interpreter", or "executor asc" and "executor desc" (the
# order of warps); or how the CUDA C++ kernels do: "asc" or "desc". test_triton.py and test_cuda.py start processes with
# them; they run a sample of the tests, the same each time.
TRITON_MODE = os.environ.get("DAL_TEST_TRITON", "")
CUDA_ORDER = os.environ.get("DAL_TEST_CUDA", "")
EMULATED = ["triton"] if TRITON_MODE else ["cuda"] if CUDA_ORDER else []
SAMPLE = int(os.environ.get("DAL_TEST_SAMPLE", "1"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in items:
        if sampled := item.get_closest_marker("sampled"):
            name = item.nodeid.partition("[")[0]
            if seen[name] % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    for name in EMULATED:
        mine = [item for item in items if getattr(item, "callspec", None) and name in item.callspec.params.values()]
        # By the name alone, so that a test stays in the sample, or out of it, wherever its file lies.
        items[:] = [item for item in mine if zlib.crc32(item.name.encode()) % SAMPLE == 0]


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
        from support import replaying

        with gpuless.install(90, warp_order=order), replaying.installed():
            yield


@pytest.fixture(scope="session")
def cuda_on_cpu() -> Iterator[None]:
    """The CUDA C++ kernels on CPU tensors, with warps in the order that DAL_TEST_CUDA names."""
    from benchmarks import cuda_emulator

    with cuda_emulator.installed(CUDA_ORDER):
        yield


@pytest.fixture(scope="session")
def ptx(request: pytest.FixtureRequest) -> Iterator[None]:
    """The CUDA C++ kernels' PTX, compiled once for all processes of this run."""
    from benchmarks import cuda_emulator
    from support.children import made_once

    if "DAL_TEST_PTX" in os.environ or cuda_emulator.missing() is not None:
        yield
        return
    os.environ["DAL_TEST_PTX"] = str(made_once(request, "ptx", cuda_emulator.compile_ptx))
    yield
    del os.environ["DAL_TEST_PTX"]


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


@pytest.fixture(params=["long way"] if node.short_way is None else ["short way", "long way"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a call comes to its kernels: by one C++ function where it is built and can, or through Python."""
    if request.param == "long way":
        monkeypatch.setattr(node, "short_way", None)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's thread count back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What was warned of schedules so far, each as often as it was said."""
    texts: list[str] = []

    def show(message: Warning | str, category: type[Warning], *place: object) -> None:
        if issubclass(category, ScheduleWarning):
            texts.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        yield texts
