"""What `make fuzz` calls, without the sanitizers: that its calls are those that they are meant to be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from subprocess import CompletedProcess

import pytest
import torch
from hypothesis import Phase, find, settings

from dal_kernels import available_backends
from fuzz import __main__ as command
from fuzz.calls import LAYOUTS, calls, run, tensor_of
from fuzz.sanitized import SANITIZERS, Sanitizers
from support.children import ROOT

SOURCES = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "csrc" / "cpu").glob("*.cpp"))
OPERATORS = sorted(re.findall(r'm\.def\("(\w+)_cpu\(', SOURCES))
CORPUS = sorted((ROOT / "tests" / "fuzz" / "corpus").glob("*.json"))
native = pytest.mark.skipif(
    not available_backends()["cpu"].startswith("available"), reason="the compiled kernels are not there"
)


@native
@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.stem)
def test_the_corpus_has_calls_that_are_right(file: Path) -> None:
    call = json.loads(file.read_text(encoding="utf-8"))
    assert run(call) == "returned"
    call["arguments"][0]["dtype"] = "bool"
    assert run(call) in ("RuntimeError", "ValueError", "TypeError")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_lie_as_they_are_said_to(layout: str) -> None:
    spec = {"shape": [3, 5, 2], "dtype": "float32", "layout": layout, "fill": "normal", "seed": 1}
    found, plain = tensor_of(spec), tensor_of(spec | {"layout": "contiguous"})
    assert found.shape == (3, 5, 2)
    assert found.is_contiguous() == (layout == "contiguous")
    assert torch.equal(found, plain[:1].expand(3, 5, 2) if layout == "expanded" else plain)


def test_the_corpus_has_a_call_of_each_operator() -> None:
    assert {json.loads(file.read_text(encoding="utf-8"))["operator"] for file in CORPUS} == set(OPERATORS)


@native
@pytest.mark.parametrize("operator", OPERATORS)
def test_some_calls_of_each_operator_are_right(operator: str) -> None:
    sought = settings(max_examples=200, database=None, deadline=None, phases=[Phase.generate])
    find(calls(operator), lambda call: run(call) == "returned", settings=sought, random=Random(1))


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], list[str]]:
    """Puts one in the place of the real worker, which ends with a status, and makes a call or none."""

    def put(status: int, calls: bool) -> list[str]:
        corpora: list[str] = []

        def run(given: list[str], **more: object) -> CompletedProcess[str]:
            current, corpus = map(Path, given[3:5])
            assert not current.exists()
            corpora.extend(file.read_text() for file in sorted(corpus.glob("*.json")))
            if calls:
                current.write_text("the call")
            return CompletedProcess(given, status)

        monkeypatch.setattr(command.subprocess, "run", run)
        return corpora

    monkeypatch.setattr(command, "BUILD", tmp_path)
    monkeypatch.setattr(Sanitizers, "build", lambda sanitizers, folder: folder)
    monkeypatch.setattr(Sanitizers, "environment", lambda sanitizers, package: {})
    return put


def test_sanitizers_share_the_time(worker: Callable[[int, bool], list[str]], capsys: pytest.CaptureFixture) -> None:
    worker(0, True)
    assert command.main(["--minutes", "3", "--seed", "5"]) == 0
    assert re.findall(r"(\w+): seed 5, (\d+) s", capsys.readouterr().out) == [("memory", "90"), ("threads", "90")]
    assert command.main(["--minutes", "3", "--only", "threads"]) == 0
    assert "threads: seed" in (said := capsys.readouterr().out)
    assert "memory" not in said


def test_sources_that_a_sanitizer_changes_are_as_they_were() -> None:
    texts = SANITIZERS["threads"].texts()
    assert "kGrain = 16;" in texts["cpu/run.h"]
    assert "is_shunned(start)" not in texts["cpu/threads.h"]
    with pytest.raises(ValueError, match=r"csrc/cpu/run\.h must have 'that is not there' once"):
        replace(SANITIZERS["memory"], changes=(("cpu/run.h", "that is not there", ""),)).texts()


# A share of rows that ends a row too late, and one that the caller and another thread both do.
FAULTS = {
    "memory": ("cpu/run.h", "kernel.rows(batch, begin, end);", "kernel.rows(batch, begin, end + 4);"),
    "threads": (
        "cpu/run.h",
        "kernel.rows(batch, begin, end);",
        "kernel.rows(batch, begin, std::min(end + 1, rows));",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SANITIZERS))
def test_a_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = replace(SANITIZERS[name], changes=(*SANITIZERS[name].changes, FAULTS[name]))
    monkeypatch.setattr(command, "BUILD", tmp_path)
    monkeypatch.setitem(command.SANITIZERS, name, faulty)
    assert command.main(["--minutes", "0.5", "--only", name, "--seed", "1"]) == 1


def test_a_worker_that_makes_no_call_found_nothing(
    worker: Callable[[int, bool], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "found.json").write_text("an earlier call")
    (tmp_path / "current.json").write_text("an earlier call")
    worker(-6, False)
    assert command.main(["--only", "memory"]) == 2
    said = capsys.readouterr().out
    assert "the worker did not start: its exit status is -6" in said
    assert "an earlier call" not in said


def test_what_ends_the_worker_is_kept_until_another_does(
    worker: Callable[[int, bool], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = tmp_path / "found.json"
    found.write_text("an earlier call")
    worker(0, True)
    assert command.main([]) == 0
    assert found.read_text() == "an earlier call"
    worker(1, True)
    assert command.main(["--seed", "7"]) == 1
    assert found.read_text() == "the call"
    assert f"found with seed 7, exit status 1: {found}\nthe call" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["found.json", "replay/call.json", "without a suffix"])
@pytest.mark.parametrize("status", [0, 1])
def test_a_replay_leaves_its_file(
    worker: Callable[[int, bool], list[str]], tmp_path: Path, name: str, status: int
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("the call")
    for _ in range(2):
        called = worker(status, True)
        assert command.main(["--replay", str(file)]) == status
        assert called == ["the call"] * (1 if status else len(SANITIZERS))
        assert file.read_text() == "the call"
