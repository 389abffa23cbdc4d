"""Calls of the raw operators as plain values, which a file can hold: how they are made up, and how they are run."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dal_kernels.fields import REDUCTIONS
from dal_kernels.objectives import OBJECTIVES

__all__ = ["calls", "run"]

FLOATS = ("float32", "float64", "bfloat16", "float16")
INTEGERS = ("int64", "int32", "uint8", "int16", "bool")
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")
FILLS = ("normal", "huge", "masked", "nan", "zeros")

# A tensor is a dictionary of shape, dtype, layout, what it is filled with, and a seed.
Spec = dict[str, Any]


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    dtypes: tuple[str, ...] = FLOATS,
    layouts: tuple[str, ...] = LAYOUTS,
    fills: tuple[str, ...] = FILLS,
) -> Spec:
    return {
        "shape": list(shape),
        "dtype": draw(st.sampled_from(dtypes)),
        "layout": draw(st.sampled_from(layouts)),
        "fill": draw(st.sampled_from(fills)),
        "seed": draw(st.integers(0, 2**16)),
    }


def labels(shape: tuple[int, ...], classes: int) -> st.SearchStrategy[Spec]:
    """Mostly classes; some are ignored, and some are none. Mostly int64, because all others are refused."""
    fills = (*[f"labels {classes}"] * 6, "labels 1", f"labels {classes + 2}", "extreme")
    return tensors(shape, ("int64",) * 12 + INTEGERS[1:4], fills=fills)


STRANGE = st.one_of(
    st.none(),
    st.sampled_from([-(2**63), -1, 0, 1, 7, 2**31, 2**63 - 1, 0.0, -1.0, math.inf, math.nan, True]),
    st.lists(st.integers(0, 5), max_size=4).flatmap(lambda shape: tensors(tuple(shape), (*FLOATS, *INTEGERS))),
)


@st.composite
def calls(draw: st.DrawFn, operator: str | None = None) -> dict[str, Any]:
    """An operator and its arguments: those that the package gives it, of which up to two are changed into anything.

    Args:
        operator: the one to call, without "_cpu"; any where None.
    """
    classes = draw(st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 128, 257, 1000, 4097])))
    rows = draw(st.integers(0, max(1, min(70, 20000 // classes))))
    images = draw(st.booleans())
    inner = draw(st.integers(1, 5)) if images else 1
    shape = (rows, classes, inner) if images else (rows, classes)
    count = rows * inner
    logits, target = draw(tensors(shape)), draw(labels((count,), classes))
    accumulated = "float64" if logits["dtype"] == "float64" else "float32"
    objective = draw(st.integers(0, len(OBJECTIVES) - 1))
    knob_count = len(OBJECTIVES[objective].knobs)
    each = draw(st.booleans())
    knobs = draw(tensors((count, knob_count) if each else (knob_count,), (accumulated,), fills=("uniform",)))
    weight = draw(st.one_of(st.none(), tensors((classes,), (accumulated,), fills=("uniform",))))
    ignore, reduction = draw(st.sampled_from([-100, -100, -100, 0, -1])), draw(st.integers(0, len(REDUCTIONS) - 1))
    numbers = {"shape": [8], "dtype": "float32", "layout": "contiguous", "fill": "uniform", "seed": 1}
    fields = draw(tensors((10 if OBJECTIVES[objective].is_wide else 8, count), (accumulated,), ("contiguous",)))
    of_rows = [draw(tensors((count,), (accumulated,))) for _ in range(6)]
    contiguous = {"layout": "contiguous"}
    prediction = draw(labels((count,), classes)) | {"dtype": "int64"} | contiguous
    loss = [logits, target, knobs, weight, objective, ignore, reduction, draw(st.booleans())]
    paced = [numbers, draw(st.integers(1, 4)), 1.5, 1.0]
    targets = draw(st.integers(1, 3))
    # A row is ignored with its first target, and -100 is refused as another: of more than one all are classes.
    many = draw(labels((targets, count), classes)) | ({"fill": "uniform"} if targets > 1 else {})
    sums = fields | {"shape": [count, 6]}
    flat, slopes = logits | {"shape": [count, classes]}, [draw(st.none() | st.just(of)) for of in of_rows[1:]]
    if slopes[0] is not None:
        slopes[0] = slopes[0] | {"shape": [targets, count]}
    gradient = [
        logits,
        target,
        fields,
        prediction,
        of_rows[0] if reduction == 0 else of_rows[0] | {"shape": []},
        ignore,
    ]
    templates: dict[str, list[Any]] = {
        "loss": loss,
        "loss_and_fields": [*loss, draw(st.booleans())],
        "loss_and_pace": [logits, target | contiguous, *loss[2:], *paced],
        "gradient": gradient,
        "overwrite": [flat | contiguous, *gradient[1:]],
        "statistics": [flat, draw(st.booleans()), draw(st.booleans())],
        "quantities": [flat, many, ignore],
        "gradient_of_slopes": [flat, many, ignore, prediction, sums, *slopes],
        "see": [numbers, *(of | contiguous for of in (*of_rows[:2], prediction, target)), *paced[1:]],
        "keep_pace": [numbers, 1.0, 0.6, 0.5, 1.5, 1.0],
    }
    name = draw(st.sampled_from(sorted(templates))) if operator is None else operator
    arguments = list(templates[name])
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        arguments[draw(st.integers(0, len(arguments) - 1))] = draw(STRANGE)
    return {"operator": name, "arguments": arguments}


def _filled(fill: str, size: int, generator: torch.Generator) -> Tensor:
    if fill.startswith("labels"):
        found = torch.randint(int(fill.split()[1]), (size,), generator=generator)
        found[torch.rand(size, generator=generator) < 0.1] = -100
        return found
    if fill == "extreme":
        return torch.tensor([-(2**63), 2**63 - 1, -1, 0])[torch.randint(4, (size,), generator=generator)]
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    if fill == "uniform":
        return values.abs() % 2.0
    if fill == "huge":
        return values * 1e300
    if fill == "masked":
        return torch.where(values > 1, -math.inf, values)
    if fill == "nan":
        return torch.where(values > 1, math.nan, values)
    return values * (fill != "zeros")


def tensor_of(spec: Spec) -> Tensor:
    """The tensor that a dictionary describes; strided ones lie inside of larger memory, which is another's."""
    shape, dtype = spec["shape"], getattr(torch, spec["dtype"])
    generator = torch.Generator().manual_seed(spec["seed"])
    values = _filled(spec["fill"], math.prod(shape), generator).to(dtype).reshape(shape)
    layout = spec["layout"]
    if not shape or layout == "contiguous":
        return values.clone()
    if layout == "expanded":
        return values[:1].expand(shape) if shape[0] > 0 else values
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        storage = torch.empty([2 * size for size in shape], dtype=dtype)
        view = storage[tuple(slice(None, 2 * size, 2) for size in shape)]
    else:
        view = torch.empty([*shape[:-1], shape[-1] + 3], dtype=dtype)[..., 3:]
    return view.copy_(values)


def run(call: dict[str, Any]) -> str:
    """What came of it: "returned", or the name of the exception. Anything else ends the process, or is the fault."""
    arguments = [tensor_of(item) if isinstance(item, dict) else item for item in call["arguments"]]
    operator = getattr(torch.ops.dal_kernels, f"{call['operator']}_cpu")
    try:
        found = operator(*arguments)
    except (RuntimeError, TypeError, ValueError, OverflowError, IndexError) as error:
        return type(error).__name__
    for tensor in found if isinstance(found, tuple) else (found,):
        if isinstance(tensor, Tensor):
            tensor.sum()  # all of it can be read
    return "returned"
