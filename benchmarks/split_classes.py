"""A classifier whose classes are split over processes, trained with the Dynamics-Aware Loss.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.split_classes

Each process holds a slice of the classifier; the feature extractor is the same in all. With a GPU for each process NCCL
and the GPUs are used, else gloo and the CPU.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn

from dal_kernels import DynamicsAwareSchedule
from dal_kernels.distributed import class_parallel_linear_dynamics_aware_loss


def train(classes: int, epochs: int, device: torch.device) -> float:
    """The accuracy on the training set, of which a fifth has wrong labels."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same data and the same extractor everywhere
    centres = torch.randn(classes, 32, device=device)
    truth = torch.randint(classes, (1024,), device=device)
    inputs = centres[truth] + 0.5 * torch.randn(1024, 32, device=device)
    labels = torch.where(torch.rand(1024, device=device) < 0.2, torch.randint_like(truth, classes), truth)
    extractor = nn.Sequential(nn.Linear(32, 64), nn.ReLU()).to(device)

    first, last = classes * rank // world, classes * (rank + 1) // world
    torch.manual_seed(1 + rank)
    head = nn.Linear(64, last - first).to(device)

    optimizer = torch.optim.AdamW([*extractor.parameters(), *head.parameters()], lr=3e-3)
    schedule = DynamicsAwareSchedule(0.2, 1.5, epochs)
    for _ in range(epochs):
        for batch in torch.arange(1024, device=device).split(128):
            loss = class_parallel_linear_dynamics_aware_loss(
                extractor(inputs[batch]),
                head.weight,
                labels[batch],
                schedule.q,
                schedule.bootstrap_weight,
                bias=head.bias,
                class_offset=first,
                num_classes=classes,
            )
            optimizer.zero_grad()
            # The gradient that the extractor gets is that of all classes: it stays the same everywhere.
            loss.backward()
            optimizer.step()
        schedule.step()

    with torch.no_grad():
        best, predicted = head(extractor(inputs)).max(1)
        every = [torch.empty_like(best) for _ in range(world)]
        dist.all_gather(every, best)
        mine = torch.stack(every).argmax(0) == rank
        right = (mine & (predicted + first == truth)).sum()
        dist.all_reduce(right)
    return right.item() / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=101)
    parser.add_argument("--epochs", type=int, default=15)
    arguments = parser.parse_args()
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        accuracy = train(arguments.classes, arguments.epochs, device)
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} processes, {arguments.classes} classes: training accuracy {accuracy:.1%}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
