"""Networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

__all__ = ["mlp"]


def mlp(inputs: int, hidden: Sequence[int], classes: int, seed: int) -> nn.Sequential:
    """Linear layers with ReLU between them, on flattened inputs; PyTorch's default initialisation from ``seed``."""
    sizes = (inputs, *hidden, classes)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's global generator as it was
        torch.manual_seed(seed)
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])
