"""A card of somebody else: of its metadata only text is taken, and nothing in it stops a run."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_report

from llm_pruner.errors import OutputError
from llm_pruner.report.model_card import CARRIED, card_text, original_card, write_card
from llm_pruner.results import PruningPlan

PLAN = PruningPlan("m", 6, (2,))
TAGS = ["llm_pruner", "depth-pruning", "pruned"]
OURS = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": TAGS}


def carried(card):
    """What a card of ours takes over from another."""
    found = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card_text(PLAN, card), re.DOTALL)[1])
    assert found["tags"][:3] == TAGS
    found["tags"] = found["tags"][3:]
    return {name: value for name, value in found.items() if value and OURS.get(name) != value}


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: 2020-13-45", {"license": "2020-13-45"}),
        ("license: 2024-01-01\nlanguage: no", {"license": "2024-01-01", "language": "no"}),
        ("language: [no, en, on, 1e3, 0x10]", {"language": ["no", "en", "on", "1e3", "0x10"]}),
        ("license: 1.0\ntags: [7, 7b, true]", {"license": "1.0", "tags": ["7", "7b", "true"]}),
        ("license: !!python/object/apply:os.system ['ls']", {"license": ["ls"]}),
        ("license: !!binary aGk=\nlanguage: !odd en", {"license": "aGk=", "language": "en"}),
        ("license: &a mit\nlicense_name: *a", {"license": "mit", "license_name": "mit"}),
        ("license: &a [*a]\nlanguage: en", {"language": "en"}),
        ("base: &b {license: mit}\n<<: *b", {}),
        ("license: {a: b}\nlanguage: [{a: b}, en]\ndatasets: [[a]]\ntags: chat", {}),
        ("license: null\nlanguage: ~\ndatasets: []\ntags:\nlicense_name: ''", {}),
        ("license: mit\nlicense: gpl\nlanguage: en", {"language": "en"}),
        ('license: "\\ud800"\nlanguage: "a\\0b\\r\\n"', {"language": "a\0b\r\n"}),
        ("? [a, b]\n: c\n? {a: b}\n: c\nlicense: mit", {"license": "mit"}),
        ("license: mit\r\nlanguage: en\r", {"license": "mit", "language": "en"}),
        ("license: a\0b", {}),
        ("license: mit\n\tlanguage: en", {}),
        ("%YAML 9.9", {}),
        ("just text", {}),
        ("- license: mit", {}),
        ("license: mit\n--- \nlanguage: en", {}),
    ],
)
def test_only_texts_and_lists_of_texts_are_carried(front, expected):
    assert carried(f"---\n{front}\n---\n# Card") == expected


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{new}: &{new} [{f'*{old}, ' * 9}]\n" for old, new in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: " + "[" * 50_000 + "\n---\n",
        "---\nlicense: " + "{a: " * 50_000 + "\n---\n",
        "---\n" + "? " * 50_000 + "\n---\n",
        "---\nlicense: mit\n",
        "---\n" + "\n" * 900_000,
        "---\nlicense: mit\n" + "#" * 1_000_000 + "\n---\n",
        " " * 900_000 + "--",
        "---\nlicense: " + "x" * 200_000 + "\n---\n",
        f"---\nx: &a {'y' * 60_000}\nlicense: [{'*a, ' * 5_000}]\n---\n",
        f"---\n{BOMB}license: *i\n---\n",
    ],
    ids="lists dicts keys endless newlines long spaces text repeated bomb".split(),
)
def test_cards_of_any_size_and_depth(card, caplog):
    caplog.set_level("INFO", logger="llm_pruner")
    assert carried(card) == {}
    assert "original card" in caplog.text or "---" not in card.strip()


def test_what_is_left_out_is_said(caplog):
    caplog.set_level("INFO", logger="llm_pruner")
    carried("---\nlicense: {a: b}\nlanguage: en\nwidget: [{a: b}]\n---\n")
    assert [record.message for record in caplog.records] == [
        "The original card's license is no text or list of texts: left out."
    ]


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
SCALAR = TEXT | st.integers() | st.floats() | st.booleans() | st.dates() | st.none()
VALUES = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2)
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*CARRIED, "tags", "widget"]), VALUES))
def test_any_metadata_gives_a_card_that_can_be_read_again(meta):
    found = carried(f"---\n{yaml.safe_dump(meta, allow_unicode=True)}\n---\n")
    for name, value in found.items():
        assert isinstance(value, str) or all(isinstance(one, str) for one in value)
        if isinstance(meta[name], str) and name != "tags":
            assert value == meta[name]
    for name in set(CARRIED) - found.keys():
        given_ = meta.get(name)
        assert not isinstance(given_, str) or given_ in ("", "~", "null", "Null", "NULL",
                                                         "text-generation")  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("-\r\n:[]{}&*!|>'\"#%@`? alicense\t\\\0é"), max_size=60))
def test_any_text_is_a_card(text):
    carried(text)
    carried(f"---\n{text}\n---\n")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_a_card_that_cannot_be_opened_is_done_without(tmp_path, caplog, kind):
    caplog.set_level("INFO", logger="llm_pruner")
    path = tmp_path / "README.md"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "README.md")
    assert original_card(tmp_path) == ""
    assert f"No card of {tmp_path} can be read (" in caplog.text
    with pytest.raises(OutputError, match=r"README.md' cannot be read \(.+\): move it away"):
        write_card(make_report("org/model"), tmp_path)


def test_a_card_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(b"---\nlicense: mit\n---\n\xff")
    with path.open("r+b") as file:
        file.truncate(9_000_000_000)
    assert carried(original_card(tmp_path)) == {"license": "mit"}


NAMES = ["a" * 300 + "/b", "a/" + "b" * 5000, "\ud800/x", "~nobody-of-this-name/y", "a\0/b"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_can_be_nothing_have_no_card(name):
    assert original_card(name) == ""
    assert "base_model" not in card_text(PruningPlan(name, 6, (2,))).encode().decode()


def test_a_model_may_be_named_by_a_path(tmp_path):
    folder = tmp_path / "some" / "model.gguf"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert carried(original_card(folder)) == {"license": "mit"}
    for path in (folder, Path("org/model")):
        as_text, as_path = (PruningPlan(name, 6, (2,)) for name in (str(path), path))
        assert card_text(as_path) == card_text(as_text)
