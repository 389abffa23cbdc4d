"""A loss whose schedule hears what each training call learnt, and is watched for mistakes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dal_kernels.functional import Hearer
from dal_kernels.surroundings import in_backward, is_recording, transforms_active
from dal_kernels.watch import Watch


class ListeningLoss(nn.Module):
    """What modules of losses have in common: a schedule, which may have ``see(stats, target)``, and its watch.

    Attributes:
        schedule: of the loss, or None.
    """

    schedule: Any
    _watch: Watch | None = None

    def keep_watch(self, watch: bool) -> None:
        """Warn of mistakes with the schedule, or do not.

        Raises:
            TypeError: ``watch`` is no bool.
        """
        if not isinstance(watch, bool):
            raise TypeError(f"watch must be True or False, got {type(watch).__name__}")
        self._watch = Watch() if watch and self.schedule is not None else None

    def step(self, t: float | None = None) -> None:
        """Advance the schedule by one, or to position ``t``; without a schedule nothing happens.

        In compiled code this breaks the graph.
        """
        if self.schedule is not None:
            self.schedule.step(t)
            if self._watch is not None and not torch.compiler.is_compiling():
                self._watch.stepped(self.schedule)

    def learns(self, *tensors: Tensor | None) -> bool:
        """Whether the statistics of a call with these tensors are wanted, for :meth:`told`. The watch counts the call.

        The schedule wants to hear of each call in training mode, with a gradient; the watch of one of them.
        """
        follows = hasattr(self.schedule, "see")
        watch = self._watch
        # What the watch counts would be constants of compiled code, which would be compiled anew for each new count.
        if watch is not None and (torch.compiler.is_compiling() or in_backward()):
            watch = None
        if (watch is None and not follows) or transforms_active():
            return False
        graded = False
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                if is_recording(tensor):
                    return False
                graded = graded or tensor.requires_grad
        if not (self.training and torch.is_grad_enabled()):
            if watch is not None:
                watch.evaluated()
            return False
        if not graded:
            return False
        looks = watch is not None and watch.trained(self.schedule)
        return follows or looks

    def hearer(self, learns: bool, return_stats: bool, input: Tensor) -> Hearer | None:
        """The schedule, if the call may tell it on its way: where its statistics are for nobody else."""
        if not learns or return_stats or torch.compiler.is_compiling() or not hasattr(self.schedule, "hearer"):
            return None
        hearer: Hearer | None = self.schedule.hearer(input)
        return hearer

    def told(self, result: Any, target: Tensor, return_stats: bool, classes: int | None) -> Any:
        """What the caller asked for, of a result with statistics, once the schedule or the watch has seen them.

        Args:
            classes: C, or None where only some of the classes are known here.
        """
        loss, stats = result
        if hasattr(self.schedule, "see"):
            self.schedule.see(stats, target)
        elif self._watch is not None:
            self._watch.look(stats.target_prob, self.schedule.q, classes)
        return (loss, stats) if return_stats else loss
