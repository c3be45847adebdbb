"""Strategies that choose only what engines compute right."""

from __future__ import annotations

from itertools import combinations

import pytest
import zoo
from conftest import items, word_tokenizer

from llm_pruner.engines.serving import Serving
from llm_pruner.errors import InvalidPlanError, UnknownNameError
from llm_pruner.goals.budget import Budget, Removable
from llm_pruner.pruners.registry import BUILTIN, get_strategy

DEPTH = 12
KINDS = (["sliding_attention"] * 3 + ["full_attention"]) * 3
FIELDS = {"layer_types": KINDS, "sliding_window": 4}


@pytest.fixture(scope="module")
def model():
    """Every fourth layer looks at the whole text, as llama.cpp and MLX take for granted."""
    return zoo.build("cohere2", DEPTH, vocab_size=64, **FIELDS)


def allowed(size, candidates):
    serving = Serving.of_config(
        {"model_type": "cohere2", "num_hidden_layers": DEPTH, **FIELDS}, ["mlx"]
    )
    for removed in combinations(candidates, size):
        if not serving.problem([index for index in range(DEPTH) if index not in removed]):
            yield removed


@pytest.mark.parametrize("name", BUILTIN)
def test_every_strategy_chooses_such_a_set(model, name):
    pruner = get_strategy(name)(model, word_tokenizer(), serve_with=["llama.cpp", "vllm", "mlx"])
    plan = pruner.plan(items(8), n_layers=4)
    assert plan.remove in set(allowed(4, pruner.candidates))
    assert plan.engines == dict.fromkeys(("llama.cpp", "vllm", "mlx"), "right")
    assert plan.options["serve_with"] == ["llama.cpp", "vllm", "mlx"]


def test_the_search_finds_the_best_of_them(model):
    options = {"objective": "nll", "serve_with": ["llama.cpp"]}
    pruner = get_strategy("smart")(model, word_tokenizer(), **options)
    quality = pruner.quality(items(8))
    best = max(allowed(4, pruner.candidates), key=lambda one: (quality.change(one), one))
    plan = pruner.plan(items(8), n_layers=4)
    assert quality.change(plan.remove) == quality.change(best)
    assert [step["action"] for step in plan.steps[:2]] == ["start", "cut"]
    assert len(plan.steps[0]["removed"]) == len(plan.steps[1]["layers"]) == 4


def test_one_shot_strategies_take_the_set_with_the_smallest_sum(model):
    pruner = get_strategy("bi")(model, word_tokenizer(), serve_with=["llama.cpp"])
    scores = dict(enumerate([9.0, 9, 0, 5, 1, 1, 1, 9, 0, 0, 9, 9]))
    chosen = tuple(pruner.select_layers(scores, ratio=1 / 3))
    sums = {one: sum(map(scores.get, one)) for one in allowed(4, pruner.candidates)}
    assert sums[chosen] == min(sums.values())
    below = tuple(pruner.select_layers(scores, threshold=6.0))
    assert below in set(allowed(len(below), [i for i in pruner.candidates if scores[i] < 6]))
    assert pruner.select_layers(dict.fromkeys(range(DEPTH), 9.0), threshold=6.0) == []


def test_a_curve_has_the_depths_that_can_be(model):
    for name in ("smart", "bi"):
        pruner = get_strategy(name)(model, word_tokenizer(), serve_with=["llama.cpp"])
        curve = pruner.sweep(items(6), 8)
        assert [point["n_layers"] for point in curve.points] == [4, 8]


def test_impossible_numbers_are_refused_before_the_work_with_what_is_possible(model, monkeypatch):
    pruner = get_strategy("smart")(model, word_tokenizer(), serve_with=["llama.cpp"])
    monkeypatch.setattr(pruner, "quality", None)  # nothing is measured
    with pytest.raises(InvalidPlanError, match=r"n_layers=3 must be one of 4, 8: .* only if 4, 8"):
        pruner.plan(items(6), n_layers=3)
    with pytest.raises(InvalidPlanError, match=r"ratio=0\.25 means 3 layers"):
        pruner.plan(items(6), ratio=0.25)
    with pytest.raises(InvalidPlanError, match=r"Sets close to this one that would be"):
        pruner.prune_and_save([5], "nowhere", "model")
    with pytest.raises(UnknownNameError, match=r"Unknown engine 'ollama'.*llama\.cpp, mlx, vllm"):
        get_strategy("smart")(model, word_tokenizer(), serve_with=["ollama"])


def test_where_no_set_can_be_that_is_said():
    kinds = (["sliding_attention"] * 3 + ["full_attention"]) * 16
    config = {"model_type": "exaone4", "num_hidden_layers": 64, "layer_types": kinds}
    config |= {"sliding_window": 4}
    serving = Serving.of_config(config, ["llama.cpp"])
    removable = Removable.of(64, None, serving=serving)
    with pytest.raises(
        InvalidPlanError, match=r"would compute the rest wrong, .*follows from the n"
    ):
        Budget(n_layers=4).count(removable)


def test_without_engines_the_plan_says_where_the_result_is_wrong(model):
    plan = get_strategy("bi")(model, word_tokenizer()).manual_plan([5], "model")
    assert plan.engines["vllm"] == "right"
    assert plan.engines["llama.cpp"].startswith("metadata: sliding-window attention of its layers")
    assert plan.engines["mlx"].startswith("wrong: ")
