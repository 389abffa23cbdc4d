"""The tests of the CUDA kernels can fail: each of these faults, put into the source, is one that they must catch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import cuda_emulator
from support.children import ROOT, assert_passed, run_pytest
from support.marks import needs_emulator
from support.mutants import LAYOUTS, NUMERICS, PACE, Mutant, assert_caught, copy_sources

pytestmark = needs_emulator

FAMILY, LINEAR = "tests/kernels/test_cuda_family.py", "tests/layer/test_linear.py"

# What is changed, and the tests of test_numerics.py that must catch it.
CUDA_MUTANTS = {
    "fence removed": (
        "reduce.cuh",
        "    __threadfence();\n    last = atomicInc",
        "    last = atomicInc",
        "matches_truth and 4099 and float32 and soft-mean",
    ),
    "barrier before the special classes removed": (
        "rows.cuh",
        "DAL_D void sync() const { __syncthreads(); }",
        "DAL_D void sync() const {}",
        "matches_truth and 4099 and float32 and soft-mean",
    ),
    "barrier before the tile is written out removed": (
        "short_rows.cuh",
        "    __syncthreads();\n    S* const to",
        "    S* const to",
        "schedule_values_may_differ_by_row and float32 and soft-mean",
    ),
    "rows past the last one write": (
        "rows.cuh",
        "writes && in.live, loss)",
        "writes, loss)",
        "matches_truth and 1025 and float32 and none",
    ),
    "vectors past the end are counted": (
        "rows.cuh",
        "return ROWS == Rows::kAny || v < NV / 2 || v < rounds;",
        "return true;",
        "matches_truth and 1000 and float32 and soft-mean",
    ),
    "head of an unaligned row missed": (
        "element.cuh",
        "first = lead ? 1 : 0;",
        "first = 0;",
        "matches_truth and 1025 and float32 and soft-mean",
    ),
    "correction forgotten": (
        "finish.cuh",
        "divisor == 0 ? 1.0 : rows / divisor",
        "divisor == 0 ? 1.0 : 1.0",
        "ignored_rows and float32 and mean and False",
    ),
    "logits taken to base 2 before they are subtracted": (
        "finish.cuh",
        "return (z - origin) * kToExponent<A>;",
        "return fma(z, kToExponent<A>, -(origin * kToExponent<A>));",
        "finite_logits_of_any_size and float32 and soft-0.5-300",
    ),
    "0 / 0 taken for 0": (
        "finish.cuh",
        "threadIdx.x == 0 && divisor == 0)",
        "false)",
        "mean_over_nothing and float32 and 7-0.0",
    ),
    "upstream gradient ignored": (
        "gradient.cuh",
        "if (factor == 1) return;",
        "return;",
        "scalar_upstream and float32",
    ),
    "splits keep their own maximum": (
        "../row_sums.h",
        "const RowSums<A> l = rebase(left, max), r = rebase(right, max);",
        "const RowSums<A> l = left, r = right;",
        "matches_truth and 33000 and float32 and soft-none",
    ),
}

# And those of test_cuda_family.py.
FAMILY_MUTANTS = {
    "differences from an old maximum": (
        "long_rows.cuh",
        "if (WIDE) differences += static_cast<A>(classes) * (peak - top);",
        "",
        "move_with_the_largest_logit and float32 and False",
    ),
    "what pads a row counts as a class": (
        "long_rows.cuh",
        "const bool counts = window.holds(k, i);",
        "const bool counts = true;",
        "matches_its_formula and normalized_and_absolute and float32 and 1000",
    ),
    "a share forgets how many classes it has": (
        "long_rows.cuh",
        "sums.differences, sums.squares, sums.classes};",
        "sums.differences, sums.squares, A(0)};",
        "long_rows and smoothed_cross_entropy and float32 and none",
    ),
    "third knob dropped": (
        "finish.cuh",
        "in.knobs[0], in.knobs[1], knob(2));",
        "in.knobs[0], in.knobs[1], A(0));",
        "matches_its_formula and epsilon_softmax and float32 and 100",
    ),
    "term of all classes dropped": (
        "finish.cuh",
        "affine.A)), affine.D);",
        "affine.A)), A(0));",
        "matches_its_formula and normalized_and_absolute and float32 and 100",
    ),
    "term of squares dropped": (
        "finish.cuh",
        "put(kSquare, gradient.E);",
        "put(kSquare, A(0));",
        "matches_its_formula and brier and float32 and 100",
    ),
}

# And those of test_pace.py.
PACE_MUTANTS = {
    "each block has learnt from the first rows": (
        "pace.cuh",
        "const std::int64_t first = std::int64_t(block) * rows;",
        "const std::int64_t first = 0;",
        "followed_by and lanes and mean and True",
    ),
    "rows between those looked at": (
        "pace.cuh",
        "(first + rows.every - 1) / rows.every * rows.every",
        "first",
        "followed_by and lanes and mean and True and not -1-",
    ),
    "a pace of blocks that have a row each is not kept": (
        "pace.cuh",
        "if (!args.learnt) return follow_rows(args.follow);",
        "if (!args.learnt) return;",
        "followed_by and long and mean and False",
    ),
}

# And those of test_gpu_layouts.py.
LAYOUT_MUTANTS = {
    "barrier between warps that share rows removed": (
        "rows_apart.cuh",
        "    scratch[threadIdx.x] = x;\n    __syncthreads();",
        "    scratch[threadIdx.x] = x;",
        "cuda and edges and 384",
    ),
    "a warp finishes with the sum of its own classes": (
        "rows_apart.cuh",
        "sums.sum = group.template all<Add>(sums.sum, scratch[2]);",
        "",
        "cuda and edges and 384",
    ),
    "target term dropped where rows lie apart": (
        "rows_apart.cuh",
        "return g - (i == target ? affine.t : A(0));",
        "return g;",
        "cuda and edges and 260",
    ),
    "what stands in an ignored row is used": (
        "rows_apart.cuh",
        "in.ignored ? A(0) : rule(i)",
        "rule(i)",
        "cuda and anything_may",
    ),
    "argmax term dropped in the backward": (
        "rows_apart.cuh",
        "    if (j == argmax) g -= affine.u;\n",
        "",
        "cuda and made_in_the_backward and hard and float32",
    ),
    "0 / 0 written as if rows were packed": (
        "finish.cuh",
        "batch.gradient[layout.at(row) + j * layout.class_stride]",
        "batch.gradient[row * classes + j]",
        "cuda and weights_of_zero and some",
    ),
}

# And those of test_linear.py, with the last warps first.
LINEAR_MUTANTS = {
    "barrier before logits are written over removed": (
        "gradient.cuh",
        "  if (batch.gradient == batch.logits.data) __syncthreads();",
        "",
        "in_the_place and cuda and float32 and 4099",
    ),
    "target's logit read when the row is written": (
        "gradient.cuh",
        "    correct_terms<S, WIDE>(out, affine, target, target_logit,",
        "    correct_terms<S, WIDE>(out, affine, target, target >= begin && target < end ? widen(z[target]) : A(0),",
        "in_the_place and cuda and float32 and 17",
    ),
}

MUTANTS = {
    NUMERICS: CUDA_MUTANTS,
    FAMILY: FAMILY_MUTANTS,
    PACE: PACE_MUTANTS,
    LAYOUTS: LAYOUT_MUTANTS,
    LINEAR: LINEAR_MUTANTS,
}


def run_tests(mutants: list[Mutant], tests: str, selection: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The selected tests of a file on PTX of changed kernels for float32; the host code is what is built."""
    copy_sources(("csrc", "tests"), folder)
    for mutant in mutants:
        mutant.put_into(folder / "csrc/cuda")
    cuda_emulator.compile_ptx(folder, folder / "csrc/cuda", "kernels_f32.cu")
    paths = [str(ROOT), str(ROOT.parent / "shared")]
    variables = {"DAL_TEST_PTX": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    if tests not in (FAMILY, LAYOUTS):  # which choose the executor themselves
        variables["DAL_TEST_CUDA"] = "desc" if tests == LINEAR else "asc"
    return run_pytest("-q", "-x", "-k", selection, tests, cwd=folder, **variables)


def test_the_source_of_every_mutant_is_there() -> None:
    """Of those too that a sample leaves out."""
    for mutants in MUTANTS.values():
        for mutant in mutants.values():
            Mutant(*mutant).text(ROOT / "csrc/cuda")


@pytest.mark.sampled(7)
@pytest.mark.parametrize(("file", "name"), [(file, name) for file, mutants in MUTANTS.items() for name in mutants])
def test_the_suite_catches(file: str, name: str, tmp_path: Path) -> None:
    mutant = Mutant(*MUTANTS[file][name])
    assert_caught(run_tests([mutant], file, mutant.selection, tmp_path))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("file", MUTANTS)
def test_the_unchanged_source_passes_what_catches_mutants(file: str, tmp_path: Path) -> None:
    selection = " or ".join(f"({Mutant(*mutant).selection})" for mutant in MUTANTS[file].values())
    assert_passed(run_tests([], file, selection, tmp_path))
