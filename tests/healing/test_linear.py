"""The closed form: planted truths, a solver on whole matrices, and what must not change."""

from __future__ import annotations

import itertools

import pytest
import torch
import zoo
from conftest import items, tiny_gpt2, tiny_llama
from torch import nn

from llm_pruner.data.tokens import Batch, encode_batches
from llm_pruner.errors import NonFiniteError, UnsupportedModelError
from llm_pruner.healing import linear
from llm_pruner.healing.linear import heal_linear
from llm_pruner.model import layer_stack
from llm_pruner.model.layer_stack import LayerStack

REMOVED = [3, 4, 6]
# The architectures that a repair is tried on, and whether it finds something to fit.
ZOO = {
    "llama": True,
    "qwen3": True,
    "gemma3_text": True,
    "gpt2": True,
    "gpt_neox": True,
    "opt": True,
    "phi": True,
    "mixtral": True,
    "falcon": True,
    "olmo2": True,
    "granite": True,
    "minicpm3": True,
    "xmod": False,
    "jetmoe": False,
}


class Planted(nn.Module):
    """A layer whose work is a linear function of what the layer before it has computed."""

    def __init__(self, source: nn.Module, adds, seen: str) -> None:
        super().__init__()
        self.adds, self.attention_type = adds, "full_attention"
        hook = {"input": lambda m, a, out: a[0], "output": lambda m, a, out: out}[seen]
        source.register_forward_hook(lambda m, a, out: setattr(self, "last", hook(m, a, out)))

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + self.adds(self.last)


@pytest.fixture
def always_better(monkeypatch):
    """A random model's loss need not fall when it gets nearer to another random model."""
    falling = itertools.count(0, -1)
    monkeypatch.setattr(linear, "batch_nll", lambda model, batches: next(falling))


def healed_planted(model, path, source, adds, seen, tokenizer, index=2):
    """How far from the full model's logits the healed one's are, relative to the cut one's."""
    layers = model.get_submodule(path)
    stack = LayerStack(model, path)
    pruned = stack.remove([index])
    layers[index] = Planted(layers[index - 1].get_submodule(source), adds, seen)
    stack = LayerStack(model, path)
    train = encode_batches(tokenizer, items(200), batch_size=8)
    healed, records = heal_linear(stack, [index], pruned, train, train[:4])
    batch = encode_batches(tokenizer, items(75)[60:], batch_size=15)[0]
    real = batch.attention_mask.bool()
    with torch.no_grad():
        full, cut, repaired = (m(**batch.inputs()).logits[real] for m in (model, pruned, healed))
    assert records[0]["layer"] == index - 1
    return ((repaired - full).norm() / (cut - full).norm()).item()


def test_a_block_that_is_linear_in_the_features_is_recovered(tokenizer, always_better):
    """What is added is a random map of the 48 features, which no map of the output can give."""
    model = tiny_llama().double()
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)).double() * 0.2
    source, adds = "mlp.down_proj", lambda features: features @ matrix
    assert healed_planted(model, "model.layers", source, adds, "input", tokenizer) < 1e-5


def test_a_block_that_adds_a_constant_is_recovered_by_the_bias(tokenizer, always_better):
    constant = torch.linspace(-1, 1, 32).double()
    model, source = tiny_gpt2().double(), "mlp.c_proj"
    left = healed_planted(model, "transformer.h", source, lambda out: constant, "output", tokenizer)
    assert left < 1e-5


def test_a_block_that_scales_channels_is_recovered_by_the_gain_of_a_norm(tokenizer, always_better):
    gain = torch.linspace(-1, 2, 32)
    model = zoo.build("olmo2").eval()
    left = healed_planted(
        model,
        "model.layers",
        "post_feedforward_layernorm",
        lambda out: out * gain,
        "output",
        tokenizer,
    )
    assert left < 1e-3


