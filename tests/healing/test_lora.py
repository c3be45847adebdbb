"""Healing by training: the loss, the best state, training checkpoints, and what is restored."""

from __future__ import annotations

import itertools
import random
import shutil
import sys
from collections import namedtuple
from functools import cache

import numpy as np
import pytest
import torch
import zoo
from conftest import items, tiny_llama

from llm_pruner import progress
from llm_pruner.atomic_output import clear_checkpoints
from llm_pruner.errors import (
    InvalidPlanError,
    MissingDependencyError,
    NonFiniteError,
    OutputError,
    UnsupportedModelError,
)
from llm_pruner.evaluation import likelihood, token_measures
from llm_pruner.evaluation.likelihood import batch_nll
from llm_pruner.healing import lora
from llm_pruner.healing.job import HealingJob
from llm_pruner.healing.lora import DistillationTrainer, heal_full, heal_lora
from llm_pruner.healing.lora_settings import LoraSettings, default_rate
from llm_pruner.model.layer_stack import LayerStack

REMOVED = [3, 4, 6]


def job_for(model, tokenizer, **settings):
    how = LoraSettings(**{"steps": 40, "learning_rate": 2.2e-3, **settings})
    return HealingJob.of(LayerStack(model), REMOVED, tokenizer, items(60), how)


def trained(model, tokenizer, healer=heal_lora, **settings):
    job = job_for(model, tokenizer, **settings)
    return healer(job, job.stack.remove(REMOVED))


def gained(model, tokenizer, healed):
    job = job_for(model, tokenizer)
    cut, after = (batch_nll(m, job.validation) for m in (job.stack.remove(REMOVED), healed))
    return cut - after


@pytest.mark.parametrize(
    "settings",
    [{}, {"target": "text"}, {"hidden_weight": 0.5}, {"accumulate": 2}, {"precision": "bf16"}],
    ids=str,
)
@pytest.mark.parametrize("healer", [heal_lora, heal_full])
def test_every_kind_of_training_lowers_the_loss(llama, tokenizer, settings, healer):
    healed, outcome = trained(llama, tokenizer, healer, **settings)
    assert gained(llama, tokenizer, healed) > 0
    assert outcome["best_step"] <= outcome["steps"] <= 40


@pytest.mark.parametrize("chunk", [1, 150, 2**19], ids=["row by row", "three rows", "at once"])
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_the_divergence_in_pieces_is_the_plain_formula(chunk, dtype, near, monkeypatch):
    monkeypatch.setattr(token_measures, "CPU_CHUNK", chunk)
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, 7, 50)).to(dtype).requires_grad_()
    wanted = (3 * torch.randn(3, 7, 50)).to(dtype)
    real = torch.rand(3, 7) < 0.7
    plain = logits.detach().double().requires_grad_()
    p, q = wanted[real].double().softmax(-1), plain[real].softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    (2 * expected).backward()
    loss = token_measures.Divergence.apply(logits, wanted, real)
    (2 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=near)
    assert logits.grad.dtype == dtype
    assert not logits.grad[~real].any()
    worst = (logits.grad.double() - plain.grad).abs().max()
    assert worst <= near * plain.grad.abs().max()


def test_slopes_too_small_for_float16_are_scaled_before_they_are_rounded():
    torch.manual_seed(0)
    logits, wanted = torch.randn(2, 200, 1000).half().requires_grad_(), torch.randn(2, 200, 1000)
    loss = token_measures.Divergence.apply(logits, wanted, torch.ones(2, 200).bool())
    (2**16 * loss).backward()
    assert (logits.grad == 0).float().mean() < 1e-3


def test_the_loss_is_the_divergence_from_the_full_model(llama, tokenizer, monkeypatch):
    """The first step's loss, before anything is learned, computed independently."""
    losses, batches = [], []
    compute = DistillationTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        batches.append({name: tensor.clone() for name, tensor in inputs.items()})
        losses.append(compute(self, model, inputs, *args, **kwargs).item())
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    trained(llama, tokenizer, steps=1, precision="no")
    trained(llama, tokenizer, steps=1, precision="no", hidden_weight=2.0)
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
    states = [(x[real], t[real]) for x, t in [*pairs, (ends[1], ends[0])]]
    far = [((x - t).square().sum(-1) / t.square().sum(-1)).mean().item() for x, t in states]
    assert losses[1] == pytest.approx(divergence + 2.0 * sum(far) / 5, rel=1e-4)


def test_the_state_with_the_lowest_loss_is_returned(llama, tokenizer, monkeypatch):
    losses = []
    real = likelihood.batch_nll

    def watched(model, batches):
        losses.append(real(model, batches))
        return losses[-1]

    monkeypatch.setattr(lora, "batch_nll", watched)
    healed, outcome = trained(llama, tokenizer, learning_rate=0.05)
    validation = job_for(llama, tokenizer).validation
    assert real(healed, validation) == pytest.approx(min(losses), rel=1e-4)
    assert min(losses) < losses[-1], "at this rate the last state is not the best"
    assert outcome["best_step"] == 2 * (1 + losses.index(min(losses)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_weights_of_the_layers_are_trained_and_no_others(tokenizer, dtype):
    model = tiny_llama(tie_word_embeddings=True).to(dtype)
    job = job_for(model, tokenizer, steps=5)
    pruned = job.stack.remove(REMOVED)
    healed, _ = heal_full(job, pruned)
    before = dict(pruned.named_parameters())
    for name, weight in healed.named_parameters():
        assert weight.dtype == dtype
        if ".layers." in name:
            assert not torch.equal(weight, before[name]), name
        else:
            assert weight is before[name], name
    assert healed.lm_head.weight is healed.model.embed_tokens.weight


def test_a_weight_that_several_modules_share_stays_one(tokenizer):
    model = zoo.build("zamba2").eval()
    job = HealingJob.of(LayerStack(model), [3], tokenizer, items(60), LoraSettings(steps=2))
    pruned = job.stack.remove([3])
    healed, _ = heal_full(job, pruned)
    assert healed.state_dict().keys() == pruned.state_dict().keys()
    assert len(list(healed.parameters())) == len(list(pruned.parameters()))


def test_quantised_weights_are_not_trained(llama, tokenizer):
    pruned = job_for(llama, tokenizer).stack.remove(REMOVED)
    layer = pruned.model.layers[0].mlp
    layer.up_proj.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), False)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(torch.uint8\): use heal='lora'"):
        heal_full(job_for(llama, tokenizer), pruned)


