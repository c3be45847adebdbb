"""How much to remove: checked for any model, then counted on one."""

from __future__ import annotations

import math

import pytest

from llm_pruner.errors import InvalidPlanError
from llm_pruner.goals.budget import Budget, Removable


@pytest.mark.parametrize(
    ("depth", "protect", "want"),
    [
        (32, None, (2, 2)),
        (8, None, (2, 2)),
        (7, None, (1, 1)),
        (3, None, (0, 0)),
        (5, (2, 2), (2, 2)),
    ],
)
def test_the_default_protection_follows_the_depth(depth, protect, want):
    removable = Removable.of(depth, protect)
    assert removable.protect == want
    assert list(removable.candidates) == list(range(want[0], depth - want[1]))


def test_at_least_one_layer_stays():
    assert Removable.of(4, (0, 0)).most == 3
    assert Removable.of(4, (1, 1)).most == 2


@pytest.mark.parametrize(
    ("budget", "want"),
    [
        (Budget(), None),
        (Budget(threshold=-0.02), None),
        (Budget(tolerance=0.1), None),
        (Budget(ratio=0.25), 3),
        (Budget(ratio=0.3), 3),
        (Budget(n_layers=5), 5),
    ],
)
def test_counts_on_a_model_of_twelve_layers(budget, want):
    assert budget.count(Removable.of(12)) == want


@pytest.mark.parametrize("depth", [7, 10, 29, 49])
def test_every_share_of_a_depth_is_its_number_of_layers(depth):
    """Rounding never loses a layer: 0.7 * 10 is 7 although 0.7 is not a binary fraction."""
    removable = Removable.of(depth, (0, 0))
    for count in range(1, depth):
        assert Budget(ratio=count / depth).count(removable) == count


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({"ratio": 0.2, "n_layers": 2}, "ratio and n_layers exclude each other"),
        ({"ratio": 0}, "ratio=0 must lie between 0 and 1"),
        ({"ratio": math.nan}, "ratio=nan must lie"),
        ({"n_layers": 0}, "n_layers=0 must be a whole number from 1"),
        ({"n_layers": True}, "n_layers=True must be"),
        ({"threshold": math.inf}, "threshold=inf must be a number"),
        ({"tolerance": -0.1}, "tolerance=-0.1 must be a number from 0"),
    ],
)
def test_impossible_amounts_are_refused_without_a_model(amounts, message):
    with pytest.raises(InvalidPlanError, match=message):
        Budget(**amounts)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(ratio=0.05), r"ratio=0.05 means 0 layers: the model has 12 layers"),
        (Budget(ratio=0.9), r"means 10 layers: .* first 2 and the last 2 .* so 1 to 8 can go"),
        (Budget(n_layers=9), "n_layers=9 must be from 1 to 8: the model has 12 layers"),
    ],
)
def test_what_does_not_fit_a_model_is_refused(budget, message):
    with pytest.raises(InvalidPlanError, match=message):
        budget.count(Removable.of(12))


def test_a_budget_is_given_once(llama, tokenizer, eval_data):
    from llm_pruner import PruneMePruner

    pruner = PruneMePruner(llama, tokenizer)
    plan = pruner.plan(eval_data, budget=Budget(n_layers=2))
    assert plan.options["n_layers"] == 2
    assert plan == pruner.plan(eval_data, n_layers=2)
    with pytest.raises(InvalidPlanError, match="budget and ratio exclude each other"):
        pruner.plan(eval_data, budget=Budget(n_layers=2), ratio=0.25)
