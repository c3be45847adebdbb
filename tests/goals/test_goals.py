"""Goals for size, speed, memory and loss: what was asked holds in the model that comes out."""

from __future__ import annotations

import math

import pytest
from conftest import items, tiny_llama

from llm_pruner import BasePruner, get_strategy, load_data, load_model
from llm_pruner.data.sampling import split_items
from llm_pruner.errors import InvalidPlanError, UnknownNameError
from llm_pruner.evaluation.cost_comparison import cache_bytes
from llm_pruner.evaluation.likelihood import perplexity
from llm_pruner.evaluation.tasks import HolisticEvaluator
from llm_pruner.goals import targets
from llm_pruner.goals.budget import Budget, Drop
from llm_pruner.goals.choice import choose_within, largest_that_holds
from llm_pruner.goals.drops import Drops
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.report.summary import goals_text
from llm_pruner.results import Comparison
from llm_pruner.utils import count_bytes, count_parameters

EVERY = {"protect": (0, 0)}


def pruner(model, tokenizer, strategy="bi", **options):
    return get_strategy(strategy)(model, tokenizer, **{**EVERY, **options})


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6, 0.4])
@pytest.mark.parametrize("goal", ["target_size", "target_params"])
def test_the_size_of_the_pruned_model_is_exact_and_no_layer_too_many_goes(goal, share, tokenizer):
    model = tiny_llama()
    size = {"target_size": count_bytes, "target_params": count_parameters}[goal]
    asked = int(share * size(model))
    one = pruner(model, tokenizer)
    plan = one.plan(items(), budget=Budget(**{goal: asked}))
    found = size(LayerStack(model).remove(plan.remove))
    assert found <= asked
    assert size(LayerStack(model).remove(plan.remove[1:])) > asked
    (record,) = plan.options["goals"]
    assert record == {"goal": goal, "asked": asked, "predicted": found}


def test_a_size_that_is_met_exactly_is_met(tokenizer):
    model = tiny_llama()
    asked = count_bytes(LayerStack(model).remove([3, 4]))
    assert len(pruner(model, tokenizer).plan(items(), budget=Budget(target_size=asked)).remove) == 2


class SmallFirst(BasePruner):
    """Removes the layers in the order of their sizes."""

    def description(self):
        return "By size."

    def compute_layer_scores(self, eval_data):
        return {layer: float(layer in (2, 5)) for layer in range(self.num_layers)}


def test_layers_of_different_sizes_go_until_the_goal_is_met(tokenizer, monkeypatch):
    """On average two layers would do; the choice falls on six small ones before a large one."""
    sizes = {layer: 100 if layer in (2, 5) else 1 for layer in range(8)}

    def left(self, goal, removed):
        return 506 - sum(sizes[layer] for layer in removed)

    monkeypatch.setattr(targets.Gauge, "exactly", left)
    monkeypatch.setattr(targets.Gauge, "value", left)
    one = SmallFirst(tiny_llama(), tokenizer, **EVERY)
    assert one.with_count(Budget(target_size=506 - 30)).n_layers == 2
    plan = one.plan(items(), budget=Budget(target_size=506 - 30))
    assert len(plan.remove) == 7
    assert plan.options["goals"][0]["predicted"] == 506 - 106


@pytest.mark.parametrize("of", ["params", "bytes"])
def test_a_ratio_of_parameters_or_bytes_is_reached(of, tokenizer):
    model = tiny_llama()
    size = {"bytes": count_bytes, "params": count_parameters}[of]
    plan = pruner(model, tokenizer).plan(items(), budget=Budget(ratio=0.3, ratio_of=of))
    left = size(LayerStack(model).remove(plan.remove)) / size(model)
    fewer = size(LayerStack(model).remove(plan.remove[1:])) / size(model)
    assert left <= 0.7 < fewer


