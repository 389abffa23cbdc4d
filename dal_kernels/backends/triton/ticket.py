"""The counter by which the programs of a launch learn which of them is the last."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.runtime import driver

from dal_kernels.backends.triton.record import keep

_DEFAULT_STREAM = 0
# By device: kept, because each launch leaves its ticket at 0, and the next one on the stream starts after it.
_kept: dict[int, Tensor] = {}


def ticket_for(logits: Tensor) -> Tensor:
    """An int32 that is 0 when the next launch on the current stream starts, and that the launch leaves at 0.

    Kept for the default stream alone. Any other may be captured in a graph, which must own its ticket because its
    replays may run on any stream; or it is the one on which torch.compile runs once before it captures, where all new
    memory comes from the graph's pool and nothing may outlive the call. On a CPU an executor that stops half-way would
    leave a ticket that is not 0; a record of the call has one of its own, because there is one thread.
    """
    device = logits.device.index
    if not logits.is_cuda:
        return keep(_new(logits))
    if driver.active.get_current_stream(device) != _DEFAULT_STREAM:
        return _new(logits)
    if device not in _kept:
        _kept[device] = _new(logits)
    return keep(_kept[device])


def _new(logits: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=logits.device)
