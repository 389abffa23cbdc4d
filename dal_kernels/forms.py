"""A form takes a loss: any loss of the family behind a classifier layer, without the logits of a batch in memory."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dal_kernels.arguments import RowStats, check_class_weight
from dal_kernels.fields import Reduction
from dal_kernels.knobs import KnobValue
from dal_kernels.layer import check_budget
from dal_kernels.linear_call import check_shift, check_softcap, linear_loss_of
from dal_kernels.mixtures import Mix
from dal_kernels.plain_layer import in_place_of
from dal_kernels.tensors import shape_of
from dal_kernels.variations import checked_scale, keep_variations, without_variations

__all__ = ["LinearLoss", "linear_loss"]


class Loss(Protocol):
    """What a form asks of a loss: :class:`dal_kernels.DynamicsAwareLoss` and all modules of the family have it."""

    def for_form(self, input: Tensor, classes: int) -> tuple[int, tuple[KnobValue, ...] | Tensor, dict[str, Any]]: ...
    def learns(self, *tensors: Tensor | None) -> bool: ...
    def told(self, result: Any, target: Tensor, return_stats: bool, classes: int | None) -> Any: ...


def check_loss(loss: Loss) -> None:
    """Raise TypeError for what is no loss of the family."""
    if isinstance(loss, type) or not hasattr(loss, "for_form"):
        got = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(f"loss must be a module of dal_kernels, as DynamicsAwareLoss(...), got {got}")


def check_fits(loss: Loss, classes: int | None) -> None:
    """Raise TypeError or ValueError for what is no loss of the family, or whose class weights are of other classes."""
    check_loss(loss)
    weight = getattr(loss, "weight", None)
    if weight is not None:
        check_class_weight(weight, classes)


def plain_form(
    loss: Loss, input: Tensor, classes: int | None
) -> tuple[int, tuple[KnobValue, ...] | Tensor, dict[str, Any]]:
    """What a loss is in a form that does not smooth, shift or scale.

    Raises:
        TypeError: ``loss`` is no module of the family.
        ValueError: it has one of these options.
    """
    check_loss(loss)
    objective, knobs, options = loss.for_form(input, classes or 1)
    return objective, knobs, without_variations(options)


def linear_loss(
    loss: Loss,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    shift: int = 0,
    softcap: float | None = None,
    scale: float | Tensor = 1.0,
    sample_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    mix: Mix | None = None,
    return_stats: bool = False,
    reduction: Reduction | None = None,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    r"""``loss(F.linear(input, linear_weight, linear_bias), target)`` without its logits in memory.

    With :math:`z = W x + b` the softmax of a row is that of

    .. math:: u = s \, (\mathrm{cap} \tanh(z / \mathrm{cap}) + \delta_y e_y)

    in which the cap is ``softcap`` (as in arXiv 2408.00118), s is ``scale`` times the loss's own, and
    :math:`\delta` is the loss's ``target_shift``. A chunk of rows at a time goes through the classifier; its logits
    become their own gradient, and that the gradients of all that requires grad, in the forward; what does not require
    grad costs nothing. With ``reduction="none"`` and with ``mix`` the backward makes the logits again.

    >>> import torch
    >>> from dal_kernels import GeneralizedCrossEntropyLoss, linear_loss
    >>> features, tokens = torch.randn(2, 16, 8, requires_grad=True), torch.randint(100, (2, 16))
    >>> embedding = torch.nn.Embedding(100, 8)
    >>> linear_loss(GeneralizedCrossEntropyLoss(0.7), features, embedding.weight, tokens, shift=1).backward()

    Margins: CosFace's (arXiv 1801.09414) and AM-Softmax's is ``target_shift=-m`` of the loss with ``scale=s`` on
    features and weight of unit length, LDAM's is :class:`dal_kernels.LabelDistributionAwareMarginLoss`. ArcFace's is
    not there: :math:`\cos(\theta_y + m)` is not :math:`\cos\theta_y` plus a number, and a shift of one a row that is
    made of the logits has a derivative that no ``target_shift`` carries. Logit adjustment (arXiv 2007.07314) is
    ``linear_bias=bias + tau * prior.log()``, whose gradient goes to ``bias``; the correction of a sampled softmax is
    ``linear_bias=-log_q`` of the sampled classes, with their rows of the weight.

    Args:
        loss: a module of the family: its knobs where they are, its class weights, ignore_index, reduction, backend,
            label_smoothing, target_shift (one a row stands where ``target`` has its label) and scale. With a mean,
            losses are divided by what the rows count.
        input: features (..., D), as :func:`torch.nn.functional.linear` takes them; float16, bfloat16, float32 or
            float64, of any strides.
        linear_weight: (C, D), as of :class:`torch.nn.Linear` or, tied, of :class:`torch.nn.Embedding`; same dtype.
            Under autocast the dtypes may differ, and logits are made in autocast's.
        target: class indices (...), any integer dtype.
        linear_bias: (C,), or None.
        shift: how many places further on in the last dimension of the target the target of a row stands: 1 for a causal
            language model, whose features[..., :-1, :] are held against target[..., 1:]. Results are shaped like the
            latter.
        softcap: largest absolute value of a logit before ``scale``, > 0, or None. Takes a second chunk of memory.
        scale: of the capped and shifted logits, > 0: a number or a 0-d tensor, which may require grad.
        sample_weight: one value a row, shaped like ``target`` (the weight of a token stands where the token stands), or
            like its first dimension. "mean" divides by the sum of sample weight times class weight. May require grad.
        num_items: what "mean" divides by in the place of that, a number or a tensor of one: the count of a whole batch
            that is gone through in parts.
        mix: (other_target, w): w * loss(target) + (1 - w) * loss(other_target), w a number, a 0-d tensor or one a row,
            shaped like ``target``.
        return_stats: also return a :class:`dal_kernels.RowStats`, of the softmax of u.
        reduction: in the place of the loss's own.
        chunk_bytes: memory for a chunk of logits, at least one row of which is made.

    Returns:
        The loss: a scalar, or for "none" shaped like ``target``, float32, or float64 for float64; with ``return_stats``
        a pair of it and the statistics.

    Raises:
        TypeError: ``loss`` is no module of the family, or an argument is of the wrong type or dtype.
        ValueError: shapes, devices or values do not fit, a label is no class (on a CPU; on a GPU its row is NaN), or
            num_items is given with another reduction than "mean".
    """
    return linear_form(
        loss, input, linear_weight, target, linear_bias, return_stats, reduction, scale, shift, softcap=softcap,
        sample_weight=sample_weight, num_items=num_items, mix=mix, chunk_bytes=chunk_bytes,
    )  # fmt: skip


def linear_form(
    loss: Loss,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    return_stats: bool,
    reduction: Reduction | None,
    scale: float | Tensor = 1.0,
    shift: int = 0,
    classes_last: bool = True,
    **options: Any,
) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`linear_loss`, or with D where C stands in logits."""
    check_loss(loss)
    classes = linear_weight.shape[0] if isinstance(linear_weight, Tensor) and linear_weight.dim() else 1
    objective, knobs, of_loss = loss.for_form(input, classes)
    own = of_loss.pop("scale")
    scale = checked_scale(scale) if own is None else checked_scale(own) * checked_scale(scale)
    if reduction is not None:
        of_loss["reduction"] = reduction
    learns = loss.learns(input, linear_weight, linear_bias)
    result: Tensor | tuple[Tensor, RowStats] = linear_loss_of(
        objective, knobs, input, linear_weight, target, bias=linear_bias, return_stats=return_stats or learns,
        scale=scale, shift=shift, classes_last=classes_last, **of_loss, **options,
    )  # fmt: skip
    return loss.told(result, target[..., shift:] if shift else target, return_stats, classes) if learns else result


