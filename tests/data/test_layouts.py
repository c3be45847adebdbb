"""Data as people have it: every layout and container of docs/data.md gives the items it should."""

from __future__ import annotations

import gzip
import json

import datasets
import layouts
import pandas
import pytest
from conftest import word_tokenizer
from layouts import ANSWER, ASKED, ASSISTANT, CASES, LONGER, QUESTION, SYSTEM, USER, WITH_TOOLS

from llm_pruner import load_data, load_eval_dataset, load_model
from llm_pruner.data import local_files
from llm_pruner.data.items import check_items, fingerprint, prompt_keys, prompt_text
from llm_pruner.data.row_formats import normalize_item
from llm_pruner.data.tokens import IGNORED, _note_long, encode_prompt, encode_sequences
from llm_pruner.errors import InvalidDataError, LoadError
from llm_pruner.evaluation.likelihood import perplexity

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | length }} calls{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLS_UNWRITTEN = CHAT.replace("m['tool_calls']", "false")
FORGETFUL = CHAT.replace(  # what the assistant thought is written for its last turn alone
    "{{ m['content'] }}",
    "{{ m['content'] if loop.last or m['role'] != 'assistant' "
    "else m['content'].split('</think>')[-1] }}",
)


def stripped(items):
    """Items without their tasks and kinds."""
    return [
        str(item)
        if isinstance(item, str)
        else {key: value for key, value in item.items() if key not in ("task", "kind")}
        for item in items
    ]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_layout_gives_its_items(case, tmp_path):
    items = layouts.read(case, tmp_path)
    found = stripped(items)
    if "shares" in case.name:
        assert [isinstance(item, str) for item in found] == [False, False, True]
        assert {item["reference"] for item in found[:2]} == {ANSWER}
        return
    assert found == case.items
    check_items(items)
    rows = [{"text": item} if isinstance(item, str) else item for item in items]
    again = [normalize_item(row, "x") for row in json.loads(json.dumps(rows))]
    assert stripped(again) == case.items


def test_the_same_item_in_any_layout_has_the_same_loss(tmp_path):
    model, tokenizer = load_model("demo", device="cpu")
    same = [case for case in CASES if case.items == [QUESTION]]
    losses = set()
    for number, case in enumerate(same):
        (folder := tmp_path / str(number)).mkdir()
        losses.add(perplexity(model, tokenizer, layouts.read(case, folder)))
    assert len(same) >= 15
    assert len(losses) == 1


def scored(tokenizer, item, **options):
    """The words of each sequence, those that are not scored in lower case."""
    return [
        " ".join(
            tokenizer.decode([token]).lower() if label == IGNORED else tokenizer.decode([token])
            for token, label in zip(one.ids, one.labels, strict=True)
        )
        for one in encode_sequences(tokenizer, [item], **options)
    ]


@pytest.fixture
def chat_tokenizer():
    tokenizer = word_tokenizer()
    words = "the cat sat on a mat THE CAT SAT ON A MAT Question: Answer: < | > user assistant "
    words += "system tool 1 calls </think>"
    tokenizer.add_tokens(words.split())
    tokenizer.chat_template = CHAT
    return tokenizer


def chat(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return normalize_item(
        {"messages": [{"role": roles[role], "content": text} for role, text in turns]}, "x"
    )


def test_all_turns_of_the_assistant_are_scored_and_nothing_else(chat_tokenizer):
    item = chat(("s", "the"), ("u", "cat"), ("a", "SAT ON"), ("u", "mat"), ("a", "A MAT"))
    assert scored(chat_tokenizer, item) == [
        "< | system | > the <eos> < | user | > cat <eos> < | assistant | > SAT ON <eos> "
        "< | user | > mat <eos> < | assistant | > A MAT <eos>".replace(" <eos> <", " <eos> <")
    ]
    (one,) = encode_sequences(chat_tokenizer, [item])
    kept = [chat_tokenizer.decode([label]) for label in one.labels if label != IGNORED]
    assert kept == ["SAT", "ON", "<eos>", "A", "MAT", "<eos>"]


def test_an_answer_alone_is_scored_where_choices_are_compared(chat_tokenizer):
    item = chat(("u", "cat"), ("a", "SAT"), ("u", "mat"), ("a", "MAT"))
    (one,) = encode_sequences(chat_tokenizer, [item], closed=False)
    kept = [chat_tokenizer.decode([label]) for label in one.labels if label != IGNORED]
    assert kept == ["MAT"]


def test_a_turn_that_is_written_otherwise_later_is_read_as_it_was_said(chat_tokenizer):
    chat_tokenizer.chat_template = FORGETFUL
    item = chat(("u", "cat"), ("a", "ON </think> SAT"), ("u", "mat"), ("a", "A </think> MAT"))
    sequences = encode_sequences(chat_tokenizer, [item])
    kept = [
        [chat_tokenizer.decode([label]) for label in one.labels if label != IGNORED]
        for one in sequences
    ]
    assert kept == [["ON", "</think>", "SAT", "<eos>"], ["A", "</think>", "MAT", "<eos>"]]
    assert "ON" not in chat_tokenizer.decode(sequences[1].ids)


def test_calls_of_tools_are_turns_of_the_assistant(chat_tokenizer):
    row = {"messages": [USER, *WITH_TOOLS[1:], ASSISTANT], "tools": [layouts.TOOL]}
    item = normalize_item(row, "x")
    (one,) = encode_sequences(chat_tokenizer, [item])
    kept = [chat_tokenizer.decode([label]) for label in one.labels if label != IGNORED]
    assert kept[:3] == ["1", "calls", "<eos>"]
    chat_tokenizer.chat_template = None
    with pytest.raises(InvalidDataError, match="has tools, and the tokenizer no chat template"):
        encode_sequences(chat_tokenizer, [item])


def test_a_call_at_the_end_is_what_is_scored(chat_tokenizer):
    """As the template writes it, or as JSON where the template writes none."""
    for turns, said in (
        (WITH_TOOLS[:2], []),
        ([USER, {**WITH_TOOLS[1], "content": "SAT"}], ["SAT"]),
    ):
        item = normalize_item({"messages": turns}, "x")
        for template, written in ((CHAT, ["1", "calls"]), (CALLS_UNWRITTEN, None)):
            chat_tokenizer.chat_template = template
            (one,) = encode_sequences(chat_tokenizer, [item])
            kept = [chat_tokenizer.decode([label]) for label in one.labels if label != IGNORED]
            expected = [*said, *(written or [])]
            if not expected:
                expected = chat_tokenizer.tokenize(json.dumps(layouts.CALL["function"]))
            assert kept == [*expected, "<eos>"]
    with pytest.raises(InvalidDataError, match="turn 2 has tool_calls that are no list: 'look'"):
        normalize_item({"messages": [USER, {"role": "assistant", "tool_calls": "look"}]}, "x")


def test_without_a_template_a_conversation_is_questions_and_answers(chat_tokenizer):
    chat_tokenizer.chat_template = None
    item = chat(("s", "the"), ("u", "cat"), ("a", "SAT ON"), ("u", "mat"), ("a", "A MAT"))
    (one,) = encode_sequences(chat_tokenizer, [item])
    kept = [chat_tokenizer.decode([label]) for label in one.labels if label != IGNORED]
    assert kept == ["SAT", "ON", "A", "MAT"]
    given = chat_tokenizer.decode(encode_prompt(chat_tokenizer, item["prompt"], 99))
    assert given.split() == ("the Question: cat Answer: SAT ON Question: mat Answer:".split())


def test_what_is_too_long_is_said_once(chat_tokenizer, caplog):
    _note_long.cache_clear()
    items = [chat(("u", "cat"), ("a", "SAT ON")), "the cat sat on a mat", "the cat"]
    with caplog.at_level("INFO", "llm_pruner"):
        for _ in range(2):
            encode_sequences(chat_tokenizer, items, max_length=4)
    assert [record.message for record in caplog.records] == [
        "Of 3 items, in 4 tokens: 1 texts are read in windows, 1 questions or conversations lose "
        "their beginning"
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, "no turn of an assistant answers a user.*the roles are user"),
        ({"messages": [ASSISTANT]}, "no turn of an assistant answers a user"),
        ({"messages": []}, "must be a list of turns"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "turn 1 has the role 'narrator'"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}, ASSISTANT]}, "turn 1 holds 'im"),
        ({"messages": [USER, {**ASSISTANT, "content": None}]}, "the text of turn 2 is a NoneType"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, "tools must be a list"),
        ({"chosen": "no speakers"}, "chosen has no turns"),
        ({"instruction": ASKED}, "of which completion is missing"),
        ({"q": ASKED, "a": ANSWER}, "--fields prompt=q,reference=a"),
        ({"sentence": "x", "option1": "a", "option2": "b", "answer": "1"}, "has no '_'"),
        ({"question": ASKED, "answers": {"text": []}, "context": "x"}, "the row has no answer"),
    ],
)
def test_what_cannot_be_used_is_said(row, message):
    with pytest.raises(InvalidDataError, match=message):
        normalize_item(row, "mine")


