"""Printed kanji: glyphs of real typefaces with synthetic jitter, the test in typefaces that are never trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from dal_kernels.training.data.base import DataSet, byte_images
from dal_kernels.training.errors import UsageError, need, reason

__all__ = ["CLASSES", "characters", "draw_glyphs", "find_fonts", "kanji"]

CLASSES = {"kanji-100": 100, "kanji-1000": 1000, "kanji": 2965}

# File of each typeface and the Debian package it is in, one file a design. Left out, because they would show the same
# glyphs twice, once in training and once in the test: proportional variants, Komatuna, whose kanji are Konatu's, and
# Motoya Cedar, of whose kanji two thirds are Maru Berry's but for the ends of strokes.
TRAIN_FONTS = {
    "AoyagiKouzanT.ttf": "fonts-aoyagi-kouzan-t",  # brush
    "aoyagi-soseki.ttf": "fonts-aoyagi-soseki",  # pen
    "BIZUDMincho-Regular.ttf": "fonts-morisawa-bizud-mincho",
    "ipag.ttf": "fonts-ipafont-gothic",
    "ipam.ttf": "fonts-ipafont-mincho",
    "Konatu.ttf": "fonts-konatu",
    "sawarabi-mincho-medium.ttf": "fonts-sawarabi-mincho",
    "umeplus-gothic.ttf": "fonts-umeplus",
    "VL-Gothic-Regular.ttf": "fonts-vlgothic",
    "wqy-microhei.ttc": "fonts-wqy-microhei",
}
# A mincho, a gothic and a round one. Brush and pen are not tested: too few of them to learn their style from.
TEST_FONTS = {
    "dejima-mincho-r227.ttf": "fonts-dejima-mincho",
    "sawarabi-gothic-medium.ttf": "fonts-sawarabi-gothic",
    "MTLmr3m.ttf": "fonts-motoya-l-maruberi",
}
FONT_ROOT = Path("/usr/share/fonts")  # of Debian, Ubuntu and most others

TRAIN_IMAGES, TEST_IMAGES = 40, 9  # of a class
CANVAS, EM = 64, 52  # pixels that a glyph is drawn on, and its size
SIDE = 32  # pixels of an image
PRIVATE = "\U0010fffd"  # the last code point for private use


@dataclass(frozen=True)
class Glyphs:
    """What one typeface draws: (K, CANVAS, CANVAS) uint8, ink 255, and (K,) bool, whether it has the character."""

    pixels: Tensor
    present: Tensor


def kanji(name: str, folder: Path | None = None) -> DataSet:
    """The first 100 or 1000, or all 2965 kanji of JIS X 0208 level 1, images (1, 32, 32), standardised.

    40 training and 9 test images a class, in turn of each typeface of that part that has the character, each image with
    a random rotation, shear, scale and shift of its own. They are printed glyphs, not handwriting. The test's
    typefaces are Dejima Mincho, Sawarabi Gothic and Motoya Maru Berry (round); ten others train. The images are the
    same each time with one version of FreeType. In asymmetric noise a kanji is taken for the next in JIS order, which
    is by reading: the slip of someone who types by sound.

    ``folder`` is searched for the font files, with all folders below it; by default where Debian installs them.

    Raises:
        UsageError: a font file is missing or damaged, or no typeface of a part has one of the characters.
    """
    fonts = find_fonts(FONT_ROOT if folder is None else folder)
    chosen = characters()[: CLASSES[name]]
    train, train_labels = _images([fonts[file] for file in TRAIN_FONTS], chosen, TRAIN_IMAGES, seed=0)
    test, test_labels = _images([fonts[file] for file in TEST_FONTS], chosen, TEST_IMAGES, seed=1)
    train_images, test_images = byte_images(train, test)
    return DataSet(
        name, len(chosen), train_images, train_labels, train_labels, test_images, test_labels, class_names=chosen
    )


def characters() -> str:
    """The 2965 kanji of JIS X 0208 level 1, rows 16 to 47, in the standard's order."""
    cells = [bytes((0xA0 + row, 0xA0 + cell)) for row in range(16, 48) for cell in range(1, 95)]
    return b"".join(cells[: CLASSES["kanji"]]).decode("euc_jp")  # the rest of row 47 is empty


