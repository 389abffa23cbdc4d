"""What a call of the loss must look like: one clear error for each thing that can be wrong, and flat rows for the rest.

Everything below this module may rely on :class:`Rows`.
"""

from __future__ import annotations

import sys
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, TypeGuard, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from dal_kernels.fields import REDUCTIONS, Reduction
from dal_kernels.surroundings import is_recording, transforms_active

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

HALVES = (torch.float16, torch.bfloat16)
_LOGITS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_LABELS = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
_PLAIN = (Tensor, Parameter)
# What refuse_dtensor says.
_BESIDE_PLAIN = (
    " beside a plain input: make input one too, or pass its full_tensor() or, of this rank's rows, to_local()"
)
OF_LAYER = (
    "; for classes split over ranks see dal_kernels.distributed, and where fully_shard has split the parameters, "
    "apply it to a module that calls this loss in its forward (LinearDynamicsAwareLoss or one around it), not to the "
    "classifier"
)

Bootstrap = Literal["soft", "hard"]
Backend = Literal["auto", "triton", "cuda", "cpu", "eager"]
BOOTSTRAPS, BACKENDS = get_args(Bootstrap), get_args(Backend)


class Options(TypedDict, total=False):
    """What every form of the loss takes by name, for the overloads of the public functions.

    :func:`dal_kernels.dynamics_aware_loss` says what they mean.
    """

    weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    bootstrap: Bootstrap
    sample_weight: Tensor | None


class OptionsOfKernels(Options, total=False):
    """And what those take that choose a backend."""

    backend: Backend


class RowStats(NamedTuple):
    """What the loss learnt of each row on the way, detached and shaped like ``target``.

    Attributes:
        target_prob: softmax probability of the target class; NaN where the row is ignored. float32, or float64 for
            float64 logits.
        entropy: entropy of the row's softmax in nats, in [0, ln C] up to rounding. Same dtype.
        prediction: argmax of the row, int64; of equal classes the first.
    """

    target_prob: Tensor
    entropy: Tensor
    prediction: Tensor


class Rows(NamedTuple):
    """A checked call: N rows of C logits, and everything else in the form the backends take.

    Attributes:
        logits: (N, C), float16, bfloat16, float32 or float64, any strides.
        target: (N,) int64.
        q, bootstrap_weight: 0-d or (N,), float32 or float64, on the device of the logits.
        weight: (C,) in the dtype of the loss, or None.
        shape: shape of the caller's target.
        sample_weight: (N,) in the dtype of the loss, or None. No backend knows it: see
            :func:`dal_kernels.reference.run_weighted`.
    """

    logits: Tensor
    target: Tensor
    q: Tensor
    bootstrap_weight: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    hard: bool
    want_stats: bool
    shape: torch.Size
    sample_weight: Tensor | None = None

    def shaped(self, loss: Tensor, stats: RowStats | None) -> Any:
        """What the caller gets: loss (and statistics) of flat rows, in the shape of the caller's target."""
        flat = len(self.shape) == 1
        if self.reduction == "none" and not flat:
            loss = loss.reshape(self.shape)
        if stats is None:
            return loss
        return loss, stats if flat else RowStats(*(field.reshape(self.shape) for field in stats))


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _no_gradient(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad, got a tensor that does: the loss has no gradient for it")


def of_rows(name: str, value: Tensor, input: Tensor, shape: torch.Size, accepted: str) -> Tensor:
    """A value a row, shaped like the target or like its first dimension, as (N,)."""
    if value.device != input.device:
        raise ValueError(f"{name} must be on the device of input, {input.device}, got {value.device}")
    if value.shape == shape:
        return value if value.dim() == 1 else value.reshape(-1)
    if len(shape) > 1 and value.shape == shape[:1]:
        return value.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape).reshape(-1)
    raise ValueError(f"{name} must be {accepted}, shape {tuple(shape)}, got shape {_shape(value)}")


def _schedule_value(name: str, value: float | Tensor, input: Tensor, shape: torch.Size) -> Tensor:
    """q or bootstrap_weight as a 0-d or (N,) tensor next to the logits."""
    if isinstance(value, Tensor):
        if value.dtype not in _LOGITS:
            raise TypeError(f"{name} must be a number or a floating-point tensor, got {value.dtype}")
        refuse_dtensor(name, value)
        _no_gradient(name, value)
        if value.dtype in HALVES:
            value = value.float()
        if value.dim() == 0 or (value.shape == (1,) and shape != (1,)):
            value = value.reshape(())
            here = (value.is_cpu and input.is_cpu) or value.device == input.device
            return value if here else value.to(input.device, non_blocking=True)
        return of_rows(name, value, input, shape, "a number, a 0-d tensor or one value a row")
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a floating-point tensor, got {type(value).__name__}")
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    # Comparisons only: under torch.compile a number that changes is a symbol, which math.isfinite cannot take.
    if not 0 <= value <= torch.finfo(dtype).max:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
    return torch.full((), float(value), dtype=dtype, device=input.device)


