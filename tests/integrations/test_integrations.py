"""dal_kernels.integrations of accelerate and fastai, each where it can be imported."""

from __future__ import annotations

import runpy
import sys
import warnings
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dal_kernels
from dal_kernels import CrossEntropyLoss, DynamicsAwareLoss


def load(package: str, name: str) -> Any:
    try:
        import_module(package)
    # RuntimeError: torchvision, which fastai imports, built for another torch (its CUDA wheel beside a CPU torch).
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{package} cannot be imported: {error}")
    return import_module(f"dal_kernels.integrations.{name}")


def batches() -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(64) % 3
    inputs = torch.randn(64, 3) + 3 * nn.functional.one_hot(labels)
    return list(zip(inputs.split(16), labels.split(16), strict=True))


# --- accelerate


def test_accelerate_saves_and_loads_the_criterion(tmp_path: Path) -> None:
    integration = load("accelerate", "accelerate")
    from accelerate import Accelerator

    def made() -> tuple[Any, ...]:
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        criterion = integration.prepare(accelerator, DynamicsAwareLoss(total_steps=5))
        return accelerator, criterion, *accelerator.prepare(model, optimizer)

    def epoch(accelerator: Any, criterion: DynamicsAwareLoss, model: nn.Module, optimizer: Any) -> float:
        for inputs, labels in data:
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
        integration.end_epoch(criterion)
        return loss.item()

    data, whole = batches(), made()
    for _ in range(2):
        epoch(*whole)
    whole[0].save_state(str(tmp_path))
    resumed = made()
    resumed[0].load_state(str(tmp_path))
    assert resumed[1].schedule.position == 2
    assert resumed[1].schedule.state_dict() == whole[1].schedule.state_dict()
    assert [epoch(*resumed) for _ in range(3)] == [epoch(*whole) for _ in range(3)]
    assert resumed[1].schedule.position == 5


def test_accelerate_takes_losses_of_ours_only() -> None:
    integration = load("accelerate", "accelerate")
    from accelerate import Accelerator

    with pytest.raises(TypeError, match="criterion must be a loss of dal_kernels, got MSELoss"):
        integration.prepare(Accelerator(cpu=True), nn.MSELoss())
    criterion = integration.prepare(Accelerator(cpu=True), CrossEntropyLoss())
    integration.end_epoch(criterion)  # without a schedule nothing happens


# --- fastai


def learner(loss: nn.Module, folder: Path, *callbacks: Any) -> Any:
    from fastai.callback.progress import ProgressCallback  # noqa: F401, for Learner.no_bar
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD

    pairs = TensorDataset(*map(torch.cat, zip(*batches(), strict=True)))
    loaders = DataLoaders(DataLoader(pairs, 16), DataLoader(pairs, 16))
    torch.manual_seed(0)
    return Learner(loaders, nn.Linear(3, 3), loss_func=loss, opt_func=SGD, lr=0.5, cbs=list(callbacks), path=folder)


