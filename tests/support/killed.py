"""Trainings killed at random moments, kill -9, and resumed, beside one left alone.

As a script: ``killed.py KILLS SEED FOLDER`` trains in FOLDER/alone and FOLDER/killed, and prints after how many epochs
each kill was that hit, as JSON. Each training is a fork of this process, which has imported all that takes time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dal_kernels.training import main
from dal_kernels.training.metrics import EpochMetrics
from dal_kernels.training.train import Trainer

# All that a checkpoint may hold.
COMMAND = (
    "train --data digits --noise 0.4 --batch-size 64 --momentum 0.9 --schedule cosine --loss-step iteration "
    "--val-fraction 0.2 --ema-decay 0.9"
)
LONGEST = 1.5  # epochs that a training is left to live


def fork(out: Path, epochs: int, *arguments: str) -> tuple[int, int]:
    """The process that trains below ``out``, and a pipe that says when each epoch begins."""
    told, tells = os.pipe()
    child = os.fork()
    if child:
        os.close(tells)
        return child, told
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    run_epoch = Trainer.run_epoch

    def telling(trainer: Trainer, tick: Callable[[], object]) -> EpochMetrics:
        os.write(tells, b".")
        return run_epoch(trainer, tick)

    Trainer.run_epoch = telling  # type: ignore[method-assign]
    os._exit(main([*COMMAND.split(), "--epochs", str(epochs), "--output", str(out), *arguments]))


def finish(out: Path, epochs: int, *arguments: str) -> float:
    """How long an epoch took, in seconds; 0 if there was none but one."""
    child, told = fork(out, epochs, *arguments)
    begun = []
    while os.read(told, 1):
        begun.append(time.monotonic())
    os.close(told)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the training ended with {status}"
    return (begun[-1] - begun[0]) / (len(begun) - 1) if len(begun) > 1 else 0.0


def kill_at_random(kills: int, seed: int, folder: Path) -> list[int]:
    """Gives after how many saved epochs each kill was that hit."""
    epochs = max(3, kills)
    epoch = finish(folder / "alone", epochs)
    chance, hit = random.Random(seed), list[int]()
    for _ in range(kills):
        child, told = fork(folder / "killed", epochs, "--resume")
        os.read(told, 1)  # nothing, if all epochs are trained
        time.sleep(chance.uniform(0, LONGEST * epoch))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(told)
        if os.WIFSIGNALED(status):
            saved = folder.glob("killed/*/*/metrics.jsonl")
            hit.append(sum(len(path.read_text(encoding="utf-8").splitlines()) for path in saved))
    finish(folder / "killed", epochs, "--resume")
    return hit


if __name__ == "__main__":
    print(json.dumps(kill_at_random(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