def check_class_weight(weight: Tensor, classes: int | None) -> None:
    """Raise TypeError or ValueError for class weights that cannot be; of any length while C is not known."""
    wanted = f"({'C' if classes is None else classes},)"
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor of shape {wanted} or None, got {type(weight).__name__}")
    if weight.dtype not in _LOGITS:
        raise TypeError(f"weight must be floating-point, got {weight.dtype}")
    refuse_dtensor("weight", weight)
    _no_gradient("weight", weight)
    if weight.dim() != 1 or (classes is not None and weight.shape[0] != classes):
        raise ValueError(f"weight must have one value a class, shape {wanted}, got shape {_shape(weight)}")


def _class_weight(weight: Tensor, input: Tensor, classes: int) -> Tensor:
    check_class_weight(weight, classes)
    if weight.device != input.device:
        raise ValueError(f"weight must be on the device of input, {input.device}, got {weight.device}")
    return weight.to(torch.float64 if input.dtype == torch.float64 else torch.float32)


def _sample_weight(weight: Tensor, input: Tensor, shape: torch.Size) -> Tensor:
    """As (N,) in the dtype of the loss. It may require grad: the loss is linear in it."""
    accepted = "None or one value a row"
    if not isinstance(weight, Tensor):
        raise TypeError(f"sample_weight must be {accepted}, a tensor, got {type(weight).__name__}")
    if weight.dtype not in _LOGITS:
        raise TypeError(f"sample_weight must be floating-point, got {weight.dtype}")
    refuse_dtensor("sample_weight", weight)
    weight = of_rows("sample_weight", weight, input, shape, accepted)
    return weight.to(torch.float64 if input.dtype == torch.float64 else torch.float32)


