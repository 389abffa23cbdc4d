"""The suite can fail: each of these faults, put into the kernel's source, is one that it must catch."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from children import FAULTS, ROOT, assert_caught, assert_passed, made_once, run_pytest
from marks import needs_executor

NUMERICS = "tests/test_numerics.py"
LOSSES = ("tests/test_family.py", "tests/test_row_statistics.py")
PACE = "tests/test_pace.py"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
TORCH = Path(torch.__file__).parent

# Only the portable instruction set is built: the others compile the same source.
STUB = '#include "batch.h"\nnamespace dal {{ namespace {name} {{ extern const {kernels} = {{}}; }} }}\n'
STUBS = {"x86_v3": "RowKernels kernels", "x86_v4": "RowKernels kernels", "x86_v4_bf16": "RowKernel<BFloat16> kernel"}

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
        "v -= kept_where(here == of.target, g.t);",
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
        "of.by_sum_log_prob -= select(single, A(0), weight * quotient / total);",
        "",
    ),
    "modulator of the focal loss taken for a constant": (
        "probability_losses.h",
        "if (!detached && gamma != Scalar<A>(0)) {",
        "if (false) {",
    ),
}

# Of the Triton kernels, with the tests that must catch each under the executor.
TRITON_MUTANTS = {
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
        "in_the_place and 4099 and soft and float32",
    ),
    "upstream gradient ignored": (
        "gradient.py",
        "if factor == 1.0:",
        "if factor == factor:",
        "scalar_upstream and float32",
    ),
}
# Of those of losses that sum over all classes.
TRITON_WIDE_MUTANTS = {
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
TRITON_REDUCTION_MUTANTS = {
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
# Of rows that lie apart.
# Of Triton alone: in a copy of the sources the emulator of CUDA lacks what it runs, and any mutant would seem caught. A
# gradient that is float32 stays what the forward has written, where a bfloat16 one is made again.
TRITON_LAYOUT_MUTANTS = {
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
    ),
    "0 / 0 written as if rows were packed": (
        "reduction.py",
        "place = row // step * (step * CLASSES) + row % step",
        "pass",
        "triton and weights_of_zero and some",
    ),
}

PACE_MUTANTS = {
    "ignored rows agree": ("pace.h", "agreement += counted && ", "agreement += "),
    "a shorter memory": ("pace.h", "kDecay = 0.95", "kDecay = 0.9"),
    "a call without rows is one": ("pace.h", "if (call.rows == 0) return;", ""),
    "the opening is that of ten classes": (
        "pace.h",
        "fmax(-log(static_cast<double>(pace.confidence)) / kLogTen, 1.0)",
        "1",
    ),
    "above the bound": ("pace.h", "fmin(static_cast<double>(pace.bound), fmax(opening, free))", "fmax(opening, free)"),
    "the largest weight forgotten": ("pace.h", "limits.max_weight * fmin", "fmin"),
    "every row looked at": ("cpu/follow.h", "row += rows.every", "++row"),
}

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compile_object(source: Path, target: Path) -> None:
    include = [f"-isystem{TORCH / 'include'}", f"-I{sysconfig.get_path('include')}"]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    subprocess.run([str(COMPILER), *FLAGS, *include, *defines, "-c", str(source), "-o", str(target)], check=True)


def make_tree(copy: Path) -> None:
    for folder in ("csrc", "dal_kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (copy / "tests").mkdir()
    for name in (
        "conftest.py",
        "truth.py",
        "test_numerics.py",
        "family.py",
        "test_family.py",
        "test_row_statistics.py",
        "test_pace.py",
    ):
        shutil.copy(ROOT / "tests" / name, copy / "tests")
    for name, kernels in STUBS.items():
        (copy / "csrc/cpu" / f"isa_{name}.cpp").write_text(STUB.format(name=name, kernels=kernels))
    for source in (copy / "csrc/cpu").glob("*.cpp"):
        if source.stem != "isa_baseline":
            compile_object(source, copy / f"{source.stem}.o")


@pytest.fixture
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of package, sources and tests, with everything compiled that no mutant touches."""
    return shutil.copytree(made_once(request, "mutants", make_tree), tmp_path / "tree")


def run_tests(tree: Path, *files: str) -> subprocess.CompletedProcess[str]:
    """Compiled as it is now, tests of the backend "cpu" up to the first that fails."""
    for name in ("isa_baseline", *(("pace", "bindings") if PACE in files else ())):
        compile_object(tree / f"csrc/cpu/{name}.cpp", tree / f"{name}.o")
    library = tree / "dal_kernels/_native.abi3.so"
    objects = [str(path) for path in tree.glob("*.o")]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    subprocess.run([str(COMPILER), "-shared", *objects, "-o", str(library), *libraries], check=True)
    return run_pytest("-q", "-x", "-k", "cpu", *files, cwd=tree, ATEN_CPU_CAPABILITY="default", PYTHONPATH=str(tree))


