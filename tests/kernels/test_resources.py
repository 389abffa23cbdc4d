"""The Triton kernels compiled for many GPUs without one: nothing spills, and elements move 16 bytes at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import resources, variants
from benchmarks.resources import TARGETS, Resources
from benchmarks.variants import FEW_ROWS, IMAGE, LONG, ODD_IMAGE, Variant
from dal_kernels.backends.triton.plan import (
    JOINED,
    plan_apart,
    plan_backward,
    plan_backward_apart,
    plan_forward,
    plan_statistics,
)

try:
    resources.load_compiler()
except resources.MissingError as error:
    pytest.skip(str(error), allow_module_level=True)

# Packed rows of a multiple of 16 bytes.
WIDE = [
    Variant("loss_rows", "fp32", 1000, "soft"),
    Variant("loss_rows", "bf16", 4000, "hard, fields and prediction"),
    Variant("loss_rows", "bf16", 32000, "soft, fields"),
    Variant("loss_rows", "bf16", 32000, "hard, fields and prediction"),
    Variant("loss_long_rows", "bf16", LONG, "hard, fields and prediction, no gradient"),
    Variant("gradient_rows", "fp32", 1000, "soft, unreduced"),
    Variant("gradient_rows", "bf16", LONG, "hard, if changed"),
    Variant("loss_rows", "fp32", 1000, "wide"),
    Variant("gradient_rows", "bf16", LONG, "wide, unreduced"),
    Variant("row_statistics", "bf16", LONG, "wide sums"),
]
OTHERS = [
    Variant("loss_rows", "bf16", 10, "hard, fields and prediction"),
    Variant("loss_rows", "fp64", 1000, "soft, fields and prediction"),
    Variant("loss_rows", "bf16", 16000, "soft, fields and prediction"),
    Variant("loss_rows", "fp32", 32000, "soft, fields and prediction"),
    Variant("split_statistics", "fp32", LONG, "hard, fields and prediction, no gradient", FEW_ROWS),
    Variant("merge_splits", "fp32", LONG, "hard, fields and prediction, no gradient", FEW_ROWS),
    Variant("gradient_rows", "fp64", 1000, "hard, unreduced"),
    Variant("reduce_sums", "fp64", 1000, "soft"),
    # Of fewer rows the last program adds up the sums of all.
    Variant("loss_rows", "fp32", 1000, "soft", JOINED),
    Variant("loss_rows", "fp64", 1000, "soft, fields and prediction", JOINED),
    Variant("loss_rows", "bf16", 16000, "soft, fields and prediction", JOINED),
    Variant("loss_rows", "bf16", 32000, "hard, fields and prediction", JOINED),
    Variant("loss_rows", "fp32", 32000, "wide, fields and prediction", JOINED),
    Variant("loss_long_rows", "fp32", LONG, "wide, fields and prediction, no gradient", JOINED),
    Variant("loss_rows", "fp32", 16000, "wide, fields and prediction"),
    Variant("loss_rows", "bf16", 32000, "wide"),
    Variant("loss_rows", "fp32", 32000, "powers"),
    Variant("loss_rows", "fp64", 1000, "angle"),
    Variant("loss_rows", "fp32", 32000, "wide, fields and prediction"),
    Variant("split_statistics", "fp32", LONG, "wide, fields and prediction, no gradient", FEW_ROWS),
    Variant("merge_splits", "fp32", LONG, "wide, fields and prediction, no gradient", FEW_ROWS),
    Variant("merge_statistics", "fp32", LONG, "wide sums", FEW_ROWS),
    # As many classes as lanes and warps keep of rows that lie apart.
    Variant("loss_rows", "bf16", 21, "hard, fields and prediction", 8 * IMAGE, IMAGE),
    Variant("loss_rows", "fp32", 42, "soft, fields and prediction", 8 * ODD_IMAGE, ODD_IMAGE),
    Variant("loss_rows", "fp32", 336, "wide, fields and prediction", 8 * IMAGE, IMAGE),
    Variant("gradient_rows_apart", "bf16", 384, "wide, unreduced", 8 * IMAGE, IMAGE),
]
# What is not an element of a block: knobs, label, its logit, fields, sums, the corrected classes. Some are loaded
# twice, for two layouts. Elements one by one would be 16 to 64 more.
MOST_SCALAR_LOADS, MOST_SCALAR_STORES = 20, 16


def wide_accesses(binary: Resources) -> int:
    """The 16-byte accesses a lane needs for one pass over the elements of a program's block."""
    constants = binary.launch.signature
    elements = constants["BLOCK"] * constants.get("ROWS", 1) * constants.get("TILES", 1)
    size = elements * variants.DTYPES[binary.variant.dtype].itemsize
    return size // (16 * binary.launch.warps * resources.lanes_of(binary.target))