def test_memory_is_the_weights_and_the_cache(tokenizer):
    model = tiny_llama()

    def memory(one, context):
        return count_bytes(one) + context * cache_bytes(one)

    for context in (1, 5000):
        asked = int(0.7 * memory(model, context))
        budget = Budget(target_memory=asked, context=context)
        plan = pruner(model, tokenizer).plan(items(), budget=budget)
        stack = LayerStack(model)
        assert memory(stack.remove(plan.remove), context) <= asked
        assert memory(stack.remove(plan.remove[1:]), context) > asked


@pytest.mark.parametrize("speedup_of", ["decode", "prefill"])
def test_speed_follows_from_two_timed_models(speedup_of, tokenizer, monkeypatch):
    """A layer takes a tenth of a token's time here: 1 / (1 - k / 10) is at least 1.5 for k = 4."""
    timed = []

    def speedup(original, pruned, tokenizer, batch, what):
        timed.append((batch, what))
        full, less = (0.2 + 0.1 * one.config.num_hidden_layers for one in (original, pruned))
        return full / less

    monkeypatch.setattr(targets, "speedup", speedup)
    budget = Budget(target_speedup=1.5, speedup_of=speedup_of)
    plan = pruner(tiny_llama(), tokenizer, batch_size=3).plan(items(), budget=budget)
    assert len(plan.remove) == 4
    assert plan.options["goals"][0]["predicted"] == pytest.approx(1 / 0.6)
    assert timed == [(3, speedup_of)]


def test_a_model_that_is_no_faster_with_fewer_layers_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(targets, "speedup", lambda *_: 1.0)
    with pytest.raises(InvalidPlanError, match="no faster here"):
        pruner(tiny_llama(), tokenizer).plan(items(), budget=Budget(target_speedup=1.1))


def test_several_goals_are_all_met(tokenizer):
    model = tiny_llama()
    asked = {"target_size": int(0.8 * count_bytes(model)),
             "target_params": int(0.6 * count_parameters(model))}  # fmt: skip
    plan = pruner(model, tokenizer).plan(items(), budget=Budget(**asked))
    alone = pruner(model, tokenizer).plan(
        items(), budget=Budget(target_params=asked["target_params"])
    )
    assert plan.remove == alone.remove
    assert [one["goal"] for one in plan.options["goals"]] == ["target_size", "target_params"]
    assert all(one["predicted"] <= one["asked"] for one in plan.options["goals"])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"target_size": 10}, "This cannot be reached: without 7 layers, the most that can go"),
        ({"target_params": 10**9}, "There is nothing to remove: the full model has"),
        ({"target_size": 60_000, "n_layers": 1}, "n_layers=1 does not reach the goals, which take"),
    ],
)
def test_what_cannot_be_reached_is_said_before_anything_is_scored(budget, message, tokenizer):
    one = pruner(tiny_llama(), tokenizer)
    one.compute_layer_scores = None
    with pytest.raises(InvalidPlanError, match=message):
        one.plan(items(), budget=Budget(**budget))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_size": 1.5}, "target_size=1.5 must be a whole number"),
        ({"target_memory": 0}, "target_memory=0 must be"),
        ({"target_speedup": 1}, "target_speedup=1 must be a number above 1"),
        ({"threshold": 0.1, "target_size": 5}, "threshold and target_size exclude each other"),
        ({"max_drop": {}}, "max_drop={} must be a dict"),
        ({"max_drop": {"a": "x"}}, "max_drop='x' must be a number from 0"),
        ({"max_drop": {"a": -1}}, "max_drop=-1 must be"),
    ],
)
def test_goals_that_cannot_be_meant_are_refused(values, message):
    with pytest.raises(InvalidPlanError, match=message):
        Budget(**values)
    with pytest.raises(UnknownNameError, match="Known: bytes, layers, params"):
        Budget(ratio=0.5, ratio_of="bits")


