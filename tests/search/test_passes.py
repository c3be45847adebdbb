"""Prefix sharing: the same results as whole passes, at the cost of a tree that is counted here."""

from __future__ import annotations

import inspect
import random
import weakref
from contextlib import contextmanager
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import zoo
from conftest import tiny_llama
from torch import nn

from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.search.passes import executions, in_tree_order, replayed

REPLAYABLE = (
    "bloom deepseek_v3 falcon gemma2 gemma3n_text gpt2 jamba llama mamba2 minimax mixtral opt "
    "qwen3 recurrent_gemma rwkv xlnet"
).split()
USED = {  # layers whose keys and values others use: no pass goes without them
    "gemma3n_text-shared-kv": {2, 3},
    "gemma4_text-shared-kv": {2, 3},
}
WHOLE = ["zaya", "mllama", "xlm", "hrm_text", *USED]
IDS = torch.randint(3, 64, (3, 8), generator=torch.Generator().manual_seed(3))
PADDED = torch.tensor([[1] * 8, [1] * 6 + [0] * 2, [1] * 3 + [0] * 5])


def build(name: str) -> LayerStack:
    variant = zoo.VARIANTS.get(name, zoo.Variant(name, {}))
    return LayerStack(zoo.build(variant.model_type, **variant.overrides))


