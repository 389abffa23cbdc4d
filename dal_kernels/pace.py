"""What a network has learnt, and how far its exponent may go for it: numbers on the device, never read by the host.

Two exponential averages over the training calls, of what the pass knows of its rows anyway:

    confidence c = mean of the largest probability,    agreement a = share of the rows whose prediction is their label.

A classifier that is right about clean labels agrees with them as often as it is confident (a = c: it is calibrated).
Where labels are wrong and it does not follow them, it is confident and they disagree, so

    1 - a / c, at least 0,

estimates the share of wrong labels. The exponent is that of the authors' schedule at the time, q_t, but at most

    q = q_end c (1/5 + 15 (1 - a / c - 0.12 q)), the bracket from 1/5 to 1,

which is small while the network is unsure of most rows, so that rows not learnt yet still pull: their gradient is p_y^q
times cross-entropy's. It is a fifth of q_end while hardly a label seems wrong, and no bound where a fifth of them does
and the network is sure. A share of 0.12 q is let pass, because a robust loss makes a network surer than it is right, of
clean labels too and the more so the larger q is, and a surer network would have a larger q. The bootstrap weight is
that of the authors at the same q, (q - 1) / (q_end - 1), from 0 to 1, times the largest that is asked for.

A long training opens with q_start, as the authors have it, and leaves it between 15 and 30 % of its steps,
because what is memorised there with a small q stays memorised. With more than ten classes it opens with less, so that a
row of the mean confidence pulls as it would with ten: c^q = 10^(-q_start).

Where most labels are wrong, the network stays unsure because of them, and calibrated: none seems wrong until all are
memorised. Therefore q is at least the same q_start times the doubt

    clamp(n / 700) clamp((c - 0.1) / 0.1) clamp((0.6 - c) / 0.2) clamp((1.3 - a / c) / 0.3), each from 0 to 1:

with n the training calls so far. In doubt c is above a guess and below a half or so, and predictions are hardly more
often right than sure, which tells wrong labels from a network that is only slow, as with a small learning rate: a slow
one finds the right class long before it is sure of it (a / c of 2 to 4), and q_start would stop it. The first calls do
not count in full, because a fast network passes these confidences within a hundred.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dal_kernels.arguments import RowStats

# What an average keeps of itself from call to call: it forgets a call in about twenty others.
DECAY = 0.95
# The bracket of the rule is LEAST while no label seems wrong, and grows by SLOPE with the share that does, of which
# TOLERATED times q is let pass.
LEAST, SLOPE, TOLERATED = 0.2, 15.0, 0.12
# Where both averages start: not at 0, because 0 / 0 is no ratio, but so low that q starts near 0, with cross-entropy.
NOTHING_LEARNT = 1e-6
LOG_TEN = math.log(10.0)
# The doubt rises over so many CALLS, from nothing where the confidence is FROM, within RISE, and falls to nothing where
# it is TO, within FALL. Where the agreement is SLOW times the confidence it is nothing, and within SLOWNESS below less.
CALLS, FROM, RISE, TO, FALL, SLOW, SLOWNESS = 700.0, 0.1, 0.1, 0.6, 0.2, 1.3, 0.3


class PaceNumbers(NamedTuple):
    """Float32 numbers on one device, views of one tensor, changed in place.

    Attributes:
        knobs: (2,): q and the bootstrap weight, as the kernels read them.
        q, bootstrap_weight: the same, 0-d.
        averages: (2,): confidence and agreement.
        learnt: (3,): the same, and the calls that they are of.
        confidence, agreement, calls: the same, 0-d.
        bound: 0-d, q of the authors' schedule.
        q_start: 0-d, what q is at least in the opening of a training, and in doubt.
        opening: 0-d, 1 while a training opens, then less and less, then 0.
        all: (8,) of all.
    """

    knobs: Tensor
    q: Tensor
    bootstrap_weight: Tensor
    averages: Tensor
    learnt: Tensor
    confidence: Tensor
    agreement: Tensor
    calls: Tensor
    bound: Tensor
    q_start: Tensor
    opening: Tensor
    all: Tensor

    @classmethod
    def of(cls, numbers: Tensor) -> PaceNumbers:
        """Views of eight numbers."""
        q, bootstrap_weight, confidence, agreement, calls, bound, q_start, opening = numbers.unbind()
        knobs, averages, learnt = numbers[:2], numbers[2:4], numbers[2:5]
        views = (knobs, q, bootstrap_weight, averages, learnt, confidence, agreement, calls, bound, q_start, opening)
        return cls(*views, numbers)


def pace_numbers(device: torch.device) -> PaceNumbers:
    """Of a network that has learnt nothing, with a bound of 0."""
    # Tensors made in inference mode could not be changed outside of it.
    with torch.inference_mode(False):
        made = PaceNumbers.of(torch.zeros(8, dtype=torch.float32, device=device))
        made.averages.fill_(NOTHING_LEARNT)
        return made


def rows_apart(rows: int) -> int:
    """How far apart the rows of a call lie that are looked at, of which 8192 are enough for an average.

    An odd number, because rows are often the places of images, whose sides are even: columns would be left out.
    """
    return 2 * (rows // 8192) + 1


def see(pace: PaceNumbers, stats: RowStats, target: Tensor, q_end: float, max_weight: float) -> None:
    """Take the rows of one training call into account, in place, by plain operations.

    Args:
        target: as given to the loss: class indices shaped like the statistics, or probabilities for each class.
    """
    counted = ~stats.target_prob.isnan()  # ignored rows are, and rows with a NaN among their logits
    if target.shape == stats.prediction.shape:
        agrees = (stats.prediction == target).to(torch.float32)
    else:
        place = int(target.dim() > 1)
        agrees = target.gather(place, stats.prediction.unsqueeze(place)).squeeze(place).to(torch.float32)
    every = rows_apart(counted.numel())
    counted = counted.flatten()[::every]
    rows = torch.stack([stats.max_prob.to(torch.float32), agrees]).flatten(1)[:, ::every]
    rows = torch.where(counted, rows, 0.0)
    number = counted.sum()
    # A call without rows leaves the averages where they are.
    weight = torch.where(number > 0, 1.0 - DECAY, 0.0)
    pace.averages.lerp_(rows.sum(1) / number.clamp(min=1), weight)
    pace.calls.add_(number > 0)
    keep_pace(pace, q_end, max_weight)


def doubt(confidence: Tensor, agreement: Tensor, calls: Tensor) -> Tensor:
    """How far a network is unsure because of its labels, () from 0 to 1."""
    unsure = ((confidence - FROM) / RISE).clamp(0.0, 1.0) * ((TO - confidence) / FALL).clamp(0.0, 1.0)
    unsure = unsure * (calls / CALLS).clamp(max=1.0)
    return unsure * ((SLOW - agreement / confidence) / SLOWNESS).clamp(0.0, 1.0)


def keep_pace(pace: PaceNumbers, q_end: float, max_weight: float) -> None:
    """q and the bootstrap weight from what has been learnt and from the bound, in place, by plain operations."""
    reach = q_end * pace.confidence
    # q stands on both sides of the rule, because what is let pass depends on it, so the rule is solved for q.
    bracket = LEAST + SLOPE * (1.0 - pace.agreement / pace.confidence)
    free = (reach * bracket / (1.0 + SLOPE * TOLERATED * reach)).clamp(LEAST * reach, reach)
    least = pace.q_start * torch.maximum(pace.opening, doubt(pace.confidence, pace.agreement, pace.calls))
    least = least / (-pace.confidence.log() / LOG_TEN).clamp(min=1.0)
    torch.minimum(pace.bound, torch.maximum(least, free), out=pace.q)
    if q_end > 1.0:
        torch.mul(((pace.q - 1.0) / (q_end - 1.0)).clamp(0.0, 1.0), max_weight, out=pace.bootstrap_weight)
    else:
        pace.bootstrap_weight.zero_()
