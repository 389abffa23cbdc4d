"""Small images in files, which tell by their colour where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dal_kernels.training import main
from dal_kernels.training.data.base import FileImages

SIDE = 12


def save(path: Path, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def picture(path: Path, shade: int) -> None:
    """Of one colour: red and blue of this shade, green of what is left."""
    save(path, (SIDE, SIDE), (shade, 255 - shade, shade))


def colour_of(name: str) -> tuple[int, int, int]:
    """A colour for each name, far from the others: to see which file was read."""
    number = sum(map(ord, name))
    return 30 * (number % 7) + 20, 30 * (number // 7 % 7) + 20, 30 * (number // 49 % 7) + 20


def write_image(path: Path, size: tuple[int, int] = (20, 16)) -> Path:
    save(path, size, colour_of(path.name))
    return path


def write_lines(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def colours(images: FileImages) -> list[tuple[int, int, int]]:
    """The colour of each image, through the test's transform."""
    mean, sd = (torch.tensor(x) for x in (images.transform.mean, images.transform.sd))
    middle = images.batch(range(len(images)), train=False)[:, :, 112, 112]
    return [tuple(row) for row in (255 * (middle * sd + mean)).round().int().tolist()]


def same_colours(images: FileImages, names: list[str]) -> bool:
    """JPEG changes colours by a little."""
    return torch.allclose(
        torch.tensor(colours(images)).float(), torch.tensor([colour_of(n) for n in names]).float(), atol=4
    )


def write_folders(root: Path, classes: list[str], test: str = "val") -> None:
    for name in classes:
        for part in ("train", test):
            write_image(root / part / name / f"{part}_{name}.jpg")


def trained(data: str, out: Path, *arguments: str) -> dict[str, Any]:
    """What run.json says of the one run."""
    assert main(["train", "--data", data, "--epochs", "2", "--output", str(out), *arguments]) == 0
    (path,) = out.glob("*/*/run.json")
    return json.loads(path.read_text(encoding="utf-8"))
