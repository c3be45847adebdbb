"""Every strategy against a slow oracle that shares no code with it.

The oracles read one unpadded sequence at a time, remove layers by rebuilding the model, and use
the model's own loss and plain Python arithmetic.
"""

from __future__ import annotations

import copy
import math
import statistics
from itertools import combinations, pairwise

import pytest
import torch
from conftest import items, make_identity, tiny_gpt2, tiny_llama
from torch import nn

from llm_pruner import get_strategy
from llm_pruner.errors import InvalidDataError, InvalidPlanError, NonFiniteError
from llm_pruner.pruners.avss import AVSSPruner, cumulative_avss
from llm_pruner.pruners.measured import AblationPruner, SmartPruner
from llm_pruner.pruners.similarity import BlockInfluencePruner, PruneMePruner
from llm_pruner.results import DepthCurve, LayerScores, PruningPlan
from llm_pruner.search import layer_search

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


# --- ablation ---------------------------------------------------------------------------------


@BOTH
def test_ablation_is_the_change_of_a_rebuilt_model(build, tokenizer):
    model = build()
    scores = AblationPruner(model, tokenizer, batch_size=3).compute_layer_scores(MIXED)
    want = [slow_change(model, tokenizer, MIXED, [index]) for index in range(DEPTH)]
    assert max(want) - min(want) > 1e-3, "the layers must differ in this test"
    assert list(scores.values()) == close(want)
    assert scores.removes == "highest"


def test_ablation_weighs_tokens_not_items(tokenizer):
    """One long and one short reference: the mean over items would be another number."""
    model = random_llama()
    data = [
        {"prompt": "the cat", "reference": "sat on a mat and saw one red bird in this old tree"},
        {"prompt": "a mat", "reference": "bird"},
    ]
    losses = [slow_loss(model, tokenizer, [item]) for item in data]
    assert sum(losses) / 2 != pytest.approx(slow_loss(model, tokenizer, data), rel=1e-3)
    scores = AblationPruner(model, tokenizer, batch_size=1).compute_layer_scores(data)
    assert scores[2] == close(slow_change(model, tokenizer, data, [2]))


def test_an_identity_layer_scores_0(tokenizer):
    model = random_llama()
    make_identity(model, 2)
    scores = AblationPruner(model, tokenizer).compute_layer_scores(MIXED)
    assert scores[2] == pytest.approx(0, abs=1e-6)
    assert all(abs(scores[index]) > 1e-4 for index in (0, 1, 3, 4, 5))


def test_ablation_selects_by_threshold_unless_a_ratio_is_given(tokenizer):
    pruner = AblationPruner(tiny_llama(), tokenizer)
    scores = {0: 0.5, 1: 0.4, 2: -0.01, 3: -0.03, 4: 0.1, 5: -0.02, 6: 0.2, 7: 0.3}
    assert pruner.select_layers(scores) == [2, 4]
    assert pruner.select_layers(scores, threshold=-0.02) == [2, 4]
    assert pruner.select_layers(scores, threshold=-0.025) == [2, 4, 5]
    assert pruner.select_layers(scores, ratio=0.125) == [4]


def planted(seed: int = 0) -> nn.Module:
    """Eight layers of which 2 and 5 do nothing."""
    model = random_llama(seed, 8)
    for index in (2, 5):
        make_identity(model, index)
    return model


def planted_and_needed(tokenizer, data) -> nn.Module:
    """As `planted`, where removing layer 3 or 4 costs something, alone and together."""
    for seed in range(100):
        model = planted(seed)
        if all(slow_change(model, tokenizer, data, cut) < -0.03 for cut in ([3], [4], [3, 4])):
            return model
    raise AssertionError("no seed gives a model in which the other layers are needed")


def test_ablation_and_smart_find_the_planted_layers(tokenizer):
    model = planted_and_needed(tokenizer, MIXED)
    assert AblationPruner(model, tokenizer).plan(MIXED, ratio=0.25).remove == (2, 5)
    assert AblationPruner(model, tokenizer).plan(MIXED).remove == (2, 5)
    assert SmartPruner(model, tokenizer).plan(MIXED, n_layers=2).remove == (2, 5)
    smart = SmartPruner(model, tokenizer)
    assert smart.plan(MIXED, tolerance=0.015).remove == (2, 5)
    assert smart.optimize_selection(None, MIXED, tolerance=0.015) == [2, 5]
    assert [step["kept"] for step in smart.steps] == [True, True, False]


# --- AVSS -------------------------------------------------------------------------------------

# Two sequences of 2 and 1 real tokens, hidden size 3; the padding (99s and a 0) must not count.
ENTERING = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], [[2.0, 4.0, 0.0], [99, 99, 0.0]]])
LEAVING = torch.tensor([[[2.0, 2.0, 0.0], [4.0, 0.0, 2.0]], [[2.0, 8.0, 5e-6], [99, 0.0, 99]]])
REAL = torch.tensor([[True, True], [True, False]])


REPAIRED = {"variant": "repaired"}
PUBLISHED = {"variant": "published", "pool": "sequence"}
LITERAL = {"variant": "published", "pool": "none"}
NEURON = {"variant": "published", "pool": "neuron"}


def avss_on(monkeypatch, tokenizer, batches, **options) -> float:
    """The score of a model of one layer that is made to have these hidden states."""
    pruner = AVSSPruner(tiny_llama(1), tokenizer, **options)
    monkeypatch.setattr(pruner, "hidden_states", lambda data, shared: iter(batches))
    return pruner.compute_layer_scores(["unused"])[0]