def check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of the accepted strings."""
    if value not in accepted:
        listed = f"{', '.join(map(repr, accepted[:-1]))} or {accepted[-1]!r}"
        raise ValueError(f"{name} must be {listed}, got {value!r}")


def check_options(ignore_index: int, reduction: str, bootstrap: str) -> int:
    """Raise TypeError or ValueError for options that cannot be, else return ``ignore_index`` as an int."""
    if type(ignore_index) is not int:
        if not isinstance(ignore_index, Integral):
            raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
        ignore_index = int(ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index}")
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("bootstrap", bootstrap, BOOTSTRAPS)
    return ignore_index


def _check_input(input: Tensor, target: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    refuse_dtensor("target", target)
    if input.dtype not in _LOGITS:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64 logits, got {input.dtype}")
    if target.dtype not in _LABELS:
        hint = ""
        if target.is_floating_point():
            hint = "; class probabilities, as mixup or label smoothing make them, are not supported by this loss"
        raise TypeError(f"target must hold class indices in an integer dtype, got {target.dtype}{hint}")


def check(
    input: Tensor,
    target: Tensor,
    q: float | Tensor,
    bootstrap_weight: float | Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    bootstrap: Bootstrap,
    want_stats: bool,
    sample_weight: Tensor | None = None,
) -> Rows:
    """Raise TypeError or ValueError for what no backend can take, else return the call as flat rows.

    Labels are not looked at here: on a GPU that would cost a synchronisation, and a CPU kernel does it on the way.
    """
    _check_input(input, target)
    dims = input.dim()
    expected = input.shape
    shape = target.shape
    logits = input
    if dims == 2:
        rows, classes = expected
        fits = len(shape) == 1 and shape[0] == rows
    elif dims == 0:
        raise ValueError("input must have shape (C,), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    else:
        classes = expected[0 if dims == 1 else 1]
        fits = shape == expected[: dims > 1] + expected[2:]
    if classes == 0:
        raise ValueError(f"input must have at least one class, got shape {_shape(input)}")
    if not fits:
        wanted = tuple(expected[: dims > 1] + expected[2:])
        raise ValueError(f"target must have shape {wanted} for input of shape {_shape(input)}, got {_shape(target)}")
    if not (input.is_cpu and target.is_cpu) and target.device != input.device:
        raise ValueError(f"target must be on the device of input, {input.device}, got {target.device}")
    if dims != 2:
        logits = input.unsqueeze(0) if dims == 1 else input.movedim(1, -1).reshape(-1, classes)
        target = target.reshape(-1)
    if target.dtype != torch.int64:
        wraps = target.dtype == torch.uint64
        target = target.to(torch.int64)
        if wraps:  # 2**64 - 100 must not become ignore_index
            target = torch.where(target < 0, torch.iinfo(torch.int64).max, target)
    ignore_index = check_options(ignore_index, reduction, bootstrap)
    if isinstance(q, Real) and isinstance(bootstrap_weight, Real) and q == 0 and bootstrap_weight != 0:
        raise ValueError(f"q must be > 0 where bootstrap_weight is not 0, got q = 0 and {bootstrap_weight}")
    return Rows(
        logits,
        target,
        _schedule_value("q", q, input, shape),
        _schedule_value("bootstrap_weight", bootstrap_weight, input, shape),
        None if weight is None else _class_weight(weight, input, classes),
        ignore_index,
        reduction,
        bootstrap == "hard",
        want_stats,
        shape,
        None if sample_weight is None else _sample_weight(sample_weight, input, shape),
    )


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, without importing torch.distributed.tensor."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_dtensor(name: str, tensor: Tensor, instead: str = _BESIDE_PLAIN) -> None:
    """Raise TypeError for a DTensor, saying what to do instead."""
    if is_dtensor(tensor):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor{instead}")


def check_budget(chunk_bytes: int | None) -> None:
    if chunk_bytes is not None and (type(chunk_bytes) is not int or chunk_bytes < 1):
        raise ValueError(f"chunk_bytes must be an int >= 1 or None, got {chunk_bytes!r}")


def check_layer(
    input: Tensor, classifier_weight: Tensor, bias: Tensor | None, chunk_bytes: int | None, least_classes: int
) -> torch.dtype:
    """Raise TypeError or ValueError for a classifier layer that cannot be, else return the dtype of its logits."""
    named = {"input": input, "classifier_weight": classifier_weight}
    if bias is not None:
        named["bias"] = bias
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        refuse_dtensor(name, tensor, "; pass its to_local()" if name == "input" else OF_LAYER)
        if tensor.dtype not in _LOGITS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on the device of input, {input.device}, got {tensor.device}")
    if input.dim() == 0:
        raise ValueError("input must have shape (D,), (N, D) or (N, D, d1, ...), got a 0-d tensor")
    width = input.shape[input.dim() > 1]
    if classifier_weight.dim() != 2 or classifier_weight.shape[1] != width or len(classifier_weight) < least_classes:
        raise ValueError(
            f"classifier_weight must have shape (C, {width}), C >= {least_classes}, for input of shape "
            f"{_shape(input)}, got shape {_shape(classifier_weight)}"
        )
    if bias is not None and bias.shape != classifier_weight.shape[:1]:
        raise ValueError(f"bias must have shape ({classifier_weight.shape[0]},) or be None, got shape {_shape(bias)}")
    check_budget(chunk_bytes)
    kind = input.device.type
    # autocast leaves float64 alone
    casts = torch.is_autocast_enabled(kind) and all(tensor.dtype != torch.float64 for tensor in named.values())
    if casts:
        return torch.get_autocast_dtype(kind)
    for name, tensor in named.items():
        if tensor.dtype != input.dtype:
            raise TypeError(f"{name} must have the dtype of input, {input.dtype}, got {tensor.dtype}")
    return input.dtype


def raise_for_labels(rows: Rows) -> None:
    """On a CPU, where looking is free: raise for labels and schedule values that the kernels would refuse.

    Elsewhere, and under tracing or function transforms, such rows become NaN instead.
    """
    if not rows.logits.is_cpu or torch.compiler.is_compiling() or transforms_active() or is_recording(rows.target):
        return
    classes = rows.logits.shape[1]
    bad = (rows.target != rows.ignore_index) & ((rows.target < 0) | (rows.target >= classes))
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"target at row {row} is {int(rows.target[row])}, accepted are 0 to {classes - 1} "
            f"and ignore_index {rows.ignore_index}"
        )
    dtype = torch.float64 if rows.logits.dtype == torch.float64 else torch.float32
    for name, value in (("q", rows.q.to(dtype)), ("bootstrap_weight", rows.bootstrap_weight.to(dtype))):
        wrong = (~torch.isfinite(value) | (value < 0)).reshape(-1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(f"{name} must be finite and >= 0, got {value.reshape(-1)[row].item()} at row {row}")
    wrong = ((rows.q.to(dtype) == 0) & (rows.bootstrap_weight != 0)).reshape(-1)
    if bool(wrong.any()):
        raise ValueError(f"q must be > 0 where bootstrap_weight is not 0, got 0.0 at row {int(wrong.nonzero()[0, 0])}")
