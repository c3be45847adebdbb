"""The closed form: planted truths, a solver on whole matrices, and what must not change."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import zoo
from conftest import items, tiny_gpt2, tiny_llama
from torch import nn

from llm_pruner.data.tokens import encode_batches, encode_sequences, pad_sequences
from llm_pruner.healing import job, linear
from llm_pruner.healing.job import HealingJob
from llm_pruner.healing.linear import heal_linear
from llm_pruner.model.layer_stack import LayerStack

REMOVED = [3, 4, 6]


def job_for(stack, removed, tokenizer, data=None, batch_size=8):
    """Fits and validates on the same items."""
    rows = encode_sequences(tokenizer, data or items(30))
    validation = pad_sequences(tokenizer, rows, batch_size)
    return HealingJob(stack, tuple(removed), tokenizer, rows, validation, held_out=[])


def heal(stack, removed, tokenizer, *data):
    healed, outcome = heal_linear(job_for(stack, removed, tokenizer, *data), stack.remove(removed))
    return healed, outcome["layers"]


class Planted(nn.Module):
    """A layer whose work is a linear function of what the layer before it has computed."""

    def __init__(self, source: nn.Module, adds, seen: str) -> None:
        super().__init__()
        self.adds, self.attention_type = adds, "full_attention"
        hook = {"input": lambda m, a, out: a[0], "output": lambda m, a, out: out}[seen]
        source.register_forward_hook(lambda m, a, out: setattr(self, "last", hook(m, a, out)))

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + self.adds(self.last)


RANDOM_MAP = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)).double() * 0.2
CONSTANT = torch.linspace(-1, 1, 32).double()
GAIN = torch.linspace(-1, 2, 32)
PLANTED = {
    # a map of the 48 features, which no map of the output can give
    "map": (lambda: tiny_llama().double(), "mlp.down_proj", lambda x: x @ RANDOM_MAP, "input"),
    "bias": (lambda: tiny_gpt2().double(), "mlp.c_proj", lambda x: CONSTANT, "output"),
    "gain": (lambda: zoo.build("olmo2").eval(), "post_feedforward_layernorm", lambda x: x * GAIN,
             "output"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "limit"), [("map", 1e-5), ("bias", 1e-5), ("gain", 1e-3)])
def test_a_block_that_is_linear_in_what_is_fitted_is_recovered(tokenizer, monkeypatch, case, limit):
    """The healed model's logits are as good as the full model's, relative to the cut model's."""
    falling = itertools.count(0, -1)  # a random model's loss need not fall when it gets nearer
    monkeypatch.setattr(linear, "batch_nll", lambda model, batches: next(falling))
    make, source, adds, seen = PLANTED[case]
    model = make()
    pruned = LayerStack(model).remove([2])
    layers = model.get_submodule(LayerStack(model).paths[0])
    layers[2] = Planted(layers[1].get_submodule(source), adds, seen)
    planted = job_for(LayerStack(model), [2], tokenizer, items(200))
    healed, outcome = heal_linear(replace(planted, validation=planted.validation[:4]), pruned)
    assert outcome["layers"][0]["layer"] == 1
    batch = encode_batches(tokenizer, items(75)[60:], batch_size=15)[0]
    real = batch.attention_mask.bool()
    with torch.no_grad():
        full, cut, after = (m(**batch.inputs()).logits[real] for m in (model, pruned, healed))
    assert (after - full).norm() < limit * (cut - full).norm()


