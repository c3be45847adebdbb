"""Rows, files and datasets become items of one format; every failure says where and why."""

from __future__ import annotations

import json
import logging
import pickle
import random
import subprocess
import sys
from collections import Counter

import datasets
import pytest
from fakehub import running_hub
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pruner.data import row_formats, sampling
from llm_pruner.data.hub_datasets import load_dataset_from_hub, upload_dataset_to_hub
from llm_pruner.data.items import check_items, fingerprint, kind_of, of_kind, prompt_keys
from llm_pruner.data.row_formats import DATASETS, normalize_item
from llm_pruner.data.sampling import (
    DataSplit,
    load_data,
    load_eval_dataset,
    passages,
    safe_sample,
    split_items,
)
from llm_pruner.errors import InvalidDataError, LoadError, OutputError, UnknownNameError

# Rows in the layout of the hub, with texts of our own.
LETTERS = {"label": ["A", "B", "C"], "text": ["ice", "steam ", "fog"]}
HELLASWAG_ROW = {
    "activity_label": "Baking bread",
    "ctx": "[header] How to bake [title] Mix the flour. the baker",
    "ctx_a": "[header] How to bake [title] Mix the flour.",
    "ctx_b": "the baker",
    "endings": ["kneads the dough.", "paints a wall. [step] It dries.", "sings", "runs off"],
    "label": "0",
}
ROWS = {
    "gsm8k": {"question": "How many nails?", "answer": "7*200=<<7*200=1400>>1400\n#### 1,400"},
    "arc_easy": {"id": "1", "question": "Hot?", "choices": LETTERS, "answerKey": "B"},
    "arc_challenge": {
        "question": "Which is even?",
        "choices": {"label": ["1", "2", "3", "4"], "text": ["3", "4", "5", "7"]},
        "answerKey": "2",
    },
    "hellaswag": HELLASWAG_ROW,
    "sciq": {
        "question": "What do bees make?",
        "correct_answer": "honey",
        "distractor1": "milk",
        "distractor2": "silk",
        "distractor3": "salt",
        "support": "Bees make honey.",
    },
    "truthfulqa": {
        "question": "Do fish sleep?",
        "mc1_targets": {"choices": ["Yes, they rest", "Never", "Only in May"], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["Yes"], "labels": [1]},
    },
    "truthfulqa_gen": {
        "question": "Do fish sleep?",
        "best_answer": "Yes, they rest",
        "correct_answers": ["Fish rest", "Yes, they rest"],
        "incorrect_answers": ["Never"],
    },
    "openbookqa": {"question_stem": "A kettle gives", "choices": LETTERS, "answerKey": "B"},
    "triviaqa": {
        "question": "Which river runs through Rome?",
        "answer": {"value": "Tiber", "aliases": ["Tevere", "Tiber", " "], "type": "Entity"},
    },
}
PARTS = {  # prompt, reference, and the choices or aliases
    "gsm8k": ("How many nails?", "1400", {}),
    "arc_easy": ("Hot?", "steam", {"choices": ["ice", "steam", "fog"]}),
    "arc_challenge": ("Which is even?", "4", {"choices": ["3", "4", "5", "7"]}),
    "hellaswag": (
        "Baking bread: How to bake. Mix the flour. The baker",
        "kneads the dough.",
        {"choices": ["kneads the dough.", "paints a wall. It dries.", "sings", "runs off"]},
    ),
    "sciq": ("What do bees make?", "honey", {"choices": ["honey", "milk", "salt", "silk"]}),
    "truthfulqa": (
        "Do fish sleep?",
        "Yes, they rest",
        {"choices": ["Never", "Only in May", "Yes, they rest"]},
    ),
    "truthfulqa_gen": (
        "Do fish sleep?",
        "Yes, they rest",
        {"aliases": ["Yes, they rest", "Fish rest"]},
    ),
    "openbookqa": ("A kettle gives", "steam", {"choices": ["ice", "steam", "fog"]}),
    "triviaqa": ("Which river runs through Rome?", "Tiber", {"aliases": ["Tiber", "Tevere"]}),
}
EXPECTED = {
    name: {"prompt": prompt, "reference": reference, **more}
    for name, (prompt, reference, more) in PARTS.items()
}
SHUFFLED = ("sciq", "truthfulqa")  # their right answer always comes first in the dataset


def in_any_order(item):
    return {**item, "choices": sorted(item["choices"])} if "choices" in item else item


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def qa(n, start=0):
    return [{"prompt": f"q{i}", "reference": f"a{i}"} for i in range(start, start + n)]


