"""What is drawn: the numbers of the runs, under a title, on one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dal_kernels.training import Run, figures, main
from dal_kernels.training.metrics import EpochMetrics
from dal_kernels.training.noise import parse_noise
from dal_kernels.training.summary import summarise
from support.trainings import needs_training

needs_training()


def run(
    noise: str,
    loss: str,
    seed: int,
    accuracies: Sequence[float],
    memorised: float = 0.25,
    q: Sequence[float] = (0.1, 0.2),
    validation: float = math.nan,
) -> Run:
    history = [
        EpochMetrics(i + 1, 1.5, accuracy, max(accuracies), validation, memorised, 0.5, 0.5, q[i], 0.0, 0.1, 0.1, 1.0)
        for i, accuracy in enumerate(accuracies)
    ]
    return Run("$data$", parse_noise(noise), 0.4, loss, seed, history)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures, which are saved as ever."""
    seen: list[Any] = []
    save = figures.save

    def keep(figure: Any, base: Path) -> list[Path]:
        seen.append(figure)
        return save(figure, base)

    monkeypatch.setattr(figures, "save", keep)
    return seen


def titles(figure: Any) -> list[str]:
    return [axis.get_title() for axis in figure.axes]


def test_rows_are_on_one_scale_and_the_schedule_is_drawn_once(tmp_path: Path, drawn: list[Any]) -> None:
    runs = [
        run(noise, loss, seed, (0.5 + 0.1 * seed, 0.7), q=(0.1, 0.9) if loss == "dal" else (0.7, 0.7))
        for noise in ("0.4", "0.6")
        for loss in ("gce", "dal")
        for seed in (0, 1)
    ]
    files = figures.save_curves(runs, tmp_path / "a.b")
    assert [path.name for path in files] == ["a.b.png", "a.b.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert figure.get_suptitle() == "$data$: symmetric 40 %, symmetric 60 %"
    assert titles(figure) == [
        *("symmetric 40 %: test accuracy, %", "symmetric 40 %: wrong labels memorised, %"),
        *("symmetric 60 %: test accuracy, %", "symmetric 60 %: wrong labels memorised, %"),
        "q",
    ]
    *shares, schedule = figure.axes
    assert {axis.get_ylim() for axis in shares} == {(-3, 103)}
    (line,) = schedule.lines
    assert line.get_ydata().tolist() == pytest.approx([0.1, 0.9]), "GCE's never moves, and no noise changes DAL's"
    assert shares[0].lines[0].get_ydata().tolist() == pytest.approx([55, 70])
    band = shares[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((55 - 50**0.5, 70)), "one deviation of 50 and 60"


def test_a_schedule_that_the_noise_changes_is_named(tmp_path: Path, drawn: list[Any]) -> None:
    runs = [run("0.4", "dal", 0, (0.5, 0.6), q=(0.1, 0.9)), run("none", "dal", 0, (0.5, 0.6), math.nan, (0.1, 0.91))]
    figures.save_curves(runs, tmp_path / "a")
    *shares, schedule = drawn[0].axes
    assert len(shares) == 3, "nothing to memorise where nobody knows of wrong labels"
    names = {text.get_text().strip(): text.xy[1] for text in schedule.texts}
    assert set(names) == {"symmetric 40 %", "labels as given"}
    assert names["labels as given"] - names["symmetric 40 %"] > 0.05, "not over each other"


def test_a_single_run_shows_its_loss_and_its_validation(tmp_path: Path, drawn: list[Any]) -> None:
    runs = [run("0.4", "dal", 0, (0.5, 0.6), validation=0.4)]
    first, again = (figures.save_curves(runs, tmp_path / "a")[1].read_text(encoding="utf-8") for _ in range(2))
    assert first == again, "the same figure is the same file"
    assert titles(drawn[0]) == [
        *("accuracy, %: test (solid), validation (dashed)", "wrong labels memorised, %"),
        *("loss while training", "q"),
    ]
    assert [line.get_ydata()[0] for line in drawn[0].axes[0].lines] == pytest.approx([50, 40])


def test_without_a_test_the_validation_is_drawn(tmp_path: Path, drawn: list[Any]) -> None:
    figures.save_curves([run("none", "dal", 0, (math.nan, math.nan), math.nan, validation=0.4)], tmp_path / "a")
    axis = drawn[0].axes[0]
    assert (axis.get_title(), axis.lines[0].get_ydata()[0]) == ("validation accuracy, %", pytest.approx(40))


def test_accuracy_is_drawn_against_the_noise_rate_with_deviations(tmp_path: Path, drawn: list[Any]) -> None:
    runs = [
        run(noise, loss, seed, (0.1, 0.9 - rate + 0.1 * seed))
        for noise, rate in (("none", 0.0), ("0.2", 0.2), ("0.6", 0.6), ("asymmetric:0.4", 0.4), ("instance:0.4", 0.4))
        for loss in ("gce", "dal")
        for seed in (0, 1)
    ]
    assert len(figures.save_rates(summarise(runs), "$data$", tmp_path / "rates")) == 2
    (figure,) = drawn
    assert titles(figure) == ["symmetric", "asymmetric", "instance"], "labels as given are a rate of each"
    assert figure.get_suptitle() == "$data$: accuracy against label noise"
    axis = figure.axes[0]
    assert axis.get_ylabel() == "test accuracy at the last epoch, %"
    assert axis.get_xticks().tolist() == [0, 20, 60]
    line, _, (bars,) = axis.containers[0]
    assert line.get_ydata().tolist() == pytest.approx([95, 75, 35])
    low, high = bars.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 50**0.5), "two deviations of 90 and 100"
    (tmp_path / "rates.png").unlink()
    assert figures.save_rates(summarise(runs[4:8]), "d", tmp_path / "rates") == [], "one rate is no curve"


def test_train_draws_its_curves_and_compare_the_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--epochs", "2", "--loss", "dal", "--seed", "0", "--output", str(tmp_path)]
    assert main(["train", *few, "--noise", "0.4"]) == 0
    curves = tmp_path / "digits" / "symmetric-0.4-dal-seed0" / "curves.svg"
    assert "digits: symmetric 40 %" in curves.read_text(encoding="utf-8")
    assert main(["compare", *few, "--noise", "0.4", "0.6"]) == 0
    assert "digits-rates.svg" in capsys.readouterr().out
    assert not curves.exists(), "trained anew by compare"
    assert main(["compare", *few, "--noise", "0.4"]) == 0
    assert not (tmp_path / "digits-rates.svg").exists()
