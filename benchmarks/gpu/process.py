"""Commands with a limit of time, which get the chance to say how far they came."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Ended", "run"]

ROOT = Path(__file__).parent.parent.parent
GRACE = 10  # seconds of its limit that an interrupted command has to sum up, or half of a short limit


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


def _heed_interrupts() -> None:
    """In a process that is about to begin: where ours was started in the background of a script, it ignores interrupts,
    a command would inherit that, and end without a word.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(command: Sequence[str], limit: float, log: Path, cwd: Path = ROOT) -> Ended:
    """Run a command for at most ``limit`` seconds: it is interrupted before, and at last killed.

    It alone is interrupted, because it would take the end of a compiler that it runs for a fault of what that compiles.
    What it started and left behind is killed too, because a process on the GPU would spoil the times of later stages.

    Args:
        log: takes what it prints, so that one can look at it meanwhile.
    """
    begin = time.monotonic()
    with log.open("w", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        cut, grace = False, min(GRACE, limit / 2)
        try:
            process.wait(limit - grace)
        except subprocess.TimeoutExpired:
            cut = True
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(process.returncode, cut, time.monotonic() - begin, log.read_text(encoding="utf-8", errors="replace"))
