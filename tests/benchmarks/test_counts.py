"""The committed counts: what the command makes, of the kernels as they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import counts, executor
from benchmarks.counts import BACKENDS, FILE, Count, Registers, count
from support.marks import needs_emulator, needs_executor

COMMITTED = [Count(**item) for item in counts.read()["counts"]]
REMAKE = "remake the committed counts: python -m benchmarks.counts"


def test_the_committed_table_is_made_of_the_committed_numbers() -> None:
    assert FILE.with_suffix(".md").read_text(encoding="utf-8") == counts.document(counts.read()), REMAKE


def test_every_case_is_counted_with_and_without_gradient() -> None:
    found = {(c.rows, c.classes, counts.DTYPES[c.dtype], c.backend, c.gradient) for c in COMMITTED if not c.images}
    assert found == {(*case, name, gradient) for case in counts.CASES for name in BACKENDS for gradient in (0, 1)}
    images = Counter((c.backend, c.gradient) for c in COMMITTED if c.images)
    assert images == {(name, gradient): len(counts.IMAGES) for name in BACKENDS for gradient in (False, True)}
    assert all(c.reads >= 1 and c.writes >= c.gradient for c in COMMITTED), "less than the logits and the gradient"


def test_logits_of_images_are_read_once_and_their_gradient_is_written_once() -> None:
    """Beside them a label of 8 bytes a position, and in bfloat16 four fields; the row kernels write the class of the
    target a second time.
    """
    for c in COMMITTED:
        if c.images:
            of_position = 1 / (c.classes * counts.DTYPES[c.dtype].itemsize)
            again = 1.05 / c.classes * c.images.endswith("channels last")
            fields = 16 * of_position * (c.dtype == "bf16")
            assert c.reads <= 1.02 + 8 * of_position + again, c
            assert c.writes <= (1.01 + fields + again if c.gradient else 0.01), c


@needs_executor
@needs_emulator
@pytest.mark.usefixtures("ptx")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", [True, False])
def test_the_committed_counts_are_of_these_kernels(backend: str, gradient: bool) -> None:
    if counts.versions() != counts.read()["versions"]:
        pytest.skip(f"other compilers here: {counts.versions()}")
    with BACKENDS[backend]() as launches:
        for rows, classes, dtype in counts.CASES[:4]:
            assert count(backend, rows, classes, dtype, gradient, launches) in COMMITTED, REMAKE


@pytest.mark.parametrize(
    ("rows", "classes", "dtype"),
    [(128, 10, "fp32"), (128, 100, "fp32"), *((*size, t) for size in ((64, 1000), (8, 32000)) for t in counts.DTYPES)],
)
def test_a_step_of_cuda_takes_no_more_instructions_than_one_of_triton(rows: int, classes: int, dtype: str) -> None:
    """But for a percent, a few instructions a row: they come from compilers that nobody here steers so finely."""
    found = {
        c.backend: c.instructions
        for c in COMMITTED
        if (c.rows, c.classes, c.dtype) == (rows, classes, dtype) and c.gradient
    }
    assert found["cuda"] <= 1.01 * found["triton"]


def test_a_binary_that_spills_is_named() -> None:
    content = counts.read()
    assert "none spills" in counts.document(content)
    spilling = Registers("cuda", "dal_rows", {"sm_90": 255, "sm_100": 9}, {"sm_90": 8, "sm_100": 0})
    text = counts.document(content | {"registers": [vars(spilling)]})
    assert "Of these 2 binaries, these spill: dal_rows (sm_90: 8 bytes)." in text
    assert text.index("sm_90 |") < text.index("sm_100 |")


def test_a_line_of_the_table() -> None:
    line = counts.table([replace(COMMITTED[0], instructions=12.34, reads=1.016, writes=0.5, kernels=["a", "b"])])
    cells = [cell.strip() for cell in line.splitlines()[-1].strip("|").split("|")]
    assert cells == ["128×10", "fp32", "triton", "forward + backward", "12.3", "1.02", "0.50", "2: a, b"]


def test_without_the_helper_one_sentence_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(counts.cuda_emulator, "missing", lambda: "no gpuless")
    assert counts.main(["--out", str(tmp_path / "counts.json")]) == 2
    assert capsys.readouterr().err == "counts: no gpuless\n"
    assert list(tmp_path.iterdir()) == []


def test_an_executor_that_is_not_there_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(executor.MissingError, match=r"'shared' beside the repository \(No module named 'no_such"):
        executor.load("no_such_helper")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(executor.MissingError, match="TRITON_INTERPRET"):
        executor.load()
