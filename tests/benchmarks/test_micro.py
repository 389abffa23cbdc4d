"""The microbenchmarks: what is measured is right, the arithmetic is, and one command makes the whole report."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks.machine import cache_bytes, machine, processor
from benchmarks.micro import __main__ as command
from benchmarks.micro import instruments, run, tables
from benchmarks.micro.cases import DTYPES, LARGE, METHODS, MODES, SIZES, TINY, Size, methods
from benchmarks.micro.contenders import (
    AUTHORS,
    COMPILED,
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
from benchmarks.micro.results import BenchmarkError, Cell, Results, Spread
from dal_kernels import reference
from support.children import printed_by

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is Linux's")

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


# ---- arithmetic


def measured(contender: str, data: list[float], repeat: int = 0, mode: str = "step", **extra: Any) -> dict[str, Any]:
    method = extra.pop("method", "warm")
    params = {"size": "4x10", "dtype": "fp32", "method": method, "mode": mode, "repeat": repeat, "contender": contender}
    return {"params": params, "extra_info": extra, "stats": {"data": data}}


def results(*benchmarks: dict[str, Any]) -> Results:
    return Results([{"machine_info": {"absent": {}}, "benchmarks": list(benchmarks)}])


STEP = Cell(Size(4, 10), "fp32", "warm", "step")


def test_a_spread_is_of_quantiles() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0])
    assert (spread.low, spread.median, spread.high) == pytest.approx((1.0, 2.5, 4.0))


def test_a_ratio_compares_samples_of_a_turn() -> None:
    """The machine is ten times slower in the second turn: the ratio does not see it."""
    found = results(
        measured(OURS, [1.0, 1.0]),
        measured(CROSS_ENTROPY, [3.0, 3.0]),
        measured(OURS, [10.0], repeat=1),
        measured(CROSS_ENTROPY, [30.0], repeat=1),
    )
    assert found.ratio(STEP, CROSS_ENTROPY) == Spread(3, 3, 3)
    assert found.time(STEP, CROSS_ENTROPY).median == 3


def test_a_ratio_of_many_samples_keeps_their_spread() -> None:
    values = torch.linspace(1, 3, 5000, dtype=torch.float64)
    spread = results(measured(OURS, [1.0]), measured(CROSS_ENTROPY, values.tolist())).ratio(STEP, CROSS_ENTROPY)
    assert (spread.low, spread.median, spread.high) == pytest.approx((1.4, 2.0, 2.6), abs=0.01)


def test_shares_of_a_copy_are_of_the_bytes_that_must_move() -> None:
    """A copy moves 2 N·C in 1 s, or in 0.5 s into memory at hand: a step, the same, in 4 s; a forward half of it."""
    found = results(
        measured(COPY, [1.0]),
        measured(OURS, [4.0]),
        measured(OURS, [2.0], mode="forward"),
        measured(REFILL, [0.5], mode="no-grad"),
        measured(OURS, [1.0], mode="no-grad"),
    )
    shares = {mode: found.copy_share(STEP._replace(mode=mode)) for mode in MODES}
    assert shares == {"step": 0.25, "forward": 0.25, "no-grad": 0.25}
    assert math.isnan(results(measured(OURS, [1.0])).copy_share(STEP))


def test_replays_of_many_calls_are_of_one() -> None:
    found = results(measured(OURS, [2.0], method="graph", calls=20))
    assert found.time(STEP._replace(method="graph"), OURS).median == pytest.approx(0.1)


def test_facts_beside_the_timings_are_kept() -> None:
    found = results(measured(OURS, [9.0], method="memory", peak_bytes=7), measured(OURS, [1.0], launches=2))
    assert found.memory == {(Size(4, 10), "fp32"): {OURS: 7}}
    assert found.launches == {(STEP, OURS): 2}
    assert list(found.samples) == [STEP]
    assert "| 4×10  | fp32    | forward + backward |             2 |" in tables._launches(found)


def test_rivals_without_us_are_refused() -> None:
    with pytest.raises(BenchmarkError, match=r"dal_kernels.* is not selected at .*warm"):
        results(measured(CROSS_ENTROPY, [1.0]))


def test_who_was_missing_in_any_process_is_kept() -> None:
    documents = [{"machine_info": {"absent": {name: "why"}, "device": "cpu"}, "benchmarks": []} for name in "ab"]
    assert Results(documents).machine == {"absent": {"a": "why", "b": "why"}, "device": "cpu"}


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        (Spread(1.234e-6, 1.1e-6, 9.9e-6), "1.2 µs (1.1 to 9.9)"),
        (Spread(0.25, 9.04e-5, 1.0), "250,000 µs (90.4 to 1,000,000)"),
    ],
)
def test_times_in_words(spread: Spread, text: str) -> None:
    assert tables.times(spread) == text


# The machine is as fast as it was, then ten times slower.
BUSY = [1.0] * 5 + [10.0] * 5


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([1.0] * 10, [3.0] * 10, None),
        ([1.0] * 5 + [1.9] * 5, [3.0] * 10, None),  # as wide as the figure at most
        (BUSY, [3.0] * 10, "2 of 2 figures"),
        (
            [1.0] * 10,
            BUSY,
            r"1 of 2 figures.* 1\.6 times \(4×10, fp32, forward \+ backward, warm: F\.cross",
        ),
    ],
)
def test_a_busy_machine_is_said_on_top(ours: list[float], theirs: list[float], said: str | None) -> None:
    found = results(measured(OURS, ours), measured(CROSS_ENTROPY, theirs))
    warning = tables.busy(found)
    assert warning is None if said is None else warning and re.match(f"This machine is busy: {said}", warning)
    found.machine |= dict.fromkeys(("gpu", "cache_bytes"), None) | {"backends": {}}
    found.machine |= dict.fromkeys(("processor", "threads", "device", "system", "dal_kernels", "torch", "python"), "?")
    top = tables.document(found).splitlines()[2]
    assert top == f"**{warning}**" if warning else "busy" not in top


@pytest.mark.parametrize("dtypes", [["fp32"], ["fp32", "bf16"]], ids=len)
def test_no_word_of_a_figure_is_cut_off(dtypes: list[str]) -> None:
    figures = pytest.importorskip("benchmarks.micro.figures", reason="the extra dal_kernels[bench]")
    names = [OURS, CROSS_ENTROPY, COMPILED_CROSS_ENTROPY, COMPILED, REFERENCE, AUTHORS, COPY, *PROXIES]
    cells = [{"size": str(size), "dtype": dtype} for size in SIZES for dtype in dtypes]
    benchmarks = [measured(name, [1e-3, 2e-3]) for name in names for _ in cells]
    memory = [measured(name, [1.0], method="memory", peak_bytes=7) for name in names for _ in cells]
    for one, cell in zip([*benchmarks, *memory], cells * 2 * len(names), strict=True):
        one["params"] |= cell
    found = results(*benchmarks, *memory)
    for make in (figures._times, figures._ratios, figures._memory, lambda _: figures._counts()):
        figure = make(found)
        figure.canvas.draw()
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert 0 <= drawn.x0 <= drawn.x1 <= width
        assert 0 <= drawn.y0 <= drawn.y1 <= height
        figures.plt.close(figure)


# ---- instruments


@linux
def test_the_peak_on_a_cpu_is_what_was_there_at_once() -> None:
    """In a process of its own, as it is measured: the heap of this one has memory already that nobody sees taken."""
    size = 2**24
    program = f"""