def test_fields_that_are_not_there_are_named():
    with pytest.raises(InvalidDataError, match="--fields names q, a, not among them"):
        normalize_item({"ask": ASKED, "say": ANSWER}, "mine", {"prompt": "q", "reference": "a"})
    row = {"messages": [USER, ASSISTANT]}
    assert stripped([normalize_item(row, "mine", {"prompt": "q"})]) == [QUESTION]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"foo": "ask"}, "'foo' is none of the fields that are known, such as prompt"),
        ({"ask": "prompt"}, r"Turned round it would be prompt=ask\."),
        ({"prompt": "ask"}, r"\['ask', 'say'\].*of which reference is missing. Say"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_explained(fields, message):
    with pytest.raises(InvalidDataError, match=message):
        normalize_item({"ask": ASKED, "say": ANSWER}, "mine", fields)


def test_rows_of_a_table_and_of_a_file_are_the_same_items(tmp_path):
    rows = [{"question": f"{ASKED} {number}", "answer": ANSWER} for number in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    frame = pandas.DataFrame(rows)
    frame.to_parquet(tmp_path / "data.parquet")
    found = [load_data(one, 6) for one in (
        tmp_path / "data.jsonl", tmp_path / "data.parquet", frame, rows)]  # fmt: skip
    assert all(one == found[0] for one in found)


def test_conversations_differ_by_all_that_was_said():
    first = chat(("u", "cat"), ("a", "sat"), ("u", "yes"), ("a", "on"))
    second = chat(("u", "mat"), ("a", "sat"), ("u", "yes"), ("a", "on"))
    assert len({*prompt_keys([first, second])}) == 2
    assert fingerprint([first]) != fingerprint([second])
    assert prompt_text(first["prompt"]) == "user: cat\nassistant: sat\nuser: yes"


def test_what_follows_the_last_answer_is_left_out():
    item = normalize_item({"messages": [*LONGER, ASSISTANT, USER]}, "x")
    assert item["prompt"] == {"messages": LONGER}
    assert item["prompt"]["messages"][0]["content"] == SYSTEM


def test_rows_of_a_table_that_cannot_be_used_are_passed_over(caplog):
    frame = pandas.DataFrame({"question": [ASKED, None, ASKED], "answer": [ANSWER, "x", None]})
    with caplog.at_level("WARNING", "llm_pruner"):
        assert stripped(load_eval_dataset(3, frame, up_to=True)) == [QUESTION]
    assert "data: passed over 2 unusable rows" in caplog.text


PICTURE = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
UNFIT = {
    "its label is false": {"prompt": ASKED, "completion": "no", "label": False},
    "turn 1 holds 'image': only text is read": {"messages": [PICTURE, ASSISTANT]},
    "no turn of an assistant answers a user": {"messages": [ASSISTANT, USER]},
}


@pytest.mark.parametrize("ending", ["jsonl", "json", "frame", "list"])
@pytest.mark.parametrize("reason", UNFIT)
def test_rows_with_nothing_to_learn_from_are_left_out(reason, ending, tmp_path, caplog):
    def source(*rows):
        path = tmp_path / f"rows.{ending}"
        if ending == "jsonl":
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        elif ending == "json":
            path.write_text(json.dumps(rows))
        objects = {"list": list, "frame": pandas.DataFrame}
        return objects[ending](list(rows)) if ending in objects else str(path)

    row = UNFIT[reason]
    with caplog.at_level("WARNING", "llm_pruner"):
        found = load_eval_dataset(9, source(row, QUESTION, row), up_to=True)
    assert stripped(found) == [QUESTION]
    assert "passed over 2 unusable rows" in caplog.text
    assert reason in caplog.text
    with pytest.raises(InvalidDataError, match=reason):
        load_eval_dataset(9, source(row), up_to=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, "data must be the name of a source, or rows"),
        ({"prompt": 1}, "data must be the name"),
        ([], "data has no rows"),
        ([{"prompt": ASKED}], "data: row 0: fields with a value"),
        (pandas.DataFrame({"x": [1]}), "row 0: fields with a value"),
        (datasets.Dataset.from_list([]), "it has no rows"),
    ],
)
def test_objects_without_usable_rows_are_refused(data, message):
    with pytest.raises(InvalidDataError, match=message):
        load_eval_dataset(2, data)


