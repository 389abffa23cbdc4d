"""What ranks tell each other of their slices of the classes: which they have, and the statistics of their rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dal_kernels.arguments import Call
from dal_kernels.collectives import Group, gather_into, objects_of_ranks, raise_everywhere
from dal_kernels.fields import loss_dtype
from dal_kernels.slices import Statistics, merge


class Slice(NamedTuple):
    """Which classes this rank has, of how many."""

    offset: int
    size: int
    classes: int
    group: Group


def slice_of(
    size: int, target: Tensor, device: torch.device, class_offset: int | None, num_classes: int | None, group: Group
) -> Slice:
    """This rank's slice: as the arguments say, or found by a small all-gather. Raises as the public functions say."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group must be of an initialised torch.distributed, got none: call init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError("group must be one that this rank belongs to, got one that it does not")
    if (class_offset is None) != (num_classes is None):
        raise ValueError(
            f"class_offset and num_classes must be given both or not at all, got {class_offset} and {num_classes}"
        )
    if class_offset is not None and num_classes is not None:
        for name, value in (("class_offset", class_offset), ("num_classes", num_classes)):
            if type(value) is not int:
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not 0 <= class_offset <= class_offset + size <= num_classes < 2**31:
            raise ValueError(
                f"class_offset must be such that {size} classes from it on are within num_classes, at most 2**31 - 1; "
                f"got {class_offset} and {num_classes}"
            )
        return Slice(class_offset, size, num_classes, group)
    rows = target.numel() if isinstance(target, Tensor) else -1
    header = torch.tensor([size, rows], dtype=torch.int64, device=device)
    headers = header.new_empty((dist.get_world_size(group), 2))
    gather_into(headers.view(-1), header, group)
    sizes, counts = headers.t().tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"target must have as many labels on every rank, got {counts} in the order of the ranks")
    classes = sum(sizes)
    if not 0 < classes < 2**31:
        raise ValueError(f"local_logits must be slices of 1 to 2**31 - 1 classes together, got {sizes}")
    return Slice(sum(sizes[: dist.get_rank(group)]), size, classes, group)


# Modulus of checksums, a prime, and rows that are summed up at a time.
_PRIME, _ROWS = 2147483629, 1 << 20


def _places(begin: int, count: int, device: torch.device) -> Tensor:
    """What rows in their order are multiplied by."""
    return 2654435761 * torch.arange(1 + begin, 1 + begin + count, device=device)


