"""The one way in which DAL at a fixed pace is known to fail, and how to choose q_start so that it does not.

At the start each class has a probability of about 1/C, and the gradient of (1 - p_y^q) / q is p_y^q times that of
cross-entropy: about C^(-q). With C = 1000 and q = 0.6 that is 1/63 of what the learning rate of cross-entropy is meant
for, and as q grows it gets less. If SGD has not learnt anything by the time that q passes 1, it never will: only the
entropy term is left, which pulls all samples to one class. GCE fails in the same way.

The rule for SGD: choose q_start so that C^(-q_start) stays above about 1/5, which is q_start <= ln 5 / ln C, and a
learning rate up to C^q_start times that of cross-entropy:

    classes    10    50    100   1000
    q_start   0.70  0.41  0.35  0.23

The authors take 0.6 with 10 and 100 classes and 0.4 with 50, so it errs on the safe side. AdamW, which takes the scale
out of the gradient, needs neither, and the pace "auto" cannot fail so: it holds q below q_end times the confidence of
the network. A test of dal_kernels.training shows stall and cures on 1000 classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Arrival", "mean_and_most", "stall_message"]


def stall_message(target_prob: float, q: float, classes: int) -> str | None:
    """What to do if a mean p_y is still about 1/C once q has passed 1; None if all is well, or unknown (NaN).

    "About" is below 4/C, and with few classes, where wrong labels alone keep the mean low, below 1/C + 0.02.
    """
    if not (q > 1 and target_prob < min(4 / classes, 1 / classes + 0.02)):
        return None
    return (
        f"training has stalled: q has passed 1 (it is {q:.2f}), and the mean probability of the labels is still "
        f"{target_prob:.2g}, where chance is {1 / classes:.2g}; take pace='auto', which follows what is learnt, lower "
        "q_start (0.2 to 0.4 with many classes), raise the learning rate or the epochs, or take AdamW"
    )


def mean_and_most(target_prob: Tensor) -> Tensor:
    """(2,): the mean p_y of a batch and how large, by two standard errors, that of all rows may be.

    Rows without p_y, which are NaN, do not count. NaN where fewer than two rows do.
    """
    prob = target_prob.flatten()
    counted = ~prob.isnan()
    count = counted.sum()
    mean = torch.where(counted, prob, 0.0).sum() / count
    variance = torch.where(counted, prob - mean, 0.0).square().sum() / (count - 1)
    return torch.stack([mean, mean + 2.0 * (variance / count).sqrt()])


class Arrival:
    """Numbers on their way from a CPU or a CUDA device to the host. Nothing waits for them."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._event = numbers, None
        if numbers.is_cuda:
            # Into pinned memory, because only there a copy lets the host go on.
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))

    def look(self) -> list[float] | None:
        """The numbers, or None while they are on their way."""
        if self._event is not None and not self._event.query():
            return None
        numbers: list[float] = self._numbers.tolist()
        return numbers
