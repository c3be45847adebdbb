"""Measured removal: nothing is measured twice, a killed search goes on, limits hold."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import N_LAYERS, items, make_identity, tiny_llama

from llm_pruner import search
from llm_pruner.batching import fingerprint
from llm_pruner.errors import InvalidPlanError, NonFiniteError, OutputError, UnknownNameError
from llm_pruner.layers import LayerStack
from llm_pruner.search import RemovalQuality, greedy_removal, single_removals


@pytest.fixture
def stack(llama):
    return LayerStack(llama)


@pytest.fixture
def passes(stack, eval_data):
    """How often all of the data was run through the model; one batch holds it."""
    counted: list[int] = []

    def count(model, args, kwargs, output):
        if len(kwargs["input_ids"]) == len(eval_data):
            counted.append(1)

    handle = stack.model.register_forward_hook(count, with_kwargs=True)
    yield counted
    handle.remove()


def test_nothing_is_measured_twice(stack, tokenizer, eval_data, passes):
    quality = RemovalQuality(stack, tokenizer, eval_data)
    first = quality([3, 1])
    assert quality((1, 3)) == first
    assert quality(iter([3, 1])) == first
    quality.change([1, 3])
    quality.change([1, 3])
    quality.change([])
    assert quality.measured == len(passes) == 2, "without 1 and 3, and the full model"


def test_single_removals_cost_one_measurement_each(stack, tokenizer, eval_data, passes):
    quality = RemovalQuality(stack, tokenizer, eval_data)
    changes = single_removals(quality, [4, 2])
    assert list(changes) == [4, 2]
    assert changes[2] == quality.change([2])
    assert len(passes) == 3


def test_change_is_relative_and_worse_is_negative(stack, tokenizer, eval_data):
    quality = RemovalQuality(stack, tokenizer, eval_data)
    assert 0 < quality(()) < 1, "a likelihood per token"
    assert quality.change(()) == 0
    quality._known = {(): -2.0, (1,): -2.5, (2,): -1.0}
    assert quality.change([1]) == pytest.approx(-0.25)
    assert quality.change([2]) == pytest.approx(0.5)
    quality._known = {(): 0.5, (1,): 0.4}
    assert quality.change([1]) == pytest.approx(-0.2)


def test_no_change_is_relative_to_0(stack, tokenizer, eval_data):
    quality = RemovalQuality(stack, tokenizer, eval_data)
    quality._known = {(): 0.0, (1,): 0.4}
    with pytest.raises(NonFiniteError, match=r"quality is 0: no relative change"):
        quality.change([1])


@pytest.mark.parametrize("removed", [[8], [2, 2], range(8)], ids=str)
def test_impossible_removals_are_refused(stack, tokenizer, eval_data, removed):
    with pytest.raises(InvalidPlanError, match=r"Layer|layers"):
        RemovalQuality(stack, tokenizer, eval_data)(removed)


def test_an_unknown_objective_is_refused(stack, tokenizer, eval_data):
    with pytest.raises(UnknownNameError, match=r"objective 'nl'.*'nll'.*Known: nll, similarity"):
        RemovalQuality(stack, tokenizer, eval_data, objective="nl")


def test_a_quality_that_is_not_finite_names_the_layers(stack, tokenizer, eval_data, monkeypatch):
    quality = RemovalQuality(stack, tokenizer, eval_data)
    monkeypatch.setattr(type(quality._measure), "__call__", lambda self, model: math.inf)
    with pytest.raises(NonFiniteError, match=r"without layers \[2, 5\] has quality inf"):
        quality([5, 2])


# --- the journal ------------------------------------------------------------------------------


def scored(stack, tokenizer, data, journal, **options) -> RemovalQuality:
    quality = RemovalQuality(stack, tokenizer, data, journal=journal, **options)
    quality.scores = single_removals(quality, range(4))
    return quality


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "journal.jsonl"


def test_every_measurement_is_written_when_it_is_made(stack, tokenizer, eval_data, journal):
    quality = RemovalQuality(stack, tokenizer, eval_data, journal=journal)
    for count, removed in enumerate(([], [3], [5, 2]), 1):
        value = quality(removed)
        lines = journal.read_text().splitlines()
        assert len(lines) == count
        entry = json.loads(lines[-1])
        assert (entry["removed"], entry["quality"]) == (sorted(removed), value)
    quality([2, 5])
    assert len(journal.read_text().splitlines()) == 3


def test_a_second_run_measures_nothing(stack, tokenizer, eval_data, journal, passes):
    first = scored(stack, tokenizer, eval_data, journal)
    assert len(passes) == first.measured == 5
    again = scored(LayerStack(tiny_llama()), tokenizer, items(), str(journal), batch_size=2)
    assert len(passes) == 5
    assert again.measured == 0
    assert again.scores == first.scores
    assert len(journal.read_text().splitlines()) == 5


def test_a_killed_run_goes_on_where_it_was(stack, tokenizer, eval_data, journal, passes):
    want = scored(stack, tokenizer, eval_data, journal).scores
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]))
    passes.clear()
    assert scored(stack, tokenizer, eval_data, journal).scores == want
    assert len(passes) == 2
    assert journal.read_text() == "".join(lines)


def other_model(stack, data):
    model = copy.deepcopy(stack.model)
    make_identity(model, 3)
    return LayerStack(model), data, {}


def other_data(stack, data):
    return stack, data[:-1], {}


def other_reference(stack, data):
    return stack, [{**data[0], "reference": "warm tree"}, *data[1:]], {}


def other_objective(stack, data):
    return stack, data, {"objective": "similarity"}


@pytest.mark.parametrize("change", [other_model, other_data, other_reference, other_objective])
def test_measurements_of_something_else_are_not_taken(
    stack, tokenizer, eval_data, journal, change, monkeypatch
):
    monkeypatch.setattr(search.ModelEvaluator, "evaluate", lambda self, data: 0.5)
    mine = scored(stack, tokenizer, eval_data, journal)
    changed_stack, data, options = change(stack, eval_data)
    other = scored(changed_stack, tokenizer, data, journal, **options)
    assert other.measured == 5
    assert other.scores != mine.scores
    both = scored(stack, tokenizer, eval_data, journal)
    assert both.measured == 0
    assert both.scores == mine.scores
    fresh = scored(changed_stack, tokenizer, data, None, **options)
    assert other.scores == fresh.scores


def test_measurements_of_another_tokenizer_are_not_taken(stack, tokenizer, eval_data, journal):
    """With another chat template the model is shown other tokens."""
    scored(stack, tokenizer, eval_data, journal)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages[0]['content'] }} old tree"
    assert scored(stack, other, eval_data, journal).measured == 5


BROKEN = '{"key": "a", "remov'


@pytest.mark.parametrize("tail", [BROKEN, "7\n", "[1]\n", '{"key": 1}\n', "\n", "null\n"])
def test_a_broken_line_is_passed_over(stack, tokenizer, eval_data, journal, tail, caplog):
    want = scored(stack, tokenizer, eval_data, journal).scores
    with journal.open("a") as file:
        file.write(tail)
    again = scored(stack, tokenizer, eval_data, journal)
    assert again.measured == 0
    assert again.scores == want
    assert "journal.jsonl:6 is not a measurement" in caplog.text or tail == '{"key": 1}\n'


def test_a_truncated_last_line_is_measured_again(stack, tokenizer, eval_data, journal):
    want = scored(stack, tokenizer, eval_data, journal).scores
    journal.write_text(journal.read_text()[:-9])
    again = scored(stack, tokenizer, eval_data, journal)
    assert again.measured == 1
    assert again.scores == want


def test_what_is_measured_after_a_truncated_line_is_kept(stack, tokenizer, eval_data, journal):
    scored(stack, tokenizer, eval_data, journal)
    journal.write_text(journal.read_text()[:-9])
    assert scored(stack, tokenizer, eval_data, journal).measured == 1
    assert scored(stack, tokenizer, eval_data, journal).measured == 0


def test_a_journal_that_cannot_be_written_is_named(stack, tokenizer, eval_data, tmp_path):
    path = tmp_path / "missing" / "journal.jsonl"
    quality = RemovalQuality(stack, tokenizer, eval_data, journal=path)
    with pytest.raises(OutputError, match=r"Cannot write the journal '.*missing.*journal\.jsonl'"):
        quality([1])


def test_a_journal_that_cannot_be_read_is_named(stack, tokenizer, eval_data, tmp_path):
    with pytest.raises(OutputError, match="journal"):
        RemovalQuality(stack, tokenizer, eval_data, journal=tmp_path)


def test_without_a_journal_nothing_is_written(stack, tokenizer, eval_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RemovalQuality(stack, tokenizer, eval_data)([1])
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_sees_every_change_of_the_data(eval_data):
    prints = {
        fingerprint(data)
        for data in (
            eval_data,
            eval_data[::-1],
            eval_data[:-1],
            [{**item, "task": "x"} for item in eval_data],
            ["text"],
            [],
        )
    }
    assert len(prints) == 6
    assert fingerprint(eval_data) == fingerprint([dict(reversed(i.items())) for i in eval_data])


# --- the similarity objective -----------------------------------------------------------------


def test_similarity_is_measured_on_a_model_that_lacks_the_layers(
    stack, tokenizer, eval_data, monkeypatch
):
    """Generation addresses the cache by layer number: a bypassed model will not do."""
    seen = []

    def evaluate(self, data):
        layers = LayerStack(self.model)
        slots = [layer.self_attn.layer_idx for layer in layers]
        assert slots == list(range(len(layers)))
        assert self.model.config.num_hidden_layers == len(layers)
        assert self.batch_size == 3
        assert data is eval_data
        ids = torch.tensor([[5, 6, 7]])
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": ids * 0 + 1}
        cached, plain = (
            self.model.generate(ids, use_cache=use, **options) for use in (True, False)
        )
        assert torch.equal(cached, plain)
        seen.append((self.model, list(layers)))
        return 0.9 - 0.1 * (N_LAYERS - len(layers))

    monkeypatch.setattr(search.ModelEvaluator, "evaluate", evaluate)
    layers = list(stack)
    quality = RemovalQuality(stack, tokenizer, eval_data, objective="similarity", batch_size=3)
    assert "similarity" in quality.unit
    assert quality.change([2, 5]) == pytest.approx(-0.2 / 0.9)
    (full, _), (pruned, kept) = seen
    assert full is stack.model
    assert pruned is not stack.model
    assert len(kept) == N_LAYERS - 2
    shared = {id(parameter) for parameter in stack.model.parameters()}
    assert all(id(parameter) in shared for parameter in pruned.parameters())
    assert list(stack) == layers


# --- greedy search on made-up costs -----------------------------------------------------------


class Costs:
    """A quality whose change is the sum of the layers' costs, but for pairs that interact."""

    def __init__(self, costs, pairs=None):
        self.stack, self.costs, self.pairs = range(len(costs)), costs, pairs or {}
        self.asked: list[tuple[int, ...]] = []

    def change(self, removed):
        removed = tuple(sorted(removed))
        self.asked.append(removed)
        extra = sum(v for pair, v in self.pairs.items() if set(pair) <= set(removed))
        return -sum(self.costs[index] for index in removed) - extra