def _checksum(values: Tensor) -> Tensor:
    """Of the bits of values (N, D) and the order of rows: int64, the same whatever the number of threads."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for chunk, part in enumerate(values.contiguous().view(integers).split(_ROWS)):
        of_rows = part.sum(1, dtype=torch.int64) % _PRIME
        total = (total + (of_rows * (_places(chunk * _ROWS, len(part), part.device) % _PRIME) % _PRIME).sum()) % _PRIME
    return total


def _checksum_of_labels(call: Call) -> Tensor:
    """Of the labels and the class weights that all ranks must have the same."""
    labels = ((call.target + 1) * _places(0, len(call.target), call.target.device)).sum() % _PRIME
    return labels if call.weight is None else (labels + 1 + _checksum(call.weight.unsqueeze(1))) % _PRIME


def exchange(
    call: Call,
    local: Statistics,
    target_logit: Tensor,
    own: Slice,
    features: Tensor | None = None,
    problem: Exception | None = None,
) -> tuple[Statistics, Tensor]:
    """Statistics of whole rows and z_y, by one all-gather of floats (1 + N, 4 to 7) a rank; with features (2 + N, ...).

    m, S, z_y, then W where the objective or the statistics need it, then D and P of a wide objective, then the argmax
    (an integer's bits) where it is asked for. The first row is integers: offset, size and classes of the slice, and a
    sum over the labels and class weights; the second, with features, a sum over their bits.

    Args:
        problem: what is wrong with the labels of this rank, to be raised on all where looking is free: it is told in
            the place of the sum over them.
    """
    count, dtype = len(call.target), loss_dtype(call.logits)
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    want_weighted = call.want_stats or "entropy" in call.objective.uses
    sent = {"peak": local.peak, "total": local.total, "target_logit": target_logit}
    if want_weighted or not call.want_prediction:  # the first row takes four places
        sent["weighted"] = local.weighted
    if local.differences is not None and local.squares is not None:
        sent |= {"differences": local.differences, "squares": local.squares}
    width = len(sent) + call.want_prediction
    head = 1 if features is None else 2
    payload = local.peak.new_zeros((head + count, width), dtype=dtype)
    payload[head:, : len(sent)] = torch.stack([column.to(dtype) for column in sent.values()], 1)
    integers = payload.view(integer)
    if call.want_prediction:
        integers[head:, -1] = (local.argmax + own.offset).to(integer)
    for column, value in enumerate((own.offset, own.size, own.classes)):
        integers[0, column] = value  # a fill each: a copy from the host would wait for the device
    integers[0, 3] = _checksum_of_labels(call).to(integer) if problem is None else -1
    if features is not None:
        integers[1, 0] = _checksum(features).to(integer)
    world = dist.get_world_size(own.group)
    gathered = payload.new_full((world, head + count, width), torch.nan)  # what never arrives is no statistic
    gather_into(gathered.view(world * (head + count), width), payload, own.group)
    header, of_slices = gathered.view(integer)[:, :head].long(), gathered[:, head:]
    of_features = torch.zeros_like(header[:, 0, 0]) if features is None else header[:, 1, 0]
    if call.logits.is_cpu and bool((header[:, 0, 3] < 0).any()):
        raise_everywhere(problem, own.group)
    agree = agreement(torch.cat([header[:, 0, :4], of_features.unsqueeze(1)], 1), call.logits.is_cpu, call, own.group)
    found = {name: of_slices[..., place].double() for place, name in enumerate(sent)}
    z = found.pop("target_logit")
    nothing = torch.zeros_like(z)
    argmax = gathered.view(integer)[:, head:, -1].long() if call.want_prediction else nothing.long()
    slices = Statistics(**{"weighted": nothing} | found, argmax=argmax, classes=header[:, 0, 1:2].double())
    owner = (call.target.unsqueeze(0) >= header[:, 0, :1] + header[:, 0, 1:2]).sum(0).clamp_max(world - 1)
    row_statistics = merge(slices)
    total = torch.where(agree, row_statistics.total, torch.nan)
    return row_statistics._replace(total=total), z.gather(0, owner.unsqueeze(0)).squeeze(0)


def agreement(header: Tensor, look: bool, call: Call, group: Group) -> Tensor:
    """Whether the slices follow each other, and the rest is the same; with ``look``, where that is free, raises if not.

    Args:
        header: (R, 5), of a slice its offset, its size, the number of all classes, and sums over labels and class
            weights, and over features.
    """
    offset, size, classes, labels, features = header.t()
    follows = (offset == size.cumsum(0) - size).all() & (size.sum() == classes).all()
    same, alike = (labels == labels[0]).all(), (features == features[0]).all()
    if look and not bool(follows):
        raise ValueError(
            "class_offset and num_classes must be those of slices that follow each other in the order of the ranks and "
            f"make up all classes, got offsets {offset.tolist()}, sizes {size.tolist()}, classes {classes.tolist()}"
        )
    if look and not bool(same):
        weights = -1 if call.weight is None else int(_checksum(call.weight.unsqueeze(1)))
        if len(set(objects_of_ranks(weights, group))) > 1:
            raise ValueError("weight must be the same on every rank of the group, got class weights that differ")
        raise ValueError("target must be the same on every rank of the group, got labels that differ")
    if look and not bool(alike):
        raise ValueError("input must be the same on every rank of the group, got features that differ")
    return follows & same & alike
