"""What setup.py does on systems that no test runs on, and that what it packs is the same bytes each time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from build_support import CannotBuildError, archive, platforms


def test_windows_is_refused_with_a_way_out() -> None:
    with pytest.raises(CannotBuildError, match=r"MSVC, which lacks the vector extensions.*WSL"):
        platforms.check("win32")
    for platform in ("linux", "darwin"):
        platforms.check(platform)


def test_a_mac_builds_for_one_architecture_unless_asked_for_others() -> None:
    asked = {"ARCHFLAGS": "-arch x86_64"}
    for platform, environment, expected in (
        ("darwin", {}, {"ARCHFLAGS": "-arch arm64"}),
        ("darwin", asked, asked),
        ("linux", {}, {}),
    ):
        found = dict(environment)
        platforms.for_this_machine_only(platform, "arm64", found)
        assert found == expected


def test_an_archive_depends_on_its_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on when it is packed, on the files' times, modes and owners, or on the order a file system lists them in."""
    below, made = Path.rglob, []
    for turn in range(2):
        folder = tmp_path / str(turn) / "name-1.0"
        (folder / "inner").mkdir(parents=True)
        for name in ("b.py", "inner/a.py"):
            (folder / name).write_text(name)
            os.utime(folder / name, (1000 * turn, 1000 * turn))
        (folder / "b.py").chmod(0o600 if turn else 0o664)
        target = tmp_path / f"{turn}.tar.gz"
        with monkeypatch.context() as patch:
            patch.setattr("time.time", lambda turn=turn: 1e9 + turn)
            patch.setattr(Path, "rglob", lambda *given, turn=turn: sorted(below(*given), reverse=bool(turn)))
            archive.write_tar(folder, target, 1700000000)
        made.append(target.read_bytes())
    assert made[0] == made[1]
    (folder / "b.py").write_text("other")
    archive.write_tar(folder, target, 1700000000)
    assert target.read_bytes() != made[0]