def test_the_update_is_the_weighted_ridge_solution(llama, tokenizer, monkeypatch):
    """The first layer repaired, by a solve written out on whole matrices."""
    data = encode_batches(tokenizer, items(40), batch_size=4)
    ridge = 0.01
    monkeypatch.setattr(linear, "RIDGES", (ridge,))
    stack = LayerStack(llama)
    healed, records = heal_linear(stack, [3, 4], stack.remove([3, 4]), data, data)
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
    """Measured outside: the distance of the streams behind every kept layer falls."""
    stack = LayerStack(model)
    data = encode_batches(tokenizer, items(60))
    pruned = stack.remove(REMOVED)
    healed, records = heal_linear(stack, REMOVED, pruned, data, data)
    kept = [index for index in range(len(stack)) if index not in REMOVED]
    assert [record["layer"] for record in records] == [i for i in kept if i >= 2]
    assert all(0 < record["error"] < 1 for record in records)

    def distances(cut):
        with torch.no_grad():
            full = model(**data[0].inputs(), output_hidden_states=True).hidden_states
            found = cut(**data[0].inputs(), output_hidden_states=True).hidden_states
        real = data[0].attention_mask.bool()
        ends = [*kept[1:-1]]  # the last hidden state is behind the final norm
        return [
            (found[place + 1][real] - full[end][real]).norm().item()
            for place, end in enumerate(ends)
        ]

    before, after = distances(pruned), distances(healed)
    assert all(new < old for new, old in zip(after[2:], before[2:], strict=True))
    assert after[:2] == before[:2], "below the first cut nothing changes"


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_and_padding_do_not_matter(llama, tokenizer, batch_size):
    stack = LayerStack(llama)

    def healed(size):
        data = encode_batches(tokenizer, items(30), batch_size=size)
        return heal_linear(stack, [4], stack.remove([4]), data, data)[0]

    want, got = healed(30).state_dict(), healed(batch_size).state_dict()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_model_in_which_no_pass_can_begin_in_the_middle_is_healed_alike(llama, tokenizer):
    """The slow road: whole passes instead of layers run alone."""
    stack = LayerStack(llama)
    data = encode_batches(tokenizer, items(30))
    fast = heal_linear(stack, REMOVED, stack.remove(REMOVED), data, data)[0]

    class Slow(LayerStack):
        can_replay = False

    original = layer_stack.LayerStack
    try:
        layer_stack.LayerStack = Slow
        slow = heal_linear(Slow(llama), REMOVED, stack.remove(REMOVED), data, data)[0]
    finally:
        layer_stack.LayerStack = original
    for name, tensor in fast.state_dict().items():
        torch.testing.assert_close(slow.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_layer_that_makes_it_worse_is_put_back(llama, tokenizer, monkeypatch):
    stack = LayerStack(llama)
    data = encode_batches(tokenizer, items(30))
    losses = iter([1.0, 2.0, 0.5, *[0.7] * 9])  # before, and after each layer
    monkeypatch.setattr(linear, "batch_nll", lambda model, batches: next(losses))
    pruned = stack.remove([3, 4])
    healed, records = heal_linear(stack, [3, 4], pruned, data, data)
    assert [record["kept"] for record in records] == [False, True, False, False]
    changed = {
        name.split(".")[2]
        for name, tensor in healed.state_dict().items()
        if not torch.equal(tensor, pruned.state_dict()[name])
    }
    assert changed == {"3"}, "layer 5 of the full model, the fourth of the pruned one"


@pytest.mark.parametrize("name", sorted(ZOO))
def test_architectures(name):
    model = zoo.build(name).eval()
    stack = LayerStack(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, zoo.VOCAB, (40, 12), generator=generator)
    data = [
        Batch(part, torch.ones_like(part), part, tuple(range(len(part)))) for part in ids.split(8)
    ]
    removed = [3]
    if not ZOO[name]:
        with pytest.raises(UnsupportedModelError, match=r"heal='linear' is not for .*heal='lora'"):
            heal_linear(stack, removed, stack.remove(removed), data, data)
        return
    pruned = stack.remove(removed)
    healed, records = heal_linear(stack, removed, pruned, data, data)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert healed.state_dict().keys() == pruned.state_dict().keys()
    assert records
    assert all(record["error"] < 1 for record in records)


@pytest.mark.parametrize("removed", [[0], [0, 1, 4], [6, 7], [7]])
def test_cuts_at_either_end(llama, tokenizer, removed):
    """Without a layer below the cut those above it are fitted; behind the last one, its own."""
    stack = LayerStack(llama)
    data = encode_batches(tokenizer, items(60))
    healed, records = heal_linear(stack, removed, stack.remove(removed), data, data)
    first = {0: min(set(range(8)) - set(removed)), 6: 5, 7: 6}[removed[0]]
    assert records[0]["layer"] == first
    assert all(record["error"] < 1 for record in records)
    healed(**data[0].inputs())


def test_states_that_are_not_finite_are_an_error(llama, tokenizer, monkeypatch):
    stack = LayerStack(llama)
    data = encode_batches(tokenizer, items(4))
    pruned = stack.remove([3])
    monkeypatch.setattr(linear, "batch_nll", lambda model, batches: 1.0)
    with torch.no_grad():
        llama.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="heal='linear': activations are NaN"):
        heal_linear(stack, [3], pruned, data, data)
