"""Measuring in reduced precision: when it is done, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from conftest import items, tiny_gpt2, tiny_llama

from llm_pruner import SmartPruner
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.search import passes
from llm_pruner.search.passes import TokenCost, reduced
from llm_pruner.search.removal_quality import RemovalQuality


@pytest.fixture
def faster(monkeypatch):
    """A processor that is faster in bfloat16, and no model too small."""
    monkeypatch.setattr(passes, "SMALLEST", 0)
    times = {torch.float32: 2.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(passes, "_seconds", lambda _, dtype: times[dtype])
    return times


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_copy_is_in_bfloat16_and_the_model_as_it_was(faster, tokenizer, make):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stack = LayerStack(model)
    half = reduced(stack)
    assert {one.dtype for one in half.model.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    exact, near = (RemovalQuality(one, tokenizer, items(12)) for one in (stack, half))
    for removed in [(2,), (3, 5)]:
        assert near.change(removed) == pytest.approx(exact.change(removed), abs=0.02)


def test_tied_weights_stay_tied(faster):
    model = tiny_gpt2()
    half = reduced(LayerStack(model)).model
    assert half.lm_head.weight is half.transformer.wte.weight


@pytest.mark.parametrize("reason", ["small", "no faster", "bfloat16 already"])
def test_no_copy_without_a_gain(faster, monkeypatch, reason):
    model = tiny_llama()
    if reason == "small":
        monkeypatch.setattr(passes, "SMALLEST", 10**9)
    elif reason == "no faster":
        faster[torch.bfloat16] = 1.9
    else:
        model = model.to(torch.bfloat16)
    assert reduced(LayerStack(model)) is None


def test_a_trial_takes_time():
    matrix = torch.nn.Parameter(torch.ones(64, 32))
    assert 0 < passes._seconds(matrix, torch.float32) < 1


def test_smart_decides_in_full_precision(faster, tokenizer):
    """The changes of its swaps are those of the exact model, the sets those without rounding."""
    model = tiny_llama()
    pruner = SmartPruner(model, tokenizer, protect=(0, 0))
    found = pruner.optimize_selection(None, items(24), n_layers=3)
    (half,) = pruner._roughs.values()
    assert half.measured > pruner.quality(items(24)).measured
    exact = RemovalQuality(LayerStack(model), tokenizer, items(24))
    for step in pruner.steps:
        if step["action"] == "exchange":
            assert step["change"] == pytest.approx(exact.change(step["removed"]), rel=1e-6)
    faster[torch.bfloat16] = 9.0
    plain = SmartPruner(model, tokenizer, protect=(0, 0))
    other = plain.optimize_selection(None, items(24), n_layers=3)
    assert exact.change(found) == pytest.approx(exact.change(other), abs=0.02)
    assert list(plain._roughs.values()) == [None]


def test_what_a_token_costs_is_that_of_layers_and_head():
    stack = LayerStack(tiny_llama())
    cost = TokenCost.of(stack)
    one = sum(weight.numel() for weight in stack[0].parameters())
    assert cost.layer == one
    assert cost.head >= stack.model.lm_head.weight.numel()
    assert cost.of_pass(3) == 3 * one + cost.head
    passes = [6, 5], [7, 6]  # candidates that are left, and layers of the cut model
    naive = cost.of_pass(8) + sum(n * cost.of_pass(d) for n, d in zip(*passes, strict=True))
    assert cost.of_naive_greedy(6, 2) == pytest.approx(naive)


def test_measuring_counts_its_work(tokenizer):
    stack = LayerStack(tiny_llama())
    quality = RemovalQuality(stack, tokenizer, items(12))
    sets = [(layer,) for layer in range(8)]
    wanted = quality.work_for(sets)
    quality.measure(sets)
    assert quality.work == pytest.approx(wanted)
    assert quality.work_for(sets) == 0
    each = sum(quality.token_cost.of_pass(layers) for layers in [8, *range(8)])
    assert quality.work == pytest.approx(each * quality.tokens)
