"""Losses x noise x seeds by the command line: what is written, what is the same again, and what is refused."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from benchmarks import demo
from dal_kernels.training import TrainingConfig, UsageError, main, parse, run_training, write_report
from dal_kernels.training.data import DATA, DataSet
from dal_kernels.training.losses import LOSSES
from dal_kernels.training.metrics import TIMINGS, EpochMetrics
from dal_kernels.training.noise import parse_noise
from dal_kernels.training.train import Trainer
from support.trainings import needs_training, rows_of

needs_training()


# Enough to learn something with every loss.
FEW = {"epochs": 3, "learning_rate": 0.5}


def config(**settings: Any) -> TrainingConfig:
    settings = {"noise": ("0.4",), "losses": ("dal",), "seeds": (0,), "changes": FEW, **settings}
    return TrainingConfig(**settings, verbose=False)


def repeatable(history: Sequence[EpochMetrics]) -> list[dict[str, str]]:
    """What is the same in a training and its repetition; as text, for NaN does not equal itself."""
    return [{name: str(value) for name, value in vars(epoch).items() if name not in TIMINGS} for epoch in history]


def test_command_line_writes_metrics_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    arguments = ["compare", "--epochs", "3", "--noise", "0.4", "0.6", "--seeds", "0", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    rows = rows_of(out / "digits.csv")

    assert [*rows[0]][:5] == ["data", "noise", "measured_noise", "loss", "seed"]
    assert {field.name for field in fields(EpochMetrics)} < set(rows[0])
    noises = {str(parse_noise(text)): float(text) for text in ("0.4", "0.6")}
    assert {(r["noise"], r["loss"], r["epoch"]) for r in rows} == {
        (noise, loss, epoch) for noise in noises for loss in LOSSES for epoch in "123"
    }
    for row in rows:
        assert float(row["measured_noise"]) == pytest.approx(noises[row["noise"]], abs=1e-3)
        assert math.isfinite(float(row["train_loss"]))
        assert 0 <= float(row["memorised"]) + float(row["mislabelled_right"]) <= 1
        assert 0 < float(row["target_prob"]) < 1
    exponents = [float(row["q"]) for row in rows if row["loss"] == "dal"][:3]
    assert exponents[0] < 1e-6 < exponents[1] < exponents[2] < 1.2
    lines = [json.loads(line) for line in (out / "digits.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{name: str(value) for name, value in line.items()} for line in lines] == rows

    table = (out / "digits.md").read_text(encoding="utf-8")
    assert table in printed
    assert all(title in table for title in LOSSES.values())
    assert all(parse_noise(noise).title in table for noise in noises)
    assert shlex.join(["dal-train", *arguments]) in table
    assert torch.__version__ in table
    assert "40.0% of the training labels are wrong" in printed
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert all(str(out / f"digits.{kind}") in printed for kind in ("csv", "jsonl", "md", "png"))

    runs = list((out / "digits").iterdir())
    assert len(runs) == 8
    for run in runs:
        assert {file.name for file in run.iterdir()} == {
            *("checkpoint.pt", "labels.npz", "metrics.csv", "metrics.jsonl", "run.json"),
            *("classes.csv", "config.yaml", "confusion.csv"),
        }
    of_runs = [row for run in runs for row in rows_of(run / "metrics.csv")]
    assert sorted(map(str, of_runs)) == sorted(map(str, rows))


def test_finished_runs_are_used_again_and_missing_ones_trained(tmp_path: Path) -> None:
    first = run_training(config(out=tmp_path)).runs
    again = run_training(config(out=tmp_path, losses=("gce", "dal"), resume=True)).runs
    assert str(again[1].history) == str(first[0].history), "timings tell: it was trained anew"
    assert len(again[0].history) == 3
    anew = run_training(config(out=tmp_path)).runs
    assert str(anew[0].history) != str(first[0].history)
    assert repeatable(anew[0].history) == repeatable(first[0].history)


def test_a_run_started_anew_leaves_nothing_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(Exception):
        pass

    run_training(config(out=tmp_path))
    monkeypatch.setattr(Trainer, "run_epoch", Mock(side_effect=KilledError))
    with pytest.raises(KilledError):
        run_training(config(out=tmp_path))
    (run,) = (tmp_path / "digits").iterdir()
    assert {file.name for file in run.iterdir()} == {"config.yaml", "labels.npz", "run.json"}


@pytest.mark.parametrize("finished", [True, False])
def test_the_report_names_all_that_trained_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    run_epoch = Trainer.run_epoch

    def once(trainer: Trainer, tick: Callable[[], object]) -> EpochMetrics:
        if trainer.history and not finished:
            raise KeyboardInterrupt
        return run_epoch(trainer, tick)

    with monkeypatch.context() as patch, nullcontext() if finished else pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "run_epoch", once)
        run_training(config(out=tmp_path, command="train it"))
    (path,) = tmp_path.glob("*/*/run.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["clip_norm"] is None, "JSON has no infinity"
    ours = content["commit"]
    # As an earlier version wrote it.
    earlier = {**content, "commit": "an earlier one", "clip_norm": math.inf}
    del earlier["resumed by"]
    path.write_text(json.dumps(earlier), encoding="utf-8")

    for _ in range(2):  # the second time nothing is left to train
        _, text = write_report(run_training(config(out=tmp_path, command="go on", resume=True)))
        assert "- command: `go on`, `train it`\n" in text
        assert f"- commit: {'`an earlier one`' if finished else f'`an earlier one`, `{ours}`'}\n" in text


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_run_of_which_nobody_knows_who_trained_it_is_refused(tmp_path: Path, content: str) -> None:
    run_training(config(out=tmp_path))
    (path,) = tmp_path.glob("*/*/run.json")
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"run\.json cannot be used"):
        run_training(config(out=tmp_path, resume=True))


def test_the_command_of_torchrun_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert (
        parse(["train", "--seed", "1"]).command == "torchrun --nproc-per-node 3 -m dal_kernels.training train --seed 1"
    )


@pytest.mark.parametrize("lost", ["last line", "file"])
def test_metrics_that_a_kill_left_incomplete_are_made_whole(tmp_path: Path, lost: str) -> None:
    run_training(config(out=tmp_path))
    paths = [next(tmp_path.glob(f"*/*/metrics.{kind}")) for kind in ("csv", "jsonl")]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        if lost == "file":
            path.unlink()
        else:
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    run_training(config(out=tmp_path, resume=True))
    assert [path.read_bytes() for path in paths] == whole


def test_the_data_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], DATA["digits"]

    def counted(folder: Path | None) -> DataSet:
        loaded.append(folder)
        return load(folder)

    monkeypatch.setitem(DATA, "digits", counted)
    run_training(config(seeds=(0, 1), losses=("dal", "gce"), noise=("0.2", "0.4"), changes={"epochs": 1}))
    assert loaded == [None]


def test_clean_labels_and_a_loss_without_q_are_reported_without_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "--epochs", "1", "--noise", "none", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--losses", "torch.nn.CrossEntropyLoss"]) == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed
    assert "memorised the" not in printed
    assert "n/a" in printed
    assert "torch.nn.CrossEntropyLoss ends at" in printed
    assert (tmp_path / "digits.png").is_file()


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns_and_repeats_exactly(loss: str) -> None:
    def trained(seed: int) -> list[dict[str, str]]:
        (run,) = run_training(config(noise=("0.2",), losses=(loss,), seeds=(seed,))).runs
        assert run.history[-1].test_accuracy > 0.5, "chance is 0.1"
        return repeatable(run.history)

    first = trained(seed=0)
    torch.manual_seed(99)  # the global generator has no say
    state = torch.get_rng_state()
    assert trained(seed=0) == first
    assert torch.equal(torch.get_rng_state(), state), "and is left as it was"
    assert trained(seed=1) != first


def test_cross_entropy_is_torchs_own() -> None:
    runs = run_training(config(losses=("cross-entropy", "torch.nn.CrossEntropyLoss"))).runs
    ours, theirs = (run.history[-1] for run in runs)
    assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
    assert ours.test_accuracy == pytest.approx(theirs.test_accuracy, abs=1.5 / 450)


def test_a_loss_gets_the_same_numbers_whatever_runs_beside_it() -> None:
    alone, beside = (run_training(config(losses=losses)).runs[-1] for losses in (("dal",), ("cross-entropy", "dal")))
    assert repeatable(alone.history) == repeatable(beside.history)


def test_run_training_restores_threads_and_is_silent_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    (run,) = run_training(config(noise=("none",), threads=before + 1, changes={"epochs": 1})).runs
    assert torch.get_num_threads() == before
    assert capfd.readouterr() == ("", "")
    assert math.isnan(run.history[-1].memorised)


def test_a_report_needs_a_folder() -> None:
    with pytest.raises(UsageError, match="folder"):
        write_report(run_training(config(changes={"epochs": 1})))


def test_the_demo_takes_what_compare_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(demo, "demonstrate", shown.append)
    assert demo.main(["--noise", "0.2", "--learning-rate", "0.5"]) == 0
    assert shown == [parse(["compare", "--seeds", "0", "1", "--noise", "0.2", "--learning-rate", "0.5"])]
    assert shown[0].recipe.learning_rate == 0.5


def test_the_demo_by_itself_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(demo, "demonstrate", shown.append)
    assert demo.main([]) == 0
    assert len(shown[0].noise) * len(shown[0].seeds) * len(shown[0].losses) == 8


def test_help_says_which_presets_are_the_authors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "the authors' own are cifar10, cifar100, mini-webvision " in " ".join(capsys.readouterr().out.split())
