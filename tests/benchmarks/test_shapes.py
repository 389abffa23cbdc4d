"""The table of shapes on a CPU."""

from __future__ import annotations

import argparse
import re

import pytest
import torch

pytest.importorskip("tabulate")

from benchmarks import shapes


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert shapes.main(["--only", "4x3", "2x3x5last", "--threads", "1", "--seconds", "0.001"]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\S+) +((?:\| [\d.]+ +){6})\|$", printed, re.MULTILINE)
    assert [size for size, _ in rows] == ["4x3", "2x3x5last"]
    assert all(float(number) > 0 for _, numbers in rows for number in re.findall(r"[\d.]+", numbers))


def test_the_grid_is_of_60_shapes_that_differ() -> None:
    names = [str(shape) for shape in shapes.grid()]
    assert len(set(names)) == len(names) == 60
    assert {"1x2", "64x131072", "8x21x128x128", "8x21x128x128last"} <= set(names)
    assert [str(shapes.parse_shape(name)) for name in names] == names


def test_classes_last_are_last_in_memory() -> None:
    assert shapes.Shape((2, 3, 5), True).logits(torch.float32).stride() == (15, 1, 3)
    assert shapes.Shape((2, 3, 5)).logits(torch.float32).stride() == (15, 5, 1)


@pytest.mark.parametrize("text", ["64", "0x3", "4xlast", "3y4"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="like 64x1000"):
        shapes.parse_shape(text)


def test_medians_are_taken_in_turns() -> None:
    calls: list[str] = []
    found = shapes.medians((lambda: calls.append("a"), lambda: calls.append("b")), 1e-4)
    assert len(found) == 2
    assert min(found) >= 0
    assert calls.count("a") == calls.count("b")
