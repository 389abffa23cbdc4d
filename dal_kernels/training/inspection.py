"""What a label inspector has found: a ranking, a noise rate, who is taken for whom."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dal_kernels.training.atomic import replacing
from dal_kernels.training.errors import need

__all__ = ["COLUMNS", "Inspection", "Mixture", "inspect"]

COLUMNS = ("path", "given", "suggested", "confidence", "rank")
FEW = 3  # samples on either side that a mixture needs to be fitted to
# Mean margin of right labels below which a network has not learnt enough to judge labels: on digits it was 0.13 to 0.22
# after too few epochs, where it took a quarter of clean labels for wrong, and 0.73 to 0.91 where it ranked them well.
LEARNT_MARGIN = 0.3


@dataclass(frozen=True)
class Mixture:
    """Two normal distributions of one deviation, of the margins of wrong and of right labels."""

    wrong_mean: float
    right_mean: float
    sd: float
    wrong_share: float


@dataclass(frozen=True)
class Inspection:
    """What the labels look like. Tensors are (N,), in the order of the samples.

    Attributes:
        given: int64, the label that was trained on; -1 for a sample that was never seen, of which all else says
            nothing.
        suggested: int64, the class that the network preferred most often, where the label is likelier wrong than right
            and its average margin is below 0; elsewhere, and everywhere if the network has not ``learnt``, the label.
        confidence: float32 in [0, 1], the probability that the label is wrong, by the mixture; without one the share of
            visits in which the network preferred another class, recent ones counting more.
        rank: int64, 1 for the most suspicious; 0 for those never seen.
        margin, target_prob, agreement: float32, the averages of ``LabelInspector``.
        noise_rate: estimated share of wrong labels: of the samples whose average margin is below 0, because the network
            prefers another class to the label. Labels that the network cannot learn are among them, and those that it
            has memorised are not. NaN where the network has not ``learnt``, or the component of wrong labels in the
            mixture lies among labels that the network believes, so that there is nothing to tell them by.
        right_margin: mean margin of right labels: by the mixture, without one of those that are not below 0.
        mixture: None where too few labels are suspicious to fit one, or the component of wrong labels has a mean that
            is not below 0.
    """

    given: Tensor
    suggested: Tensor
    confidence: Tensor
    rank: Tensor
    margin: Tensor
    target_prob: Tensor
    agreement: Tensor
    noise_rate: float
    right_margin: float
    mixture: Mixture | None

    @property
    def learnt(self) -> bool:
        """Whether the network has learnt enough to judge labels."""
        return self.right_margin >= LEARNT_MARGIN

    @property
    def order(self) -> Tensor:
        """(M,) int64, the samples seen, the most suspicious first."""
        seen = (self.rank > 0).nonzero()[:, 0]
        return seen[self.rank[seen].argsort()]

    def confusion(self) -> list[tuple[int, int, int]]:
        """(given, suggested, how many), the commonest first, of the labels to change: of C classes C² pairs would be
        too many to write.
        """
        changed = self.suggested != self.given
        pairs = torch.stack([self.given[changed], self.suggested[changed]], 1)
        found, counts = pairs.unique(dim=0, return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        return [(*pair, count) for pair, count in zip(found[order].tolist(), counts[order].tolist(), strict=True)]

    def save_csv(
        self, path: Path | str, paths: Sequence[str] | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        """Write a line for each sample seen, the most suspicious first, with the columns ``COLUMNS``.

        ``dal-train train --labels`` takes such a file: it trains with what stands in ``suggested``.

        Args:
            paths: (N,) what tells the samples apart; by default their numbers.
            class_names: (C,) what the classes are called; by default their numbers.
        """
        given, suggested = (
            [str(label) if class_names is None else class_names[label] for label in labels.tolist()]
            for labels in (self.given, self.suggested)
        )
        confidence = self.confidence.tolist()
        with replacing(Path(path)) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for rank, i in enumerate(self.order.tolist(), start=1):
                name = i if paths is None else paths[i]
                writer.writerow((name, given[i], suggested[i], f"{confidence[i]:.6f}", rank))


def inspect(
    given: Tensor, other: Tensor, margin: Tensor, target_prob: Tensor, agreement: Tensor, visits: Tensor
) -> Inspection:
    """Rank the labels; see :class:`Inspection` for what is (N,) here."""
    seen = visits > 0
    wrong = seen & (margin < 0)
    fitted = _fit(margin[seen].double()) if min(wrong.sum(), (seen & ~wrong).sum()) >= FEW else None
    right_margin = margin[seen & ~wrong].double().mean().item() if fitted is None else fitted.right_mean
    mixture = None if fitted is None or fitted.wrong_mean >= 0 else fitted
    confidence = (1 - agreement.double()).clamp(0, 1) if mixture is None else _chance_wrong(margin, mixture)
    order = torch.where(seen, margin, torch.inf).argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(order) + 1)
    # A label that the network prefers to all others is not replaced, whatever the mixture says: where right labels have
    # small margins, its component of wrong ones reaches among them.
    replaced = wrong & (confidence > 0.5) & (other >= 0) & (right_margin >= LEARNT_MARGIN)
    suggested = torch.where(replaced, other, given)
    estimated = right_margin >= LEARNT_MARGIN and mixture is fitted
    return Inspection(
        given=given.long(),
        suggested=suggested.long(),
        confidence=torch.where(seen, confidence, 0).float(),
        rank=torch.where(seen, rank, 0),
        margin=margin.float(),
        target_prob=target_prob.float(),
        agreement=agreement.float(),
        noise_rate=wrong.sum().item() / max(1, seen.sum().item()) if estimated else float("nan"),
        right_margin=right_margin,
        mixture=mixture,
    )


def _fit(margin: Tensor, most: int = 1_000_000) -> Mixture:
    """By expectation maximisation from the two sides of 0, on at most so many of the margins.

    With a deviation each, the component of wrong labels grows into the right but hard ones: of digits with 10 % wrong
    it then takes 20 % for wrong, and of digits with none, 16 %.
    """
    margin = margin[:: -(-len(margin) // most)]
    below = margin < 0
    share = below.double().mean()
    means = torch.stack([margin[below].mean(), margin[~below].mean()])
    variance = share * margin[below].var() + (1 - share) * margin[~below].var()
    fitted = need("sklearn.mixture", "scikit-learn").GaussianMixture(
        2,
        covariance_type="tied",
        weights_init=[share.item(), 1 - share.item()],
        means_init=means[:, None].numpy(),
        precisions_init=[[1 / max(variance.item(), 1e-6)]],
    )
    fitted.fit(margin[:, None].numpy())
    wrong_mean, right_mean = fitted.means_[:, 0].tolist()
    return Mixture(wrong_mean, right_mean, fitted.covariances_.item() ** 0.5, fitted.weights_[0].item())


def _chance_wrong(margin: Tensor, mixture: Mixture) -> Tensor:
    """(N,) float64 in [0, 1]: with one deviation the logarithm of the odds is a straight line in the margin."""
    distances = [(margin.double() - mean) ** 2 for mean in (mixture.right_mean, mixture.wrong_mean)]
    odds = torch.tensor(mixture.wrong_share).double().logit() + (distances[0] - distances[1]) / (2 * mixture.sd**2)
    return odds.sigmoid()