# --- Rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_a_hub_row_becomes_an_item(name):
    item = normalize_item(ROWS[name], name)
    assert in_any_order(item) == in_any_order({"task": name, **EXPECTED[name]})
    if name not in SHUFFLED:
        assert item == {"task": name, **EXPECTED[name]}
    check_items([item])
    assert item["reference"] in item.get("choices", [item["reference"]])
    assert normalize_item(item, "elsewhere") == item
    by_fields_alone = normalize_item(ROWS[name], "somebody/copy")
    assert by_fields_alone == {**item, "task": "copy"}


@pytest.mark.parametrize(
    ("alias", "row", "task"),
    [
        ("openai/gsm8k", "gsm8k", "gsm8k"),
        ("ARC-Easy", "arc_easy", "arc_easy"),
        ("trivia_qa", "triviaqa", "triviaqa"),
        ("hellaswag", "hellaswag", "hellaswag"),
        ("rowan/HellaSwag", "hellaswag", "hellaswag"),
        ("truthful_qa", "truthfulqa", "truthfulqa"),
        ("truthfulqa/truthful_qa", "truthfulqa_gen", "truthfulqa_gen"),
        ("allenai/ai2_arc", "arc_easy", "ai2_arc"),
    ],
)
def test_ids_of_today_and_before(alias, row, task):
    assert normalize_item(ROWS[row], alias)["task"] == task


@pytest.mark.parametrize("gold", [1, "1", "B", "water"])
@pytest.mark.parametrize("field", ["query", "question"])
def test_choices_with_an_index_a_letter_or_a_text(gold, field):
    row = {field: "Question: What is wet?\nAnswer:", "choices": ["sand", "water"], "gold": gold}
    expected = {"prompt": "What is wet?", "reference": "water", "choices": ["sand", "water"]}
    assert normalize_item(row, "mine") == {"task": "mine", **expected}


def test_an_ambiguous_answer_is_refused():
    row = {"question": "1+1?", "choices": ["1", "3", "2", "0"], "answer": "2"}
    assert normalize_item(row, "sums")["reference"] == "2"  # index and text agree
    row["choices"] = ["2", "3", "1"]
    with pytest.raises(InvalidDataError, match=r"answer '2' names 2 of the choices"):
        normalize_item(row, "sums")
    assert normalize_item({**row, "answer": 2}, "sums")["reference"] == "1"


@pytest.mark.parametrize("gold", [3, "3", "D", -2, "maybe", True, None, [1]])
def test_an_answer_outside_the_choices_is_refused(gold):
    with pytest.raises(InvalidDataError, match=r"mine: (answer .* names 0 of|fields)"):
        normalize_item({"question": "q", "choices": ["a", "b", "c"], "gold": gold}, "mine")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hellaswag", {"label": ""}, "the row has no answer"),
        ("hellaswag", {"label": -1}, "the row has no answer"),
        ("hellaswag", {"label": "-1"}, "the row has no answer"),
        ("triviaqa", {"answer": {"value": "<unk>", "aliases": []}}, "no answer .or '<unk>'"),
        ("gsm8k", {"answer": "many"}, "no number after '####'.*'many'"),
        ("truthfulqa", {"mc1_targets": {"Never": 0, "No": 0}}, "marks 0 answers as true"),
    ],
)
def test_a_row_without_answer_is_refused(name, changes, message):
    with pytest.raises(InvalidDataError, match=f"{name}: .*{message}"):
        normalize_item({**ROWS[name], **changes}, name)


def test_truthfulqa_in_its_other_layouts():
    row = {"question": "Do fish sleep?", "mc1_targets": {"Never": 0, "Yes, they rest": 1}}
    item = normalize_item(row, "truthfulqa")
    assert item["reference"] == "Yes, they rest"
    assert sorted(item["choices"]) == ["Never", "Yes, they rest"]
    table = {"Question": "Do fish sleep?", "Best Answer": "Yes", "Correct Answers": "Yes; They do"}
    assert normalize_item(table, "x")["aliases"] == ["Yes", "They do"]


def test_shuffled_choices_are_reproducible_and_spread():
    places = []
    for i in range(80):
        row = {**ROWS["sciq"], "question": f"Question {i}?"}
        first = normalize_item(row, "sciq")
        turned = {**row, "distractor1": row["distractor3"], "distractor3": row["distractor1"]}
        assert first == normalize_item(turned, "sciq")
        places.append(first["choices"].index("honey"))
    assert all(places.count(place) >= 8 for place in range(4))


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("so 5 - 8\n#### -3", "-3"),
        ("\n#### 1,234.50", "1234.50"),
        ("\n#### $2,000,000.", "2000000"),
    ],
)
def test_final_number_of_gsm8k(answer, reference):
    for name in ("gsm8k", "word_problems"):
        item = normalize_item({"question": "q", "answer": answer}, name)
        assert item["reference"] == reference


