"""PruneMe and Block Influence against hooks around every block."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from conftest import make_identity, tiny_llama
from oracles import BOTH, DEPTH, MIXED, close, layers_of, random_llama, slow_streams, token_ids
from torch import nn

from llm_pruner.errors import InvalidPlanError
from llm_pruner.goals.budget import Budget
from llm_pruner.layer_scores import LayerScores
from llm_pruner.pruners.similarity import BlockInfluencePruner, PruneMePruner

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
        assert pruner.choose_layers(scores, MIXED, Budget(n_layers=length)) == want


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
