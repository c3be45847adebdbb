"""Cutting and healing in turns, and what of it reaches plans and checkpoints."""

from __future__ import annotations

import pytest
import torch
from conftest import items

from llm_pruner.errors import InvalidDataError, InvalidPlanError, UnsupportedModelError
from llm_pruner.healing import heal
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.pruners import healing_search, remover
from llm_pruner.pruners.healing_search import Repairs, search_in_rounds
from llm_pruner.pruners.measured import SmartPruner
from llm_pruner.search import layer_search
from llm_pruner.search.removal_quality import RemovalQuality
from llm_pruner.workflow import carry_out

SCORING = items(30)
HEALING = [{**item, "prompt": f"saw {item['prompt']}"} for item in items(60)]


def pruner_with(model, tokenizer, repairs=None, **options):
    return SmartPruner(model, tokenizer, protect=(1, 1), repairs=repairs, **options)


def by_hand(llama, tokenizer, n_layers):
    """One layer a round, on models that are really cut and healed, all candidates measured."""
    stack, removed = LayerStack(llama), []
    pruner = pruner_with(llama, tokenizer)
    current, kept = llama, list(range(len(stack)))
    while len(removed) < n_layers:
        quality = RemovalQuality(LayerStack(current), tokenizer, SCORING)
        pool = [i for i, index in enumerate(kept) if 1 <= index < len(stack) - 1]
        best = max(pool, key=lambda i: (quality.change([i]), i))
        removed = sorted([*removed, kept[best]])
        current, _ = pruner.heal(removed, "linear", HEALING)
        kept = [index for index in range(len(stack)) if index not in removed]
    return removed, current


@pytest.mark.parametrize("n_layers", [2, 3])
def test_rounds_of_one_are_greedy_on_healed_models(llama, tokenizer, n_layers):
    """With few items every candidate is measured, and after a single cut no swap is possible."""
    want, _ = by_hand(llama, tokenizer, n_layers)
    pruner = pruner_with(llama, tokenizer, Repairs(HEALING))
    assert pruner.optimize_selection(None, SCORING, n_layers=n_layers) == want
    actions = [step["action"] for step in pruner.steps if step["action"] != "exchange"]
    assert actions == ["cut", "repair"] * n_layers
    assert pruner.steps[-1]["removed"] == want


def test_changes_are_those_of_the_healed_against_the_full_model(llama, tokenizer):
    pruner = pruner_with(llama, tokenizer, Repairs(HEALING, every=2))
    chosen = pruner.optimize_selection(None, SCORING, n_layers=2)
    healed, record = pruner.heal(chosen, "linear", HEALING)
    full = RemovalQuality(LayerStack(llama), tokenizer, SCORING)()
    want = RemovalQuality(LayerStack(healed), tokenizer, SCORING)() / full - 1
    healing = pruner.steps[-1]
    assert (healing["action"], healing["method"]) == ("repair", "linear")
    assert healing["change"] == pytest.approx(want)
    assert healing["loss"] == record["healed"]


def test_steps_name_layers_of_the_full_model(llama, tokenizer):
    pruner = pruner_with(llama, tokenizer, Repairs(HEALING))
    chosen = pruner.optimize_selection(None, SCORING, n_layers=3)
    cuts = [step for step in pruner.steps if step["action"] == "cut"]
    removed: set[int] = set()
    for step in cuts:
        left = {str(layer) for layer in range(1, 7) if layer not in removed}
        assert set(step["tried"]) == left
        assert str(step["layer"]) in left
        removed.add(step["layer"])
        assert set(step["removed"]) == removed
    assert removed == set(chosen)


def test_a_round_beyond_the_tolerance_is_rolled_back(llama, tokenizer, monkeypatch):
    """The tolerance limits the loss of the healed model, not of the cut one."""
    changes = iter([-0.01, -0.03, -0.06])
    monkeypatch.setattr(RemovalQuality, "change_from", lambda self, other: next(changes))
    pruner = pruner_with(llama, tokenizer, Repairs(HEALING))
    chosen = pruner.optimize_selection(None, SCORING, tolerance=0.05)
    assert len(chosen) == 2
    healings = [step for step in pruner.steps if step["action"] == "repair"]
    assert [step["kept"] for step in healings] == [True, True, False]
    assert pruner.steps[-1]["removed"] == chosen
    assert pruner.steps[-1]["change"] == -0.06


