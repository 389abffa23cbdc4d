"""The loss inside a model: whatever saves, averages, shards and loads a model's state does so with its schedule too."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.optim.swa_utils import AveragedModel

from dal_kernels import DynamicsAwareLoss

CLASSES, POSITION = 5, 6.5


class Model(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.net, self.criterion = nn.Linear(3, CLASSES), criterion

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.net(features), target)


def model(position: float = 0.0, **changes: Any) -> Model:
    made = Model(DynamicsAwareLoss(**{"total_steps": 10, "pace": "fixed", **changes}))
    made.criterion.step(position)
    return made


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3), torch.arange(6) % CLASSES


def through_torch(saved: nn.Module, resumed: nn.Module, folder: Path) -> None:
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))


def through_safetensors_file(saved: nn.Module, resumed: nn.Module, folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(saved.state_dict(), folder / "model.safetensors")
    resumed.load_state_dict(safetensors.load_file(folder / "model.safetensors"))


def through_safetensors_model(saved: nn.Module, resumed: nn.Module, folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(saved, str(folder / "model.safetensors"))
    safetensors.load_model(resumed, str(folder / "model.safetensors"))


def through_distributed_checkpoint(saved: nn.Module, resumed: nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.save({"model": get_model_state_dict(saved)}, checkpoint_id=folder, no_dist=True)
        state = {"model": get_model_state_dict(resumed)}
        checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(resumed, state["model"])


def through_a_copy_on_the_cpu(saved: nn.Module, resumed: nn.Module, folder: Path) -> None:
    state = {name: value.detach().cpu().clone() for name, value in saved.state_dict().items()}
    assert sum(value.numel() for value in state.values()) == 4 * CLASSES + 14
    resumed.load_state_dict(state)


def through_an_average(saved: nn.Module, resumed: nn.Module, folder: Path) -> None:
    states = [saved.state_dict(), copy.deepcopy(saved).state_dict()]
    resumed.load_state_dict({name: 0.9 * value + 0.1 * states[1][name] for name, value in states[0].items()})


def through_accelerate(saved: nn.Module, resumed: nn.Module, folder: Path) -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    accelerator.prepare(saved)
    accelerator.save_state(str(folder))
    accelerator.save_model(saved, str(folder / "weights"))
    accelerator._models.clear()
    accelerator.prepare(resumed)
    accelerator.load_state(str(folder))
    accelerator.free_memory()


WAYS: dict[str, Callable[[nn.Module, nn.Module, Path], None]] = {
    name.removeprefix("through_"): way for name, way in globals().items() if name.startswith("through_")
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("position", [0, POSITION, 11])
def test_a_schedule_resumes_in_place(way: str, position: float, tmp_path: Path) -> None:
    saved, resumed = model(position), model()
    value = resumed.criterion.q
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="schedule resumed")
        WAYS[way](saved, resumed, tmp_path)
    assert resumed.criterion.schedule.position == pytest.approx(position)
    assert resumed.criterion.q is value
    assert value.item() == pytest.approx(saved.criterion.schedule.q)
    torch.testing.assert_close(resumed.net.weight, saved.net.weight)


@pytest.mark.parametrize("position", [*(n / 7 for n in range(50)), 1e-3, 2.0**-60, 2.0**40 + 0.125, 1e15 / 3])
def test_a_position_comes_back_to_the_last_bit(position: float) -> None:
    saved, resumed = model(position), model()
    resumed.load_state_dict(saved.state_dict())
    assert resumed.criterion.schedule.state_dict() == saved.criterion.schedule.state_dict()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("criterion", [None, POSITION], ids=["of cross-entropy", "of this loss"])
def test_hugging_face_loads_a_model_with_the_loss(
    criterion: float | None, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")

    class Tiny(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.net = nn.Linear(3, CLASSES)
            self.criterion = DynamicsAwareLoss(total_steps=10, pace="fixed") if config.ours else nn.CrossEntropyLoss()
            self.post_init()

    ours = transformers.PretrainedConfig(ours=True)
    saved = Tiny(transformers.PretrainedConfig(ours=criterion is not None))
    if criterion is not None:
        saved.criterion.step(criterion)
    saved.save_pretrained(tmp_path)
    resumed = Tiny.from_pretrained(tmp_path, config=ours, **({} if dtype is None else {"dtype": dtype}))
    assert resumed.criterion.schedule.position == (criterion or 0)
    assert resumed.net.weight.dtype == (dtype or torch.float32)  # which it would take from a floating state
    features, target = batch()
    assert resumed.criterion(resumed.net(features.to(dtype or torch.float32)), target).isfinite()
    assert resumed.criterion.q.item() == pytest.approx(resumed.criterion.schedule.q)


@pytest.mark.parametrize("weight", [None, torch.rand(CLASSES)], ids=["no class weights", "class weights"])
def test_a_checkpoint_of_a_model_trained_with_cross_entropy_loads_strictly(weight: Tensor | None) -> None:
    plain, ours = Model(nn.CrossEntropyLoss(weight=weight)), model(POSITION, weight=weight)
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours.net.weight, plain.net.weight)
    assert ours.criterion.schedule.position == POSITION  # it says nothing of the schedule
    assert set(ours.state_dict()) - set(plain.state_dict()) == {"criterion._extra_state"}
    plain.load_state_dict(ours.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.weight"):
        ours.load_state_dict({"criterion._extra_state": ours.criterion.get_extra_state()})


def test_a_state_as_it_once_was_still_loads() -> None:
    resumed = model()
    state = resumed.state_dict()
    state["criterion._extra_state"] = {"q_start": 0.6, "q_end": 1.5, "total_steps": 10.0, "position": POSITION}
    resumed.load_state_dict(state)
    assert resumed.criterion.schedule.position == POSITION


def test_a_state_of_other_settings_warns_and_only_gives_the_position() -> None:
    saved, resumed = model(4, q_start=0.2), model()
    with pytest.warns(UserWarning, match=r"q_start was 0\.2, is 0\.6"):
        resumed.load_state_dict(saved.state_dict())
    assert resumed.criterion.q.item() == pytest.approx(resumed.criterion.schedule.at(4)[0])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(3, 2), r"_extra_state must be a tensor of shape \(4, 2\), of q_start, .*got shape \(3, 2\)"),
        (torch.full((4, 2), torch.nan), "position must be finite and >= 0, got nan"),
        ({"position": 3.0}, "missing: q_start, q_end, total_steps"),
    ],
    ids=["shape", "value", "entries"],
)
def test_a_state_that_is_none_is_an_error(state: Any, message: str) -> None:
    broken = model()
    with pytest.raises(ValueError, match=message):
        broken.load_state_dict({**broken.state_dict(), "criterion._extra_state": state})
    assert broken.criterion.schedule.position == 0


def test_a_moving_average_of_a_model_keeps_a_working_loss() -> None:
    """As torch does it with buffers, and as timm's three do: over the values of both state dicts."""
    trained = model(2)
    average = AveragedModel(trained, use_buffers=True)
    for _ in range(3):
        trained.criterion.step()
        average.update_parameters(trained)
        for mine, theirs in zip(average.module.state_dict().values(), trained.state_dict().values(), strict=True):
            mine.copy_(0.9 * mine + 0.1 * theirs)
            mine.lerp_(theirs, 0.1) if mine.is_floating_point() else mine.copy_(theirs)
    criterion = average.module.criterion
    assert criterion.q.item() == pytest.approx(criterion.schedule.q)
    assert average(*batch()).isfinite()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.usefixtures("process_group")
def test_mixed_precision_of_fsdp_does_not_round_the_values() -> None:
    """Version 1 casts the buffers of a model behind its back."""
    precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    inner = model(3)
    outer = FullyShardedDataParallel(inner, mixed_precision=precision, device_id=torch.device("cpu"))
    outer(*batch()).backward()
    assert inner.criterion.q.dtype == torch.float32
    assert inner.criterion.q.item() == pytest.approx(0.87, abs=1e-6)


@pytest.mark.usefixtures("process_group")
def test_fully_sharded_models_keep_and_load_the_schedule(tmp_path: Path) -> None:
    mesh = dist.init_device_mesh("cpu", (1,))
    saved, resumed = (fully_shard(model(position), mesh=mesh) for position in (POSITION, 0.0))
    saved(*batch()).backward()
    through_distributed_checkpoint(saved, resumed, tmp_path / "checkpoint")
    assert resumed.criterion.schedule.position == POSITION
    torch.testing.assert_close(resumed.net.weight.full_tensor(), saved.net.weight.full_tensor())
