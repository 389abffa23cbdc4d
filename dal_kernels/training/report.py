"""Results as a table, in words and as figures: computed from the runs, whoever wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dal_kernels.training.canvas import FORMATS
from dal_kernels.training.compare import Results
from dal_kernels.training.errors import UsageError, need
from dal_kernels.training.figures import save_curves, save_rates
from dal_kernels.training.provenance import distinct
from dal_kernels.training.records import write_metrics
from dal_kernels.training.summary import Spread, Summary, summarise

__all__ = ["check_packages", "in_words", "markdown_table", "write_curves", "write_report"]


TEST_LABELS = {
    True: "The test labels are clean",
    False: "The test labels are taken for clean, but nobody verified them",
}
BEST = """"best epoch" is chosen by them, so it is what a perfect early stop would give, not what
one gets."""
NO_TEST = "There is no test: accuracies are of training samples held out, by the labels given, wrong ones among them."
CHANGED = "\nWrong labels are those changed on purpose here; how many were wrong before is unknown."


def markdown_table(summaries: Sequence[Summary]) -> str:
    validated = any(s.chosen is not None for s in summaries)
    shares = ["test accuracy, last epoch, %", "best epoch, %", "wrong labels memorised, %", "mislabelled put right, %"]
    if validated:
        shares.insert(1, "epoch chosen by validation, %")
    tested = any(s.tested for s in summaries)
    if not tested:
        shares = ["validation accuracy, best epoch, %", *shares[-2:]]
    header = ("noise", "wrong labels, %", "loss", *shares)
    rows = []
    for s in summaries:
        chosen = [s.chosen or Spread(math.nan, math.nan)] if validated else []
        accuracies = (s.last, *chosen, s.best) if tested else (s.got,)
        values = (*accuracies, s.memorised, s.mislabelled_right)
        rows.append((s.noise.title, s.wrong.percent(), s.title, *(value.percent() for value in values)))
    align = ("left", "right", "left", *("right" for _ in shares))
    return str(need("tabulate").tabulate(rows, header, tablefmt="pipe", colalign=align, disable_numparse=True))


def in_words(summaries: Sequence[Summary]) -> str:
    """What the table says, a paragraph for each noise."""
    noises = dict.fromkeys(s.noise for s in summaries)
    return "\n\n".join(_paragraph([s for s in summaries if s.noise == noise]) for noise in noises)


def _paragraph(group: Sequence[Summary]) -> str:
    ranked = sorted(group, key=lambda s: s.got.mean, reverse=True)
    first, rest = ranked[0], [s for s in ranked[1:] if not _level(ranked[0], s)]
    level = [s.title for s in ranked[1:] if _level(first, s)]
    ends = "ends highest at" if rest else "ends at"
    if first.chosen is not None:
        ends = f"in the epoch chosen by validation is {'highest ' if rest else ''}at"
    if not first.tested:
        ends = f"is {'highest ' if rest else ''}in validation at"
    clauses = [f"Noise {first.noise.title}: {first.title} {ends} {first.got.percent()}%"]
    clauses += [f"level with {' and '.join(level)}"] if level else []
    clauses += [f"{100 * (first.got.mean - s.got.mean):.1f} points ahead of {s.title}{_doubt(first, s)}" for s in rest]
    sentences = [", ".join(clauses)]
    for s in ranked:
        lost = f"{100 * (s.best.mean - s.last.mean):.1f}"
        if not s.tested:
            if not math.isnan(s.memorised.mean):
                sentences.append(
                    f"{s.title} has memorised {s.memorised.mean:.1%} of the wrong labels by its last epoch"
                )
            continue
        fate = f"{s.title} loses {lost} points from its best epoch to its last"
        if lost == "0.0":
            fate = f"{s.title} keeps its best accuracy to the last epoch"
        if not math.isnan(s.memorised.mean):
            fate += f", by when it has memorised {s.memorised.mean:.1%} of the wrong labels"
        sentences.append(fate[0].upper() + fate[1:])
    best = max(group, key=lambda s: s.best.mean)
    if first.chosen is None and best.best.mean > first.best.mean:  # a validation says when to stop
        sentences.append(f"Stopped at the best epoch, {best.title} would be ahead at {best.best.percent()}%")
    return ". ".join(sentences) + "."


def _level(first: Summary, other: Summary) -> bool:
    """Whether the accuracies differ by so little that it would be printed as 0.0 points."""
    return f"{100 * (first.got.mean - other.got.mean):.1f}" == "0.0"


def _doubt(a: Summary, b: Summary) -> str:
    """A remark where two losses differ by less than the seeds do."""
    spread = math.hypot(a.got.sd, b.got.sd)
    return " (less than the seeds' own spread: a tie)" if a.got.mean - b.got.mean < spread else ""


def check_packages(inspect: bool = False) -> None:
    """Miss an optional package before the training, not after it."""
    for module in ("matplotlib", "tabulate", "tqdm"):
        need(module)
    if inspect:
        need("sklearn.mixture", "scikit-learn")


def write_report(results: Results) -> tuple[list[Path], str]:
    """Write metrics of all runs, table with words, and figure; returns all files and the text, for printing.

    Raises:
        UsageError: the results were not given a folder, or a package is missing.
    """
    config = results.config
    if config.out is None:
        raise UsageError("a report needs a folder, got no out")
    summaries = summarise(results.runs)
    lengths, seeds = [len(run.history) for run in results.runs], ", ".join(map(str, config.seeds))
    epochs = " to ".join(map(str, sorted({min(lengths), max(lengths)})))
    spread = "Mean ± standard deviation over the seeds" if len(config.seeds) > 1 else "Single runs with seed"
    makers = distinct([maker for run in results.runs for maker in run.made_by])
    makers["command"] = list(dict.fromkeys([results.command, *makers["command"]]))
    made_by = "\n".join(f"- {name}: {', '.join(f'`{value}`' for value in values)}" for name, values in makers.items())
    tests = f"{TEST_LABELS[results.verified]}; {BEST}" if summaries[0].tested else NO_TEST
    text = f"""# {results.runs[0].data}: training with wrong labels

{markdown_table(summaries)}

{spread} {seeds}, {epochs} epochs a run; {results.seconds:.0f} s in all.
{tests}{"" if results.verified else CHANGED}

{in_words(summaries)}

{made_by}
"""
    base = config.out / results.runs[0].data
    table, rates = (base.with_name(f"{base.name}{end}") for end in (".md", "-rates"))  # a dot may be in its name
    table.write_text(text, encoding="utf-8")
    for kind in FORMATS:  # of a comparison before this one
        rates.with_name(f"{rates.name}.{kind}").unlink(missing_ok=True)
    figures = [*save_curves(results.runs, base), *save_rates(summaries, results.runs[0].data, rates)]
    return [*write_metrics(base, results.runs), table, *figures], text


def write_curves(results: Results) -> list[Path]:
    """Draw each run on its own, curves.png and curves.svg in its folder; gives the files."""
    out = results.config.out
    assert out is not None  # the command line has a default
    return [path for run in results.runs for path in save_curves([run], out / run.data / run.folder / "curves")]
