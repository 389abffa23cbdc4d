"""Label noise: how many labels are wrong and which, by seed, and labels from files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from dal_kernels.noise import UNKNOWN, cifar_n_labels, noise_rate, symmetric_noise
from dal_kernels.training import UsageError
from dal_kernels.training.data.base import DataSet, TensorImages
from dal_kernels.training.noise import Noise, NoisyLabels, parse_noise


def flip(labels: Tensor, rate: float, classes: int, seed: int, include_true: bool = False) -> Tensor:
    return symmetric_noise(labels, rate, classes, torch.Generator().manual_seed(seed), include_true)


def data_of(labels: Tensor, classes: int, inputs: Tensor | None = None, flips: Tensor | None = None) -> DataSet:
    """A clean data set; by default each input is its label."""
    images = TensorImages(labels[:, None].float() if inputs is None else inputs)
    return DataSet("made-up", classes, images, labels, labels, images, labels, flips)


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


# --- files


def write(path: Path, labels: list[int] | numpy.ndarray | bytes | str) -> Path:
    if isinstance(labels, bytes):
        path.write_bytes(labels)
    elif isinstance(labels, str):
        path.write_text(labels, encoding="utf-8")
    elif path.suffix == ".npy":
        numpy.save(path, numpy.asarray(labels), allow_pickle=True)
    else:
        path.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["labels.npy", "labels.txt"])
def test_labels_from_a_file(tmp_path: Path, name: str) -> None:
    given = [2, 1, 2, 0, 0]
    noisy = Noise("file", path=write(tmp_path / name, given)).apply(SMALL, seed=0)
    assert noisy.labels.dtype == torch.int64
    assert noisy.labels.tolist() == given
    assert noisy.measured == 0.4


def test_saved_labels_are_read_back_with_their_seed_and_as_noise_of_their_data_set(tmp_path: Path) -> None:
    data = data_of(torch.arange(100) % 7, 7)
    path = tmp_path / "run.labels"
    saved = parse_noise("symmetric:0.3").apply(data, seed=5)
    saved.save(path, data.paths("train"), data.names)
    loaded = NoisyLabels.load(path)
    assert torch.equal(loaded.labels, saved.labels)
    assert (loaded.noise, loaded.seed, loaded.measured, loaded.data) == (saved.noise, 5, saved.measured, "made-up")
    again = Noise("file", path=path.rename(tmp_path / "run.npz")).apply(data, seed=0)
    assert torch.equal(again.labels, saved.labels)
    assert again.measured == saved.measured


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", [0, 1, 2, 0], "must have 5 labels, got 4"),
        ("a.npy", [0, 1, 2, 0, 3], "label 4 must be from 0 to 2, got 3"),
        ("a.npy", [0, 1, -1, 0, 1], "label 2 must be from 0 to 2, got -1"),
        ("a.npy", [0.0, 1.0, 2.0, 0.0, 1.0], "must be int64"),
        ("a.npy", numpy.zeros((5, 1), dtype=int), "must be int64"),
        ("a.npy", numpy.zeros(5, dtype=">i8"), "must be int64"),
        ("a.npy", numpy.array([0, 1, 2, 0, None]), "cannot be read: Object arrays"),  # a pickle inside
        ("a.npy", b"not an array", "cannot be read"),
        ("a.npy", b"", "cannot be read"),
        ("a.npz", b"PK\x03\x04 and no more", "cannot be read"),
        ("a.txt", [0, 1, 2, 0], "must have 5 labels, got 4"),
        ("a.txt", "", "must have 5 labels, got 0"),
        ("a.txt", [0, 1, 3, 0, 1], "a.txt, line 3: the label must be an integer from 0 to 2, got '3'"),
        ("a.txt", "0\n1\n\n0\n1\n", "a.txt, line 3: .* got ''"),
        ("a.txt", "0\n1.0\n2\n0\n1\n", "a.txt, line 2"),
        ("a.txt", "0\n1\n2\n0\n٣\n", "a.txt, line 5"),
        ("a.txt", f"{'1' * 5000}\n", "a.txt, line 1"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.csv", [0, 1, 2, 0, 1], r"\.npy, \.npz or \.txt"),
    ],
)
def test_a_wrong_file_of_labels_is_refused(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError, match=message) as caught:
        Noise("file", path=path).apply(SMALL, seed=0)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": numpy.zeros(5, dtype=int)}, "must hold labels and one each of noise, seed"),
        ({"noise": "none", "seed": 0, "measured": 0.0, "data": "other", "labels": [0] * 5}, "labels of other, not of"),
        (
            {"noise": "none", "seed": [0, 1], "measured": 0.0, "data": "made-up", "labels": [0] * 5},
            "one each of noise, seed",
        ),
        ({"noise": "none", "seed": 0, "measured": 0.0, "data": "made-up", "labels": [0.5] * 5}, "must be int64"),
        ({"noise": 3, "seed": 0, "measured": 0.0, "data": "made-up", "labels": [0] * 5}, "noise rate must be"),
    ],
)
def test_wrong_saved_labels_are_refused(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    path = tmp_path / "a.npz"
    numpy.savez(path, **arrays)
    with pytest.raises(UsageError, match=message):
        Noise("file", path=path).apply(SMALL, seed=0)


@pytest.mark.parametrize(("suffix", "other"), [(".npy", ".npz"), (".npz", ".npy")])
def test_an_array_and_an_archive_are_not_taken_for_each_other(tmp_path: Path, suffix: str, other: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        numpy.save(path, numpy.zeros(5, dtype=int))
    else:
        numpy.savez(path, labels=numpy.zeros(5, dtype=int))
    with pytest.raises(UsageError, match=f"is not an {other} file"):
        Noise("file", path=path.rename(tmp_path / f"a{other}")).apply(SMALL, seed=0)


def test_a_missing_file_of_labels_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.npy cannot be read"):
        Noise("file", path=tmp_path / "nowhere.npy").apply(SMALL, seed=0)


# --- labels by people


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """As the authors of CIFAR-N publish them: a dictionary of numpy arrays."""
    path = tmp_path / "CIFAR-10_human.pt"
    true = SMALL.train_labels.numpy()
    arrays = {"clean_label": true, "worse_label": numpy.array([1, 1, 2, 0, 0]), "aggre_label": true}
    torch.save(arrays, path)
    return path


def test_labels_by_people(people: Path) -> None:
    noise = parse_noise(f"cifar-n:worse:{people}")
    assert str(noise) == f"cifar-n:worse:{people}"
    assert noise.title == "labels by people (worse)"
    noisy = noise.apply(SMALL, seed=0)
    assert noisy.labels.tolist() == [1, 1, 2, 0, 0]
    assert noisy.measured == 0.4
    assert parse_noise(f"cifar-n:aggregate:{people}").apply(SMALL, seed=0).measured == 0


@pytest.mark.parametrize(
    ("labels", "true", "message"),
    [
        ("worst", None, "LABELS of cifar-n must be one of aggregate, worse, random1"),
        ("random1", None, "has no labels called 'random_label1', got clean_label, worse_label, aggre_label"),
        ("worse", [1, 0, 2, 0, 1], "has labels of other images, or in another order, than made-up"),
    ],
)
def test_labels_by_people_that_do_not_fit(people: Path, labels: str, true: list[int] | None, message: str) -> None:
    data = SMALL if true is None else data_of(torch.tensor(true), 3)
    with pytest.raises(UsageError, match=message):
        parse_noise(f"cifar-n:{labels}:{people}").apply(data, seed=0)


def test_no_code_is_run_from_labels_by_people(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"worse_label": Path("x"), "clean_label": SMALL.train_labels}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        cifar_n_labels(path, "worse")


# --- labels that nobody verified


def test_the_noise_of_a_folder_that_nobody_verified_is_unknown() -> None:
    data = replace(SMALL, verified=False)
    assert math.isnan(Noise("none").apply(data, seed=0).measured)
    assert parse_noise("0.4").apply(data, seed=0).measured == 0.4
    assert (Noise("none").known(data).true_labels == UNKNOWN).all()
    assert parse_noise("0.4").known(data) is data
