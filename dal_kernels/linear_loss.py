"""The loss and the classifier layer before it as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dal_kernels.arguments import Backend, Bootstrap, RowStats, check_class_weight
from dal_kernels.fields import Reduction
from dal_kernels.layer import check_budget
from dal_kernels.linear import linear_loss_of
from dal_kernels.loss import DynamicsAwareLoss
from dal_kernels.objectives import dynamics_aware_of
from dal_kernels.tensors import OF_LAYER, refuse_dtensor

__all__ = ["LinearDynamicsAwareLoss"]


def plain_layer(classifier: Any, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(features, weight, bias) that ``classifier(features)`` would multiply and add, its forward pre-hooks run.

    Raises:
        TypeError: its forward is not that of :class:`torch.nn.Linear`, or its weight is a DTensor.
        ValueError: it has hooks that would be given its logits.
    """
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
        features = _after_pre_hooks(classifier, features)
    return features, classifier.weight, classifier.bias


def _after_pre_hooks(classifier: nn.Module, features: Tensor) -> Tensor:
    """The features that ``classifier.forward`` would be given. As the hooks expect them: D last."""

    def forward(input: Tensor) -> Tensor:  # takes what nn.Linear.forward does
        return input

    args: Any = (features.movedim(1, -1) if features.dim() > 2 else features,)
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
    return features.movedim(-1, 1) if features.dim() > 2 else features


class LinearDynamicsAwareLoss(DynamicsAwareLoss):
    """The last layer of a classifier and :class:`DynamicsAwareLoss` in one, without the logits of a batch in memory.

    ``forward`` takes features where the loss takes logits. For evaluation, ``classifier(features)`` gives logits.

    Args:
        in_features, num_classes: D and C of the classifier.
        q_start, q_end, total_steps: the schedule.
        bias: whether the classifier has one.
        weight, ignore_index, reduction, bootstrap, backend: as in :func:`dal_kernels.dynamics_aware_loss`.
        chunk_bytes: as in :func:`dal_kernels.linear_dynamics_aware_loss`.
        device, dtype: of the classifier's parameters.

    Attributes:
        classifier: the :class:`torch.nn.Linear` that is trained. The loss reads its weight and its bias and never calls
            its ``forward``. Parametrizations are honoured, and forward pre-hooks are run, as pruning, spectral_norm and
            weight_norm put them there. A module with a forward of its own (an adapter, an nn.Sequential, a quantised
            layer), forward hooks and backward hooks are refused at the call. Global hooks, PyTorch's for debugging
            and profiling, do not see it.
        schedule, q, bootstrap_weight: as of :class:`DynamicsAwareLoss`.

    Raises:
        TypeError, ValueError: as :class:`DynamicsAwareLoss`, and where ``weight`` has not ``num_classes`` values or
            chunk_bytes is not a positive int; at the call, where ``classifier`` is one that the loss cannot look into.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        q_start: float = 0.6,
        q_end: float = 1.5,
        *,
        total_steps: float,
        bias: bool = True,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        bootstrap: Bootstrap = "soft",
        backend: Backend = "auto",
        chunk_bytes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            q_start,
            q_end,
            total_steps=total_steps,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            bootstrap=bootstrap,
            backend=backend,
        )
        if weight is not None:
            check_class_weight(weight, num_classes)
        check_budget(chunk_bytes)
        self.classifier = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.chunk_bytes = chunk_bytes

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        return_stats: bool = False,
        sample_weight: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of ``input`` (features, D in the place of C) against ``target`` at the schedule's position.

        The other arguments are those of :meth:`DynamicsAwareLoss.forward`.
        """
        knobs = self._knobs_for(input)
        features, classifier_weight, bias = plain_layer(self.classifier, input)
        return linear_loss_of(
            dynamics_aware_of(self.bootstrap).id,
            knobs,
            features,
            classifier_weight,
            target,
            bias=bias,
            return_stats=return_stats,
            sample_weight=sample_weight,
            chunk_bytes=self.chunk_bytes,
            **self._options(reduction),
        )
