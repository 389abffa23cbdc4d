"""Causal language models of Hugging Face, with random weights, train with losses of the family and make no logits."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dal_kernels import CrossEntropyLoss, DynamicsAwareLoss, GeneralizedCrossEntropyLoss, apply_to

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL, **KINDS[kind])
    return transformers.AutoModelForCausalLM.from_config(config).train()


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (3, 11), generator=generator)
    labels = tokens.clone()
    labels[0, 7:] = -100
    return {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_are_those_of_the_plain_model(kind: str) -> None:
    """With cross-entropy, whose loss the model has itself."""
    plain, fused = model(kind), apply_to(model(kind), CrossEntropyLoss())
    losses: list[list[float]] = []
    for net in (plain, fused):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        losses.append([])
        for step in range(4):
            output = net(**batch(step % 2))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            losses[-1].append(output.loss.item())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert losses[0][2] < losses[0][0]
    assert output.logits.shape == (3, 0, VOCABULARY)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(fused.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "loss", [GeneralizedCrossEntropyLoss(0.7), DynamicsAwareLoss(total_steps=3, pace="fixed")], ids=str
)
def test_the_loss_is_the_unfused_one(kind: str, loss: Any) -> None:
    net, data = apply_to(model(kind), loss), batch()
    logits = model(kind)(data["input_ids"]).logits[:, :-1].flatten(0, 1)
    expected = copy.deepcopy(loss)(logits, data["labels"][:, 1:].flatten())
    torch.testing.assert_close(net(**data).loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net(**data, return_dict=False)[0], expected, rtol=1e-4, atol=1e-6)


def test_counts_and_shifted_labels_of_a_trainer() -> None:
    plain, fused, data = model("llama"), apply_to(model("llama"), CrossEntropyLoss()), batch()
    for items in (40, torch.tensor(50)):
        calls = [net(**data, num_items_in_batch=items).loss for net in (plain, fused)]
        torch.testing.assert_close(*calls, rtol=1e-4, atol=1e-6)
    shifted = F.pad(data["labels"], (0, 1), value=-100)[:, 1:]
    got = fused(data["input_ids"], shift_labels=shifted).loss
    torch.testing.assert_close(got, plain(**data).loss, rtol=1e-4, atol=1e-6)


def test_a_model_stays_what_it_was(tmp_path: Path) -> None:
    fused, data = apply_to(apply_to(model("qwen2"), CrossEntropyLoss()), GeneralizedCrossEntropyLoss(0.7)), batch()
    plain = model("qwen2")
    assert set(fused.state_dict()) == set(plain.state_dict())
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    torch.testing.assert_close(fused(data["input_ids"]).logits, plain(data["input_ids"]).logits)
    evaluated = fused.eval()(**data)
    assert evaluated.logits.shape == (3, 11, VOCABULARY)
    torch.testing.assert_close(evaluated.loss, fused.train()(**data).loss, rtol=1e-5, atol=1e-6)
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        fused.get_output_embeddings().weight.zero_()
    torch.testing.assert_close(copied(**data).loss, evaluated.loss, rtol=1e-5, atol=1e-6)
    copied.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(plain)
    torch.testing.assert_close(loaded(data["input_ids"]).logits, plain(data["input_ids"]).logits)
    fused.gradient_checkpointing_enable()
    fused(**data).loss.backward()


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_a_model_is_copied_and_pickled_with_its_loss(way: str) -> None:
    net, data = apply_to(model("llama"), GeneralizedCrossEntropyLoss(0.7)), batch()
    stream = io.BytesIO()
    if way == "torch.save":
        torch.save(net, stream)
        stream.seek(0)
        again = torch.load(stream, weights_only=False)
    else:
        again = pickle.loads(pickle.dumps(net)) if way == "pickle" else copy.deepcopy(net)
    expected = net(**data)
    with torch.no_grad():
        net.get_output_embeddings().weight.zero_()
    found = again(**data)
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.logits.shape == expected.logits.shape
    assert type(again) is type(net)


def test_logits_of_another_kind_are_found_out() -> None:
    net = model("llama")

    class Louder(type(net)):  # type: ignore[misc]
        def forward(self, labels: Any = None, logits_to_keep: Any = 0, **named: Any) -> Any:
            output = super().forward(labels=labels, logits_to_keep=logits_to_keep, **named)
            output.logits = 2 * output.logits
            return output

    net.__class__ = Louder
    with pytest.raises(ValueError, match=r"model must make its logits by its head, .* got logits that differ"):
        apply_to(net, CrossEntropyLoss())(**batch())


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a causal language model of Hugging Face .* got Linear"):
        apply_to(nn.Linear(3, 4), CrossEntropyLoss())
    with pytest.raises(TypeError, match="loss must be a module of dal_kernels"):
        apply_to(model("llama"), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=rf"weight must have one value a class, shape \({VOCABULARY},\)"):
        apply_to(model("llama"), CrossEntropyLoss(weight=torch.ones(VOCABULARY - 1)))


@pytest.mark.parametrize("always", [False, True], ids=["asked for", "of its configuration"])
@pytest.mark.parametrize("as_tuple", [False, True], ids=["output", "tuple"])
def test_the_balance_of_experts_is_part_of_the_loss(always: bool, as_tuple: bool) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "mixtral", **SMALL, num_local_experts=3, router_aux_loss_coef=0.5, output_router_logits=always
    )
    plain = transformers.AutoModelForCausalLM.from_config(config).train()
    fused = apply_to(copy.deepcopy(plain), CrossEntropyLoss())
    asked = {} if always else {"output_router_logits": True}
    expected, found = (net(**batch(), **asked, return_dict=not as_tuple)[0] for net in (plain, fused))
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for of_found, of_expected in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(of_found.grad, of_expected.grad)


def test_a_forward_of_its_own_would_hide_the_loss() -> None:
    net = model("llama")
    net.forward = net.forward
    with pytest.raises(ValueError, match="call apply_to before"):
        apply_to(net, CrossEntropyLoss())


def test_a_model_that_goes_around_its_base_model_is_refused() -> None:
    config = transformers.AutoConfig.for_model(
        "opt", vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    net = apply_to(transformers.AutoModelForCausalLM.from_config(config).train(), CrossEntropyLoss())
    with pytest.raises(ValueError, match="must call its base_model"):
        net(**batch())
