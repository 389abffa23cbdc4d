"""Photographs to inputs: what is cropped, mirrored and coloured, and how far."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dal_kernels.training.data.transforms import ImageTransform, crop_and_flip

Image = pytest.importorskip("PIL.Image", reason="the extra dal_kernels[demo]")

PLAIN = ImageTransform((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
LUMA = torch.tensor([0.299, 0.587, 0.114])  # shares of red, green and blue in brightness


def gradient(width: int, height: int) -> object:
    """An image whose red tells the column and whose green tells the row, from 0 to 250."""
    red = torch.linspace(0, 250, width).round().byte().expand(height, width)
    green = torch.linspace(0, 250, height).round().byte()[:, None].expand(height, width)
    pixels = torch.stack([red, green, torch.zeros_like(red)], 2)
    return Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist()))


def test_a_test_image_is_the_middle_of_the_scaled_one() -> None:
    image = gradient(320, 256)
    raw = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(256, 320, 3).permute(2, 0, 1)
    assert torch.equal(PLAIN(image, train=False), raw[:, 16:240, 48:272] / 255)
    # Twice as large, the same is seen.
    doubled = PLAIN(image.resize((640, 512)), train=False)
    torch.testing.assert_close(doubled, PLAIN(image, train=False), atol=2 / 255, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (7, 1000), (1000, 7), (256, 257)])
@pytest.mark.parametrize("train", [True, False])
def test_any_shape_becomes_one_size(size: tuple[int, int], train: bool) -> None:
    transform = ImageTransform((0.5, 0.4, 0.3), (0.2, 0.25, 0.1))
    out = transform(Image.new("RGB", size, (51, 102, 153)), train)
    assert out.dtype == torch.float32
    expected = torch.tensor([(0.2 - 0.5) / 0.2, (0.4 - 0.4) / 0.25, (0.6 - 0.3) / 0.1])
    torch.testing.assert_close(out, expected[:, None, None].expand(3, 224, 224))


def test_a_very_long_image_is_cropped_from_its_middle() -> None:
    torch.manual_seed(0)
    out = PLAIN(gradient(1000, 3), train=True)
    assert out.shape == (3, 224, 224)
    assert 255 * out[0].mean().item() == pytest.approx(125, abs=1)
    assert 255 * (out[0].amax() - out[0].amin()).item() == pytest.approx(250 * 4 / 1000, abs=1.1)


def test_training_crops_have_the_usual_areas_and_shapes_and_half_are_mirrored() -> None:
    torch.manual_seed(0)
    image = gradient(500, 400)
    areas, aspects, mirrored = [], [], 0
    for _ in range(300):
        out = 255 * PLAIN(image, train=True) / 250
        width, height = (out[0, 0, -1] - out[0, 0, 0]).item(), (out[1, -1, 0] - out[1, 0, 0]).item()
        mirrored += width < 0
        areas.append(abs(width) * height)
        aspects.append(abs(width) * 500 / (height * 400))
    assert 0.07 < min(areas) < 0.13
    assert 0.8 < max(areas) <= 1
    assert 0.73 < min(aspects) < 0.78
    assert 1.28 < max(aspects) < 1.37
    assert 110 < mirrored < 190, "four standard deviations around 150"


@pytest.mark.parametrize("jitter", [None, (0.4, 0.4, 0.4, 0.2)])
def test_training_transforms_draw_from_the_global_generator_alone(jitter: tuple[float, ...] | None) -> None:
    transform, image = ImageTransform((0.0,) * 3, (1.0,) * 3, jitter), gradient(90, 70)
    torch.manual_seed(3)
    first, second = (transform(image, train=True) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(transform(image, train=True), first)
    assert not torch.equal(first, second)
    assert torch.equal(transform(image, train=False), transform(image, train=False))


def turned(out: Tensor) -> float:
    """The hue of an image that was red, as a share of the colour circle, in [-0.5, 0.5)."""
    return (colorsys.rgb_to_hsv(*out[:, 0, 0].tolist())[0] + 0.5) % 1 - 0.5


def striped(*colours: tuple[int, int, int]) -> object:
    """An image of stripes that every crop shows all of."""
    image = Image.new("RGB", (400, 400))
    for left in range(0, 400, 10):
        image.paste(colours[left // 10 % len(colours)], (left, 0, left + 10, 400))
    return image


@pytest.mark.parametrize(
    ("jitter", "colours", "varying", "kept"),
    [
        ((0.4, 0, 0, 0), [(150, 60, 60)], lambda out: out.amax() * 255 / 150, lambda out: out.amin() / out.amax()),
        (
            (0, 0.4, 0, 0),
            [(100,) * 3, (150,) * 3],
            lambda out: (out.amax() - out.amin()) * 255 / 50,
            lambda out: out.mean(),
        ),
        (
            (0, 0, 0.4, 0),
            [(150, 60, 60)],
            lambda out: (out.amax() - out.amin()) * 255 / 90,
            lambda out: LUMA @ out[:, 0, 0],
        ),
        ((0, 0, 0, 0.2), [(150, 60, 60)], lambda out: 1 + 2 * turned(out), lambda out: out.amax()),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_each_part_of_the_jitter_varies_what_it_names_as_far_as_it_says(
    jitter: tuple[float, float, float, float],
    colours: list[tuple[int, int, int]],
    varying: Callable[[Tensor], Tensor | float],
    kept: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    transform = ImageTransform((0.0,) * 3, (1.0,) * 3, jitter)
    out = [transform(striped(*colours), train=True) for _ in range(100)]
    factors = [float(varying(each)) for each in out]
    assert 0.57 < min(factors) < 0.66
    assert 1.34 < max(factors) < 1.43
    torch.testing.assert_close(
        torch.stack([kept(each) for each in out]), kept(PLAIN(striped(*colours), False)).expand(100), atol=0.025, rtol=0
    )


def test_crop_and_flip_gives_every_window_and_its_mirror_image_and_nothing_else() -> None:
    torch.manual_seed(0)
    image = torch.arange(1, 25, dtype=torch.uint8).view(2, 3, 4)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    windows = {padded[:, y : y + 3, x : x + 4] for y in range(3) for x in range(3)}
    allowed = {tuple(w.flatten().tolist()) for window in windows for w in (window, window.flip(2))}
    out = crop_and_flip(image.expand(600, 2, 3, 4), pad=1)
    assert out.dtype == torch.uint8
    assert {tuple(row.tolist()) for row in out.flatten(1)} == allowed
    assert len(allowed) == 18
