"""Labels from files, by people, and of folders that nobody verified."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from dal_kernels.noise import UNKNOWN, cifar_n_labels
from dal_kernels.training import UsageError
from dal_kernels.training.noise import Noise, NoisyLabels, parse_noise
from support.trainings import data_of

SMALL = data_of(torch.tensor([0, 1, 2, 0, 1]), 3)


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


def test_the_noise_of_a_folder_that_nobody_verified_is_unknown() -> None:
    data = replace(SMALL, verified=False)
    assert math.isnan(Noise("none").apply(data, seed=0).measured)
    assert parse_noise("0.4").apply(data, seed=0).measured == 0.4
    assert (Noise("none").known(data).true_labels == UNKNOWN).all()
    assert parse_noise("0.4").known(data) is data
