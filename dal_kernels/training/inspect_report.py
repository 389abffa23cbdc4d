"""What ``dal-train inspect`` writes: the ranking, who is taken for whom, and the worst to look at."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from dal_kernels.noise import UNKNOWN
from dal_kernels.training.contact_sheet import save_contact_sheet
from dal_kernels.training.data.base import DataSet
from dal_kernels.training.errors import need
from dal_kernels.training.inspection import FEW, LEARNT_MARGIN, Inspection
from dal_kernels.training.records import write_rows

__all__ = ["auroc", "precision_at", "write_inspection"]

SHOWN = 15  # pairs of classes in the text
# Among training labels a network doubts its own mistakes, about as many as on the test unless it knows them by heart,
# and the wrong ones besides: so its test error is the lower share of the two. A tenth above is no chance: it is twice
# the deviation of the error on a test of a hundred samples.
BY_HEART = 0.1
# So the test error, if the test is right, is the share of its own mistakes among the training labels: from this part of
# those it doubts on, a label of its list is as likely right as wrong.
OWN_MISTAKES = 0.5
TINY = 0.02  # test error below which a network is a good one, however few labels it doubts


def write_inspection(
    out: Path, data: DataSet, inspection: Inspection, test_error: float, made_by: str
) -> tuple[list[Path], str]:
    """Write suggested.csv, confusion.csv, inspect.md and, of images, worst.png below ``out``; gives files and text.

    Args:
        data: with the truth as far as it is known.
        test_error: share of the test's labels that the network is wrong about in the end; NaN without a test.
        made_by: the command.
    """
    ranking, confusion, words = out / "suggested.csv", out / "confusion.csv", out / "inspect.md"
    inspection.save_csv(ranking, data.paths("train"), data.names)
    pairs = [(data.names[given], data.names[other], count) for given, other, count in inspection.confusion()]
    write_rows(confusion, ("given", "suggested", "samples"), pairs)
    text = _text(data, inspection, pairs, test_error, made_by)
    words.write_text(text, encoding="utf-8")
    (out / "worst.png").unlink(missing_ok=True)  # of an inspection before this one
    sheet = save_contact_sheet(out / "worst.png", data, inspection)
    return [ranking, confusion, words, *([sheet] if sheet else [])], text


def auroc(score: Tensor, positive: Tensor) -> float:
    """Area under the curve of a score (N,) that is to be high where ``positive`` (N,) bool holds; NaN of one kind."""
    if positive.all() or not positive.any():
        return float("nan")
    return float(need("sklearn.metrics", "scikit-learn").roc_auc_score(positive.numpy(), score.numpy()))


def precision_at(order: Tensor, positive: Tensor) -> float:
    """Of the first samples in ``order`` (M,), as many as there are positive ones, the share that is."""
    count = int(positive[order].sum())
    return positive[order[:count]].double().mean().item()


def _text(
    data: DataSet, inspection: Inspection, pairs: list[tuple[str, str, int]], test_error: float, made_by: str
) -> str:
    count, seen, mixture = len(data.train), len(inspection.order), inspection.mixture
    unseen = f"; the other {count - seen} could not be read" if seen < count else ""
    changed = sum(count for *_, count in pairs)
    lines = [
        f"# {data.name}: which labels look wrong",
        "",
        f"Of {count} training samples {seen} were seen{unseen}. {_estimate(inspection)} In suggested.csv {changed} "
        f"labels are replaced{', those likelier wrong than right' if changed else ''}.",
        "",
    ]
    if doubt := _doubt(inspection, test_error):
        lines += [doubt, ""]
    if mixture is not None:
        believed = (
            " Where the two shares differ, believe the estimated one: the distribution of wrong labels takes in right "
            "ones with small margins."
        )
        lines += [
            "The margins of wrong and of right labels are fitted by two normal distributions, with means "
            f"{mixture.wrong_mean:.2f} and {mixture.right_mean:.2f}, deviation {mixture.sd:.2f}, and "
            f"{mixture.wrong_share:.1%} in that of wrong labels; confidence in suggested.csv is its probability."
            f"{believed if inspection.learnt else ''}",
            "",
        ]
    else:
        lines += [
            "The margins of wrong labels could not be fitted by a distribution of their own: there are fewer than "
            f"{FEW} on a side of 0, or they lie among those of labels that the network believes. So confidence in "
            "suggested.csv is the share of visits in which the network preferred another class, recent ones counting "
            "more.",
            "",
        ]
    lines += _truth(data, inspection)
    shown = pairs[:SHOWN]
    if shown:
        table = need("tabulate").tabulate(
            shown, ("given", "suggested", "samples"), tablefmt="pipe", disable_numparse=True
        )
        rest = f"\n\nThe commonest {len(shown)} of {len(pairs)} pairs." if len(pairs) > len(shown) else ""
        lines += [f"{table}{rest}", ""]
    return "\n".join([*lines, f"- command: `{made_by}`", ""])


def _estimate(inspection: Inspection) -> str:
    """How many labels are wrong, or why that cannot be said."""
    if not inspection.learnt:
        return (
            f"The network has not learnt enough to judge labels: its mean margin of right labels is "
            f"{inspection.right_margin:.2f}, and should be {LEARNT_MARGIN} at least. So no share of wrong labels is "
            "estimated and no label replaced; train for more epochs, or with other settings."
        )
    if math.isnan(inspection.noise_rate):
        return "How many labels are wrong cannot be estimated."
    return (
        f"The network prefers another class to the label of {inspection.noise_rate:.1%} of them, which is the "
        "estimated share of wrong labels."
    )


def _doubt(inspection: Inspection, test_error: float) -> str:
    """Why the network is a bad judge, if its error on the test shows it, and what to do; else nothing."""
    if not inspection.learnt:  # and that is said
        return ""
    doubted = (inspection.margin[inspection.order] < 0).double().mean().item()  # noise_rate, which may be NaN
    shares = (
        f"The network is wrong about {test_error:.1%} of the labels of the test, and prefers another class to "
        f"{doubted:.1%} of those that it was trained on"
    )
    if test_error - doubted > BY_HEART:
        return (
            f"{shares}: if the labels of the test are right, it has learnt the training labels by heart, wrong ones "
            "among them, so that too few are doubted and replaced. Inspect with fewer epochs (--epochs), or with more "
            "regularisation (--weight-decay)."
        )
    if test_error > max(OWN_MISTAKES * doubted, TINY):
        return (
            f"{shares}: if the labels of the test are right, many of the labels that it doubts are its own mistakes. "
            "Inspect with more epochs (--epochs) or other settings (--learning-rate, --model) before you believe the "
            "list."
        )
    return ""


def _truth(data: DataSet, inspection: Inspection) -> list[str]:
    """How good the ranking is, where somebody verified the labels, or noise was made from them."""
    known = (data.true_labels != UNKNOWN) & (inspection.rank > 0)
    if not known.any():
        return []
    wrong = known & (inspection.given != data.true_labels)
    rate = (wrong.sum() / known.sum()).item()
    if data.verified:
        text, such = f"The truth is known here: {rate:.1%} of the labels are wrong.", "are wrong"
    elif wrong.any():
        text = f"{rate:.1%} of the labels were changed on purpose; how many were wrong before is unknown."
        such = "were changed"
    else:
        return []
    if wrong.any():
        found = inspection.order[known[inspection.order]]
        right = (inspection.suggested == data.true_labels)[wrong].double().mean().item()
        text += (
            f" AUROC of the ranking {auroc(-inspection.margin[known], wrong[known]):.4f}; of as many labels from its "
            f"top as {such}, {precision_at(found, wrong):.1%} {such.partition(' ')[0]}. Of those that {such} "
            f"{right:.1%} are suggested right."
        )
    spoilt = int((known & ~wrong & (inspection.suggested != inspection.given)).sum())
    if data.verified:
        text += f" Of the right labels {spoilt} are replaced."
    return [text, ""]
