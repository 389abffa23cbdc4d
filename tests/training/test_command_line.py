"""The command line: an error is one sentence, from any process, and says what to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import dal_kernels
from dal_kernels.training import Recipe, UsageError, main
from dal_kernels.training.data import DATA, DataSet
from dal_kernels.training.recipes import preset_values
from support.children import run_python
from support.trainings import needs_training

needs_training()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("compare --epochs 0", "epochs"),
        ("compare --noise 1.0", "noise"),
        ("compare --noise nan", "noise"),
        ("compare --noise 0.4 0.4", "noise"),
        ("compare --noise 0.4 symmetric:0.4", "noise"),
        ("compare --seeds -1", "seeds"),
        ("compare --threads 0", "threads"),
        ("compare --workers -1", "workers"),
        ("compare --device nowhere", "nowhere"),
        ("compare --device meta", "device must be cpu, cuda or cuda:N, got 'meta'"),
        ("compare --data mnist", "mnist"),
        ("compare --preset imagenet", "imagenet"),
        ("compare --losses vocal", "vocal"),
        ("compare --data-dir .", "digits"),
        ("compare --data fashion-mnist --data-dir no-such-folder", "no-such-folder"),
        (f"compare --epochs 1 --out {__file__}", "cannot be made"),
        ("train --noise 0.4 0.4", "noise"),
        ("train --model cnn --widths 4 --learning-rate fast", "learning-rate"),
        ("train --model cnn --widths 0", "widths"),
        ("", "train|compare|inspect|predict"),
    ],
)
def test_command_line_errors_are_one_sentence(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(arguments.split())
    except SystemExit as exit:
        status = exit.code
    printed, error = capsys.readouterr()
    assert status == 2
    assert named in error
    assert error.startswith("dal-train: ")
    assert error.count("\n") == 1
    assert printed == ""


@pytest.mark.parametrize(
    "safe", [False, pytest.param(True, marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="is newer"))]
)
def test_a_loss_in_the_working_folder_is_found_by_the_installed_command(tmp_path: Path, safe: bool) -> None:
    """Which begins with the folder of the script on its path, not with the working folder as ``python -m`` does."""
    script = tmp_path / "bin" / "dal-train"
    script.parent.mkdir()
    script.write_text("import sys\nfrom dal_kernels.training.__main__ import run\nsys.exit(run())\n", encoding="utf-8")
    (tmp_path / "my_loss.py").write_text("from torch.nn import CrossEntropyLoss as MyLoss\n", encoding="utf-8")
    (tmp_path / "argparse.py").write_text("raise RuntimeError('not the one of Python')\n", encoding="utf-8")
    options = {"PYTHONSAFEPATH": "1"} if safe else {}
    arguments = ["train", "--losses", "my_loss:MyLoss", "--epochs", "1", "--output", tmp_path / "out"]
    result = run_python(script, *arguments, cwd=tmp_path, **options)
    assert result.returncode == 2 * safe, result.stderr
    assert ("No module named 'my_loss'" in result.stderr) == safe


def test_help_says_what_each_setting_is_in_each_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    # Words may be broken at a dash that is at the end of a line.
    said = "".join(capsys.readouterr().out.split())
    for setting in fields(Recipe):
        assert f"({preset_values(setting.name)})".replace(" ", "") in said, setting.name
    assert preset_values("momentum") == "digits: 0; others: 0.9"
    assert preset_values("widths").startswith("digits: 256 128; fashion-mnist: 512 256; ")
    assert preset_values("clip_norm") == "mini-webvision, webvision: 5; others: none"
    assert preset_values("nesterov") == "mini-webvision, webvision: yes; others: no"
    assert preset_values("gce_q") == "0.7"


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"dal_kernels {dal_kernels.__version__}\n"


class Broken:
    """Images of which one cannot be read."""

    def __len__(self) -> int:
        return 8

    def batch(self, indices: Sequence[int], train: bool) -> torch.Tensor:
        if 5 in indices:
            raise UsageError("the image 5.jpg cannot be read")
        return torch.zeros(len(indices), 4)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_error_of_the_data_is_one_sentence_from_any_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    labels = torch.zeros(8, dtype=torch.long)
    monkeypatch.setitem(DATA, "broken", lambda folder: DataSet("broken", 2, Broken(), labels, labels, Broken(), labels))
    assert main(["train", "--data", "broken", "--preset", "digits", "--workers", workers, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "dal-train: the image 5.jpg cannot be read\n"


@pytest.mark.parametrize(
    ("module", "package"),
    [("tqdm", "tqdm"), ("matplotlib", "matplotlib"), ("tabulate", "tabulate"), ("sklearn.datasets", "scikit-learn")],
)
def test_a_missing_package_names_the_extra(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["compare", "--epochs", "1", "--seeds", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dal-train: {package} is missing")
    assert "dal_kernels[training]" in error