def test_published_avss_by_hand(monkeypatch, tokenizer):
    """Means over the sequence (3, 1, 1) and (2, 8, 5e-6); 3 of 9 elements are below 1e-5."""
    assert statistics.variance([3, 1, 1]) == pytest.approx(4 / 3)
    assert statistics.variance([2, 8, 0]) == pytest.approx(52 / 3)
    variance = (4 / 3 + 52 / 3) / 2
    batches = [([ENTERING, LEAVING], REAL)]
    got = avss_on(monkeypatch, tokenizer, batches, **PUBLISHED)
    assert got == pytest.approx(variance / (3 / 9), rel=1e-5)
    got = avss_on(monkeypatch, tokenizer, batches, **PUBLISHED, epsilon=3)
    assert got == pytest.approx(variance / (7 / 9), rel=1e-5)
    got = avss_on(monkeypatch, tokenizer, [([LEAVING, LEAVING + 1], REAL)], **PUBLISHED)
    assert got == pytest.approx(variance / (0.5 / 9), rel=1e-5), "no sparse element"


def test_the_formula_of_avss_to_the_letter_by_hand(monkeypatch, tokenizer):
    """Nine activations, of which three are below 1e-5 and seven below 3."""
    variance = statistics.pvariance([2, 2, 0, 4, 0, 2, 2, 8, 5e-6])
    batches = [([ENTERING, LEAVING], REAL)]
    got = avss_on(monkeypatch, tokenizer, batches, **LITERAL)
    assert got == pytest.approx(variance / (3 / 9), rel=1e-5)
    got = avss_on(monkeypatch, tokenizer, batches, **LITERAL, epsilon=3)
    assert got == pytest.approx(variance / (7 / 9), rel=1e-5)


def test_avss_of_neuron_means_by_hand(monkeypatch, tokenizer):
    """Three activations, the means 8/3, 10/3 and 2/3 of a neuron over the three tokens."""
    variance = statistics.pvariance([8 / 3, 10 / 3, 2 / 3])
    batches = [([ENTERING, LEAVING], REAL)]
    got = avss_on(monkeypatch, tokenizer, batches, **NEURON, epsilon=1.0)
    assert got == pytest.approx(variance / (1 / 3), rel=1e-5)
    got = avss_on(monkeypatch, tokenizer, batches, **NEURON)
    assert got == pytest.approx(variance / (0.5 / 3), rel=1e-5), "no sparse mean"


def test_repaired_avss_by_hand(monkeypatch, tokenizer):
    """Additions (1, 0, -3), (1, -2, 1) and (0, 4, 5e-6); 3 of 9 are small beside their token's."""
    added = [1, 0, -3, 1, -2, 1, 0, 4, 5e-6]
    entering = [1, 2, 3, 3, 2, 1, 2, 4, 0]
    want = (statistics.pvariance(added) / statistics.pvariance(entering)) / (3 / 9)
    got = avss_on(monkeypatch, tokenizer, [([ENTERING, LEAVING], REAL)], **REPAIRED)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("variant", [REPAIRED, PUBLISHED, LITERAL, NEURON], ids=str)
def test_avss_of_two_batches_is_that_of_one(monkeypatch, tokenizer, variant):
    one = [([ENTERING, LEAVING], REAL)]
    split = [([ENTERING[[i]], LEAVING[[i]]], REAL[[i]]) for i in (1, 0)]
    want = avss_on(monkeypatch, tokenizer, one, **variant)
    assert avss_on(monkeypatch, tokenizer, split, **variant) == pytest.approx(want)


@pytest.mark.parametrize("variant", [REPAIRED, PUBLISHED, LITERAL, NEURON], ids=str)
def test_avss_never_reads_the_padding(monkeypatch, tokenizer, variant):
    """Under the padding may stand anything, also what overflowed there."""
    want = avss_on(monkeypatch, tokenizer, [([ENTERING, LEAVING], REAL)], **variant)
    batch = [state.masked_fill(~REAL.unsqueeze(-1), math.nan) for state in (ENTERING, LEAVING)]
    assert avss_on(monkeypatch, tokenizer, [(batch, REAL)], **variant) == pytest.approx(want)


def slow_published(streams: list[torch.Tensor], layer: int) -> float:
    variances, small, count = [], 0, 0
    for stream in streams:
        output = stream[layer + 1].tolist()
        means = [sum(column) / len(output) for column in zip(*output, strict=True)]
        variances.append(statistics.variance(means))
        small += sum(abs(value) < 1e-5 for token in output for value in token)
        count += sum(map(len, output))
    return statistics.mean(variances) / (max(small, 0.5) / count)


def label(value: object) -> str:
    """An id that every test process gives alike."""
    return getattr(value, "__name__", str(value))


def slow_literal(streams: list[torch.Tensor], layer: int) -> float:
    values = [value for stream in streams for value in stream[layer + 1].flatten().tolist()]
    small = sum(abs(value) < 1e-5 for value in values)
    return statistics.pvariance(values) / (max(small, 0.5) / len(values))


def slow_neuron(streams: list[torch.Tensor], layer: int) -> float:
    tokens = [token for stream in streams for token in stream[layer + 1].tolist()]
    means = [statistics.fmean(column) for column in zip(*tokens, strict=True)]
    small = sum(abs(value) < 1e-5 for value in means)
    return statistics.pvariance(means) / (max(small, 0.5) / len(means))


