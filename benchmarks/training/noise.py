"""Label noise (temporary: only as much as the trainer needs until the noise of issue 6 is merged)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from benchmarks.training.data import DataSet
from benchmarks.training.errors import UsageError

__all__ = ["Noise", "NoisyLabels", "parse_noise"]


@dataclass(frozen=True)
class Noise:
    kind: str
    rate: float = 0.0
    path: Path | None = None

    def __str__(self) -> str:
        return "none" if self.kind == "none" else f"{self.kind}:{self.rate:g}"

    @property
    def title(self) -> str:
        return "none" if self.kind == "none" else f"{self.kind} {100 * self.rate:g} %"

    def apply(self, data: DataSet, seed: int) -> NoisyLabels:
        generator = Generator().manual_seed(10 * seed)
        labels = data.train_labels
        flipped = torch.randperm(len(labels), generator=generator)[: round(self.rate * len(labels))]
        shift = torch.randint(1, data.classes, (len(flipped),), generator=generator)
        noisy = labels.clone()
        noisy[flipped] = (labels[flipped] + shift) % data.classes
        return NoisyLabels(noisy, self, seed, (noisy != data.true_labels).double().mean().item())


@dataclass(frozen=True)
class NoisyLabels:
    labels: Tensor
    noise: Noise
    seed: int
    measured: float

    def save(self, path: Path) -> None:
        np.savez_compressed(path, labels=self.labels.numpy(), seed=self.seed)


def parse_noise(text: str) -> Noise:
    kind, _, rate = text.rpartition(":")
    if text == "none":
        return Noise("none")
    try:
        noise = Noise(kind or "symmetric", float(rate))
    except ValueError:
        noise = Noise("", -1)
    if noise.kind != "symmetric" or not 0 <= noise.rate < 1:
        raise UsageError(f"noise must be a rate in [0, 1) or none, got {text!r}")
    return noise
