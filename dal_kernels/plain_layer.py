"""The classifier of a layer form: what it would multiply and add, or the error that says why that cannot be known."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dal_kernels.tensors import OF_LAYER, refuse_dtensor


def plain_layer(classifier: Any, features: Tensor, classes_last: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """(features, weight, bias) that ``classifier(features)`` would multiply and add, its forward pre-hooks run.

    A parameter, as of an embedding, is the weight of a layer without bias.

    Args:
        classes_last: whether D is the last dimension of the features, or stands where C stands in logits.

    Raises:
        TypeError: its forward is not that of :class:`torch.nn.Linear`, or its weight is a DTensor.
        ValueError: it has hooks that would be given its logits.
    """
    if isinstance(classifier, nn.Parameter):
        return features, classifier, None
    instead = "or call dynamics_aware_loss(classifier(features), target, ...)"
    linear = isinstance(classifier, nn.Linear)
    if not linear or type(classifier).forward is not nn.Linear.forward or "forward" in vars(classifier):
        got = type(classifier).__name__ + (" with another forward" if linear else "")
        raise TypeError(
            "classifier must be an nn.Linear with the forward of nn.Linear, because the loss reads its weight and bias "
            f"and does not call it, got {got}: merge an adapter into the weight, {instead}"
        )
    refused = (classifier._forward_hooks, classifier._backward_hooks, classifier._backward_pre_hooks)
    if any(refused):
        # What fully_shard and parallelize_module put there are such hooks too.
        refuse_dtensor("classifier.weight", classifier.weight, OF_LAYER)
        names = [getattr(hook, "__qualname__", type(hook).__name__) for hooks in refused for hook in hooks.values()]
        raise ValueError(
            "classifier must have neither forward hooks nor backward hooks, because the logits that they would be "
            f"given are never made, got {', '.join(names)}: remove them, {instead}"
        )
    if classifier._forward_pre_hooks:
        features = _after_pre_hooks(classifier, features, classes_last)
    return features, classifier.weight, classifier.bias


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