FEW_SHOT = "Question: 1?\nAnswer: one\n\nQuestion: 2?\nAnswer:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "answer": 42}, {"prompt": "q", "reference": "42"}),
        ({"question": "q", "answer": ["a"]}, {"prompt": "q", "reference": "a"}),
        (
            {"question": "q", "answer": ["a", "b", "a"]},
            {"prompt": "q", "reference": "a", "aliases": ["a", "b"]},
        ),
        (
            {"context": "Question: q\nAnswer:", "answer": "a", "aliases": ["b"]},
            {"prompt": "q", "reference": "a", "aliases": ["a", "b"]},
        ),
        (
            {"context": "Rome is old.", "question": "Is Rome old?", "answer": "yes"},
            {"prompt": "Rome is old.\nIs Rome old?", "reference": "yes"},
        ),
        (
            {"context": "The sky is", "continuation": " blue"},
            {"prompt": "The sky is", "reference": "blue"},
        ),
        (
            {"prompt": "q", "reference": "a", "choices": None, "aliases": [], "id": 7},
            {"prompt": "q", "reference": "a"},
        ),
        ({"prompt": FEW_SHOT, "reference": "two"}, {"prompt": FEW_SHOT, "reference": "two"}),
    ],
)
def test_open_questions(row, expected):
    assert normalize_item(row, "org/mine") == {"task": "mine", **expected}


def test_running_text():
    assert normalize_item({"text": " Once. ", "title": "T"}, "x") == "Once."
    assert normalize_item("Once.", "x") == "Once."


def test_unknown_fields_are_shown_with_those_accepted():
    with pytest.raises(InvalidDataError) as caught:
        normalize_item({"sentence1": "a", "Label": 0, "empty": None}, "glue")
    message = str(caught.value)
    assert "glue: fields with a value: ['label', 'sentence1']" in message
    assert "No known layout has these. Say" in message
    assert "--fields prompt=sentence1,reference=FIELD" in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " ", "reference": "a"}, "the question is empty"),
        ({"prompt": "Question:\nAnswer:", "reference": "a"}, "the question is empty"),
        ({"prompt": "q", "reference": ""}, "the reference is empty"),
        ({"prompt": "q", "reference": True}, "the reference is a bool, not text: True"),
        ({"prompt": "q", "reference": float("nan")}, "the reference is a float, not text: nan"),
        ({"prompt": "q\ud800", "reference": "a"}, "the question is not valid Unicode"),
        ({"prompt": "q", "reference": "c", "choices": ["a", "b"]}, "'c' is not one of the choices"),
        ({"prompt": "q", "reference": "a", "choices": ["a"]}, "must be two or more texts: .'a'"),
        ({"prompt": "q", "reference": "a", "aliases": "b"}, "aliases must be a list of texts: 'b'"),
        ({"question": "q", "answer": []}, "the row has no answer"),
        ({"text": ""}, "text is empty"),
        (7, "a row must be an object or a text: 7"),
    ],
)
def test_unusable_values_are_shown(row, message):
    with pytest.raises(InvalidDataError, match=f"mine: .*{message}"):
        normalize_item(row, "mine")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
FIELDS = sorted({field for row in ROWS.values() for field in row} | {"prompt", "reference", "text"})


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(ROWS)), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_any_row_gives_an_item_or_the_one_error(name, changes):
    try:
        item = normalize_item({**ROWS[name], **changes}, name)
    except InvalidDataError:
        return
    check_items([item])


# --- Files -----------------------------------------------------------------------------------