# Of each variant two or three targets by default, of each target every fourth variant: a compilation takes a second.
@pytest.mark.sampled(4)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", OTHERS, ids=str)
def test_nothing_spills(variant: Variant, target: str) -> None:
    binary = resources.compile_variant(variant, target)
    assert binary.spill_bytes == 0, binary


@pytest.mark.sampled(4)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", WIDE, ids=str)
def test_nothing_spills_and_elements_move_16_bytes_at_a_time(variant: Variant, target: str) -> None:
    binary = resources.compile_variant(variant, target)
    assert binary.spill_bytes == 0, binary
    needed = wide_accesses(binary)
    assert needed >= 1
    # One more where the labels of two rows, 16 bytes, are read at once.
    assert binary.wide_loads in (needed, needed + 1), binary
    assert binary.loads - binary.wide_loads <= MOST_SCALAR_LOADS, binary
    # As many again where each branch of a condition stores: with a bootstrap, without one, and, where a program has a
    # single row, for one that is ignored. What two branches store alike a compiler may make one of.
    if variant.kernel in ("loss_long_rows", "row_statistics"):
        assert binary.wide_stores == 0, binary
    else:
        assert needed <= binary.wide_stores <= 3 * needed, binary
    assert binary.stores - binary.wide_stores <= MOST_SCALAR_STORES, binary


# ---- what is compiled is what the operators launch


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize(
    "variant", dict.fromkeys([*variants.QUICK, *variants.every_variant(), *WIDE, *OTHERS]), ids=str
)
def test_every_variant_is_launched_with_the_layout_of_the_plan(variant: Variant, lanes: int) -> None:
    launch = variant.launch(lanes)
    plans = {"gradient_rows": plan_backward, "row_statistics": plan_statistics}
    plans |= dict.fromkeys(("loss_rows", "loss_long_rows", "split_statistics"), plan_forward)
    size = (variant.rows, variant.classes, itemsize := variants.DTYPES[variant.dtype].itemsize)
    if variant.positions:
        plan_of = plan_apart if variant.kernel == "loss_rows" else plan_backward_apart
        plan = plan_of(*size, math.gcd(variant.positions, 16 // itemsize), lanes)
        found = [launch.signature.get(name, 1) for name in ("BLOCK", "ROWS", "TILES", "VECTOR")]
        assert (found, launch.warps) == ([plan.block, plan.rows, plan.tiles, plan.vector], plan.warps)
    elif variant.kernel in plans:
        plan = plans[variant.kernel](*size, lanes)
        assert (launch.signature["BLOCK"], launch.warps) == (plan.block, plan.warps)
        assert launch.signature.get("ROWS", 1) == plan.rows
        assert launch.signature.get("TILES", 1) == plan.tiles
        assert launch.signature["PACKED"]


def test_arguments_are_specialized_as_the_jit_does_it() -> None:
    signature = Variant("loss_rows", "bf16", 1000, "soft").launch(32).signature
    expected = {
        "logits_ptr": "*bf16:16",
        "row_stride": "i32",  # 1000 is no multiple of 16
        "class_stride": "i32",  # do_not_specialize
        "inner": "i32",
        "target_ptr": "*i64:16",
        "target_stride": 1,
        "knobs_ptr": "*fp32:16",
        "knobs_stride": "i32:16",  # 0
        "weight_ptr": None,
        "count": "i32:16",
        "ignore_index": "i32",
        "CLASSES": 1000,
        "AXIS": 1,
    }
    assert {name: signature[name] for name in expected} == expected


# ---- the command


def test_the_table_says_what_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "resources.md"
    assert resources.main(["--only", "reduce_sums", "--targets", "sm_90", "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed == file.read_text(encoding="utf-8")
    assert "NOT timings" in printed
    assert "| reduce_sums " in printed


def test_without_the_helper_one_sentence_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise resources.MissingError("no gpuless")

    monkeypatch.setattr(resources, "load_compiler", missing)
    assert resources.main([]) == 2
    assert capsys.readouterr().err == "resources: no gpuless\n"