def test_what_a_drop_may_be():
    assert Drop.of("10%") == Drop(0.1, relative=True)
    assert Drop.of(0.02) == Drop(0.02)
    assert [str(Drop.of(text)) for text in ("2.5%", "0.02")] == ["2.5%", "0.02"]
    budget = Budget(max_drop={"a": "10%"}, target_size=5)
    assert budget.given == {"max_drop": {"a": "10%"}, "target_size": 5}
    assert budget.targets == {"target_size": 5}


# Limits on the loss


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = load_model("demo", device="cpu")
    return model, tokenizer, load_data("demo", 120).scoring


def test_drops_are_those_of_the_evaluators(demo):
    model, tokenizer, data = demo
    asked = {"perplexity": "10%", "facts": 0.01, "mean": 0.1, "stories": "20%"}
    limits = {name: Drop.of(value) for name, value in asked.items()}
    stack = LayerStack(model)
    how = {"batch_size": 8, "max_length": 64}
    drops = Drops(stack, tokenizer, data, limits, confident=False, **how)
    layers = (2, 3, 5, 7, 8)
    pruned = stack.remove(layers)
    found = drops.of(layers)
    full, cut = (perplexity(one, tokenizer, data, **how) for one in (model, pruned))
    assert found["perplexity"]["drop"] == pytest.approx(cut / full - 1, rel=1e-4)
    before, after = (
        HolisticEvaluator(one, tokenizer).run_benchmark(data) for one in (model, pruned)
    )
    assert found["facts"]["drop"] == pytest.approx(before["facts"] - after["facts"])
    assert found["mean"]["drop"] == pytest.approx(before["mean"] - after["mean"])
    want = (before["stories"] - after["stories"]) / before["stories"]
    assert found["stories"]["drop"] == pytest.approx(want)
    assert found["facts"]["drop"] > 0.01
    for one in found.values():
        assert one["drop"] <= one["high"] < math.inf
    assert found["facts"]["high"] < 0.5
    assert not drops.holds(layers)
    assert drops.holds(())


@pytest.mark.parametrize(("both", "lost", "won"), [(20, 0, 0), (15, 3, 1), (40, 10, 0)])
def test_the_upper_end_is_that_of_agresti_and_min(both, lost, won, demo, monkeypatch):
    """With half an item in each cell: (b - c) / n + 1.96 sqrt(b + c - (b - c)^2 / n) / n."""
    model, tokenizer, _ = demo
    before = [1.0] * both + [1.0] * lost + [0.0] * won
    after = [1.0] * both + [0.0] * lost + [1.0] * won
    scores = iter([before, after])
    monkeypatch.setattr(Drops, "_scores", lambda self, model: {"t": next(scores)})
    data = [{"task": "t", "prompt": "Add 1 and 1.", "reference": "2"}] * 4
    how = {"confident": True, "batch_size": 4, "max_length": 32}
    drops = Drops(LayerStack(model), tokenizer, data, {"t": Drop(0.1)}, **how)
    found = drops.of([3])["t"]
    n, b, c = both + lost + won + 2, lost + 0.5, won + 0.5
    assert found["drop"] == pytest.approx((lost - won) / (n - 2))
    want = (b - c) / n + 1.96 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert found["high"] == pytest.approx(max(want, found["drop"]))
    assert drops.holds([3]) == (want <= 0.1)


def test_a_limit_holds_on_the_items_that_checked_it_and_one_more_layer_breaks_it(demo):
    model, tokenizer, data = demo
    one = get_strategy("bi")(model, tokenizer)
    plan = one.plan(data, budget=Budget(max_drop={"perplexity": "30%"}))
    choosing, checking = split_items(data, 0.5)
    full = perplexity(model, tokenizer, checking)

    def drop(layers):
        return perplexity(one.layers.remove(layers), tokenizer, checking) / full - 1

    assert drop(plan.remove) <= 0.3
    more = one.plan(choosing, n_layers=len(plan.remove) + 1).remove
    assert drop(more) > 0.3
    assert plan.options["goals"][0]["predicted"] == pytest.approx(drop(plan.remove), rel=1e-4)
    assert plan.data["items"] == len(data)
    sure = one.plan(data, budget=Budget(max_drop={"perplexity": "30%"}, confident=True))
    assert sure.options["goals"][0]["high"] <= 0.3
    assert len(sure.remove) < len(plan.remove)


