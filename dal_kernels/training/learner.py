"""A network and what moves it: forward, loss, backward and optimiser, a batch at a time."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dal_kernels.training.data.base import DataSet
from dal_kernels.training.errors import UsageError
from dal_kernels.training.inspector import LabelInspector
from dal_kernels.training.loader import first_input, stream
from dal_kernels.training.losses import FamilyLoss, KernelLoss, build_loss, checked_loss
from dal_kernels.training.metrics import StepClock
from dal_kernels.training.models import build_model
from dal_kernels.training.optim import make_optimizer, make_scheduler
from dal_kernels.training.parallel import World
from dal_kernels.training.recipes import Recipe

__all__ = ["Learner"]

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """A network with its loss, optimiser and learning rate, all that a checkpoint has of them.

    Args:
        given: (N,) int64, the labels to train on.
        loss: a name that :func:`build_loss` knows.
        batches: of this process in an epoch.
        weights: (N,) float32, what each sample counts in the loss; None: all the same.
        inspector: follows what the network makes of each label.

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
        batches: int,
        world: World,
        weights: Tensor | None = None,
        inspector: LabelInspector | None = None,
    ) -> None:
        self.recipe, self.data, self.world, self.inspector = recipe, data, world, inspector
        self.given = given.to(world.device)
        self.weights = None if weights is None else weights.to(world.device)
        self.shape = tuple(first_input(data.train).shape)
        first = stream("weights", seed)
        self.network = build_model(recipe, self.shape, data.classes, first, data.moments).to(world.device)
        if recipe.channels_last:
            if len(self.shape) != 3:
                raise UsageError(f"channels_last needs samples of shape (channels, H, W), got {self.shape}")
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.wrapped = world.wrap(self.network, recipe.sync_batch_norm)
        self.model: Any = torch.compile(self.wrapped) if recipe.compile else self.wrapped
        self.average: AveragedModel | None = None
        if recipe.ema_decay:
            ema = get_ema_multi_avg_fn(recipe.ema_decay)
            self.average = AveragedModel(self.network, multi_avg_fn=ema, use_buffers=True)
        self.optimizer = make_optimizer(recipe, self.wrapped.parameters())
        self.scheduler = make_scheduler(recipe, self.optimizer)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.amp == "fp16")
        self.clock = StepClock(world.device)
        self.loss_name = loss
        self.loss = build_loss(loss, recipe, recipe.epochs * (batches if recipe.loss_step == "iteration" else 1))
        if not isinstance(self.loss, KernelLoss | FamilyLoss):
            for need, used in (("weights of samples need", weights), ("an inspection of labels needs", inspector)):
                if used is not None:
                    raise UsageError(f"{need} a loss of dal_kernels, got {loss}")

    @property
    def evaluated(self) -> nn.Module:
        """The network that is measured: with averaged weights, if they are averaged."""
        if self.average is None:
            return self.network
        module: nn.Module = self.average.module
        return module

    def _train_step(self, inputs: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimiser; the loss () and p_y of the labels (B,), NaN if the loss does not tell."""
        self.optimizer.zero_grad()
        count = self._parts_of(len(inputs))
        parts = list(zip(inputs.tensor_split(count), indices.tensor_split(count), strict=True))
        losses, target_probs = [], []
        for i, (part, its_indices) in enumerate(parts):
            together: AbstractContextManager[None] = nullcontext()
            if i < len(parts) - 1 and isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
                together = self.wrapped.no_sync()  # the processes add up their gradients once a batch
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
        if self.recipe.channels_last:
            inputs = inputs.to(memory_format=torch.channels_last)
        try:
            with self._autocast():
                return self.model(inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            text = " ".join(str(error).split("\n")[:2])  # who fails, and how
            raise UsageError(f"model {self.recipe.model} cannot be compiled here: {text}; give --no-compile") from error
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

    def _parts(self) -> list[tuple[str, Any]]:
        names = ("network", "average", "optimizer", "scheduler", "scaler", "loss", "inspector")
        return [(name, getattr(self, name)) for name in names if hasattr(getattr(self, name), "state_dict")]
