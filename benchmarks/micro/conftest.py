"""What to measure here, as parameters of the one benchmark; the order takes contenders by turns."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from benchmarks.machine import cache_bytes, processor
from benchmarks.micro.cases import DTYPES, SIZES, Size, methods, parse_size
from benchmarks.micro.contenders import absent, contenders
from benchmarks.micro.instruments import clock, return_memory
from dal_kernels import __version__, available_backends

REPEATS = 3
ABSENT = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dal_kernels")
    group.addoption("--size", type=parse_size, action="append", metavar="NxC", help="of the logits; may be repeated")
    group.addoption("--dtype", choices=list(DTYPES), action="append", help="of the logits; may be repeated")
    group.addoption("--repeats", type=int, default=REPEATS, metavar="N", help="turns that each contender gets")
    group.addoption("--memory", action="store_true", help="measure the peak memory instead, which spoils timings")
    group.addoption("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device must be cpu here, got cuda: torch.cuda.is_available() is False")
    if config.option.memory and config.option.device == "cpu":
        return_memory()
    config.stash[ABSENT] = dict(absent(config.option.device))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    sizes: list[Size] = option.size or list(SIZES)
    cells = [
        (str(size), dtype, method, mode, repeat, name)
        for size in sizes
        for dtype in option.dtype or DTYPES
        for method, modes in methods(size, option.device, option.memory).items()
        for mode in modes
        for repeat in range(1 if method == "memory" else option.repeats)
        for name in contenders(method, mode, option.device)
    ]
    names = ["size", "dtype", "method", "mode", "repeat", "contender"]
    metafunc.parametrize(names, cells, ids=["-".join(map(str, cell)) for cell in cells])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        method = item.callspec.params["method"]
        item.add_marker(pytest.mark.benchmark(timer=clock(config.option.device, method)))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors are."""
    return request.config.option.device


@pytest.fixture(scope="session")
def missing(request: pytest.FixtureRequest) -> dict[str, str]:
    """Who is not measured, and why: what is put in here stands in the report."""
    return request.config.stash[ABSENT]


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """In place of pytest-benchmark's own, which names the host."""
    device = config.option.device
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "device": device,
        "processor": processor(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "dal_kernels": __version__,
        "backends": available_backends(),
        "cache_bytes": cache_bytes(torch.device(device)),
        "absent": config.stash[ABSENT],
    }