def slow_repaired(streams: list[torch.Tensor], layer: int) -> float:
    added, entering, small = [], [], 0
    for stream in streams:
        for x, y in zip(stream[layer].tolist(), stream[layer + 1].tolist(), strict=True):
            update = [after - before for before, after in zip(x, y, strict=True)]
            size = math.sqrt(sum(value**2 for value in update) / len(update))
            small += sum(abs(value) < 0.1 * size for value in update)
            added += update
            entering += x
    ratio = statistics.pvariance(added) / statistics.pvariance(entering)
    return ratio / (max(small, 0.5) / len(added))


@BOTH
@pytest.mark.parametrize(
    ("variant", "slow"),
    [
        (REPAIRED, slow_repaired),
        (PUBLISHED, slow_published),
        (LITERAL, slow_literal),
        (NEURON, slow_neuron),
    ],
    ids=label,
)
def test_avss_is_that_of_single_sequences(build, tokenizer, variant, slow):
    model = build()
    pruner = AVSSPruner(model, tokenizer, batch_size=4, **variant)
    streams = slow_streams(model, tokenizer, MIXED)
    want = [slow(streams, layer) for layer in range(DEPTH)]
    assert list(pruner.compute_layer_scores(MIXED).values()) == close(want)


@pytest.mark.parametrize(
    ("variant", "slow"),
    [(PUBLISHED, slow_published), (LITERAL, slow_literal), (NEURON, slow_neuron)],
    ids=label,
)
def test_published_avss_counts_zeros(tokenizer, variant, slow):
    """A model whose last layer leaves exact zeros: the sparsity is no longer half an element."""
    model = tiny_gpt2(DEPTH)
    with torch.no_grad():
        for linear in (model.transformer.h[5].attn.c_proj, model.transformer.h[5].mlp.c_proj):
            linear.weight.zero_()
            linear.bias.zero_()
        for index in range(5):
            for linear in (
                model.transformer.h[index].attn.c_proj,
                model.transformer.h[index].mlp.c_proj,
            ):
                linear.weight[:, :4] = 0
                linear.bias[:4] = 0
        model.transformer.wte.weight[:, :4] = 0
        model.transformer.wpe.weight[:, :4] = 0
    streams = slow_streams(model, tokenizer, MIXED)
    assert (streams[0][-1][:, :4] == 0).all()
    pruner = AVSSPruner(model, tokenizer, **variant)
    want = [slow(streams, layer) for layer in range(DEPTH)]
    assert list(pruner.compute_layer_scores(MIXED).values()) == close(want)


def test_repaired_avss_of_an_identity_layer_is_0(tokenizer):
    model = random_llama()
    make_identity(model, 3)
    scores = AVSSPruner(model, tokenizer).compute_layer_scores(MIXED)
    assert scores[3] == 0
    assert min(score for layer, score in scores.items() if layer != 3) > 0
    assert AVSSPruner(model, tokenizer).plan(MIXED, n_layers=1).remove == (3,)


def test_avss_of_a_constant_stream_is_refused(tokenizer):
    model = tiny_gpt2(DEPTH)
    torch.nn.init.zeros_(model.transformer.wte.weight)
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    with pytest.raises(NonFiniteError, match=r"layers \[0"):
        AVSSPruner(model, tokenizer).compute_layer_scores(MIXED)


def test_avss_variant_is_checked_and_recorded(llama, tokenizer, eval_data):
    with pytest.raises(InvalidPlanError, match="variant='raw' must be 'repaired' or 'published'"):
        AVSSPruner(llama, tokenizer, variant="raw")
    plan = AVSSPruner(llama, tokenizer, variant="published", epsilon=0.1).plan(eval_data)
    recorded = {"variant": "published", "pool": "sequence", "epsilon": 0.1}
    assert plan.options.items() >= recorded.items()
    assert len(plan.remove) == 2, "a quarter by default"
    assert "pool" not in AVSSPruner(llama, tokenizer).plan(eval_data).options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "mean"}, "pool='mean' must be one of sequence, none, neuron"),
        ({"pool": None}, "pool=None must be one of sequence, none, neuron"),
        ({"epsilon": 0}, "epsilon=0 must be a number above 0"),
        ({"epsilon": -1e-5}, "epsilon=-1e-05 must be"),
        ({"epsilon": math.nan}, "epsilon=nan must be"),
        ({"epsilon": math.inf}, "epsilon=inf must be"),
        ({"epsilon": "1e-5"}, "epsilon='1e-5' must be"),
        ({"epsilon": True}, "epsilon=True must be"),
        ({"variant": "repaired", "pool": "none"}, r"have no meaning for variant='repaired': leave"),
        ({"variant": "repaired", "epsilon": 0.1}, r"use variant='published'"),
    ],
    ids=str,
)
def test_impossible_readings_of_avss_are_refused(llama, tokenizer, options, message):
    with pytest.raises(InvalidPlanError, match=message):
        AVSSPruner(llama, tokenizer, **{"variant": "published", **options})


def test_cumulative_avss_is_sorted_before_it_is_added_up(tokenizer):
    """In the order of depth the sums would be 5, 6, 8, 16, 20 of 20, and layer 0 would go."""
    scores = {0: 5.0, 1: 1.0, 2: 2.0, 3: 8.0, 4: 4.0}
    shares = cumulative_avss(scores)
    assert list(shares) == [1, 2, 4, 0, 3]
    assert list(shares.values()) == pytest.approx([0.05, 0.15, 0.35, 0.6, 1.0])
    assert sorted(layer for layer, share in shares.items() if share <= 0.25) == [1, 2]
    pruner = AVSSPruner(tiny_llama(5), tokenizer, protect=(0, 0))
    assert pruner.select_layers(scores, ratio=0.4) == [1, 2]
    assert list(cumulative_avss({0: 1.0, 1: 1.0})) == [1, 0], "of equals the deeper first"
    with pytest.raises(InvalidPlanError, match=r"The scores add up to 0\.0"):
        cumulative_avss({0: 0.0, 1: 0.0})


