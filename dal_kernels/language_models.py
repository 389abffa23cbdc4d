"""A loss of the family in the place of the cross-entropy of a causal language model, without its logits in memory."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dal_kernels.forms import LinearLoss, check_fits, check_loss
from dal_kernels.layer import check_budget

__all__ = ["apply_to"]

_Model = TypeVar("_Model", bound=nn.Module)


def apply_to(model: _Model, loss: Any, *, chunk_bytes: int | None = None) -> _Model:
    """Let a causal language model of Hugging Face train with a loss of the family, fused with its head.

    >>> model = apply_to(AutoModelForCausalLM.from_config(config), GeneralizedCrossEntropyLoss(0.7))  # doctest: +SKIP

    In training mode a call with ``labels`` (or ``shift_labels``) makes no logits (its output has those of no position);
    in evaluation it makes them as always. The head may be tied to the embedding; caps and scales of logits are those of
    the model's configuration (``final_logit_softcapping``, ``logits_scaling``, ``logit_scale``). The first training
    call makes the logits of one position in both ways, because a model may change its logits in yet another.
    ``num_items_in_batch``, as the Trainer gives it, divides a "mean".

    Args:
        model: a ``PreTrainedModel`` with ``logits_to_keep``, whose head is an :class:`torch.nn.Linear`; changed in
            place. It does not own the loss: step its schedule, and save it, beside the model.
        loss: a module of the family. Applied again, the last one counts.
        chunk_bytes: as in :func:`dal_kernels.linear_loss`.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is no such model, or ``loss`` no module of the family.
        ValueError: ``loss`` has class weights of another vocabulary; ``model`` has a ``forward`` of its own beside its
            class's; or, at the first training call, its logits are not those of its head, or it does not call its
            ``base_model``.
    """
    check_loss(loss)
    check_budget(chunk_bytes)
    kind = type(model)
    given = getattr(kind, "_without_robust_loss", kind)
    body, head_of = getattr(model, "base_model", model), getattr(model, "get_output_embeddings", None)
    names = inspect.signature(given.forward).parameters
    if body is model or head_of is None or not {"labels", "logits_to_keep"} <= set(names):
        raise TypeError(
            "model must be a causal language model of Hugging Face whose forward takes labels and logits_to_keep, "
            f"got {given.__name__}"
        )
    check_fits(loss, getattr(head_of(), "out_features", None))
    if "forward" in vars(model):
        raise ValueError(
            "model must have no forward of its own beside its class's, which would hide the loss: call apply_to before "
            "whatever wraps the model's forward"
        )
    model.__class__ = _changed(given)  # type: ignore[arg-type]
    # Past Module.__setattr__, so that state dicts and save_pretrained find the model that they know.
    model.__dict__["_robust_loss"] = (loss, chunk_bytes)
    model.__dict__["_robust_loss_fits"] = False
    return model


@functools.cache
def _changed(given: type) -> type:
    """The class of a model that was a ``given``."""
    methods = {"forward": _forward_of(given), "__reduce_ex__": _reduced, "_without_robust_loss": given}
    changed = type(given.__name__, (given,), methods)
    changed.__module__, changed.__qualname__ = given.__module__, given.__qualname__
    return changed


def _blank(given: type) -> Any:
    """A model to which its state will be given."""
    changed: Any = _changed(given)
    return changed.__new__(changed)


def _reduced(self: Any, protocol: int) -> tuple[Any, ...]:
    """How a model is pickled and copied: no module has the name of its class, but that of which it was made."""
    _, _, *state = self._without_robust_loss.__reduce_ex__(self, protocol)
    return _blank, (self._without_robust_loss,), *state


def _forward_of(given: type) -> Any:
    plain: Any = given.forward  # type: ignore[attr-defined]
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(list(signature.parameters)[1:], args, strict=False)) | kwargs
        labels, shifted = named.get("labels"), named.get("shift_labels")
        if labels is None and shifted is None:
            return plain(self, **named)
        return_dict = named.get("return_dict")
        as_tuple = not (getattr(self.config, "return_dict", True) if return_dict is None else return_dict)
        named["labels"], named["return_dict"] = None, True
        items = named.pop("num_items_in_batch", None)
        named.pop("shift_labels", None)
        fits = self._robust_loss_fits
        if self.training:
            device = next(self.parameters()).device
            position = torch.zeros(0 if fits else 1, dtype=torch.long, device=device)
            named["logits_to_keep"] = position
        seen: list[Tensor] = []
        handle = self.base_model.register_forward_hook(lambda *call: seen.append(call[-1][0]))
        try:
            output = plain(self, **named)
        finally:
            handle.remove()
        if not seen:
            raise ValueError(
                f"model must call its base_model in its forward, got a {given.__name__} that does not: "
                "call the loss on the model's logits instead"
            )
        head = _head(self, shift=1 if shifted is None else 0)
        if self.training and not fits and not torch.compiler.is_compiling():
            _check_logits(output.logits, head.logits(seen[0][:, :1]))
            self.__dict__["_robust_loss_fits"] = True
        target: Any = labels if shifted is None else shifted
        mean = head.loss.reduction == "mean"
        made = head(seen[0], target.to(seen[0].device), num_items=items if mean else None)
        balance = getattr(output, "aux_loss", None)  # of a mixture of experts, which the model adds to its own loss
        if balance is not None:
            made = made + self.router_aux_loss_coef * balance.to(made.device)
        result = type(output)(loss=made, **{name: value for name, value in output.items() if name != "loss"})
        return result.to_tuple() if as_tuple else result

    return forward


def _head(model: Any, shift: int) -> LinearLoss:
    loss, chunk_bytes = model._robust_loss
    loss.train(model.training)
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(model, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None:
        scale = 1.0 if divisor is None else 1.0 / divisor
    return LinearLoss(
        loss, head.in_features, head.out_features, classifier=head, shift=shift, scale=scale, chunk_bytes=chunk_bytes,
        softcap=getattr(config, "final_logit_softcapping", None),
    )  # fmt: skip


def _check_logits(of_model: Tensor, of_head: Tensor) -> None:
    """Raise ValueError where the model has made other logits than its head, a cap and a scale make."""
    tolerance = 1e-3 if of_model.dtype in (torch.float32, torch.float64) else 3e-2
    found, made = of_model.detach().float(), of_head.detach().float()
    difference = (found - made).abs().max()
    if not bool(difference <= tolerance * found.abs().max()):
        raise ValueError(
            "model must make its logits by its head, final_logit_softcapping, logits_scaling and logit_scale, got "
            f"logits that differ from these by {float(difference):g}: call the loss on the model's logits instead"
        )
