"""Uploads, against a stand-in of the hub: what arrives, what is tried again, what is told."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import shlex
import shutil
import time
import traceback
import warnings

import fakehub
import pytest
import torch
from conftest import WORDS, tiny_llama
from fakehub import HANG, RESET
from huggingface_hub import constants, get_session
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_pruner import hub as uploads
from llm_pruner import prune_checkpoint, push_to_hub
from llm_pruner.cli import main
from llm_pruner.errors import HubError, LLMPrunerError, OutputError
from llm_pruner.hub import check_upload, how_to_repeat, upload
from llm_pruner.utils import logger

TOKEN = "hf_recognisablesecret"


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tokenizer):
    """A tiny model in several files."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pruned(saved, tmp_path_factory):
    """An output of llm_pruner with several weight files and a folder of figures."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    prune_checkpoint(saved, [1, 5], folder)
    (folder / "figures").mkdir()
    (folder / "figures" / "scores.png").write_bytes(bytes(range(256)) * 4)
    return folder


@pytest.fixture
def out(pruned, tmp_path):
    return shutil.copytree(pruned, tmp_path / "out")


@pytest.fixture
def slept(monkeypatch):
    """The waits, in seconds, in place of waiting; each moves the clock of the upload on."""
    waits: list[float] = []
    real = time.monotonic
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(time, "monotonic", lambda: real() + sum(waits))
    return waits


@pytest.fixture
def hub(monkeypatch, tmp_path, slept):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with fakehub.running_hub(monkeypatch, tmp_path / "cache") as server:
        server.token = TOKEN
        yield server


def contents(folder):
    """The files of a folder by their names on the hub."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def arrived(hub, repo_id="me/small"):
    """The files of the repository's last commit, but for what the hub adds by itself."""
    files = dict(hub.repos[f"models/{repo_id}"].files)
    assert files.pop(".gitattributes")
    return files


# --- what arrives --------------------------------------------------------------------------------


def test_a_folder_arrives_whole_private_and_in_one_commit(hub, out, slept):
    before = contents(out)
    assert len([name for name in before if name.endswith(".safetensors")]) > 1
    url = push_to_hub(out, "me/small")
    assert url == f"{hub.url}/me/small"
    assert arrived(hub) == before == contents(out)
    repo = hub.repos["models/me/small"]
    assert (repo.private, len(repo.commits)) == (True, 2)
    assert not slept
    assert push_to_hub(out, "me/other", private=False) == f"{hub.url}/me/other"
    assert hub.repos["models/me/other"].private is False
    assert push_to_hub(out, "alone") == f"{hub.url}/me/alone"  # the hub adds the user's name


def test_what_was_pushed_loads_and_equals_the_local_model(hub, out, tokenizer):
    push_to_hub(out, "me/small")
    here = AutoModelForCausalLM.from_pretrained(out)
    there = AutoModelForCausalLM.from_pretrained("me/small")
    assert hub.asked["resolve"] > 0
    assert here.config.num_hidden_layers == there.config.num_hidden_layers == 6
    want, got = here.state_dict(), there.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in want.items())
    ids = tokenizer("the cat sat", return_tensors="pt").input_ids
    assert torch.equal(here(ids).logits, there(ids).logits)
    assert AutoTokenizer.from_pretrained("me/small")("a mat").input_ids


def test_what_is_there_is_not_sent_again(hub, out):
    push_to_hub(out, "me/small")
    puts = hub.asked["put"]
    assert push_to_hub(out, "me/small")
    assert (hub.asked["put"], len(hub.repos["models/me/small"].commits)) == (puts, 2)
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    push_to_hub(out, "me/small")
    assert (hub.asked["put"], len(hub.repos["models/me/small"].commits)) == (puts, 3)
    assert arrived(hub) == contents(out)


def test_old_weights_go_and_other_files_stay(hub, out):
    push_to_hub(out, "me/small")
    repo = hub.repos["models/me/small"]
    others = {"LICENSE": b"mine", "onnx/model.bin": b"another", "notes.txt": b"x"}
    old = {"model.safetensors": b"old", "pytorch_model.bin": b"older"}
    repo.commit({**repo.files, **others, **old}, "by hand")
    push_to_hub(out, "me/small")
    assert arrived(hub) == {**contents(out), **others}
    assert AutoModelForCausalLM.from_pretrained("me/small").config.num_hidden_layers == 6


