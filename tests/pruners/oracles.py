"""Slow oracles of the strategies: they share no code with the package.

They read one unpadded sequence at a time, remove layers by rebuilding the model, and use the
model's own loss and plain Python arithmetic.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import items, tiny_gpt2, tiny_llama
from torch import nn

DEPTH = 6
MIXED = [*items(4), "the old bird sat on our house and saw one mat", "a red cat in this tree"]


def random_llama(seed: int = 0, depth: int = DEPTH) -> nn.Module:
    """A tiny Llama with other random weights for every seed."""
    model = tiny_llama(depth)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2, generator=generator)
    return model


def random_gpt2(seed: int = 0, depth: int = DEPTH) -> nn.Module:
    """The one tiny GPT-2: another family, learned positions, layers under another name."""
    assert seed == 0
    return tiny_gpt2(depth)


BOTH = pytest.mark.parametrize("build", [random_llama, random_gpt2])


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def without(model: nn.Module, removed: list[int]) -> nn.Module:
    """A copy of `model` from which layers were deleted by hand."""
    rebuilt = copy.deepcopy(model)
    layers = layers_of(rebuilt)
    for index in sorted(removed, reverse=True):
        del layers[index]
    rebuilt.config.num_hidden_layers = len(layers)
    for position, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    return rebuilt


def token_ids(tokenizer, item) -> tuple[list[int], int]:
    """Token ids of an item, and how many of them belong to the prompt."""
    if isinstance(item, str):
        return tokenizer(item)["input_ids"], 0
    prompt = f"Question: {item['prompt']}\nAnswer:"
    ids = tokenizer(f"{prompt} {item['reference']}")["input_ids"]
    return ids, len(tokenizer(prompt)["input_ids"])


def slow_loss(model: nn.Module, tokenizer, data) -> float:
    """Mean over scored tokens of the model's own loss, one item at a time."""
    total, count = 0.0, 0
    for item in data:
        ids, n_prompt = token_ids(tokenizer, item)
        labels = [-100] * n_prompt + ids[n_prompt:]
        scored = sum(label != -100 for label in labels[1:])
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        total += loss * scored
        count += scored
    return total / count


def slow_change(model: nn.Module, tokenizer, data, removed: list[int]) -> float:
    """Relative change of the likelihood per token: exp of minus the rise of the loss, minus 1."""
    full = slow_loss(model, tokenizer, data)
    return math.expm1(full - slow_loss(without(model, removed), tokenizer, data))


def slow_streams(model: nn.Module, tokenizer, data) -> list[torch.Tensor]:
    """Per item the residual stream (states, tokens, hidden) in float64, by hooks set here."""
    states: list[torch.Tensor] = []

    def enter(module, args):
        states.append(args[0][0])

    def leave(module, args, output):
        states.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [layer.register_forward_pre_hook(enter) for layer in layers_of(model)]
    handles.append(layers_of(model)[-1].register_forward_hook(leave))
    streams = []
    for item in data:
        states.clear()
        with torch.no_grad():
            model(torch.tensor([token_ids(tokenizer, item)[0]]))
        streams.append(torch.stack(states).double())
    for handle in handles:
        handle.remove()
    return streams


def close(want):
    return pytest.approx(want, rel=1e-4, abs=1e-6)
