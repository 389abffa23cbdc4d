"""`make gpu`: that it goes on where it stopped, keeps to its time, and proposes what the times say; without a GPU."""

from __future__ import annotations

import os
import re
import select
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tabulate")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import stages, tested
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.process import ROOT, Ended, run
from benchmarks.gpu.stages import Stage


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_stages_fit_into_25_minutes() -> None:
    assert sum(stage.limit for stage in stages.STAGES) <= 60 * command.MINUTES < 25 * 60


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What stages were worked on: one is done, one fails the first time, one is cut off then, one breaks."""
    seen: list[str] = []

    def stage(name: str) -> Stage:
        def work(folder: Path, limit: float) -> Outcome:
            assert folder.is_dir()
            seen.append(name)
            if name == "breaks":
                raise LookupError("a fault of its own")
            first = seen.count(name) == 1
            status = {"fails once": "failed", "is cut off once": "cut off"}.get(name, "done") if first else "done"
            return Outcome(status, f"text of {name}")

        return Stage(name, 10, work)

    made = tuple(map(stage, ("works", "fails once", "is cut off once", "breaks")))
    monkeypatch.setattr(command, "STAGES", made)
    monkeypatch.setattr(command, "machine", lambda: ["a device"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    return seen


def test_a_later_call_goes_on(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    everything = ["works", "fails once", "is cut off once", "breaks"]
    assert command.main([]) == 1
    assert ran == everything
    report = Path("gpu-output/report.md").read_text()
    assert "text of works" in report
    assert "The stage itself broke: LookupError: a fault of its own" in report
    assert command.main([]) == 1
    assert ran[4:] == everything[1:]
    assert command.main(["--only", *everything[:3]]) == 0
    assert len(ran) == 7
    assert command.main(["--only", "works", "--again", "works"]) == 0
    assert ran[7:] == ["works"]
    monkeypatch.setattr(command, "machine", lambda: ["another device"])
    command.main([])
    assert ran[8:] == everything


def test_what_time_does_not_allow_is_not_begun(ran: list[str]) -> None:
    assert command.main(["--minutes", "0"]) == 1
    assert not ran
    assert "| works | not reached | |" in Path("gpu-output/report.md").read_text()


@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_IGN], ids=["heeded", "ignored"])
def test_a_command_that_is_cut_off_sums_up(tmp_path: Path, inherited: Any, request: pytest.FixtureRequest) -> None:
    # A shell lets what it starts in the background ignore interrupts, and what that starts inherits it.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, inherited)))
    # A shell, and seconds to begin and to end in, because a machine may be busy. The interrupt comes after five.
    child = """sh -c 'trap "echo the child too; exit" INT; sleep 5.5'"""
    ended = run(["sh", "-c", f"trap 'echo summed up' INT; {child}"], 10.0, tmp_path / "log")
    assert ended.cut
    assert ended.seconds < 20
    assert ended.output == "summed up\n"


def test_one_that_is_deaf_ends_within_its_limit(tmp_path: Path) -> None:
    ended = run(["sh", "-c", "trap '' INT; sleep 60"], 4.0, tmp_path / "log")
    assert ended.cut
    assert ended.status == -signal.SIGKILL
    assert ended.seconds < 20


@pytest.mark.parametrize("leader", ["exit 0", "exec sleep 60"], ids=["ends", "is cut off"])
def test_nothing_that_it_started_outlives_a_command(tmp_path: Path, leader: str) -> None:
    # Both hold the end of a pipe, of which the reader hears once nobody does.
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    ended = run(["sh", "-c", f"exec 3> pipe; (trap '' INT; exec sleep 60) & {leader}"], 1.0, tmp_path / "log", tmp_path)
    assert ended.cut == (leader != "exit 0")
    assert select.select([reader], [], [], 3.0)[0]
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_tests_are_counted_also_where_they_were_cut_off() -> None:
    lines = [
        "[gw0] [  1%] FAILED tests/kernels/test_gpu.py::test_a[float32-(2, 3)-triton] ",
        "[gw1] [  1%] PASSED tests/kernels/test_gpu.py::test_b ",
        "FAILED tests/kernels/test_gpu.py::test_a[float32-(2, 3)-triton] - AssertionError: assert 1 == 2",
    ]
    whole = tested.summary(Ended(1, False, 3.0, "\n".join(lines)))
    assert whole.status == "failed"
    assert whole.text.startswith("1 failed, 1 passed\n\nFailures: 1 AssertionError.")
    assert "- `tests/kernels/test_gpu.py::test_a[float32-(2, 3)-triton]`: AssertionError: assert 1 == 2" in whole.text
    cut = tested.summary(Ended(-2, True, 3.0, "\n".join(lines[:2])))
    assert "Failures: 1 untold." in cut.text
    assert "cut off after 3 s" in cut.text
    assert tested.summary(Ended(-2, True, 3.0, lines[1])).status == "cut off"
    assert tested.summary(Ended(-2, False, 3.0, lines[1])).status == "failed"


FAILING = """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("of", ["whose name is as long as a line of a terminal, in which its reason has no place"])
def test_that_fails(of):
    assert 1 == 2, "the reason"
