"""The kernels of Triton that the operators launch, found by calling them on tensors without memory: nothing runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dal_kernels import objectives
from dal_kernels.fields import FIELDS, NARROW_FIELDS, REDUCTIONS, loss_dtype
from dal_kernels.objective import Objective

__all__ = [
    "DTYPES",
    "FEW_ROWS",
    "IMAGE",
    "LONG",
    "ODD_IMAGE",
    "QUICK",
    "TYPES",
    "Launch",
    "Variant",
    "every_variant",
    "kernels",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
TYPES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "i64", torch.int32: "i32"}
SHORT, LONG = (10, 14, 50, 100, 200, 1000, 4000, 16000, 32000), 131072
# Batches, like most a multiple of 16, which Triton's JIT tells the compiler; of few long rows, several programs a row.
ROWS, FEW_ROWS = 8192, 16
# Positions of an image, and of one whose rows are at no particular addresses.
IMAGE, ODD_IMAGE = 1024, 1025
# Kernels of the operator "statistics" alone.
STATISTICS = ("row_statistics", "merge_statistics")
# And of "gradient" and "rewrite_gradient".
GRADIENTS = ("gradient_rows", "gradient_rows_apart")
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Way:
    """How an operator is called; ``if_changed`` is of the backward, ``objective`` and ``reduced`` of both."""

    objective: Objective = objectives.dynamics_aware
    gradient: bool = False
    fields: bool = False
    prediction: bool = False
    reduced: bool = True
    knobs_per_row: bool = False
    if_changed: bool = False


_HARD, _WIDE = objectives.dynamics_aware_hard, objectives.joint_asymmetric
WAYS = {
    "soft": Way(gradient=True),
    "hard": Way(gradient=True, objective=_HARD),
    "wide": Way(gradient=True, objective=_WIDE),
    "soft, no gradient": Way(),
    "soft, fields and prediction": Way(gradient=True, fields=True, prediction=True),
    "wide, fields and prediction": Way(gradient=True, fields=True, prediction=True, objective=_WIDE),
}
# What training runs: bfloat16 keeps the fields, and with a hard bootstrap the prediction too.
BF16_WAYS = {
    "soft, fields": Way(gradient=True, fields=True),
    "hard, fields and prediction": Way(gradient=True, fields=True, prediction=True, objective=_HARD),
}
UNREDUCED = {"soft, unreduced, knobs per row": Way(fields=True, knobs_per_row=True, reduced=False)}
# Of long rows the gradient is made in the backward, whatever the dtype.
LONG_WAYS = {
    "soft, fields, no gradient": Way(fields=True),
    "hard, fields and prediction, no gradient": Way(fields=True, prediction=True, objective=_HARD),
    "soft, no gradient": Way(),
    "soft, fields and prediction, no gradient": Way(fields=True, prediction=True),
    "wide, fields and prediction, no gradient": Way(fields=True, prediction=True, objective=_WIDE),
}
BACKWARD_WAYS = {
    "soft, unreduced": Way(reduced=False),
    "hard, unreduced": Way(reduced=False, objective=_HARD),
    "hard, if changed": Way(if_changed=True, objective=_HARD),
    "wide, unreduced": Way(reduced=False, objective=_WIDE),
}
# Losses that call the vendors' libraries of functions.
LIBRARY_WAYS = {
    "powers": Way(gradient=True, objective=objectives.normalized_and_asymmetric),
    "angle": Way(gradient=True, objective=objectives.fisher_rao),
}
STATISTICS_WAYS = {"narrow": Way(), "wide sums": Way(objective=_WIDE)}
ALL_WAYS = {**WAYS, **BF16_WAYS, **UNREDUCED, **LONG_WAYS, **BACKWARD_WAYS, **LIBRARY_WAYS, **STATISTICS_WAYS}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, each parameter's type or constant as the JIT makes it of the argument, the warps."""

    kernel: str
    signature: dict[str, Any]
    warps: int


