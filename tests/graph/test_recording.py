"""Other ways through a graph than forward and backward: each gives the gradient that cross-entropy's way would give."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dal_kernels import DynamicsAwareLoss, LinearDynamicsAwareLoss, dynamics_aware_loss

# Both ways, because each makes a node of the autograd graph.
pytestmark = pytest.mark.usefixtures("way")

FEATURES, CLASSES = 4, 5

reductions = pytest.mark.parametrize("reduction", ["mean", "none"])
# What is kept from forward to backward differs: the gradient, coefficients, the gradient and coefficients.
cases = pytest.mark.parametrize(
    ("reduction", "dtype"),
    [("mean", torch.float32), ("none", torch.float32), ("sum", torch.bfloat16)],
    ids=["mean", "none", "sum of bfloat16"],
)


class Model(nn.Module):
    """A model that ends in its loss, 0-d whatever the reduction."""

    def __init__(self, criterion: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net, self.criterion = nn.Linear(FEATURES, CLASSES), criterion
        self.dtype = dtype

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.net(features).to(self.dtype), target).float().mean()


class LayerModel(Model):
    """The same with its last layer in the loss, a chunk of two rows at a time."""

    def __init__(self, reduction: str, backend: str) -> None:
        options = {"reduction": reduction, "backend": backend, "weight": torch.rand(CLASSES)}
        super().__init__(
            LinearDynamicsAwareLoss(
                FEATURES, CLASSES, total_steps=10, pace="fixed", chunk_bytes=2 * 4 * CLASSES, **options
            )
        )
        self.net = nn.Linear(FEATURES, FEATURES)
        self.criterion.step(8)


def model(backend: str, reduction: str, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    criterion = DynamicsAwareLoss(
        total_steps=10, pace="fixed", reduction=reduction, backend=backend, weight=torch.rand(CLASSES)
    )
    criterion.step(8)
    return Model(criterion, dtype)


def batch(rows: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    target = torch.arange(rows) % CLASSES
    target[2] = -100
    return torch.randn(rows, FEATURES, generator=generator), target


Step = Callable[[Model, Tensor, Tensor], Any]


def weight_gradient(net: Model, step: Step, rows: int = 7, factor: float = 3.0) -> Tensor:
    """Of the layer before the loss, after a step with an upstream gradient that is not 1."""
    net.zero_grad()
    (factor * step(net, *batch(rows))).backward()
    assert net.net.weight.grad is not None
    return net.net.weight.grad.clone()


def plainly(net: Model, features: Tensor, target: Tensor) -> Tensor:
    return net(features, target)


def checkpointed(net: Model, features: Tensor, target: Tensor) -> Tensor:
    return checkpoint(net, features, target, use_reentrant=False)


def checkpointed_reentrantly(net: Model, features: Tensor, target: Tensor) -> Tensor:
    return checkpoint(net, features.requires_grad_(), target, use_reentrant=True)


def offloaded_once(net: Model, features: Tensor, target: Tensor) -> Tensor:
    """Hooks that hand each tensor out a single time, as activation offloading does."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        kept[len(kept)] = tensor
        return len(kept) - 1

    with saved_tensors_hooks(pack, kept.pop):
        return net(features, target)


def offloaded(net: Model, features: Tensor, target: Tensor) -> Tensor:
    with save_on_cpu():
        return net(features, target)


def in_anomaly_mode(net: Model, features: Tensor, target: Tensor) -> Tensor:
    with torch.autograd.detect_anomaly(check_nan=True):
        return net(features, target)


def with_hooks(net: Model, features: Tensor, target: Tensor) -> Tensor:
    seen: list[str] = []
    handles = [
        net.criterion.register_forward_pre_hook(lambda *_: seen.append("before")),
        net.criterion.register_forward_hook(lambda *_: seen.append("after")),
        net.criterion.register_full_backward_hook(lambda *_: None),
    ]
    loss = net(features, target)
    for handle in handles:
        handle.remove()
    assert seen == ["before", "after"]
    return loss


def exported(net: Model, features: Tensor, target: Tensor) -> Tensor:
    return torch.export.export(net, (features, target), strict=False).module()(features, target)


def exported_strictly(net: Model, features: Tensor, target: Tensor) -> Tensor:
    return torch.export.export(net, (features, target), strict=True).module()(features, target)


def exported_for_any_batch(net: Model, features: Tensor, target: Tensor) -> Tensor:
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(net, batch(11), dynamic_shapes=({0: rows}, {0: rows}), strict=False)
    return program.module()(features, target)