COSTS = [0.10, 0.02, 0.01, 0.04, 0.02, 0.50]


def test_greedy_sees_that_two_layers_need_each_other():
    """2 and 4 are cheap alone and dear together: the one-shot choice would take both."""
    removed, steps = greedy_removal(
        Costs(COSTS, {(2, 4): 1.0}), range(6), tolerance=None, n_layers=2
    )
    assert removed == [1, 2]
    assert [step["layer"] for step in steps] == [2, 1]
    assert steps[1]["tried"]["4"] == pytest.approx(-1.03)
    assert steps[1]["change"] == pytest.approx(-0.03)


def test_of_equals_the_deeper_goes_first():
    removed, _ = greedy_removal(Costs([0.1] * 5), range(5), tolerance=None, n_layers=2)
    assert removed == [3, 4]


@pytest.mark.parametrize(
    ("tolerance", "want", "kept"),
    [
        (0.0, [], [False]),
        (0.005, [], [False]),
        (0.01, [2], [True, False]),
        (0.029, [2], [True, False]),
        (0.035, [2, 4], [True, True, False]),
        (0.06, [1, 2, 4], [True, True, True, False]),
        (9.0, [0, 1, 2, 3, 4], [True] * 5),
    ],
)
def test_greedy_stops_at_the_tolerance(tolerance, want, kept):
    """The limit is on the total: 0.01, 0.03, 0.05, 0.09, ... and the cut beyond is undone."""
    told = []
    quality = Costs(COSTS)
    removed, steps = greedy_removal(quality, range(6), tolerance=tolerance, on_step=told.append)
    assert removed == want
    assert [step["kept"] for step in steps] == kept
    assert told == steps
    assert json.loads(json.dumps(steps)) == steps


