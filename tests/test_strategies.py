"""Every strategy against a slow oracle that shares no code with it.

The oracles read one unpadded sequence at a time, remove layers by rebuilding the model, and use
the model's own loss and plain Python arithmetic.
"""

from __future__ import annotations

import copy
import math
import statistics
from itertools import pairwise

import pytest
import torch
from conftest import items, make_identity, tiny_gpt2, tiny_llama
from torch import nn

from llm_pruner.errors import InvalidPlanError, NonFiniteError
from llm_pruner.pruners import AblationPruner, AVSSPruner, PruneMePruner, SmartPruner
from llm_pruner.results import LayerScores

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


def avss_on(monkeypatch, tokenizer, batches, variant: str) -> float:
    """The score of a model of one layer that is made to have these hidden states."""
    pruner = AVSSPruner(tiny_llama(1), tokenizer, variant=variant)
    monkeypatch.setattr(pruner, "hidden_states", lambda data: iter(batches))
    return pruner.compute_layer_scores(["unused"])[0]


def test_published_avss_by_hand(monkeypatch, tokenizer):
    """Means over the sequence (3, 1, 1) and (2, 8, 5e-6); 3 of 9 elements are below 1e-5."""
    assert statistics.variance([3, 1, 1]) == pytest.approx(4 / 3)
    assert statistics.variance([2, 8, 0]) == pytest.approx(52 / 3)
    want = ((4 / 3 + 52 / 3) / 2) / ((3 + 0.5) / 9)
    got = avss_on(monkeypatch, tokenizer, [([ENTERING, LEAVING], REAL)], "published")
    assert got == pytest.approx(want, rel=1e-5)


def test_repaired_avss_by_hand(monkeypatch, tokenizer):
    """Additions (1, 0, -3), (1, -2, 1) and (0, 4, 5e-6); 3 of 9 are small beside their token's."""
    added = [1, 0, -3, 1, -2, 1, 0, 4, 5e-6]
    entering = [1, 2, 3, 3, 2, 1, 2, 4, 0]
    want = (statistics.pvariance(added) / statistics.pvariance(entering)) / ((3 + 0.5) / 9)
    got = avss_on(monkeypatch, tokenizer, [([ENTERING, LEAVING], REAL)], "repaired")
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("variant", ["published", "repaired"])
def test_avss_of_two_batches_is_that_of_one(monkeypatch, tokenizer, variant):
    one = [([ENTERING, LEAVING], REAL)]
    split = [([ENTERING[[i]], LEAVING[[i]]], REAL[[i]]) for i in (1, 0)]
    want = avss_on(monkeypatch, tokenizer, one, variant)
    assert avss_on(monkeypatch, tokenizer, split, variant) == pytest.approx(want)


@pytest.mark.parametrize("variant", ["published", "repaired"])
def test_avss_never_reads_the_padding(monkeypatch, tokenizer, variant):
    """Under the padding may stand anything, also what overflowed there."""
    want = avss_on(monkeypatch, tokenizer, [([ENTERING, LEAVING], REAL)], variant)
    batch = [state.masked_fill(~REAL.unsqueeze(-1), math.nan) for state in (ENTERING, LEAVING)]
    assert avss_on(monkeypatch, tokenizer, [(batch, REAL)], variant) == pytest.approx(want)


def slow_published(streams: list[torch.Tensor], layer: int) -> float:
    variances, small, count = [], 0, 0
    for stream in streams:
        output = stream[layer + 1].tolist()
        means = [sum(column) / len(output) for column in zip(*output, strict=True)]
        variances.append(statistics.variance(means))
        small += sum(abs(value) < 1e-5 for token in output for value in token)
        count += sum(map(len, output))
    return statistics.mean(variances) / ((small + 0.5) / count)


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
    return ratio / ((small + 0.5) / len(added))