def run(model: nn.Module) -> torch.Tensor:
    """The logits of a padded batch."""
    given = {"input_ids": IDS, "attention_mask": PADDED, "use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    with torch.no_grad():
        return model(**{key: value for key, value in given.items() if key in accepted}).logits


def random_sets(depth: int, number: int, seed: int) -> list[tuple[int, ...]]:
    """Sets of any size from none to all but one, in any order, some of them twice."""
    draw = random.Random(seed)
    sizes = [draw.randint(0, depth - 1) for _ in range(number)]
    layer_sets = [tuple(sorted(draw.sample(range(depth), size))) for size in sizes]
    return [*layer_sets, *draw.sample(layer_sets, number // 4)]


def tree_nodes(layer_sets: list[tuple[int, ...]], depth: int) -> int:
    """Different non-empty beginnings of the lists of kept layers."""
    beginnings = set()
    for layer_set in layer_sets:
        kept = [layer for layer in range(depth) if layer not in layer_set]
        beginnings |= {tuple(kept[:size]) for size in range(1, len(kept) + 1)}
    return len(beginnings)


@contextmanager
def counted(stack: LayerStack):
    """Tokens that each layer is run on; nothing that the stack only learns once is counted."""
    assert stack.can_replay in (True, False)
    list(replayed(stack, [(0,)] if len(stack) > 1 else [()], run))
    tokens = dict.fromkeys(range(len(stack)), 0)

    def hook(index):
        def call(module, args, kwargs, output):
            tokens[index] += IDS.numel()

        return call

    handles = [
        layer.register_forward_hook(hook(index), with_kwargs=True)
        for index, layer in enumerate(stack)
    ]
    yield tokens
    for handle in handles:
        handle.remove()


def check_untouched(stack: LayerStack, layers: list[nn.Module]) -> None:
    assert list(stack) == layers
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in stack.model.modules()]
    assert not any(after or before for after, before in hooks)


# --- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REPLAYABLE, *WHOLE])
def test_every_set_computes_what_a_whole_pass_computes(name):
    stack = build(name)
    layers = list(stack)
    assert stack.can_replay == (name in REPLAYABLE)
    used, drawn = USED.get(name, set()), random_sets(len(stack), 24, seed=len(name))
    layer_sets = [layer_set for layer_set in drawn if not used & set(layer_set)]
    want = {}
    for layer_set in set(layer_sets):
        with stack.bypass(layer_set):
            want[layer_set] = run(stack.model)
    found = list(replayed(stack, layer_sets, run))
    assert sorted(layer_set for layer_set, _ in found) == sorted(want), "every set, and none twice"
    for layer_set, logits in found:
        assert torch.equal(logits, want[layer_set]), layer_set
    different = len({float(logits.sum()) for logits in want.values()})
    assert len(want) > 4
    assert different == len(want) or name == "mllama", "its layers for images do nothing here"
    check_untouched(stack, layers)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3n_text"])
def test_a_replayed_set_is_the_model_without_the_layers(name):
    """Not by way of bypasses: the pruned model itself."""
    stack = build(name)
    for layer_set, logits in replayed(stack, random_sets(len(stack), 6, seed=1), run):
        pruned = stack.remove(layer_set) if layer_set else stack.model
        torch.testing.assert_close(logits, run(pruned), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("can_replay", [True, False])
def test_both_ways_visit_the_sets_in_the_same_order(can_replay):
    stack = LayerStack(tiny_llama(5))
    layer_sets = random_sets(5, 12, seed=2)
    want = [(layer_set, logits) for layer_set, logits in replayed(stack, layer_sets, run)]
    stack.can_replay = can_replay
    again = list(replayed(stack, iter(layer_sets), run))
    assert [layer_set for layer_set, _ in again] == [layer_set for layer_set, _ in want]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again, want, strict=True))


def test_the_full_model_comes_first():
    """Measures that compare with the full model rely on it."""
    stack = LayerStack(tiny_llama(5))
    for seed in range(5):
        layer_sets = [*random_sets(5, 6, seed), ()]
        assert next(replayed(stack, layer_sets, run))[0] == ()


def test_no_set_no_pass():
    assert list(replayed(LayerStack(tiny_llama(2)), [], lambda model: 1 / 0)) == []


# --- cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba2", "gemma3n_text"])
@pytest.mark.parametrize("seed", range(3))
def test_layers_run_once_for_every_node_of_the_tree(name, seed):
    stack = build(name)
    layer_sets = random_sets(len(stack), 4 * 4**seed, seed)
    with counted(stack) as tokens:
        list(replayed(stack, layer_sets, run))
    assert sum(tokens.values()) == tree_nodes(layer_sets, len(stack)) * IDS.numel()


@pytest.mark.parametrize("name", ["llama", "zaya"])
@pytest.mark.parametrize("seed", range(3))
def test_what_every_set_will_cost_is_known(name, seed):
    stack = build(name)
    ordered = in_tree_order(random_sets(len(stack), 12, seed), len(stack))
    with counted(stack) as tokens:
        told, before = [], 0
        for layer_set, _ in replayed(stack, ordered, run):
            told.append((layer_set, (sum(tokens.values()) - before) // IDS.numel()))
            before = sum(tokens.values())
    assert list(zip(ordered, executions(stack, ordered), strict=True)) == told


@pytest.mark.parametrize("depth", [1, 2, 5, 9])
def test_ablating_every_layer_costs_half_of_whole_passes(depth):
    stack = LayerStack(tiny_llama(depth))
    layer_sets = [(), *((layer,) for layer in range(depth) if depth > 1)]
    with counted(stack) as tokens:
        list(replayed(stack, layer_sets, run))
    assert sum(tokens.values()) == (depth + depth * (depth - 1) // 2) * IDS.numel()
    runs = [count // IDS.numel() for count in tokens.values()]
    assert runs == [layer + 1 for layer in range(depth)], "once as it is, once for every one below"


def test_without_replay_every_set_is_a_whole_pass():
    stack = build("zaya")
    layer_sets = random_sets(len(stack), 10, seed=4)
    with counted(stack) as tokens:
        list(replayed(stack, layer_sets, run))
    kept = sum(len(stack) - len(layer_set) for layer_set in set(layer_sets))
    assert sum(tokens.values()) == kept * IDS.numel() > tree_nodes(layer_sets, len(stack))


@pytest.mark.parametrize("shape", ["single", "pairs", "random"])
def test_never_more_states_are_kept_than_layers(shape, monkeypatch):
    depth = 7
    stack = LayerStack(tiny_llama(depth))
    layer_sets = {
        "single": [(), *((layer,) for layer in range(depth))],
        "pairs": list(combinations(range(depth), 2)),
        "random": random_sets(depth, 60, seed=5),
    }[shape]
    seen: list[weakref.ref] = []
    observe_inputs = stack.observe_inputs

    def watched(places, observer):
        def keep(index, hidden):
            seen.append(weakref.ref(hidden))
            observer(index, hidden)

        return observe_inputs(places, keep)

    monkeypatch.setattr(stack, "observe_inputs", watched)
    alive: list[int] = []

    def count(model):
        alive.append(sum(state() is not None for state in seen))
        return run(model)

    for _ in replayed(stack, layer_sets, count):
        alive.append(sum(state() is not None for state in seen))
    most, last = max(alive), alive[-1]
    assert 1 < most <= depth
    assert most == depth or shape != "single"
    assert last <= 1, "the last set leaves none behind but its own"


# --- afterwards -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "zaya"])
@pytest.mark.parametrize("place", [0, 1, 4])
def test_an_error_in_a_pass_leaves_the_model_as_it_was(name, place):
    stack = build(name)
    layers, before = list(stack), run(stack.model)
    passes = iter(range(100))

    def fail(model):
        run(model)
        if next(passes) == place:
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        list(replayed(stack, random_sets(len(stack), 9, seed=6), fail))
    check_untouched(stack, layers)
    assert torch.equal(run(stack.model), before)


@pytest.mark.parametrize("name", ["llama", "zaya"])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_between_results_and_after_giving_up_the_model_is_whole(name, taken):
    stack = build(name)
    layers, before = list(stack), run(stack.model)
    results = replayed(stack, [(1,), (2, 3), (0,), (0, 4)], run)
    for _ in range(taken):
        next(results)
        check_untouched(stack, layers)
        assert torch.equal(run(stack.model), before)
    results.close()
    check_untouched(stack, layers)


# --- what layers hand on in secret --------------------------------------------------------------


class Note(nn.Module):
    """A layer that may leave a note where other layers find it, and may read one."""

    def __init__(self, place: int, notes: dict, writes: object = None, reads: object = None):
        super().__init__()
        self.mix = nn.Linear(16, 16)
        self.layer_idx, self.notes, self.writes, self.reads = place, notes, writes, reads

    def forward(self, hidden_states):
        if self.reads is not None:
            hidden_states = hidden_states + self.notes[self.reads]
        hidden_states = hidden_states + self.mix(hidden_states).tanh()
        if self.writes is not None:
            self.notes[self.writes] = 2 * hidden_states
        return hidden_states


class Notes(nn.Module):
    def __init__(self, writes: dict, reads: dict, forgets: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.notes = nn.Embedding(80, 16), nn.Linear(16, 80), {}
        self.layers = nn.ModuleList(
            Note(place, self.notes, writes.get(place), reads.get(place)) for place in range(6)
        )
        self.forgets = forgets

    def forward(self, input_ids, use_cache=False):
        if self.forgets:
            self.notes.clear()
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.head(hidden))


SECRETS = {
    "none": ({}, {}, False),
    "overwritten by every layer": (
        dict.fromkeys(range(6), "last"),
        dict.fromkeys(range(1, 6), "last"),
        False,
    ),
    "of this pass alone": ({1: "kv"}, {4: "kv"}, True),
    "used by the last layer": ({4: "kv"}, {5: "kv"}, True),
}


@pytest.mark.parametrize("secret", SECRETS)
def test_what_a_layer_leaves_elsewhere_is_found_out(secret):
    stack = LayerStack(Notes(*SECRETS[secret]), path="layers")
    assert stack.can_replay == (secret == "none")
    layer_sets = [(), (2,), (3,), (5,), (2, 3), (3, 5), (2, 3, 5)]
    for layer_set, logits in replayed(stack, layer_sets, run):
        with stack.bypass(layer_set):
            assert torch.equal(logits, run(stack.model)), layer_set


def test_notes_that_outlast_a_pass_are_those_of_the_same_layers():
    """Depth first, what the layers below left last is what they would leave again."""
    stack = LayerStack(Notes({1: "kv"}, {4: "kv"}), path="layers")
    layer_sets = [layer_set for layer_set in random_sets(6, 40, seed=7) if 1 not in layer_set]
    found = dict(replayed(stack, layer_sets, run))
    assert len(found) > 8
    for layer_set, logits in found.items():
        with stack.bypass(layer_set):
            assert torch.equal(logits, run(stack.model)), layer_set
