"""Healing: stages and their gate, training and its checkpoints, and what must stay whole."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import items, tiny_llama
from transformers import AutoModelForCausalLM

from llm_pruner.atomic_output import clear_checkpoints
from llm_pruner.data.sampling import split_items
from llm_pruner.data.tokens import encode_batches
from llm_pruner.errors import (
    InvalidDataError,
    InvalidPlanError,
    LLMPrunerError,
    MissingDependencyError,
    NonFiniteError,
    OutOfMemoryError,
    OutputError,
    UnsupportedModelError,
)
from llm_pruner.evaluation import likelihood
from llm_pruner.evaluation.likelihood import batch_nll
from llm_pruner.healing import heal, linear, lora
from llm_pruner.healing.heal import HealingData, heal_lora, heal_model
from llm_pruner.healing.lora_settings import LoraSettings, default_rate
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.pruners.measured import AblationPruner
from llm_pruner.results import PruningPlan

REMOVED = [3, 4, 6]
SHORT = LoraSettings(steps=40)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_whole(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- the stages and their gate ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "lora"])
def test_healing_helps_and_leaves_the_original_whole(model, tokenizer, method):
    stack = LayerStack(model)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    pruned = stack.remove(REMOVED)
    healed, record = heal_model(stack, REMOVED, pruned, tokenizer, method, items(60), lora=SHORT)
    assert_whole(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.requires_grad for p in healed.parameters()] == [True] * len(list(healed.parameters()))
    assert record["method"] == method
    assert record["accepted"], "on these models both repairs lower the held-out loss"
    assert [stage["method"] for stage in record["stages"]] == ["linear", "lora"][
        : 1 + (method == "lora")
    ]
    kept = [stage["loss"] for stage in record["stages"] if stage["kept"]]
    assert record["healed"] == kept[-1] < record["cut"]
    assert sorted(kept, reverse=True) == kept
    assert type(healed) is type(model)
    assert healed.state_dict().keys() == pruned.state_dict().keys()
    assert not healed.training
    assert healed.config.to_dict() == pruned.config.to_dict()


def test_a_repair_that_does_not_help_is_rolled_back(llama, tokenizer, monkeypatch):
    stack = LayerStack(llama)

    def spoil(stack, removed, pruned, train, held_out):
        worse = stack.remove([*removed, 2])
        with torch.no_grad():
            worse.lm_head.weight = torch.nn.Parameter(worse.lm_head.weight * 20)
        return worse, []

    monkeypatch.setattr(heal, "heal_linear", spoil)
    pruned = stack.remove(REMOVED)
    healed, record = heal_model(stack, REMOVED, pruned, tokenizer, "linear", items(20))
    assert healed is pruned
    assert record["accepted"] is False
    assert record["healed"] == record["cut"] < record["stages"][0]["loss"]
    assert record["stages"][0]["kept"] is False


def test_training_follows_what_the_closed_form_left(llama, tokenizer, monkeypatch):
    stack, given = LayerStack(llama), []

    def keep(stack, removed, pruned, *rest):
        given.append(pruned)
        return pruned, {}

    monkeypatch.setattr(heal, "heal_lora", keep)
    pruned = stack.remove(REMOVED)
    healed, record = heal_model(stack, REMOVED, pruned, tokenizer, "lora", items(60))
    assert given == [healed], "trained on the repaired model, and no better than it"
    assert [stage["kept"] for stage in record["stages"]] == [True, False]


def test_where_the_closed_form_cannot_be_training_does_without(tokenizer):
    model = zoo.build("jetmoe", vocab_size=64).eval()
    stack = LayerStack(model)
    tools = stack, [3], stack.remove([3]), tokenizer
    with pytest.raises(UnsupportedModelError, match="not for JetMoe"):
        heal_model(*tools, "linear", items(20))
    _, record = heal_model(*tools, "lora", items(30), lora=LoraSettings(steps=2))
    assert "not for JetMoe" in record["stages"][0]["skipped"]
    assert record["stages"][1]["method"] == "lora"


def test_losses_in_the_record_are_those_of_items_held_out(llama, tokenizer):
    stack = LayerStack(llama)
    data = items(40)
    _, record = heal_model(stack, REMOVED, stack.remove(REMOVED), tokenizer, "linear", data)
    _, held_out = split_items(data, 0.6)
    _, gate = split_items(held_out, 0.5)
    assert record["full"] == pytest.approx(batch_nll(llama, encode_batches(tokenizer, gate)))


def test_no_item_is_in_two_parts(llama, tokenizer):
    data = HealingData.of(llama, tokenizer, items(100))
    train = {tuple(row.ids) for row in data.train}
    held = [
        {
            tuple(ids[mask.bool()].tolist())
            for batch in part
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        }
        for part in (data.tune, data.gate)
    ]
    assert train
    assert all(held)
    assert not train & held[0]
    assert not train & held[1]
    assert not held[0] & held[1]


ARCHITECTURES = "llama qwen3 gemma3_text gpt2 gpt_neox opt phi mixtral falcon olmo2".split()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_healed_checkpoints_are_plain_and_verified(name, tokenizer, tmp_path, monkeypatch):
    """Both repairs, each kept; then loaded by transformers alone, with and without cache."""
    falling = itertools.count(0, -1)
    for module in (heal, linear, lora):
        monkeypatch.setattr(module, "batch_nll", lambda model, batches: next(falling))
    model = zoo.build(name).eval()
    before = snapshot(model)
    pruner = AblationPruner(model, tokenizer, protect=(1, 1))
    healed, _ = pruner.prune_and_save(
        [3], tmp_path / "out", name, heal="lora", heal_data=items(40), lora=LoraSettings(steps=3)
    )
    plan = PruningPlan.load(tmp_path / "out" / "pruning_plan.json")
    assert [stage["kept"] for stage in plan.options["heal"]["stages"]] == [True, True]
    assert_whole(model, before)
    plain = pruner.layers.remove([3])
    reloaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert reloaded.state_dict().keys() == plain.state_dict().keys()
    changed = [
        name
        for name, tensor in reloaded.state_dict().items()
        if not torch.equal(tensor, plain.state_dict()[name])
    ]
    assert changed
    want = zoo.logits(healed)
    torch.testing.assert_close(zoo.logits(reloaded.eval()), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(zoo.logits(reloaded, use_cache=True), want, rtol=1e-4, atol=1e-4)


# --- training ---------------------------------------------------------------------------------


def trained(model, tokenizer, **settings):
    stack = LayerStack(model)
    data = HealingData.of(model, tokenizer, items(60))
    settings = {"steps": 40, **settings}
    return heal_lora(
        stack, REMOVED, stack.remove(REMOVED), tokenizer, data, LoraSettings(**settings)
    )


def gained(model, tokenizer, healed):
    data = HealingData.of(model, tokenizer, items(60))
    return batch_nll(LayerStack(model).remove(REMOVED), data.tune) - batch_nll(healed, data.tune)


@pytest.mark.parametrize(
    "settings",
    [{}, {"target": "text"}, {"hidden_weight": 0.5}, {"accumulate": 2}, {"precision": "bf16"}],
    ids=str,
)
def test_every_kind_of_training_lowers_the_loss(llama, tokenizer, settings):
    healed, told = trained(llama, tokenizer, **settings)
    assert gained(llama, tokenizer, healed) > 0
    assert told["best_step"] <= told["steps"] <= 40


def test_the_loss_is_the_divergence_from_the_full_model(llama, tokenizer, monkeypatch):
    """The first step's loss, before anything is learned, by a road of its own."""
    losses, batches = [], []
    compute = lora._Recovery.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        batches.append({name: tensor.clone() for name, tensor in inputs.items()})
        losses.append(compute(self, model, inputs, *args, **kwargs).item())
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(lora._Recovery, "compute_loss", watched)
    trained(llama, tokenizer, steps=1)
    trained(llama, tokenizer, steps=1, hidden_weight=2.0)
    stack = LayerStack(llama)
    pruned = stack.remove(REMOVED)
    given = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    real = given["attention_mask"].bool()
    with torch.no_grad():
        full = llama(**given, output_hidden_states=True)
        cut = pruned(**given, output_hidden_states=True)
    p, q = (torch.softmax(out.logits[real].double(), -1) for out in (full, cut))
    divergence = (p * (p / q).log()).sum(-1).mean().item()
    assert losses[0] == pytest.approx(divergence, rel=1e-4)
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    # After layers 0, 1, 2, 5 and 7 the stream should be what enters 1, 2, 5, 7 and the final norm.
    ends: list[torch.Tensor] = []
    for m in (llama, pruned):
        m.model.norm.register_forward_hook(lambda m, a, out: ends.append(a[0]))
        with torch.no_grad():
            m(**given)
    pairs = [(cut.hidden_states[i + 1], full.hidden_states[j]) for i, j in enumerate([1, 2, 5, 7])]
    far = [
        ((x[real] - t[real]).square().sum(-1) / t[real].square().sum(-1)).mean().item()
        for x, t in [*pairs, (ends[1], ends[0])]
    ]
    assert losses[1] == pytest.approx(divergence + 2.0 * sum(far) / 5, rel=1e-4)


