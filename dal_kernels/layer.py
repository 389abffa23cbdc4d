"""The classifier layer before a loss as flat rows, and what its tensors must be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dal_kernels import ops
from dal_kernels.surroundings import is_recording
from dal_kernels.tensors import HALVES, LOGITS, OF_LAYER, refuse_dtensor, shape_of

# The smallest default budget of a chunk: matmuls of fewer bytes leave a device idle.
_LEAST_BYTES = 64 << 20
# From so many classes on, a CPU takes chunks of fewer rows than FEW_ROWS if it is not told otherwise. Where it makes
# the gradient of the classifier it takes all rows of some classes in their place: see dal_kernels.linear_blocks.
MANY_CLASSES = 4096
FEW_ROWS = 128


def check_budget(chunk_bytes: int | None) -> None:
    if chunk_bytes is not None and (type(chunk_bytes) is not int or chunk_bytes < 1):
        raise ValueError(f"chunk_bytes must be an int >= 1 or None, got {chunk_bytes!r}")


# What the weight and the bias of a layer are called by the functions that take D in the place of C, and by those that
# take it last, as F.linear does.
CLASSES_SECOND, CLASSES_LAST = ("classifier_weight", "bias"), ("linear_weight", "linear_bias")


def check_layer(
    input: Tensor,
    classifier_weight: Tensor,
    bias: Tensor | None,
    chunk_bytes: int | None,
    least_classes: int,
    names: tuple[str, str],
) -> torch.dtype:
    """Raise TypeError or ValueError for a classifier layer that cannot be, else return the dtype of its logits."""
    weight_name, bias_name = names
    named = {"input": input, weight_name: classifier_weight}
    if bias is not None:
        named[bias_name] = bias
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        refuse_dtensor(name, tensor, "; pass its to_local()" if name == "input" else OF_LAYER)
        if tensor.dtype not in LOGITS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on the device of input, {input.device}, got {tensor.device}")
    accepted = "(..., D)" if names == CLASSES_LAST else "(D,), (N, D) or (N, D, d1, ...)"
    if input.dim() == 0:
        raise ValueError(f"input must have shape {accepted}, got a 0-d tensor")
    width = input.shape[-1 if names == CLASSES_LAST else input.dim() > 1]
    if classifier_weight.dim() != 2 or classifier_weight.shape[1] != width or len(classifier_weight) < least_classes:
        raise ValueError(
            f"{weight_name} must have shape (C, {width}), C >= {least_classes}, for input of shape "
            f"{shape_of(input)}, got shape {shape_of(classifier_weight)}"
        )
    if bias is not None and bias.shape != classifier_weight.shape[:1]:
        wanted = f"({classifier_weight.shape[0]},)"
        raise ValueError(f"{bias_name} must have shape {wanted} or be None, got shape {shape_of(bias)}")
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


class Layer(NamedTuple):
    """A checked layer: features (N, D), classifier (C, D), bias (C,) or None; ``dtype`` of the logits."""

    features: Tensor
    classifier: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    chunk: int


def layer_of(
    input: Tensor,
    classifier_weight: Tensor,
    bias: Tensor | None,
    chunk_bytes: int | None,
    least_classes: int = 1,
    names: tuple[str, str] = CLASSES_SECOND,
    keeps_logits: bool = False,
) -> tuple[Layer, Tensor]:
    """The layer as flat rows, and a tensor without memory that looks like its logits.

    Args:
        names: of the weight and the bias, for errors. By :data:`CLASSES_LAST`, D is the last dimension of ``input``.
        keeps_logits: whether a chunk of logits is needed beside the chunk of their gradient.

    Raises:
        TypeError, ValueError: a type, dtype, shape or device that :func:`torch.nn.functional.linear` would not take,
            or a budget that is none.
    """
    dtype = check_layer(input, classifier_weight, bias, chunk_bytes, least_classes, names)
    classes = classifier_weight.shape[0]
    if names == CLASSES_LAST:
        features = input.reshape(-1, input.shape[-1])
        shape: tuple[int, ...] = (features.shape[0], classes)
    else:
        shape = (classes,) if input.dim() == 1 else (input.shape[0], classes, *input.shape[2:])
        features = input
        if input.dim() != 2:
            features = input.unsqueeze(0) if input.dim() == 1 else input.movedim(1, -1).reshape(-1, input.shape[1])
    logits = input.new_empty((), dtype=dtype).expand(shape)
    row_bytes = chunk_row_bytes(int(classes), dtype, input.device) * (1 + keeps_logits)
    budget = chunk_bytes or max(_LEAST_BYTES, classifier_weight.numel() * dtype.itemsize // 2)
    if chunk_bytes is None and input.is_cpu and classes >= MANY_CLASSES:
        budget = min(budget, (FEW_ROWS - 1) * row_bytes)
    chunk = max(1, budget // max(1, row_bytes))
    if not is_recording(input):  # what is recorded takes any number of rows
        # As many chunks as it takes, of equal size.
        count = features.shape[0]
        chunks = max(1, -(-count // chunk))
        chunk = max(1, -(-count // chunks))
    return Layer(features, classifier_weight, bias, dtype, chunk), logits


def chunk_row_bytes(classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """What a row of a chunk takes: its logits, and where half matmuls cannot add up in float32, their copy that can."""
    copied = dtype in HALVES and not adds_up_halves(device)
    return classes * (dtype.itemsize + (4 if copied else 0))


def adds_up_halves(device: torch.device) -> bool:
    """Whether matmuls of half types can give and add to float32 there."""
    return device.type == "cuda" and torch.version.hip is None


def multiplies_halves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has a matmul of a half type there that is faster than one of float32: on a CPU, by oneDNN.

    Without the instructions that oneDNN asks for, torch multiplies halves in loops that take up to a hundred times as
    long as a float32 matmul. And oneDNN takes bfloat16 on every x86 processor with AVX-512: without instructions for it
    that takes four times as long as float32, and with Intel's, where there is no AMX, 1.5 times.
    """
    if device.type != "cpu":
        return True
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    # Private, and absent where torch was built without oneDNN.
    supported = getattr(torch.ops.mkldnn, name, None)
    if not torch.backends.mkldnn.enabled or supported is None or not supported():
        return False
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return dtype != torch.bfloat16 or ops.bfloat16_products_are_fast or bool(has_amx())