def test_at_least_one_layer_stays():
    removed, _ = greedy_removal(Costs(COSTS), range(6), tolerance=None)
    assert removed == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_greedy_takes_exactly_so_many_candidates(n_layers):
    quality = Costs(COSTS)
    removed, steps = greedy_removal(quality, [0, 3, 5], tolerance=None, n_layers=n_layers)
    assert removed == [0, 3, 5][:n_layers] if n_layers != 1 else removed == [3]
    assert len(steps) == n_layers
    assert len(quality.asked) == sum(range(4 - n_layers, 4))
    assert all(set(mask) <= {0, 3, 5} and len(set(mask)) == len(mask) for mask in quality.asked)


def test_a_number_and_a_tolerance_hold_together():
    removed, _ = greedy_removal(Costs(COSTS), range(6), tolerance=0.06, n_layers=2)
    assert removed == [2, 4]
    removed, steps = greedy_removal(Costs(COSTS), range(6), tolerance=0.02, n_layers=2)
    assert removed == [2]
    assert steps[-1]["kept"] is False


@pytest.mark.parametrize("n_layers", [0, -1, 4])
def test_impossible_numbers_are_refused(n_layers):
    with pytest.raises(InvalidPlanError, match=f"n_layers={n_layers} must be from 1 to 3"):
        greedy_removal(Costs(COSTS), [1, 2, 3], tolerance=None, n_layers=n_layers)


def test_no_candidates_no_steps():
    assert greedy_removal(Costs(COSTS), [], tolerance=0.1) == ([], [])
