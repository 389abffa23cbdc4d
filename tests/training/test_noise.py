"""Label noise: how many labels are wrong and which, by seed, by kind and in words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dal_kernels.noise import UNKNOWN, noise_rate, symmetric_noise
from dal_kernels.training import UsageError
from dal_kernels.training.data.base import DataSet
from dal_kernels.training.noise import Noise, parse_noise
from support.trainings import data_of


def flip(labels: Tensor, rate: float, classes: int, seed: int, include_true: bool = False) -> Tensor:
    return symmetric_noise(labels, rate, classes, torch.Generator().manual_seed(seed), include_true)


SMALL = data_of(torch.tensor([0, 1, 2, 0, 1]), 3)


# --- symmetric


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.6, 0.99])
def test_symmetric_noise_makes_exactly_the_asked_share_wrong(rate: float, classes: int) -> None:
    labels = torch.arange(1003) % classes
    noisy = flip(labels, rate, classes, seed=0)
    assert (noisy != labels).sum() == round(rate * 1003)
    assert noise_rate(noisy, labels) == pytest.approx(rate, abs=0.5 / 1003)
    assert noisy.min() >= 0
    assert noisy.max() < classes


def test_symmetric_noise_spreads_evenly_over_the_other_classes() -> None:
    labels = torch.full((9000,), 3)
    counts = torch.bincount(flip(labels, 0.9, 10, seed=0), minlength=10).double()
    others = counts[torch.arange(10) != 3]
    assert counts[3] == 900
    # 900 expected in each; chi-squared with 8 degrees of freedom exceeds 27 once in a thousand seeds.
    assert ((others - 900) ** 2 / 900).sum() < 27


def test_symmetric_noise_depends_on_its_generator_alone() -> None:
    labels = torch.arange(500) % 10
    first = flip(labels, 0.4, 10, seed=1)
    torch.manual_seed(123)
    assert torch.equal(flip(labels, 0.4, 10, seed=1), first)
    assert not torch.equal(flip(labels, 0.4, 10, seed=2), first)
    assert torch.equal(labels, torch.arange(500) % 10), "the caller's labels were changed"


@pytest.mark.parametrize(("rate", "classes"), [(-0.1, 10), (1.0, 10), (math.nan, 10), (0.4, 1)])
def test_symmetric_noise_refuses(rate: float, classes: int) -> None:
    with pytest.raises(ValueError, match=r"rate must be in|at least 2 classes"):
        flip(torch.zeros(10, dtype=torch.long), rate, classes, seed=0)


@pytest.mark.parametrize("classes", [2, 10])
def test_symmetric_noise_with_the_true_class_is_wrong_less_often(classes: int) -> None:
    labels = torch.arange(20_000) % classes
    noisy = flip(labels, 0.4, classes, seed=0, include_true=True)
    expected = 0.4 * (classes - 1) / classes
    # 8000 labels drawn anew: five standard deviations
    assert noise_rate(noisy, labels) == pytest.approx(expected, abs=5 * math.sqrt(8000 * 0.25) / 20_000)
    assert set(noisy.tolist()) == set(range(classes))


# --- the other kinds


def test_noise_of_a_seed_is_what_the_first_tables_were_made_with() -> None:
    labels = torch.arange(500) % 10
    assert torch.equal(parse_noise("0.4").apply(data_of(labels, 10), seed=3).labels, flip(labels, 0.4, 10, seed=30))


@pytest.mark.parametrize("text", ["symmetric:0.3", "symmetric-all:0.3", "asymmetric:0.3", "instance:0.3"])
def test_made_noise_depends_on_its_seed_alone_and_measures_itself(text: str) -> None:
    data = data_of(torch.arange(2000) % 5, 5)
    first = parse_noise(text).apply(data, seed=1)
    torch.manual_seed(7)
    assert torch.equal(parse_noise(text).apply(data, seed=1).labels, first.labels)
    assert not torch.equal(parse_noise(text).apply(data, seed=2).labels, first.labels)
    assert torch.equal(data.train_labels, torch.arange(2000) % 5), "the data set's labels were changed"
    assert first.measured == (first.labels != data.train_labels).double().mean().item()
    assert 0.2 < first.measured < 0.35
    assert (str(first.noise), first.seed, first.data) == (text, 1, "made-up")


@pytest.mark.parametrize(
    ("flips", "moved"),
    [(None, {0: 1, 1: 2, 2: 3, 3: 0}), ([1, 0, 2, 2], {0: 1, 1: 0, 3: 2})],
    ids=["next class", "some classes"],
)
def test_asymmetric_noise_moves_the_asked_share_of_the_classes_that_move(
    flips: list[int] | None, moved: dict[int, int]
) -> None:
    labels = torch.arange(4000) % 4
    data = data_of(labels, 4, flips=None if flips is None else torch.tensor(flips))
    noisy = parse_noise("asymmetric:0.4").apply(data, seed=0)
    wrong = noisy.labels != labels
    assert wrong.sum() == round(0.4 * 1000 * len(moved))
    assert {(a, b) for a, b in zip(labels[wrong].tolist(), noisy.labels[wrong].tolist(), strict=True)} == set(
        moved.items()
    )


@pytest.mark.parametrize(
    ("data", "kinds", "message"),
    [
        (
            data_of(torch.zeros(9, dtype=torch.long), 1),
            ("symmetric", "symmetric-all", "asymmetric", "instance"),
            "noise needs at least 2 classes, got 1",
        ),
        (data_of(torch.arange(9) % 3, 3, flips=torch.arange(3)), ("asymmetric",), "takes for another, got none"),
    ],
    ids=["one class", "no flips"],
)
def test_noise_that_could_make_nothing_wrong_is_refused(data: DataSet, kinds: tuple[str, ...], message: str) -> None:
    for kind in kinds:
        with pytest.raises(UsageError, match=message):
            Noise(kind, 0.4).apply(data, seed=0)


def test_instance_noise_goes_by_the_input() -> None:
    # 40 different inputs, each 200 times, all of class 0
    inputs = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).repeat(200, 1)
    data = data_of(torch.zeros(8000, dtype=torch.long), 10, inputs)
    noisy = parse_noise("instance:0.4").apply(data, seed=0)
    # a mean of 8000 draws, of which the rates vary too
    assert noisy.measured == pytest.approx(0.4, abs=0.03)
    counts = torch.stack([torch.bincount(noisy.labels[i::40], minlength=10)[1:] for i in range(40)]).double()
    favourite = counts.amax(1) / counts.sum(1)
    assert favourite.mean() > 0.8, "equal inputs are not taken for the same class"
    assert len(set(counts.argmax(1).tolist())) > 4, "all inputs are taken for the same class"


def test_instance_noise_gives_samples_rates_of_their_own() -> None:
    labels = torch.zeros(1000, dtype=torch.long)
    data = data_of(labels, 2, torch.zeros(1000, 1))
    # With rates that all were 0.05 the count would be 50; truncated at 0 their mean is 0.1.
    assert parse_noise("instance:0.05").apply(data, seed=0).measured == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("kind", ["symmetric", "symmetric-all", "asymmetric", "instance"])
def test_labels_that_are_wrong_already_are_not_made_worse(kind: str) -> None:
    web = DataSet("web", 3, SMALL.train, SMALL.train_labels, torch.full((5,), UNKNOWN), SMALL.test, SMALL.test_labels)
    with pytest.raises(UsageError, match=f"web has wrong labels of its own: .* got {kind}:0.4"):
        Noise(kind, 0.4).apply(web, seed=0)
    given = Noise("none").apply(web, seed=0)
    assert torch.equal(given.labels, web.train_labels)
    assert math.isnan(given.measured)


def test_noise_is_measured_where_the_truth_is_known() -> None:
    given, true = torch.tensor([0, 1, 2, 2]), torch.tensor([0, UNKNOWN, 1, UNKNOWN])
    assert noise_rate(given, true) == 0.5


# --- the command line's form


@pytest.mark.parametrize(
    ("text", "noise", "title"),
    [
        ("symmetric:0.4", Noise("symmetric", 0.4), "symmetric 40 %"),
        ("symmetric-all:0.125", Noise("symmetric-all", 0.125), "symmetric 12.5 % (true class too)"),
        ("asymmetric:0.07", Noise("asymmetric", 0.07), "asymmetric 7 %"),
        ("instance:0.2", Noise("instance", 0.2), "instance 20 %"),
        ("none", Noise("none"), "labels as given"),
        ("file:a:b/c.npy", Noise("file", path=Path("a:b/c.npy")), "labels of c.npy"),
    ],
)
def test_noise_in_words(text: str, noise: Noise, title: str) -> None:
    assert parse_noise(text) == noise
    assert str(noise) == text
    assert noise.title == title


def test_a_bare_rate_is_symmetric() -> None:
    assert parse_noise("0.4") == Noise("symmetric", 0.4)
    assert parse_noise("0") == Noise("symmetric", 0.0)


@pytest.mark.parametrize(
    "text", ["", "1", "nan", "-0.1", "symmetric", "symmetric:", "symmetric:1", "pairs:0.4", "none:0.4", "file:", "file"]
)
def test_parse_noise_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="noise"):
        parse_noise(text)


@pytest.mark.parametrize(
    "arguments", [("symmetric",), ("none", 0.4), ("file",), ("file", 0.4, Path("x")), ("symmetric", 0.4, Path("x"))]
)
def test_a_noise_has_what_its_kind_needs_and_no_more(arguments: tuple) -> None:
    with pytest.raises(UsageError, match="noise must be"):
        Noise(*arguments)


def test_instance_noise_at_no_rate_is_refused() -> None:
    with pytest.raises(UsageError, match="above 0"):
        parse_noise("instance:0").apply(SMALL, seed=0)
