"""A loss whose schedule hears what each training call learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dal_kernels.surroundings import is_recording, transforms_active


class ListeningLoss(nn.Module):
    """What modules of losses have in common: a schedule, which may have ``see(stats, target)``.

    Attributes:
        schedule: of the loss, or None.
    """

    schedule: Any

    def learns(self, *tensors: Tensor | None) -> bool:
        """Whether the schedule is to be told of a call with these tensors: one in training mode, with a gradient."""
        return (
            hasattr(self.schedule, "see")
            and self.training
            and torch.is_grad_enabled()
            and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)
            and not transforms_active()
            and not any(isinstance(tensor, Tensor) and is_recording(tensor) for tensor in tensors)
        )

    def told(self, result: Any, target: Tensor, return_stats: bool) -> Any:
        """What the caller asked for, of a result with statistics, once the schedule has seen them."""
        loss, stats = result
        self.schedule.see(stats, target)
        return (loss, stats) if return_stats else loss
