"""What the README and the pages in docs/ say: their examples run, their links resolve, their commands exist."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import pkgutil
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dal_kernels
from dal_kernels import DynamicsAwareLoss, GeneralizedCrossEntropyLoss, training
from dal_kernels.backends import choose
from support.children import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY"))]


def name_of(page: Path) -> str:
    """README, choosing, reference/losses, ..."""
    return page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)

# What examples of a page take for given.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README": lambda: {
        "logits": torch.randn(5, 4, requires_grad=True),
        "target": torch.randint(4, (5,)),
    },
    "many_classes": lambda: {
        "GeneralizedCrossEntropyLoss": GeneralizedCrossEntropyLoss,
        "epochs": 2,
        "features": torch.randn(3, 512),
        "labels": torch.randint(100, (3,)),
        "D": 8,
        "vocabulary": 100,
        "embedding": torch.nn.Embedding(100, 8),
        "hidden_states": torch.randn(2, 5, 8),
        "num_items_in_batch": 7,
        "weight_of_tokens": torch.ones(2, 5),
    },
}
# And what they have shown once they ran.
SHOWN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "README": lambda names: (
        names["criterion"].schedule.position == names["epochs"]
        and names["model"].weight.grad.any()
        and names["logits"].grad.any()
        and names["doubtful"].shape == names["y"].shape
    ),
    "adding_a_loss": lambda names: names["logits"].grad.any(),
    "choosing": lambda names: names["logits"].grad.any(),
    "many_classes": lambda names: (
        names["adjusted"] > max(0.9, names["plain"] + 0.01)
        and names["similarity"].diag().mean() > 0.8
        and abs(names["similarity"].mean()) < 0.2
    ),
    "segmentation": lambda names: (
        names["stats"].target_prob.shape == names["masks"].shape
        and not names["doubtful"][:, :2].any()
        and names["criterion"].schedule.position == names["epochs"]
    ),
    "training": lambda names: Path("suggested.csv").exists() and (names["suspicious"] < 25).double().mean() > 0.8,
}
# Of these test_language_models.py and test_class_parallel_linear.py run more, where there is what they need.
ELSEWHERE = ("apply_to(", "ClassParallelLinear(")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pages
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if name_of(page) == "training":
        pytest.importorskip("sklearn")
    names = GIVEN.get(name_of(page), dict)()
    text = text_of(page).replace("num_classes=1_000_000", "num_classes=100")
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if not any(name in example for name in ELSEWHERE):
            if "hidden_states" in example:
                names["labels"] = torch.randint(100, (2, 5))
            exec(example, names)
    assert torch.as_tensor(names.get("loss", 0.0)).isfinite().all()
    assert SHOWN.get(name_of(page), lambda names: True)(names)


def test_there_are_pages() -> None:
    assert {name_of(page) for page in PAGES} >= {"README", *GIVEN, *SHOWN}


# Those of apply_to need transformers: test_language_models.py has them.
MODULES = [
    path
    for path in sorted((ROOT / "dal_kernels").rglob("*.py"))
    if ">>>" in text_of(path) and path.stem != "language_models"
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "dal_kernels")))
def test_examples_of_docstrings_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "training" in path.parts:
        pytest.importorskip("sklearn")
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    given = {
        "dataset": range(12),
        "num_classes": 3,
        "epochs": 2,
        "loader": [(torch.randn(4, 5), torch.randint(3, (4,)), torch.arange(4) + 4 * i) for i in range(3)],
        "model": torch.nn.Linear(5, 3),
        "criterion": DynamicsAwareLoss(total_steps=2),
        "paths": [f"{i}.png" for i in range(12)],
        "class_names": ["cat", "dog", "hare"],
    }
    result = doctest.testmod(module, extraglobs=given)
    assert result.attempted
    assert not result.failed


def test_the_reference_has_every_public_name() -> None:
    text = "".join(map(text_of, (ROOT / "docs" / "reference").glob("*.md")))
    public = [
        f"{package.__name__}.{name}"
        for package in (dal_kernels, training)
        for name in package.__all__
        if name not in {"__version__", "PRESETS"}
    ]
    missing = [name for name in public if not re.search(rf"auto\w+:: {re.escape(name)}$", text, re.MULTILINE)]
    assert not missing, missing


def test_what_the_reference_names_is_there() -> None:
    """By the sources alone, because integrations need what they are for."""
    text = "".join(map(text_of, (ROOT / "docs" / "reference").glob("*.md")))
    modules = re.findall(r"automodule:: (\S+)", text)
    assert all(importlib.util.find_spec(module) is not None for module in modules)
    names = re.findall(r"auto(?:class|function|data|exception|attribute):: (\S+)", text)
    assert len(names) > 50
    for name in names:
        pkgutil.resolve_name(name)


def test_the_site_is_built_without_what_the_integrations_are_for() -> None:
    """Its generator imports them with stand-ins for the frameworks."""
    conf = (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    stand_ins = set(re.findall(r'"(\w+)"', re.search(r"autodoc_mock_imports = (.*)", conf)[1]))
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "dal_kernels" / "integrations").glob("*.py")]
    imported = {
        alias.partition(".")[0]
        for source in sources
        for node in ast.parse(source).body
        for alias in (
            [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in getattr(node, "names", [])]
        )
    }
    assert imported - set(sys.stdlib_module_names) - {"torch", "dal_kernels"} <= stand_ins


def test_the_readme_is_short() -> None:
    words = [word for line in text_of(README).splitlines() if not line.startswith("|") for word in line.split()]
    assert len(words) <= 1300


@pytest.mark.parametrize("name", ["README.md", "docs/backends.md"])
def test_pages_say_what_auto_takes_on_a_gpu(name: str) -> None:
    text = " ".join(text_of(ROOT / name).split())
    assert f"has rows above {choose._MOST_CLASSES_OF_CUDA:,} classes" in text
    places = [text.index(f"`{backend}`") for backend in ("cuda", "triton", "cpu", "eager")]
    assert places == sorted(places)


def test_the_readme_has_every_loss() -> None:
    table = text_of(README).partition("## The family")[2].partition("\n## ")[0]
    there = set(re.findall(r"`(\w+)`", table))
    modules = {name for name in dal_kernels.__all__ if name.endswith("Loss") and "Linear" not in name}
    functions = {name for name in dal_kernels.__all__ if name.endswith("_loss") and "linear" not in name}
    assert modules | functions <= there
    said = {"nineteen": 19, "twenty": 20, "twenty-one": 21, "twenty-two": 22}
    (number,) = re.findall(rf"\[({'|'.join(said)}) others\]", text_of(README))
    assert said[number] == len(modules - {DynamicsAwareLoss.__name__})


def test_the_site_has_every_table_of_results() -> None:
    index = text_of(ROOT / "docs" / "index.md")
    tables = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    assert len(tables) > 3
    assert [path.stem for path in tables if f"<../benchmarks/results/{path.stem}>" not in index] == []


def anchors(page: Path) -> set[str]:
    """As a forge makes them of headings: words with hyphens between, without punctuation."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_resolve(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pages
def test_a_figure_says_what_makes_it(page: Path) -> None:
    for after in re.split(r"!\[[^\]]*\]\([^)]*\)", text_of(page))[1:]:
        assert re.search(r"made by\s+`(dal-train|python -m)", after[:700], re.IGNORECASE)


@pages
def test_commands_exist(page: Path) -> None:
    """They are no words of a document alone: options parse, modules and targets are there."""
    pytest.importorskip("matplotlib")  # which dal-train misses before it looks at the rest
    pytest.importorskip("sklearn")
    targets = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    lines = re.findall(r"^ {4}(\S.*)$", text_of(page), re.MULTILINE) + re.findall(r"`([^`\n]+)`", text_of(page))
    for line in lines:
        command, *arguments = shlex.split(line, comments=True)[:40] if line.count('"') % 2 == 0 else [""]
        if command == "make":
            assert arguments[0] in targets, line
        elif command == "dal-train" and arguments and "--help" not in arguments:
            trains = arguments[0] in ("train", "compare", "inspect")
            training.parse(arguments) if trains else training.cli.parser().parse_args(arguments)
        elif command == "python" and arguments[:1] == ["-m"]:
            assert importlib.util.find_spec(arguments[1]) or arguments[1] == "build", line
