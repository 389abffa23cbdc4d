"""The microbenchmarks: what is measured is right, and one command makes the whole report."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.machine import processor
from benchmarks.micro import __main__ as command
from benchmarks.micro import run
from benchmarks.micro.cases import DTYPES, METHODS, MODES, SIZES, TINY, Size, methods
from benchmarks.micro.contenders import (
    AUTHORS,
    COMPILED_CROSS_ENTROPY,
    COPY,
    CROSS_ENTROPY,
    OURS,
    PROXIES,
    REFERENCE,
    REFILL,
    RULERS,
    Contender,
    absent,
    contenders,
    losses,
)
from benchmarks.micro.results import BenchmarkError
from dal_kernels import reference
from support.children import printed_by

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

# ---- the contenders


@devices
def test_every_rival_computes_what_it_is_said_to(device: str) -> None:
    logits, target = torch.randn(33, 17, device=device), torch.randint(17, (33,), device=device)
    for name, loss in losses(device).items():
        exact, leaf = logits.double().requires_grad_(), logits.clone().requires_grad_()
        if name in (CROSS_ENTROPY, COMPILED_CROSS_ENTROPY, *PROXIES):
            true = F.cross_entropy(exact, target)
        else:
            true = reference.dynamics_aware_loss(exact, target, 1.2, 0.4, official=name == AUTHORS)
        true.backward()
        found = loss(leaf, target)
        found.backward()
        assert exact.grad is not None
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(leaf.grad, exact.grad.float(), rtol=1e-4, atol=1e-7)


def test_proxies_that_cannot_be_had_are_named() -> None:
    assert absent("cpu") == dict.fromkeys(PROXIES, "of GPU tensors only")


@pytest.mark.parametrize("name", [OURS, REFERENCE, COPY, REFILL])
@pytest.mark.parametrize("mode", MODES)
def test_a_call_leaves_nothing_behind(name: str, mode: str) -> None:
    call, other = (Contender(name, mode, Size(5, 7), "bf16", "cpu") for _ in range(2))
    assert torch.equal(call.logits, other.logits)
    assert call.logits.data_ptr() != other.logits.data_ptr()
    assert call.logits.dtype == torch.bfloat16
    assert call.logits.requires_grad == (mode != "no-grad" and name in (OURS, REFERENCE))
    call()
    assert call.logits.grad is None


def test_rulers_copy_the_logits() -> None:
    call = Contender(REFILL, "no-grad", Size(5, 7), "fp32", "cpu")
    call()
    assert call.other is not None
    assert torch.equal(call.other, call.logits)


def test_a_step_goes_backward_and_a_forward_does_not() -> None:
    for mode in MODES:
        call, seen = Contender(REFERENCE, mode, Size(5, 7), "fp32", "cpu"), []
        if call.logits.requires_grad:
            call.logits.register_hook(seen.append)
        call()
        assert len(seen) == (mode == "step")


# ---- what is measured


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("size", [TINY, *SIZES], ids=str)
def test_every_size_is_measured_in_the_ways_that_suit_it(size: Size, device: str) -> None:
    found = methods(size, device, memory=False)
    assert methods(size, device, memory=True) == {"memory": ("step",)}
    assert found.keys() <= METHODS.keys()
    assert ("host" in found) == (size == TINY)
    assert ("graph" in found) == (device == "cuda" and size != TINY)
    assert "memory" not in found
    for method, modes in found.items():
        for mode in modes:
            names = contenders(method, mode, "cpu")
            assert names[0] == OURS
            rulers = [name for name in names if name in RULERS.values()]
            assert rulers == ([] if method == "host" or mode == "forward" else [RULERS[mode]])
            assert CROSS_ENTROPY in names
            assert (REFERENCE in names) == (AUTHORS in names) == (mode != "forward" and method != "cold")


# ---- the command


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny real run."""
    folder = tmp_path_factory.mktemp("bench")
    options = ["--repeats=2", "--benchmark-max-time=0.001", "--device=cpu", "-k", "not compile"]
    assert command.main(["--sizes", "2x3", "8x3", "--dtypes", "fp32", "bf16", "--out", str(folder), *options]) == 0
    return folder