def test_the_update_is_the_weighted_ridge_solution(llama, tokenizer, monkeypatch):
    """The first healed layer, by a solve written out on whole matrices."""
    data = encode_batches(tokenizer, items(40), batch_size=4)
    ridge = 0.01
    monkeypatch.setattr(linear, "RIDGES", (ridge,))
    stack = LayerStack(llama)
    healed, records = heal(stack, [3, 4], tokenizer, items(40))
    assert records[0]["parts"] == {"mlp": ridge}
    assert records[0]["kept"]

    features, stream, target = [], [], []
    hook = llama.model.layers[2].mlp.down_proj.register_forward_hook(
        lambda m, args, out: features.append(args[0])
    )
    for batch in data:
        with torch.no_grad():
            states = llama(**batch.inputs(), output_hidden_states=True).hidden_states
        real = batch.attention_mask.bool()
        features[-1] = features[-1].detach()[real].double()
        stream.append(states[3][real].double())
        target.append(states[5][real].double())
    hook.remove()
    h, x, t = map(torch.cat, (features, stream, target))
    weight = 1 / t.square().mean(-1, keepdim=True)
    gram = h.T @ (weight * h)
    alpha = ridge * gram.diagonal().mean()
    d = torch.linalg.solve(gram + alpha * torch.eye(len(gram)), h.T @ (weight * (t - x)))
    want = llama.model.layers[2].mlp.down_proj.weight.double() + d.T
    got = healed.model.layers[2].mlp.down_proj.weight.double()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    left = ((weight * (t - x - h @ d).square()).sum() / (weight * (t - x).square()).sum()).item()
    assert records[0]["error"] == pytest.approx(left, rel=1e-4)


def test_every_part_above_the_cut_brings_the_stream_nearer(model, tokenizer):
    """Measured independently: the distance of the streams after every kept layer falls."""
    stack = LayerStack(model)
    data = encode_batches(tokenizer, items(60))
    pruned = stack.remove(REMOVED)
    healed, records = heal(stack, REMOVED, tokenizer, items(60))
    kept = [index for index in range(len(stack)) if index not in REMOVED]
    assert [record["layer"] for record in records] == [i for i in kept if i >= 2]
    assert all(0 < record["error"] < 1 for record in records)

    def distances(cut):
        with torch.no_grad():
            full = model(**data[0].inputs(), output_hidden_states=True).hidden_states
            found = cut(**data[0].inputs(), output_hidden_states=True).hidden_states
        real = data[0].attention_mask.bool()
        ends = kept[1:-1]  # the last hidden state is behind the final norm
        return [(found[i + 1][real] - full[j][real]).norm().item() for i, j in enumerate(ends)]

    before, after = distances(pruned), distances(healed)
    assert all(new < old for new, old in zip(after[2:], before[2:], strict=True))
    assert after[:2] == before[:2], "below the first cut nothing changes"


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_and_padding_do_not_matter(llama, tokenizer, monkeypatch, batch_size):
    def healed(size):
        monkeypatch.setattr(job, "BATCH_SIZE", size)
        return heal(LayerStack(llama), [4], tokenizer, items(30), size)[0]

    want, got = healed(30).state_dict(), healed(batch_size).state_dict()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_model_that_cannot_start_in_the_middle_is_healed_alike(llama, tokenizer, monkeypatch):
    """The slow twin: whole passes instead of layers run alone."""
    fast, _ = heal(LayerStack(llama), REMOVED, tokenizer)
    monkeypatch.setattr(LayerStack, "can_replay", False)
    slow, _ = heal(LayerStack(llama), REMOVED, tokenizer)
    for name, tensor in fast.state_dict().items():
        torch.testing.assert_close(slow.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_layer_that_makes_it_worse_is_restored(llama, tokenizer, monkeypatch):
    stack = LayerStack(llama)
    losses = iter([1.0, 2.0, 0.5, *[0.7] * 9])  # before, and after each layer
    monkeypatch.setattr(linear, "batch_nll", lambda model, batches: next(losses))
    pruned = stack.remove([3, 4])
    healed, records = heal(stack, [3, 4], tokenizer)
    assert [record["kept"] for record in records] == [False, True, False, False]
    pairs = zip(healed.state_dict().items(), pruned.state_dict().values(), strict=True)
    changed = {name.split(".")[2] for (name, new), old in pairs if not torch.equal(new, old)}
    assert changed == {"3"}, "layer 5 of the full model, the fourth of the pruned one"


@pytest.mark.parametrize("removed", [[0], [0, 1, 4], [6, 7], [7]])
def test_cuts_at_either_end(llama, tokenizer, removed):
    """Without a layer below the cut, those above it are fitted; after the last one, its own."""
    stack = LayerStack(llama)
    healed, records = heal(stack, removed, tokenizer, items(60))
    first = {0: min(set(range(8)) - set(removed)), 6: 5, 7: 6}[removed[0]]
    assert records[0]["layer"] == first
    assert all(record["error"] < 1 for record in records)
    healed(**encode_batches(tokenizer, items(3))[0].inputs())