def test_the_state_with_the_lowest_loss_is_returned(llama, tokenizer, monkeypatch):
    losses = []
    real = likelihood.batch_nll

    def watched(model, batches):
        losses.append(real(model, batches))
        return losses[-1]

    monkeypatch.setattr(lora, "batch_nll", watched)
    healed, told = trained(llama, tokenizer, learning_rate=0.05)
    data = HealingData.of(llama, tokenizer, items(60))
    assert real(healed, data.tune) == pytest.approx(min(losses), rel=1e-4)
    assert min(losses) < losses[-1], "at this rate the last state is not the best"
    assert told["best_step"] == 2 * (1 + losses.index(min(losses)))


def test_training_ends_when_the_loss_stops_falling(llama, tokenizer):
    _, told = trained(llama, tokenizer, learning_rate=0.5, patience=2)
    assert told["steps"] < 40


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("at", [1, 13, 37])
def test_a_killed_training_goes_on_and_ends_the_same(llama, tokenizer, monkeypatch, tmp_path, at):
    want, _ = trained(llama, tokenizer)
    compute, calls = lora._Recovery.compute_loss, []

    def killed(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == at:
            raise Killed
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(lora._Recovery, "compute_loss", killed)
    with pytest.raises(Killed):
        trained(llama, tokenizer, checkpoints=tmp_path / "healing")
    for path in (tmp_path / "healing").glob("checkpoint-*"):
        cut_short = path.with_name("checkpoint-999")
        cut_short.mkdir(exist_ok=True)
        (cut_short / "trainer_state.json").write_text('{"global_step": 99')
    got, told = trained(llama, tokenizer, checkpoints=tmp_path / "healing")
    assert calls[at] == (at - 1) // 2 * 2, "it went on from the last checkpoint"
    assert told["steps"] == 40
    for name, tensor in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_checkpoints_of_another_training_are_not_used(llama, tokenizer, tmp_path):
    trained(llama, tokenizer, checkpoints=tmp_path)
    assert list(tmp_path.glob("checkpoint-*"))
    want, _ = trained(llama, tokenizer, seed=1)
    got, _ = trained(llama, tokenizer, seed=1, checkpoints=tmp_path)
    for name, tensor in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], tensor)