def test_file_types_agree(tmp_path):
    rows = [{"prompt": "a, b?", "reference": "x", "choices": ["x", "[y]"]}, *qa(2)]
    write(tmp_path / "mine.jsonl", rows)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.json").write_text(json.dumps({"data": rows}, indent=1))
    (tmp_path / "lines").mkdir()
    write(tmp_path / "lines" / "mine.json", rows)
    table = 'prompt,reference,choices\r\n"a, b?",x,"[""x"", ""[y]""]"\r\nq0,a0,\r\nq1,a1,\r\n'
    (tmp_path / "mine.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    for name in ("mine.jsonl", "sub/mine.json", "lines/mine.json", "mine.csv"):
        loaded = load_eval_dataset(3, tmp_path / name)
        assert loaded == [{"task": "mine", **row} for row in rows], name


def test_a_text_file_is_running_text_in_passages(tmp_path):
    path = tmp_path / "book.txt"
    paragraph = "A sentence of five words. " * 8
    text = "".join(f"= Heading {n} =\n \n{paragraph}\n\n\n" for n in range(90))
    path.write_text(f"\ufeff{text}", encoding="utf-8")
    found = load_eval_dataset(99, path, passage=500, up_to=True)
    assert len(found) == 45
    assert all(one.startswith("= Heading") and one.endswith("words.") for one in found)
    assert "".join("".join(found).split()) == "".join(text.split()), "nothing is lost"


def test_long_texts_of_any_file_are_cut_and_short_ones_stay_apart(tmp_path):
    rows = [{"text": "Short."}, {"text": "One two. " * 2000}, *qa(1, 1)]
    write(tmp_path / "a.jsonl", rows)
    found = load_eval_dataset(99, tmp_path / "a.jsonl", passage=1000, up_to=True)
    assert found[0] == "Short."
    assert [type(one) for one in found] == [str] * 19 + [dict]
    assert max(map(len, found[1:19])) <= 1000


def test_a_little_text_gives_several_items_too(tmp_path):
    path = tmp_path / "little.txt"
    path.write_text("A sentence of five words. " * 40)
    found = load_eval_dataset(99, path, up_to=True)
    assert len(found) >= 16
    assert all(one.endswith("words.") for one in found)


@settings(max_examples=200)
@given(st.text(alphabet="ab .\n=#", max_size=400), st.integers(1, 60))
def test_passages_are_the_text_in_pieces(text, size):
    found = passages(text, size)
    assert all(one == one.strip() and 0 < len(one) <= size for one in found)
    kept, whole = "".join("".join(found).split()), "".join(text.split())
    assert whole.startswith(kept)
    assert len(whole) - len(kept) < size / 10, "only a very short rest is left out"


def test_a_split_holds_no_more_tokens_than_asked(tokenizer):
    texts = [" ".join(f"w{(n + i) % 40}" for i in range(10 + n)) for n in range(30)]
    split = DataSplit(texts[:20], texts[29:], texts[20:29])
    fitting = split.within(tokenizer, 100)
    for part, whole in ((fitting.scoring, split.scoring), (fitting.held_out, split.held_out)):
        sizes = [len(tokenizer(text)["input_ids"]) for text in part]
        assert 60 < sum(sizes) <= 100
        assert [text for text in whole if text in part] == part, "in their order"
    assert fitting.healing == split.healing, "twelve times as much"
    assert len(split.within(tokenizer, 1).scoring) == 1
    assert split.within(tokenizer, 10**6) == split


def test_folder_is_its_files_in_order(tmp_path):
    write(tmp_path / "b.jsonl", qa(1, 1))
    write(tmp_path / "a.jsonl", qa(1))
    (tmp_path / "README.md").write_text("not data")
    assert [item["task"] for item in load_eval_dataset(2, tmp_path)] == ["a", "b"]
    (tmp_path / "none").mkdir()
    with pytest.raises(LoadError, match=r"none: it has no file of type \.jsonl, \.ndjson"):
        load_eval_dataset(1, tmp_path / "none")


def test_line_separators_inside_a_text_do_not_cut_it(tmp_path):
    row = {"prompt": "a\u2028b\x85c", "reference": "r"}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_eval_dataset(1, path)[0]["prompt"] == row["prompt"]


GOOD = b'{"prompt": "q", "reference": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", GOOD + b'\n{"prompt": "q",\n', r"x\.jsonl:3: not JSON"),
        ("x.jsonl", GOOD + b"[" * 100_000, r"x\.jsonl:2: not JSON"),
        ("x.jsonl", GOOD + b'{"prompt": "q"}\n', r"x\.jsonl:2: fields with a value: \['prompt'\]"),
        ("x.jsonl", GOOD + b'{"prompt": 1, "reference": {}}', r"x\.jsonl:2: the reference is a d"),
        ("x.jsonl", GOOD + b"17\n", r"x\.jsonl:2: a row must be an object or a text: 17"),
        ("x.jsonl", GOOD + b'{"prompt": "caf\xe9"}', r"x\.jsonl:2: not UTF-8 \(byte 0xe9\)"),
        ("x.jsonl", b"", r"x\.jsonl is empty"),
        ("x.json", b'[\n{"prompt": "q",}\n]', r"x\.json:2: not JSON"),
        ("x.json", b'[{"prompt": "q"}]', r"x\.json: row 1: fields with a value: \['prompt'\]"),
        ("x.json", b"3", r"x\.json: must hold a list of rows, not 3"),
        ("x.csv", b"prompt,reference\nq,a\nq,a,b\n", r"x\.csv:3: not the 2 cells"),
        ("x.csv", b"prompt,reference\nq\n", r"x\.csv:2: not the 2 cells"),
        ("x.csv", b'prompt,reference\n"q,a\nb,c\n', r"x\.csv:2: not CSV: unexpected end"),
        ("x.csv", b"prompt,reference\nq,\n", r"x\.csv:2: the reference is empty"),
        ("x.csv", b"prompt,reference\n", r"x\.csv is empty"),
        ("x.txt", b" \n\n", r"x\.txt is empty"),
        ("x.xlsx", b"PK", r"x\.xlsx: file types are \.jsonl"),
    ],
)
def test_broken_files_are_located(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidDataError, match=message):
        load_eval_dataset(5, path)


