"""What a call of a loss must look like: one clear error for each thing that can be wrong, and flat rows for the rest.

Everything below this module may rely on :class:`Call`.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from dal_kernels.fields import ENTROPY, MAX_PROB, REDUCTIONS, TARGET_PROB, Reduction, loss_dtype
from dal_kernels.knobs import KnobValue, knob_tensor
from dal_kernels.objective import Objective
from dal_kernels.surroundings import is_recording, transforms_active
from dal_kernels.tensors import LABELS, LOGITS, check_choice, no_gradient, of_rows, refuse_dtensor, shape_of

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
        max_prob: softmax probability of the prediction. The dtype of ``target_prob``.
    """

    target_prob: Tensor
    entropy: Tensor
    prediction: Tensor
    max_prob: Tensor

    @classmethod
    def of_fields(cls, fields: Tensor, prediction: Tensor) -> RowStats:
        """Of the fields that an operator gave with the prediction."""
        return cls(fields[TARGET_PROB], fields[ENTROPY], prediction, fields[MAX_PROB])


class Call(NamedTuple):
    """A checked call: N rows of C logits, and everything else in the form the backends take.

    Attributes:
        logits: (N, C), float16, bfloat16, float32 or float64, any strides; (B, C, S) of B S = N rows where the call was
            checked in place. Row b S + s is [b, :, s].
        target: (N,) int64.
        knobs: (K,) or (N, K), float32 or float64, on the device of the logits.
        weight: (C,) in the dtype of the loss, or None.
        objective: which loss.
        shape: shape of the caller's target.
        sample_weight: (N,) in the dtype of the loss, or None. No backend knows it: see
            :func:`dal_kernels.reference.run_weighted`.
    """

    logits: Tensor
    target: Tensor
    knobs: Tensor
    weight: Tensor | None
    objective: Objective
    ignore_index: int
    reduction: Reduction
    want_stats: bool
    shape: torch.Size
    sample_weight: Tensor | None = None

    @property
    def flat(self) -> Call:
        """The same of logits (N, C), which may be a copy."""
        return self if self.logits.dim() == 2 else self._replace(logits=_flat_rows(self.logits))

    @property
    def want_prediction(self) -> bool:
        return self.want_stats or self.objective.needs_argmax

    def shaped(self, loss: Tensor, stats: RowStats | None) -> Any:
        """What the caller gets: loss (and statistics) of flat rows, in the shape of the caller's target."""
        flat = len(self.shape) == 1
        if self.reduction == "none" and not flat:
            loss = loss.reshape(self.shape)
        if stats is None:
            return loss
        return loss, stats if flat else RowStats(*(field.reshape(self.shape) for field in stats))


def _flat_rows(logits: Tensor) -> Tensor:
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def check_class_weight(weight: Tensor, classes: int | None) -> None:
    """Raise TypeError or ValueError for class weights that cannot be; of any length while C is not known."""
    wanted = f"({'C' if classes is None else classes},)"
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor of shape {wanted} or None, got {type(weight).__name__}")
    if weight.dtype not in LOGITS:
        raise TypeError(f"weight must be floating-point, got {weight.dtype}")
    refuse_dtensor("weight", weight)
    no_gradient("weight", weight)
    if weight.dim() != 1 or (classes is not None and weight.shape[0] != classes):
        raise ValueError(f"weight must have one value a class, shape {wanted}, got shape {shape_of(weight)}")


def class_weight_of(weight: Tensor, input: Tensor, classes: int) -> Tensor:
    """As (C,) in the dtype of the loss."""
    check_class_weight(weight, classes)
    if weight.device != input.device:
        raise ValueError(f"weight must be on the device of input, {input.device}, got {weight.device}")
    return weight.to(loss_dtype(input))


def sample_weight_of(weight: Tensor, input: Tensor, shape: torch.Size) -> Tensor:
    """As (N,) in the dtype of the loss. It may require grad: the loss is linear in it."""
    accepted = "None or one value a row"
    if not isinstance(weight, Tensor):
        raise TypeError(f"sample_weight must be {accepted}, a tensor, got {type(weight).__name__}")
    if weight.dtype not in LOGITS:
        raise TypeError(f"sample_weight must be floating-point, got {weight.dtype}")
    refuse_dtensor("sample_weight", weight)
    weight = of_rows("sample_weight", weight, input, shape, accepted)
    return weight.to(loss_dtype(input))


