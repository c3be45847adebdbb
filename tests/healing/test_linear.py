"""The closed form: planted truths, a solver on whole matrices, and what must not change."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import zoo
from conftest import items, tiny_gpt2, tiny_llama
from torch import nn

from llm_pruner.data.tokens import encode_batches, encode_sequences, pad_sequences
from llm_pruner.evaluation.likelihood import batch_nll
from llm_pruner.healing import job, least_squares, linear
from llm_pruner.healing.job import HealingJob
from llm_pruner.healing.least_squares import RIDGES, Sums, Tokens, best_update
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
    monkeypatch.setattr(linear, "validation_loss", lambda streams, index: next(falling))
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
    monkeypatch.setattr(least_squares, "RIDGES", (ridge,))
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
    monkeypatch.setattr(linear, "validation_loss", lambda streams, index: next(losses))
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


# --- The slow twins -----------------------------------------------------------------------------


def collected(model, layer, data):
    """Whole passes: by part of a layer, what enters its last map and the stream behind it."""
    taken = {name: [] for name in ("self_attn.o_proj", "mlp.down_proj", "attention", "end")}
    block = model.model.layers[layer]

    def keep(name, pick):
        return lambda module, args, out: taken[name].append(pick(args, out))

    hooks = [
        block.self_attn.o_proj.register_forward_hook(
            keep("self_attn.o_proj", lambda args, out: args[0])
        ),
        block.mlp.down_proj.register_forward_hook(keep("mlp.down_proj", lambda args, out: args[0])),
        block.post_attention_layernorm.register_forward_hook(
            keep("attention", lambda args, out: args[0])
        ),
        block.register_forward_hook(
            keep("end", lambda args, out: out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch.inputs())
    for hook in hooks:
        hook.remove()
    real = [batch.attention_mask.bool() for batch in data]
    return {
        name: torch.cat([x[mask] for x, mask in zip(found, real, strict=True)]).double()
        for name, found in taken.items()
    }


def heal_slowly(job, pruned):
    """The closed form for a Llama: whole passes for every part, float64, every ridge tried."""
    model, kept, cut = job.stack.model, job.kept, min(job.removed)
    data = job.train_batches(), job.validation
    loss = batch_nll(pruned, job.validation)
    records = []
    for index in range(kept.index(cut - 1), len(kept)):
        end = [*kept[1:], len(job.stack)][index] - 1
        parts, before, error = {}, {}, 1.0
        for name, part, behind in (
            ("self_attn.o_proj", "self_attn", "attention"),
            ("mlp.down_proj", "mlp", "end"),
        ):
            if part == "self_attn" and kept[index] < cut:
                continue
            module = pruned.model.layers[index].get_submodule(name)
            sides = []
            for batches in data:
                own = collected(pruned, index, batches)
                layer = kept[index] if behind == "attention" else end
                target = collected(model, layer, batches)[behind]
                sides.append((own[name], target - own[behind], 1 / target.square().mean(-1)))
            h, d, q = sides[0]
            gram = (h * q[:, None]).T @ h / len(h)
            cross = (h * q[:, None]).T @ d / len(h)
            vh, vd, vq = sides[1]
            error, best = 1.0, None
            for ridge in RIDGES:
                lift = ridge * gram.diagonal().mean() * torch.eye(len(gram))
                update = torch.linalg.solve(gram + lift, cross)
                left = (vq[:, None] * (vd - vh @ update).square()).sum()
                left = (left / (vq[:, None] * vd.square()).sum()).item()
                if left < error:
                    error, best, parts[part] = left, update, ridge
            if best is not None:
                before[module] = module.weight
                module.weight = nn.Parameter((module.weight.double() + best.T).float())
        after = batch_nll(pruned, job.validation)
        kept_it = after < loss
        for module, weight in before.items():
            module.weight = module.weight if kept_it else weight
        loss = min(loss, after)
        fit = {"layer": kept[index], "parts": parts, "error": error}
        records.append({**fit, "loss": after, "kept": kept_it})
    return records


def test_the_slow_twin_heals_alike(llama, tokenizer):
    """States carried up, float32 sums and a search among ridges against none of these."""
    stack = LayerStack(llama)
    whole = HealingJob.of(stack, REMOVED, tokenizer, items(120))
    want = heal_slowly(whole, slow := copy.deepcopy(stack.remove(REMOVED)))
    fast, outcome = heal_linear(whole, stack.remove(REMOVED))
    got = outcome["layers"]
    for name in ("layer", "parts", "kept"):
        assert [record[name] for record in got] == [record[name] for record in want]
    for name in ("error", "loss"):
        values = [record[name] for record in want]
        assert [record[name] for record in got] == pytest.approx(values, rel=1e-4)
    for name, tensor in slow.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def blocks(count, width, dtype, seed=0):
    """Features with a channel a thousand times the others, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(width, 24, generator=torch.Generator().manual_seed(9))
    for _ in range(count):
        features = torch.randn(257, width, generator=generator)
        features[:, 0] = 1000 + features[:, 0]
        noise = torch.randn(257, 24, generator=generator)
        weight = torch.rand(257, 1, generator=generator)
        parts = features, features @ truth * 0.01 + noise, weight
        yield Tokens(*(part.to(dtype) for part in parts))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("is_map", [True, False])
