"""`make gpu`: what it times, and which constants it proposes by that; without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("tabulate")

from benchmarks.gpu import choices, plan_header, stages
from benchmarks.gpu.device_time import Case
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.process import ROOT, Ended, run
from build_support import cuda
from dal_kernels.backends import choose
from dal_kernels.backends.triton import plan

KNOBS = [*choices.TRITON, *choices.CUDA, choices.AUTO]


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


def test_results_of_an_earlier_call_are_not_taken_as_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("times.json", "report.md"):
        (tmp_path / name).write_text('{"cuda:64x10:fp32": 1.0}')
    monkeypatch.setattr(stages, "run", lambda *given, **more: Ended(0, False, 1.0, "it died"))
    assert stages._time(["cuda:64x10:fp32"], tmp_path, 9.0) == {"cuda:64x10:fp32": "it died"}
    assert stages._benchmark("64x14")(tmp_path, 9.0).status == "failed"


def test_constants_without_times_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = choices.TRITON
    mine = dict.fromkeys(first.cases, 1.0)
    monkeypatch.setattr(stages, "_time", lambda cases, *given: dict.fromkeys(cases, "OutOfMemoryError") | mine)
    trial = lambda knob, *given: dict.fromkeys(knob.cases, "it does not launch") | mine  # noqa: E731
    outcome = stages._sweep(choices.TRITON, trial)(tmp_path, 9.0)
    assert (outcome.status, outcome.unknown) == ("done", tuple(knob.name for knob in others))
    assert outcome.text.count("TILE = 4096: it does not launch") == 1
    assert stages._auto(tmp_path, 9.0).unknown == (choices.AUTO.name,)
    assert [stage.name for stage in stages.STAGES if stage.judges] == ["auto", "sweep of plan.py", "sweep of plan.h"]


def test_a_trial_links_the_kernels_of_the_last_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the newest object files, which are of other sources where a change of a kernel was taken back."""

    def compiler(command: list[str]) -> str:
        if "-c" in command:
            Path(command[-1]).write_bytes(Path(command[command.index("-c") + 1]).read_bytes())
        return "version 1"

    monkeypatch.setattr(cuda, "run", compiler)
    monkeypatch.setattr(plan_header, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(plan_header.CannotBuildError, match=r"install by `pip install -e \.` here"):
        plan_header._objects()
    ext = SimpleNamespace(extra_compile_args=["nvcc"], include_dirs=[], library_dirs=[])
    ext.sources = [*(f"kernels_{dtype}.cu" for dtype in ("bf16", "f16", "f32", "f64")), "launch.cpp"]
    for text in ("the kernel", "a change of it", "the kernel"):
        for name in ext.sources:
            Path(name).write_text(text)
        cuda.build(ext, tmp_path / "_cuda.so", [])
        assert [Path(file).read_text() for file in plan_header._objects()] == 4 * [text]


def test_what_time_did_not_allow_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Done, it would not be begun again; what had gone wrong by itself would be no other the next time."""

    def timing(cut: bool) -> Callable[..., Ended]:
        def run(command: Sequence[str], limit: float, log: Path, cwd: Path = ROOT) -> Ended:
            Path(command[command.index("--out") + 1]).write_text(f'{{"{command[-1]}": 1e-6}}')
            return Ended(1, cut, 1.0, "Segmentation fault")

        return run

    for cut, status in ((True, "cut off"), (False, "done")):
        monkeypatch.setattr(stages, "run", lambda *given, cut=cut: Ended(1, cut, 1.0, ""))
        assert {stages._host(tmp_path, 9.0).status, stages._benchmark("64x14")(tmp_path, 9.0).status} == {
            "cut off" if cut else "failed"
        }
        monkeypatch.setattr(stages, "run", timing(cut))
        assert stages._counts(tmp_path, 9.0).status == status
        assert stages._auto(tmp_path, 9.0).status == status
        found = stages._time(["cuda:64x10:fp32", "cuda:64x100:fp32"], tmp_path, 9.0)
        assert found == {"cuda:64x100:fp32": 1e-6} | ({} if cut else {"cuda:64x10:fp32": "Segmentation fault"})


def test_a_sweep_goes_on_with_the_constants_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ratio is of times of two calls."""
    tried: list[tuple[str, int]] = []

    def call(today: float, trials: int) -> Outcome:
        def trial(knob: choices.Knob, value: int, *given: object) -> stages.Times:
            tried.append((knob.name, value))
            return dict.fromkeys(knob.cases, 1.0) if len(tried) <= trials else {}

        tried.clear()
        monkeypatch.setattr(stages, "_time", lambda cases, *given: dict.fromkeys(cases, today))
        return stages._sweep(choices.TRITON, trial)(tmp_path, 9.0)

    first, second, *others = choices.TRITON
    outcome = call(2.0, trials=len(first.values) + 1)
    assert (outcome.status, outcome.unknown) == ("cut off", tuple(knob.name for knob in others))
    outcome = call(4.0, trials=100)
    assert tried == [(knob.name, value) for knob in (second, *others) for value in knob.values]
    assert (outcome.status, outcome.unknown) == ("done", ())
    assert outcome.text.count("× 0.500") == len(first.values)
    assert outcome.text.count("× 0.250") == len(tried)
    tried.clear()
    assert call(1.0, trials=100) == outcome
    assert not tried


def test_a_trial_of_another_header_runs_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another build nothing else would be seen: the times would be those of today's constant."""
    monkeypatch.setattr(plan_header, "run", lambda command: "")
    monkeypatch.setattr(cuda, "link", lambda nvcc, objects, target, library_dirs: Path(target).touch())
    monkeypatch.setattr(cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(plan_header, "_objects", lambda: [])
    knob = choices.CUDA[0]
    plan_header.build_with(knob, 7, tmp_path)
    assert f"{knob.name} = 7," in (tmp_path / "csrc" / "cuda" / "plan.h").read_text()
    program = "import benchmarks, dal_kernels; print(benchmarks.__file__, dal_kernels.__file__)"
    ended = run([sys.executable, "-c", program], 60.0, tmp_path / "log", tmp_path)
    assert ended.tail.split() == [str(tmp_path / name / "__init__.py") for name in ("benchmarks", "dal_kernels")]


def test_a_build_keeps_to_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knob, limits = choices.CUDA[0], list[float]()

    def ends(status: int, cut: bool) -> Callable[..., Ended]:
        return lambda command, limit, *given: limits.append(limit) or Ended(status, cut, 1.0, "said\nnvcc fails")

    monkeypatch.setattr(stages, "run", ends(-2, True))
    assert stages._cuda_trial(knob, 7, tmp_path, 9.0) == {}
    monkeypatch.setattr(stages, "run", ends(1, False))
    assert stages._cuda_trial(knob, 7, tmp_path, 9.0) == dict.fromkeys(knob.cases, "nvcc fails")
    assert stages._cuda_trial(knob, 7, tmp_path, -1.0) == {}
    assert limits == [9.0, 9.0]