def find_fonts(root: Path) -> dict[str, Path]:
    """The path of each typeface's file anywhere below ``root``; of several the first in order.

    Raises:
        UsageError: some are missing; it names the Debian packages that have them.
    """
    found = {path.name: path for path in sorted(root.rglob("*.tt[fc]"), reverse=True)}
    wanted = TRAIN_FONTS | TEST_FONTS
    missing = [file for file in wanted if file not in found]
    if missing:
        packages = " ".join(wanted[file] for file in missing)
        raise UsageError(
            f"kanji: {', '.join(missing)} not found below {root}; on Debian or Ubuntu run, without root, 'apt-get "
            f"download {packages}' and 'dpkg -x FILE FOLDER' for each .deb file, and give that FOLDER as --data-dir"
        )
    return {file: found[file] for file in wanted}


def draw_glyphs(font: Path, chosen: str) -> Glyphs:
    """Each character of ``chosen`` as the typeface draws it, its ink in the middle of the canvas.

    A typeface without a character draws a substitute or nothing: what it draws for a code point for private use, at
    which no typeface should have anything.
    """
    image, fonts = need("PIL.Image", "pillow"), need("PIL.ImageFont", "pillow")
    try:
        face = fonts.truetype(str(font), EM, layout_engine=fonts.Layout.BASIC)
    except OSError as error:
        raise UsageError(f"the font {font} cannot be read: {reason(error, font)}") from error

    def ink(character: str) -> tuple[tuple[int, int], bytes]:
        mask = face.getmask(character)
        return mask.size, bytes(mask)

    substitute = ink(PRIVATE)
    pixels, present = torch.zeros(len(chosen), CANVAS, CANVAS, dtype=torch.uint8), torch.zeros(len(chosen)).bool()
    for i, character in enumerate(chosen):
        size, values = drawn = ink(character)
        if drawn == substitute or not any(values):
            continue
        glyph = image.frombytes("L", size, values)
        glyph = glyph.crop(glyph.getbbox())
        canvas = image.new("L", (CANVAS, CANVAS))
        canvas.paste(glyph, ((CANVAS - glyph.width) // 2, (CANVAS - glyph.height) // 2))
        pixels[i] = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(CANVAS, CANVAS)
        present[i] = True
    return Glyphs(pixels, present)


def _images(fonts: list[Path], chosen: str, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """``each`` images a class, (K * each, 1, SIDE, SIDE) uint8, and their labels, class by class."""
    glyphs = [draw_glyphs(font, chosen) for font in fonts]
    present = torch.stack([g.present for g in glyphs])  # (fonts, K)
    lacking = [character for character, any_font in zip(chosen, present.any(0).tolist(), strict=True) if not any_font]
    if lacking:
        raise UsageError(f"kanji: {''.join(lacking)} in none of {', '.join(font.name for font in fonts)}")
    # The n-th image of a class is in the n-th of the typefaces that have it, and again from the first.
    turn = torch.arange(each) % present.sum(0)[:, None]  # (K, each)
    place = present.cumsum(0) - 1
    matrices = _jitter(len(chosen) * each, Generator().manual_seed(seed)).view(len(chosen), each, 2, 3)
    images = torch.empty(len(chosen), each, SIDE, SIDE, dtype=torch.uint8)
    for font, glyph in enumerate(glyphs):
        drawn = (turn == place[font][:, None]) & present[font][:, None]
        source = glyph.pixels[drawn.nonzero()[:, 0], None].float()
        grid = torch.nn.functional.affine_grid(matrices[drawn], [len(source), 1, SIDE, SIDE], align_corners=False)
        images[drawn] = torch.nn.functional.grid_sample(source, grid, align_corners=False)[:, 0].round().byte()
    return images.view(-1, 1, SIDE, SIDE), torch.arange(len(chosen)).repeat_interleave(each)


def _jitter(count: int, generator: Generator) -> Tensor:
    """Random maps (count, 2, 3) from a point of the image to the one of the canvas that it shows, both in [-1, 1]."""
    turn, shear, width, height, right, down = (2 * torch.rand(6, count, generator=generator) - 1).unbind()
    turn, shear = math.radians(8) * turn, 0.1 * shear
    width, height = 1 + 0.12 * width, 1 + 0.12 * height
    rows = [
        torch.stack([width * turn.cos(), height * (shear - turn.sin()), 0.08 * right], 1),
        torch.stack([width * turn.sin(), height * turn.cos(), 0.08 * down], 1),
    ]
    return torch.stack(rows, 1)
