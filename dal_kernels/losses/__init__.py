"""The losses of the family, each as a function and as a module."""

from dal_kernels.losses.active_passive import ActivePassiveLoss, active_passive_loss
from dal_kernels.losses.asymmetric import (
    AsymmetricExponentialLoss,
    AsymmetricGeneralizedCrossEntropyLoss,
    AsymmetricUnhingedLoss,
    asymmetric_exponential_loss,
    asymmetric_generalized_cross_entropy_loss,
    asymmetric_unhinged_loss,
)
from dal_kernels.losses.cross_entropy import CrossEntropyLoss, FocalLoss, cross_entropy_loss, focal_loss
from dal_kernels.losses.divergences import (
    EpsilonSoftmaxLoss,
    FisherRaoLoss,
    JensenShannonLoss,
    PartiallyHuberisedCrossEntropyLoss,
    epsilon_softmax_loss,
    fisher_rao_loss,
    jensen_shannon_loss,
    partially_huberised_cross_entropy_loss,
)
from dal_kernels.losses.generalized import (
    GeneralizedCrossEntropyLoss,
    TaylorCrossEntropyLoss,
    generalized_cross_entropy_loss,
    taylor_cross_entropy_loss,
)
from dal_kernels.losses.margins import LabelDistributionAwareMarginLoss, label_distribution_aware_margin_loss
from dal_kernels.losses.sums import (
    BrierLoss,
    JointAsymmetricLoss,
    NormalizedCrossEntropyLoss,
    brier_loss,
    joint_asymmetric_loss,
    normalized_cross_entropy_loss,
)
from dal_kernels.losses.symmetric import (
    MeanAbsoluteErrorLoss,
    ReverseCrossEntropyLoss,
    SymmetricCrossEntropyLoss,
    mean_absolute_error_loss,
    reverse_cross_entropy_loss,
    symmetric_cross_entropy_loss,
)

__all__ = [
    "ActivePassiveLoss",
    "AsymmetricExponentialLoss",
    "AsymmetricGeneralizedCrossEntropyLoss",
    "AsymmetricUnhingedLoss",
    "BrierLoss",
    "CrossEntropyLoss",
    "EpsilonSoftmaxLoss",
    "FisherRaoLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "JensenShannonLoss",
    "JointAsymmetricLoss",
    "LabelDistributionAwareMarginLoss",
    "MeanAbsoluteErrorLoss",
    "NormalizedCrossEntropyLoss",
    "PartiallyHuberisedCrossEntropyLoss",
    "ReverseCrossEntropyLoss",
    "SymmetricCrossEntropyLoss",
    "TaylorCrossEntropyLoss",
    "active_passive_loss",
    "asymmetric_exponential_loss",
    "asymmetric_generalized_cross_entropy_loss",
    "asymmetric_unhinged_loss",
    "brier_loss",
    "cross_entropy_loss",
    "epsilon_softmax_loss",
    "fisher_rao_loss",
    "focal_loss",
    "generalized_cross_entropy_loss",
    "jensen_shannon_loss",
    "joint_asymmetric_loss",
    "label_distribution_aware_margin_loss",
    "mean_absolute_error_loss",
    "normalized_cross_entropy_loss",
    "partially_huberised_cross_entropy_loss",
    "reverse_cross_entropy_loss",
    "symmetric_cross_entropy_loss",
    "taylor_cross_entropy_loss",
]
