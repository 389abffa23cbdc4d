"""What `make fuzz` calls, without the sanitizers: that its calls are those that they are meant to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from children import ROOT
from fuzz.calls import LAYOUTS, run, tensor_of

from dal_kernels import available_backends

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
