"""The classifier of a layer form: what it would multiply and add, or the error that says why that cannot be known."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from dal_kernels.tensors import OF_LAYER, refuse_dtensor

_Made = TypeVar("_Made")


def in_place_of(
    classifier: Any,
    features: Tensor,
    make: Callable[[Tensor, Tensor, Tensor | None], _Made],
    classes_last: bool = True,
) -> _Made:
    """``make(features, weight, bias)`` of what ``classifier(features)`` would multiply and add.

    A parameter, as of an embedding, is the weight of a layer without bias. Forward pre-hooks are run before. Of what
    fully_shard has split its hooks gather the weight before and let go of it after, as around a forward.

    Args:
        classes_last: whether D is the last dimension of the features, or stands where C stands in logits.

    Raises:
        TypeError: its forward is not that of :class:`torch.nn.Linear`, or its weight is a DTensor.
        ValueError: it has hooks that would be given its logits.
    """
    if isinstance(classifier, nn.Parameter):
        return make(features, classifier, None)
    instead = "or call dynamics_aware_loss(classifier(features), target, ...)"
    linear = isinstance(classifier, nn.Linear)
    if not linear or type(classifier).forward is not nn.Linear.forward or "forward" in vars(classifier):
        got = type(classifier).__name__ + (" with another forward" if linear else "")
        raise TypeError(
            "classifier must be an nn.Linear with the forward of nn.Linear, because the loss reads its weight and bias "
            f"and does not call it, got {got}: merge an adapter into the weight, {instead}"
        )
    hooks = (classifier._forward_hooks, classifier._backward_hooks, classifier._backward_pre_hooks)
    closing = [hook for hook in classifier._forward_hooks.values() if _is_sharding(classifier, hook)]
    if sum(map(len, hooks)) > len(closing):
        # What parallelize_module puts there are such hooks too.
        refuse_dtensor("classifier.weight", classifier.weight, OF_LAYER)
        refused = [hook for kind in hooks for hook in kind.values() if hook not in closing]
        names = [getattr(hook, "__qualname__", type(hook).__name__) for hook in refused]
        raise ValueError(
            "classifier must have neither forward hooks nor backward hooks, because the logits that they would be "
            f"given are never made, got {', '.join(names)}: remove them, {instead}"
        )
    if classifier._forward_pre_hooks:
        features = _after_pre_hooks(classifier, features, classes_last)
    made: Any = make(features, classifier.weight, classifier.bias)
    for hook in closing:
        changed: Any = hook(classifier, (features,), made)
        made = made if changed is None else changed
    return made


def _is_sharding(classifier: nn.Module, hook: Any) -> bool:
    """Whether a forward hook is fully_shard's, which asks of an output whether it requires grad, and no more."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported where nobody has
    of_torch = getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
    return of_torch and isinstance(classifier, getattr(fsdp, "FSDPModule", ()))


def _after_pre_hooks(classifier: nn.Module, features: Tensor, classes_last: bool) -> Tensor:
    """The features that ``classifier.forward`` would be given. The hooks expect them with D last."""

    def forward(input: Tensor) -> Tensor:  # takes what nn.Linear.forward does
        return input

    moves = not classes_last and features.dim() > 2
    args: Any = (features.movedim(1, -1) if moves else features,)
    kwargs: Any = {}
    for name, hook in tuple(classifier._forward_pre_hooks.items()):  # a lazy layer's removes itself
        if name in classifier._forward_pre_hooks_with_kwargs:
            changed: Any = hook(classifier, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        else:
            changed = hook(classifier, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    features = forward(*args, **kwargs)
    return features.movedim(-1, 1) if moves else features
