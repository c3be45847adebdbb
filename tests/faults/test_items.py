"""Items that are none, at every door that takes items: the one error, before any work."""

from __future__ import annotations

import pytest
from conftest import items

from llm_pruner.data.hub_datasets import upload_dataset_to_hub
from llm_pruner.data.items import check_items, fingerprint, prompt_keys, refuse_overlap
from llm_pruner.data.sampling import split_items
from llm_pruner.errors import InvalidDataError
from llm_pruner.evaluation.likelihood import perplexity
from llm_pruner.evaluation.quality_comparison import compare_quality
from llm_pruner.evaluation.tasks import HolisticEvaluator, item_kinds
from llm_pruner.pruners.registry import BUILTIN, get_strategy
from llm_pruner.results import PruningPlan
from llm_pruner.workflow import carry_out

GOOD = items()
LOOP = {**GOOD[0]}
LOOP["self"] = LOOP
DEEP = []
for _ in range(9999):
    DEEP = [DEEP]


class Items(list):
    """A list by another name."""


NO_ITEMS = {
    "generator": lambda: (item for item in GOOD),
    "iterator": lambda: iter(GOOD),
    "none": lambda: None,
    "dict": lambda: GOOD[0],
    "bytes": lambda: b"the cat",
    "text": lambda: "the cat",
    "number": lambda: 5,
    "set": lambda: {"the cat"},
    "nan": lambda: [float("nan")],
    "a none": lambda: [*GOOD, None],
    "numbers": lambda: [1, 2],
    "nested": lambda: [GOOD],
    "nothing in it": lambda: [{}],
    "half a letter": lambda: [*GOOD, "the \ud800 cat"],
    "half a letter in a prompt": lambda: [*GOOD, {"prompt": "\ud800", "reference": "cat"}],
    "nan as reference": lambda: [*GOOD, {"prompt": "the", "reference": float("nan")}],
    "none as prompt": lambda: [{"prompt": None, "reference": "cat"}],
    "a number as field": lambda: [{**GOOD[0], 1: 2}],
    "a list as task": lambda: [{**GOOD[0], "task": ["a"]}],
    "half a letter in a task": lambda: [{**GOOD[0], "task": "\ud800"}],
    "aliases by number": lambda: [{**GOOD[0], "aliases": 5}],
    "a none in aliases": lambda: [{**GOOD[0], "aliases": ["a", None]}],
}


def doors(model, tokenizer, folder):
    pruner = get_strategy("bi")(model, tokenizer)
    evaluator = HolisticEvaluator(model, tokenizer)
    plan, out = PruningPlan("m", 8, (2,)), folder / "out"
    heal = {"heal": "linear"}
    return {
        "plan": lambda data: pruner.plan(data, n_layers=1),
        "plan, held out": lambda data: pruner.plan(GOOD, n_layers=1, held_out=data or ()),
        "sweep": lambda data: pruner.sweep(data, 1),
        "measure": lambda data: pruner.measure_choice([1], data),
        "heal": lambda data: pruner.prune_and_save([1], out, "m", heal_data=data, **heal),
        "carry out": lambda data: carry_out(pruner, plan, out, data),
        "carry out, heal": lambda data: carry_out(pruner, plan, out, GOOD, heal_data=data, **heal),
        "perplexity": lambda data: perplexity(model, tokenizer, data),
        "compare": lambda data: compare_quality(model, model, tokenizer, data),
        "evaluate": evaluator.evaluate,
        "evaluate items": evaluator.evaluate_items,
        "benchmark": evaluator.run_benchmark,
        "generate": evaluator.generate,
        "kinds": item_kinds,
        "split": split_items,
        "upload": lambda data: upload_dataset_to_hub(data, "me/items", "hf_x"),
        "keys": prompt_keys,
        "overlap": lambda data: refuse_overlap(data, [], "held out", "chosen on"),
        **{name: get_strategy(name)(model, tokenizer).compute_layer_scores for name in BUILTIN},
    }


@pytest.mark.parametrize("case", sorted(NO_ITEMS))
def test_every_door_refuses_what_is_no_items(llama, tokenizer, tmp_path, case):
    for name, door in doors(llama, tokenizer, tmp_path).items():
        data = NO_ITEMS[case]()
        with pytest.raises(InvalidDataError):  # and nothing else
            pytest.fail(f"{name} took {case}: {door(data)}")
    assert not list(tmp_path.iterdir())


def test_lists_of_any_class_are_items():
    for data in (GOOD, tuple(GOOD), Items(GOOD), ["the cat"]):
        assert check_items(data) is data
    odd = {**GOOD[0], "task": 5, "aliases": ("a", ""), "choices": None, "extra": {1: 2}}
    assert check_items([odd]) == [odd]


def test_what_cannot_be_written_is_not_fingerprinted_or_sent(llama, tokenizer):
    for item in (LOOP, {**GOOD[0], "x": DEEP}, {**GOOD[0], "x": 10**5000}):
        for door in (fingerprint, lambda data: get_strategy("bi")(llama, tokenizer).plan(data)):
            with pytest.raises(InvalidDataError, match=r"cannot be written as JSON: .+ Leave out"):
                door([item])
        with pytest.raises(InvalidDataError, match=r"data\[0\] cannot be written as JSON"):
            upload_dataset_to_hub([item], "me/items", "hf_x")
    with pytest.raises(InvalidDataError, match=r"data\[0\] cannot be written as JSON"):
        upload_dataset_to_hub([{**GOOD[0], "x": float("nan")}], "me/items", "hf_x")


@pytest.mark.parametrize("choices", [5, "ab", {"a": 1}, ["a"], ["a", 1], ["a", ""], [[DEEP]]])
def test_choices_are_texts_with_the_reference_among_them(choices):
    with pytest.raises(InvalidDataError, match=r"data\[0\] has reference 'a' and choices"):
        item_kinds([{"prompt": "q", "reference": "a", "choices": choices}])
    with pytest.raises(InvalidDataError, match=r"data\[0\]\['choices'\] is not valid Unicode"):
        item_kinds([{"prompt": "q", "reference": "a", "choices": ["a", "\ud800"]}])


@pytest.mark.parametrize("answers", ["ab", ["a"], ["a", None], 5, (a for a in "ab")])
def test_answers_are_as_many_texts_as_items(llama, tokenizer, answers):
    evaluator = HolisticEvaluator(llama, tokenizer)
    for door in (evaluator.evaluate, evaluator.run_benchmark):
        with pytest.raises(InvalidDataError, match="answers must be 2 strings, one for each item"):
            door(GOOD[:2], answers)


def test_a_prompt_without_tokens_is_refused(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{# silent #}")
    with pytest.raises(InvalidDataError, match="makes no token of the prompt 'the cat': check its"):
        HolisticEvaluator(llama, tokenizer).generate(["the cat"])
