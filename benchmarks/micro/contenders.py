"""Who is measured: our loss, what it is an alternative to, and a copy of the logits as the physical ruler."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.micro.cases import DTYPES, Size
from dal_kernels import dynamics_aware_loss, reference

__all__ = ["AUTHORS", "COMPILED", "COMPILED_CROSS_ENTROPY", "COPY", "CROSS_ENTROPY", "OURS", "REFERENCE"]
__all__ += ["RULERS", "Contender", "Loss", "absent", "contenders", "losses"]

Loss = Callable[[Tensor, Tensor], Tensor]
OURS, REFERENCE, AUTHORS = "dal_kernels", "reference", "authors' formula"
COMPILED = "torch.compile(reference)"
CROSS_ENTROPY, COMPILED_CROSS_ENTROPY = "F.cross_entropy", "torch.compile(F.cross_entropy)"
# Of the same bytes, and as we do into new memory where a gradient is made, which costs more than the copy itself.
COPY, REFILL = "logits.clone()", "other.copy_(logits)"
RULERS = {"step": COPY, "no-grad": REFILL}
EAGER = (REFERENCE, AUTHORS)  # the slowest; their forward of a step is about the one without gradient
QUICK = (OURS, CROSS_ENTROPY, COPY)  # where each call costs a fresh cache
HUGE = 2**22  # bytes of a gradient for which our CPU kernels ask for huge pages
TOUCHED = 2**31  # bytes: twice what it took here


def _liger() -> Loss:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()  # writes the gradient over its logits


def _flash_attention() -> Loss:
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    return CrossEntropyLoss()


def _quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return partial(cross_entropy, reduction="mean")


# Fused cross-entropy for GPUs: proxies, because they compute less than our loss does.
PROXIES: dict[str, Callable[[], Loss]] = {
    "Liger (proxy)": _liger,
    "flash-attention (proxy)": _flash_attention,
    "quack (proxy)": _quack,
}


@cache
def _proxies(device: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """Those that can be had, and why the others cannot."""
    found, missing = dict[str, Loss](), dict[str, str]()
    for name, make in PROXIES.items():
        try:
            if device != "cuda":
                raise ImportError("of GPU tensors only")
            found[name] = make()
        except (ImportError, OSError, RuntimeError) as error:  # a compiled package may fail in many ways
            missing[name] = f"{type(error).__name__}: {error}" if device == "cuda" else str(error)
    return found, missing


def absent(device: str) -> dict[str, str]:
    """Rivals that cannot be measured here, with the reason."""
    return _proxies(device)[1]


@cache
def losses(device: str) -> dict[str, Loss]:
    """Each loss of (N, C) logits and (N,) labels on ``device``, "cpu" or "cuda", averaged over the rows."""
    q, bootstrap_weight = torch.tensor(1.2, device=device), torch.tensor(0.4, device=device)

    def plain(logits: Tensor, target: Tensor) -> Tensor:
        return reference.dynamics_aware_loss(logits, target, q, bootstrap_weight)

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)

    return {
        OURS: lambda z, y: dynamics_aware_loss(z, y, q, bootstrap_weight),
        CROSS_ENTROPY: cross_entropy,
        COMPILED_CROSS_ENTROPY: torch.compile(cross_entropy, fullgraph=True),
        COMPILED: torch.compile(plain, fullgraph=True),
        REFERENCE: plain,
        AUTHORS: lambda z, y: reference.dynamics_aware_loss(z, y, q, bootstrap_weight, official=True),
        **_proxies(device)[0],
    }


def contenders(method: str, mode: str, device: str) -> list[str]:
    """Who is measured in this way at this part of a step."""
    names = list(losses(device))
    if mode in RULERS and method != "host":
        names.append(RULERS[mode])
    if method == "cold":
        return [name for name in names if name in QUICK]
    return [name for name in names if mode != "forward" or name not in EAGER]


@lru_cache(maxsize=1)
def _inputs(size: Size, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(size, device=device).to(DTYPES[dtype])
    return logits, torch.randint(size.classes, (size.rows,), device=device)


class Contender:
    """One call of one contender: ``mode`` is "step", "forward" or "no-grad". A step leaves no gradient behind.

    Each has logits of its own, (N, C), the same for all.
    """

    def __init__(self, name: str, mode: str, size: Size, dtype: str, device: str) -> None:
        self.mode = mode
        logits, self.target = _inputs(size, dtype, device)
        self.logits = logits.clone()
        self.loss = None if name in RULERS.values() else losses(device)[name]
        self.other = torch.empty_like(logits) if name == REFILL else None
        self.logits.requires_grad_(mode != "no-grad" and self.loss is not None)

    def touch_memory(self) -> None:
        """Call it so often that the memory of a large gradient has been used before.

        Only our loss asks for huge pages. A virtual machine may have to get each from its host at the first touch, at
        ten times the cost of any later one, and the system goes through many before it gives out the first again.
        """
        if self.mode != "no-grad" and self.logits.nbytes >= HUGE:
            for _ in range(TOUCHED // self.logits.nbytes):
                self()

    def __call__(self) -> None:
        if self.other is not None:
            self.other.copy_(self.logits)
            return
        if self.loss is None:
            self.logits.clone()
            return
        loss = self.loss(self.logits, self.target)
        if self.mode == "step":
            loss.backward()
            self.logits.grad = None