def check_options(ignore_index: int, reduction: str) -> int:
    """Raise TypeError or ValueError for options that cannot be, else return ``ignore_index`` as an int."""
    if type(ignore_index) is not int:
        if not isinstance(ignore_index, Integral):
            raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
        ignore_index = int(ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index}")
    check_choice("reduction", reduction, REDUCTIONS)
    return ignore_index


def _check_input(input: Tensor, target: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    refuse_dtensor("target", target)
    if input.dtype not in LOGITS:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64 logits, got {input.dtype}")
    if target.dtype not in LABELS:
        hint = ""
        if target.is_floating_point():
            hint = (
                "; class probabilities are not supported by this form of the loss"
                if target.shape == input.shape
                else f"; class probabilities must have the shape of input, {shape_of(input)}, got {shape_of(target)}"
            )
        raise TypeError(f"target must hold class indices in an integer dtype, got {target.dtype}{hint}")


def check(
    input: Tensor,
    target: Tensor,
    objective: Objective,
    knobs: tuple[KnobValue, ...] | Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
    want_stats: bool,
    sample_weight: Tensor | None = None,
    in_place: bool = False,
) -> Call:
    """Raise TypeError or ValueError for what no backend can take, else return the call as flat rows.

    Labels are not looked at here: on a GPU that would cost a synchronisation, and a CPU kernel does it on the way.

    Args:
        in_place: logits of more dimensions stay in the order they have, (B, C, S): see :attr:`Call.flat`.
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
        raise ValueError(f"input must have at least one class, got shape {shape_of(input)}")
    if not fits:
        wanted = tuple(expected[: dims > 1] + expected[2:])
        raise ValueError(
            f"target must have shape {wanted} for input of shape {shape_of(input)}, got {shape_of(target)}"
        )
    if not (input.is_cpu and target.is_cpu) and target.device != input.device:
        raise ValueError(f"target must be on the device of input, {input.device}, got {target.device}")
    if dims != 2:
        logits = input.unsqueeze(0) if dims == 1 else input.flatten(2) if in_place else _flat_rows(input)
        target = target.reshape(-1)
    if target.dtype != torch.int64:
        wraps = target.dtype == torch.uint64
        target = target.to(torch.int64)
        if wraps:  # 2**64 - 100 must not become ignore_index
            target = torch.where(target < 0, torch.iinfo(torch.int64).max, target)
    return Call(
        logits,
        target,
        knob_tensor(objective, knobs, input, shape),
        None if weight is None else class_weight_of(weight, input, classes),
        objective,
        check_options(ignore_index, reduction),
        reduction,
        want_stats,
        shape,
        None if sample_weight is None else sample_weight_of(sample_weight, input, shape),
    )


def looks_at_labels(call: Call) -> bool:
    """Whether labels that are none are errors: on a CPU, where looking is free.

    Elsewhere, and under tracing or function transforms, such rows become NaN instead.
    """
    blind = torch.compiler.is_compiling() or transforms_active() or is_recording(call.target)
    return call.logits.is_cpu and not blind


def label_error(call: Call, name: str = "target") -> ValueError | None:
    """What is wrong with labels that are none, where :func:`looks_at_labels`."""
    if not looks_at_labels(call):
        return None
    classes = call.logits.shape[1]
    bad = (call.target != call.ignore_index) & ((call.target < 0) | (call.target >= classes))
    if not bool(bad.any()):
        return None
    row = int(bad.nonzero()[0, 0])
    return ValueError(
        f"{name} at row {row} is {int(call.target[row])}, accepted are 0 to {classes - 1} "
        f"and ignore_index {call.ignore_index}"
    )


def raise_for_labels(call: Call, name: str = "target") -> None:
    """Raise :func:`label_error`, if there is one."""
    error = label_error(call, name)
    if error is not None:
        raise error