@pytest.mark.xdist_group("report")
def test_one_command_writes_a_report_with_its_figures(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    for title in ("Forward + backward, warm", "Forward of a step, warm", "Forward without gradient, warm"):
        assert f"## {title}\n" in text
    for title in ("Forward + backward, cold", "Forward + backward, host", "Forward without gradient, host", "Counts"):
        assert f"## {title}\n" in text
    assert re.search(r"\| 8×3 +\| bf16 +\| +[\d.,]+ µs \([\d.,]+ to [\d.,]+\) \| +\d+% \|", text)
    assert "NOT times" in text
    assert processor() in text
    pictures = re.findall(r"\((\w+\.png)\)", text)
    assert pictures == ["time.png", "ratios.png", "counts.png"]
    assert {path.name for path in report.iterdir()} == {*pictures, "report.md", "benchmark.json"}
    assert all((report / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.xdist_group("report")
def test_contenders_take_turns(report: Path) -> None:
    document = json.loads((report / "benchmark.json").read_text(encoding="utf-8"))
    of = [b["params"] for b in document["benchmarks"] if b["params"]["size"] == "8x3"]
    step = [p for p in of if (p["dtype"], p["method"], p["mode"]) == ("bf16", "warm", "step")]
    names = [OURS, CROSS_ENTROPY, REFERENCE, AUTHORS, COPY]
    assert [(p["repeat"], p["contender"]) for p in step] == [(turn, name) for turn in (0, 1) for name in names]
    assert {p["dtype"] for p in of} == set(DTYPES)
    assert "node" not in document["machine_info"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes", "64*10"], "argument --sizes: '64*10' is no size: give rows x classes of at least 1, like 64x1000"),
        (["--sizes", "0x10"], "argument --sizes: '0x10' is no size"),
        (["--dtypes", "fp8"], "argument --dtypes: invalid choice: 'fp8'"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-k", "nobody"], "no benchmark of these sizes is selected by '-k nobody'"),
        (["-k", "host and step and F.cross_entropy and not compile", "--repeats=1"], "dal_kernels, which all are"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_what_cannot_be_measured_is_said(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command.main(["--sizes", "2x3", "--dtypes", "fp32", "--out", str(tmp_path / "out"), *options]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["pytest_benchmark", "matplotlib", "tabulate"])
def test_a_missing_package_is_asked_for_before_anything_is_measured(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setattr(run, "_measure", lambda *arguments: pytest.fail("it was measured"))
    assert command.main(["--sizes", "2x3"]) == 1
    said = f"benchmarks.micro: {package.replace('_', '-')} is missing: install the extra dal_kernels[bench]\n"
    assert capsys.readouterr().err == said


def test_the_command_is_imported_without_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import benchmarks.micro.__main__"
    printed_by("-c", code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_in_a_line() -> None:
    with pytest.raises(BenchmarkError) as caught:
        run.measure([TINY], options=["--device=cuda"])
    assert str(caught.value) == "--device must be cpu here, got cuda: torch.cuda.is_available() is False"


@pytest.mark.parametrize("repeat", [0, 1])
@pytest.mark.parametrize(("name", "skipped"), [(CROSS_ENTROPY, True), (OURS, False)])
def test_a_rival_that_fails_stops_nobody_else(
    name: str, skipped: bool, repeat: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.micro.bench_loss import test_loss as bench

    def fail(call: Contender) -> None:
        raise ValueError("no compiler\nat all")

    missing: dict[str, str] = {}
    monkeypatch.setattr(Contender, "__call__", fail)
    with pytest.raises(pytest.skip.Exception if skipped else ValueError, match="no compiler"):
        bench(None, "4x5", "fp32", "warm", "step", repeat, name, "cpu", missing)
    assert missing == ({CROSS_ENTROPY: "ValueError: no compiler"} if skipped else {})