"""


def test_why_a_test_failed_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "tests" / "test_it.py"
    file.parent.mkdir()
    file.write_text(FAILING)
    whole = run([*tested.PYTEST, "--rootdir", str(tmp_path), str(file)], 300.0, tmp_path / "log").output
    cut = whole[: whole.index("== FAILURES ==")]
    assert "in test_that_fails" in cut
    for ended in (Ended(1, False, 3.0, whole), Ended(-signal.SIGKILL, True, 3.0, cut)):
        outcome = tested.summary(ended)
        assert outcome.status == "failed"
        assert "Failures: 1 AssertionError." in outcome.text
        assert outcome.text.count(": AssertionError: the reason") == 1


def test_a_rare_failure_is_among_those_that_are_listed() -> None:
    lines = [f"FAILED tests/test_a.py::test_a[{i}] - AssertionError: assert 1 == 2" for i in range(40)]
    lines.append("FAILED tests/test_a.py::test_b - TypeError: no")
    text = tested.summary(Ended(1, False, 3.0, "\n".join(lines))).text
    assert "Failures: 40 AssertionError, 1 TypeError." in text
    assert text.splitlines()[4] == "- `tests/test_a.py::test_b`: TypeError: no"


def test_what_the_sanitizers_watch_is_there() -> None:
    """A file or a test that is renamed would leave them nothing to watch, which takes a GPU to see."""
    text = "".join((ROOT / file).read_text(encoding="utf-8") for file in tested.SAMPLED_FILES)
    names = set(re.findall(r"\w*_\w+", tested.SAMPLE))
    assert len(names) == 4
    assert all(re.search(rf"^def \w*{name}", text, re.MULTILINE) for name in names)


NO_ERRORS = "========= ERROR SUMMARY: 0 errors"
PASSED = "12 passed, 1 skipped in 20.11s"


@pytest.mark.parametrize(
    ("code", "cut", "lines", "status"),
    [
        (0, False, [PASSED, NO_ERRORS], "done"),
        (0, False, [PASSED, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"], "done"),
        (1, False, ["1 failed, 12 passed in 20.11s", NO_ERRORS], "failed"),
        (5, False, ["no tests ran in 3.02s", NO_ERRORS], "failed"),
        (0, False, ["13 skipped in 3.02s", NO_ERRORS], "failed"),
        (0, False, [PASSED], "failed"),
        (86, False, [PASSED, "========= ERROR SUMMARY: 3 errors"], "failed"),
        (86, False, [PASSED, NO_ERRORS, "========= ERROR SUMMARY: 3 errors"], "failed"),
        (-2, True, ["....."], "cut off"),
        (0, True, [PASSED, NO_ERRORS], "cut off"),
        (-2, True, [".....", "========= Invalid __global__ read of size 4 bytes"], "failed"),
        (-2, True, ["========= Error: Race reported between Write access at a and Read access at b"], "failed"),
        (-2, True, ["========= Uninitialized __global__ memory read of size 4 bytes"], "failed"),
        (-2, True, ["========= Barrier error detected. Divergent thread(s) in warp"], "failed"),
    ],
)
def test_a_sanitizer_is_done_only_if_all_of_it_was_clean(code: int, cut: bool, lines: list[str], status: str) -> None:
    outcome = tested.verdict(Ended(code, cut, 50.0, "\n".join(lines)))
    assert outcome.status == status
    assert ("It was cut off" in outcome.text) == cut
    assert lines[-1] in outcome.text


def test_what_was_not_timed_is_not_said_to_stay(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(name: str, outcome: Outcome) -> Stage:
        return Stage(name, 10, lambda folder, limit: outcome, judges=True)

    made = (judge("auto", Outcome("done", "", "", ("TILE",))), judge("sweep", Outcome("left out", "")))
    monkeypatch.setattr(command, "STAGES", made)
    said = "No constant was found that should change."
    command.main(["--minutes", "0"])
    assert said not in (report := Path("gpu-output/report.md").read_text())
    assert "not known: those of auto (not reached), those of sweep (not reached)." in report
    command.main([])
    assert said not in (report := Path("gpu-output/report.md").read_text())
    assert "not known: TILE, those of sweep (left out)." in report
    monkeypatch.setattr(command, "STAGES", (judge("auto", Outcome("done", "")),))
    command.main(["--again", "auto"])
    assert said in Path("gpu-output/report.md").read_text()


@pytest.mark.parametrize(("status", "goes_on"), [("cut off", True), ("failed", False)])
def test_only_what_was_cut_off_finds_what_it_left(
    status: str, goes_on: bool, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def work(folder: Path, limit: float) -> Outcome:
        found.append((folder / "left").exists())
        (folder / "left").touch()
        return Outcome(status, "")

    monkeypatch.setattr(command, "STAGES", (Stage("a stage", 10, work),))
    for options in ([], [], ["--again", "a stage"]):
        assert command.main(options) == 1
    assert found == [False, goes_on, False]
    assert "All that was printed lies in [a-stage](a-stage)." in Path("gpu-output/report.md").read_text()


def test_figures_of_a_benchmark_are_found_from_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(command: list[str], *given: object) -> Ended:
        Path(command[-1], "report.md").write_text("# Speed\n\n![time against N·C](time.png)\n")
        return Ended(0, False, 1.0, "")

    monkeypatch.setattr(stages, "run", measure)
    (stage,) = (stage for stage in stages.STAGES if stage.name == "benchmark 64x14")
    (folder := tmp_path / stage.folder).mkdir()
    assert stage.work(folder, 9.0).text == "### Speed\n\n![time against N·C](benchmark-64x14/time.png)\n"
