"""`make gpu`: that it goes on where it stopped, keeps to its time, and proposes what the times say; without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("tabulate")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import choices, stages
from benchmarks.gpu.device_time import Case
from benchmarks.gpu.process import Ended, run
from benchmarks.gpu.stages import Outcome, Stage
from dal_kernels.backends import choose
from dal_kernels.backends.triton import plan

KNOBS = [*choices.TRITON, *choices.CUDA, choices.AUTO]


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_takes_less_than_25_minutes() -> None:
    assert command.MINUTES < 25
    assert sum(stage.limit for stage in stages.STAGES) <= 25 * 60


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What stages were worked on: one is done, one fails the first time, one breaks."""
    seen: list[str] = []

    def stage(name: str) -> Stage:
        def work(folder: Path, limit: float) -> Outcome:
            assert folder.is_dir()
            seen.append(name)
            if name == "breaks":
                raise LookupError("a fault of its own")
            return Outcome("failed" if name == "fails once" and seen.count(name) == 1 else "done", f"text of {name}")

        return Stage(name, 10, work)

    made = tuple(map(stage, ("works", "fails once", "breaks")))
    monkeypatch.setattr(command, "STAGES", made)
    monkeypatch.setattr(command, "machine", lambda: ["a device"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    return seen


def test_a_later_call_goes_on(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main([]) == 1
    assert ran == ["works", "fails once", "breaks"]
    report = Path("gpu-output/report.md").read_text()
    assert "text of works" in report
    assert "The stage itself broke: LookupError: a fault of its own" in report
    assert command.main([]) == 1
    assert ran[3:] == ["fails once", "breaks"]
    assert command.main(["--only", "works", "fails once"]) == 0
    assert len(ran) == 5
    assert command.main(["--only", "works", "--again", "works"]) == 0
    assert ran[5:] == ["works"]
    monkeypatch.setattr(command, "machine", lambda: ["another device"])
    command.main([])
    assert ran[6:] == ["works", "fails once", "breaks"]


def test_what_time_does_not_allow_is_not_begun(ran: list[str]) -> None:
    assert command.main(["--minutes", "0"]) == 1
    assert not ran
    assert "| works | not reached | |" in Path("gpu-output/report.md").read_text()


def test_a_command_that_is_cut_off_sums_up(tmp_path: Path) -> None:
    program = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('summed up')"
    ended = run([sys.executable, "-c", program], 1.0, tmp_path / "log")
    assert ended.cut
    assert ended.seconds < 10
    assert ended.tail == "summed up"


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_constants_are_found_where_they_are(knob: choices.Knob) -> None:
    if knob.file != choices.HEADER:
        assert knob.today == getattr(plan if knob.file == choices.PLAN else choose, knob.name)
    assert knob.today not in knob.values
    text = knob.file.read_text()
    changed = [
        pair for pair in zip(text.splitlines(), knob.put(7, text).splitlines(), strict=True) if pair[0] != pair[1]
    ]
    assert len(changed) == 1
    assert knob.name in changed[0][0]
    for case in knob.cases:
        assert str(Case.parse(case)) == case


def test_what_is_faster_is_proposed() -> None:
    filled, joined, *_ = choices.TRITON
    today = dict.fromkeys((*filled.cases, *joined.cases), 1.0)
    trials = {128: dict.fromkeys(filled.cases, 1.1), 512: dict.fromkeys(filled.cases, 0.8)}
    best, gains = choices.judge(filled, trials, today)
    assert (best, gains[512]) == (512, pytest.approx(0.8))
    assert (
        choices.judge(joined, {256: dict.fromkeys(joined.cases, 0.99)}, today)[0] == joined.today
    )  # runs differ by more
    untimed = {256: {joined.cases[0]: "OutOfMemoryError"}}
    assert choices.judge(joined, untimed, today) == (joined.today, {256: None})
    lines = choices.patch({filled: 512, joined: joined.today}).splitlines()
    assert [line for line in lines if line[0] in "+-"] == [
        "--- a/dal_kernels/backends/triton/plan.py",
        "+++ b/dal_kernels/backends/triton/plan.py",
        "-FILLED = 256",
        "+FILLED = 512",
    ]
    assert choices.patch({knob: knob.today for knob in KNOBS}) == ""


def test_the_limit_of_auto_is_where_triton_becomes_faster() -> None:
    times: dict[str, float | str] = {}
    for rows, classes, dtype in choices.AUTO_CASES:
        times[f"cuda:{rows}x{classes}:{dtype}"] = 1.0 if classes <= 1000 else 3.0
        times[f"triton:{rows}x{classes}:{dtype}"] = 2.0
    best, gains = choices.best_limit(times, (0, 2048, 32768), 32768)
    assert best == 2048
    assert gains[32768] == 1.0
    assert choices.best_limit({}, (0, 2048), 32768) == (32768, {0: None, 2048: None})


def test_tests_are_counted_also_where_they_were_cut_off() -> None:
    lines = [
        "[gw0] [  1%] FAILED tests/test_gpu.py::test_a[float32-(2, 3)-triton] ",
        "[gw1] [  1%] PASSED tests/test_gpu.py::test_b ",
        "FAILED tests/test_gpu.py::test_a[float32-(2, 3)-triton] - AssertionError: assert 1 == 2",
    ]
    whole = stages._summary(Ended(1, False, 3.0, "\n".join(lines)))
    assert whole.status == "failed"
    assert whole.text.startswith("1 failed, 1 passed\n\nFailures: 1 AssertionError.")
    assert "- `tests/test_gpu.py::test_a[float32-(2, 3)-triton]`: AssertionError: assert 1 == 2" in whole.text
    cut = stages._summary(Ended(-2, True, 3.0, "\n".join(lines[:2])))
    assert "Failures: 1 untold." in cut.text
    assert "cut off after 3 s" in cut.text