def test_fastai_moves_the_schedule_over_its_fits(tmp_path: Path) -> None:
    integration = load("fastai.learner", "fastai")
    from fastai.callback.core import Callback

    class Positions(Callback):
        """Where the schedule is in each epoch."""

        def __init__(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def before_train(self) -> None:
            self.seen.append((self.learn.loss_func.schedule.position, self.learn.loss_func.schedule.q))

    loss, positions = DynamicsAwareLoss(total_steps=5, pace="fixed"), Positions()
    learn = learner(loss, tmp_path, integration.ScheduleCallback(), positions)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        learn.fit(3)
    assert [position for position, _ in positions.seen] == [0, 1, 2, 3, 4]
    assert [q for _, q in positions.seen] == pytest.approx([0.6, 0.78, 0.96, 1.14, 1.32])


@pytest.mark.parametrize("real", [False, True])
def test_fastai_counts_what_is_trained_only(real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not validations, nor the epochs after an early stop; a start_epoch goes on there, in a new Learner too."""
    loss = DynamicsAwareLoss(total_steps=20)
    made = fastai_learner if real else FakeLearner
    learn = made(loss, tmp_path, monkeypatch)
    learn.fit(4)
    assert loss.schedule.position == 3
    learn.validate()
    learn.get_preds()
    assert loss.schedule.position == 3
    learn.fit(2)
    assert loss.schedule.position == 5
    learn.stop_after = 2
    learn.fit(8)
    learn.stop_after = None
    assert loss.schedule.position == 7
    learn.fit(1)
    assert loss.schedule.position == 8
    learn.fit(12, start_epoch=9)
    assert loss.schedule.position == 11, "of these it has trained 9"
    made(loss, tmp_path, monkeypatch).fit(6, start_epoch=4)
    assert loss.schedule.position == 5


def fastai_learner(loss: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    integration = load("fastai.learner", "fastai")
    from fastai.callback.core import Callback, CancelFitException

    class Stop(Callback):
        def after_epoch(self) -> None:
            if getattr(self.learn, "stop_after", None) == self.learn.epoch + 1 and self.learn.n_epoch > 1:
                raise CancelFitException

    learn = learner(loss, folder, integration.ScheduleCallback(), Stop())
    learn.quiet = ExitStack()
    for context in (learn.no_bar(), learn.no_logging()):
        learn.quiet.enter_context(context)
    learn.get_preds = partial(learn.get_preds, dl=learn.dls[1])
    return learn


class FakeLearner:
    """Calls a callback in fastai's order, where fastai cannot be imported."""

    def __init__(self, loss: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        core = ModuleType("fastai.callback.core")
        core.Callback = object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, core.__name__, core)
        monkeypatch.setitem(sys.modules, "fastai", ModuleType("fastai"))
        monkeypatch.setitem(sys.modules, "fastai.callback", ModuleType("fastai.callback"))
        source = Path(dal_kernels.__file__).parent / "integrations" / "fastai.py"
        self.callback = runpy.run_path(str(source))["ScheduleCallback"]()
        self.callback.learn = self
        self.loss_func, self.epoch, self.n_epoch, self.stop_after = loss, 0, 1, None

    def call(self, *events: str) -> None:
        for event in events:
            getattr(self.callback, event, lambda: None)()

    def fit(self, n_epoch: int, start_epoch: int = 0) -> None:
        self.n_epoch = n_epoch
        self.call("before_fit")
        for self.epoch in range(n_epoch):
            self.call("before_epoch")
            if self.epoch >= start_epoch:
                self.call("before_train", "after_train", "before_validate", "after_validate")
            self.call("after_epoch")
            if self.epoch + 1 == self.stop_after:
                break
        self.call("after_fit")

    def validate(self) -> None:
        self.call("before_fit", "before_epoch", "before_validate", "after_validate", "after_epoch", "after_fit")

    get_preds = validate


def test_fastai_finds_a_learning_rate_without_a_trace_in_the_schedule(tmp_path: Path) -> None:
    integration = load("fastai.learner", "fastai")
    import_module("fastai.callback.schedule")
    learn = learner(DynamicsAwareLoss(total_steps=5), tmp_path, integration.ScheduleCallback())
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit(1)
        before = learn.loss_func.schedule.state_dict()
        learn.lr_find(num_it=8, show_plot=False)
        assert learn.loss_func.schedule.state_dict() == before
        learn.fit(1)
    assert learn.loss_func.schedule.position == 1, "the second epoch, not one after those of lr_find"


def test_fastai_needs_a_schedule(tmp_path: Path) -> None:
    integration = load("fastai.learner", "fastai")
    learn = learner(CrossEntropyLoss(), tmp_path, integration.ScheduleCallback())
    with pytest.raises(ValueError, match="needs a loss_func of dal_kernels with a schedule, got CrossEntropyLoss"):
        learn.fit(1)
