"""The table of host times."""

from __future__ import annotations

import re
import types

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("tabulate")

from benchmarks import host_time


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert host_time.main(["--sizes", "4x3", "--devices", "cpu", "--rounds", "3", "--dtypes", "fp32", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall("host time of a step, 4x3 (?:fp32|bf16) on cpu", printed)) == 2
    rows = re.findall(r"^\| (.*?) +\| ([\d.]+) +\| ([\d.]+) +\|$", printed, re.MULTILINE)
    assert len(rows) == 12
    assert [ratio for label, _, ratio in rows if label == "F.cross_entropy"] == ["1.00"] * 2
    assert all(float(time) > 0 and float(ratio) >= 0 for _, time, ratio in rows)


def test_ratios_are_taken_round_by_round() -> None:
    rows = host_time.rows_of({"one": [1e-6, 4e-6, 2e-6], "two": [3e-6, 4e-6, 8e-6]})
    assert rows == [("one", "2.0", "1.00"), ("two", "4.0", "3.00")]


def test_others_are_there_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = types.SimpleNamespace(LigerCrossEntropyLoss=lambda: F.cross_entropy)

    def find(name: str) -> object:
        if name.startswith("liger_kernel"):
            return installed
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(host_time, "import_module", find)  # not importlib's own, which others use
    labels = list(host_time.contenders("cuda"))
    assert "Liger's cross-entropy" in labels
    assert "flash-attention's cross-entropy" not in labels
    assert torch.equal(
        host_time.contenders("cuda")["Liger's cross-entropy"](torch.zeros(2, 3), torch.zeros(2).long()),
        F.cross_entropy(torch.zeros(2, 3), torch.zeros(2).long()),
    )
