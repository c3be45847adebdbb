"""Comparison of cuts on subsets of the samples, intervals, and the journal, by plain arithmetic."""

from __future__ import annotations

import json
import math
import random
import resource
import statistics
import subprocess
import sys

import pytest
from conftest import WORDS, items, tiny_llama
from test_objectives import choice_items

from llm_pruner import PruningPlan, get_strategy
from llm_pruner.data.items import Text, kind_of, of_kind
from llm_pruner.errors import OutputError
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.report.console import curve_text
from llm_pruner.report.summary import held_out_text
from llm_pruner.search import measures
from llm_pruner.search.journal import Journal
from llm_pruner.search.mixture import kinds_apart, warn_of_kinds
from llm_pruner.search.removal_quality import RemovalQuality
from llm_pruner.visualization.quality import plot_depth_curve

LAYER_SETS = [(2, 5), (1, 3, 4)]


@pytest.fixture(scope="module")
def llama_stack():
    return LayerStack(tiny_llama())


@pytest.fixture(scope="module")
def right(tokenizer):
    """A quality of 48 items, and for each layer_set which items are right, asked one by one."""
    stack, data = LayerStack(tiny_llama()), choice_items(48)
    quality = RemovalQuality(stack, tokenizer, data, objective="accuracy", batch_size=4)
    alone = [RemovalQuality(stack, tokenizer, [item], objective="accuracy") for item in data]
    return quality, {
        layer_set: [one(layer_set) for one in alone] for layer_set in [(), *LAYER_SETS]
    }


def test_the_error_of_a_comparison_is_that_of_a_paired_difference(right, tokenizer, tmp_path):
    """Of a mean without replacement; on all items there is none."""
    path, data = tmp_path / "journal.jsonl", choice_items(48)
    options = {"objective": "accuracy", "batch_size": 4, "journal": path}
    quality = RemovalQuality(right[0].stack, tokenizer, data, **options)
    quality.measure(LAYER_SETS)
    lines = map(json.loads, path.read_text().splitlines())
    found = {(tuple(one["removed"]), one["chunk"]): one["values"][0] for one in lines}
    full = statistics.fmean(right[1][()])
    for subset in quality.subsets(1):
        left, other = ([v for n in subset for v in found[one, n]] for one in LAYER_SETS)
        pairs = [(a - b) / full for a, b in zip(left, other, strict=True)]
        rest = 1 - len(pairs) / 48
        gap, error = quality.gap(*LAYER_SETS, subset)
        assert gap == pytest.approx(statistics.fmean(pairs))
        assert error == pytest.approx(math.sqrt(statistics.variance(pairs) / len(pairs) * rest))
    assert (sum(left), sum(other)) == tuple(sum(right[1][one]) for one in LAYER_SETS)
    assert len(pairs) == 48
    assert error == 0


def test_the_runner_up_is_the_best_known_of_as_many_layers(right, tokenizer):
    data = choice_items(48)
    quality = RemovalQuality(right[0].stack, tokenizer, data, objective="accuracy", batch_size=4)
    assert quality.rival((2, 5)) is None
    quality.measure([(2, 5), (3,), (1, 4), (4, 6)])
    quality.measure([(1, 6)], quality.subsets()[0])
    others = {layers: quality.change(layers) for layers in ((1, 4), (4, 6))}
    best, gap, half = quality.rival((2, 5))
    assert others[best] == max(others.values())
    alone = [RemovalQuality(right[0].stack, tokenizer, [one], objective="accuracy") for one in data]
    full = statistics.fmean(right[1][()])
    pairs = [(one((2, 5)) - one(best)) / full for one in alone]
    assert gap == pytest.approx(statistics.fmean(pairs))
    assert half == pytest.approx(1.96 * math.sqrt(statistics.variance(pairs) / 48))


