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
out of the gradient, needs neither. The test of this name shows all three on 1000 classes.
"""

from __future__ import annotations

__all__ = ["StalledTrainingWarning", "stall_message"]


class StalledTrainingWarning(UserWarning):
    """q has passed 1 and the network has learnt next to nothing: it will end at chance."""


def stall_message(target_prob: float, q: float, classes: int) -> str | None:
    """What to do if an epoch's mean p_y is still about 1/C once q has passed 1; None if all is well, or unknown.

    "About" is below 4/C, and with few classes, where wrong labels alone keep the mean low, below 1/C + 0.02.
    """
    if not (q > 1 and target_prob < min(4 / classes, 1 / classes + 0.02)):
        return None
    return (
        f"training has stalled: q has passed 1 (it is {q:.2f}), and the mean probability of the labels is still "
        f"{target_prob:.2g}, where chance is {1 / classes:.2g}; take the pace that follows what is learnt (the loss "
        "dal), lower q_start (0.2 to 0.4 with many classes), raise the learning rate or the epochs, or take the "
        "optimizer adamw"
    )
