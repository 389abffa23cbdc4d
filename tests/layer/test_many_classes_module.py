"""A head of many classes inside of a model: its schedule, a tied embedding, a layer that was there before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dal_kernels import (
    CrossEntropyLoss,
    DynamicsAwareLoss,
    GeneralizedCrossEntropyLoss,
    LinearDynamicsAwareLoss,
    LinearLoss,
    Ramp,
    linear_loss,
)
from support.unfused import C, D, fixed, layer, unfused


@pytest.mark.parametrize("length", [1, 5])
def test_a_schedule_follows_the_rows_that_count(length: int) -> None:
    """The pace "auto" hears of shifted rows, as of the same rows in a plain call."""
    formed, plain = (DynamicsAwareLoss(total_steps=4) for _ in range(2))
    given = layer((4, 1 + length), torch.float32)
    form = LinearLoss(formed, D, C, shift=1)
    logits = form.classifier(given["input"])[:, :-1].reshape(-1, C)
    for _ in range(3):
        form(given["input"], given["target"]).backward()
        plain(logits.detach().requires_grad_(), given["target"][:, 1:].reshape(-1)).backward()
        form.step()
        plain.step()
    torch.testing.assert_close(formed.schedule.state_dict(), plain.schedule.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(formed.q, plain.q, rtol=1e-5, atol=1e-6)


def test_a_ramp_moves_its_knobs() -> None:
    given = layer((8,), torch.float32)
    loss = GeneralizedCrossEntropyLoss(schedule=Ramp(4, q=(0.2, 1.0)))
    seen = set()
    for _ in range(3):
        got = linear_loss(loss, **given)
        torch.testing.assert_close(got, unfused(GeneralizedCrossEntropyLoss(loss.knobs["q"]), **given))
        seen.add(got.item())
        loss.step()
    assert len(seen) == 3


class Language(nn.Module):
    """A causal language model whose embedding is its head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(C, D)
        self.body = nn.Linear(D, D)
        self.criterion = LinearLoss(
            CrossEntropyLoss(),
            D,
            C,
            classifier=self.embedding.weight,
            shift=1,
            softcap=5.0,
            scale=nn.Parameter(torch.ones(())),
        )

    def forward(self, tokens: Tensor, fused: bool = True) -> Tensor:
        features = self.body(self.embedding(tokens))
        if fused:
            return self.criterion(features, tokens)
        logits = self.criterion.logits(features)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_a_tied_embedding_is_trained_by_both_of_its_uses() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(C, (4, 9))
    models = [Language(), Language()]
    models[1].load_state_dict(models[0].state_dict())
    assert {name for name, _ in models[0].named_parameters()} == {
        "embedding.weight", "body.weight", "body.bias", "criterion.scale"
    }  # fmt: skip
    outcomes: list[list[float]] = []
    for model, fused in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        outcomes.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(tokens, fused)
            loss.backward()
            optimizer.step()
            outcomes[-1].append(loss.item())
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-6)
    assert outcomes[0][-1] < outcomes[0][0]
    assert models[0].criterion.classifier is models[0].embedding.weight


def test_an_existing_head_is_taken_as_it_is() -> None:
    head = nn.Linear(D, C, bias=False)
    form = LinearLoss(CrossEntropyLoss(), D, C, classifier=head)
    assert form.classifier is head
    given = layer((3, 5), torch.float32)
    got = form(given["input"], given["target"])
    torch.testing.assert_close(got, unfused(CrossEntropyLoss(), given["input"], head.weight, given["target"]))


def test_features_of_the_older_module_stand_where_classes_do() -> None:
    older = LinearDynamicsAwareLoss(D, C, 1.2, 1.2, **fixed)
    given = layer((4, 5), torch.float32)
    newer = LinearLoss(DynamicsAwareLoss(1.2, 1.2, **fixed), D, C, classifier=older.classifier)
    torch.testing.assert_close(
        older(given["input"].movedim(-1, 1), given["target"]), newer(given["input"], given["target"])
    )
