"""Runs that differ in their seed, as means and deviations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from dal_kernels.training.losses import loss_title
from dal_kernels.training.metrics import EpochMetrics, chosen_epoch
from dal_kernels.training.noise import Noise
from dal_kernels.training.records import Run

__all__ = ["Spread", "Summary", "summarise"]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation of one seed is NaN, as are both of a NaN."""

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if any(map(math.isnan, values)):  # statistics.stdev stumbles over it
            return cls(math.nan, math.nan)
        return cls(mean(values), stdev(values) if len(values) > 1 else math.nan)

    def percent(self) -> str:
        """Such as "94.9 ± 1.3", without a sign for per cent; "n/a" of nothing."""
        if math.isnan(self.mean):
            return "n/a"
        return f"{100 * self.mean:.1f}" + ("" if math.isnan(self.sd) else f" ± {100 * self.sd:.1f}")


@dataclass(frozen=True)
class Summary:
    """One loss with one noise over all seeds. Shares are in [0, 1], of the last epoch but for these.

    ``best`` is chosen by the test, ``chosen`` by the validation; None without one. Where nothing is
    ``tested`` it is of the validation itself.
    """

    noise: Noise
    loss: str
    wrong: Spread
    last: Spread
    best: Spread
    memorised: Spread
    mislabelled_right: Spread
    chosen: Spread | None = None
    tested: bool = True

    @property
    def got(self) -> Spread:
        """Accuracy of the network that one would keep."""
        return self.last if self.chosen is None else self.chosen

    @property
    def title(self) -> str:
        return loss_title(self.loss)


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """One summary for each noise and loss, in the order of the runs."""
    groups: dict[tuple[Noise, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.noise, run.loss), []).append(run)
    return [
        Summary(
            noise,
            loss,
            wrong=Spread.of([run.measured_noise for run in group]),
            last=Spread.of([run.history[-1].test_accuracy for run in group]),
            best=Spread.of([run.history[-1].best_accuracy for run in group]),
            memorised=Spread.of([run.history[-1].memorised for run in group]),
            mislabelled_right=Spread.of([run.history[-1].mislabelled_right for run in group]),
            chosen=Spread.of([_accuracy(chosen_epoch(run.history)) for run in group]) if _validated(group) else None,
            tested=not math.isnan(group[0].history[-1].test_accuracy),
        )
        for (noise, loss), group in groups.items()
    ]


def _validated(runs: Sequence[Run]) -> bool:
    return not any(math.isnan(run.history[-1].validation_accuracy) for run in runs)


def _accuracy(epoch: EpochMetrics) -> float:
    return epoch.validation_accuracy if math.isnan(epoch.test_accuracy) else epoch.test_accuracy