def test_a_public_repository_is_told_of(hub, out, saved, caplog):
    hub.add("me/small", saved)
    push_to_hub(out, "me/small")
    assert "is public: it stays so" in caplog.text
    assert hub.repos["models/me/small"].private is False


@pytest.mark.parametrize("large", [True, False])
def test_a_file_that_arrived_differently_is_an_error(hub, out, monkeypatch, large):
    name = "tokenizer.json"
    if large:
        name = next(n for n in contents(out) if n.endswith(".safetensors"))
    real = fakehub.Repo.commit

    def spoil(repo, files, message, oid=None):
        changed = bytes([files[name][0] ^ 1]) + files[name][1:] if name in files else b""
        return real(repo, {**files, **({name: changed} if changed else {})}, message, oid)

    monkeypatch.setattr(fakehub.Repo, "commit", spoil)
    with pytest.raises(HubError, match=rf"1 of \d+ files on the hub .* '{re.escape(name)}'"):
        push_to_hub(out, "me/small")


def test_the_hashes_are_those_of_git_and_of_lfs(tmp_path):
    """By a second road: git hash-object of a known text, and the hash of the same text by LFS."""
    path = tmp_path / "x"
    path.write_bytes(b"test content\n")

    class Entry:
        size, blob_id, lfs = 13, "d670460b4b4aece5915caf5c68d12f560a9fe3e4", None

    assert uploads._same(path, Entry)
    assert uploads._same(b"test content\n", Entry)
    assert not uploads._same(b"test contend\n", Entry)

    class Large(Entry):
        class lfs:
            sha256 = hashlib.sha256(b"test content\n").hexdigest()

    assert uploads._same(path, Large)
    Large.size = 12
    assert not uploads._same(path, Large)


# --- what is refused before anything is sent -----------------------------------------------------


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/", "me/a b", "-me/x", "me/x.git", ""])
def test_impossible_ids(hub, out, repo_id):
    with pytest.raises(HubError, match="A repository id is 'organisation/name'"):
        push_to_hub(out, repo_id)
    assert not hub.asked


def test_no_token(hub, out, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(HubError, match=r"No token was found.*hf auth login"):
        push_to_hub(out, "me/small")
    assert not hub.asked
    assert push_to_hub(out, "me/more", token=f" {TOKEN}\n")  # a given one, spaces aside
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert check_upload("me/small") == TOKEN
    assert push_to_hub(out, "me/small")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="401"):
        push_to_hub(out, "me/small")
    assert push_to_hub(out, "me/small", token=TOKEN)


def test_offline(hub, out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set\. Check the network"):
        push_to_hub(out, "me/small")
    assert not hub.asked


def test_a_folder_that_is_no_output(hub, tmp_path, saved):
    for folder in (tmp_path / "nothing", saved):
        with pytest.raises(OutputError, match=r"no pruning_plan.json.*--output"):
            push_to_hub(folder, "me/small")
    assert not hub.asked


def test_the_error_is_one_of_ours():
    assert issubclass(HubError, LLMPrunerError)
    assert (HubError.exit_code, OutputError.exit_code) == (5, 4)


# --- a hub that fails ----------------------------------------------------------------------------


REFUSALS = [
    ("create", 401, {}, "hf auth login"),
    ("create", 403, {}, "hf auth login"),
    ("preupload", 401, {}, "hf auth login"),
    ("commit", 403, {}, "hf auth login"),
    ("put", 403, {}, "hf auth login"),
    ("preupload", 404, {"X-Error-Code": "RepoNotFound"}, "'name' or 'organisation/name'"),
    ("commit", 404, {}, "'name' or 'organisation/name'"),
    ("commit", 403, {"X-Error-Code": "GatedRepo"}, "is gated: ask for access"),
    ("commit", 400, {}, "does not accept it"),
    ("validate-yaml", 400, {}, "does not accept it"),
    ("batch", 422, {}, "does not accept it"),
]


@pytest.mark.parametrize(("endpoint", "status", "headers", "advice"), REFUSALS)
def test_a_refusal_is_told_at_once(hub, out, slept, endpoint, status, headers, advice):
    (out / "README.md").write_text("---\ntags: [x]\n---\n")
    hub.fail(endpoint, status, headers=headers)
    before = contents(out)
    with pytest.raises(HubError, match=advice) as caught:
        push_to_hub(out, "me/small")
    assert hub.asked[endpoint] <= 5  # the files of one upload, each once
    assert not slept
    message = str(caught.value)
    assert message.startswith("Cannot upload to model 'me/small': ")
    assert (str(status) if status != 400 else "Bad request") in message
    assert message.endswith(how_to_repeat(out, "me/small"))
    assert contents(out) == before


def test_a_token_that_may_write_but_not_create_suffices(hub, out):
    """The client goes on after 401 or 403 if the repository is there."""
    push_to_hub(out, "me/small")
    (out / "config.json").write_text("{}")
    hub.fail("create", 403)
    push_to_hub(out, "me/small")
    assert arrived(hub) == contents(out)


@pytest.mark.parametrize("endpoint", ["create", "preupload", "batch", "put", "commit", "info"])
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, RESET])
def test_what_passes_is_tried_again(hub, out, slept, endpoint, status):
    hub.fail(endpoint, status, times=1)
    push_to_hub(out, "me/small")
    assert arrived(hub) == contents(out)
    assert slept == [1.0]
    assert len(hub.repos["models/me/small"].commits) == 2