def test_missing_file_and_unknown_name(tmp_path):
    with pytest.raises(LoadError, match=r"gone\.jsonl: No such file"):
        load_eval_dataset(1, tmp_path / "gone.jsonl")
    with pytest.raises(UnknownNameError, match=r"'gms8k'\. Did you mean 'gsm8k'.*demo-eval"):
        load_eval_dataset(1, "gms8k")


def test_demo_sets_are_the_packages_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "DEMO_DATA", tmp_path)
    write(tmp_path / "calibration.jsonl", qa(3))
    write(tmp_path / "evaluation.jsonl", qa(3, 10))
    assert [item["prompt"] for item in load_eval_dataset(3, "demo")] == ["q0", "q1", "q2"]
    assert [item["prompt"] for item in load_eval_dataset(3, "demo-eval")] == ["q10", "q11", "q12"]


def test_sampling_is_by_seed_and_a_shortage_is_reported(tmp_path, caplog):
    path = write(tmp_path / "x.jsonl", qa(20))
    one, same, other = (load_eval_dataset(5, path, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len({item["prompt"] for item in one}) == 5
    assert not caplog.records
    assert len(load_eval_dataset(30, path)) == 20
    assert "30 items requested, only 20 available" in caplog.text


@pytest.mark.parametrize("n", [0, -1, True, 2.0, "3"])
def test_impossible_counts(n):
    with pytest.raises(InvalidDataError, match=rf"n={n!r} must be an integer of at least 1"):
        load_eval_dataset(n)
    with pytest.raises(InvalidDataError, match=rf"k={n!r} must be an integer"):
        safe_sample("gsm8k", None, None, n)


# --- The hub, by a substitute for load_dataset -----------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub of rows: {(id, subset): {split: rows}}; an exception in a place of rows is raised."""
    repos = {}

    def load_dataset(repo_id, subset=None, split=None):
        if (repo_id, subset) not in repos:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {repo_id!r} doesn't exist")
        splits = repos[repo_id, subset]
        if isinstance(splits, BaseException):
            raise splits
        if split is None:
            return splits
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(splits)}.")
        return splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return repos


def fill(hub, names=tuple(DATASETS), n=30):
    """Rows of `names` on the hub, told apart by a number."""
    for name in names:
        row = DATASETS[name]
        field = next(f for f in ("question", "question_stem", "ctx_a") if f in ROWS[name])
        rows = [{**ROWS[name], field: f"{ROWS[name][field]} {i}"} for i in range(n)]
        hub[row.repo_id, row.subset] = {row.split: rows}


def tasks(items):
    return [item["task"] for item in items]


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_each_benchmark_is_read_from_its_place(hub, name):
    fill(hub, [name])
    items = load_dataset_from_hub(name)
    assert len(items) == 30
    assert set(tasks(items)) == {name}
    assert len({item["prompt"] for item in items}) == 30
    assert load_eval_dataset(7, name, seed=3) == safe_sample(name, None, None, 7, seed=3)


def test_default_is_an_even_mixture(hub):
    fill(hub)
    items = load_eval_dataset(20, seed=1)
    assert [tasks(items).count(name) for name in row_formats.DEFAULT_SOURCES] == [4, 4, 3, 3, 3, 3]
    assert items == load_eval_dataset(20, seed=1) != load_eval_dataset(20, seed=2)
    assert items[:8] == load_eval_dataset(8, seed=1)


def test_the_others_make_up_for_a_failing_source(hub, caplog):
    fill(hub, ["sciq", "triviaqa"])
    hub["openai/gsm8k", "main"] = datasets.exceptions.DatasetGenerationError("disk full")
    items = load_eval_dataset(20)
    assert sorted(tasks(items)) == ["sciq"] * 10 + ["triviaqa"] * 10
    assert "No items from gsm8k: Cannot load dataset 'openai/gsm8k': DatasetGen" in caplog.text
    assert "disk full" in caplog.text


def test_short_sources_give_what_they_have(hub, caplog):
    fill(hub, ["sciq"], n=2)
    fill(hub, ["gsm8k"], n=9)
    assert sorted(tasks(load_eval_dataset(10))) == ["gsm8k"] * 8 + ["sciq"] * 2
    assert len(load_eval_dataset(99)) == 11
    assert "99 items requested, only 11 available" in caplog.text


def test_when_all_sources_fail_one_line_says_so(hub):
    hub["openai/gsm8k", "main"] = OSError("cable cut")
    with pytest.raises(LoadError, match="or the source 'demo'") as caught:
        load_eval_dataset(5)
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in row_formats.DEFAULT_SOURCES)
    assert "The first reason: gsm8k: " in message
    assert "cable cut" in message


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("offline"),
        ValueError("bad config"),
        RuntimeError("Dataset scripts are no longer supported"),
        StopIteration(),
        UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"),
        datasets.exceptions.DatasetGenerationError("broken"),
        KeyError("feature"),
    ],
)
def test_safe_sample_reports_and_goes_on(hub, caplog, failure):
    hub["openai/gsm8k", "main"] = failure
    with caplog.at_level(logging.WARNING, "llm_pruner"):
        assert safe_sample("gsm8k", "main", "test", 3) == []
    assert type(failure).__name__ in caplog.text
    with pytest.raises(LoadError, match=type(failure).__name__):
        load_dataset_from_hub("gsm8k")


