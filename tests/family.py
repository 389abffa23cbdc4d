"""Knobs to try each loss of the family with, by the name of its objective."""

from __future__ import annotations

KNOBS: dict[str, tuple[float, ...]] = {
    "dynamics_aware": (1.2, 0.4),
    "dynamics_aware_hard": (1.2, 0.4),
    "generalized_cross_entropy": (0.7,),
    "symmetric_cross_entropy": (0.1, 9.2),
    "taylor_cross_entropy": (4,),
    "asymmetric_generalized_cross_entropy": (0.6, 0.6),
    "asymmetric_unhinged": (5.5, 3.0),
    "asymmetric_exponential": (2.5,),
    "jensen_shannon": (0.5,),
    "fisher_rao": (),
    "focal": (2.0,),
    "focal_detached": (2.0,),
    "partially_huberised_cross_entropy": (10.0,),
    "smoothed_cross_entropy": (0.1,),
    "normalized_and_absolute": (1.0, 2.0),
    "normalized_and_asymmetric": (1.0, 4.0, 0.6, 0.6),
    "joint_asymmetric": (1.0, 1.0, 30.0),
    "brier": (),
    "epsilon_softmax": (1e4, 1.0, 0.5),
}