@pytest.mark.parametrize("endpoint", ["create", "preupload", "batch", "put", "commit", "info"])
@pytest.mark.parametrize("status", [503, RESET])
def test_what_does_not_pass_is_an_error_after_a_while(hub, out, slept, endpoint, status):
    hub.fail(endpoint, status)
    advice = "busy or down" if status == 503 else "Check the network"
    with pytest.raises(HubError, match=advice):
        push_to_hub(out, "me/small")
    files = len([name for name in contents(out) if name.endswith(".safetensors")])
    assert 21 <= sum(slept) <= 21 + 4 * 23 * files  # ours, and those of the client by file
    assert 4 <= hub.asked[endpoint] <= 4 * 6 * files
    hub.faults.clear()
    push_to_hub(out, "me/small")
    assert arrived(hub) == contents(out)


@pytest.mark.parametrize(
    ("headers", "waits"),
    [
        ({"Retry-After": "7"}, [7.0, 7.0]),
        ({"RateLimit": '"api";r=0;t=55'}, [55.0, 55.0]),
        ({"RateLimit": '"api";r=3;t=55'}, [1.0, 4.0]),  # not the reason
        ({"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}, [1.0, 4.0]),
        ({"Retry-After": "0"}, [1.0, 4.0]),
    ],
)
def test_the_hubs_wish_to_wait_is_respected(hub, out, slept, headers, waits):
    hub.fail("commit", 429, times=2, headers=headers)
    push_to_hub(out, "me/small")
    assert slept == waits


@pytest.mark.parametrize("endpoint", ["commit", "put", "create"])
def test_a_wish_beyond_the_deadline_is_not(hub, out, slept, endpoint):
    hub.fail(endpoint, 429, headers={"Retry-After": "36000"})
    with pytest.raises(HubError, match=r"asks to wait 36000 seconds|429"):
        push_to_hub(out, "me/small")
    assert not slept


def test_the_deadline_ends_what_never_ends(hub, out, monkeypatch):
    """The client creates anew for ever, without a pause, while the hub tells of a conflict."""
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    conflict = "Cannot create repo: another conflicting operation is in progress"
    hub.fail("create", 409, body={"error": conflict})
    with pytest.raises(HubError, match="The time for the upload is over"):
        push_to_hub(out, "me/small", timeout=100)
    assert hub.asked["create"] > 1


@pytest.mark.parametrize("endpoint", ["create", "preupload", "put", "commit", "info"])
def test_a_silent_hub_is_given_up(hub, out, slept, monkeypatch, endpoint):
    """Without a limit of ours the client would wait for ever."""
    monkeypatch.setattr(uploads, "SILENCE", 0.02)
    monkeypatch.setattr(uploads, "WAITS", (1.0,))
    hub.fail(endpoint, HANG)
    with pytest.raises(HubError, match=r"ReadTimeout.*Check the network"):
        push_to_hub(out, "me/small")


def test_a_hub_that_wakes_up(hub, out, slept, monkeypatch):
    monkeypatch.setattr(uploads, "SILENCE", 0.05)
    hub.fail("commit", HANG, times=1)
    push_to_hub(out, "me/small")
    assert arrived(hub) == contents(out)


def test_the_clients_own_settings_come_back(hub, out):
    hub.fail("commit", 403)
    get_session()
    for _ in range(2):
        with pytest.raises(HubError):
            push_to_hub(out, "me/small")
    assert get_session().timeout.read is None
    assert len(get_session().event_hooks["request"]) == 1
    assert not get_session().event_hooks["response"]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, out):
    hub.fail("commit", RESET, times=1, late=True)
    push_to_hub(out, "me/small")
    assert len(hub.repos["models/me/small"].commits) == 2
    assert arrived(hub) == contents(out)


def test_somebody_else_commits_meanwhile(hub, out, monkeypatch):
    real = fakehub.Handler.on_preupload

    def meanwhile(handler, body, kind, name, revision):
        repo = hub.repos[f"{kind}/{name}"]
        if len(repo.commits) == 1:
            repo.commit({**repo.files, "LICENSE": b"theirs"}, "by somebody else")
        real(handler, body, kind, name, revision)

    monkeypatch.setattr(fakehub.Handler, "on_preupload", meanwhile)
    push_to_hub(out, "me/small")
    assert arrived(hub) == {**contents(out), "LICENSE": b"theirs"}
    assert len(hub.repos["models/me/small"].commits) == 3
    assert hub.asked["commit"] == 2  # the first did not know of theirs and was refused


@pytest.mark.parametrize("status", [409, 412])
def test_somebody_else_commits_all_the_time(hub, out, status):
    hub.fail("commit", status)
    with pytest.raises(HubError, match="Somebody else is changing the repository"):
        push_to_hub(out, "me/small")
    assert hub.asked["commit"] == 4


def test_an_interrupted_upload_is_finished_by_the_same_call(hub, out, monkeypatch):
    from huggingface_hub import _commit_api

    real = _commit_api.lfs_upload
    done = []

    def interrupted(**given):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(given)
        return real(**given)

    monkeypatch.setattr(_commit_api, "lfs_upload", interrupted)
    before = contents(out)
    weights = [name for name in before if name.endswith(".safetensors")]
    with pytest.raises(KeyboardInterrupt):
        push_to_hub(out, "me/small")
    assert len(hub.repos["models/me/small"].commits) == 1
    assert get_session().timeout.read is None
    monkeypatch.setattr(_commit_api, "lfs_upload", real)
    first = hub.asked["put"]
    assert 0 < first < len(weights)
    push_to_hub(out, "me/small")
    assert arrived(hub) == before == contents(out)
    large = {content for name, content in before.items() if fakehub.is_large(name, len(content))}
    assert hub.asked["put"] == len(large)  # each was sent once


def test_the_first_failure_of_the_network_is_told(out, monkeypatch, slept):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"ConnectError: .* Check the network"):
        push_to_hub(out, "me/small", token=TOKEN)
    assert slept == [1.0, 4.0, 16.0]