def test_goals_and_limits_that_exclude_each_other_say_what_is_reachable(demo):
    model, tokenizer, data = demo
    one = get_strategy("bi")(model, tokenizer)
    budget = Budget(target_size=5_000_000, max_drop={"perplexity": "30%"})
    message = r"6 layers would have to go, .* perplexity is worse by .* \(allowed: 30%\). Within "
    with pytest.raises(InvalidPlanError, match=message + r"max_drop \d layers can go, which"):
        one.plan(data, budget=budget)
    with pytest.raises(InvalidPlanError, match="No layer can go within max_drop: without"):
        one.plan(data, budget=Budget(max_drop={"perplexity": 0.0}))
    with pytest.raises(InvalidPlanError, match=r"max_drop names 'arc', of which .* it has perplex"):
        one.plan(data, budget=Budget(max_drop={"arc": 0.1}))


def test_a_tolerance_that_stops_short_of_a_goal_is_said(demo):
    model, tokenizer, data = demo
    budget = Budget(target_size=5_000_000, tolerance=0.01)
    with pytest.raises(InvalidPlanError, match="The goals are not reached: without layers"):
        get_strategy("smart")(model, tokenizer).plan(data[:40], budget=budget)


@pytest.mark.parametrize("sizes", [[1, 2, 3, 4, 5, 6, 7], [2, 4, 8], [3], [1, 2]])
def test_the_largest_number_is_found_with_few_trials(sizes):
    for most in [0, *sizes]:
        tried = []

        def choose(size, tried=tried):
            tried.append(size)
            return range(size)

        found = largest_that_holds(sizes, choose, lambda layers, most=most: len(layers) <= most)
        assert found == (most or None)
        assert len(tried) == len({*tried}) <= 2 * math.ceil(math.log2(len(sizes) + 1)) + 1
    assert largest_that_holds([], choose, bool) is None


def test_a_number_of_layers_alone_is_chosen_as_it_is():
    assert choose_within(None, None, 3, [1, 2, 3, 4], lambda size: range(size)) == [0, 1, 2]


def test_what_was_asked_and_measured_is_said(tokenizer):
    budget = Budget(target_size=40_000, target_speedup=1.2, max_drop={"mean": "10%"})
    plan = pruner(tiny_llama(), tokenizer).plan(items(), n_layers=2)
    goals = [
        {"goal": "target_size", "asked": 4e7, "predicted": 3.9e7},
        {"goal": "target_speedup", "asked": 1.2, "predicted": 1.3},
        {"goal": "max_drop mean", "asked": "10%", "predicted": 0.04, "high": 0.2, "items": 9},
    ]
    plan.options.update(goals=goals, **budget.given)
    assert goals_text(plan).startswith("Asked for: at most 40.0 MB of weights: 39.0 MB of weights")
    rows = [
        Comparison("weights", "size", "MB", 50.0, 38.5, False),
        Comparison("decode, batch 1", "speed", "tokens/s", 10.0, 20.0, True),
        Comparison("decode, batch 8", "speed", "tokens/s", 10.0, 12.5, True),
    ]
    assert goals_text(plan, rows) == (
        "Asked for: at most 40.0 MB of weights: 38.5 MB of weights; at least 1.20 times the speed: "
        "1.25 times the speed, 1.30 predicted; mean worse by at most 10%: +4.0% (95 % interval "
        "up to +20.0%) on the 9 items that checked it."
    )
    rows.append(Comparison("task mean", "tasks", "", 0.8, 0.6, True, 9))
    assert "checked it, +25.0% on those reported, which is more than" in goals_text(plan, rows)