def test_safe_sample(hub, tmp_path, caplog):
    """Takes files too; a larger sample contains the smaller; an interrupt is not hidden."""
    path = write(tmp_path / "mine.jsonl", qa(9))
    assert len(safe_sample(path, None, None, 4)) == 4
    assert safe_sample(str(tmp_path / "gone.csv"), None, None, 4) == []
    assert "gone.csv: No such file" in caplog.text
    fill(hub, ["gsm8k"])
    assert safe_sample("gsm8k", None, None, 9)[:4] == safe_sample("gsm8k", None, None, 4)
    hub["openai/gsm8k", "main"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        safe_sample("gsm8k", "main", "test", 3)


def test_subset_and_split_can_be_chosen(hub):
    hub["openai/gsm8k", "socratic"] = {"train": [ROWS["gsm8k"]]}
    assert len(safe_sample("gsm8k", "socratic", "train", 5)) == 1
    fill(hub, ["truthfulqa", "truthfulqa_gen"])
    generation = load_dataset_from_hub("truthfulqa/truthful_qa", subset="generation")
    assert set(tasks(generation)) == {"truthfulqa_gen"}
    with pytest.raises(LoadError, match="benchmarks: choose truthfulqa or truthfulqa_gen"):
        load_dataset_from_hub("truthfulqa/truthful_qa")


def test_splits_without_labels_are_passed_over(hub):
    blank = {**HELLASWAG_ROW, "label": ""}
    hub["me/tales", None] = {"train": [HELLASWAG_ROW] * 2, "test": [blank] * 200}
    assert len(load_dataset_from_hub("me/tales")) == 2
    with pytest.raises(LoadError, match=r"no usable split\. split 'test': row 0: the row has no a"):
        load_dataset_from_hub("me/tales", split="test")
    hub["me/tales", None] = {"extra": [HELLASWAG_ROW], "train": []}
    assert tasks(load_dataset_from_hub("me/tales")) == ["tales"]


def test_order_of_splits(hub):
    hub["me/x", None] = {name: qa(1, i) for i, name in enumerate(["train", "validation", "test"])}
    assert load_dataset_from_hub("me/x")[0]["prompt"] == "q2"
    del hub["me/x", None]["test"]
    assert load_dataset_from_hub("me/x")[0]["prompt"] == "q1"
    assert load_dataset_from_hub("me/x", split="train")[0]["prompt"] == "q0"
    with pytest.raises(LoadError, match=r"Unknown split 'dev'.*'validation'"):
        load_dataset_from_hub("me/x", split="dev")


def test_unusable_rows_are_passed_over_and_counted(hub, caplog):
    rows = [{"prompt": "", "reference": "a"} if i % 3 else qa(1, i)[0] for i in range(30)]
    hub["me/x", None] = {"test": rows}
    assert len(load_eval_dataset(10, "me/x")) == 10
    assert "passed over" in caplog.text
    assert len(load_dataset_from_hub("me/x")) == 10
    assert "passed over 20 unusable rows; the first is row 1: the question is empty" in caplog.text


def test_missing_subset_says_what_to_do(hub):
    hub["me/x", None] = ValueError("Config name is missing. Pick one among ['a', 'b']")
    with pytest.raises(LoadError, match=r"'a', 'b'.*Choose one with subset="):
        load_dataset_from_hub("me/x")


def test_without_a_network():
    with pytest.raises(LoadError, match=r"'openai/gsm8k': ConnectionError.*local paths"):
        load_dataset_from_hub("gsm8k")
    assert safe_sample("gsm8k", "main", "test", 2) == []


# --- Splitting -------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "size"), [(4, 4), (0.25, 5), (0.01, 1), (19, 19)])
def test_split_sizes_and_order(first, size):
    items = qa(10) + [f"text {i}" for i in range(10)]
    left, right = split_items(items, first, seed=3)
    assert (len(left), len(right)) == (size, 20 - size)
    assert sorted(left + right, key=str) == sorted(items, key=str)
    assert left == [item for item in items if item in left]
    assert (left, right) == split_items(items, first, seed=3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=30), st.integers(1, 29), st.integers(0, 3))