@BOTH
@pytest.mark.parametrize(
    ("variant", "slow"), [("published", slow_published), ("repaired", slow_repaired)]
)
def test_avss_is_that_of_single_sequences(build, tokenizer, variant, slow):
    model = build()
    pruner = AVSSPruner(model, tokenizer, batch_size=4, variant=variant)
    streams = slow_streams(model, tokenizer, MIXED)
    want = [slow(streams, layer) for layer in range(DEPTH)]
    assert list(pruner.compute_layer_scores(MIXED).values()) == close(want)


def test_published_avss_counts_zeros(tokenizer):
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
    pruner = AVSSPruner(model, tokenizer, variant="published")
    want = [slow_published(streams, layer) for layer in range(DEPTH)]
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
    plan = AVSSPruner(llama, tokenizer, variant="published").plan(eval_data)
    assert plan.options["variant"] == "published"
    assert len(plan.remove) == 2, "a quarter by default"


# --- PruneMe ----------------------------------------------------------------------------------


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
def test_pruneme_is_the_angle_of_every_block(build, tokenizer):
    model = build()
    scores = PruneMePruner(model, tokenizer, batch_size=4).compute_layer_scores(MIXED)
    want = slow_blocks(model, tokenizer, MIXED)
    assert [len(row) for row in scores.blocks] == [6, 5, 4, 3, 2, 1]
    for (start, length), angle in want.items():
        assert scores.blocks[start][length - 1] == close(angle)
    assert list(scores.values()) == close([want[start, 1] for start in range(DEPTH)])


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


@pytest.mark.parametrize("best", [(0, 3), (2, 3), (3, 3), (0, 1), (5, 1), (0, 5), (1, 5)])
def test_any_block_can_be_the_best(tokenizer, best):
    pruner = PruneMePruner(random_llama(), tokenizer, protect=(0, 0))
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
    with torch.no_grad():
        model.model.norm.weight[::2] = -3
    scores = PruneMePruner(model, tokenizer).compute_layer_scores(MIXED)
    for start in range(DEPTH):
        assert scores.blocks[start][-1] == close(want[start, DEPTH - start])


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
        falling = all(a - 1e-3 > b for a, b in pairwise(changes))
        if changes[0] < -1e-3 and falling:
            return model, changes
    raise AssertionError("no seed gives a model in which every cut costs something")


@pytest.fixture(scope="module")
def costs(tokenizer):
    return costly(tokenizer, MIXED[:3], 3)


@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_smart_rolls_back_what_costs_too_much(costs, tokenizer, accepted):
    model, changes = costs
    limits = [0.0, *[-change for change in changes]]
    tolerance = (limits[accepted] + limits[accepted + 1]) / 2
    want, slow = slow_greedy(model, tokenizer, MIXED[:3], range(1, 5), None, tolerance)
    assert (len(want), len(slow)) == (accepted, accepted + 1)
    pruner = SmartPruner(model, tokenizer)
    assert pruner.protect == (1, 1)
    assert pruner.optimize_selection(None, MIXED[:3], tolerance=tolerance) == sorted(want)
    assert [step["kept"] for step in pruner.steps] == [True] * accepted + [False]
    assert [step["change"] for step in pruner.steps] == close(slow)


def test_an_exact_number_is_taken_whatever_it_costs(costs, tokenizer):
    model, changes = costs
    pruner = SmartPruner(model, tokenizer)
    for n_layers in (1, 2, 3, 4):
        want, _ = slow_greedy(model, tokenizer, MIXED[:3], range(1, 5), n_layers)
        got = pruner.optimize_selection(None, MIXED[:3], tolerance=0.0, n_layers=n_layers)
        assert got == sorted(want)
        assert len(set(got)) == n_layers
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


def test_the_search_costs_what_it_says(tokenizer):
    """L + 1 measurements for the scores; the first round of the search finds them done."""
    pruner = SmartPruner(tiny_llama(), tokenizer)
    pruner.compute_layer_scores(MIXED)
    assert pruner.quality(MIXED).measured == 8 + 1
    pruner.optimize_selection(None, MIXED, n_layers=3)
    assert pruner.quality(MIXED).measured == 8 + 1 + 3 + 2
