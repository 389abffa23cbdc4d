"""One training run."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dal_kernels import ScheduleWarning
from dal_kernels.noise import UNKNOWN
from dal_kernels.stall import stall_message
from dal_kernels.training.data.base import DataSet
from dal_kernels.training.errors import UsageError
from dal_kernels.training.inspector import LabelInspector
from dal_kernels.training.loader import evaluation_loader, first_input, held_out, stream, training_loader
from dal_kernels.training.losses import FamilyLoss, KernelLoss, build_loss, checked_loss, exponents
from dal_kernels.training.metrics import EpochMetrics, StepClock, chosen_epoch, count_hits, predictions, share
from dal_kernels.training.models import build_model
from dal_kernels.training.optim import make_optimizer, make_scheduler
from dal_kernels.training.parallel import World
from dal_kernels.training.recipes import Recipe

__all__ = ["Trainer"]

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A network, what trains it, and what has been measured so far.

    All random numbers follow from the seed, the epoch and the process, so an epoch can be trained again from the state
    that the one before it left: that is all that a checkpoint holds.

    Args:
        given: (N,) int64, the labels to train on.
        weights: (N,) float32, what each sample counts in the loss; None: all the same.
        inspector: follows what the network makes of each label.
        loss: a name that :func:`build_loss` knows.
        workers: processes that load batches; 0 loads them in this one.

    Raises:
        UsageError: a setting does not suit the data, the loss or the processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: DataSet,
        given: Tensor,
        loss: str,
        seed: int,
        workers: int,
        world: World,
        weights: Tensor | None = None,
        inspector: LabelInspector | None = None,
    ) -> None:
        self.inspector = inspector
        self.weights = None if weights is None else weights.to(world.device)
        self.recipe, self.data, self.seed, self.world = recipe, data, seed, world
        self.history: list[EpochMetrics] = []
        self.shape = tuple(first_input(data.train).shape)
        first = stream("weights", seed)
        self.network = build_model(recipe, self.shape, data.classes, first, data.moments).to(world.device)
        self.model = world.wrap(self.network, recipe.sync_batch_norm)
        self.average: AveragedModel | None = None
        if recipe.ema_decay:
            ema = get_ema_multi_avg_fn(recipe.ema_decay)
            self.average = AveragedModel(self.network, multi_avg_fn=ema, use_buffers=True)
        self.optimizer = make_optimizer(recipe, self.model.parameters())
        self.scheduler = make_scheduler(recipe, self.optimizer)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.amp == "fp16")
        self.clock = StepClock(world.device)

        held, kept = held_out(len(data.train), recipe.val_fraction, seed)
        self.held = len(held)
        if recipe.val_fraction and not (len(held) and len(kept)):
            raise UsageError(
                f"val_fraction must hold out one sample at least and leave one to train on, got "
                f"{recipe.val_fraction} of {len(data.train)}"
            )
        self.batches = training_loader(data.train, recipe.batch_size, seed, workers, world, kept if len(held) else None)
        self.loss_name = loss
        steps = recipe.epochs * (len(self.batches) if recipe.loss_step == "iteration" else 1)
        self.loss = build_loss(loss, recipe, steps)
        if not isinstance(self.loss, KernelLoss | FamilyLoss):
            for what, used in (("weights of samples", weights), ("an inspector of labels", inspector)):
                if used is not None:
                    raise UsageError(f"{what} need a loss of dal_kernels, got {loss}")

        # Only these are looked at for memorisation; predicting the others would be wasted.
        is_wrong = (given != data.true_labels) & (data.true_labels != UNKNOWN)
        is_wrong[held] = False  # nor those that are not trained on
        wrong = is_wrong.nonzero().squeeze(1)
        self.wrong = len(wrong)
        batch = 4 * recipe.batch_size // world.size  # no gradients: larger batches fit
        self.wrong_batches = evaluation_loader(data.train, wrong, batch, workers, world)
        self.test_batches = evaluation_loader(data.test, torch.arange(len(data.test)), batch, workers, world)
        self.held_batches = evaluation_loader(data.train, held, batch, workers, world)
        self.given, self.true, self.test_labels = (
            labels.to(world.device) for labels in (given, data.true_labels, data.test_labels)
        )

    @property
    def done(self) -> bool:
        """All epochs are trained, or for ``patience`` of them the validation has not become better."""
        epochs, patience = len(self.history), self.recipe.patience
        return epochs >= self.recipe.epochs or 0 < patience <= epochs - self.best_epoch

    @property
    def best_epoch(self) -> int:
        """The first epoch, from 1, with the highest validation accuracy; the last one where nothing is held out."""
        return chosen_epoch(self.history).epoch if self.history else 0

    def unreadable(self) -> list[tuple[str, int, str]]:
        """Samples that any process could not read so far: part, number and reason. All processes call this."""
        train = self.batches.unreadable | self.wrong_batches.unreadable | self.held_batches.unreadable
        parts = [("train", train), ("test", self.test_batches.unreadable)]
        found = {(part, *sample) for part, samples in parts for sample in samples.items()}
        return sorted(set().union(*self.world.gather(found)))

    def run_epoch(self, tick: Callable[[], object]) -> EpochMetrics:
        """Train an epoch and measure; ``tick`` is called after each batch.

        Raises:
            UsageError: an image cannot be read, the model gives no logits, or the loss is no loss of them.

        Warns:
            ScheduleWarning: nothing has been learnt by the time that q has passed 1.
        """
        start = time.perf_counter()
        epoch = len(self.history) + 1
        q, bootstrap_weight = exponents(self.loss)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        loss, target_prob, samples = self._train(epoch, tick)
        if self.recipe.loss_step == "epoch":
            self._step_loss()
        self.scheduler.step()

        for network in (self.network, self.average):
            if network is not None:
                self.world.share_buffers(network)
        schedule = getattr(self.loss, "schedule", None)
        if schedule is not None and hasattr(schedule, "synchronize"):
            # All go on from what one process saves.
            schedule.synchronize()
        if self.inspector is not None:
            self.inspector.synchronize()
        hits = torch.cat(
            [
                self._count_hits(self.test_batches, self.test_labels),
                self._count_hits(self.wrong_batches, self.given, self.true),
                self._count_hits(self.held_batches, self.given),
            ]
        )
        right, tested, memorised, mislabelled_right, wrong, agreed, held = self.world.sum(hits).tolist()
        accuracy = share(right, tested)
        metrics = EpochMetrics(
            epoch=epoch,
            train_loss=loss / samples,
            test_accuracy=accuracy,
            best_accuracy=max([accuracy, *(earlier.test_accuracy for earlier in self.history)]),
            validation_accuracy=share(agreed, held),
            memorised=share(memorised, wrong),
            mislabelled_right=share(mislabelled_right, wrong),
            target_prob=target_prob / samples,
            q=q,
            bootstrap_weight=bootstrap_weight,
            learning_rate=learning_rate,
            loss_time_share=self.clock.loss_share(),
            seconds=time.perf_counter() - start,
        )
        self._warn_of_stall(metrics)
        self.history.append(metrics)
        return metrics

    def _train(self, epoch: int, tick: Callable[[], object]) -> tuple[float, float, float]:
        """One pass; sums of loss and p_y over the samples, and how many they were, over all processes."""
        self.model.train()
        self.batches.set_epoch(epoch)
        torch.manual_seed(stream("epoch", self.seed, epoch, self.world.rank))  # augmentation, dropout
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)  # there: no synchronisation per batch
        for inputs, indices in self.batches:
            inputs, indices = (part.to(self.world.device, non_blocking=True) for part in (inputs, indices))
            loss, target_prob = self._train_step(inputs, indices)
            sums += torch.stack([loss * len(inputs), target_prob.sum(), torch.ones_like(loss) * len(inputs)])
            if self.recipe.loss_step == "iteration":
                self._step_loss()
            tick()
        loss_sum, target_prob_sum, samples = self.world.sum(sums).tolist()
        return loss_sum, target_prob_sum, samples

    def _train_step(self, inputs: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimiser; the loss () and p_y of the labels (B,), NaN if the loss does not tell."""
        self.optimizer.zero_grad()
        count = self._parts_of(len(inputs))
        parts = list(zip(inputs.tensor_split(count), indices.tensor_split(count), strict=True))
        losses, target_probs = [], []
        for i, (part, its_indices) in enumerate(parts):
            together: AbstractContextManager[None] = nullcontext()
            if i < len(parts) - 1 and isinstance(self.model, nn.parallel.DistributedDataParallel):
                together = self.model.no_sync()  # the processes add up their gradients once a batch
            with together:
                loss, target_prob = self._add_gradient(part, its_indices, len(part) / len(inputs))
            losses.append(loss)
            target_probs.append(target_prob)
        start = self.clock.now()
        if self.recipe.clip_norm < math.inf:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.clock.add(start, start, start)
        return torch.stack(losses).sum(), torch.cat(target_probs)

    def _parts_of(self, samples: int) -> int:
        """How many parts a batch of so many samples is taken in, none larger than one of a whole batch, as far as none
        then has one sample alone, on which batch normalisation cannot train.
        """
        most = self.recipe.batch_size / (self.world.size * self.recipe.accumulate)
        count = math.ceil(samples / max(1.0, most))
        return count if most < 2 else max(1, min(count, samples // 2))

    def _add_gradient(self, inputs: Tensor, indices: Tensor, share_of_batch: float) -> tuple[Tensor, Tensor]:
        """The gradient of a part of a batch; what it adds to the loss (), and p_y of the labels (B,)."""
        start, labels = self.clock.now(), self.given[indices]
        logits = self._forward(inputs)
        if not isinstance(logits, Tensor):
            raise UsageError(f"model {self.recipe.model} must give logits, got {type(logits).__name__}")
        # The gradient by the logits is made apart from the rest, so that its time can be told apart.
        leaf = logits.detach().requires_grad_()
        loss_start = self.clock.now()
        with self._autocast():
            weights = None if self.weights is None else self.weights[indices]
            loss = checked_loss(self.loss, self.loss_name, leaf, labels, weights) * share_of_batch
        self.scaler.scale(loss).backward()
        loss_end = self.clock.now()
        logits.backward(leaf.grad)
        self.clock.add(start, loss_start, loss_end)
        if not isinstance(self.loss, KernelLoss | FamilyLoss):
            return loss.detach(), torch.full((1,), math.nan, device=loss.device)
        if self.inspector is not None:
            self.inspector.update(indices, labels, self.loss.stats)
        return loss.detach(), self.loss.stats.target_prob

    def _forward(self, inputs: Tensor) -> Tensor:
        try:
            with self._autocast():
                return self.model(inputs)
        except ValueError as error:
            if len(inputs) > 1:
                raise
            raise UsageError(  # batch normalisation: all other layers take one sample
                f"model {self.recipe.model} cannot train on a batch of one sample ({error}): batch_size must be at "
                f"least {2 * self.world.size * self.recipe.accumulate}, 2 for each process"
                f"{' and part of accumulate' * (self.recipe.accumulate > 1)}, got {self.recipe.batch_size}, of "
                f"{len(self.data.train)} training samples"
            ) from error

    def _step_loss(self) -> None:
        if hasattr(self.loss, "step"):
            self.loss.step()

    def _autocast(self) -> torch.autocast:
        dtype = AMP_DTYPES[self.recipe.amp]
        return torch.autocast(self.world.device.type, dtype, enabled=dtype is not None)

    def _count_hits(self, *loader_and_labels: Any) -> Tensor:
        with self._autocast():
            return count_hits(self.evaluated, *loader_and_labels)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is measured: with averaged weights, if they are averaged."""
        if self.average is None:
            return self.network
        module: nn.Module = self.average.module
        return module

    def classified(self) -> tuple[Tensor, Tensor]:
        """Labels (M,) and predictions (M,), int64, of the test samples that can be read; without a test of those held
        out, against their given labels. All processes call this, and get all samples.
        """
        tested = len(self.test_labels) > 0
        loader, labels = (self.test_batches, self.test_labels) if tested else (self.held_batches, self.given)
        with self._autocast():
            indices, prediction, _ = predictions(self.evaluated, loader, self.world.device)
        pairs = torch.cat(self.world.gather(torch.stack([labels.cpu()[indices], prediction])), 1)
        return pairs[0], pairs[1]

    def _warn_of_stall(self, metrics: EpochMetrics) -> None:
        """Once a run, in the first process."""
        message, before = (
            stall_message(of.target_prob, of.q, self.data.classes) if of else None
            for of in (metrics, self.history[-1] if self.history else None)
        )
        if message and not before and self.world.main:
            warnings.warn(message, ScheduleWarning, stacklevel=2)

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, as tensors and plain values."""
        return {**{name: part.state_dict() for name, part in self._parts()}, "history": list(map(asdict, self.history))}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state` saved by a trainer with the same settings."""
        for name, part in self._parts():
            part.load_state_dict(state[name])
        self.history = [EpochMetrics(**epoch) for epoch in state["history"]]

    def _parts(self) -> list[tuple[str, Any]]:
        names = ("network", "average", "optimizer", "scheduler", "scaler", "loss", "inspector")
        return [(name, getattr(self, name)) for name in names if hasattr(getattr(self, name), "state_dict")]
