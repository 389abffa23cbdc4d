"""Photographs of any size to inputs of one size; random numbers are drawn from torch's global generator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dal_kernels.training.errors import need

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGENET", "ImageTransform", "crop_and_flip"]

SIDE = 224  # pixels of an input, unless it is said
RESIZED = 256 / 224  # the short side that a test image is cropped from, in sides of an input
SMALL = 64  # pixels of a side up to which an image is too small to be cropped as a photograph is
ASPECT = (3 / 4, 4 / 3)  # width by height of a random crop
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of ImageNet's channels


@dataclass(frozen=True)
class ImageTransform:
    """A photograph in RGB to a (3, side, side) float32 input.

    In training a crop of random area and shape and a horizontal flip; in testing the middle of the image, its short
    side scaled to 8/7 of ``side``. Images of up to 64 pixels a side may be of anything, letters too: they are not
    flipped, their crops leave out little, and testing takes all of the short side.

    Attributes:
        mean, sd: of the channels, pixels in [0, 1].
        jitter: how far brightness, contrast and saturation (as factors around 1) and hue (as a share of the colour
            circle) vary in training; None: not at all.
    """

    mean: tuple[float, float, float]
    sd: tuple[float, float, float]
    jitter: tuple[float, float, float, float] | None = None
    side: int = SIDE

    @property
    def small(self) -> bool:
        return self.side <= SMALL

    def __call__(self, image: Image, train: bool) -> Tensor:
        if train:
            image = _random_crop(image, self.side, (0.7, 1.0) if self.small else (0.08, 1.0))
            if not self.small and _uniform(0, 1) < 0.5:
                image = image.transpose(need("PIL.Image", "pillow").Transpose.FLIP_LEFT_RIGHT)
            if self.jitter is not None:
                image = _jitter_colours(image, self.jitter)
        else:
            image = _middle(image, self.side, self.side if self.small else round(RESIZED * self.side))
        pixels = (
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            .view(self.side, self.side, 3)
            .permute(2, 0, 1)
        )
        return (pixels / 255 - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.sd)[:, None, None]


def crop_and_flip(batch: Tensor, pad: int = 4) -> Tensor:
    """A batch (B, C, H, W) of small images, each moved by up to ``pad`` pixels over black and mirrored at random."""
    count, _, height, width = batch.shape
    windows = torch.nn.functional.pad(batch, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * pad + 1, (2, count))
    moved = windows[torch.arange(count), :, down, right]
    return torch.where((torch.rand(count) < 0.5)[:, None, None, None], moved.flip(3), moved)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _random_crop(image: Image, side: int, shares: tuple[float, float]) -> Image:
    """A crop whose area is one of ``shares`` of the image's."""
    width, height = image.size
    for _ in range(10):
        area = width * height * _uniform(*shares)
        aspect = math.exp(_uniform(*map(math.log, ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(torch.randint(room + 1, ())) for room in (width - w, height - h))
            break
    else:  # a very long image: as much of its middle as the shapes allow
        w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
        left, top = (width - w) // 2, (height - h) // 2
    bilinear = need("PIL.Image", "pillow").Resampling.BILINEAR
    return image.resize((side, side), bilinear, box=(left, top, left + w, top + h))


def _middle(image: Image, side: int, resized: int) -> Image:
    """The middle of the image, its short side scaled to ``resized`` pixels."""
    scale = resized / min(image.size)
    width, height = (max(resized, int(length * scale)) for length in image.size)
    image = image.resize((width, height), need("PIL.Image", "pillow").Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _jitter_colours(image: Image, jitter: tuple[float, float, float, float]) -> Image:
    enhance = need("PIL.ImageEnhance", "pillow")
    steps = (enhance.Brightness, enhance.Contrast, enhance.Color)
    for step in torch.randperm(4).tolist():
        if step < 3:
            image = steps[step](image).enhance(_uniform(1 - jitter[step], 1 + jitter[step]))
        else:
            image = _turn_hue(image, round(256 * _uniform(-jitter[3], jitter[3])))
    return image


def _turn_hue(image: Image, steps: int) -> Image:
    """All hues moved by so many 256ths of the colour circle."""
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(level + steps) % 256 for level in range(256)])
    return need("PIL.Image", "pillow").merge("HSV", (turned, saturation, value)).convert("RGB")
