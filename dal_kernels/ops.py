"""The fused operators as torch.library knows them: registered here, with the fake kernels that tracing needs.

The operators of every backend have these schemas:

    loss(logits, target, knobs, weight, objective, ignore_index, reduction, want_gradient)
        -> (loss, gradient, *correction)
    loss_and_fields(the same, want_prediction) -> (loss, gradient, fields, prediction, *correction)
    loss_and_pace(as loss, numbers, every, q_end, max_weight) -> as loss_and_fields with the prediction
    gradient(logits, target, fields, prediction, upstream, ignore_index, *correction) -> gradient
    statistics(logits, want_argmax, wide) -> (sums, argmax)

and on a GPU, for a gradient that was written, times an upstream gradient and the correction, in place, where a factor
of 1 touches nothing,

    scale_gradient(gradient, upstream, correction)
    rewrite_gradient(gradient, logits, target, fields, prediction, upstream, ignore_index, correction): rows that change
        are made again and rounded once, not scaled and rounded twice

with logits (N, C), or (B, C, S) of N = B S rows, whose gradient has that shape, objective an id
of :data:`dal_kernels.objectives.OBJECTIVES`, knobs its K knobs, (K,) or (N, K),
reduction an index into :data:`dal_kernels.fields.REDUCTIONS`, gradient (N, C) already divided for "mean", or empty
where it is not wanted, fields (8, N) and prediction (N,) or empty; of wide objectives fields are (10, N). A gradient
with a term at the predicted class needs the prediction. On a GPU there are target_prob, entropy and max_prob only with
it: fields of narrow objectives are (4, N) without. In ``gradient`` a target of C or more is a class that lies
elsewhere: its row is written without the target's term.

Statistics are (3, N): m = max z, S = sum e^(z - m), W = sum e^(z - m) (z - m), and with ``wide`` (5, N): also
D = sum (z - m) and P = sum e^(2 (z - m)). m of a row of -inf alone is -inf, and its S, W and P are 0; m of a row with a
NaN is NaN.

The pace of DAL is kept in place, in the eight numbers of :class:`dal_kernels.pace.PaceNumbers`:

    see(numbers, max_prob, target_prob, prediction, target, every, q_end, max_weight): after a call, of whose rows each
        ``every``-th is looked at. ``loss_and_pace`` does so for its own rows, where the numbers may be its knobs: it
        reads them first. On a GPU that takes no launch of its own where losses are reduced by the last block or program
    keep_pace(numbers, bound, q_start, opening, q_end, max_weight): under a new bound

On a CPU two more make losses of one's own: of targets (T, N), and with slopes by each quantity or None,

    quantities(logits, targets, ignore_index)
        -> (log_prob (T, N), entropy, max_log_prob, sum_log_prob, square_sum, argmax, sums)
    gradient_of_slopes(logits, targets, ignore_index, argmax, sums, *slopes by the first five) -> gradient

Sums are for the second alone. A row is ignored with its first target: its quantities are those of class 0, its
gradient is 0.

On a GPU the divisor of a mean is known only after the gradient is written: that is divided by N, and ``correction``,
N over the true divisor, is left for the backward. On a CPU there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from dal_kernels import extensions, namespace
from dal_kernels.backends import cuda as _cuda
from dal_kernels.fields import FIELDS, GRADIENT_FIELDS, NARROW_FIELDS, loss_dtype
from dal_kernels.layouts import MOST_APART_ON_CPU, MOST_APART_ON_GPU, empty_gradient, rows_of
from dal_kernels.objectives import OBJECTIVES


class Kernels(NamedTuple):
    """The operators of one backend.

    Attributes:
        scale_gradient, rewrite_gradient: on a GPU, where looking at the upstream's value would wait; else None.
        writes_gradient: whether the forward can write the gradient of such logits by an objective of that id.
        overwrite: ``gradient`` of contiguous logits (N, C) that nobody needs afterwards, in their place.
        quantities, gradient_of_slopes: on a CPU; elsewhere None.
    """

    loss: OpOverload
    loss_and_fields: OpOverload
    loss_and_pace: OpOverload
    gradient: OpOverload
    statistics: OpOverload
    writes_gradient: Callable[[Tensor, int], bool]
    overwrite: Callable[..., Tensor]
    see: Callable[..., None]
    keep_pace: Callable[..., None]
    scale_gradient: Any = None
    rewrite_gradient: Any = None
    quantities: Any = None
    gradient_of_slopes: Any = None


KERNELS: dict[str, Kernels] = {}

# Why the compiled extensions, or Triton, are not there, or None.
native_error: str | None = None
cuda_error: str | None = None
triton_error: str | None = None
native_instruction_set = ""
# Whether instructions for bfloat16 other than AMX multiply faster than those for float32, as far as somebody can tell.
bfloat16_products_are_fast = True


def kept_fields(objective: int, everything: bool) -> int:
    """How many fields a row has: ``everything`` on a CPU, or with the prediction."""
    if OBJECTIVES[objective].is_wide:
        return len(FIELDS)
    return NARROW_FIELDS if everything else GRADIENT_FIELDS


# The arguments that loss_and_pace has behind those of loss: numbers, every, q_end, max_weight.
_WITHOUT_PACE = -4


def _fake_loss(
    logits: Tensor,
    target: Tensor,
    knobs: Tensor,
    weight: Tensor | None,
    objective: int,
    ignore_index: int,
    reduction: int,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty((rows_of(logits),) if reduction == 0 else (), dtype=loss_dtype(logits))
    return loss, empty_gradient(logits, MOST_APART_ON_CPU) if want_gradient else logits.new_empty((0,))


def _fake_fields(logits: Tensor, arguments: tuple[Any, ...], everything: bool) -> tuple[Tensor, Tensor]:
    *_, objective, _, _, _, want_prediction = arguments
    rows = rows_of(logits)
    fields = logits.new_empty((kept_fields(objective, everything), rows), dtype=loss_dtype(logits))
    return fields, logits.new_empty((rows,) if want_prediction else (0,), dtype=torch.int64)


def _fake_loss_and_fields(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake_loss(logits, *arguments[:-1]), *_fake_fields(logits, arguments, everything=True)


def _fake_loss_and_pace(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_loss_and_fields(logits, *arguments[:_WITHOUT_PACE], True)


def _fake_gradient(logits: Tensor, *_: Any) -> Tensor:
    return empty_gradient(logits, MOST_APART_ON_CPU)


def _fake_gpu_gradient(logits: Tensor, *_: Any) -> Tensor:
    return empty_gradient(logits, MOST_APART_ON_GPU)


def _fake_gpu_loss(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, of_cpu = _fake_loss(logits, *arguments)
    gradient = empty_gradient(logits, MOST_APART_ON_GPU) if arguments[-1] else of_cpu
    return loss, gradient, loss.new_empty(() if loss.dim() == 0 else (0,))


def _fake_gpu_loss_and_fields(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, gradient, correction = _fake_gpu_loss(logits, *arguments[:-1])
    return loss, gradient, *_fake_fields(logits, arguments, everything=arguments[-1]), correction


def _fake_gpu_loss_and_pace(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _fake_gpu_loss_and_fields(logits, *arguments[:_WITHOUT_PACE], True)


def _fake_statistics(logits: Tensor, want_argmax: bool, wide: bool) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    sums = logits.new_empty((5 if wide else 3, rows), dtype=loss_dtype(logits))
    return sums, logits.new_empty((rows,) if want_argmax else (0,), dtype=torch.int64)


def _fake_quantities(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    shapes = (tuple(targets.shape), (rows,), (rows,), (rows,), (rows,))
    values = (logits.new_empty(shape, dtype=loss_dtype(logits)) for shape in shapes)
    sums = logits.new_empty((rows, 6), dtype=loss_dtype(logits))
    return *values, logits.new_empty((rows,), dtype=torch.int64), sums


def _fake_in_place(*_: Any) -> None:
    pass


_FAKES: dict[str, Callable[..., Any]] = {
    "loss": _fake_loss,
    "loss_and_fields": _fake_loss_and_fields,
    "loss_and_pace": _fake_loss_and_pace,
    "gradient": _fake_gradient,
    "statistics": _fake_statistics,
    "see": _fake_in_place,
    "keep_pace": _fake_in_place,
}
_CPU_FAKES = _FAKES | {"quantities": _fake_quantities, "gradient_of_slopes": _fake_gradient}
_GPU_FAKES = _FAKES | {
    "loss": _fake_gpu_loss,
    "loss_and_fields": _fake_gpu_loss_and_fields,
    "loss_and_pace": _fake_gpu_loss_and_pace,
    "gradient": _fake_gpu_gradient,
    "scale_gradient": _fake_in_place,
    "rewrite_gradient": _fake_in_place,
}

_LOSS_ARGUMENTS = (
    "Tensor logits, Tensor target, Tensor knobs, Tensor? weight, int objective, int ignore_index, int reduction, "
    "bool want_gradient"
)
_TRITON_SCHEMAS = {
    "loss": f"({_LOSS_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    "loss_and_fields": f"({_LOSS_ARGUMENTS}, bool want_prediction) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "loss_and_pace": (
        f"({_LOSS_ARGUMENTS}, Tensor(a!) numbers, int every, float q_end, float max_weight) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "gradient": (
        "(Tensor logits, Tensor target, Tensor fields, Tensor prediction, Tensor upstream, int ignore_index, "
        "Tensor correction) -> Tensor"
    ),
    "scale_gradient": "(Tensor(a!) gradient, Tensor upstream, Tensor correction) -> ()",
    "rewrite_gradient": (
        "(Tensor(a!) gradient, Tensor logits, Tensor target, Tensor fields, Tensor prediction, Tensor upstream, "
        "int ignore_index, Tensor correction) -> ()"
    ),
    "statistics": "(Tensor logits, bool want_argmax, bool wide) -> (Tensor, Tensor)",
    "see": (
        "(Tensor(a!) numbers, Tensor max_prob, Tensor target_prob, Tensor prediction, Tensor target, int every, "
        "float q_end, float max_weight) -> ()"
    ),
    "keep_pace": "(Tensor(a!) numbers, float bound, float q_start, float opening, float q_end, float max_weight) -> ()",
}


def _register(
    backend: str,
    fakes: dict[str, Callable[..., Any]],
    writes_gradient: Callable[[Tensor, int], bool],
    overwrite: Callable[..., Tensor] | None = None,
) -> None:
    """Puts the operators of a loaded backend into the table.

    Args:
        overwrite: where it is in Python; else the operator overwrite_<backend>.

    Raises:
        ImportError: it lacks one, as an extension does that was built before the source tree changed.
    """
    names = [*fakes, *(["overwrite"] if overwrite is None else [])]
    lacking = [name for name in names if not hasattr(namespace.operators, f"{name}_{backend}")]
    if lacking:
        raise ImportError(
            f"it was built from other sources than these and lacks the operators {', '.join(lacking)}; build it again "
            "with: pip install --no-build-isolation -e ."
        )
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace.OPERATORS}::{name}_{backend}", fake)
    operators = {name: getattr(namespace.operators, f"{name}_{backend}").default for name in fakes}
    KERNELS[backend] = Kernels(
        **operators, writes_gradient=writes_gradient, overwrite=overwrite or _overwrite_by(backend)
    )


def _overwrite_by(backend: str) -> Callable[..., Tensor]:
    operator = getattr(namespace.operators, f"overwrite_{backend}").default

    def overwrite(logits: Tensor, *arguments: Any) -> Tensor:
        operator(logits, *arguments)
        return logits

    return overwrite


try:
    native_module = extensions.load("_native")  # loading it defines the operators
    _register("cpu", _CPU_FAKES, lambda logits, objective: True)
    native_instruction_set = native_module.instruction_set
    bfloat16_products_are_fast = bool(getattr(native_module, "bfloat16_products_are_fast", True))
except ImportError as error:
    native_error = str(error)

try:
    cuda_module = extensions.load("_cuda")
    _register("cuda", _GPU_FAKES, _cuda.writes_gradient)
except ImportError as error:
    cuda_error = str(error)


def _why_no_triton(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return "Triton is not installed; it comes with torch's CUDA and ROCm builds for Linux (pip install triton)"
    version = (
        f" {triton.__version__}" if (triton := sys.modules.get("triton")) and hasattr(triton, "__version__") else ""
    )
    return f"Triton{version} is installed, but cannot be used: {type(error).__name__}: {error}"


_library = torch.library.Library(namespace.OPERATORS, "FRAGMENT")
# By their names without "_triton", what is in Python of the operators.
in_triton: dict[str, Callable[..., Any]] = {}
try:
    from dal_kernels.backends.triton import launch as _launch
    from dal_kernels.backends.triton import launch_gradient as _launch_gradient
    from dal_kernels.backends.triton import launch_pace as _launch_pace
except Exception as error:  # also a Triton that is broken or too old must not take the package with it
    triton_error = _why_no_triton(error)
else:
    in_triton |= {name: getattr(_launch, name) for name in ("loss", "loss_and_fields", "statistics")}
    in_triton |= {name: getattr(_launch_gradient, name) for name in ("gradient", "scale_gradient", "rewrite_gradient")}
    in_triton |= {name: getattr(_launch_pace, name) for name in ("loss_and_pace", "see", "keep_pace")}
    for _name, _schema in _TRITON_SCHEMAS.items():
        _library.define(f"{_name}_triton{_schema}")
        for _device in ("CPU", "CUDA"):  # CPU tensors: an interpreter or an emulator
            _library.impl(f"{_name}_triton", in_triton[_name], _device)
    _register("triton", _GPU_FAKES, _launch.writes_gradient, _launch_gradient.overwrite)
