"""Lines that say how far a training is, where no progress bar can."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from dal_kernels.training.train import Trainer

__all__ = ["Progress"]

SECONDS = 10  # between two lines


class Progress:
    """Says, in a line every ten seconds, what the last epoch gave and when all ``total`` batches will be done.

    Args:
        advance: is told how many batches are done.
    """

    def __init__(self, total: int, say: Callable[[str], None], advance: Callable[[int], object]) -> None:
        self.total, self.say, self.advance = total, say, advance
        self.trained = self.skipped = 0
        self.start = self.last = time.perf_counter()

    def tick(self) -> None:
        """A batch is trained."""
        self.trained += 1
        self.advance(1)

    def skip(self, batches: int) -> None:
        """So many need not be: a run that is resumed has them already, or one that has stopped early never will."""
        self.skipped += batches
        self.advance(batches)

    def tell(self, trainer: Trainer) -> None:
        now = time.perf_counter()
        if now - self.last < SECONDS:
            return
        self.last = now
        epoch = trainer.history[-1]
        accuracies = [("test", epoch.test_accuracy), ("validation", epoch.validation_accuracy)]
        measured = "".join(f", {name} accuracy {value:.1%}" for name, value in accuracies if value == value)
        still = self.total - self.skipped - self.trained
        left = timedelta(seconds=round((now - self.start) * still / self.trained))
        self.say(
            f"    {trainer.loss_name}, epoch {epoch.epoch} of {trainer.recipe.epochs}: loss {epoch.train_loss:.4g}"
            f"{measured}; all done in {left}"
        )