def test_every_turn_looks_at_other_samples_first(right):
    quality, _ = right
    firsts = [quality.subsets(turn)[0] for turn in range(3)]
    assert sorted(sum(firsts, ())) == sorted(quality.subsets()[-1])
    assert quality.subsets(3) == quality.subsets(0)


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_the_interval_is_that_of_items_drawn_again(right, level):
    quality, found = right
    draw, full = random.Random(0), statistics.fmean(found[()])
    pairs = list(zip(found[(2, 5)], found[()], strict=True))
    changes = sorted(
        statistics.fmean(a - b for a, b in draw.choices(pairs, k=48)) / full for _ in range(4000)
    )
    want = [changes[int(4000 * tail)] for tail in ((1 - level) / 2, (1 + level) / 2)]
    assert want[0] < want[1]
    assert quality.interval((2, 5), level, draws=4000) == pytest.approx(want, abs=0.05)


def test_a_line_cut_short_costs_that_line_alone(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("a", (1,), 0, [[0.1, 0.2]])
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + whole[:-9])
    journal.append("a", (2,), 1, [[1 / 3]])
    journal.append("b", (2,), 2, [[0.5]])
    assert journal.read("a") == [((1,), 0, [[0.1, 0.2]]), ((2,), 1, [[1 / 3]])]
    assert Journal(tmp_path / "none").read("a") == []
    with pytest.raises(OutputError, match="no journal of llm_pruner: move it"):
        Journal(tmp_path).read("a")


def test_a_line_that_finds_no_room_is_an_error_and_costs_that_line_alone(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("a", (1,), 0, [[0.5]])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 20, hard))
    try:
        with pytest.raises(OutputError, match=r"Cannot write the journal .*No space left"):
            journal.append("a", (2,), 0, [[0.5]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.append("a", (3,), 0, [[0.5]])
    assert journal.read("a") == [((1,), 0, [[0.5]]), ((3,), 0, [[0.5]])]


APPEND = """
import os, sys
from llm_pruner.report.console import curve_text
from llm_pruner.report.summary import held_out_text
from llm_pruner.search import measures
from llm_pruner.search.journal import Journal
from llm_pruner.search.mixture import kinds_apart, warn_of_kinds
for key in "abc":
    if os.fork() == 0:
        for number in range(200):
            values = [[1 / 3] * (number % 30 * 40)]
            Journal(sys.argv[1]).append(key, (number,), 0, values)
        os._exit(0)
sys.exit(any(os.wait()[1] for _ in "abc"))
"""


def test_several_processes_write_to_one_journal(tmp_path, caplog):
    journal = Journal(tmp_path / "journal.jsonl")
    subprocess.run([sys.executable, "-c", APPEND, journal.path], check=True, timeout=60)
    want = [((number,), 0, [[1 / 3] * (number % 30 * 40)]) for number in range(200)]
    assert [journal.read(key) for key in "abc"] == [want] * 3
    assert not caplog.text
    lines = filter(None, journal.path.read_text().splitlines())
    order = [json.loads(line)["key"] for line in lines]
    assert order != sorted(order), "they wrote at the same time"


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 3}, {"seed": 1}, {"objective": "kl"}, {"eval_data": items(5)}],
    ids=str,
)
def test_a_journal_is_used_for_the_same_question_alone(tokenizer, tmp_path, options):
    path, stack = tmp_path / "journal.jsonl", LayerStack(tiny_llama())
    given = {"eval_data": items(), "journal": path, "batch_size": 4}
    first = RemovalQuality(stack, tokenizer, **given)
    want = first.change((2, 5))
    again = RemovalQuality(stack, tokenizer, **given)
    assert (again.change((2, 5)), again.measured) == (want, 0)
    other = RemovalQuality(stack, tokenizer, **{**given, **options})
    fresh = RemovalQuality(stack, tokenizer, **{**given, **options, "journal": None})
    assert other.change((2, 5)) == fresh.change((2, 5))
    assert other.measured == fresh.measured > 0
    assert all(json.loads(line)["values"] for line in path.read_text().splitlines())


