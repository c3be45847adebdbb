"""Healing: the closed form against a plain solver, LoRA, the gate, and what must stay whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import items, tiny_llama
from transformers import AutoModelForCausalLM, Gemma2Config

from llm_pruner import healing
from llm_pruner.batching import encode_batches
from llm_pruner.errors import InvalidDataError, InvalidPlanError, UnsupportedModelError
from llm_pruner.healing import heal_linear, heal_lora, heal_model
from llm_pruner.layers import LayerStack
from llm_pruner.likelihood import batch_nll

REMOVED = [3, 4, 6]


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_whole(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("method", ["linear", "lora"])
def test_healing_helps_and_leaves_the_original_whole(model, tokenizer, method):
    stack = LayerStack(model)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    pruned = stack.remove(REMOVED)
    healed, record = heal_model(stack, REMOVED, pruned, tokenizer, method, items(60))
    assert_whole(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert record["method"] == method
    assert record["accepted"] == (record["healed"] < record["cut"])
    assert healed is not pruned if record["accepted"] else healed is pruned
    assert record["accepted"], "on these models both repairs lower the held-out loss"
    assert type(healed) is type(model)
    assert healed.state_dict().keys() == pruned.state_dict().keys()
    assert not any("lora" in name for name in healed.state_dict())


def test_closed_form_is_the_ridge_solution(llama, tokenizer, monkeypatch):
    """One block, one ridge: the folded weight equals a solve written out on whole matrices."""
    data = encode_batches(tokenizer, items(40), batch_size=4)
    ridge = 0.01
    monkeypatch.setattr(healing, "RIDGES", (ridge,))
    falling = itertools.count(0, -1)
    monkeypatch.setattr(healing, "batch_nll", lambda model, batches: next(falling))
    stack = LayerStack(llama)
    healed = heal_linear(stack, [3, 4], stack.remove([3, 4]), data, data)

    added, stream, target = [], [], []
    llama.model.layers[2].mlp.down_proj.register_forward_hook(lambda m, a, out: added.append(out))
    for batch in data:
        with torch.no_grad():
            states = llama(**batch.inputs(), output_hidden_states=True).hidden_states
        real = batch.attention_mask.bool()
        stream.append(states[3][real].double())
        target.append(states[5][real].double())
        added[-1] = added[-1].detach()[real].double()
    m, x, t = map(torch.cat, (added, stream, target))
    gram = m.T @ m
    alpha = ridge * gram.diagonal().mean()
    d = torch.linalg.solve(gram + alpha * torch.eye(len(gram)), m.T @ (t - x))
    want = (torch.eye(len(gram)) + d).T @ llama.model.layers[2].mlp.down_proj.weight.double()
    got = healed.model.layers[2].mlp.down_proj.weight.double()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_closed_form_recovers_a_planted_linear_block(tokenizer):
    """Layer 2 adds half of what layer 1's MLP added; without it the map must be 1.5 times."""
    model = tiny_llama()
    stack = LayerStack(model)

    class AddsHalf(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.attention_type = "full_attention"

        def forward(self, hidden_states, **kwargs):
            return hidden_states + 0.5 * self.layer.last

    first = model.model.layers[1]
    first.mlp.register_forward_hook(lambda m, a, out: setattr(first, "last", out))
    pruned = stack.remove([2])
    model.model.layers[2] = AddsHalf(first)
    data = encode_batches(tokenizer, items(60))
    healed = heal_linear(LayerStack(model, "model.layers"), [2], pruned, data, data)
    batch = encode_batches(tokenizer, items(75)[60:], batch_size=15)[0]
    real = batch.attention_mask.bool()
    with torch.no_grad():
        full, cut, repaired = (m(**batch.inputs()).logits[real] for m in (model, pruned, healed))
    assert (repaired - full).norm() < 0.02 * (cut - full).norm()


def test_lora_returns_the_best_state(llama, tokenizer, monkeypatch):
    """A learning rate gone wrong at the end must not cost what was gained before."""
    stack = LayerStack(llama)
    data = encode_batches(tokenizer, items(40))
    losses = []
    real = healing.batch_nll

    def watched(model, batches):
        losses.append(real(model, batches))
        return losses[-1]

    monkeypatch.setattr(healing, "batch_nll", watched)
    healed = heal_lora(stack, REMOVED, stack.remove(REMOVED), data[:3], data[3:])
    assert real(healed, data[3:]) == pytest.approx(min(losses), rel=1e-4)


def test_a_repair_that_does_not_help_is_rolled_back(llama, tokenizer, monkeypatch):
    stack = LayerStack(llama)

    def spoil(stack, removed, pruned, train, held_out):
        worse = stack.remove([*removed, 2])
        with torch.no_grad():
            worse.lm_head.weight = torch.nn.Parameter(worse.lm_head.weight * 20)
        return worse

    monkeypatch.setattr(healing, "heal_linear", spoil)
    pruned = stack.remove(REMOVED)
    healed, record = heal_model(stack, REMOVED, pruned, tokenizer, "linear", items(20))
    assert healed is pruned
    assert record["accepted"] is False
    assert record["healed"] > record["cut"]


def test_losses_in_the_record_are_those_of_items_held_out(llama, tokenizer):
    from llm_pruner.data import split_items

    stack = LayerStack(llama)
    data = items(40)
    _, record = heal_model(stack, REMOVED, stack.remove(REMOVED), tokenizer, "linear", data)
    _, held_out = split_items(data, 0.6)
    _, held_out = split_items(held_out, 0.5)
    assert record["full"] == pytest.approx(batch_nll(llama, encode_batches(tokenizer, held_out)))


def test_no_linear_map_before_the_cut(llama, tokenizer):
    stack = LayerStack(llama)
    with pytest.raises(UnsupportedModelError, match="layer 0 was removed"):
        heal_model(stack, [0], stack.remove([0]), tokenizer, "linear", items(20))


def test_a_norm_behind_the_last_map_is_refused(tokenizer):
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=None,
    )
    stack = LayerStack(AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(UnsupportedModelError, match=r"not for Gemma2ForCausalLM.*heal='lora'"):
        heal_model(stack, [3], stack.remove([3]), tokenizer, "linear", items(20))


@pytest.mark.parametrize(
    ("method", "data", "error", "message"),
    [
        ("magic", items(20), InvalidPlanError, "heal='magic' must be one of none, linear, lora"),
        ("linear", None, InvalidDataError, "needs heal_data"),
        ("lora", [], InvalidDataError, "needs heal_data"),
        ("linear", items(1), InvalidDataError, "both sides need at least one"),
        ("linear", [{"prompt": "the"}], InvalidDataError, "no 'reference'"),
    ],
)
def test_refusals(llama, tokenizer, method, data, error, message):
    stack = LayerStack(llama)
    with pytest.raises(error, match=message):
        heal_model(stack, [3], stack.remove([3]), tokenizer, method, data)