def test_rows_of_python_are_split_for_three_purposes():
    rows = [{"question": f"{ASKED} {number}", "answer": ANSWER} for number in range(40)]
    for source in (rows, iter(rows), pandas.DataFrame(rows), datasets.Dataset.from_list(rows)):
        split = load_data(source, 8, healing=True)
        parts = split.scoring, split.healing, split.held_out
        keys = [key for part in parts for key in prompt_keys(part)]
        assert len(keys) == len({*keys}) == 40
        assert [len(split.scoring), len(split.held_out)] == [8, 8]


def test_a_broken_archive_is_refused(tmp_path, monkeypatch):
    packed = gzip.compress(json.dumps(QUESTION).encode() * 99)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-20])
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(QUESTION))
    (tmp_path / "plain.txt.zst").write_text("text")
    for name in ("cut.jsonl.gz", "plain.jsonl.gz", "plain.txt.zst"):
        with pytest.raises(InvalidDataError, match=r"not (gzip|zstd), or cut off"):
            load_eval_dataset(1, tmp_path / name)
    monkeypatch.setattr(local_files, "MAX_BYTES", 5000)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a" * 6000))
    with pytest.raises(InvalidDataError, match="more than 5,000 bytes are packed in it"):
        load_eval_dataset(1, tmp_path / "bomb.txt.gz")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_broken_table_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"PAR1 not a table")
    with pytest.raises(LoadError, match=f"Cannot read .*{name}: "):
        load_eval_dataset(1, tmp_path / name)


def test_a_folder_that_was_not_saved_whole_is_refused(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(LoadError, match="Cannot read"):
        load_eval_dataset(1, tmp_path)