def test_patience_is_counted_on_when_a_training_goes_on(llama, tokenizer, tmp_path):
    """A training that has ended because nothing improved is not trained on and on."""
    options = {"learning_rate": 0.5, "patience": 2, "checkpoints": tmp_path}
    _, first = trained(llama, tokenizer, **options)
    _, again = trained(llama, tokenizer, **options)
    assert first["steps"] < 40
    assert again["steps"] <= first["steps"] + 2, "one more check at the most"
    assert again["best_step"] == first["best_step"]


def test_a_folder_that_holds_something_else_is_refused(llama, tokenizer, tmp_path):
    for name in ("checkpoint-7", "checkpoint-best"):
        (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match="holds something that llm_pruner did not write"):
        trained(llama, tokenizer, checkpoints=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-7", "checkpoint-best"}
    clear_checkpoints(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_clearing_leaves_what_is_not_a_checkpoint(llama, tokenizer, tmp_path):
    trained(llama, tokenizer, steps=2, checkpoints=tmp_path / "one")
    (tmp_path / "one" / "notes.txt").write_text("mine")
    clear_checkpoints(tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["notes.txt"]
    trained(llama, tokenizer, steps=2, checkpoints=tmp_path / "two")
    clear_checkpoints(tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_training_leaves_random_states_modes_and_hooks_as_they_were(llama, tokenizer):
    llama.train()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    want = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    trained(llama, tokenizer, steps=2, hidden_weight=1.0)
    assert (random.random(), np.random.rand(), torch.rand(1)) == want
    assert all(module.training for module in llama.modules())
    assert not any(module._forward_hooks for module in llama.modules())


TWO_PROCESSES = """
import os, sys
sys.path[:0] = {tests!r}
from conftest import tiny_llama, word_tokenizer
from test_heal import gained, trained

tokenizer, model = word_tokenizer(), tiny_llama()
healed, told = trained(model, tokenizer, batch_size=4)
total = sum(p.double().abs().sum().item() for p in healed.parameters())
found = [told["steps"], f"{{total:.9f}}", gained(model, tokenizer, healed) > 0]
with open({place!r} + "/rank" + os.environ["RANK"], "w") as file:
    print(*found, file=file)
"""


def test_two_processes_return_the_same_healed_model(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(TWO_PROCESSES).format(
            tests=list(map(str, Path(__file__).parents[:2])), place=str(tmp_path)
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--standalone", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"rank{rank}").read_text().split() for rank in (0, 1))
    assert first == second
    assert first[2] == "True"


def test_the_default_rate_is_that_of_lora_at_the_usual_width(llama):
    llama.config.hidden_size = 4096
    assert default_rate(llama.config) == pytest.approx(2e-4)
    llama.config.hidden_size = 1024
    assert default_rate(llama.config) == pytest.approx(4e-4)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "data", "error", "message"),
    [
        ("magic", items(20), InvalidPlanError, "heal='magic' must be one of none, linear, lora"),
        ("linear", None, InvalidDataError, "needs heal_data"),
        ("lora", [], InvalidDataError, "needs heal_data"),
        ("linear", items(1), InvalidDataError, "has 1 items, and healing takes at least 20"),
        ("lora", items(19), InvalidDataError, "has 19 items"),
        ("linear", [*items(1) * 30, *items(2)], InvalidDataError, "different prompts|both sides"),
        ("linear", [{"prompt": "the"}] * 20, InvalidDataError, "no 'reference'"),
        (
            "linear",
            ["<pad> " * (2 + i) for i in range(30)],
            InvalidDataError,
            "nothing but padding",
        ),
    ],
)
def test_refusals(llama, tokenizer, method, data, error, message):
    stack = LayerStack(llama)
    with pytest.raises(error, match=message):
        heal_model(stack, [3], stack.remove([3]), tokenizer, method, data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 must be a whole number from 1"),
        ({"rank": 1.5}, "rank=1.5 must be a whole number"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be"),
        ({"hidden_weight": -1}, "hidden_weight=-1 must be a number from 0"),
        ({"target": "labels"}, "target='labels' must be one of teacher, text"),
        ({"precision": "fp8"}, "precision='fp8' must be one of auto, no, bf16, fp16"),
        ({"target": "text", "hidden_weight": 1.0}, "no meaning for target='text'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(InvalidPlanError, match=message):
        LoraSettings(**settings)


def test_a_loss_that_is_not_finite_is_an_error(llama, tokenizer):
    flags = [parameter.requires_grad for parameter in llama.parameters()]
    with pytest.raises(NonFiniteError, match=r"not finite at step \d+\. Lower the learning"):
        trained(llama, tokenizer, learning_rate=1e30)
    assert [parameter.requires_grad for parameter in llama.parameters()] == flags


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("no more"),
    ],
    ids=str,
)
def test_too_little_memory_is_told_plainly(llama, tokenizer, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(heal, "heal_linear", fail)
    stack = LayerStack(llama)
    with pytest.raises(OutOfMemoryError, match=r"Not enough memory to heal .*smaller batch_size"):
        heal_model(stack, [3], stack.remove([3]), tokenizer, "linear", items(20))
    assert issubclass(OutOfMemoryError, LLMPrunerError)
    assert issubclass(OutOfMemoryError, MemoryError)


def test_other_errors_are_not_taken_for_it(llama, tokenizer, monkeypatch):
    def fail(*args):
        raise RuntimeError("another thing")

    monkeypatch.setattr(heal, "heal_linear", fail)
    stack = LayerStack(llama)
    with pytest.raises(RuntimeError, match="another thing"):
        heal_model(stack, [3], stack.remove([3]), tokenizer, "linear", items(20))


def test_training_needs_peft(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llm_pruner\[heal\]'"):
        trained(tiny_llama(), tokenizer)