def test_sums_in_float32_are_as_good_as_the_float64_twin(monkeypatch, is_map, wide):
    if wide:
        monkeypatch.setattr(least_squares, "WIDE", 8)
    width = 96 if is_map else 24
    sums, exact = Sums(is_map), Sums(is_map)
    for one, other in zip(blocks(9, width, torch.float32), blocks(9, width, torch.float64),
                          strict=True):  # fmt: skip
        sums.add(one)
        exact.add(other)
    scale = exact.gram.diagonal().rsqrt() if is_map else exact.gram.rsqrt()
    apart = (sums.gram - exact.gram) * (scale * scale[:, None] if is_map else scale.square())
    assert apart.abs().max() < 1e-6, "relative to the channels' sizes"
    for ridge in (1e-6, 1e-3, 1e-1):
        lift = ridge * exact.gram.diagonal().mean() * torch.eye(width) if is_map else 0
        want = torch.linalg.solve(exact.gram + lift, exact.cross) if is_map else (
            exact.cross / (exact.gram + ridge * exact.gram.mean())
        )  # fmt: skip
        got = sums.solve(ridge).double()
        assert (got - want).norm() < (1e-3 if wide else 1e-4) * want.norm()


@pytest.mark.parametrize("start", [1e-9, 1e-3, 1.0])
def test_the_search_finds_the_best_of_all_ridges(start):
    sums, judged = Sums(True), list(blocks(2, 96, torch.float64, seed=1))
    for block in blocks(1, 96, torch.float64):
        sums.add(block)
    ridge, error, update = best_update(sums, judged, start)
    whole = sum(block.square for block in judged)
    left = {}
    for one in RIDGES:
        parts = [Tokens(b.features, b.deviation - b.features @ sums.solve(one), b.weight)
                 for b in judged]  # fmt: skip
        left[one] = sum(part.square for part in parts) / whole
    assert ridge == min(left, key=left.get)
    assert error == pytest.approx(left[ridge])
    torch.testing.assert_close(update, sums.solve(ridge))


def test_what_cannot_be_solved_changes_nothing():
    features = torch.ones(50, 8)
    block = Tokens(features, torch.zeros(50, 3), torch.ones(50, 1))
    sums = Sums(True)
    sums.add(block)
    judged = [Tokens(features, torch.ones(50, 3), torch.ones(50, 1))]
    assert best_update(sums, judged)[:2] == (None, 1.0)
    nothing = Sums(True)
    nothing.add(Tokens(features * 0, torch.ones(50, 3), torch.ones(50, 1)))
    assert best_update(nothing, judged) == (None, 1.0, None)
