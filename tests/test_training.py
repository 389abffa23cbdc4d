"""Training under label noise: its parts on hand-made cases, and short runs on digits."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks.training import Run, TrainingConfig, main, run_training
from benchmarks.training.data import DATA
from benchmarks.training.losses import LOSSES, end_epoch, exponents
from benchmarks.training.metrics import memorisation, predict
from benchmarks.training.models import mlp
from benchmarks.training.recipes import RECIPES
from benchmarks.training.report import in_words, summarise
from benchmarks.training.train import EpochMetrics

# The extra dal_kernels[demo].
for module in ("matplotlib", "sklearn", "tabulate", "tqdm"):
    pytest.importorskip(module)


# --- data, recipes, models, losses, metrics


def test_each_data_set_has_a_recipe() -> None:
    assert set(DATA) == set(RECIPES)


def test_mlp_has_the_asked_widths_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model, same, other = (mlp(64, (256, 128), 10, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [(256, 64), (128, 256), (10, 128)]
    inputs = torch.ones(3, 8, 8)
    assert model(inputs).shape == (3, 10)
    assert torch.equal(model(inputs), same(inputs))
    assert not torch.equal(model(inputs), other(inputs))


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("cross-entropy", (math.nan, math.nan), (math.nan, math.nan)),
        ("gce", (0.7, 0), (0.7, 0)),
        ("dal", (0.6, 0), (1.5, 1)),
    ],
)
def test_losses_start_before_any_step_and_end_where_they_should(
    name: str, first: tuple[float, float], last: tuple[float, float]
) -> None:
    criterion = LOSSES[name].build(4)
    assert exponents(criterion) == pytest.approx(first, nan_ok=True)
    for _ in range(4):
        end_epoch(criterion)
    assert exponents(criterion) == pytest.approx(last, nan_ok=True)


def test_gce_is_its_formula() -> None:
    logits, labels = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    p = logits.softmax(1)[torch.arange(6), labels]
    torch.testing.assert_close(LOSSES["gce"].build(1)(logits, labels), ((1 - p**0.7) / 0.7).mean())


@pytest.mark.parametrize(
    ("prediction", "memorised", "right"),
    [
        # the wrong labels are of samples 1 to 4: given 2, 2, 0, 0 for 1, 1, 2, 2
        ([0, 2, 2, 0, 0], 1.0, 0.0),
        ([0, 1, 1, 2, 2], 0.0, 1.0),
        ([9, 2, 1, 1, 1], 0.25, 0.25),
        ([1, 1, 1, 2, 0], 0.25, 0.75),
    ],
)
def test_memorisation_counts_wrong_labels_only(prediction: list[int], memorised: float, right: float) -> None:
    given, true = torch.tensor([0, 2, 2, 0, 0]), torch.tensor([0, 1, 1, 2, 2])
    assert memorisation(torch.tensor(prediction), given, true) == (memorised, right)


def test_memorisation_of_no_wrong_labels_is_nan() -> None:
    labels = torch.arange(3)
    assert all(map(math.isnan, memorisation(labels, labels, labels)))


def test_predict_is_in_evaluation_mode_and_restores_the_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.9)).train()
    inputs = torch.eye(50)
    assert torch.equal(predict(model, inputs, batch_size=7), torch.arange(50))
    assert model.training


# --- words


def run_of(loss: str, seed: int, accuracies: list[float], memorised: float = 0.5) -> Run:
    history = [
        EpochMetrics(i, 1.0, accuracy, memorised, 0.25, math.nan, math.nan, 0.1)
        for i, accuracy in enumerate(accuracies, start=1)
    ]
    return Run("digits", 0.4, 0.4, loss, seed, history)


def test_summary_takes_last_and_best_over_seeds() -> None:
    (summary,) = summarise([run_of("gce", 0, [0.2, 0.9, 0.7]), run_of("gce", 1, [0.8, 0.7, 0.5])])
    assert summary.last.mean == pytest.approx(0.6)
    assert summary.last.sd == pytest.approx(math.sqrt(0.02))
    assert summary.best.mean == pytest.approx(0.85)
    assert summary.last.percent() == "60.0 ± 14.1"


@pytest.mark.parametrize(
    ("accuracies", "said", "unsaid"),
    [
        ({"cross-entropy": 0.5, "dal": 0.9}, ["DAL ends highest", "40.0 points ahead of cross-entropy"], ["tie"]),
        ({"cross-entropy": 0.9, "dal": 0.5}, ["cross-entropy ends highest", "ahead of DAL"], ["DAL ends", "tie"]),
        ({"gce": 0.801, "dal": 0.8}, ["GCE ends highest", "0.1 points ahead of DAL (less", "a tie"], ["DAL ends"]),
    ],
)
def test_words_follow_the_numbers(accuracies: dict[str, float], said: list[str], unsaid: list[str]) -> None:
    runs = [run_of(loss, seed, [a + 0.01 * seed]) for loss, a in accuracies.items() for seed in (0, 1)]
    words = in_words(summarise(runs))
    assert all(part in words for part in said)
    assert not any(part in words for part in unsaid)


def test_words_about_one_loss_compare_it_with_none() -> None:
    words = in_words(summarise([run_of("gce", 0, [0.5, 0.7])]))
    assert words == (
        "With 40% of the labels wrong, GCE ends at 70.0%. "
        "GCE keeps its best accuracy to the last epoch, by when it has memorised 50.0% of the wrong labels."
    )


def test_words_name_the_loss_that_was_best_before_it_fell() -> None:
    words = in_words(summarise([run_of("cross-entropy", 0, [0.95, 0.5]), run_of("dal", 0, [0.8, 0.9])]))
    assert "DAL ends highest at 90.0%" in words
    assert "Cross-entropy loses 45.0 points from its best epoch to its last" in words
    assert "Stopped at the best epoch, cross-entropy would be ahead at 95.0%" in words


# --- runs


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_command_line_writes_metrics_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert main(["--epochs", "3", "--noise", "0.4", "0.6", "--seeds", "0", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = read_rows(out / "digits.csv")

    assert [*rows[0]][:5] == ["data", "noise", "measured_noise", "loss", "seed"]
    assert {field.name for field in fields(EpochMetrics)} < set(rows[0])
    assert {(r["noise"], r["loss"], r["epoch"]) for r in rows} == {
        (noise, loss, epoch) for noise in ("0.4", "0.6") for loss in LOSSES for epoch in "123"
    }
    for row in rows:
        assert float(row["measured_noise"]) == pytest.approx(float(row["noise"]), abs=1e-3)
        assert math.isfinite(float(row["train_loss"]))
        assert 0 <= float(row["memorised"]) + float(row["mislabelled_right"]) <= 1
    dal = [(float(r["q"]), float(r["bootstrap_weight"])) for r in rows if (r["loss"], r["noise"]) == ("dal", "0.4")]
    assert dal == [pytest.approx(expected) for expected in ((0.6, 0), (0.9, 0), (1.2, 0.4))]

    table = (out / "digits.md").read_text(encoding="utf-8")
    assert table in printed
    assert all(spec.title in table for spec in LOSSES.values())
    assert "40.0% of 1347 training labels wrong" in printed
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert all(str(out / f"digits.{kind}") in printed for kind in ("csv", "md", "png"))


def test_clean_labels_and_a_loss_without_q_are_reported_without_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--epochs", "1", "--noise", "0", "--seeds", "0", "1", "--losses", "cross-entropy", "--out"]
    assert main([*arguments, str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed
    assert "memorised the" not in printed
    assert "n/a" in printed
    assert (tmp_path / "digits.png").is_file()


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns_and_repeats_exactly(tmp_path: Path, loss: str) -> None:
    def trained(folder: str, seed: int) -> bytes:
        config = TrainingConfig(
            noise=(0.2,), losses=(loss,), seeds=(seed,), epochs=2, out=tmp_path / folder, verbose=False
        )
        results = run_training(config)
        assert results.runs[0].history[-1].test_accuracy > 0.25, "chance is 0.1"
        return results.csv.read_bytes()

    first = trained("a", seed=0)
    torch.manual_seed(99)  # the global generator has no say
    assert trained("b", seed=0) == first
    assert trained("c", seed=1) != first


def test_a_loss_gets_the_same_numbers_whatever_runs_beside_it() -> None:
    def dal(losses: tuple[str, ...]) -> list[EpochMetrics]:
        runs = run_training(TrainingConfig(noise=(0.4,), losses=losses, seeds=(0,), epochs=2, verbose=False)).runs
        return runs[-1].history

    assert dal(("dal",)) == dal(("cross-entropy", "dal"))


def test_run_training_restores_threads_and_is_silent_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    config = TrainingConfig(noise=(0.0,), losses=("gce",), seeds=(0,), epochs=1, threads=before + 1, verbose=False)
    (run,) = run_training(config).runs
    assert torch.get_num_threads() == before
    assert capfd.readouterr() == ("", "")
    assert math.isnan(run.history[-1].memorised)


# --- errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--epochs 0", "epochs"),
        ("--noise 1.0", "noise"),
        ("--noise nan", "noise"),
        ("--noise 0.4 0.4", "noise"),
        ("--seeds -1", "seeds"),
        ("--threads 0", "threads"),
        ("--device nowhere", "nowhere"),
        ("--data cifar", "cifar"),
        ("--losses mae", "mae"),
        ("--data-dir .", "digits"),
        ("--data fashion-mnist --data-dir no-such-folder", "no-such-folder"),
        (f"--epochs 1 --out {__file__}", "cannot be made"),
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
    assert error.startswith("benchmarks.training: ")
    assert error.count("\n") == 1
    assert printed == ""


@pytest.mark.parametrize(
    ("module", "package"),
    [("tqdm", "tqdm"), ("matplotlib", "matplotlib"), ("tabulate", "tabulate"), ("sklearn.datasets", "scikit-learn")],
)
def test_a_missing_package_names_the_extra(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["--epochs", "1", "--seeds", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks.training: {package} is missing")
    assert "dal_kernels[demo]" in error
