"""The integration recipes, run as a user runs them, each where its framework can be imported."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dal_kernels import (
    DynamicsAwareLoss,
    DynamicsAwareSchedule,
    SymmetricCrossEntropyLoss,
    dynamics_aware_loss,
    symmetric_cross_entropy_loss,
)
from dal_kernels.integrations.timm import MixupLoss

pytest.importorskip("sklearn", reason="the recipes train on scikit-learn's digits")

# Each recipe, and what must be there to run it.
RECIPES = {
    "plain": (),
    "lightning_callback": ("lightning.pytorch",),
    "hugging_face": ("transformers", "accelerate"),
    "timm_task": ("timm.task",),
}


def load(name: str) -> ModuleType:
    for package in RECIPES[name]:
        try:
            import_module(package)
        # RuntimeError: torchvision, which timm imports, built for another torch (its CUDA wheel beside a CPU torch).
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"{package} cannot be imported: {error}")
    return import_module(f"benchmarks.recipes.{name}")


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param)


class KilledError(Exception):
    pass


class Watch:
    """Of each batch of training the authors' q and bootstrap weight at its time, the q after it and its loss; may kill
    the training.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float, float]] = []
        self.kill_at: int | None = None

    def wrap(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(criterion: DynamicsAwareLoss, input: Tensor, target: Tensor, **options: Any) -> Tensor:
            loss = forward(criterion, input, target, **options)
            if torch.is_grad_enabled():
                if len(self.seen) == self.kill_at:
                    raise KilledError
                authors = criterion.schedule.at(criterion.schedule.position)
                self.seen.append((*authors, criterion.q.item(), loss.item()))
            return loss

        return watched

    def taken(self) -> list[tuple[float, float, float, float]]:
        """What was seen since the last call."""
        seen, self.seen = self.seen, []
        return seen


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    monkeypatch.setattr(DynamicsAwareLoss, "forward", made.wrap(DynamicsAwareLoss.forward))
    return made


def scheduled(recipe: ModuleType, epochs: int, batches: int) -> list[tuple[float, float]]:
    """The authors' (q, bootstrap_weight) of each batch: Hugging Face counts epochs in fractions, others whole ones."""
    assert batches % epochs == 0
    clock = [batch * epochs / batches for batch in range(batches)]
    if not recipe.__name__.endswith("hugging_face"):
        clock = [t // 1 for t in clock]
    return [DynamicsAwareSchedule(0.6, 1.5, epochs).at(t) for t in clock]


def test_recipe_learns_under_wrong_labels_and_follows_the_schedule(
    recipe: ModuleType, watch: Watch, tmp_path: Path
) -> None:
    # With 40 % wrong labels. Measured over two draws of them: cross-entropy in the same recipes 60 to 72 %, DAL 90
    # to 95 %.
    assert recipe.train(tmp_path) > 0.8
    used = [step[:2] for step in watch.taken()]
    torch.testing.assert_close(used, scheduled(recipe, 30, len(used)), rtol=0, atol=1e-6)


def test_killed_recipe_resumes_with_the_schedule_it_would_have_had(
    recipe: ModuleType, watch: Watch, tmp_path: Path
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    recipe.train(tmp_path / "whole", epochs=3)
    whole = watch.taken()
    epoch = len(whole) // 3

    watch.kill_at = 2 * epoch + epoch // 2
    with pytest.raises(KilledError):
        recipe.train(tmp_path / "killed", epochs=3)
    watch.taken()
    watch.kill_at = None
    recipe.train(tmp_path / "killed", epochs=3, resume=True)

    # Lightning does not restore the order of batches, and timm saves nothing of the criterion but the epoch.
    fields = 2 if recipe.__name__.endswith(("lightning_callback", "timm_task")) else 4
    assert [step[:fields] for step in watch.taken()] == [step[:fields] for step in whole[2 * epoch :]]


def test_recipe_takes_mixed_labels(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def mixed() -> tuple[TensorDataset, TensorDataset]:
        train, test = noisy_digits()
        images, labels = train.tensors
        return TensorDataset(images, F.one_hot(labels, 10).float()), test

    noisy_digits = recipe.noisy_digits
    monkeypatch.setattr(recipe, "noisy_digits", mixed)
    recipe.train(tmp_path, epochs=1)


def test_recipe_runs_as_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.recipes.plain", raising=False)  # as in a new process
    runpy.run_module("benchmarks.recipes.plain", run_name="__main__")
    assert "on 40% wrong labels" in capsys.readouterr().out


# --- what one framework does its own way


def test_lightning_resumes_within_an_epoch(watch: Watch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load("lightning_callback")
    recipe.train(tmp_path / "whole", epochs=2)
    whole = watch.taken()

    saved = len(whole) // 2 + 7
    monkeypatch.setattr(recipe, "ModelCheckpoint", partial(recipe.ModelCheckpoint, every_n_train_steps=saved))
    watch.kill_at = saved + 5
    with pytest.raises(KilledError):
        recipe.train(tmp_path, epochs=2)
    watch.taken()
    watch.kill_at = None
    recipe.train(tmp_path, epochs=2, resume=True)
    assert [step[:2] for step in watch.taken()] == [step[:2] for step in whole[saved:]]


def test_lightning_compiles_nothing_again_as_q_grows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load("lightning_callback")
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    plain = recipe.Classifier
    monkeypatch.setattr(recipe, "Classifier", lambda epochs: torch.compile(plain(epochs), backend=backend))
    counts = []
    for epochs in (1, 3):
        torch.compiler.reset()
        graphs.clear()
        recipe.train(tmp_path / str(epochs), epochs=epochs)
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0


def hugging_face_trainer(folder: Path, **settings: Any) -> Any:
    recipe = load("hugging_face")
    return recipe.make_trainer(
        recipe.TrainingArguments(
            str(folder),
            **{"num_train_epochs": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **settings},
        )
    )


def test_hugging_face_accumulates_the_gradient_of_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A schedule that paces itself sees two halves otherwise than a whole.
    monkeypatch.setattr(load("hugging_face"), "DynamicsAwareLoss", partial(DynamicsAwareLoss, pace="fixed"))
    # 1347 images: the last of the steps of 80 has 67, 40 + 27. Plain SGD without clipping, which would hide a factor.
    trained = []
    for batch, accumulated in ((80, 1), (40, 2)):
        trainer = hugging_face_trainer(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            learning_rate=0.05,
            lr_scheduler_type="constant",
            max_grad_norm=0,
        )
        trainer.train()
        trained.append(trainer.model.state_dict())
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


# 22 batches of 64, or 6 steps of 4 x 64: less than an epoch, whole epochs, and a part of one.
@pytest.mark.parametrize(
    "settings",
    [{"max_steps": 10}, {"max_steps": 50}, {"num_train_epochs": 2}, {"num_train_epochs": 1.5}],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("accumulated", [1, 4])
def test_hugging_face_moves_q_to_its_end_by_the_trainers_own_clock(
    settings: dict[str, float], accumulated: int, watch: Watch, tmp_path: Path
) -> None:
    trainer = hugging_face_trainer(
        tmp_path, per_device_train_batch_size=64, gradient_accumulation_steps=accumulated, **settings
    )
    trainer.train()
    steps = trainer.state.global_step
    schedule = DynamicsAwareSchedule(0.6, 1.5, steps)
    used = list(dict.fromkeys(q for q, *_ in watch.taken()))
    torch.testing.assert_close(used, [schedule.at(step)[0] for step in range(steps)], rtol=0, atol=1e-6)


def test_hugging_face_evaluates_with_the_mean_loss(tmp_path: Path) -> None:
    trainer = hugging_face_trainer(tmp_path)
    found = trainer.predict(trainer.eval_dataset)
    (callback,) = (one for one in trainer.callback_handler.callbacks if hasattr(one, "criterion"))
    q = callback.criterion.q
    expected = dynamics_aware_loss(torch.from_numpy(found.predictions), torch.from_numpy(found.label_ids), q)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_lightning_steps_by_epochs_or_by_steps(interval: Any, tmp_path: Path) -> None:
    recipe = load("lightning_callback")
    callbacks = import_module("dal_kernels.integrations.lightning")
    train_set, _ = recipe.noisy_digits()
    module = recipe.Classifier(100)
    trainer = recipe.lightning.Trainer(
        max_epochs=2,
        callbacks=[callbacks.ScheduleCallback(interval)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, recipe.DataLoader(train_set, batch_size=449))
    assert module.criterion.schedule.position == (1 if interval == "epoch" else 2 * 3 - 1)


def test_lightning_without_a_schedule_is_told(tmp_path: Path) -> None:
    recipe = load("lightning_callback")
    callbacks = import_module("dal_kernels.integrations.lightning")
    module = recipe.Classifier(1)
    module.criterion = torch.nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"needs a loss of dal_kernels with a schedule .* got none in Classifier"):
        callbacks.ScheduleCallback().on_train_start(None, module)
    with pytest.raises(ValueError, match="interval must be one of epoch, step, got 'batch'"):
        callbacks.ScheduleCallback("batch")


def test_hugging_face_takes_a_language_model_and_a_loss_without_a_schedule() -> None:
    load("hugging_face")
    integration = import_module("dal_kernels.integrations.transformers")
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[0, 1] = -100
    loss = integration.loss_function(SymmetricCrossEntropyLoss(), causal=True)
    kept = labels[:, 1:] != -100
    expected = symmetric_cross_entropy_loss(logits[:, :-1][kept], labels[:, 1:][kept], reduction="sum")
    items = kept.sum()
    torch.testing.assert_close(loss({"logits": logits}, labels, items), expected / items)
    torch.testing.assert_close(loss({"logits": logits}, labels), expected / items)


# --- timm's mixed targets, which need no timm to be made


@pytest.mark.parametrize("criterion", [DynamicsAwareLoss(total_steps=1, pace="fixed"), SymmetricCrossEntropyLoss()])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_give_the_loss_of_their_shares(criterion: Any, smoothing: float) -> None:
    logits, labels = torch.randn(6, 10), torch.tensor([0, 1, 2, 3, 3, 9])
    share = torch.tensor([0.9, 0.5, 0.3, 1.0, 0.7, 0.5])[:, None]
    clean = torch.full((6, 10), smoothing / 10).scatter(1, labels[:, None], 1 - smoothing + smoothing / 10)
    mixed = share * clean + (1 - share) * clean.flip(0)
    loss = MixupLoss(criterion, smoothing)
    torch.testing.assert_close(loss(logits, mixed), criterion(logits, mixed), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss(logits, labels), criterion(logits, labels))


def test_mixed_targets_of_timm() -> None:
    load("timm_task")
    images, target = import_module("timm.data").Mixup(num_classes=10, label_smoothing=0)(
        torch.rand(4, 1, 8, 8), torch.arange(4)
    )
    logits = (images.sum((1, 2)) @ torch.rand(8, 10)).requires_grad_()
    criterion = MixupLoss(DynamicsAwareLoss(total_steps=2))
    criterion(logits, target).backward()
    assert logits.grad is not None
    criterion.step()
    assert criterion.schedule.position == 1


def test_mixup_refuses_a_smoothing_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1\.5"):
        MixupLoss(SymmetricCrossEntropyLoss(), 1.5)
