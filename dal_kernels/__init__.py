"""Training with noisy labels: the Dynamics-Aware Loss (arXiv 2303.11562) in fused kernels.

>>> import torch
>>> from dal_kernels import DynamicsAwareLoss
>>> criterion = DynamicsAwareLoss(total_steps=100)  # epochs
>>> logits = torch.randn(8, 10, requires_grad=True)
>>> criterion(logits, torch.randint(10, (8,))).backward()
>>> criterion.step()  # once an epoch
"""

from dal_kernels import reference
from dal_kernels._version import __version__
from dal_kernels.arguments import RowStats
from dal_kernels.backends.choose import available_backends
from dal_kernels.functional import dynamics_aware_loss
from dal_kernels.linear import linear_dynamics_aware_loss
from dal_kernels.linear_loss import LinearDynamicsAwareLoss
from dal_kernels.loss import DynamicsAwareLoss
from dal_kernels.schedule import DynamicsAwareSchedule

__all__ = [
    "DynamicsAwareLoss",
    "DynamicsAwareSchedule",
    "LinearDynamicsAwareLoss",
    "RowStats",
    "__version__",
    "available_backends",
    "dynamics_aware_loss",
    "linear_dynamics_aware_loss",
    "reference",
]
