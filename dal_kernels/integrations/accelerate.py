"""Hugging Face Accelerate. The lines, beside those that prepare the model, and after each epoch:

    criterion = prepare(accelerator, DynamicsAwareLoss(total_steps=epochs))
    end_epoch(criterion)

``accelerator.save_state`` and ``load_state`` then hold the criterion, its schedule and what it has learnt.
``accelerator.prepare(criterion)`` would do too where it wraps nothing, but it takes the criterion for a second model,
which mixed precision wraps, and which some ways to share a model between devices do not take. Run with accelerate 1.15,
torch 2.13.
"""

from __future__ import annotations

from typing import TypeVar

from accelerate import Accelerator

from dal_kernels.listening import ListeningLoss

__all__ = ["end_epoch", "prepare"]

Loss = TypeVar("Loss", bound=ListeningLoss)


def prepare(accelerator: Accelerator, criterion: Loss) -> Loss:
    """The criterion on the accelerator's device, and part of its checkpoints.

    Args:
        criterion: any loss of dal_kernels. Before ``load_state`` prepare as many, in the same order, as were saved.

    Raises:
        TypeError: it is no such loss.
    """
    if not isinstance(criterion, ListeningLoss):
        raise TypeError(f"criterion must be a loss of dal_kernels, got {type(criterion).__name__}")
    criterion = criterion.to(accelerator.device)
    accelerator.register_for_checkpointing(criterion)
    return criterion


def end_epoch(criterion: ListeningLoss) -> None:
    """The schedule goes one step on, and the processes average what they have learnt; all of them call this."""
    criterion.step()
    if hasattr(criterion.schedule, "synchronize"):
        criterion.schedule.synchronize()
