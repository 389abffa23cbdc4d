"""How the inspector is measured beside cleanlab: by the same wrong labels, by networks that saw no such sample."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from benchmarks import label_errors


class Cleanlab:
    """In its place, which need not be installed: keeps the probabilities that it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.matrices: list[Any] = []
        found = SimpleNamespace(find_label_issues=self.find_label_issues, get_label_quality_scores=self.scores)
        for name in ("cleanlab", "cleanlab.filter", "cleanlab.rank"):
            monkeypatch.setitem(sys.modules, name, found)

    def find_label_issues(self, labels: Any, matrix: Any, **_: Any) -> Any:
        self.matrices.append(matrix)
        return self.scores(labels, matrix).argsort()[:10]

    def scores(self, labels: Any, matrix: Any, **_: Any) -> Any:
        return matrix[numpy.arange(len(labels)), labels]


@pytest.fixture
def cleanlab(monkeypatch: pytest.MonkeyPatch) -> Cleanlab:
    return Cleanlab(monkeypatch)


def test_both_find_wrong_labels(cleanlab: Cleanlab, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        label_errors.main(["--noise", "0.2", "--epochs", "6"])
    finally:
        torch.set_num_threads(threads)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| seed")]
    assert [row[0].strip() for row in rows] == ["seed 0: LabelInspector", "seed 0: cleanlab, 5 × cross-entropy"]
    assert all(0.9 < float(row[1]) <= 1 for row in rows)
    (matrix,) = cleanlab.matrices
    assert numpy.allclose(matrix.sum(1), 1, atol=1e-5)


def test_no_network_has_seen_what_it_judges(cleanlab: Cleanlab, monkeypatch: pytest.MonkeyPatch) -> None:
    config = label_errors.training.TrainingConfig(changes={"epochs": 1})
    data = config.load()
    seen = []

    class Judge(torch.nn.Module):
        """Says of what it was trained on that it is of class 0, of all else that it is of class 1."""

        def __init__(self, inputs: torch.Tensor) -> None:
            super().__init__()
            self.known = {tuple(row) for row in inputs.flatten(1).tolist()}

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            known = [tuple(row) in self.known for row in inputs.flatten(1).tolist()]
            return torch.eye(data.classes)[[0 if one else 1 for one in known]] * 100

    def trained(recipe: Any, part: Any, labels: Any, *_: Any) -> Any:
        assert torch.equal(labels, data.train_labels[part.train.indices])
        seen.append(part.train.indices)
        inputs = part.train.batch(range(len(part.train)), False)
        return SimpleNamespace(history=[], evaluated=Judge(inputs), world=label_errors.join_world("cpu"))

    monkeypatch.setattr(label_errors, "trained", trained)
    finding = label_errors.by_cleanlab(config.recipe, data, data.train_labels, 3, "cross-entropy")
    counts = torch.bincount(torch.cat(seen), minlength=len(data.train))
    assert (counts == label_errors.FOLDS - 1).all()
    (matrix,) = cleanlab.matrices
    twins = (torch.from_numpy(matrix).argmax(1) == 0).sum()  # digits has a few samples that are equal
    assert twins < 10
    assert finding.held == matrix.nbytes
