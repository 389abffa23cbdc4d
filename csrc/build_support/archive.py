"""An archive whose bytes depend on what is in it alone: setuptools would write down times and owners of files."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path


def write_tar(folder: Path, target: Path, time: int) -> None:
    """All below ``folder``, under its name, as a .tar.gz.

    Args:
        time: in seconds since 1970, that of each file.
    """

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = time, 0, 0, "", ""
        member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
        return member

    with (
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=time) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in (folder, *sorted(folder.rglob("*"))):
            archive.add(path, path.relative_to(folder.parent).as_posix(), recursive=False, filter=plain)