def test_the_last_healing_is_not_done_twice(llama, tokenizer, tmp_path, monkeypatch):
    made = []
    real = heal.heal_model
    counted = lambda *a, **k: (made.append(a[1]), real(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(remover, "heal_model", counted)
    pruner = pruner_with(llama, tokenizer, Repairs(HEALING))
    chosen = pruner.optimize_selection(None, SCORING, n_layers=2)
    assert len(made) == 2
    out = tmp_path / "out"
    pruned, _ = pruner.prune_and_save(chosen, out, "m", heal="linear", heal_data=HEALING)
    assert len(made) == 2
    healed, _ = pruner.heal(chosen, "linear", HEALING)
    assert len(made) == 2
    assert healed is not pruned
    for name, tensor in healed.state_dict().items():
        assert torch.equal(tensor, pruned.state_dict()[name])
    pruner.heal(chosen, "none", None)
    assert len(made) == 3


def test_a_plan_records_how_it_was_healed_between_cuts(llama, tokenizer):
    pruner = pruner_with(llama, tokenizer, Repairs(HEALING, every=2))
    plan = pruner.plan(SCORING, n_layers=2)
    assert plan.options["repairs"] == {"every": 2, "heal": "linear"}
    assert plan.steps[-1]["action"] == "repair"


@pytest.mark.parametrize("objective", ["kl", "agreement", "nll=1,kl=1"])
def test_measures_relative_to_the_uncut_model_are_refused(llama, tokenizer, objective):
    pruner = pruner_with(llama, tokenizer, Repairs(HEALING), objective=objective)
    with pytest.raises(InvalidPlanError, match="cannot judge healed models"):
        pruner.optimize_selection(None, SCORING, n_layers=2)


def test_impossible_requests_are_refused(llama, tokenizer):
    with pytest.raises(InvalidPlanError, match="every=0 must be a whole number from 1"):
        Repairs(HEALING, every=0)
    with pytest.raises(InvalidPlanError, match="heal='none' must be linear or lora"):
        Repairs(HEALING, heal="none")
    pruner = pruner_with(llama, tokenizer, Repairs(HEALING))
    with pytest.raises(InvalidPlanError, match="A sweep does not heal"):
        pruner.sweep(SCORING, 2)
    with pytest.raises(InvalidPlanError, match="n_layers=9"):
        search_in_rounds(
            pruner.layers, lambda s: pruner.quality_of(s, SCORING), None, range(1, 7), n_layers=9
        )


def test_the_items_that_layers_were_chosen_on_do_not_heal(llama, tokenizer, tmp_path):
    """Not one of them, however many others there are."""
    pruner = pruner_with(llama, tokenizer)
    plan = pruner.plan(SCORING, n_layers=1)
    out, mixed = tmp_path / "out", [*HEALING, SCORING[4]]
    words = {"heal": "linear", "heal_data": mixed, "plan": plan}
    with pytest.raises(InvalidDataError, match=r"1 of the 61 items .*is item 60.* chosen"):
        pruner.prune_and_save(plan.remove, out, "m", **words)
    assert not out.exists()
    pruner = pruner_with(llama, tokenizer, Repairs(mixed))
    with pytest.raises(InvalidDataError, match=r"items to heal with .* to choose layers on"):
        pruner.plan(SCORING, n_layers=1)


def test_items_serve_one_purpose_in_a_whole_job(llama, tokenizer, tmp_path):
    pruner = pruner_with(llama, tokenizer)
    plan = pruner.plan(SCORING, n_layers=1)
    with pytest.raises(InvalidDataError, match=r"items held out .* layers were chosen on"):
        carry_out(pruner, plan, tmp_path / "out", SCORING[:3])
    with pytest.raises(InvalidDataError, match=r"items held out .* to heal with"):
        carry_out(pruner, plan, tmp_path / "out", HEALING[:3], heal="linear", heal_data=HEALING)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_round_is_not_in_the_partial_plan(llama, tokenizer, monkeypatch):
    """Its cuts have not been judged on the healed model."""
    pruner, repair, made = pruner_with(llama, tokenizer, Repairs(HEALING)), SmartPruner.heal, []

    def interrupted(self, layers, *rest):
        made.append(list(layers))
        if len(made) == 2:
            raise KeyboardInterrupt
        return repair(self, layers, *rest)

    monkeypatch.setattr(SmartPruner, "heal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner.plan(SCORING, n_layers=3)
    assert list(pruner.partial_plan.remove) == made[0]


def test_healed_models_are_not_kept(llama, tokenizer):
    pruner = pruner_with(llama, tokenizer, Repairs(HEALING))
    pruner.optimize_selection(None, SCORING, n_layers=3)
    assert len(pruner._qualities) == 1


def test_a_tolerance_ends_where_no_further_layer_can_go(llama, tokenizer, monkeypatch):
    real = layer_search.search_layers

    def refused(quality, pool, **options):
        if len(quality.stack) < 7:
            raise UnsupportedModelError("No further layer can be removed.")
        return real(quality, pool, **options)

    monkeypatch.setattr(healing_search, "search_layers", refused)
    pruner = pruner_with(llama, tokenizer, Repairs(HEALING))
    assert len(pruner.optimize_selection(None, SCORING, tolerance=99.0)) == 2
    with pytest.raises(UnsupportedModelError, match="No further layer"):
        pruner.optimize_selection(None, SCORING, n_layers=3)