# --- PruneMe and Block Influence --------------------------------------------------------------

EVERY_BLOCK = pytest.mark.parametrize("kind", [PruneMePruner, BlockInfluencePruner])


def turned(a: list[float], b: list[float]) -> float:
    """Cosine of two vectors."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def hooked(model: nn.Module, tokenizer, data, kind) -> dict[tuple[int, int], float]:
    """Every block by itself: one pass per block and item, and a hook on either side of it."""
    found: dict[tuple[int, int], float] = {}
    seen: list[torch.Tensor | tuple[torch.Tensor]] = []
    layers = layers_of(model)
    for start in range(len(layers)):
        for end in range(start + 1, len(layers) + 1):
            handles = [
                layers[start].register_forward_pre_hook(lambda _, args: seen.append(args[0])),
                layers[end - 1].register_forward_hook(lambda _, args, output: seen.append(output)),
            ]
            values = []
            for item in data:
                seen.clear()
                with torch.no_grad():
                    model(torch.tensor([token_ids(tokenizer, item)[0]]))
                states = [state[0] if isinstance(state, tuple) else state for state in seen]
                before, after = (state[0].double().tolist() for state in states)
                cosines = [turned(a, b) for a, b in zip(before, after, strict=True)]
                if kind is PruneMePruner:
                    values.append(math.acos(cosines[-1]) / math.pi)
                else:
                    values += [1 - cosine for cosine in cosines]
            for handle in handles:
                handle.remove()
            found[start, end - start] = statistics.fmean(values)
    return found


@BOTH
@EVERY_BLOCK
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_every_block_is_what_hooks_around_it_see(build, kind, depth, tokenizer):
    """Also the blocks that begin at the first layer, end at the last one, or are both."""
    model = build(depth=depth)
    scores = kind(model, tokenizer, batch_size=4).compute_layer_scores(MIXED)
    want = hooked(model, tokenizer, MIXED, kind)
    got = {
        (start, length): value
        for start, row in enumerate(scores.blocks)
        for length, value in enumerate(row, start=1)
    }
    assert list(got) == list(want)
    assert list(got.values()) == close(list(want.values()))
    assert dict(scores) == {start: got[start, 1] for start in range(depth)}


@EVERY_BLOCK
@pytest.mark.parametrize("batch_size", [2, 8])
def test_one_pass_gives_every_block(kind, batch_size, tokenizer):
    """Every layer runs once per batch, however many blocks there are."""
    model, calls = random_llama(), [0] * DEPTH

    def counter(index):
        def count(module, args, output):
            calls[index] += 1

        return count

    for index, layer in enumerate(layers_of(model)):
        layer.register_forward_hook(counter(index))
    kind(model, tokenizer, batch_size=batch_size).compute_layer_scores(MIXED)
    assert calls == [math.ceil(len(MIXED) / batch_size)] * DEPTH


@EVERY_BLOCK
def test_padding_and_batches_change_no_block(monkeypatch, kind, tokenizer):
    """Left and right, one sequence at a time and all, with numbers, NaN or inf in the padding."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randn(DEPTH + 1, n, 8, generator=generator) for n in (4, 1, 3)]

    def blocks(batches):
        pruner = kind(random_llama(), tokenizer)
        monkeypatch.setattr(pruner, "hidden_states", lambda data, shared: iter(batches))
        return [x for row in pruner.compute_layer_scores(["unused"]).blocks for x in row]

    def padded(left: bool, fill: float):
        states = torch.full((DEPTH + 1, 3, 4, 8), fill)
        real = torch.zeros(3, 4, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            n = sequence.shape[1]
            place = slice(4 - n, 4) if left else slice(n)
            states[:, row, place] = sequence
            real[row, place] = True
        return list(states), real

    want = blocks([(list(s.unsqueeze(1)), torch.ones(1, s.shape[1]).bool()) for s in sequences])
    for left in (False, True):
        for fill in (0.0, 99.0, math.nan, math.inf):
            assert blocks([padded(left, fill)]) == pytest.approx(want, rel=1e-9)


@EVERY_BLOCK
def test_half_precision_does_not_overflow(monkeypatch, kind, tokenizer):
    """States of size 6e4, whose norm no float16 can hold: the second layer turns back a quarter."""
    pruner = kind(tiny_llama(2), tokenizer)
    state = torch.full((1, 3, 64), 6e4).half()
    across = state * torch.cat([torch.ones(32), -torch.ones(32)]).half()
    batches = [([state, across, state], torch.ones(1, 3, dtype=torch.bool))]
    monkeypatch.setattr(pruner, "hidden_states", lambda data, shared: iter(batches))
    quarter = 0.5 if kind is PruneMePruner else 1.0
    blocks = pruner.compute_layer_scores(["unused"]).blocks
    assert blocks[0] == pytest.approx([quarter, 0], abs=1e-7)
    assert blocks[1] == pytest.approx([quarter], abs=1e-7)


def slow_influence(streams: list[torch.Tensor], start: int, end: int) -> float:
    """One minus the mean cosine of all tokens."""
    pairs = [pair for s in streams for pair in zip(s[start].tolist(), s[end].tolist(), strict=True)]
    return 1 - statistics.fmean(turned(a, b) for a, b in pairs)


def test_block_influence_weighs_tokens_not_sequences(tokenizer):
    model = random_llama()
    data = ["cat sat", "the old bird sat on our house and saw one mat"]
    streams = slow_streams(model, tokenizer, data)
    per_item = [slow_influence([stream], 2, 3) for stream in streams]
    assert statistics.fmean(per_item) != pytest.approx(slow_influence(streams, 2, 3), rel=1e-3)
    for batch_size in (1, 2):
        pruner = BlockInfluencePruner(model, tokenizer, batch_size=batch_size)
        assert pruner.compute_layer_scores(data)[2] == close(slow_influence(streams, 2, 3))


def test_block_influence_takes_the_lowest_layers_at_once(tokenizer):
    model = random_llama(1)
    streams = slow_streams(model, tokenizer, MIXED)
    alone = [slow_influence(streams, index, index + 1) for index in range(DEPTH)]
    want = sorted(sorted(range(DEPTH), key=alone.__getitem__)[:3])
    blocks = [slow_influence(streams, start, start + 3) for start in range(DEPTH - 2)]
    best = blocks.index(min(blocks))
    assert want != list(range(best, best + 3)), "the two ways must differ in this test"
    pruner = BlockInfluencePruner(model, tokenizer, protect=(0, 0))
    plan = pruner.plan(MIXED, n_layers=3)
    assert (plan.remove, plan.options["contiguous"]) == (tuple(want), False)
    assert list(plan.scores.values()) == close(alone)
    block = BlockInfluencePruner(model, tokenizer, protect=(0, 0), contiguous=True)
    plan = block.plan(MIXED, n_layers=3)
    assert (plan.remove, plan.options["contiguous"]) == ((best, best + 1, best + 2), True)
    with pytest.raises(InvalidPlanError, match=r"BlockInfluencePruner\(..., contiguous=False\)"):
        block.select_layers(dict.fromkeys(range(DEPTH), 0.1))


def test_block_influence_of_an_identity_layer_is_0(tokenizer):
    model = random_llama()
    make_identity(model, 3)
    scores = BlockInfluencePruner(model, tokenizer).compute_layer_scores(MIXED)
    assert 0 <= scores[3] < 1e-12
    assert min(score for layer, score in scores.items() if layer != 3) > 1e-3
    assert BlockInfluencePruner(model, tokenizer).plan(MIXED, n_layers=1).remove == (3,)


@EVERY_BLOCK
@pytest.mark.parametrize("contiguous", ["no", 1, 0.0])
def test_contiguous_is_checked(llama, tokenizer, kind, contiguous):
    with pytest.raises(InvalidPlanError, match=f"contiguous={contiguous!r} must be True or False"):
        kind(llama, tokenizer, contiguous=contiguous)


def slow_blocks(model: nn.Module, tokenizer, data) -> dict[tuple[int, int], float]:
    """Angle between the last token before and after every block, by (start, length)."""
    streams = slow_streams(model, tokenizer, data)
    angles: dict[tuple[int, int], float] = {}
    for start in range(DEPTH):
        for length in range(1, DEPTH - start + 1):
            total = 0.0
            for stream in streams:
                a, b = stream[start][-1].tolist(), stream[start + length][-1].tolist()
                dot = sum(x * y for x, y in zip(a, b, strict=True))
                total += math.acos(dot / (math.hypot(*a) * math.hypot(*b))) / math.pi
            angles[start, length] = total / len(data)
    return angles


@BOTH
@pytest.mark.parametrize("protect", [(0, 0), (1, 2)])
def test_pruneme_takes_the_best_block(build, tokenizer, protect):
    model = build()
    pruner = PruneMePruner(model, tokenizer, protect=protect)
    scores = pruner.compute_layer_scores(MIXED)
    angles = slow_blocks(model, tokenizer, MIXED)
    first, end = protect[0], DEPTH - protect[1]
    for length in range(1, min(end - first, DEPTH - 1) + 1):
        allowed = [start for start in range(first, end) if start + length <= end]
        best = min(allowed, key=lambda start: angles[start, length])
        want = list(range(best, best + length))
        assert pruner.select_layers(scores, ratio=length / DEPTH) == want
        assert pruner.choose_layers(scores, MIXED, n_layers=length) == want


def hand_made_blocks(best: tuple[int, int], small: float = 0.1) -> LayerScores:
    """Distances of DEPTH layers that are large but for one block (start, length)."""
    blocks = [[0.5 + 0.05 * n for n in range(DEPTH - start)] for start in range(DEPTH)]
    blocks[best[0]][best[1] - 1] = small
    return LayerScores({i: row[0] for i, row in enumerate(blocks)}, blocks=blocks)


@EVERY_BLOCK
@pytest.mark.parametrize("best", [(0, 3), (2, 3), (3, 3), (0, 1), (5, 1), (0, 5), (1, 5)])
def test_any_block_can_be_the_best(tokenizer, kind, best):
    pruner = kind(random_llama(), tokenizer, protect=(0, 0), contiguous=True)
    start, length = best
    got = pruner.select_layers(hand_made_blocks(best), ratio=length / DEPTH)
    assert got == list(range(start, start + length))


@pytest.mark.parametrize("best", [(0, 3), (3, 3)])
def test_a_block_that_touches_protected_layers_is_passed_over(tokenizer, best):
    pruner = PruneMePruner(random_llama(), tokenizer, protect=(1, 1))
    got = pruner.select_layers(hand_made_blocks(best), ratio=0.5)
    assert got == [2, 3, 4], "of equals the deeper"


def test_the_block_that_turns_nothing_is_found(tokenizer):
    """Layers 1, 2 and 3 do nothing, but the protected first two may not go."""
    model = random_llama()
    for index in (1, 2, 3):
        make_identity(model, index)
    pruner = PruneMePruner(model, tokenizer, protect=(0, 0))
    scores = pruner.compute_layer_scores(MIXED)
    assert max(scores.blocks[1][:3]) < 1e-7
    assert pruner.select_layers(scores, ratio=0.5) == [1, 2, 3]
    protected = PruneMePruner(model, tokenizer, protect=(2, 1))
    assert protected.select_layers(scores, ratio=1 / 3) == [2, 3]


def test_the_last_block_ends_before_the_final_norm(tokenizer):
    """With a final norm that mirrors half of the axes the normed state is somewhere else."""
    model = random_llama()
    want = slow_blocks(model, tokenizer, MIXED)
    streams = slow_streams(model, tokenizer, MIXED)
    with torch.no_grad():
        model.model.norm.weight[::2] = -3
    scores = PruneMePruner(model, tokenizer).compute_layer_scores(MIXED)
    influence = BlockInfluencePruner(model, tokenizer).compute_layer_scores(MIXED)
    for start in range(DEPTH):
        assert scores.blocks[start][-1] == close(want[start, DEPTH - start])
        assert influence.blocks[start][-1] == close(slow_influence(streams, start, DEPTH))


def test_a_threshold_takes_the_longest_block_below_it(tokenizer):
    model = random_llama(3)
    pruner = PruneMePruner(model, tokenizer, protect=(0, 1))
    scores = pruner.compute_layer_scores(MIXED)
    angles = slow_blocks(model, tokenizer, MIXED)
    lengths = set()
    for threshold in sorted(angles.values()):
        limit = threshold + 1e-5
        below = [
            (length, -angle, start)
            for (start, length), angle in angles.items()
            if angle < limit and start + length <= DEPTH - 1
        ]
        length, _, start = max(below, default=(0, 0, 0))
        got = pruner.select_layers(scores, threshold=limit)
        assert got == list(range(start, start + length))
        lengths.add(length)
    assert len(lengths) >= 4, "blocks of several lengths must occur in this test"
    assert pruner.select_layers(scores, threshold=0.0) == []


def test_pruneme_can_take_single_layers(tokenizer):
    model = random_llama(1)
    pruner = PruneMePruner(model, tokenizer, protect=(0, 0), contiguous=False)
    scores = pruner.compute_layer_scores(MIXED)
    angles = slow_blocks(model, tokenizer, MIXED)
    want = sorted(sorted(range(DEPTH), key=lambda i: angles[i, 1])[:3])
    assert pruner.select_layers(scores, ratio=0.5) == want
    assert pruner.plan(MIXED, n_layers=3).options["contiguous"] is False


def test_scores_without_blocks_are_refused(llama, tokenizer):
    pruner = PruneMePruner(llama, tokenizer)
    with pytest.raises(InvalidPlanError, match=r"hold no block distances.*contiguous=False"):
        pruner.select_layers(dict.fromkeys(range(8), 0.1))
    with pytest.raises(InvalidPlanError, match=r"ratio=0.75 means 6 layers"):
        pruner.select_layers(hand_made_blocks((0, 1)), ratio=0.75)


# --- Smart ------------------------------------------------------------------------------------


def slow_greedy(model, tokenizer, data, candidates, n_layers=None, tolerance=math.inf):
    """The greedy search as one would write it down; returns removed layers in order, changes."""
    removed: list[int] = []
    changes: list[float] = []
    left = list(candidates)
    while left and (n_layers is None or len(removed) < n_layers):
        costs = [(slow_change(model, tokenizer, data, [*removed, i]), i) for i in left]
        change, best = max(costs)
        changes.append(change)
        if change < -tolerance:
            break
        removed.append(best)
        left.remove(best)
    return removed, changes


def one_shot(model, tokenizer, data, candidates, n_layers) -> list[int]:
    alone = {index: slow_change(model, tokenizer, data, [index]) for index in candidates}
    return sorted(sorted(candidates, key=lambda index: -alone[index])[:n_layers])


@pytest.fixture(scope="module")
def interacting(tokenizer):
    """A model in which the best three layers together are not the three best alone."""
    free = range(DEPTH)
    for seed in range(50):
        model = random_llama(seed)
        greedy, changes = slow_greedy(model, tokenizer, MIXED, free, 3)
        if sorted(greedy) != one_shot(model, tokenizer, MIXED, free, 3):
            return model, greedy, changes
    raise AssertionError("no seed gives a model in which removals interact")


def test_smart_is_greedy_with_measuring_anew(interacting, tokenizer):
    model, greedy, changes = interacting
    assert sorted(greedy) != one_shot(model, tokenizer, MIXED, range(DEPTH), 3), "see the fixture"
    pruner = SmartPruner(model, tokenizer, protect=(0, 0))
    assert pruner.optimize_selection(None, MIXED, n_layers=3) == sorted(greedy)
    assert [step["layer"] for step in pruner.steps] == greedy, "in this order"
    assert [step["change"] for step in pruner.steps] == close(changes)
    assert pruner.plan(MIXED, n_layers=3).remove == tuple(sorted(greedy))
    assert pruner.plan(MIXED, ratio=0.5).steps == pruner.steps


def test_every_trial_of_smart_is_the_change_of_a_rebuilt_model(interacting, tokenizer):
    model, greedy, _ = interacting
    pruner = SmartPruner(model, tokenizer, protect=(0, 0), batch_size=2)
    pruner.optimize_selection(None, MIXED, n_layers=2)
    second = pruner.steps[1]["tried"]
    assert sorted(second) == sorted(str(i) for i in range(DEPTH) if i != greedy[0])
    for index, change in second.items():
        assert change == close(slow_change(model, tokenizer, MIXED, [greedy[0], int(index)]))


def costly(tokenizer, data, rounds: int) -> tuple[nn.Module, list[float]]:
    """A model in which the first `rounds` greedy cuts cost ever more, and those changes."""
    for seed in range(200):
        model = random_llama(seed)
        _, changes = slow_greedy(model, tokenizer, data, range(1, 5), rounds)
        best = [slow_best(model, tokenizer, data, count)[0] for count in range(1, rounds + 1)]
        falling = all(a - 1e-3 > b for a, b in [*pairwise(changes), *pairwise(best)])
        if changes[0] < -1e-3 and falling:
            return model, changes
    raise AssertionError("no seed gives a model in which every cut costs something")


@pytest.fixture(scope="module")
def costs(tokenizer):
    return costly(tokenizer, MIXED[:3], 3)


def slow_best(model, tokenizer, data, n_layers) -> tuple[float, tuple[int, ...]]:
    """Change and layers of the best of all sets."""
    sets = combinations(range(1, 5), n_layers)
    return max((slow_change(model, tokenizer, data, layers), layers) for layers in sets)


@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_smart_rolls_back_what_costs_too_much(costs, tokenizer, accepted):
    """As many layers as the tolerance allows, and of so many the best."""
    model, _ = costs
    best = [(0.0, ()), *(slow_best(model, tokenizer, MIXED[:3], n) for n in (1, 2, 3))]
    tolerance = -(best[accepted][0] + best[accepted + 1][0]) / 2
    pruner = SmartPruner(model, tokenizer)
    assert pruner.protect == (1, 1)
    assert pruner.optimize_selection(None, MIXED[:3], tolerance) == list(best[accepted][1])
    cuts = [step for step in pruner.steps if step["action"] == "cut"]
    assert [step["kept"] for step in cuts] == [True] * accepted + [False]
    assert cuts[-1]["change"] == close(best[accepted + 1][0])
    assert cuts[-1]["removed"] == list(best[accepted][1])


def test_an_exact_number_is_taken_whatever_it_costs(costs, tokenizer):
    model, changes = costs
    pruner = SmartPruner(model, tokenizer)
    for n_layers in (1, 2, 3, 4):
        _, want = slow_best(model, tokenizer, MIXED[:3], n_layers)
        got = pruner.optimize_selection(None, MIXED[:3], tolerance=0.0, n_layers=n_layers)
        assert got == list(want)
        assert all(step["kept"] for step in pruner.steps)
    assert min(changes) < 0


def test_smart_takes_only_candidates_and_each_once(interacting, tokenizer):
    model, _, _ = interacting
    pruner = SmartPruner(model, tokenizer, protect=(0, 0))
    want, _ = slow_greedy(model, tokenizer, MIXED, [1, 3, 4], 3)
    assert pruner.optimize_selection([4, 1, 3], MIXED, n_layers=3) == [1, 3, 4] == sorted(want)
    tried = [sorted(map(int, step["tried"])) for step in pruner.steps]
    assert tried == [sorted({1, 3, 4} - set(want[:count])) for count in range(3)]
    assert pruner.optimize_selection([], MIXED) == []
    assert pruner.steps == []


def test_smart_plans_from_candidates_within_the_tolerance(costs, tokenizer):
    """Without a number: candidates by threshold, then greedy rounds up to the tolerance."""
    model, changes = costs
    data = MIXED[:3]
    alone = {index: slow_change(model, tokenizer, data, [index]) for index in range(1, 5)}
    threshold = sorted(alone.values())[1] - 1e-5  # all but one
    candidates = [index for index in alone if alone[index] > threshold]
    tolerance = -(changes[0] + changes[1]) / 2
    want, _ = slow_greedy(model, tokenizer, data, candidates, None, tolerance)
    plan = SmartPruner(model, tokenizer).plan(data, threshold=threshold, tolerance=tolerance)
    assert len(candidates) == 3
    assert list(plan.remove) == sorted(want)
    assert plan.steps[-1]["kept"] is False
    assert sorted(map(int, plan.steps[0]["tried"])) == candidates


def test_a_tolerance_alone_looks_at_every_layer(costs, tokenizer):
    """No threshold, no scores: the same as the search with a number that is not reached."""
    model, _ = costs
    data = MIXED[:3]
    change, best = slow_best(model, tokenizer, data, 2)
    plan = SmartPruner(model, tokenizer).plan(data, tolerance=1e-6 - change)
    assert plan.remove == best
    assert plan.scores is None
    assert sorted(map(int, plan.steps[0]["tried"])) == [1, 2, 3, 4]


@pytest.mark.parametrize("amount", [{}, {"n_layers": 2}])
def test_nothing_within_the_tolerance_is_an_error(costs, tokenizer, amount):
    model, changes = costs
    pruner = SmartPruner(model, tokenizer)
    with pytest.raises(InvalidPlanError, match=r"No layer can go .* the cheapest set tried"):
        pruner.plan(MIXED[:3], tolerance=-changes[0] / 2, **amount)


def test_unfit_held_out_items_are_told_before_the_search(tokenizer, monkeypatch):
    monkeypatch.setattr(layer_search.LayerSearch, "grow", None)  # is not reached
    with pytest.raises(InvalidDataError, match="eval_data is empty"):
        SmartPruner(tiny_llama(), tokenizer).plan(MIXED, n_layers=2, held_out=[])


def test_an_interruption_after_the_search_costs_nothing_of_it(tokenizer, monkeypatch):
    pruner = SmartPruner(tiny_llama(), tokenizer)
    want = pruner.plan(MIXED, n_layers=2)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(SmartPruner, "_judged", stop)
    with pytest.raises(KeyboardInterrupt):
        pruner.plan(MIXED, n_layers=2, held_out=MIXED[:2])
    assert pruner.partial_plan.remove == want.remove


@pytest.mark.parametrize(
    ("candidates", "n_layers", "message"),
    [
        ([9], None, "Layer 9 is out of range"),
        ([2, 2], None, r"Layers \[2\] are listed more than once"),
        ([2, 3], 3, "n_layers=3 must be from 1 to 2"),
        (None, 5, "n_layers=5 must be from 1 to 4"),
        (None, 0, "n_layers=0 must be from 1 to 4"),
    ],
)
def test_impossible_searches_are_refused(tokenizer, candidates, n_layers, message):
    pruner = SmartPruner(tiny_llama(), tokenizer)
    with pytest.raises(InvalidPlanError, match=message):
        pruner.optimize_selection(candidates, MIXED, n_layers=n_layers)


def test_every_layer_is_more_than_can_go(tokenizer):
    pruner = SmartPruner(tiny_llama(4), tokenizer, protect=(0, 0))
    with pytest.raises(InvalidPlanError, match="n_layers=4 must be from 1 to 3"):
        pruner.optimize_selection(None, MIXED, n_layers=4)


def test_nothing_is_measured_twice(tokenizer):
    """The first round of the search finds its measurements done; a second search finds all."""
    pruner = SmartPruner(tiny_llama(), tokenizer)
    pruner.compute_layer_scores(MIXED)
    quality = pruner.quality(MIXED)
    assert quality.measured == 8 + 1
    pruner.optimize_selection(None, MIXED, n_layers=3)
    measured = quality.measured
    assert measured == len(quality._values)
    pruner.optimize_selection(None, MIXED, n_layers=2)
    pruner.optimize_selection(None, MIXED, n_layers=3)
    assert pruner.quality(MIXED).measured == len(quality._values) < measured + 6


def test_what_was_not_seen_is_measured_with_its_interval(tokenizer):
    model = tiny_llama()
    pruner = SmartPruner(model, tokenizer)
    plan = pruner.plan(MIXED, n_layers=2, held_out=MIXED[::-1])
    held = plan.held_out
    assert held["change"] == close(slow_change(model, tokenizer, MIXED, plan.remove))
    assert held["low"] < held["change"] < held["high"]
    assert held["items"] == len(MIXED)
    assert held["unit"] == "relative change of likelihood per token"
    assert held["fingerprint"] != plan.data["fingerprint"]
    assert pruner.plan(MIXED, n_layers=2).held_out == {}


def test_an_interrupted_plan_leaves_what_it_had_come_to(tokenizer, monkeypatch):
    pruner = SmartPruner(tiny_llama(), tokenizer)
    whole = pruner.plan(MIXED, n_layers=3)
    assert pruner.partial_plan is None

    def stop(self, removed, enough=None, on_step=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_search.LayerSearch, "refine", stop)
    with pytest.raises(KeyboardInterrupt):
        pruner.plan(MIXED, n_layers=3, model_id="a/b")
    partial = pruner.partial_plan
    cuts = [step for step in whole.steps if step["action"] == "cut"]
    assert list(partial.remove) == cuts[-1]["removed"]
    assert (partial.model_id, partial.options) == ("a/b", whole.options)
    assert PruningPlan.from_json(partial.to_json()) == partial


def test_both_limits_hold_in_a_plan(costs, tokenizer):
    model, _ = costs
    data = MIXED[:3]
    change, best = slow_best(model, tokenizer, data, 2)
    pruner = SmartPruner(model, tokenizer)
    assert pruner.plan(data, n_layers=2, tolerance=9.0).remove == best
    assert pruner.plan(data, n_layers=4, tolerance=1e-6 - change).remove == best


@pytest.mark.parametrize("name", ["smart", "pruneme", "ablation"])
def test_a_sweep_measures_every_depth(name, tokenizer):
    model = tiny_llama()
    pruner = get_strategy(name)(model, tokenizer)
    curve = pruner.sweep(MIXED, 3, model_id="a/b", held_out=MIXED[:4])
    assert [point["n_layers"] for point in curve.points] == [1, 2, 3]
    for point in curve.points:
        want = slow_change(model, tokenizer, MIXED, point["removed"])
        assert point["change"] == close(want)
        want = slow_change(model, tokenizer, MIXED[:4], point["removed"])
        assert point["held_out"]["change"] == close(want)
        chosen = list(pruner.plan(MIXED, n_layers=point["n_layers"]).remove)
        assert point["removed"] == chosen
    assert DepthCurve.from_json(curve.to_json()) == curve
    assert (curve.strategy, curve.model_id, curve.num_layers) == (name, "a/b", 8)
    with pytest.raises(InvalidPlanError, match="n_layers=5 must be from 1 to 4"):
        pruner.sweep(MIXED, 5)