# --- the token -----------------------------------------------------------------------------------


def test_the_token_is_shown_nowhere(hub, out, caplog, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx2", "httpcore2", "llm_pruner"):
        caplog.set_level(logging.DEBUG, logger=name)
    told = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for endpoint in ("put", "commit"):
            hub.fail(endpoint, 403, body={"error": f"{TOKEN} may not"}, times=1)
            with pytest.raises(HubError) as caught:
                push_to_hub(out, "me/small")
            told.append("".join(traceback.format_exception(caught.value)))
        push_to_hub(out, "me/small")
    streams = "".join(capsys.readouterr())
    assert "***" in told[1]
    assert len(caplog.records) > 20  # the client has told something, with the headers of requests
    assert "<TOKEN>" in caplog.text
    logged = [f"{record.__dict__} {record.getMessage()}" for record in caplog.records]
    for text in (*told, *logged, streams, *(str(warning.message) for warning in warned)):
        assert TOKEN not in text
    for name, content in contents(tmp_path).items():
        assert TOKEN.encode() not in content, name
    for content in hub.repos["models/me/small"].files.values():
        assert TOKEN.encode() not in content


def test_the_token_goes_to_the_hub_alone(hub, out):
    """The store of the large files is another host, which gets addresses that are signed."""
    push_to_hub(out, "me/small")
    names = {endpoint: {h.get("Authorization", h.get("authorization")) for h in seen}
             for endpoint, seen in hub.seen.items()}  # fmt: skip
    assert names.pop("put") == {None}
    assert set.union(*names.values()) == {f"Bearer {TOKEN}"}


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(saved, tmp_path, monkeypatch, capsys):
    """Run the command on the tiny model; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    texts = [" ".join(WORDS[i % 9 : i % 9 + 9]) + WORDS[i] for i in range(12)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))

    def run(*words):
        code = main(["--model", str(saved), "--device", "cpu", *words])
        return code, *capsys.readouterr()

    level = logger.level
    yield run
    logger.setLevel(level)


def test_the_command_prunes_on_disk_and_pushes(hub, command, tmp_path):
    code, text, err = command("--layers", "2,4", "--push-to-hub", "me/small", "--output", "o")
    assert code == 0, err
    assert text.endswith(f"Uploaded: {hub.url}/me/small\n")
    assert arrived(hub) == contents(tmp_path / "o")
    assert hub.repos["models/me/small"].private


def test_the_command_searches_and_pushes_and_shows_no_token(hub, command, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    words = ["--strategy", "ablation", "--n-layers", "2", "--eval-dataset", "texts.txt"]
    words += ["--n-samples", "4", "--push-to-hub", "me/small", "--output", "o"]
    code, text, err = command(*words)
    assert code == 0, err
    assert text.endswith(f"Uploaded: {hub.url}/me/small\n")
    assert arrived(hub) == contents(tmp_path / "o")
    written = contents(tmp_path)
    assert {"o/pruning_report.json", "o/pruning_plan.json", "o.journal.jsonl"} <= set(written)
    assert not [name for name, content in written.items() if TOKEN.encode() in content]
    assert TOKEN not in f"{text}{err}{caplog.text}"


def test_json_is_alone_on_stdout(hub, command):
    code, text, err = command(
        "--layers", "2,4", "--json", "--push-to-hub", "me/small", "--output", "o"
    )
    assert code == 0
    assert text.startswith("{")
    assert "Uploaded" not in text
    assert f"Uploaded: {hub.url}/me/small" in err


def test_a_failed_push_keeps_the_result_and_says_how_to_repeat_it(hub, command, tmp_path):
    hub.fail("commit", 403)
    code, text, err = command("--layers", "2,4", "--push-to-hub", "me/small", "--output", "o")
    assert code == 5
    assert "Uploaded" not in text
    assert "error: Cannot upload to model 'me/small'" in err
    assert "Traceback" not in err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "o").config.num_hidden_layers == 6
    hub.faults.clear()
    python, flag, program = shlex.split(err.split("upload alone: ")[1])
    assert (python, flag) == ("python", "-c")
    exec(program)
    assert arrived(hub) == contents(tmp_path / "o")


def test_an_interrupted_push_says_so(hub, command, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_pruner.cli.push_to_hub", stop)
    code, _, err = command("--layers", "2,4", "--push-to-hub", "me/small", "--output", "o")
    assert code == 130
    assert how_to_repeat("o", "me/small") in err
    assert (tmp_path / "o" / "config.json").exists()


def test_the_command_checks_before_it_works(hub, command, tmp_path, monkeypatch):
    before = contents(tmp_path)
    words = ("--layers", "2,4", "--output", "o", "--push-to-hub")
    code, _, err = command(*words, "a/b/c")
    assert (code, "A repository id is" in err) == (5, True)
    for idle in ("--dry-run", "--sweep"):
        choice = ["--sweep", "2"] if idle == "--sweep" else ["--dry-run", "--layers", "2"]
        code, _, err = command(*choice, "--push-to-hub", "me/small")
        assert (code, f"--push-to-hub has no effect with {idle}" in err) == (2, True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = command(*words, "me/small")
    assert (code, "hf auth login" in err) == (5, True)
    assert "upload alone" not in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, _, err = command(*words, "me/small")
    assert (code, "HF_HUB_OFFLINE" in err) == (5, True)
    assert not hub.asked
    assert contents(tmp_path) == before


def test_only_the_first_process_pushes(hub, command, monkeypatch):
    monkeypatch.setattr("llm_pruner.cli.rank", lambda: 1)
    code, _, _ = command("--layers", "2,4", "--push-to-hub", "me/small", "--output", "o")
    assert code == 0
    assert not hub.asked


def test_the_parser_has_no_option_for_a_token(capsys):
    with pytest.raises(SystemExit):
        main(["--model", "demo", "--token", TOKEN])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--token" not in capsys.readouterr().out


def test_bytes_arrive_as_a_dataset(hub):
    files = {"data.jsonl": b"{}\n", "README.md": b"# x\n"}
    given = {"message": "first", "private": True, "token": None}
    url = upload(files, "me/items", "dataset", **given)
    assert url == f"{hub.url}/datasets/me/items"
    repo = hub.repos["datasets/me/items"]
    assert {**files, ".gitattributes": repo.files[".gitattributes"]} == repo.files
    assert (repo.private, repo.messages[-1]) == (True, "first")
