"""The tests of the Triton kernels can fail: each of these faults, put into the source, is one that they must catch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.children import ROOT, assert_passed
from support.marks import needs_executor
from support.mutants import (
    BY_EXECUTOR,
    LAYOUTS,
    NUMERICS,
    TRITON_SOURCES,
    Mutant,
    assert_caught,
    run_triton_tests,
)

pytestmark = needs_executor

Mutants = dict[str, tuple[Any, ...]]

# Each with the tests that must catch it under the executor.
MUTANTS: Mutants = {
    "barrier removed": (
        "row.py",
        "    tl.debug_barrier()\n    same",
        "    same",
        "matches_truth and 4099 and float32 and soft-mean",
    ),
    "target term dropped": (
        "row.py",
        "at_target - t, mask=has_target)\n",
        "at_target, mask=has_target)\n",
        "matches_truth and 17 and mean",
    ),
    "row mask dropped": (
        "short_rows.py",
        "inside = tl.expand_dims(live, AXIS) & (across + tile * BLOCK < CLASSES)",
        "inside = across + tile * BLOCK < CLASSES",
        "matches_truth and 100 and float32 and mean",
    ),
    "twice the exponential taken for it": (
        "short_rows.py",
        "1.0 if KEPT else 0.5",
        "1.0",
        "matches_truth and 20011 and float32 and soft-mean",
    ),
    "place within a tile taken for the class": (
        "short_rows.py",
        "column = tl.where(better, across + tile * BLOCK, column)",
        "column = tl.where(better, across, column)",
        "matches_truth and 20011 and float32 and soft-mean",
    ),
    "splits keep their own maximum": (
        "long_rows.py",
        "    parts = rebase(parts, classes, peaks, peak[:, None], WIDE)\n",
        "",
        "matches_truth and 33000 and float32 and soft-mean",
    ),
    "correction forgotten": (
        "reduction.py",
        "of.count / tl.where(divisor == 0.0, 1.0, divisor)",
        "1.0",
        "ignored_rows and float32 and mean and False",
    ),
    "logits taken to base 2 before they are subtracted": (
        "row.py",
        "return (z - origin) * LOG2E",
        "return tl.fma(z, tl.full(z.shape, LOG2E, z.dtype), -origin * LOG2E)",
        "finite_logits_of_any_size and float32 and soft-0.5-300",
    ),
    "0 / 0 taken for 0": (
        "reduction.py",
        "                spoil_counted_rows(of, CLASSES, GRADIENT, FIELDS)\n",
        "                pass\n",
        "mean_over_nothing and float32 and 7-0.0",
    ),
    "no barrier before the gradient takes the place of its logits": (
        "gradient.py",
        "        tl.debug_barrier()  # no warp",
        "        pass  # no warp",
        "in_the_place and 4099 and dynamics_aware and float32",
    ),
    "upstream gradient ignored": (
        "gradient.py",
        "if factor == 1.0:",
        "if factor == factor:",
        "scalar_upstream and float32",
    ),
}
# Of those of losses that sum over all classes.
WIDE_MUTANTS: Mutants = {
    "masked classes counted among the differences": (
        "short_rows.py",
        "difference = tl.where(across + tile * BLOCK < CLASSES, difference, 0.0)",
        "pass",
        "joint_asymmetric and float32 and 1000",
    ),
    "merge forgets the classes": (
        "row.py",
        "classes * (peak - new)",
        "peak - new",
        "joint_asymmetric and float32 and 40000",
    ),
    "gradient without the term of all classes": (
        "row.py",
        "a -= row.classes * slopes.by_sum_log_prob",
        "pass",
        "joint_asymmetric and float32 and 1000",
    ),
    "slope of a loss dropped": (
        "objectives.py",
        "active.by_log_prob - weight * scaled,",
        "active.by_log_prob,",
        "joint_asymmetric and float32 and 1000",
    ),
}
# Of the last program that is done.
REDUCTION_MUTANTS: Mutants = {
    "sums read before they are known to be there": (
        "reduction.py",
        'sem="acq_rel"',
        'sem="acquire"',
        "bits_are_the_same and 9-4099",
    ),
    "an ignored row takes no ticket": (
        "short_rows.py",
        "        reduce_losses(reduction, nothing, nothing, CLASSES, MEAN, GRADIENT, FIELDS, SUMS)\n",
        "",
        "bits_are_the_same and 9-4099",
    ),
    "the ticket stays where it is": (
        "reduction.py",
        "            tl.store(of.ticket, 0)",
        "            pass",
        "leaves_its_ticket and 100",
    ),
}
# Of rows that lie apart, by the tests of Triton alone: in a copy of the sources the emulator of CUDA lacks what it
# runs, and any mutant would seem caught. A gradient that is float32 stays what the forward has written, where a
# bfloat16 one is made again.
LAYOUT_MUTANTS: Mutants = {
    "rows past the last are read": ("apart.py", "tl.where(live, row, 0)", "row", "triton and edges and 45"),
    "all rows taken for those of the first image": (
        "apart.py",
        "image * outer_stride + position",
        "position",
        "triton and edges and 9 and 70",
    ),
    "target term dropped where rows lie apart": (
        "short_rows.py",
        "g -= tl.where(at_target, tl.expand_dims(gradient.target_term, AXIS), 0.0)",
        "pass",
        "triton and edges and 260",
    ),
    "argmax term dropped in the backward": (
        "gradient.py",
        "g -= tl.where(column[None, :] == argmax[:, None], gradient.argmax_term[:, None], 0.0)",
        "pass",
        "triton and made_in_the_backward and hard and float32",
    ),
    "what stands in an ignored row is used": (
        "short_rows.py",
        "PREDICTION or APART",
        "PREDICTION",
        "triton and anything_may",
        2,
    ),
    "0 / 0 written as if rows were packed": (
        "reduction.py",
        "place = row // step * (step * CLASSES) + row % step",
        "pass",
        "triton and weights_of_zero and some",
    ),
}

SHARED = (NUMERICS, "tests/layer/test_linear.py")
# All but the first choose the executor themselves.
BY_FILES = {
    SHARED: (MUTANTS, BY_EXECUTOR),
    ("tests/kernels/test_triton_objectives.py",): (WIDE_MUTANTS, {}),
    ("tests/kernels/test_triton_reduction.py",): (REDUCTION_MUTANTS, {}),
    (LAYOUTS,): (LAYOUT_MUTANTS, {}),
}


def test_the_source_of_every_mutant_is_there() -> None:
    """Of those too that a sample leaves out."""
    for mutants, _ in BY_FILES.values():
        for mutant in mutants.values():
            Mutant(*mutant).text(ROOT / TRITON_SOURCES)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("files", "name"),
    [pytest.param(files, name, id=name) for files, (mutants, _) in BY_FILES.items() for name in mutants],
)
def test_the_suite_catches(files: tuple[str, ...], name: str, tmp_path: Path) -> None:
    mutants, variables = BY_FILES[files]
    mutant = Mutant(*mutants[name])
    prepare = lambda folder: mutant.put_into(folder / TRITON_SOURCES)  # noqa: E731
    assert_caught(run_triton_tests(mutant.selection, files, tmp_path, prepare, **variables))


@pytest.mark.parametrize("files", BY_FILES, ids=["shared", "wide", "reduction", "layouts"])
def test_the_unchanged_source_passes_what_catches_mutants(files: tuple[str, ...], tmp_path: Path) -> None:
    mutants, variables = BY_FILES[files]
    selection = " or ".join(f"({Mutant(*mutant).selection})" for mutant in mutants.values())
    assert_passed(run_triton_tests(selection, files, tmp_path, lambda folder: None, **variables))