def test_a_prompt_is_never_on_both_sides(numbers, first, seed):
    items = [{"prompt": f" q  {i}" if p % 2 else f"q {i}", "reference": "a"}
             for p, i in enumerate(numbers)]  # fmt: skip
    try:
        left, right = split_items(items, first, seed=seed)
    except InvalidDataError:
        return
    keys = [{" ".join(item["prompt"].split()) for item in side} for side in (left, right)]
    assert not keys[0] & keys[1]
    assert len(left) <= first
    assert len(left) + len(right) == len(items)


def test_split_does_not_depend_on_the_order():
    items = qa(30)
    mixed = random.Random(0).sample(items, 30)
    assert sorted(split_items(items)[0], key=str) == sorted(split_items(mixed)[0], key=str)
    assert split_items(items, seed=0) != split_items(items, seed=1)


@pytest.mark.parametrize("first", [0, 3, 9, -1])
def test_impossible_splits(first):
    with pytest.raises(InvalidDataError, match=f"put {first} of 3 items with 3 different prompts"):
        split_items(qa(3), first)
    with pytest.raises(InvalidDataError, match="5 items with 1 different prompts"):
        split_items(qa(1) * 5)
    with pytest.raises(InvalidDataError, match="is empty"):
        split_items([])


@pytest.mark.parametrize("first", [1.5, 0.0, True, "half", float("nan")])
def test_impossible_fractions(first):
    with pytest.raises(InvalidDataError, match=r"first=.* must be a fraction between 0 and 1"):
        split_items(qa(3), first)


# --- Upload, against a server of our own -----------------------------------------------------

TOKEN = "hf_secretsecret"


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with running_hub(monkeypatch, tmp_path / "cache") as server:
        server.token = TOKEN
        yield server
    assert not list(tmp_path.iterdir())  # nothing was left in the working directory


def test_upload_and_read_back(server, tmp_path_factory, caplog):
    items = [normalize_item(ROWS[name], name) for name in DATASETS]
    items += ["running é text", {"task": "<b>|\n", "prompt": "q", "reference": "a"}]
    assert upload_dataset_to_hub(items, "me/items", f"{TOKEN}\n").endswith("/datasets/me/items")
    assert server.repos["datasets/me/items"].private
    assert TOKEN not in caplog.text
    received = server.repos["datasets/me/items"].files
    files = {name: content.decode() for name, content in received.items() if name[0] != "."}
    assert sorted(files) == ["README.md", "data.jsonl"]
    assert "| gsm8k | 1 |" in files["README.md"]
    assert "| _b___ | 1 |" in files["README.md"]
    folder = tmp_path_factory.mktemp("items")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    cache = str(tmp_path_factory.mktemp("cache"))
    splits = datasets.load_dataset(str(folder), cache_dir=cache)
    assert list(splits) == ["test"]
    assert [normalize_item(row, "x") for row in splits["test"]] == items


def test_bad_items_and_names_are_never_sent(server):
    for bad in ([], [{"prompt": "q"}], [{"prompt": "q", "reference": "a", "extra": {1}}]):
        with pytest.raises(InvalidDataError, match=r"eval_data|data\[0\] cannot be written"):
            upload_dataset_to_hub(bad, "me/items", TOKEN)
    with pytest.raises(OutputError, match=r"'a/b/c': HFValidationError.*organisation/name"):
        upload_dataset_to_hub(qa(1), "a/b/c", TOKEN)
    assert not server.asked


