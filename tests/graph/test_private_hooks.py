"""Without any one of torch's private functions that the package asks: slower or an error, never a wrong gradient."""

from __future__ import annotations

import re

import pytest

from support.children import ROOT, printed_by

# By the name that `getattr` takes: where it lies, and whether it is asked at each call (else once, at import).
HOOKS = {
    "is_legacy_batchedtensor": ("torch._C._functorch", False),
    "_get_current_graph_task_keep_graph": ("torch._C._autograd", False),
    "_are_functorch_transforms_active": ("torch._C", False),
    "_len_torch_dispatch_stack": ("torch._C", False),
    "_is_tracing": ("torch._C", False),
    "_current_graph_task_id": ("torch._C", False),
    "_top_saved_tensors_default_hooks": ("torch._C._autograd", False),
    "_current_level": ("torch.autograd.forward_ad", True),
}

# torch itself uses some of them: they are put back once the package has looked for them.
PROGRAM = """
import operator, sys
import torch
from torch.autograd import forward_ad

place, name, at_call = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
holder = operator.attrgetter(place.partition(".")[2])(torch)
hook = getattr(holder, name)
delattr(holder, name)
import dal_kernels
from dal_kernels import dynamics_aware_loss, reference

if not at_call:
    setattr(holder, name, hook)

torch.manual_seed(0)
logits, target = torch.randn(6, 5), torch.randint(5, (6,))
truth = torch.autograd.grad(reference.dynamics_aware_loss(x := logits.clone().requires_grad_(), target, 1.2, 0.4), x)[0]
fused = [n for n in ("cpu",) if dal_kernels.available_backends()[n].startswith("available")]
for backend in ("auto", *fused, "eager"):
    leaf = logits.clone().requires_grad_()
    loss = dynamics_aware_loss(leaf, target, 1.2, 0.4, backend=backend)
    for upstream in (1.0, 3.0, 1.0):  # a graph that is kept, with upstream gradients that differ
        (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(upstream), retain_graph=True)
        torch.testing.assert_close(gradient, upstream * truth)
    rows = torch.eye(6)
    per_row = dynamics_aware_loss(leaf, target, 1.2, 0.4, reduction="none", backend=backend)
    try:
        jacobian = torch.autograd.grad(per_row, leaf, rows, is_grads_batched=True, retain_graph=True)[0]
    except RuntimeError as error:
        print("batched backward:", str(error)[:80])
    else:
        torch.testing.assert_close(jacobian.sum(0), 6 * truth)
    (gradient,) = torch.autograd.grad(per_row.mean(), leaf)
    torch.testing.assert_close(gradient, truth)
    setattr(holder, name, hook)  # torch.func does not work without
    try:
        gradient = torch.func.grad(lambda z: dynamics_aware_loss(z, target, 1.2, 0.4, backend=backend))(logits)
    except RuntimeError as error:
        print("torch.func.grad:", str(error)[:80])
    else:
        torch.testing.assert_close(gradient, truth)
    if at_call:
        delattr(holder, name)
print("done")
"""


@pytest.mark.parametrize("name", HOOKS)
def test_without_it_gradients_are_right_or_refused(name: str) -> None:
    place, at_call = HOOKS[name]
    assert printed_by("-c", PROGRAM, place, name, str(at_call)).endswith("done\n")


def test_every_private_function_that_is_asked_has_a_case() -> None:
    """And none is used as if it were always there."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "dal_kernels").rglob("*.py")}
    asked = re.compile(r'getattr\(\s*(?:torch\._C[\w.]*|forward_ad),\s*"(\w+)",')
    assert {name for text in sources.values() for name in asked.findall(text)} == set(HOOKS)
    unguarded = [
        f"{path.name}: {line.strip()}"
        for path, text in sources.items()
        for line in text.splitlines()
        if re.search(r"\btorch\._C\b", line) and not asked.search(line)
    ]
    assert unguarded == []
