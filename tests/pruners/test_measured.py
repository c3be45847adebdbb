"""Ablation and smart against rebuilt models and the search as one would write it down."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
from conftest import items, make_identity, tiny_llama
from oracles import BOTH, DEPTH, MIXED, close, random_llama, slow_change, slow_loss
from torch import nn

from llm_pruner import get_strategy
from llm_pruner.data.items import of_kind
from llm_pruner.errors import InvalidDataError, InvalidPlanError
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.pruners import measured
from llm_pruner.pruners.measured import AblationPruner, SmartPruner
from llm_pruner.results import DepthCurve, PruningPlan
from llm_pruner.search import layer_search
from llm_pruner.search.removal_quality import RemovalQuality


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
    for seed in range(8, 108):  # the first that does, where this was written
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
    pruner = SmartPruner(model, tokenizer, objective="nll", protect=(0, 0))
    assert pruner.optimize_selection(None, MIXED, n_layers=3) == sorted(greedy)
    assert [step["action"] for step in pruner.steps][:4] == ["start"] + ["cut"] * 3
    cuts = [step for step in pruner.steps if step["action"] == "cut"]
    assert [step["layer"] for step in cuts] == greedy, "in this order"
    assert [step["change"] for step in cuts] == close(changes)
    assert pruner.plan(MIXED, n_layers=3).remove == tuple(sorted(greedy))
    assert pruner.plan(MIXED, ratio=0.5).steps == pruner.steps


def test_every_trial_of_smart_is_the_change_of_a_rebuilt_model(interacting, tokenizer):
    model, greedy, _ = interacting
    pruner = SmartPruner(model, tokenizer, objective="nll", protect=(0, 0), batch_size=2)
    pruner.optimize_selection(None, MIXED, n_layers=2)
    second = pruner.steps[2]["tried"]
    assert sorted(second) == sorted(str(i) for i in range(DEPTH) if i != greedy[0])
    for index, change in second.items():
        assert change == close(slow_change(model, tokenizer, MIXED, [greedy[0], int(index)]))


def costly(tokenizer, data, rounds: int) -> tuple[nn.Module, list[float]]:
    """A model in which the first `rounds` greedy cuts cost ever more, and those changes."""
    for seed in range(34, 234):  # the first that does, where this was written
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
    pruner = SmartPruner(model, tokenizer, objective="nll")
    for n_layers in (1, 2, 3, 4):
        _, want = slow_best(model, tokenizer, MIXED[:3], n_layers)
        got = pruner.optimize_selection(None, MIXED[:3], tolerance=0.0, n_layers=n_layers)
        assert got == list(want)
        assert all(step["kept"] for step in pruner.steps)
    assert min(changes) < 0


def test_layers_are_chosen_by_divergence_their_number_by_likelihood(interacting, tokenizer):
    model, _, _ = interacting
    pruner = SmartPruner(model, tokenizer, protect=(0, 0))
    divergence = RemovalQuality(LayerStack(model), tokenizer, MIXED, objective="kl")
    best = max(combinations(range(DEPTH), 2), key=divergence.change)
    plan = pruner.plan(MIXED, n_layers=2, held_out=["one bird sat in a tree"])
    assert plan.remove == best
    assert plan.options["objective"] == {"kl": 1.0}
    assert plan.steps[-1]["change"] == close(divergence.change(best))
    assert "likelihood" in plan.held_out["unit"]
    within = pruner.plan(MIXED, tolerance=0.5)
    assert within.options["objective"] == {"nll": 1.0}
    assert SmartPruner(model, tokenizer, objective="nll").plan(MIXED, n_layers=2).options[
        "objective"
    ] == {"nll": 1.0}


def test_smart_takes_only_candidates_and_each_once(interacting, tokenizer):
    model, _, _ = interacting
    pruner = SmartPruner(model, tokenizer, objective="nll", protect=(0, 0))
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

    monkeypatch.setattr(RemovalQuality, "cost", stop)
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


def test_layers_that_one_kind_of_data_misses_are_named(tokenizer, monkeypatch, caplog):
    model, data = tiny_llama(), [of_kind(text, kind) for kind in "ab" for text in MIXED[4:]]
    pruner = SmartPruner(model, tokenizer, precision="full")
    chosen = pruner.optimize_selection(None, data, n_layers=2)
    quality, asked = pruner.quality(data, {"kl": 1.0}), []
    assert quality.has_kinds
    assert not RemovalQuality(LayerStack(model), tokenizer, MIXED).has_kinds

    def by_kind(self, removed):
        asked.append(tuple(removed))
        apart = removed == (chosen[1],)
        return {
            "a": {"change": -0.1, "low": -0.2, "high": -0.05},
            "b": {"change": -0.5, "low": -0.6, "high": -0.4 if apart else -0.1},
        }

    monkeypatch.setattr(RemovalQuality, "by_kind", by_kind)
    assert pruner.optimize_selection(None, data, n_layers=2) == chosen
    assert asked == [(layer,) for layer in chosen]
    said = f"disagree about layers, alone: {chosen[1]} (b -50.0 %, a -10.0 %)"
    assert caplog.text.count(said) == 1


def test_figures_show_scores_on_part_of_much_data(tokenizer, monkeypatch):
    data = [f"{one['prompt']} {one['reference']}" for one in items(24)]
    pruner = SmartPruner(tiny_llama(), tokenizer)
    every = pruner.scores_to_draw(data)
    assert every == pruner.compute_layer_scores(data)
    assert every.unit == pruner.quality(data).unit
    monkeypatch.setattr(measured, "SMALL", 0.0)
    some = pruner.scores_to_draw(data)
    count = int(some.unit.removeprefix(f"{every.unit}, ").removesuffix(" of 24 items"))
    assert 2 <= count <= 8
    assert some != every
    assert some.keys() == every.keys()