def test_a_disk_that_is_too_small_is_refused_before_the_training(llama, tokenizer, monkeypatch):
    place = namedtuple("place", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: place)
    with pytest.raises(OutputError, match=r"need up to [\d,]+ bytes, and 1,\d\d\d are free"):
        trained(llama, tokenizer, heal_full)


class Killed(BaseException):
    """Nothing catches it."""


@cache
def unbroken(tokenizer, healer):
    """What a training comes to that nothing interrupts."""
    return trained(tiny_llama(), tokenizer, healer)[0]


@pytest.mark.slow
@pytest.mark.parametrize("healer", [heal_lora, heal_full])
@pytest.mark.parametrize("call", [1, 13, 37])
def test_a_killed_training_resumes_and_ends_alike(
    llama, tokenizer, monkeypatch, tmp_path, call, healer
):
    want = unbroken(tokenizer, healer)
    compute, calls = DistillationTrainer.compute_loss, []

    def killed(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == call:
            raise Killed
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", killed)
    with pytest.raises(Killed):
        trained(llama, tokenizer, healer, checkpoints=tmp_path / "healing")
    assert not progress._jobs, "a training that ended badly is no stage of what comes after"
    for path in (tmp_path / "healing").glob("checkpoint-*"):
        cut_short = path.with_name("checkpoint-999")
        cut_short.mkdir(exist_ok=True)
        (cut_short / "trainer_state.json").write_text('{"global_step": 99')
    got, outcome = trained(llama, tokenizer, healer, checkpoints=tmp_path / "healing")
    assert calls[call] == (call - 1) // 2 * 2, "resumed from the last checkpoint"
    assert outcome["steps"] == 40
    for name, tensor in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_checkpoints_of_another_training_are_not_used(llama, tokenizer, tmp_path):
    trained(llama, tokenizer, checkpoints=tmp_path)
    assert list(tmp_path.glob("checkpoint-*"))
    want, _ = trained(llama, tokenizer, seed=1)
    got, _ = trained(llama, tokenizer, seed=1, checkpoints=tmp_path)
    for name, tensor in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], tensor)


def test_patience_is_counted_on_when_a_training_resumes(llama, tokenizer, tmp_path, monkeypatch):
    """A training that stopped because nothing improved does not start over."""
    worse = itertools.count(1.0)
    monkeypatch.setattr(lora, "batch_nll", lambda *_: next(worse))
    options = {"patience": 2, "checkpoints": tmp_path, "precision": "no"}
    _, first = trained(llama, tokenizer, **options)
    _, again = trained(llama, tokenizer, **options)
    assert first["steps"] < 40
    interval = lora._between_checks(job_for(llama, tokenizer), 40)
    assert again["steps"] <= first["steps"] + interval, "one more check at the most"
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
    folder = tmp_path / "healing"
    trained(llama, tokenizer, steps=2, checkpoints=folder)
    (folder / "notes.txt").write_text("mine")
    clear_checkpoints(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    trained(llama, tokenizer, steps=2, checkpoints=folder)
    clear_checkpoints(folder)
    assert not folder.exists()


def test_training_leaves_random_states_modes_and_hooks_as_they_were(llama, tokenizer):
    def draw_after(work):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(5)
        work()
        return random.random(), np.random.rand(), torch.rand(1)

    llama.train()
    want = draw_after(lambda: None)
    assert draw_after(lambda: trained(llama, tokenizer, steps=2, hidden_weight=1.0)) == want
    assert all(module.training for module in llama.modules())
    assert not any(module._forward_hooks for module in llama.modules())


def test_the_default_rate_is_that_of_lora_at_the_usual_width(llama):
    llama.config.hidden_size = 4096
    assert default_rate(llama.config) == pytest.approx(2e-4)
    llama.config.hidden_size = 1024
    assert default_rate(llama.config) == pytest.approx(4e-4)
    assert default_rate(llama.config, 10**6) == pytest.approx(4e-4)
    assert default_rate(llama.config, 250) == pytest.approx(8e-4)
    assert default_rate(llama.config, 1) == pytest.approx(32e-4)


def test_checks_take_a_fifth_of_the_time_at_most(llama, tokenizer):
    """In tokens: a step's cost four to five times those of a check."""
    job = HealingJob.of(LayerStack(llama), [3], tokenizer, items(60), LoraSettings(batch_size=2))
    check = sum(int(batch.attention_mask.sum()) for batch in job.validation)
    step = 2 * sum(len(row.ids) for row in job.train) / len(job.train)
    between = lora._between_checks(job, 40)
    assert check / (between * step * 4.5 + check) < 0.25
    assert lora._between_checks(job, 2) == 2
    assert lora._between_checks(job, 4000) == 200


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
    with pytest.raises(NonFiniteError, match=r"not finite at step \d+\. Lower the learning"):
        trained(llama, tokenizer, learning_rate=1e30)


def test_training_needs_peft(llama, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llm_pruner\[heal\]'"):
        trained(llama, tokenizer)
