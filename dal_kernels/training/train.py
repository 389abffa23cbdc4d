"""One training run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dal_kernels import ScheduleWarning
from dal_kernels.noise import UNKNOWN
from dal_kernels.stall import stall_message
from dal_kernels.training.data.base import DataSet, Part
from dal_kernels.training.errors import UsageError
from dal_kernels.training.inspector import LabelInspector
from dal_kernels.training.learner import Learner
from dal_kernels.training.loader import Batches, evaluation_loader, held_out, stream, training_loader
from dal_kernels.training.losses import exponents
from dal_kernels.training.metrics import EpochMetrics, chosen_epoch, count_hits, predictions, share
from dal_kernels.training.parallel import World
from dal_kernels.training.recipes import Recipe

__all__ = ["Trainer"]


class Trainer(Learner):
    """A learner with its batches, and what has been measured so far.

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
        self.seed = seed
        self.history: list[EpochMetrics] = []
        held, trained_on = held_out(len(data.train), recipe.val_fraction, seed)
        if recipe.val_fraction and not (len(held) and len(trained_on)):
            raise UsageError(
                f"val_fraction must hold out one sample at least and leave one to train on, got "
                f"{recipe.val_fraction} of {len(data.train)}"
            )
        kept = trained_on if len(held) else None
        self.batches = training_loader(data.train, recipe.batch_size, seed, workers, world, kept)
        super().__init__(recipe, data, given, loss, seed, len(self.batches), world, weights, inspector)

        # Only these are looked at for memorisation; predicting the others would be wasted.
        is_wrong = (given != data.true_labels) & (data.true_labels != UNKNOWN)
        is_wrong[held] = False  # nor those that are not trained on
        wrong = is_wrong.nonzero().squeeze(1)
        self.wrong = len(wrong)
        batch = 4 * recipe.batch_size // world.size  # no gradients: larger batches fit
        self.wrong_batches = evaluation_loader(data.train, wrong, batch, workers, world)
        self.test_batches = evaluation_loader(data.test, torch.arange(len(data.test)), batch, workers, world)
        # What is held out by a fraction was asked for; else it is the part that the data has for that.
        self.held_part: Part = "train" if len(held) else "validation"
        images, indices, labels = data.train, held, given
        if self.held_part == "validation":
            images, labels = data.validation, data.validation_labels
            indices = torch.arange(len(images))
        self.held, self.held_labels = len(indices), labels.to(world.device)
        self.held_batches = evaluation_loader(images, indices, batch, workers, world)
        if recipe.patience and not self.held:
            raise UsageError(
                f"patience needs a val_fraction above 0, or data with a validation, to stop by, got patience "
                f"{recipe.patience}"
            )
        self.true, self.test_labels = (labels.to(world.device) for labels in (data.true_labels, data.test_labels))

    @property
    def done(self) -> bool:
        """All epochs are trained, or for ``patience`` of them the validation has not become better."""
        epochs, patience = len(self.history), self.recipe.patience
        return epochs >= self.recipe.epochs or 0 < patience <= epochs - self.best_epoch

    @property
    def best_epoch(self) -> int:
        """The first epoch, from 1, with the highest validation accuracy; the last one where nothing is held out."""
        return chosen_epoch(self.history).epoch if self.history else 0

    def unreadable(self) -> list[tuple[Part, int, str]]:
        """Samples that any process could not read so far: part, number and reason. All processes call this."""
        parts: list[tuple[Part, Batches]] = [
            ("train", self.batches),
            ("train", self.wrong_batches),
            (self.held_part, self.held_batches),
            ("test", self.test_batches),
        ]
        found = {(part, *sample) for part, batches in parts for sample in batches.unreadable.items()}
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
                self._count_hits(self.held_batches, self.held_labels),
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

    def _count_hits(self, *loader_and_labels: Any) -> Tensor:
        with self._autocast():
            return count_hits(self.evaluated, *loader_and_labels)

    def classified(self) -> tuple[Tensor, Tensor]:
        """Labels (M,) and predictions (M,), int64, of the test samples that can be read; without a test of those
        validated on, against their given labels. All processes call this, and get all samples.
        """
        tested = len(self.test_labels) > 0
        loader, labels = (self.test_batches, self.test_labels) if tested else (self.held_batches, self.held_labels)
        with self._autocast():
            indices, prediction, _ = predictions(self.evaluated, loader, self.world.device)
        pairs = torch.cat(self.world.gather(torch.stack([labels.cpu()[indices], prediction])), 1)
        return pairs[0], pairs[1]

    def _warn_of_stall(self, metrics: EpochMetrics) -> None:
        """Once a run, in the first process."""
        message, before = (
            stall_message(epoch.target_prob, epoch.q, self.data.classes) if epoch else None
            for epoch in (metrics, self.history[-1] if self.history else None)
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