class LinearLoss(nn.Module):
    """A loss of the family and the classifier before it as one module.

    >>> from dal_kernels import LinearLoss, SymmetricCrossEntropyLoss
    >>> criterion = LinearLoss(SymmetricCrossEntropyLoss(), in_features=16, num_classes=1000)

    Args:
        loss: a module of the family.
        in_features, num_classes: D and C of the classifier.
        bias: whether a new classifier has one.
        classifier: in the place of a new one an :class:`torch.nn.Linear`, or a parameter (C, D), as the weight of an
            embedding that is tied to it, which then has no bias. See :class:`dal_kernels.LinearDynamicsAwareLoss` for
            what a layer may be.
        shift, softcap, scale, chunk_bytes: as in :func:`dal_kernels.linear_loss`; a scale may be a parameter.
        device, dtype: of a new classifier's parameters.

    Attributes:
        loss, classifier: as given or made. For evaluation, ``logits(features)`` gives those that the loss is made of,
            before the target shift.

    Raises:
        TypeError, ValueError: naming the argument; also where the loss has class weights of another number of classes.
    """

    scale: float | Tensor

    def __init__(
        self,
        loss: Any,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        classifier: nn.Linear | nn.Parameter | None = None,
        shift: int = 0,
        softcap: float | None = None,
        scale: float | Tensor = 1.0,
        chunk_bytes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_fits(loss, num_classes)
        check_budget(chunk_bytes)
        check_shift(shift)
        check_softcap(softcap)
        if classifier is not None and not (bias and device is None and dtype is None):
            raise ValueError(
                "bias, device and dtype must be left out beside a classifier, whose own they are, "
                f"got bias {bias}, device {device}, dtype {dtype}"
            )
        if classifier is None:
            classifier = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        elif isinstance(classifier, nn.Parameter):
            if classifier.shape != (num_classes, in_features):
                raise ValueError(
                    f"classifier must have shape ({num_classes}, {in_features}), got shape {shape_of(classifier)}"
                )
        elif not isinstance(classifier, nn.Linear):
            raise TypeError(
                f"classifier must be an nn.Linear, a parameter (C, D) or None, got {type(classifier).__name__}"
            )
        elif (classifier.in_features, classifier.out_features) != (in_features, num_classes):
            raise ValueError(
                f"classifier must have in_features {in_features} and out_features {num_classes}, "
                f"got {classifier.in_features} and {classifier.out_features}"
            )
        self.loss: Any = loss
        self.classifier = classifier
        self.shift, self.softcap = shift, softcap
        keep_variations(self, scale=checked_scale(scale))
        self.chunk_bytes = chunk_bytes

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        return_stats: bool = False,
        sample_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
        reduction: Reduction | None = None,
        mix: Mix | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of ``input`` (features (..., D)) against ``target`` (...); as :func:`linear_loss`."""

        def loss_of(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | tuple[Tensor, RowStats]:
            return linear_loss(
                self.loss, features, weight, target, linear_bias=bias, shift=self.shift, softcap=self.softcap,
                scale=self.scale, return_stats=return_stats, sample_weight=sample_weight, num_items=num_items,
                reduction=reduction, mix=mix, chunk_bytes=self.chunk_bytes,
            )  # fmt: skip

        return in_place_of(self.classifier, input, loss_of)

    def logits(self, input: Tensor) -> Tensor:
        """(..., C) of features (..., D), capped and scaled: the module's scale times the loss's."""
        made = in_place_of(self.classifier, input, nn.functional.linear)
        if self.softcap is not None:
            made = self.softcap * torch.tanh(made / self.softcap)
        own = getattr(self.loss, "scale", None)
        return made * self.scale if own is None else made * self.scale * own

    def step(self, t: float | None = None) -> None:
        """Advance the loss's schedule by one, or to position ``t``."""
        self.loss.step(t)

    def extra_repr(self) -> str:
        shown = {"shift": (self.shift, 0), "softcap": (self.softcap, None), "chunk_bytes": (self.chunk_bytes, None)}
        return ", ".join(f"{name}={value}" for name, (value, default) in shown.items() if value != default)
