"""What is said of runs: their summary, in words, and the folder of each."""

from __future__ import annotations

import math

import pytest

from dal_kernels.training import Run
from dal_kernels.training.metrics import EpochMetrics
from dal_kernels.training.noise import parse_noise
from dal_kernels.training.report import in_words
from dal_kernels.training.summary import summarise
from support.trainings import needs_training

needs_training()


def run_of(loss: str, seed: int, accuracies: list[float], noise: str = "0.4") -> Run:
    history = [
        EpochMetrics(i, 1.0, accuracy, max(accuracies[:i]), math.nan, 0.5, 0.25, 0.3, math.nan, math.nan, 0.1, 0.1, 1.0)
        for i, accuracy in enumerate(accuracies, start=1)
    ]
    return Run("digits", parse_noise(noise), 0.4, loss, seed, history)


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
        ({"gce": 0.8, "dal": 0.8}, ["GCE ends at 80.5 ± 0.7%, level with DAL."], ["points ahead", "tie"]),
        (
            {"gce": 0.8, "dal": 0.7999, "mae": 0.8, "cross-entropy": 0.5},
            ["GCE ends highest at 80.5 ± 0.7%, level with MAE and DAL, 30.0 points ahead of cross-entropy."],
            [", 0.0 points", "tie"],
        ),
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
        f"Noise {parse_noise('0.4').title}: GCE ends at 70.0%. "
        "GCE keeps its best accuracy to the last epoch, by when it has memorised 50.0% of the wrong labels."
    )


def test_words_name_the_loss_that_was_best_before_it_fell() -> None:
    words = in_words(summarise([run_of("cross-entropy", 0, [0.95, 0.5]), run_of("dal", 0, [0.8, 0.9])]))
    assert "DAL ends highest at 90.0%" in words
    assert "Cross-entropy loses 45.0 points from its best epoch to its last" in words
    assert "Stopped at the best epoch, cross-entropy would be ahead at 95.0%" in words


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("0.4", "dal", 1), ("0.4", "dal", 11)),
        (("0.4", "a.b:c", 1), ("0.4", "a.b-c", 1)),
        (("0.4", "dal", 1), ("0.6", "dal", 1)),
    ],
)
def test_each_run_has_a_folder_of_its_own(first: tuple[str, str, int], second: tuple[str, str, int]) -> None:
    names = {run_of(loss, seed, [0.5], noise).folder for noise, loss, seed in (first, second)}
    assert len(names) == 2
    assert not any(character in name for name in names for character in "/:\\ ")
