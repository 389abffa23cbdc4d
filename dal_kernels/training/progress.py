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

    Attributes:
        batches: trained so far, those of a resumed run too.
    """

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say, self.batches = total, say, 0
        self.start = self.last = time.perf_counter()

    def tell(self, trainer: Trainer) -> None:
        now = time.perf_counter()
        if now - self.last < SECONDS:
            return
        self.last = now
        epoch = trainer.history[-1]
        accuracies = [("test", epoch.test_accuracy), ("validation", epoch.validation_accuracy)]
        measured = "".join(f", {name} accuracy {value:.1%}" for name, value in accuracies if value == value)
        left = timedelta(seconds=round((now - self.start) * (self.total / self.batches - 1)))
        self.say(
            f"    {trainer.loss_name}, epoch {epoch.epoch} of {trainer.recipe.epochs}: loss {epoch.train_loss:.4g}"
            f"{measured}; all done in {left}"
        )
