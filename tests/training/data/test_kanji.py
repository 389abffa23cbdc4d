"""Printed kanji: on fonts made here, and on real ones where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dal_kernels.training import UsageError
from dal_kernels.training.data import load_data
from dal_kernels.training.data.kanji import PRIVATE, TEST_FONTS, TRAIN_FONTS, characters, draw_glyphs, find_fonts

# The extra dal_kernels[demo]; fontTools comes with matplotlib.
pytest.importorskip("PIL")
FontBuilder = pytest.importorskip("fontTools.fontBuilder").FontBuilder
TTGlyphPen = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen

ALL = characters()[:100]


def box(width: int, height: int) -> Any:
    """A glyph of one filled rectangle, off the middle of its em; of no width: blank."""
    pen = TTGlyphPen(None)
    if width:
        corners = [(50, 0), (50, height), (50 + width, height), (50 + width, 0)]
        pen.moveTo(corners[0])
        for corner in corners[1:]:
            pen.lineTo(corner)
        pen.closePath()
    return pen.glyph()


def write_font(path: Path, boxes: dict[str, tuple[int, int]], substitute: tuple[int, int] = (500, 500)) -> Path:
    """A font that draws each character as a box of that width and height, in thousandths of an em."""
    path.parent.mkdir(parents=True, exist_ok=True)
    glyphs = {".notdef": box(*substitute)} | {f"u{ord(c):X}": box(*size) for c, size in boxes.items()}
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap({ord(c): f"u{ord(c):X}" for c in boxes})
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 50)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return path


def write_fonts(root: Path, lacking: dict[str, str] | None = None) -> None:
    """All fonts, each in a folder of its own: training fonts draw high boxes, test fonts wide ones."""
    for file, package in (TRAIN_FONTS | TEST_FONTS).items():
        size = (300, 900) if file in TRAIN_FONTS else (900, 300)
        present = [c for c in ALL if c not in (lacking or {}).get(file, "")]
        write_font(root / "truetype" / package / file, dict.fromkeys(present, size))


def test_the_characters_are_level_1_of_the_standard() -> None:
    kanji = characters()
    assert len(kanji) == len(set(kanji)) == 2965
    assert kanji.startswith("亜唖娃阿哀愛挨")
    assert kanji.endswith("椀湾碗腕")
    assert all(0x4E00 <= ord(c) <= 0x9FFF for c in kanji)


@pytest.mark.parametrize("substitute", [(500, 500), (0, 0)])
def test_missing_and_blank_glyphs_are_noticed_and_ink_is_put_in_the_middle(
    tmp_path: Path, substitute: tuple[int, int]
) -> None:
    font = write_font(tmp_path / "a.ttf", {"亜": (200, 900), "娃": (900, 100), "阿": (0, 0)}, substitute)
    glyphs = draw_glyphs(font, "亜唖娃阿" + PRIVATE)
    assert glyphs.present.tolist() == [True, False, True, False, False]
    assert glyphs.pixels[[1, 3, 4]].sum() == 0
    for i, (width, height) in ((0, (200, 900)), (2, (900, 100))):
        rows, columns = glyphs.pixels[i].nonzero().unbind(1)
        for found, size in ((rows, height), (columns, width)):
            assert (found.max() - found.min() + 1).item() == pytest.approx(size / 1000 * 52, abs=2)
            assert (found.max() + found.min()).item() / 2 == pytest.approx(31.5, abs=1)


def test_test_images_are_of_typefaces_that_are_not_trained_on(tmp_path: Path) -> None:
    write_fonts(tmp_path)
    data = load_data("kanji-100", tmp_path)
    assert torch.bincount(data.train_labels).tolist() == [40] * 100
    assert torch.bincount(data.test_labels).tolist() == [9] * 100
    for images, upright in ((data.train, True), (data.test, False)):
        assert images.inputs.shape[1:] == (1, 32, 32)
        ink = images.inputs[:, 0] > 127
        height, width = ink.any(2).sum(1), ink.any(1).sum(1)
        assert ((height > width) == upright).all()
    assert len(torch.unique(data.train.inputs.flatten(1), dim=0)) == 4000, "some have the same jitter"
    assert torch.equal(load_data("kanji-100", tmp_path).train.inputs, data.train.inputs)


def test_a_class_gets_all_its_images_from_the_typefaces_that_have_it(tmp_path: Path) -> None:
    only = next(iter(TRAIN_FONTS))
    write_fonts(tmp_path, {file: ALL[3] for file in TRAIN_FONTS if file != only} | {only: ALL[4]})
    data = load_data("kanji-100", tmp_path)
    assert torch.bincount(data.train_labels).tolist() == [40] * 100
    assert (data.train.inputs.flatten(1).amax(1) > 127).all(), "an image without ink"


@pytest.mark.parametrize("part", [TRAIN_FONTS, TEST_FONTS])
def test_a_class_in_no_typeface_of_a_part_is_an_error(tmp_path: Path, part: dict[str, str]) -> None:
    write_fonts(tmp_path, dict.fromkeys(part, ALL[5] + ALL[9]))
    with pytest.raises(UsageError, match=f"kanji: {ALL[5]}{ALL[9]} in none of {', '.join(part)}"):
        load_data("kanji-100", tmp_path)


def test_missing_fonts_are_named_with_their_packages(tmp_path: Path) -> None:
    write_fonts(tmp_path)
    for file in ("ipam.ttf", "MTLmr3m.ttf"):
        next(tmp_path.rglob(file)).unlink()
    with pytest.raises(UsageError) as caught:
        load_data("kanji-100", tmp_path)
    message = str(caught.value)
    assert "kanji: ipam.ttf, MTLmr3m.ttf not found below" in message
    assert "apt-get download fonts-ipafont-mincho fonts-motoya-l-maruberi'" in message


def test_a_damaged_font_is_named(tmp_path: Path) -> None:
    write_fonts(tmp_path)
    path = next(tmp_path.rglob("Konatu.ttf"))
    path.write_bytes(b"no font")
    with pytest.raises(UsageError, match=r"Konatu\.ttf cannot be read"):
        load_data("kanji-100", tmp_path)


def test_real_typefaces_of_the_test_are_not_those_of_the_training_in_disguise() -> None:
    folder = Path(os.environ.get("DAL_TEST_DATA", "nowhere")) / "fonts"
    if not folder.is_dir():
        pytest.skip("no real data: DAL_TEST_DATA names no folder with fonts/ in it")
    fonts = find_fonts(folder)
    drawn = {}
    for file, path in fonts.items():
        glyphs = draw_glyphs(path, characters())
        assert glyphs.present.float().mean() > 0.99, f"{file} lacks kanji"
        pixels = torch.nn.functional.avg_pool2d(glyphs.pixels[:500, None].float(), 2).flatten(1)
        pixels -= pixels.mean(1, keepdim=True)
        drawn[file] = pixels / pixels.norm(dim=1, keepdim=True)
    for test in TEST_FONTS:
        for train in TRAIN_FONTS:
            alike = ((drawn[test] * drawn[train]).sum(1) > 0.95).float().mean()
            assert alike < 0.05, f"{test} draws {alike:.0%} of the kanji as {train} does"