import torch
from benchmarks.micro import instruments
source = torch.ones({size // 4})

def three():
    kept = [source.clone() for _ in range(2)]
    del kept[0]
    kept += [source.clone() for _ in range(2)]

instruments.return_memory()
print(*(instruments.peak(call, "cpu") for call in (source.clone, three, lambda: None)))
"""
    one, three, none = map(int, printed_by("-c", program).split())
    assert one == pytest.approx(size, rel=0.05)
    assert three == pytest.approx(3 * size, rel=0.05)
    assert none < 0.05 * size


@linux
def test_memory_is_that_of_the_tensors_whoever_came_before() -> None:
    """Measured among the timings, a copy of the logits took nothing: the heap had the memory."""
    size = Size(2, LARGE // 2)
    found = run.measure([size], ["fp32"], ["--device=cpu", "-k", "memory and not compile"])
    assert not found.samples
    (peaks,) = found.memory.values()
    copies = {name: round(peak / (4 * LARGE), 1) for name, peak in peaks.items()}
    assert copies[OURS] == copies[COPY] == 1
    assert copies[AUTHORS] >= copies[REFERENCE] >= copies[CROSS_ENTROPY] >= 2


def test_a_flush_reads_as_much_as_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, expected in ((2**20, 2**20), (None, instruments.UNKNOWN_CACHE)):
        monkeypatch.setattr(instruments, "cache_bytes", lambda device, size=size: size)
        buffer = instruments._buffer.__wrapped__("cpu")
        assert buffer.nbytes == expected
        assert buffer.min() == 1


def test_the_machine_is_described() -> None:
    assert f"torch {torch.__version__}" in machine()
    size = cache_bytes(torch.device("cpu"))
    assert size is None or size >= 2**15


@pytest.mark.gpu
def test_instruments_of_a_gpu() -> None:
    x = torch.ones(2**24, device="cuda")
    assert instruments.launches(lambda: x.add_(1).mul_(2)) == 2
    assert instruments.peak(x.clone, "cuda") == x.nbytes
    x.fill_(0)
    replay = instruments.capture(lambda: x.add_(1))
    before = x[0].item()
    stamp = instruments.clock("cuda", "graph")
    start = stamp()
    replay()
    end = stamp()
    assert x[0].item() - before == instruments.GRAPH_CALLS
    assert 0 < end - start < 1
    assert isinstance(instruments.clock("cuda", "host")(), float)


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