@dataclass(frozen=True)
class Variant:
    """One kernel among those that the operators launch for a call with packed logits of (rows, classes).

    ``positions``: of images (rows / positions, classes, positions), whose rows lie apart, or 0.
    """

    kernel: str
    dtype: str
    classes: int
    way: str
    rows: int = ROWS
    positions: int = 0

    def __str__(self) -> str:
        apart = f" apart, {self.positions} positions" if self.positions else ""
        return f"{self.kernel}, {self.dtype}, {self.rows}x{self.classes} classes{apart}, {self.way}"

    @property
    def shape(self) -> tuple[int, ...]:
        if self.positions:
            return self.rows // self.positions, self.classes, self.positions
        return self.rows, self.classes

    def launch(self, lanes: int) -> Launch:
        """The launch on a device whose warps have so many lanes. Nothing runs, no memory is taken."""
        found = _launches(self, lanes)
        if self.kernel not in found:
            raise ValueError(f"{self}: the plan takes {' and '.join(found)}")
        return found[self.kernel]


class _Recorder:
    """In place of a kernel: keeps launches instead of making them."""

    def __init__(self, kernel: Any, found: dict[str, Launch]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *arguments: Any, num_warps: int, **constants: Any) -> None:
        given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | constants
        signature = {parameter.name: _specialized(given[parameter.name], parameter) for parameter in self.kernel.params}
        name = self.kernel.__name__
        self.found[name] = Launch(name, signature, num_warps)


def _kernels_of(module: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if hasattr(value, "arg_names")}


def kernels() -> dict[str, Any]:
    """What the operators launch, by name."""
    from dal_kernels.backends.triton import launch, launch_gradient

    found = (*_kernels_of(launch).values(), *_kernels_of(launch_gradient).values())
    return {kernel.__name__: kernel for kernel in found}  # a module may know it by another name


