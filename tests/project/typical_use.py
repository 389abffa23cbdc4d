"""Code as users write it, for type checkers to read (make lint): every line must be accepted, and the marked refused.

``assert_type`` says what a call is known to give. It is run too, by test_types.py: what is typed must also be true.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from dal_kernels import (
    DynamicsAwareLoss,
    DynamicsAwareSchedule,
    LinearDynamicsAwareLoss,
    RowStats,
    SelfPacedSchedule,
    active_passive_loss,
    available_backends,
    cross_entropy_loss,
    dynamics_aware_loss,
    generalized_cross_entropy_loss,
    label_distribution_aware_margin_loss,
    linear_dynamics_aware_loss,
    reference,
)
from dal_kernels.distributed import class_parallel_dynamics_aware_loss, class_parallel_linear_dynamics_aware_loss


def functions(logits: Tensor, target: Tensor, stats_too: bool) -> None:
    q, class_weight = torch.tensor(0.7), torch.ones(logits.shape[1])
    assert_type(dynamics_aware_loss(logits, target, 0.7), Tensor)
    assert_type(dynamics_aware_loss(logits, target, q, 0.5, weight=class_weight, reduction="sum"), Tensor)
    assert_type(dynamics_aware_loss(logits, target, q, return_stats=True), tuple[Tensor, RowStats])
    assert_type(dynamics_aware_loss(logits, target, q, return_stats=stats_too), Tensor | tuple[Tensor, RowStats])
    assert_type(dynamics_aware_loss(logits, target, 1, sample_weight=torch.ones(len(target)), bootstrap="hard"), Tensor)
    assert_type(reference.dynamics_aware_loss(logits, target, 0.7, official=True), Tensor)
    loss, stats = dynamics_aware_loss(logits, target, q, return_stats=True, backend="eager")
    assert_type(loss, Tensor)
    assert_type(stats.target_prob, Tensor)
    assert_type(available_backends(), dict[str, str])


def family(logits: Tensor, target: Tensor, stats_too: bool) -> None:
    assert_type(generalized_cross_entropy_loss(logits, target), Tensor)
    assert_type(generalized_cross_entropy_loss(logits, target, 0.5, return_stats=True), tuple[Tensor, RowStats])
    either = cross_entropy_loss(logits, target, label_smoothing=0.1, return_stats=stats_too)
    assert_type(either, Tensor | tuple[Tensor, RowStats])
    loss, stats = active_passive_loss(logits, target, "nce", "rce", return_stats=True, reduction="sum", scale=2.0)
    assert_type(loss, Tensor)
    assert_type(stats.entropy, Tensor)
    assert_type(label_distribution_aware_margin_loss(logits, target, [1.0] * logits.shape[1]), Tensor)


def linear(features: Tensor, layer: nn.Linear, target: Tensor, stats_too: bool) -> None:
    assert_type(linear_dynamics_aware_loss(features, layer.weight, target, 0.7, bias=layer.bias), Tensor)
    call = linear_dynamics_aware_loss(features, layer.weight, target, 0.7, return_stats=True, chunk_bytes=1 << 20)
    assert_type(call, tuple[Tensor, RowStats])
    either = linear_dynamics_aware_loss(features, layer.weight, target, 0.7, return_stats=stats_too)
    assert_type(either, Tensor | tuple[Tensor, RowStats])


def class_parallel(local_logits: Tensor, features: Tensor, local_weight: Tensor, target: Tensor) -> None:
    assert_type(class_parallel_dynamics_aware_loss(local_logits, target, 0.7), Tensor)
    _, stats = class_parallel_dynamics_aware_loss(local_logits, target, 0.7, return_stats=True)
    assert_type(stats, RowStats)
    assert_type(class_parallel_linear_dynamics_aware_loss(features, local_weight, target, 0.7, 0.1), Tensor)


def training(model: nn.Module, batches: list[tuple[Tensor, Tensor]], epochs: int) -> float:
    criterion = DynamicsAwareLoss(total_steps=epochs, weight=None, reduction="mean")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.zeros(())
    for _ in range(epochs):
        for images, labels in batches:
            loss = criterion(model(images), labels)
            loss.backward()
            optimiser.step()
        criterion.step()
    assert_type(criterion.q, Tensor)
    assert_type(criterion.schedule, DynamicsAwareSchedule)
    assert_type(criterion.schedule.at(0.5), tuple[float, float])
    return loss.item()


def layer_form(features: Tensor, target: Tensor) -> Tensor:
    schedule = SelfPacedSchedule(0.6, 1.5, 5, warmup_steps=1, shape="cosine", max_bootstrap_weight=0.5)
    criterion = LinearDynamicsAwareLoss(features.shape[1], 10, schedule=schedule, reduction="none", bias=False)
    assert_type(criterion.classifier, nn.Linear)
    criterion(features, target).sum().backward()
    return criterion.classifier(features)


def mistakes(logits: Tensor, target: Tensor, anything: str) -> None:
    """What a type checker must refuse, or it would be met in training."""
    DynamicsAwareLoss()  # type: ignore[call-overload]  # pyright: ignore
    DynamicsAwareLoss(total_steps=9, schedule=DynamicsAwareSchedule(0.6, 1.5, 9))  # type: ignore[call-overload]  # pyright: ignore
    DynamicsAwareLoss(total_steps=9, reduction="avg")  # type: ignore[call-overload]  # pyright: ignore
    DynamicsAwareLoss(torch.ones(3), total_steps=9)  # type: ignore[call-overload]  # pyright: ignore
    DynamicsAwareLoss(total_steps=9, weight=[1.0])  # type: ignore[call-overload]  # pyright: ignore
    dynamics_aware_loss(logits, target, 0.7, backend=anything)  # type: ignore[call-overload]  # pyright: ignore
    dynamics_aware_loss(logits, target, "0.7")  # type: ignore[call-overload]  # pyright: ignore
    generalized_cross_entropy_loss(logits, target, q="0.7")  # type: ignore[call-overload]  # pyright: ignore
    cross_entropy_loss(logits, target, reduction="avg")  # type: ignore[call-overload]  # pyright: ignore
