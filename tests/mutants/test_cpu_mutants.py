"""The tests of the CPU kernels can fail: each of these faults, put into the source, is one that they must catch."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path

import pytest

from support.children import ROOT, assert_passed
from support.compiling import needs_compiler
from support.mutants import FAULTS, NUMERICS, PACE, Mutant, assert_caught, run_cpu_tests, tree

__all__ = ["tree"]

LOSSES = ("tests/losses/test_family.py", "tests/losses/test_row_statistics.py")

MUTANTS = {
    "target term dropped": ("cpu/block_gradient.h", "if (j == special[0]) value[i] -= row.affine.t;", ""),
    "argmax term dropped": (
        "affine_gradient.h",
        "gradient.u = -scale * slopes.by_max_log_prob;",
        "gradient.u = 0;",
    ),
    "NaN clamped away": ("cpu/lanes.h", "greater_of<A>(splat(low), x)", "greater_of<A>(x, splat(low))"),
    "merge forgets the shift": (
        "row_sums.h",
        "ratio * (sums.weighted + sums.sum * shift)",
        "ratio * sums.weighted",
    ),
    "blocks are not moved to the row's maximum": (
        "cpu/block_gradient.h",
        "moved ? std::exp(block_max - row.affine.max) : A(1)",
        "A(1)",
    ),
    "ragged end padded with zeros": ("cpu/block_sums.h", "get(z + j + i, n, lowest)", "get(z + j + i, n, A(0))"),
    "bfloat16 truncated": ("cpu/lanes.h", "bits + 0x7fffu + ((bits >> 16) & 1u)", "bits"),
    "exponentials of a row run into the next one's": (
        "cpu/row.h",
        "exponentials.data() + i * room",
        "exponentials.data() + i * classes",
    ),
    "odd positions taken for even ones": ("cpu/block_sums.h", "lane + I(j + p)", "lane + I(j)"),
    "1 - p^q without expm1": ("probability_losses.h", "-expm1_nonpositive(exponent, power) / q", "(A(1) - power) / q"),
    "ignored rows are written": (
        "cpu/row.h",
        "ignored ? -1 : batch.target.at(row)",
        "ignored ? 0 : batch.target.at(row)",
    ),
    "upstream gradient not applied to the slope": ("cpu/row.h", "up * field(kSlope)", "field(kSlope)"),
    "target term dropped in vectors of rows": (
        "cpu/lane_rows.h",
        "v -= kept_where(here == gradient.target, g.t);",
        "",
    ),
    "every second half of a vector of rows is the first": (
        "cpu/lane_tile.h",
        "load_lanes(from + kSide)",
        "load_lanes(from)",
    ),
    "NaN passed over in vectors of rows": (
        "cpu/lane_rows.h",
        "select(poisoned < row_ints(0), largest, poisoned)",
        "largest",
    ),
    "all rows taken for those of the first image": ("batch.h", "row / inner * outer_stride + ", ""),
    "last classes of a row are another row's": ("cpu/lane_tile.h", "cls >= 0; cls -= kSide", "cls > 0; cls -= kSide"),
    "last of equal classes": ("cpu/block_sums.h", "(here < first)", "((here > first) | (first == I(kBlock)))"),
}

# Of what only other losses than DAL need: the tests of the family must catch them.
FAMILY_MUTANTS = {
    "positions past the end are differences": ("cpu/block_sums.h", "get(z + j, n, base[0])", "get(z + j, n, A(0))"),
    "squares moved as sums": (
        "row_sums.h",
        "moved.squares = ratio * ratio * sums.squares",
        "moved.squares = ratio * sums.squares",
    ),
    "differences forget the shift": ("row_sums.h", "moved.differences += sums.classes * shift;", ""),
    "constant of the gradient dropped": (
        "cpu/block_gradient.h",
        "v = v * (scale + square * v) + constant;",
        "v = v * (scale + square * v);",
    ),
    "other target of a mix dropped": ("cpu/quantities.h", "at >= 0 && at < span.size", "false"),
    "slope by the sum of a normalised loss dropped": (
        "objective.h",
        "slopes.by_sum_log_prob -= select(single, A(0), weight * quotient / total);",
        "",
    ),
    "modulator of the focal loss taken for a constant": (
        "probability_losses.h",
        "if (!detached && gamma != Scalar<A>(0)) {",
        "if (false) {",
    ),
}

PACE_MUTANTS = {
    "ignored rows agree": ("pace.h", "agreement += counted && ", "agreement += "),
    "a shorter memory": ("pace.h", "kDecay = 0.95", "kDecay = 0.9"),
    "a call without rows is one": ("pace.h", "if (call.rows == 0) return;", ""),
    "the opening is that of ten classes": ("pace.h", "fmax(-log(confidence) / kLogTen, 1.0)", "1"),
    "no opening": ("pace.h", "fmax(static_cast<double>(pace.opening), doubt(", "(doubt("),
    "no doubt": ("pace.h", ", doubt(confidence, agreement, pace.calls))", ", 0.0)"),
    "a guess is doubt": ("pace.h", "share((confidence - kFrom) / kRise) * ", ""),
    "doubt without an end": ("pace.h", "share((kTo - confidence) / kFall) *", ""),
    "a slow network is in doubt": ("pace.h", "share((kSlow - agreement / confidence) / kSlowness)", "1"),
    "above the bound": ("pace.h", "fmin(static_cast<double>(pace.bound), fmax(least, free))", "fmax(least, free)"),
    "the largest weight forgotten": ("pace.h", "limits.max_weight * share", "share"),
    "every row looked at": ("cpu/follow.h", "row += rows.every", "++row"),
}

BY_FILES = {(NUMERICS,): MUTANTS, LOSSES: FAMILY_MUTANTS, (PACE,): PACE_MUTANTS}


@pytest.mark.parametrize("kind", ["AssertionError", "OutOfBounds", "NameError", None])
def test_a_mutant_is_not_caught_by_what_its_source_breaks(kind: str | None) -> None:
    printed = f"E   what it says\n\ntests/test_it.py:7: {kind}\n=== 1 failed in 0.1s ===" if kind else "1 passed"
    result = subprocess.CompletedProcess([], 1 if kind else 0, printed, "")
    with contextlib.nullcontext() if kind in FAULTS else pytest.raises(AssertionError):
        assert_caught(result)


@needs_compiler
def test_the_unchanged_source_passes(tree: Path) -> None:
    result = run_cpu_tests(tree, NUMERICS, *LOSSES, PACE)
    assert_passed(result)
    assert re.search(r"\d{3,} passed", result.stdout)


def test_the_source_of_every_mutant_is_there() -> None:
    """Of those too that a sample leaves out."""
    for mutants in BY_FILES.values():
        for mutant in mutants.values():
            Mutant(*mutant).text(ROOT / "csrc")


@needs_compiler
@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("files", "name"), [pytest.param(files, name, id=name) for files, mutants in BY_FILES.items() for name in mutants]
)
def test_the_suite_catches(tree: Path, files: tuple[str, ...], name: str) -> None:
    Mutant(*BY_FILES[files][name]).put_into(tree / "csrc")
    assert_caught(run_cpu_tests(tree, *files))
