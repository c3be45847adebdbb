"""Objectives of the user's: functions that give every item a number."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from statistics import fmean

import own_objectives
import pytest
from conftest import items, tiny_llama

from llm_pruner import cli, get_strategy, register_objective
from llm_pruner.errors import (
    InvalidDataError,
    InvalidPlanError,
    LoadError,
    NonFiniteError,
    UnknownNameError,
)
from llm_pruner.evaluation.likelihood import mean_nll
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.search import objectives
from llm_pruner.search.objectives import OBJECTIVES, parse_objective
from llm_pruner.search.removal_quality import RemovalQuality

FILE = Path(own_objectives.__file__)
DATA = [*items(9), "the cat sat on a mat and saw one red bird", "in this old tree by our house"]


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(OBJECTIVES))
    for place in ("mixture", "removal_quality"):
        monkeypatch.setattr(f"llm_pruner.search.{place}.OBJECTIVES", objectives.OBJECTIVES)


def slow(model, tokenizer, removed=()):
    """The mean over items of the loss, from a model without layers."""
    pruned = LayerStack(model).remove(removed) if removed else model
    return fmean(mean_nll(pruned, tokenizer, [item]) for item in DATA)


@pytest.mark.parametrize("name", [f"{FILE}:likelihood", f"{FILE}:loss", f"{FILE}:loss-of-mine"])
def test_the_change_is_that_of_the_mean_over_items_whatever_the_direction(name, tokenizer):
    """A text of several windows is one item."""
    model = tiny_llama()
    quality = RemovalQuality(
        LayerStack(model), tokenizer, DATA, objective=name, batch_size=2, max_length=8
    )
    full = slow(model, tokenizer)
    for removed in ((3,), (2, 5), (1, 2, 6)):
        want = (full - slow(model, tokenizer, removed)) / full
        assert quality.change(removed) == pytest.approx(want, rel=1e-5)
        low, high = quality.interval(removed)
        assert low < want < high
    assert quality.items == len(DATA)
    assert quality.unit.startswith("relative change of ")


def test_a_search_finds_the_best_set_of_two(tokenizer):
    model = tiny_llama(6)
    pruner = get_strategy("smart")(
        model, tokenizer, objective=f"{FILE}:loss", protect=(0, 0), batch_size=4
    )
    plan = pruner.plan(DATA, n_layers=2)
    best = min(combinations(range(6), 2), key=lambda two: slow(model, tokenizer, two))
    assert plan.remove == best
    assert plan.options["objective"] == {f"{FILE}:loss": 1.0}


def test_what_the_journal_knows_is_not_asked_again(tokenizer, tmp_path):
    name, path = f"{FILE}:likelihood", tmp_path / "journal.jsonl"

    def measure():
        module_calls.clear()
        quality = RemovalQuality(
            LayerStack(tiny_llama()), tokenizer, DATA, objective=name, journal=path
        )
        return quality.change([3])

    parse_objective(name)
    module_calls = objectives.OBJECTIVES[name].measured_by.args[0].__globals__["CALLS"]
    first = measure()
    assert sum(module_calls) == 2 * len(DATA)
    assert measure() == first
    assert not module_calls


def test_a_file_that_has_changed_shares_no_journal(tokenizer, tmp_path):
    file, path = tmp_path / "mine.py", tmp_path / "journal.jsonl"
    changes = []
    for sign in ("1", "2"):
        file.write_text(f"def f(model, tokenizer, items):\n"
                        f"    return [1.0 - {sign} * (model.config.num_hidden_layers < 8) / 4"
                        f" for _ in items]\n")  # fmt: skip
        objectives.OBJECTIVES.pop(f"{file}:f", None)
        quality = RemovalQuality(
            LayerStack(tiny_llama()), tokenizer, DATA, objective=f"{file}:f", journal=path
        )
        changes.append(quality.change([3]))
    assert changes == [-0.25, -0.5]


def test_a_mixture_with_a_built_in_one(tokenizer):
    name = f"{FILE}:likelihood"
    assert parse_objective(f"nll=3,{name}=1") == {"nll": 0.75, name: 0.25}
    how = {"stack": LayerStack(tiny_llama()), "tokenizer": tokenizer, "eval_data": DATA}
    alone = [RemovalQuality(**how, objective=one).change([4]) for one in ("nll", name)]
    both = RemovalQuality(**how, objective=f"nll=3,{name}=1").change([4])
    assert both == pytest.approx(0.75 * alone[0] + 0.25 * alone[1])


def test_plug_ins_and_registered_functions_go_by_name(monkeypatch):
    class Entry:
        def load(self):
            return own_objectives.likelihood

    monkeypatch.setattr(objectives, "plugins", lambda group: {"from-afar": Entry()})
    monkeypatch.setattr("llm_pruner.plugins.plugins", lambda group: {"from-afar": Entry()})
    assert parse_objective("from-afar") == {"from-afar": 1.0}
    assert parse_objective("loss-of-mine") == {"loss-of-mine": 1.0}
    with pytest.raises(UnknownNameError, match="Did you mean 'from-afar'"):
        parse_objective("from-far")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("too_few", InvalidDataError, r"one number per item: it returned \[1.0\] for \d items"),
        ("no_list", InvalidDataError, r"one number per item: it returned 1.0 for \d items"),
        ("fails", InvalidDataError, "failed on .* items: KeyError: 'absent'"),
        ("not_a_number", NonFiniteError, "NaN or infinite"),
    ],
)
def test_what_a_function_does_wrong_is_said(name, error, message, tokenizer):
    quality = RemovalQuality(
        LayerStack(tiny_llama()), tokenizer, items(6), objective=f"{FILE}:{name}"
    )
    with pytest.raises(error, match=message):
        quality.change([3])


def test_names_that_cannot_be_used():
    with pytest.raises(UnknownNameError, match="likelihood, loss, loss-of-mine"):
        parse_objective(f"{FILE}:absent")
    with pytest.raises(LoadError, match=r"Objective file 'nowhere.py' does not exist"):
        parse_objective("nowhere.py:f")
    with pytest.raises(InvalidPlanError, match="'nll' is already taken"):
        register_objective("nll")(own_objectives.fails)
    with pytest.raises(InvalidPlanError, match="must have no comma"):
        register_objective("a,b")(own_objectives.fails)
    with pytest.raises(InvalidPlanError, match="better='more' must be"):
        register_objective("mine", better="more")(own_objectives.fails)
    register_objective("mine")(own_objectives.fails)
    with pytest.raises(InvalidPlanError, match="'mine' is already taken"):
        register_objective("mine")(lambda model, tokenizer, items: [])


def test_the_example_counts_answers_that_are_valid_json(tokenizer, monkeypatch):
    """With layer 3 every answer is right, without it every third one."""
    answers = ['{"a": 1}', "```json\n[1, 2]\n```", "[1, {}]"]
    worse = ["{a: 1}", "5", "[1, {}]"]

    def generate(self, prompts):
        good = self.model.config.num_hidden_layers == 8
        return [(answers if good else worse)[int(prompt[-1]) % 3] for prompt in prompts]

    monkeypatch.setattr("llm_pruner.ModelEvaluator.generate", generate)
    data = [{"prompt": f"the cat {n}", "reference": "sat"} for n in range(6)]
    example = FILE.parent.parent / "examples" / "valid_json.py"
    quality = RemovalQuality(
        LayerStack(tiny_llama()), tokenizer, data, objective=f"{example}:valid-json"
    )
    assert quality() == 1.0
    assert quality.change([3]) == pytest.approx(-2 / 3)
    assert quality.unit == "relative change of share of answers that are valid JSON"


def test_an_error_in_a_file_of_the_users_is_said_to_be_theirs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from llm_pruner import BasePruner\n\n\nclass Mine(BasePruner):\n"
        "    def description(self):\n        return 'x'\n\n"
        "    def compute_layer_scores(self, eval_data):\n        return 1 + 'x'\n"
    )
    words = ["--model", "demo", "--device", "cpu", "--n-samples", "4", "--n-layers", "1"]
    code = cli.main([*words, "--strategy", "mine.py:Mine", "--dry-run", "--quiet"])
    assert code == 1
    error = capsys.readouterr().err
    assert "Your own code failed, in mine.py, line 9: TypeError" in error.replace(
        f"{tmp_path}/", ""
    )
    assert cli.main([*words, "--strategy", "mine.py", "--dry-run"]) == 2
    assert "write mine.py:CLASS" in capsys.readouterr().err


def test_no_interval_goes_below_the_loss_of_everything(tokenizer):
    """Few, long or short items of very different losses."""
    data = ["the cat", "sat on a mat and saw one red bird in this old tree", "a mat", "old house"]
    quality = RemovalQuality(LayerStack(tiny_llama()), tokenizer, data)
    for removed in ((1, 2, 3, 4, 5, 6), (0,), (3,)):
        low, high = quality.interval(removed)
        assert -1 < low <= quality.change(removed) <= high
