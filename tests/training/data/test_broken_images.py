"""Images that cannot be read: skipped and listed, or an error, and never of a class that there is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dal_kernels.training import UsageError, main
from dal_kernels.training.data import load_data
from dal_kernels.training.data.base import FileImages
from dal_kernels.training.data.transforms import ImageTransform
from dal_kernels.training.loader import evaluation_loader, first_input, training_loader
from support.pictures import SIDE, picture, trained
from support.trainings import ALONE, needs_training, rows_of

numpy = pytest.importorskip("numpy")

library = pytest.importorskip("PIL.Image")

needs_training()


def spoil(folder: Path) -> list[Path]:
    """Puts an empty file, one of text and a torn one among the images to train on, and a torn one to test on."""
    whole = (folder / "train" / "dark" / "00.png").read_bytes()
    broken = {
        folder / "train" / "dark" / "05a.png": b"",
        folder / "train" / "light" / "03a.jpg": b"no image",
        folder / "train" / "light" / "03b.png": whole[: len(whole) // 2],
        folder / "val" / "light" / "00a.png": whole[:40],
    }
    for path, content in broken.items():
        path.write_bytes(content)
    return list(broken)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_broken_images_are_skipped_and_listed(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    broken = spoil(pictures)
    trained(f"folder:{pictures}", tmp_path / "out", "--workers", workers, "--batch-size", "4")
    assert "4 images could not be read and were left out" in capsys.readouterr().out
    (path,) = tmp_path.glob("out/*/*/skipped.csv")
    rows = rows_of(path)
    assert {row["path"] for row in rows} == set(map(str, broken))
    assert {row["part"] for row in rows} == {"train", "test"}
    assert any("the file is empty" in row["reason"] for row in rows)


def test_an_inspection_says_why_it_saw_fewer_images(pictures: Path, tmp_path: Path) -> None:
    spoil(pictures)
    arguments = ["inspect", "--data", f"folder:{pictures}", "--epochs", "1", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    text = (tmp_path / "out" / "inspect.md").read_text(encoding="utf-8")
    assert "Of 27 training samples 24 were seen; the other 3 could not be read." in text


def test_a_broken_image_is_an_error_if_asked_for(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(pictures)
    arguments = ["train", "--data", f"folder:{pictures}", "--epochs", "1", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--bad-images", "error"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_an_image_of_too_many_pixels_is_not_opened(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "MAX_IMAGE_PIXELS", SIDE * SIDE - 1)
    data = load_data(f"folder:{pictures}", bad_images="error")
    with pytest.raises(UsageError, match="cannot be read: Image size"):
        data.train.batch([0], train=False)


def test_another_image_takes_the_place_of_a_broken_one_in_training_only(pictures: Path) -> None:
    spoil(pictures)
    data = load_data(f"folder:{pictures}", bad_images="skip")
    broken = {i for i, path in enumerate(data.paths("train")) if path.rpartition(".")[0].endswith(("a", "b"))}
    assert len(broken) == 3
    batches = training_loader(data.train, 5, 0, 0, ALONE)
    batches.set_epoch(1)
    shown = [indices.tolist() for _, indices in batches]
    assert [len(batch) for batch in shown] == [5, 5, 5, 5, 5, 2], "of 27, as without broken ones"
    assert not broken & {i for batch in shown for i in batch}
    assert set(batches.unreadable) == broken
    evaluated = evaluation_loader(data.train, torch.arange(len(data.train)), 2, 0, ALONE)
    shown = [indices.tolist() for _, indices in evaluated]
    assert sorted(i for batch in shown for i in batch) == sorted(set(range(len(data.train))) - broken)
    assert first_input(data.train).shape == (3, SIDE, SIDE)


def test_images_of_which_none_can_be_read_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no")
    transform = ImageTransform((0.5,) * 3, (0.5,) * 3, side=8)
    images = FileImages(tmp_path, ["a.png"], transform, skip=True)
    with pytest.raises(UsageError, match=r"none of the 1 images can be read; the first: .*a\.png"):
        next(iter(training_loader(images, 1, 0, 0, ALONE)))


def test_copies_that_jupyter_and_macos_hide_are_no_class_and_no_image(pictures: Path) -> None:
    expected = load_data(f"folder:{pictures}")
    picture(pictures / "train" / ".ipynb_checkpoints" / "00.png", 3)
    picture(pictures / "train" / "dark" / ".ipynb_checkpoints" / "00.png", 3)
    (pictures / "train" / "dark" / "._00.png").write_bytes(b"no image")
    found = load_data(f"folder:{pictures}")
    assert found.names == expected.names
    assert found.paths("train") == expected.paths("train")
