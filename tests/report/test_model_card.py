"""The model card: metadata that parses back, text that stays text."""

import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from samples import COMPARISONS, make_report

from llm_pruner.errors import OutputError
from llm_pruner.report.model_card import card_text, inert, original_card, write_card
from llm_pruner.results import PruningPlan

EVIL = (
    "a`b`\n---\n# [x](http://evil.example) | <script>1</script> **b** ![i](x) $y$ @me: *c* _d_",
    "- item\nkey: value",
    "\"quoted\" 'single' : {a: b} %tag &anchor !!str",
    "12. list",
    "www.evil.example ~~s~~",
    "\u202eright\x07bell",
)
SOURCE = """---
license: other
license_name: own
license_link: https://example.org/licence
language: [en, de]
datasets: [a/b]
tags: [chat, pruned]
pipeline_tag: image-text-to-text
model-index: [{name: old, results: []}]
widget: [{text: hello}]
---
# The original
"""


def metadata(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_the_metadata_of_the_original_is_carried_over():
    found = metadata(card_text(PruningPlan("org/model", 6, (2,)), SOURCE))
    assert found == {
        "base_model": "org/model",
        "base_model_relation": "finetune",
        "datasets": ["a/b"],
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "own",
        "license_link": "https://example.org/licence",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llm_pruner", "depth-pruning", "pruned", "chat"],
    }


@pytest.mark.parametrize(
    "source", ["", "no metadata", "---\n: [\n---\n", "---\n- a\n---\n", "---\n"]
)
def test_a_source_without_metadata_gives_a_card_of_our_own(source):
    found = metadata(card_text(PruningPlan("m", 6, (2,)), source))
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llm_pruner", "depth-pruning", "pruned"],
    }


def test_a_folder_is_no_base_model_and_its_place_is_not_told(tmp_path):
    place = tmp_path / "secret" / "model"
    place.mkdir(parents=True)
    text = card_text(PruningPlan(str(place), 6, (2,)))
    assert "secret" not in text
    assert "base_model" not in metadata(text)


def test_scores_of_tasks_are_evaluation_results():
    text = card_text(make_report().plan, "", make_report())
    card = ModelCard(text)
    found = [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert found == [("arc_easy", "acc", 0.75), ("own task", "score", 0.75)]
    assert card.data.model_name == "model-pruned"
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(COMPARISONS)
    assert all(line.count("|") == 6 for line in rows)
    assert "likelihood, 60 held-out items" in text


@pytest.mark.parametrize("name", EVIL)
def test_untrusted_names_parse_back_and_stay_inert(name):
    numbered = enumerate(COMPARISONS)
    entries = [replace(entry, name=f"{name}{place}", unit=name) for place, entry in numbered]
    source = "---\n" + yaml.safe_dump({"license": name, "tags": [name], "language": name}) + "---\n"
    report = make_report(name, comparisons=entries)
    text = card_text(report.plan, source, report)
    found = metadata(text)
    assert found["license"] == found["language"] == name
    assert name in found["tags"]
    results = found["model-index"][0]["results"]
    tasks = [entry.name for entry in entries if entry.group == "tasks"]
    assert {r["dataset"]["name"] for r in results} == set(tasks)
    body = text.split("\n---\n", 2)[-1] if name != EVIL[0] else text[text.index("\n# ") :]
    body, *code = re.split(r"^`{3,}.*?^`{3,}$", body, flags=re.M | re.S)
    body += "".join(code)
    plain = re.sub(r"\\[!-/:-@\[-`{-~]", "", body)  # what is escaped is text
    assert "<" not in plain
    assert not re.search(r"[\[\]$@~*]|http:|www\.", plain)
    assert plain.count("`") % 2 == 0
    assert len([line for line in body.splitlines() if line.startswith("#")]) == 4
    assert not re.search(r"^(-|\d+[.)]) ", plain, re.M)
    assert body.isprintable() or {c for c in body if not c.isprintable()} == {"\n"}


@pytest.mark.parametrize("text", ["plain words", "tokens/s", "0.5 (acc)", "a-b"])
def test_plain_text_is_left_alone(text):
    assert inert(text) == text


def test_a_card_that_is_not_ours_is_left(tmp_path):
    report = make_report("org/model")
    path = tmp_path / "README.md"
    path.write_text(SOURCE)
    with pytest.raises(OutputError, match="did not write: move it"):
        write_card(report, tmp_path)
    assert path.read_text() == SOURCE
    path.unlink()
    write_card(report, tmp_path)
    first = path.read_text()
    write_card(report, tmp_path)
    assert path.read_text() == first
    path.write_text(card_text(report.plan, SOURCE))  # as it is saved with the checkpoint
    write_card(report, tmp_path)
    assert path.read_text() == card_text(report.plan, SOURCE, report)


def test_the_originals_card_is_read_where_there_is_one(tmp_path, caplog):
    assert original_card(str(tmp_path)) == ""
    (tmp_path / "README.md").write_text(SOURCE)
    assert original_card(str(tmp_path)) == SOURCE
    assert original_card("demo") == ""
    caplog.set_level("INFO", logger="llm_pruner")
    assert original_card("nobody/has-this") == ""
    assert "No card of nobody/has-this can be read (" in caplog.text


def test_a_plan_that_was_edited_says_so_and_repeats_nothing():
    plan = PruningPlan("some/model", 8, (2, 5), edited=True)
    text = card_text(plan)
    assert "The plan was edited by hand: what it said was measured is left out." in text
    assert "This was not measured." in text
