"""Commands with a limit of time, which get the chance to say how far they came."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Ended", "run"]

ROOT = Path(__file__).parent.parent.parent
GRACE = 20  # seconds that an interrupted command has to sum up


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status, negative for a signal.
        cut: it was interrupted because its time was over.
        output: what it printed, both streams.
    """

    status: int
    cut: bool
    seconds: float
    output: str

    @property
    def tail(self) -> str:
        return "\n".join(self.output.strip().splitlines()[-15:])


def run(command: Sequence[str], limit: float, log: Path, cwd: Path = ROOT, **variables: str) -> Ended:
    """Run a command for at most ``limit`` seconds; then it is interrupted as by a keyboard, and at last killed.

    Args:
        log: takes what it prints, so that one can look at it meanwhile.
        variables: environment variables more.
    """
    begin = time.monotonic()
    with log.open("w", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        cut = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            cut = True
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return Ended(process.returncode, cut, time.monotonic() - begin, log.read_text(encoding="utf-8", errors="replace"))
