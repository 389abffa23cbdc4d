"""A folder of images that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.pictures import picture


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve images of each of two classes to train on, four to test on."""
    folder = tmp_path / "pictures"
    for part, count in (("train", 12), ("val", 4)):
        for shade, name in ((40, "dark"), (200, "light")):
            for i in range(count):
                picture(folder / part / name / f"{i:02}.png", shade + i)
    return folder
