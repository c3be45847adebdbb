"""Files that are no data, or not quite: one error that says where and why, and no waiting."""

from __future__ import annotations

import json
import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pruner.data.items import check_items
from llm_pruner.data.local_files import read_local
from llm_pruner.data.row_formats import LAYOUTS, normalize_item
from llm_pruner.data.sampling import load_data, load_eval_dataset
from llm_pruner.errors import InvalidDataError, LLMPrunerError, LoadError
from llm_pruner.utils import regular_file, user_path

GOOD = '{"prompt": "q", "reference": "a"}\n'


# --- Paths -----------------------------------------------------------------------------------


def special(folder, kind, name="x.jsonl"):
    path = folder / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.fixture
def folder(tmp_path_factory, monkeypatch):
    """A folder whose path is short enough for a socket."""
    folder = tmp_path_factory.mktemp("f")
    monkeypatch.chdir(folder)
    return folder.relative_to(folder)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_only_regular_files_are_opened(folder, kind):
    path = special(folder, kind)
    link = folder / "link.json"
    link.symlink_to(path.name)
    for place in (path, link, folder):
        with pytest.raises(LoadError, match=f"is a {kind}: give a file"):
            load_eval_dataset(1, place)
    with pytest.raises(LoadError, match=f"'x.jsonl' is a {kind}: give a file"):
        regular_file(path)
    unnamed = special(folder, kind, "data")
    with pytest.raises(LoadError, match=f"'data' is a {kind}: give a file"):
        load_eval_dataset(1, unnamed)


def test_files_folders_and_nothing_are_left_to_the_caller(tmp_path):
    (tmp_path / "x").write_text("")
    for path in (tmp_path, tmp_path / "x", tmp_path / "gone", tmp_path / "x" / "below"):
        assert regular_file(path) == path
        assert user_path(str(path)) == path


@pytest.mark.parametrize(
    "name",
    ["a\0b.jsonl", "~nobody-of-this-name/x.jsonl", "a\ud800.jsonl", "a" * 300, "loop/x", 5, b"x"],
)
def test_what_cannot_be_a_path_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(LoadError, match=r"cannot be a path \(.+\): give the path of a file or f"):
        user_path(name)
    if isinstance(name, str):
        with pytest.raises(LoadError, match="cannot be a path"):
            load_eval_dataset(1, name)


def test_the_home_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_text(GOOD)
    assert user_path("~/x.jsonl") == tmp_path / "x.jsonl"
    assert load_eval_dataset(1, "~/x.jsonl")[0]["task"] == "x"


