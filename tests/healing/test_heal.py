"""Healing: what holds for every healer, the stages, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch
import zoo
from conftest import items
from transformers import AutoModelForCausalLM

from llm_pruner.data.sampling import split_items
from llm_pruner.data.tokens import encode_batches
from llm_pruner.errors import (
    InvalidDataError,
    InvalidPlanError,
    LLMPrunerError,
    NonFiniteError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from llm_pruner.evaluation.likelihood import batch_nll
from llm_pruner.healing import heal, linear, lora, lora_settings
from llm_pruner.healing import job as job_module
from llm_pruner.healing.heal import HEALERS, RUN_BEFORE, heal_model
from llm_pruner.healing.job import Healing, HealingJob, Pace
from llm_pruner.healing.lora_settings import LoraSettings
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.pruners.measured import AblationPruner
from llm_pruner.results import PruningPlan

REMOVED = [3, 4, 6]
ARCHITECTURES = (
    "llama qwen3 gemma3_text gpt2 gpt_neox opt phi mixtral falcon olmo2 granite minicpm3 mamba "
    "xmod jetmoe"
).split()
REFUSED = {"linear": ["xmod", "jetmoe"], "lora": ["mamba"], "full": []}


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- Every healer -----------------------------------------------------------------------------


@pytest.fixture(params=sorted(HEALERS))
def method(request):
    return request.param


def test_healing_lowers_the_held_out_loss_and_leaves_the_original_whole(model, tokenizer, method):
    stack = LayerStack(model)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    pruned = stack.remove(REMOVED)
    how = LoraSettings(steps=40)
    healed, record = heal_model(stack, REMOVED, pruned, tokenizer, method, items(60), lora=how)
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.requires_grad for p in healed.parameters()] == [True] * len(list(healed.parameters()))
    assert record["method"] == method
    assert record["accepted"], "on these models every healer lowers the held-out loss"
    stages = record["stages"]
    assert [stage["method"] for stage in stages] == [*RUN_BEFORE.get(method, ()), method]
    kept = [stage["loss"] for stage in stages if stage["kept"]]
    assert record["healed"] == kept[-1] < record["cut"]
    assert sorted(kept, reverse=True) == kept
    assert type(healed) is type(model)
    assert healed.state_dict().keys() == pruned.state_dict().keys()
    assert not healed.training
    assert healed.config.to_dict() == pruned.config.to_dict()


def test_a_healer_that_does_not_help_is_rolled_back(llama, tokenizer, method, monkeypatch):
    stack = LayerStack(llama)

    def spoil(job, pruned):
        worse = job.stack.remove([*job.removed, 2])
        with torch.no_grad():
            worse.lm_head.weight = torch.nn.Parameter(worse.lm_head.weight * 20)
        return worse, {}

    for name in HEALERS:
        monkeypatch.setitem(HEALERS, name, spoil)
    pruned = stack.remove(REMOVED)
    healed, record = heal_model(stack, REMOVED, pruned, tokenizer, method, items(20))
    assert healed is pruned
    assert record["accepted"] is False
    assert record["healed"] == record["cut"]
    assert all(stage["loss"] > record["cut"] for stage in record["stages"])
    assert [stage["kept"] for stage in record["stages"]] == [False] * len(record["stages"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_healed_checkpoints_are_plain_and_verified(name, tokenizer, tmp_path, monkeypatch, method):
    """All stages kept; then loaded by transformers alone, with and without cache."""
    falling = itertools.count(0, -1)
    for module in (heal, lora):
        monkeypatch.setattr(module, "batch_nll", lambda model, batches: next(falling))
    monkeypatch.setattr(linear, "validation_loss", lambda streams, index: next(falling))
    model, out = zoo.build(name).eval(), tmp_path / "out"
    before = snapshot(model)
    pruner = AblationPruner(model, tokenizer, protect=(1, 1))
    options = {"heal": method, "heal_data": items(40), "lora": LoraSettings(steps=3)}
    if name in REFUSED[method]:
        with pytest.raises(UnsupportedModelError, match=f"heal='{method}' is not for .* Use heal="):
            pruner.prune_and_save([3], out, name, **options)
        assert_unchanged(model, before)
        assert not out.exists()
        return
    healed, _ = pruner.prune_and_save([3], out, name, **options)
    plan = PruningPlan.load(out / "pruning_plan.json")
    for stage in plan.healing["stages"]:
        if name in REFUSED[stage["method"]]:
            assert f"heal='{stage['method']}' is not for" in stage["skipped"]
        else:
            assert stage["kept"]
        if "layers" in stage:
            assert stage["layers"]
            assert all(layer["error"] < 1 for layer in stage["layers"])
    assert_unchanged(model, before)
    plain = pruner.layers.remove([3]).state_dict()
    reloaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    weights = reloaded.state_dict()
    assert weights.keys() == plain.keys()
    assert any(not torch.equal(tensor, plain[key]) for key, tensor in weights.items())
    want = zoo.logits(healed)
    torch.testing.assert_close(zoo.logits(reloaded.eval()), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(zoo.logits(reloaded, use_cache=True), want, rtol=1e-4, atol=1e-4)


def test_a_full_model_that_is_not_finite_is_an_error(llama, tokenizer, method):
    job = HealingJob.of(LayerStack(llama), [3], tokenizer, items(40), LoraSettings(steps=2))
    pruned = job.stack.remove([3])
    flags = [parameter.requires_grad for parameter in llama.parameters()]
    with torch.no_grad():
        llama.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    message = "heal='linear': activations are NaN|loss became nan at step 0. Lower the learning"
    with pytest.raises(NonFiniteError, match=message):
        HEALERS[method](job, pruned)
    assert [parameter.requires_grad for parameter in llama.parameters()] == flags


@pytest.mark.parametrize(
    ("error", "lacks_memory"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (MemoryError("no more"), True),
        (RuntimeError("another thing"), False),
    ],
    ids=str,
)
def test_too_little_memory_is_one_error(llama, tokenizer, monkeypatch, method, error, lacks_memory):
    def fail(job, pruned):
        raise error

    monkeypatch.setitem(HEALERS, method, fail)
    stack = LayerStack(llama)
    kind, message = type(error), "another thing"
    if lacks_memory:
        kind, message = OutOfMemoryError, r"Not enough memory to heal .*smaller batch_size"
    with pytest.raises(kind, match=message):
        heal_model(stack, [3], stack.remove([3]), tokenizer, method, items(20))
    assert issubclass(OutOfMemoryError, LLMPrunerError)
    assert issubclass(OutOfMemoryError, MemoryError)


# --- Stages and items -------------------------------------------------------------------------


def test_a_stage_begins_with_what_the_stage_before_left(llama, tokenizer, monkeypatch):
    stack, given = LayerStack(llama), []

    def keep(job, pruned):
        given.append(pruned)
        return pruned, {}

    monkeypatch.setitem(HEALERS, "lora", keep)
    healed, record = heal_model(stack, REMOVED, stack.remove(REMOVED), tokenizer, "lora", items(60))
    assert given == [healed], "trained on the healed model, and no better than it"
    assert [stage["kept"] for stage in record["stages"]] == [True, False]


def test_losses_in_the_record_are_those_of_items_held_out(llama, tokenizer):
    stack = LayerStack(llama)
    data = items(40)
    _, record = heal_model(stack, REMOVED, stack.remove(REMOVED), tokenizer, "linear", data)
    _, held_out = split_items(split_items(data, 0.6)[1], 0.5)
    assert record["full"] == pytest.approx(batch_nll(llama, encode_batches(tokenizer, held_out)))


def test_no_item_is_in_two_parts(llama, tokenizer):
    job = HealingJob.of(LayerStack(llama), [3], tokenizer, items(100))

    def texts(batches):
        rows = [row for b in batches for row in zip(b.input_ids, b.attention_mask, strict=True)]
        return {tuple(ids[mask.bool()].tolist()) for ids, mask in rows}

    parts = [texts(part) for part in (job.train_batches(), job.validation, job.held_out)]
    assert all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts))


@pytest.mark.parametrize(
    ("method", "data", "error", "message"),
    [
        ("magic", items(20), InvalidPlanError, "heal='magic' must be one of none, linear, lora"),
        ("linear", None, InvalidDataError, "needs heal_data"),
        ("lora", [], InvalidDataError, "needs heal_data"),
        ("linear", items(1), InvalidDataError, "has 1 items; healing needs at least 20"),
        ("lora", items(19), InvalidDataError, "has 19 items"),
        ("linear", [*items(1) * 30, *items(2)], InvalidDataError, "different prompts|both sides"),
        ("linear", [{"prompt": "the"}] * 20, InvalidDataError, "no 'reference'"),
        ("linear", ["<pad> " * (2 + i) for i in range(30)], InvalidDataError, "but padding"),
    ],
)
def test_refusals(llama, tokenizer, method, data, error, message):
    stack = LayerStack(llama)
    with pytest.raises(error, match=message):
        heal_model(stack, [3], stack.remove([3]), tokenizer, method, data)


# --- Limits -----------------------------------------------------------------------------------


def test_of_the_tokens_no_more_than_asked_for_are_trained_on(llama, tokenizer):
    def tokens(limit):
        how = Healing("linear", tokens=limit)
        job = HealingJob.of(LayerStack(llama), [3], tokenizer, items(100), healing=how)
        return [row.ids for row in job.train], job

    every, whole = tokens(None)
    some, limited = tokens(300)
    assert 250 < sum(map(len, some)) <= 300 < sum(map(len, every))
    assert all(row in every for row in some)
    assert tokens(300)[0] == some
    assert len(tokens(1)[0]) == 1, "there is always something to train on"
    assert len(limited.held_out) == len(whole.held_out)


def test_where_there_is_much_text_most_of_it_is_trained_on(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(job_module, "ENOUGH", 200)
    job = HealingJob.of(LayerStack(llama), [3], tokenizer, items(120))
    parts = [
        sum(int(batch.attention_mask.sum()) for batch in part)
        for part in (job.train_batches(), job.validation, job.held_out)
    ]
    assert parts[0] > 0.7 * sum(parts)
    assert all(150 < part < 250 for part in parts[1:])


def test_a_healing_that_has_no_time_leaves_a_whole_model(llama, tokenizer, method):
    stack = LayerStack(llama)
    how, training = Healing(method, minutes=1e-4), LoraSettings(steps=40)
    pruned = stack.remove(REMOVED)
    healed, record = heal_model(stack, REMOVED, pruned, tokenizer, how, items(60), lora=training)
    assert record["minutes"] == 1e-4
    assert record["healed"] <= record["cut"]
    again = batch_nll(healed, encode_batches(tokenizer, items(10)))
    assert 0 < again < 20
    assert all(stage.get("steps", 0) < 40 for stage in record["stages"])


@pytest.mark.parametrize("minutes", [None, 60])
def test_only_a_training_without_a_limit_of_time_has_one_of_steps(
    minutes, llama, tokenizer, monkeypatch
):
    monkeypatch.setattr(lora_settings, "MAX_STEPS", 3)
    monkeypatch.setattr(lora_settings, "EPOCHS", 2)
    stack, how = LayerStack(llama), Healing("lora", minutes=minutes)
    given = stack, REMOVED, stack.remove(REMOVED), tokenizer, how, items(60)
    _, record = heal_model(*given, lora=LoraSettings(patience=99))
    steps = record["stages"][-1]["steps"]
    assert steps == 3 if minutes is None else steps > 3


def test_time_that_runs_short_is_spread_over_the_layers(llama, tokenizer, monkeypatch):
    """The clock stands still but in the fits: after the first layers fewer batches are used."""
    clock = itertools.count(0, 1e-3)
    monkeypatch.setattr(linear.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(linear, "_afforded", lambda job, batches, lowest: batches)
    used = []
    true = linear._Streams.aim

    def aim(self, index, writers):
        used.append(len(self.batches))
        true(self, index, writers)

    monkeypatch.setattr(linear._Streams, "aim", aim)
    stack = LayerStack(llama)
    job = HealingJob.of(stack, [1], tokenizer, items(200), healing=Healing("linear"))
    job = dataclasses.replace(job, deadline=0.02)
    _, outcome = heal.heal_linear(job, stack.remove([1]))
    train = used[::2]
    assert train[0] > train[-1] >= 1
    assert outcome["layers"]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"tokens": 0}, "tokens=0 must be a whole number"),
        ({"tokens": 1.5}, "tokens=1.5 must be a whole number"),
        ({"minutes": 0}, "minutes=0 must be a positive number"),
        ({"minutes": float("inf")}, "minutes=inf must be a positive number"),
        ({"method": "none", "tokens": 5}, "heals nothing"),
    ],
)
def test_limits_that_cannot_be(limits, message):
    with pytest.raises(InvalidPlanError, match=message):
        Healing(**{"method": "linear", **limits})


def test_the_log_names_the_parts_and_the_time_left(llama, tokenizer, method, caplog):
    caplog.set_level("INFO", "llm_pruner")
    stack, training = LayerStack(llama), LoraSettings(steps=6)
    pruned = stack.remove(REMOVED)
    how = Healing(method, minutes=60)
    heal_model(stack, REMOVED, pruned, tokenizer, how, items(60), lora=training)
    lines = [record.getMessage() for record in caplog.records]
    first = r"Healing: [\d,]+ tokens to train on, \d+ for validation, \d+ held out. "
    first += r"Time limit: 1 h 0 min."
    assert re.fullmatch(first, lines[0])
    assert lines[1].startswith("Held-out loss: full ")
    assert any(re.fullmatch(r"Layer 2: validation loss .*; \d+ s left", line) for line in lines)
    steps = [line for line in lines if line.startswith("Step ")]
    assert bool(steps) is how.trains
    assert all(
        re.fullmatch(r"Step \d of 6: validation loss [\d.]+(; \d+ s left)?", s) for s in steps
    )


def test_a_training_with_a_time_limit_learns_as_one_planned_for_that_time(monkeypatch):
    """The rate rises and falls by steps, or by the clock where that is further on."""
    clock = [0.0]
    monkeypatch.setattr(heal.time, "monotonic", lambda: clock[0])

    class Limited:
        seconds_left = 100.0

    class Free:
        seconds_left = float("inf")

    free, limited = Pace(Free, 1000), Pace(Limited, 1000)
    rates = [free.rate(step) for step in (0, 25, 50, 525, 1000)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])
    clock[0] = 2.5
    assert limited.rate(1) == pytest.approx(0.5)
    clock[0] = 52.5
    assert limited.rate(200) == pytest.approx(0.5)
    assert limited.rate(1000) == pytest.approx(0)
    clock[0] = 100.0
    assert limited.share(10) == 1
    assert free.share(10) == 0.01
