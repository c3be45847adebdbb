"""A hub that lists or sends what it should not: refused by name, and nothing is written."""

from __future__ import annotations

import os

import fakehub
import pytest
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pruner.checkpoint.on_disk import prune_checkpoint
from llm_pruner.errors import LoadError
from llm_pruner.storage import sources
from llm_pruner.storage.sources import HubRepository

SHA = "5" * 40


@pytest.fixture
def hub(monkeypatch, tmp_path):
    tiny_llama(4).save_pretrained(tmp_path / "source")
    with fakehub.running_hub(monkeypatch, tmp_path / "cache") as server:
        server.add("me/model", tmp_path / "source", SHA)
        yield server


def refused(tmp_path, message):
    with pytest.raises(LoadError, match=message):
        prune_checkpoint("me/model", (1,), tmp_path / "out" / "here")
    assert sorted(os.listdir(tmp_path)) == ["source"]
    assert not [name for name in os.listdir(tmp_path.parent) if "evil" in name]


@pytest.mark.parametrize(
    "name",
    [
        "../evil.txt",
        "../../evil.txt",
        "a/../../../evil.txt",
        "/evil/evil.txt",
        "a//evil.txt",
        "a/",
        "./evil.txt",
        "..",
        "",
        "..\\evil.txt",
        "evil\0.txt",
        "evil\n.txt",
        "evil\x1b[2J.txt",
        "evil\x85.txt",
        "\ud800.txt",
        "e" * 300 + ".txt",
        "é" * 200 + ".txt",
        "evil/" * 300 + "x.txt",
        5,
        None,
        ["evil.txt"],
    ],
)
def test_names_that_cannot_be_written_are_refused(hub, monkeypatch, tmp_path, name):
    usual = fakehub.listed

    def listed(file, content):
        return usual(file, content) | ({"rfilename": name} if file == "config.json" else {})

    monkeypatch.setattr(fakehub, "listed", listed)
    refused(
        tmp_path, r"The hub lists the file .* a name that cannot be written, in checkpoint 'me/"
    )


@pytest.mark.parametrize("size", [None, -1, "10", 1.5, True, [], {}])
def test_sizes_are_numbers_of_bytes(hub, monkeypatch, tmp_path, size):
    usual = fakehub.listed
    monkeypatch.setattr(fakehub, "listed", lambda *file: usual(*file) | {"size": size})
    refused(
        tmp_path, r"The hub lists '[\w.]+' with .* bytes, in checkpoint 'me/model'\. Check the h"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.json", "'config.json' twice"), ("config.json/x", "'config.json' as a file and as a")],
)
def test_two_files_at_one_place_are_refused(hub, monkeypatch, tmp_path, name, message):
    usual = fakehub.listed

    def listed(file, content):
        return usual(file, content) | ({"rfilename": name} if file == "model.safetensors" else {})

    monkeypatch.setattr(fakehub, "listed", listed)
    refused(tmp_path, f"The hub lists {message}")


@pytest.mark.parametrize("sha", [None, 5, "", "../../evil", "main\n"])
def test_a_commit_is_a_hash(hub, monkeypatch, tmp_path, sha):
    usual = fakehub.Handler.reply

    def reply(self, status, answer, headers=None):
        usual(self, status, answer | {"sha": sha} if "sha" in answer else answer, headers)

    monkeypatch.setattr(fakehub.Handler, "reply", reply)
    refused(tmp_path, "The hub lists the commit .*, which is no hash, in checkpoint 'me/model'")


@pytest.mark.parametrize(
    "answer",
    [b"", b"[", b"[]", b"5", b'{"id": 1, "siblings": 5}', b'{"siblings": []}', b"[" * 99_999,
     b'{"id": "me/model", "siblings": [{"name": "x"}]}', b'{"id": "me/model", "siblings": [5]}',
     b'{"id": "me/model", "siblings": [{"rfilename": "x", "lfs": {"a": 1}}]}', b"\xff\xfe"],
)  # fmt: skip
def test_an_answer_of_another_form_is_refused(hub, monkeypatch, tmp_path, answer):
    usual = fakehub.Handler.reply

    def reply(self, status, given, headers=None):
        usual(self, status, answer if "siblings" in given else given, headers)

    monkeypatch.setattr(fakehub.Handler, "reply", reply)
    refused(tmp_path, "Cannot load model 'me/model'")


@pytest.mark.parametrize(
    "change", [lambda part: part + b"x", lambda part: part[:-1], lambda _: b""]
)
def test_answers_have_the_bytes_that_were_asked_for(hub, monkeypatch, tmp_path, change):
    usual = fakehub.Handler.reply

    def reply(self, status, answer, headers=None):
        usual(self, status, change(answer) if "resolve" in self.path else answer, headers)

    monkeypatch.setattr(fakehub.Handler, "reply", reply)
    refused(tmp_path, r"cannot be used: the server has sent \d+ bytes where \d+ were asked for")


def test_a_hub_that_cannot_be_reached_is_said(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(LoadError, match="Cannot load model 'me/model': ConnectError"):
        HubRepository("me/model")


def test_usual_names_are_taken(hub, tmp_path):
    names = {
        "ünï code/日本 語.txt",
        "1_Pooling/config.json",
        ".gitattributes",
        "a..b/c...txt",
        "~x",
    }
    hub.repos["models/me/model"].files.update(dict.fromkeys(names, b"x"))
    assert names <= set(HubRepository("me/model").files())
    prune_checkpoint("me/model", (1,), tmp_path / "out")
    assert (tmp_path / "out" / "ünï code" / "日本 語.txt").read_bytes() == b"x"


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab./\\\0\n\x7f\x9f\ud800é~:"), max_size=12))
def test_a_name_that_is_taken_stays_below_its_folder(tmp_path_factory, name):
    if sources._is_relative(name):
        folder = tmp_path_factory.getbasetemp() / "below"
        path = os.path.normpath(folder / name)
        assert path.startswith(f"{folder}/")
        assert os.path.relpath(path, folder) == name