def test_a_folder_is_not_read_twice_or_below(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").symlink_to(tmp_path)
    (tmp_path / "c.json").mkdir()
    assert len(read_local(tmp_path)) == 1
    (tmp_path / "d\udcff.jsonl").write_text(GOOD)  # a name in another encoding
    assert [item["task"] for item in read_local(tmp_path)] == ["a", "d\ufffd"]


def test_a_file_of_any_size_is_not_read(tmp_path):
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(InvalidDataError, match="it has 5,000,000,000 bytes, more than 4,000"):
        load_eval_dataset(1, path)


# --- Contents --------------------------------------------------------------------------------

TWICE = '{"prompt": "q", "reference": "a", "reference": "b"}'
BROKEN = {
    "csv name": ("x.csv", "prompt,reference,prompt\nq,a,r\n", r"x\.csv:1: 'prompt' and 'prompt'"),
    "csv norm": ("x.csv", '"My Q",my_q ,b\nq,a,r\n', r"x\.csv:1: 'My Q' and 'my_q ' name the same"),
    "csv nul": ("x.csv", "prompt,reference\nq,a\nq\0,a\n", r"x\.csv:3: a NUL byte"),
    "csv field": ("x.csv", f"prompt,reference\nq,{'a' * 200_000}\n", r"x\.csv:2: not CSV: field l"),
    "csv text": ("x.csv", 'prompt,reference\nq,"{""a"": 1, ""a"": 2}"\n', None),
    "csv unnamed": ("x.csv", "prompt,reference,,\nq,a,,\n", None),
    "twice": ("x.jsonl", GOOD + TWICE, r"x\.jsonl:2: not JSON: the key 'reference' is twice in"),
    "deep twice": ("x.jsonl", '{"a": [{"b": 1, "b": 1}]}', r"x\.jsonl:1: .*'b' is twice"),
    "json twice": ("x.json", f"[{GOOD},\n{TWICE}]", r"x\.json: not JSON: the key 'reference' is t"),
    "object": ("x.json", '{\n"prompt": "q",\n}', r"x\.json:3: not JSON"),
    "norm": ("x.jsonl", '{"Prompt": "q", "prompt": "r", "reference": "a"}', r":1: 'Prompt' and 'p"),
    "null": ("x.jsonl", '{"Prompt": null, "prompt": "r", "reference": "a"}', None),
    "nan": ("x.jsonl", '{"prompt": "q", "reference": NaN}', r"x\.jsonl:1: not JSON: NaN is no num"),
    "inf": ("x.json", '[{"prompt": "q", "reference": -Infinity}]', r"x\.json: .*-Infinity is no n"),
    "1e999": ("x.jsonl", '{"prompt": "q", "reference": 1e999}', "1e999 is no number in JSON"),
    "digits": ("x.jsonl", f'{{"prompt": {"9" * 9999}}}', "a number of 9999 digits"),
    "big": ("x.jsonl", f'{{"prompt": {"9" * 2000}, "reference": 1}}', "a number of 2000 digits"),
    "deep": ("x.json", "[" * 99_999, r"x\.json: not JSON: lists or objects are nested too deeply"),
    "nested": ("x.jsonl", f'{{"prompt": {"[" * 900}{"]" * 900}, "reference": 1}}', "100 deep"),
    "half": ("x.jsonl", '{"prompt": "\\ud800", "reference": "a"}', "not JSON: not valid Unicode"),
    "task": ("x.jsonl", '{"prompt": "q", "reference": "a", "task": "\\udfff"}', "valid Unicode"),
    "task list": ("x.jsonl", '{"prompt": "q", "reference": "a", "task": [1]}', "the task is a lis"),
    "choices": ("x.jsonl", '{"prompt": "q", "reference": "a", "choices": 0}', "must be two or mor"),
    "labels": ("x.jsonl", '{"question": "q", "answer": 0, "choices": {"text": ["a", "b"], "label": '
               '["A"]}}', "2 choices with 1 labels"),
    "label": ("x.jsonl", '{"question": "q", "answer": [], "choices": ["[]", "b"]}', "names 0 of"),
    "context": ("x.jsonl", '{"ctx": {"a": 1}, "activity_label": "b", "endings": ["a", "b"], "label"'
                ": 0}", "the context or an ending is a dict|ctx is a dict"),
    "marks": ("x.jsonl", '{"question": "q", "mc1_targets": {"choices": ["a", "b"], "labels": [1]}}',
              "other labels than choices"),
    "utf16": ("x.txt", "a\0b\0", r"x\.txt:1: a NUL byte"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_contents_that_mean_nothing_or_two_things(tmp_path, case):
    name, text, message = BROKEN[case]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    if message is None:
        check_items(read_local(path))
        return
    with pytest.raises(InvalidDataError, match=message):
        read_local(path)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["\ud800", "\0", "", " ", "A", "1", 10**2000, float("inf")])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
NAMES = sorted(
    {name for layout in LAYOUTS for each in (*layout.fields, *layout.optional)
     for name in each.split("|")} | {"task", "text", "Task ", "\udc80", ""}
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=6))
def test_any_row_in_python_gives_a_usable_item_or_the_one_error(row):
    try:
        item = normalize_item(row, "mine")
    except InvalidDataError:
        return
    check_items([item])
    json.dumps(item, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize("field", ["prompt", "reference", "choices", "aliases", "task"])
def test_values_that_cannot_be_shown(field):
    deep = []
    for _ in range(9999):
        deep = [deep]
    for value in (10**5000, {"a": 10**5000}, deep, {"text": deep}):
        with pytest.raises(InvalidDataError, match="a value too large to be shown"):
            normalize_item({"prompt": "q", "reference": "a", field: value}, "mine")
    for answer in (10**5000, deep, {"value": deep}):
        with pytest.raises(InvalidDataError, match="a value too large to be shown"):
            normalize_item({"question": "q", "answer": answer, "choices": ["a", "b"]}, "mine")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([".jsonl", ".json", ".csv", ".txt"]), st.data())
def test_any_bytes_give_items_or_the_one_error(tmp_path_factory, suffix, data):
    text = data.draw(st.lists(st.sampled_from([*'{}[],:"\n\r\\', "prompt", "reference", "NaN", "a",
                                               '"prompt"', '"q"', "\0", "é", "1e5"])))  # fmt: skip
    raw = data.draw(st.binary(max_size=20) | st.just("".join(text).encode()))
    path = tmp_path_factory.mktemp("any") / f"x{suffix}"
    path.write_bytes(raw)
    try:
        check_items(read_local(path))
    except InvalidDataError as error:
        message = str(error)
    else:
        return
    assert str(path) in message


@pytest.mark.parametrize("n", [None, 0, 1.5, "3", True])
def test_impossible_numbers_of_samples(n):
    with pytest.raises(InvalidDataError, match=r"n_samples=.* must be an integer of at least 1"):
        load_data("demo", n)


@pytest.mark.parametrize("source", ["", " ", "\n", ".", "..", "/dev/null", "a/b/c/d"])
def test_odd_sources_are_the_packages_errors(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LLMPrunerError):
        load_eval_dataset(1, source)
