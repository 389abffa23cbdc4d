"""What is measured after an epoch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["memorisation", "predict", "share"]


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, batch_size: int = 4096) -> Tensor:
    """The predicted class of each input, in evaluation mode; the model's mode is restored."""
    training = model.training
    model.eval()
    predictions = [model(batch).argmax(1) for batch in inputs.split(batch_size)]
    model.train(training)
    return torch.cat(predictions)


def share(condition: Tensor) -> float:
    """The share of true entries, in [0, 1]; NaN of none."""
    return condition.double().mean().item() if condition.numel() else math.nan


def memorisation(prediction: Tensor, given: Tensor, true: Tensor) -> tuple[float, float]:
    """Of the samples whose given label is wrong, the shares predicted as (that wrong label, their true class).

    The two need not add up to 1: a third class may be predicted. NaN if no label is wrong.
    """
    wrong = given != true
    return share(prediction[wrong] == given[wrong]), share(prediction[wrong] == true[wrong])
