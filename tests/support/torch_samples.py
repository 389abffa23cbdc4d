"""cross_entropy_loss on all samples that torch tests its own by; prints how many there were."""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

from dal_kernels import cross_entropy_loss


def check(backend: str) -> int:
    (info,) = (info for info in op_db if info.name == "nn.functional.cross_entropy")
    seen = 0
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        logits, (target,), options = sample.input, sample.args, dict(sample.kwargs)
        target = target.detach()
        expected = F.cross_entropy(logits, target, **options)
        found = cross_entropy_loss(logits, target, backend=backend, **options)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
        gradients = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (found, expected))
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10, equal_nan=True)
        seen += 1
    return seen


if __name__ == "__main__":
    print(check(sys.argv[1]))
