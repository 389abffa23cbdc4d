"""The loss as a module: a schedule, its two values as buffers, and the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dal_kernels.functional import dynamics_aware_loss
from dal_kernels.schedule import DynamicsAwareSchedule

__all__ = ["DynamicsAwareLoss"]


class DynamicsAwareLoss(nn.Module):
    """Dynamics-Aware Loss with its schedule: a drop-in for :class:`torch.nn.CrossEntropyLoss`.

    Call :meth:`step` once an epoch (as the paper does) or once an iteration, with ``total_steps`` in the same unit.
    See :func:`dal_kernels.dynamics_aware_loss` for the formula and for what ``forward`` takes, and
    :class:`dal_kernels.DynamicsAwareSchedule` for the schedule.

    Args:
        q_start, q_end, total_steps: the schedule.
        weight, ignore_index, reduction, bootstrap, backend: as in :func:`dal_kernels.dynamics_aware_loss`.

    Attributes:
        schedule: where the schedule stands.
        q, bootstrap_weight: its values as 0-d float32 buffers, updated in place, so that compiled or captured code sees
            them change. They stay float32 through ``.half()`` and follow the input's device. They are not part of the
            state dict; the schedule's settings and position are.

    Raises:
        TypeError, ValueError: a setting of the schedule is wrong, or ``reduction`` or ``bootstrap`` has another value.
    """

    q: Tensor
    bootstrap_weight: Tensor
    weight: Tensor | None

    def __init__(
        self,
        q_start: float = 0.6,
        q_end: float = 1.5,
        total_steps: float | None = None,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        bootstrap: str = "soft",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if total_steps is None:
            raise TypeError(
                "total_steps must be given: how often step() will be called in training (epochs or iterations)"
            )
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
        if bootstrap not in ("soft", "hard"):
            raise ValueError(f"bootstrap must be 'soft' or 'hard', got {bootstrap!r}")
        self.schedule = DynamicsAwareSchedule(q_start, q_end, total_steps)
        self.register_buffer("weight", weight)
        self.register_buffer("q", torch.tensor(self.schedule.q, dtype=torch.float32), persistent=False)
        self.register_buffer(
            "bootstrap_weight", torch.tensor(self.schedule.bootstrap_weight, dtype=torch.float32), persistent=False
        )
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.bootstrap = bootstrap
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` (logits) against ``target`` (class indices) at the schedule's position."""
        if self.q.device != input.device:
            self._follow(input.device)
        return dynamics_aware_loss(
            input,
            target,
            self.q,
            self.bootstrap_weight,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            bootstrap=self.bootstrap,
            backend=self.backend,
        )

    def step(self, t: float | None = None) -> None:
        """Advance the schedule by one, or to position ``t``."""
        self.schedule.step(t)
        self._refresh()

    def get_extra_state(self) -> dict[str, float]:
        return self.schedule.state_dict()

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.schedule.load_state_dict(state)
        self._refresh()

    def extra_repr(self) -> str:
        shown = f"schedule={self.schedule!r}, reduction={self.reduction!r}, bootstrap={self.bootstrap!r}"
        if self.weight is not None:
            shown += f", weight=({len(self.weight)},)"
        if self.ignore_index != -100:
            shown += f", ignore_index={self.ignore_index}"
        return shown + (f", backend={self.backend!r}" if self.backend != "auto" else "")

    def _refresh(self) -> None:
        q, bootstrap_weight = self.schedule.at(self.schedule.position)
        self.q.fill_(q)
        self.bootstrap_weight.fill_(bootstrap_weight)

    def _follow(self, device: torch.device) -> None:
        self.q = torch.empty((), dtype=torch.float32, device=device)
        self.bootstrap_weight = torch.empty_like(self.q)
        self._refresh()
        if self.weight is not None:
            self.weight = self.weight.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.q.dtype != torch.float32:
            # .half() and .bfloat16() would round q; only where it lives is theirs to change.
            self.q = self.q.to(torch.float32)
            self.bootstrap_weight = self.bootstrap_weight.to(torch.float32)
        self._refresh()
        return self
