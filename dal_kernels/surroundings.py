"""What is around a call: torch.func transforms, recording and faking modes, a graph that is kept.

Some of it torch tells only through private hooks. Each of them stands here, with what its absence costs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from dal_kernels.namespace import PACKAGE

# Where it is absent, a torch.func transform meets the fused kernels and torch refuses it.
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)

# Where it is absent, a batched upstream gradient (vmap over a backward) is an error of torch's.
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)

# Where it is absent, what make_fx and its like record has no gradient.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)

# torch.jit.is_tracing, but quicker. Where it is absent, what torch.jit.trace records has no gradient.
_jit_is_tracing = getattr(torch._C, "_is_tracing", lambda: False)

# Where it is absent, every graph counts as kept, which costs a copy of the gradient.
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


# Of the graph that a backward is walking through, -1 outside of one. Where it is absent, a recomputation (activation
# checkpointing) counts as a call of its own.
_graph_task_id = getattr(torch._C, "_current_graph_task_id", lambda: -1)

# Where it is absent, a training that has stalled is not told.
_top_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: ())


# Whether one of the arguments of a call wants to see it first: a proxy of torch.fx, which records it, or a tensor
# subclass with a __torch_function__. Then the call is handed over.
wants_the_call: Callable[..., bool] = has_torch_function_variadic
hand_over: Callable[..., Any] = handle_torch_function

_F = TypeVar("_F", bound=Callable[..., Any])


def constant_in_graphs(function: _F) -> _F:
    """:func:`torch.compiler.assume_constant_result`, which would import the compiler: all that it does is this mark.

    Where a torch has another mark, what is compiled has a break there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_of_graphs(function: _F, reason: str | None = None) -> _F:
    """:func:`torch.compiler.disable`, which would forget the types, and import the compiler, at once.

    With the compiler ``import dal_kernels`` takes four times as long. Here it comes with the first call that it
    compiles.
    """
    disabled: list[Callable[..., Any]] = []

    # Constant, and so run where a graph is made: the compiler would break the graph at torch.compiler.disable already,
    # and give that for the reason.
    @constant_in_graphs
    def prepare() -> bool:
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=reason))
        return True

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function(*arguments, **options)
        prepare()
        return disabled[0](*arguments, **options)

    return cast(_F, call)


def transforms_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode differentiation is around this call."""
    return bool(_functorch_active()) or getattr(forward_ad, "_current_level", -1) >= 0


def is_recording(tensor: Tensor) -> bool:
    """Whether what is done with this tensor is recorded, or imagined only: its values must not be looked at.

    True under torch.export, torch.jit.trace and dispatch modes (make_fx, FakeTensorMode), and of fake tensors. What
    torch.compile compiles is not meant: :func:`torch.compiler.is_compiling` tells that.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return _dispatch_modes() > 0 or _jit_is_tracing() or (type(tensor) is not Tensor and _is_fake(tensor))


def in_backward() -> bool:
    """Whether a backward is calling, as activation checkpointing does to compute a forward again."""
    return bool(_graph_task_id() != -1)


def saves_through_hooks() -> bool:
    """Whether hooks take what autograd saves: those of activation checkpointing must be given the same twice."""
    return _top_saved_tensors_hooks(True) is not None


def is_capturing() -> bool:
    """Whether the current CUDA stream is captured in a graph: then nothing may be asked of an event."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def has_no_value(tensor: Tensor) -> bool:
    """Whether a tensor may stand for values that cannot be looked at, or changed in place."""
    return transforms_active() or type(tensor) is not Tensor or _is_batched(tensor) or is_recording(tensor)


def _is_fake(tensor: Tensor) -> bool:
    """Without importing what has not been imported, for then there are no fake tensors yet."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


# Modules whose lines are not the user's.
_INSIDE = (f"{PACKAGE}.", "torch.nn.modules.module", "functools")


def frames_inside() -> int:
    """How many frames of this package, and of torch's modules, lie between the caller's code and the one that asks."""
    frame, count = sys._getframe(1), 0
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame, count = frame.f_back, count + 1
    return count
