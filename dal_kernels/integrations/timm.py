"""timm. The two lines, where its training script makes its task and begins an epoch:

    task = ClassificationTask(model, criterion=MixupLoss(DynamicsAwareLoss(total_steps=epochs)))
    task.criterion.step(epoch)  # beside lr_scheduler.step(epoch)

A task's checkpoint holds the model and the epoch, not the criterion: give ``step`` the epoch. How far the network has
come the schedule sees again within some twenty batches, with a smaller q until then; to lose nothing, save the
criterion's state dict too. In a distributed training call ``task.criterion.schedule.synchronize()`` after each epoch.
Run with timm 1.0.31. Beside a torch without CUDA torchvision's CUDA wheel breaks timm: "operator torchvision::nms does
not exist".

Nothing here imports timm.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dal_kernels.listening import ListeningLoss

__all__ = ["MixupLoss"]


class MixupLoss(nn.Module):
    """A loss that takes the targets that timm's Mixup and CutMix make, as well as class indices.

    Every loss of dal_kernels takes them as they are, at a pass over the logits for each class. Where labels are mixed
    and not smoothed, a target is two classes and their shares, and two passes do: w l(a) + (1 - w) l(b).

    Args:
        criterion: any loss of dal_kernels.
        label_smoothing: that of ``Mixup``, whose default in timm's script is 0.1; above 0 the targets are taken as they
            are.

    Attributes:
        schedule: the criterion's.
    """

    def __init__(self, criterion: ListeningLoss, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.criterion, self.label_smoothing = criterion, label_smoothing

    @property
    def schedule(self) -> Any:
        return self.criterion.schedule

    def step(self, t: float | None = None) -> None:
        """Advance the criterion's schedule by one, or to position ``t``."""
        self.criterion.step(t)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` (N, C) against ``target``, (N, C) shares of two classes, or (N,) class indices."""
        if not target.is_floating_point() or self.label_smoothing > 0:
            return self.criterion(input, target)
        shares, classes = target.topk(2, 1)
        return self.criterion(input, classes[:, 0], mix=(classes[:, 1], shares[:, 0]))

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing:g}"