@pytest.mark.parametrize("kind", ["AssertionError", "OutOfBounds", "NameError", None])
def test_a_mutant_is_not_caught_by_what_its_source_breaks(kind: str | None) -> None:
    printed = f"E   what it says\n\ntests/test_it.py:7: {kind}\n=== 1 failed in 0.1s ===" if kind else "1 passed"
    result = subprocess.CompletedProcess([], 1 if kind else 0, printed, "")
    with contextlib.nullcontext() if kind in FAULTS else pytest.raises(AssertionError):
        assert_caught(result)


@needs_compiler
def test_the_unchanged_source_passes(tree: Path) -> None:
    result = run_tests(tree, NUMERICS, *LOSSES, PACE)
    assert_passed(result)
    assert re.search(r"\d{3,} passed", result.stdout)


def test_the_source_of_every_mutant_is_there() -> None:
    """Of those too that a sample leaves out."""
    for file, old, _ in (MUTANTS | FAMILY_MUTANTS | PACE_MUTANTS).values():
        assert (ROOT / "csrc" / file).read_text().count(old) == 1, f"the source of the mutant moved: {old}"
    for file, old, *_ in (
        TRITON_MUTANTS | TRITON_WIDE_MUTANTS | TRITON_REDUCTION_MUTANTS | TRITON_LAYOUT_MUTANTS
    ).values():
        assert old in (ROOT / "dal_kernels/backends/triton" / file).read_text(), (
            f"the source of the mutant moved: {old}"
        )


@needs_compiler
@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", [*MUTANTS, *FAMILY_MUTANTS, *PACE_MUTANTS])
def test_the_suite_catches(tree: Path, name: str) -> None:
    file, old, new = (MUTANTS | FAMILY_MUTANTS | PACE_MUTANTS)[name]
    source = tree / "csrc" / file
    text = source.read_text()
    assert text.count(old) == 1, f"the source of the mutant moved: {old}"
    source.write_text(text.replace(old, new))
    result = run_tests(tree, *(LOSSES if name in FAMILY_MUTANTS else (PACE,) if name in PACE_MUTANTS else (NUMERICS,)))
    assert_caught(result)


def run_triton_tests(
    mutant: Sequence[str],
    selection: str,
    folder: Path,
    files: tuple[str, ...],
    prepare: Callable[[Path], None] | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    for name in ("dal_kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if mutant:
        file, old, new = mutant
        path = folder / "dal_kernels/backends/triton" / file
        text = path.read_text()
        assert old in text, f"the source of the mutant moved: {old}"
        path.write_text(text.replace(old, new))
    if prepare is not None:
        prepare(folder)
    # The copy lies elsewhere: the executor is found from here.
    paths = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT.parent / "shared")])}
    return run_pytest("-q", "-x", "-k", selection, *files, cwd=folder, **paths, **variables)


SHARED = (NUMERICS, "tests/test_linear.py")
BY_EXECUTOR = {"DAL_TEST_TRITON": "executor asc"}
FAMILY = ("tests/test_triton_objectives.py",)
REDUCTION = ("tests/test_triton_reduction.py",)
LAYOUTS = ("tests/test_gpu_layouts.py",)
ALONE = {
    **dict.fromkeys(TRITON_WIDE_MUTANTS, FAMILY),
    **dict.fromkeys(TRITON_REDUCTION_MUTANTS, REDUCTION),
    **dict.fromkeys(TRITON_LAYOUT_MUTANTS, LAYOUTS),
}


@needs_executor
@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", TRITON_MUTANTS)
def test_the_suite_catches_in_triton(name: str, tmp_path: Path) -> None:
    *mutant, selection = TRITON_MUTANTS[name]
    result = run_triton_tests(mutant, selection, tmp_path, SHARED, **BY_EXECUTOR)
    assert_caught(result)


@needs_executor
@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", ALONE)
def test_the_suite_catches_in_triton_alone(name: str, tmp_path: Path) -> None:
    """By tests that choose the executor themselves."""
    *mutant, selection = (TRITON_WIDE_MUTANTS | TRITON_REDUCTION_MUTANTS | TRITON_LAYOUT_MUTANTS)[name]
    result = run_triton_tests(mutant, selection, tmp_path, ALONE[name])
    assert_caught(result)


@needs_executor
@pytest.mark.parametrize(
    ("mutants", "files", "variables"),
    [
        (TRITON_MUTANTS, SHARED, BY_EXECUTOR),
        (TRITON_WIDE_MUTANTS, FAMILY, {}),
        (TRITON_REDUCTION_MUTANTS, REDUCTION, {}),
        (TRITON_LAYOUT_MUTANTS, LAYOUTS, {}),
    ],
    ids=["shared", "wide", "reduction", "layouts"],
)
def test_the_unchanged_triton_source_passes_what_catches_mutants(
    mutants: dict[str, tuple[str, ...]], files: tuple[str, ...], variables: dict[str, str], tmp_path: Path
) -> None:
    selection = " or ".join(f"({selection})" for *_, selection in mutants.values())
    result = run_triton_tests((), selection, tmp_path, files, **variables)
    assert_passed(result)
