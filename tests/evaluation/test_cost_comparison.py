"""Size and speed: sizes against closed forms, times against a clock that the test winds."""

from __future__ import annotations

import copy

import pytest
import torch
from test_evaluation import build, tokenizer
from transformers import MambaConfig, MambaForCausalLM

from llm_pruner.errors import InvalidDataError
from llm_pruner.evaluation import cost_comparison
from llm_pruner.evaluation.cost_comparison import cache_bytes, compare_cost, machine
from llm_pruner.model.layer_stack import LayerStack

__all__ = ["tokenizer"]


@pytest.fixture(scope="module")
def models():
    full = build("llama")
    return full, LayerStack(full).remove([1])


def mamba(layers: int):
    config = MambaConfig(
        vocab_size=258, hidden_size=16, state_size=4, num_hidden_layers=layers, eos_token_id=1
    )
    return MambaForCausalLM(config).eval()


def by_name(rows):
    return {row.name: row for row in rows}


def test_sizes_are_counted(models, tokenizer):
    rows = by_name(compare_cost(*models, tokenizer, repeats=1, new_tokens=2))
    assert (rows["layers"].before, rows["layers"].after) == (3, 2)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert [rows["parameters"].before, rows["parameters"].after] == counts
    assert rows["weights"].before == pytest.approx(4 * counts[0] / 1e6)
    per_layer = 2 * 2 * 8 * 4  # keys and values, two heads of 8 numbers, float32
    cache = rows["cache per token"]
    assert (cache.before, cache.after) == (3 * per_layer, 2 * per_layer)
    sizes = [row for row in rows.values() if row.group == "size"]
    assert all(row.low is None and row.count is None for row in sizes)


def test_caches_of_other_kinds(models):
    assert cache_bytes(build("gpt2")) == 3 * 2 * 32 * 4
    half = copy.deepcopy(models[0]).to(torch.bfloat16)
    assert cache_bytes(half) == cache_bytes(models[0]) / 2


def test_what_has_no_cache_has_no_row(tokenizer):
    models = mamba(3), mamba(2)
    assert cache_bytes(models[0]) == 0
    rows = by_name(compare_cost(*models, tokenizer, repeats=1, prompt_tokens=4, new_tokens=3))
    assert "cache per token" not in rows
    assert rows["layers"].after == 2
    assert rows["decode, batch 8"].before > 0


@pytest.mark.parametrize("repeats", [3, 6])
def test_the_models_take_turns_and_the_clock_is_read_at_every_token(
    models, tokenizer, monkeypatch, repeats
):
    clock, turns = [0.0], []
    pace = {id(models[0]): (4.0, 2.0), id(models[1]): (2.0, 1.0)}  # prefill, one token

    def watch(model):
        forward = model.forward

        def call(*args, **kwargs):
            size, width = kwargs["input_ids"].shape
            if width > 1:
                turns.append((model, size, width))
            late = 0.5 * (len(turns) // 2 % repeats)  # every round slower than the last
            clock[0] += pace[id(model)][width == 1] * (1 + late)
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", call)

    monkeypatch.setattr(cost_comparison, "cache_bytes", lambda model, token: 0)
    for model in models:
        watch(model)
        model.generation_config.eos_token_id = list(range(0, 258, 2))  # would stop soon
    monkeypatch.setattr(cost_comparison.time, "perf_counter", lambda: clock[0])
    rows = by_name(
        compare_cost(*models, tokenizer, batch=4, prompt_tokens=10, new_tokens=5, repeats=repeats)
    )
    assert [model for model, _, _ in turns] == [*models] * (2 * (repeats + 1))
    assert [size for _, size, _ in turns] == [1] * 2 * (repeats + 1) + [4] * 2 * (repeats + 1)
    assert {width for _, _, width in turns} == {10}
    for size in (1, 4):
        decode, prefill = rows[f"decode, batch {size}"], rows[f"prefill, batch {size}"]
        assert decode.after == pytest.approx(2 * decode.before, rel=0.5)
        assert prefill.count == repeats
        assert prefill.before / decode.before == pytest.approx(10 * 2 / 4, rel=1e-6)
    first = rows["time to first token"]
    assert first.before == pytest.approx(1e3 * 10 / rows["prefill, batch 1"].before, rel=0.05)
    assert (first.low is None) == (repeats < 6)
    assert "peak memory, batch 1" not in rows
    if repeats == 6:
        assert decode.low <= decode.change <= decode.high
        assert decode.verdict == "better"
        assert first.verdict == "better"


def test_values_are_medians_and_the_interval_is_the_range_of_pairs(models, tokenizer, monkeypatch):
    """Of the times that the runs take, here seconds per token; the first run does not count."""
    paces = {models[0]: [99, 5, 1, 4, 2, 3, 9], models[1]: [99, 6, 3, 4.5, 5, 3, 8]}
    left, clock = {model: [*pace, *pace] for model, pace in paces.items()}, [0.0]

    def generate(model, prompts, new_tokens, *, watch, **options):
        pace = left[model].pop(0)
        for _ in range(new_tokens):
            clock[0] += 1 / pace
            watch[0](None, None)

    monkeypatch.setattr(cost_comparison, "greedy", generate)
    monkeypatch.setattr(cost_comparison.time, "perf_counter", lambda: clock[0])
    row = by_name(compare_cost(*models, tokenizer, new_tokens=5))["decode, batch 1"]
    assert (row.before, row.after) == pytest.approx((3.5, 4.75))
    assert (row.low, row.high, row.count) == (pytest.approx(-1), pytest.approx(3), 6)
    assert row.verdict == "unclear"


def test_the_range_of_six_pairs_holds_the_median_at_least_95_times_of_100():
    torch.manual_seed(0)
    changes = torch.rand(4000, cost_comparison.ENOUGH) ** 3  # skewed, with median 1/8
    held = (changes.min(1).values <= 1 / 8) & (changes.max(1).values >= 1 / 8)
    assert held.float().mean() == pytest.approx(1 - 2 ** (1 - cost_comparison.ENOUGH), abs=0.01)
    assert 1 - 2 ** (1 - cost_comparison.ENOUGH) > 0.95 > 1 - 2 ** (2 - cost_comparison.ENOUGH)


def test_speed_stays_within_the_models_positions_and_modes(tokenizer):
    model = build("gpt2").train()
    options = {"batch": 2, "prompt_tokens": 5000, "new_tokens": 5000, "repeats": 1}
    rows = by_name(compare_cost(model, model, tokenizer, **options))
    assert "80 prompt and 80 new tokens" in rows["decode, batch 2"].note
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats=0"),
        ({"batch": 0}, "batch=0"),
        ({"new_tokens": 1}, r"new_tokens=1 .*at least 2"),
    ],
)
def test_impossible_counts_are_refused(models, tokenizer, options, message):
    with pytest.raises(InvalidDataError, match=message):
        compare_cost(*models, tokenizer, **options)


def test_the_machine_is_named(models):
    found = machine(models[0])
    assert found["threads"] == torch.get_num_threads()
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert found["cpu"]
    assert ("gpu" in found) == torch.cuda.is_available()