def traced_by_jit(net: Model, features: Tensor, target: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: tracing is deprecated, and sizes are constants
        return torch.jit.trace(net, batch(7))(features, target)


def traced_by_fx(net: Model, features: Tensor, target: Tensor) -> Tensor:
    return torch.fx.symbolic_trace(net)(features, target)


def compiled(net: Model, features: Tensor, target: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(net, backend="aot_eager", fullgraph=True)(features, target)


WAYS: list[Step] = [
    checkpointed,
    checkpointed_reentrantly,
    offloaded_once,
    offloaded,
    in_anomaly_mode,
    with_hooks,
    exported,
    exported_strictly,
    exported_for_any_batch,
    traced_by_jit,
    traced_by_fx,
    compiled,
]


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@cases
def test_the_gradient_is_that_of_a_plain_step(backend: str, way: Step, reduction: str, dtype: torch.dtype) -> None:
    net = model(backend, reduction, dtype)
    # Compiled code scales a bfloat16 gradient that was rounded; the plain step makes it again.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(weight_gradient(net, way), weight_gradient(net, plainly), **tolerance)


@pytest.mark.parametrize("way", [way for way in WAYS if way is not in_anomaly_mode], ids=lambda way: way.__name__)
@reductions
def test_the_gradient_of_the_layer_form_is_that_of_a_plain_step(backend: str, way: Step, reduction: str) -> None:
    net = LayerModel(reduction, backend)
    gradients = [
        (weight_gradient(net, step), net.criterion.classifier.weight.grad.clone(), net.criterion.classifier.bias.grad)
        for step in (way, plainly)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("way", [exported, traced_by_fx], ids=lambda way: way.__name__)
def test_what_was_recorded_refuses_a_second_derivative_aloud(fused: str, way: Step) -> None:
    features, target = batch()
    loss = way(model(fused, "mean"), features.requires_grad_(), target)
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


def test_statistics_come_out_of_an_exported_call(backend: str) -> None:
    class Statistics(nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Any:
            return dynamics_aware_loss(logits, target, 0.7, 0.5, return_stats=True, backend=backend)

    call = (torch.randn(7, CLASSES), batch()[1])
    got, expected = torch.export.export(Statistics(), call).module()(*call), Statistics()(*call)
    torch.testing.assert_close(got[0], expected[0])
    for field, expected_field in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(field, expected_field, equal_nan=True)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@reductions
def test_make_fx_records_forward_and_backward(backend: str, reduction: str, mode: str) -> None:
    features, target = batch()
    logits = (features @ torch.randn(FEATURES, CLASSES)).requires_grad_()

    def gradient(logits: Tensor, target: Tensor) -> Tensor:
        loss = dynamics_aware_loss(logits * 2, target, 0.7, 0.5, reduction=reduction, backend=backend)
        return torch.autograd.grad(loss.sum() * 3, logits)[0]

    recorded = make_fx(gradient, tracing_mode=mode)(logits, target)
    other = torch.randn_like(logits).requires_grad_()
    torch.testing.assert_close(recorded(other, target), gradient(other, target))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_what_make_fx_recorded_of_a_forward_has_a_gradient(backend: str, mode: str) -> None:
    criterion = DynamicsAwareLoss(total_steps=10, pace="fixed", backend=backend)
    logits, target = torch.randn(7, CLASSES).requires_grad_(), batch()[1]
    graph = make_fx(lambda logits, target: criterion(logits, target), tracing_mode=mode)(logits.detach(), target)
    recorded, plain = (torch.autograd.grad(loss_of(logits, target), logits)[0] for loss_of in (graph, criterion))
    torch.testing.assert_close(recorded, plain)


@reductions
def test_fake_tensors_run_as_those_of_cross_entropy(backend: str, reduction: str) -> None:
    real = model(backend, reduction)
    loss = real(*batch())
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake_model = model(backend, reduction)
        features, target = torch.randn(7, FEATURES), torch.zeros(7, dtype=torch.long)
        fake = fake_model(features, target)
        fake.backward()
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype) == (loss.shape, loss.dtype)
        assert fake_model.net.weight.grad.shape == real.net.weight.shape
        real.criterion.weight = mode.from_tensor(real.criterion.weight)
        logits = mode.from_tensor(torch.randn(7, CLASSES))
        real.criterion(logits, target)  # a real loss: its values are not fake afterwards
    assert not isinstance(real.criterion.q, FakeTensor)
    real.criterion.step()


@pytest.mark.parametrize("how", ["within torch.compile", "around backward"])
@reductions
def test_compiled_autograd(backend: str, reduction: str, how: str) -> None:
    net = model(backend, reduction)
    expected = weight_gradient(net, plainly)
    features, target = batch()
    net.zero_grad()
    if how == "around backward":
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            (3 * net(features, target)).backward()
    else:
        with torch._dynamo.config.patch(compiled_autograd=True):

            @torch.compile(backend="aot_eager")
            def step() -> None:
                (3 * net(features, target)).backward()

            step()
    torch.testing.assert_close(net.net.weight.grad, expected)


@contextlib.contextmanager
def process_group(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        gc.collect()  # as _leave_group of dal_kernels.training.parallel does, and for its reason
        dist.destroy_process_group()


def test_a_static_graph_of_distributed_data_parallel(backend: str, tmp_path: Path) -> None:
    net = model(backend, "mean")
    expected = weight_gradient(net, plainly)
    with process_group(tmp_path):
        parallel = DistributedDataParallel(net, static_graph=True)
        for _ in range(3):
            net.zero_grad()
            (3 * parallel(*batch())).backward()
            torch.testing.assert_close(net.net.weight.grad, expected)