def test_an_upload_goes_on_if_the_repository_can_be_seen(server):
    upload_dataset_to_hub(qa(2), "me/items", TOKEN)
    server.fail("create", 401, body={"error": f"no ({TOKEN})"})
    assert upload_dataset_to_hub(qa(1), "me/items", TOKEN)


@pytest.mark.parametrize(
    ("place", "status", "advice"),
    [
        ("commit", 401, "hf auth login"),
        ("commit", 403, "hf auth login"),
        ("commit", 404, "organisation/name"),
        ("create", 500, "retry in a few minutes"),
        ("commit", 429, "retry in a few minutes"),
        ("commit", 503, "retry in a few minutes"),
    ],
)
def test_refused_uploads_say_what_to_do(server, place, status, advice):
    server.fail(place, status, body={"error": f"no ({TOKEN})"})
    with pytest.raises(OutputError, match=advice) as caught:
        upload_dataset_to_hub(qa(1), "me/items", TOKEN)
    assert "'me/items'" in str(caught.value)
    assert TOKEN not in f"{caught.value}{caught.value.__cause__}"


def test_upload_without_a_network(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match=r"OfflineModeIsEnabled.*Check the network"):
        upload_dataset_to_hub(qa(1), "me/items", TOKEN)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(OutputError, match=r"ConnectError.*Check the network"):
        upload_dataset_to_hub(qa(1), "me/items", TOKEN)


def test_import_is_light():
    heavy = "torch transformers datasets pandas huggingface_hub numpy".split()
    code = f"import sys, llm_pruner.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- several sources ---------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    for name, word in (("wiki", "moth"), ("books", "sea")):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{word} number {n}."} for n in range(40)])
    write(tmp_path / "ask.jsonl", qa(40))
    return tmp_path


def test_several_sources_are_kinds_in_proportion_to_their_shares(sources):
    text = f"{sources}/wiki.jsonl=2, {sources}/books.jsonl,{sources}/ask.jsonl"
    found = load_eval_dataset(40, text)
    assert Counter(map(kind_of, found)) == {"wiki": 20, "books": 10, "ask": 10}
    assert all(("moth" in one) == (kind_of(one) == "wiki") for one in found)
    assert found == check_items(found)
    again = pickle.loads(pickle.dumps(found))
    assert list(map(kind_of, again)) == list(map(kind_of, found))
    assert fingerprint(again) == fingerprint(found)
    split = load_data(text, 10)
    assert {kind_of(item) for item in split.scoring} == {"wiki", "books", "ask"}
    assert not set(prompt_keys(split.scoring)) & set(prompt_keys(split.held_out))


def test_one_source_is_no_kind_and_sources_of_one_name_keep_their_paths(sources):
    assert {kind_of(one) for one in load_eval_dataset(9, f"{sources}/wiki.jsonl")} == {""}
    (sources / "more").mkdir()
    write(sources / "more" / "wiki.jsonl", [{"text": "fern."}])
    names = [f"{sources}/wiki.jsonl", f"{sources}/more/wiki.jsonl"]
    assert {kind_of(one) for one in load_eval_dataset(9, ",".join(names))} == set(names)


def test_a_file_with_a_comma_in_its_name_is_one_source(tmp_path):
    write(tmp_path / "a,b.jsonl", [{"text": "One."}])
    assert load_eval_dataset(1, f"{tmp_path}/a,b.jsonl") == ["One."]


@pytest.mark.parametrize("text", ["a,", "a=0,b", "a=x,b", "a,a", "=2,b", "a=nan,b", "a=-1,b", ","])
def test_sources_and_shares_that_cannot_be(text):
    with pytest.raises(InvalidDataError, match="different sources separated by commas"):
        load_eval_dataset(4, text)


def test_every_kind_has_tokens_in_proportion_to_its_items(tokenizer):
    long = [of_kind(" ".join(["w1"] * 30) + f" w{n}", "long") for n in range(20)]
    short = [of_kind(f"w{n} w2 w3", "short") for n in range(20)]
    found = DataSplit([*long, *short], [], []).within(tokenizer, 124).scoring
    counts = Counter(map(kind_of, found))
    assert counts == {"long": 2, "short": 20}
    few = DataSplit([*long, *short], [], []).within(tokenizer, 1).scoring
    assert Counter(map(kind_of, few)) == {"long": 1, "short": 1}, "no kind is lost"