def test_a_damaged_reading_is_measured_again(tokenizer, tmp_path):
    """Another shape, another chunk, no number: none of it reaches a score."""
    path, stack = tmp_path / "journal.jsonl", LayerStack(tiny_llama())

    def measured():
        quality = RemovalQuality(stack, tokenizer, items(20), journal=path)
        return quality.change((3,)), quality.measured

    want, count = measured()
    assert measured() == (want, 0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["values"] = [[1.0]]
    lines[1]["chunk"] = 99
    lines[2]["values"][0][0] = math.nan
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured() == (want, 3)
    assert count == len(lines)


def test_sets_that_agree_on_few_samples_are_not_told_apart(tokenizer):
    """A measure that counts: the error is at least what one item makes."""
    stack, data = LayerStack(tiny_llama()), choice_items(48)
    quality = RemovalQuality(stack, tokenizer, data, objective="accuracy", batch_size=4)
    subset = quality.subsets()[0]
    gap, error = quality.gap((3,), (3,), subset)
    count, full = quality.size(subset), quality(())
    assert gap == 0
    assert error == pytest.approx(math.sqrt(count / (count - 1) * (1 - count / 48)) / count / full)
    assert quality.gap((3,), (3,), quality.subsets()[-1]) == (0, 0)


def test_a_measure_that_needs_the_pruned_model_asks_the_architecture_first(tokenizer, monkeypatch):
    stack = LayerStack(tiny_llama())
    assert RemovalQuality(stack, tokenizer, items(4)).can_bypass
    assert not RemovalQuality(stack, tokenizer, items(4), objective="similarity").can_bypass


# --- kinds of data -----------------------------------------------------------------------------


def of_two_kinds():
    texts = [of_kind(f"w{n} w{n + 1} w{n + 2} w{n + 3}", "letters") for n in range(24)]
    return [*texts, *({**item, "kind": "questions"} for item in items(8))]


@pytest.mark.parametrize("over_kinds", ["mean", "worst"])
@pytest.mark.parametrize("objective", ["nll", "nll=0.5,kl=0.5", "agreement"])
def test_every_kind_counts_the_same_however_much_of_it_there_is(
    llama_stack, tokenizer, objective, over_kinds
):
    data = of_two_kinds()
    whole = RemovalQuality(llama_stack, tokenizer, data, objective=objective, over_kinds=over_kinds)
    parts = {
        kind: RemovalQuality(
            llama_stack,
            tokenizer,
            [one for one in data if kind_of(one) == kind],
            objective=objective,
        )
        for kind in ("letters", "questions")
    }
    for removed in [(2,), (1, 4), (3, 5, 6)]:
        changes = {kind: part.change(removed) for kind, part in parts.items()}
        wanted = min(changes.values()) if over_kinds == "worst" else sum(changes.values()) / 2
        assert whole.change(removed) == pytest.approx(wanted, rel=1e-4)
        found = whole.by_kind(removed)
        assert {kind: one["change"] for kind, one in found.items()} == pytest.approx(
            changes, rel=1e-4
        )
        assert all(one["low"] <= one["high"] for one in found.values())
        low, high = whole.interval(removed)
        assert low - 1e-6 <= wanted <= high + 1e-6
        cost = whole.cost(removed)
        assert cost["kinds"] == found
        assert cost["low"] == low


def test_one_kind_is_none(llama_stack, tokenizer):
    texts = [f"w{n} w{n + 1} w{n + 2}" for n in range(6)]
    plain = RemovalQuality(llama_stack, tokenizer, texts)
    named = RemovalQuality(llama_stack, tokenizer, [of_kind(text, "a") for text in texts])
    assert named.change((2,)) == plain.change((2,))
    assert named.by_kind((2,)) == {}
    assert "kinds" not in named.cost((2,))
    assert named((2,)) == plain((2,))


def test_every_subset_has_all_kinds(llama_stack, tokenizer):
    data = [of_kind(f"w{n} w{n + 1} w{n + 2}", "ab"[n % 3 == 0]) for n in range(60)]
    quality = RemovalQuality(llama_stack, tokenizer, data)
    for subset in quality.subsets():
        weights = quality._mixture.weights_on(quality._columns(subset)).sum(1)
        assert weights.min() > 0.2 * weights.max()


def test_a_kind_of_which_a_measure_says_nothing_does_not_count(llama_stack, tokenizer):
    choices = [{**item, "kind": "asked"} for item in choice_items(12)]
    texts = [of_kind(f"w{n} w{n + 1} w{n + 2}", "told") for n in range(6)]
    both = RemovalQuality(llama_stack, tokenizer, [*choices, *texts], objective="accuracy")
    alone = RemovalQuality(llama_stack, tokenizer, choices, objective="accuracy")
    assert both.change((3,)) == pytest.approx(alone.change((3,)))


def test_kinds_that_a_choice_costs_more_are_named(caplog):
    near = {"a": {"change": -0.1, "low": -0.2, "high": -0.05}}
    warn_of_kinds({})
    warn_of_kinds({**near, "b": {"change": -0.15, "low": -0.2, "high": -0.1}})
    assert not caplog.records
    warn_of_kinds({**near, "b": {"change": -0.4, "low": -0.5, "high": -0.3}})
    assert "costs b clearly more (-40.0 %) than a (-10.0 %)" in caplog.text


def test_the_size_of_blocks_changes_no_result_and_shares_no_journal(
    tokenizer, tmp_path, monkeypatch
):
    """An accelerator has larger ones; what was measured on one layout is not read on another."""
    path, data = tmp_path / "journal.jsonl", items(60)
    found = []
    for tokens in (20, 60):
        monkeypatch.setattr(measures, "CPU_TOKENS", tokens)
        quality = RemovalQuality(LayerStack(tiny_llama()), tokenizer, data, journal=path)
        quality.measure(LAYER_SETS)
        assert quality.measured > 0, "nothing was read"
        found.append((len(quality.subsets()), [quality.change(one) for one in LAYER_SETS]))
    assert found[0][0] > found[1][0]
    assert found[0][1] == pytest.approx(found[1][1])


def test_a_single_item_has_no_interval(llama, tokenizer, tmp_path):
    held_out = items()[:1]
    plan = get_strategy("bi")(llama, tokenizer).plan(items(), n_layers=1, held_out=held_out)
    assert plan.held_out["low"] is None
    assert plan.held_out["high"] is None
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert "one item: no interval" in held_out_text(plan.held_out)
    assert held_out_text(plan.held_out).endswith("1 held-out item")
    curve = get_strategy("bi")(llama, tokenizer).sweep(items(), 2, held_out=held_out)
    assert "one item: no interval" in curve_text(curve)
    plot_depth_curve(curve, save_path=tmp_path / "curve.png")


def test_a_kind_of_one_item_has_no_interval_and_no_say(llama_stack, tokenizer):
    texts = [Text(one, "many") for one in (" ".join(WORDS[n:]) for n in range(6))]
    texts.append(Text(" ".join(WORDS[::-1]), "one"))
    kinds = RemovalQuality(llama_stack, tokenizer, texts).by_kind((1,))
    assert None not in kinds["many"].values()
    assert kinds["one"]["low"] is None
    assert kinds_apart(kinds) is None
    apart = {"change": -0.9, "low": -0.95, "high": -0.8}
    better = {"change": 0.0, "low": -0.1, "high": 0.1}
    assert kinds_apart({"worse": apart, "better": better}) == ("worse", "better")
    assert kinds_apart({"worse": apart, "better": better, "one": kinds["one"]}) is not None
