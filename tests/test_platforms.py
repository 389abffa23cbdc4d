"""What is compiled, and how, on systems that no test runs on."""

from __future__ import annotations

import pytest

from build_support import CannotBuildError, platforms


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
