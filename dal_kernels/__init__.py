"""Training with noisy labels: the Dynamics-Aware Loss (arXiv 2303.11562) in fused kernels.

>>> import torch
>>> from dal_kernels import DynamicsAwareLoss
>>> criterion = DynamicsAwareLoss(total_steps=100)  # epochs
>>> logits = torch.randn(8, 10, requires_grad=True)
>>> criterion(logits, torch.randint(10, (8,))).backward()
>>> criterion.step()  # once an epoch
"""

from dal_kernels import noise, reference
from dal_kernels._version import __version__
from dal_kernels.arguments import RowStats
from dal_kernels.backends.choose import available_backends
from dal_kernels.class_parallel_linear import ClassParallelLinear
from dal_kernels.forms import LinearLoss, linear_loss
from dal_kernels.language_models import apply_to
from dal_kernels.linear import linear_dynamics_aware_loss
from dal_kernels.linear_dynamics_aware import LinearDynamicsAwareLoss
from dal_kernels.linear_quantities import linear_row_statistics
from dal_kernels.loss import DynamicsAwareLoss
from dal_kernels.losses import (
    ActivePassiveLoss,
    AsymmetricExponentialLoss,
    AsymmetricGeneralizedCrossEntropyLoss,
    AsymmetricUnhingedLoss,
    BrierLoss,
    CrossEntropyLoss,
    EpsilonSoftmaxLoss,
    FisherRaoLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    JensenShannonLoss,
    JointAsymmetricLoss,
    LabelDistributionAwareMarginLoss,
    MeanAbsoluteErrorLoss,
    NormalizedCrossEntropyLoss,
    PartiallyHuberisedCrossEntropyLoss,
    ReverseCrossEntropyLoss,
    SymmetricCrossEntropyLoss,
    TaylorCrossEntropyLoss,
    active_passive_loss,
    asymmetric_exponential_loss,
    asymmetric_generalized_cross_entropy_loss,
    asymmetric_unhinged_loss,
    brier_loss,
    cross_entropy_loss,
    epsilon_softmax_loss,
    fisher_rao_loss,
    focal_loss,
    generalized_cross_entropy_loss,
    jensen_shannon_loss,
    joint_asymmetric_loss,
    label_distribution_aware_margin_loss,
    mean_absolute_error_loss,
    normalized_cross_entropy_loss,
    partially_huberised_cross_entropy_loss,
    reverse_cross_entropy_loss,
    symmetric_cross_entropy_loss,
    taylor_cross_entropy_loss,
)
from dal_kernels.losses.dynamics_aware import dynamics_aware_loss
from dal_kernels.losses.ramp import Ramp
from dal_kernels.quantities import RowStatistics, row_statistics
from dal_kernels.schedule import DynamicsAwareSchedule
from dal_kernels.self_paced import SelfPacedSchedule
from dal_kernels.watch import ScheduleWarning

__all__ = [
    "ActivePassiveLoss",
    "AsymmetricExponentialLoss",
    "AsymmetricGeneralizedCrossEntropyLoss",
    "AsymmetricUnhingedLoss",
    "BrierLoss",
    "ClassParallelLinear",
    "CrossEntropyLoss",
    "DynamicsAwareLoss",
    "DynamicsAwareSchedule",
    "EpsilonSoftmaxLoss",
    "FisherRaoLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "JensenShannonLoss",
    "JointAsymmetricLoss",
    "LabelDistributionAwareMarginLoss",
    "LinearDynamicsAwareLoss",
    "LinearLoss",
    "MeanAbsoluteErrorLoss",
    "NormalizedCrossEntropyLoss",
    "PartiallyHuberisedCrossEntropyLoss",
    "Ramp",
    "ReverseCrossEntropyLoss",
    "RowStatistics",
    "RowStats",
    "ScheduleWarning",
    "SelfPacedSchedule",
    "SymmetricCrossEntropyLoss",
    "TaylorCrossEntropyLoss",
    "__version__",
    "active_passive_loss",
    "apply_to",
    "asymmetric_exponential_loss",
    "asymmetric_generalized_cross_entropy_loss",
    "asymmetric_unhinged_loss",
    "available_backends",
    "brier_loss",
    "cross_entropy_loss",
    "dynamics_aware_loss",
    "epsilon_softmax_loss",
    "fisher_rao_loss",
    "focal_loss",
    "generalized_cross_entropy_loss",
    "jensen_shannon_loss",
    "joint_asymmetric_loss",
    "label_distribution_aware_margin_loss",
    "linear_dynamics_aware_loss",
    "linear_loss",
    "linear_row_statistics",
    "mean_absolute_error_loss",
    "noise",
    "normalized_cross_entropy_loss",
    "partially_huberised_cross_entropy_loss",
    "reference",
    "reverse_cross_entropy_loss",
    "row_statistics",
    "symmetric_cross_entropy_loss",
    "taylor_cross_entropy_loss",
]