def _specialized(value: Any, parameter: Any) -> Any:
    """Type or constant that the JIT makes of an argument: a 1 is a constant, a multiple of 16 is known as one."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}:16"  # torch's allocations are aligned to more
    if parameter.is_constexpr or value is None:
        return value
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    if parameter.do_not_specialize:
        return kind
    return 1 if value == 1 else f"{kind}:16" if value % 16 == 0 else kind


def _launches(variant: Variant, lanes: int) -> dict[str, Launch]:
    """What the operators launch for the call of a variant: on tensors without memory, with recorders for kernels."""
    from dal_kernels.backends.triton import device, launch, launch_gradient
    from dal_kernels.backends.triton.layouts import layout_of

    found: dict[str, Launch] = {}
    with contextlib.ExitStack() as stack:
        for module in (launch, launch_gradient):
            recorders = {name: _Recorder(kernel, found) for name, kernel in _kernels_of(module).items()}
            stack.enter_context(mock.patch.multiple(module, **recorders))
        stack.enter_context(mock.patch.object(device, "warp_size", return_value=lanes))
        stack.enter_context(torch.device("meta"))
        logits = torch.empty(variant.shape, dtype=DTYPES[variant.dtype])
        target = torch.empty(variant.rows, dtype=torch.int64)
        dtype, way = loss_dtype(logits), ALL_WAYS[variant.way]
        one, each = torch.empty((), dtype=dtype), torch.empty(variant.rows, dtype=dtype)
        if variant.kernel == "scale_gradient":
            launch_gradient.scale_gradient(logits, one, one)
        elif variant.kernel in STATISTICS:
            launch.statistics(logits, True, way.objective.is_wide)
        elif variant.kernel in GRADIENTS:
            fields = torch.empty(len(FIELDS) if way.objective.is_wide else NARROW_FIELDS, variant.rows, dtype=dtype)
            prediction = target if way.objective.needs_argmax else target[:0]
            upstream, correction = (one, one) if way.reduced else (each, each[:0])
            launch_gradient.write_gradient(
                torch.empty_like(logits),
                logits,
                layout_of(logits),
                target,
                fields,
                prediction,
                upstream,
                IGNORE_INDEX,
                correction,
                if_changed=way.if_changed,
            )
        else:
            count = len(way.objective.knobs)
            knobs = torch.empty((variant.rows, count) if way.knobs_per_row else (count,), dtype=dtype)
            reduction = REDUCTIONS.index("mean" if way.reduced else "none")
            arguments = (logits, target, knobs, None, way.objective.id, IGNORE_INDEX, reduction, way.gradient)
            if way.fields:
                launch.loss_and_fields(*arguments, way.prediction)
            else:
                launch.loss(*arguments)
    return found


QUICK = (
    Variant("loss_rows", "fp32", 10, "soft"),
    Variant("loss_rows", "fp32", 1000, "soft"),
    Variant("loss_rows", "bf16", 4000, "hard, fields and prediction"),
    Variant("loss_rows", "fp32", 16000, "soft"),
    Variant("loss_rows", "bf16", 32000, "hard, fields and prediction"),
    Variant("loss_rows", "fp32", 21, "soft", ROWS, IMAGE),
    Variant("loss_rows", "bf16", 150, "hard, fields and prediction", ROWS, IMAGE),
    Variant("loss_long_rows", "bf16", LONG, "soft, fields, no gradient"),
    Variant("gradient_rows", "bf16", 1000, "hard, if changed"),
    Variant("gradient_rows_apart", "bf16", 21, "hard, if changed", ROWS, IMAGE),
    Variant("reduce_sums", "fp32", 1000, "soft"),
    Variant("scale_gradient", "fp32", 1000, "soft"),
)


def every_variant() -> Iterator[Variant]:
    """All that ``--all`` compiles."""
    from dal_kernels.backends.triton.plan import JOINED

    for classes, dtype in product(SHORT, ("fp32", "bf16")):
        for way in (*WAYS, *(BF16_WAYS if dtype == "bf16" else UNREDUCED)):
            yield Variant("loss_rows", dtype, classes, way)
    for way in WAYS:
        yield Variant("loss_rows", "fp64", 1000, way)
    for dtype, way in product(DTYPES, LIBRARY_WAYS):
        yield Variant("loss_rows", dtype, 1000, way)
    for dtype, way in product(("fp32", "bf16"), LONG_WAYS):
        yield Variant("loss_long_rows", dtype, LONG, way)
        for kernel in ("split_statistics", "merge_splits"):
            yield Variant(kernel, dtype, LONG, way, FEW_ROWS)
    for dtype, way in product(("fp32", "bf16"), STATISTICS_WAYS):
        for classes in (1000, LONG):
            yield Variant("row_statistics", dtype, classes, way)
        yield Variant("merge_statistics", dtype, LONG, way, FEW_ROWS)
    for classes, dtype in product((10, 100, 1000, LONG), ("fp32", "bf16")):
        for way in BACKWARD_WAYS:
            if dtype == "bf16" or classes == LONG or not BACKWARD_WAYS[way].if_changed:
                yield Variant("gradient_rows", dtype, classes, way)
    yield Variant("gradient_rows", "fp64", 1000, "hard, unreduced")
    for classes, dtype, positions in product((2, 21, 42, 150, 336, 384), ("fp32", "bf16"), (IMAGE, ODD_IMAGE)):
        for way in (*WAYS, *(BF16_WAYS if dtype == "bf16" else UNREDUCED)):
            yield Variant("loss_rows", dtype, classes, way, 8 * positions, positions)
        for way in BACKWARD_WAYS:
            if dtype == "bf16" or not BACKWARD_WAYS[way].if_changed:
                yield Variant("gradient_rows_apart", dtype, classes, way, 8 * positions, positions)
    # Of so few programs the last adds up the sums of all, of more a launch of its own does.
    for dtype in ("fp32", "fp64"):
        yield Variant("reduce_sums", dtype, 1000, "soft")
        for classes in (1000, 8000):
            yield Variant("loss_rows", dtype, classes, "soft", JOINED)
    for dtype in DTYPES:
        yield Variant("scale_gradient", dtype, 1000, "soft")
