"""Uploads to a simulated hub: what arrives, what is refused, what an error says."""

from __future__ import annotations

import logging
import shlex
import shutil
import time
import traceback
import warnings

import fakehub
import pytest
import torch
from conftest import WORDS, tiny_llama
from fakehub import RESET
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_pruner import prune_checkpoint, push_to_hub
from llm_pruner.cli import main
from llm_pruner.errors import HubError, OutputError
from llm_pruner.hub import check_upload, how_to_repeat
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
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with fakehub.running_hub(monkeypatch, tmp_path / "cache") as server:
        server.token = TOKEN
        yield server


def contents(folder):
    """The files of a folder by their names on the hub."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def arrived(hub, repo="models/me/small"):
    """The files of the repository's last commit, except what the hub adds."""
    files = dict(hub.repos[repo].files)
    assert files.pop(".gitattributes")
    return files


# --- what arrives --------------------------------------------------------------------------------


@pytest.fixture(params=["legacy", "pipelined"])
def path(request, hub, monkeypatch):
    """Both ways in which huggingface_hub uploads a folder; files go to xet in neither."""
    hub.takes_large = request.param == "legacy"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", hub.takes_large)
    return request.param


def test_a_folder_arrives_whole_private_and_in_one_commit(hub, path, out):
    before = contents(out)
    assert len([name for name in before if name.endswith(".safetensors")]) > 1
    assert push_to_hub(out, "me/small") == f"{hub.url}/me/small"
    assert arrived(hub) == before == contents(out)
    repo = hub.repos["models/me/small"]
    assert (repo.private, len(repo.commits)) == (True, 2)
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


def test_what_is_there_is_not_sent_again(hub, path, out):
    push_to_hub(out, "me/small")
    puts = hub.asked["put"]
    assert push_to_hub(out, "me/small")
    assert (hub.asked["put"], len(hub.repos["models/me/small"].commits)) == (puts, 2)
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    push_to_hub(out, "me/small")
    assert (hub.asked["put"], len(hub.repos["models/me/small"].commits)) == (puts, 3)
    assert arrived(hub) == contents(out)


def test_stale_weights_are_deleted_and_other_files_stay(hub, path, out):
    push_to_hub(out, "me/small")
    repo = hub.repos["models/me/small"]
    others = {"LICENSE": b"mine", "onnx/model.bin": b"another", "notes.txt": b"x"}
    stale = {"model.safetensors": b"old", "pytorch_model.bin": b"older", "a[0].bin": b"oldest"}
    repo.commit({**repo.files, **others, **stale}, "by hand")
    push_to_hub(out, "me/small")
    assert arrived(hub) == {**contents(out), **others}
    assert AutoModelForCausalLM.from_pretrained("me/small").config.num_hidden_layers == 6


def test_a_public_repository_stays_public_with_a_warning(hub, out, saved, caplog):
    hub.add("me/small", saved)
    push_to_hub(out, "me/small")
    assert "already exists and stays public" in caplog.text
    assert hub.repos["models/me/small"].private is False


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
    assert push_to_hub(out, "me/more", token=f" {TOKEN}\n")
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


# --- a hub that fails ----------------------------------------------------------------------------


REFUSALS = [
    ("create", 401, {}, "hf auth login"),
    ("create", 403, {}, "hf auth login"),
    ("preupload", 401, {}, "hf auth login"),
    ("commit", 403, {}, "hf auth login"),
    ("put", 403, {}, "hf auth login"),
    ("preupload", 404, {"X-Error-Code": "RepoNotFound"}, "'name' or 'organisation/name'"),
    ("commit", 404, {}, "'name' or 'organisation/name'"),
    ("commit", 403, {"X-Error-Code": "GatedRepo"}, "is gated: request access"),
    ("commit", 400, {}, "does not accept it"),
    ("validate-yaml", 400, {}, "does not accept it"),
    ("batch", 422, {}, "does not accept it"),
    ("commit", 409, {}, "being changed by somebody else"),
    ("create", 500, {}, "busy or down"),
    ("commit", 429, {}, "busy or down"),
]


@pytest.mark.parametrize(("endpoint", "status", "headers", "advice"), REFUSALS)
def test_a_refusal_says_what_to_do(hub, out, endpoint, status, headers, advice):
    (out / "README.md").write_text("---\ntags: [x]\n---\n")
    hub.fail(endpoint, status, headers=headers)
    before = contents(out)
    with pytest.raises(HubError, match=advice) as caught:
        push_to_hub(out, "me/small")
    assert hub.asked[endpoint] <= 5  # the files of one upload, each once
    message = str(caught.value)
    assert message.startswith("Cannot upload to model 'me/small': ")
    assert (str(status) if status != 400 else "Bad request") in message
    assert message.endswith(how_to_repeat(out, "me/small"))
    assert contents(out) == before
    assert not hub.repos.get("models/me/small") or len(hub.repos["models/me/small"].commits) == 1


def test_a_token_that_may_write_but_not_create_suffices(hub, out):
    push_to_hub(out, "me/small")
    (out / "config.json").write_text("{}")
    hub.fail("create", 403)
    push_to_hub(out, "me/small")
    assert arrived(hub) == contents(out)


@pytest.mark.parametrize("endpoint", ["preupload", "batch", "put"])
@pytest.mark.parametrize("status", [503, RESET])
def test_a_failure_that_passes_is_retried(hub, out, endpoint, status):
    hub.fail(endpoint, status, times=2)
    push_to_hub(out, "me/small")
    assert arrived(hub) == contents(out)
    assert len(hub.repos["models/me/small"].commits) == 2


@pytest.mark.parametrize("endpoint", ["create", "preupload", "batch", "put", "commit", "info"])
@pytest.mark.parametrize("status", [503, RESET])
def test_one_that_lasts_is_an_error_and_the_same_call_finishes(hub, out, endpoint, status):
    hub.fail(endpoint, status)
    advice = "busy or down" if status == 503 else "Check the network"
    with pytest.raises(HubError, match=advice):
        push_to_hub(out, "me/small")
    hub.faults.clear()
    push_to_hub(out, "me/small")
    assert arrived(hub) == contents(out)
    if endpoint == "commit":  # what had arrived was not sent again
        assert hub.asked["put"] == sum(
            fakehub.is_large(name, len(content)) for name, content in contents(out).items()
        )


def test_without_a_network(out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"ConnectError: .* Check the network"):
        push_to_hub(out, "me/small", token=TOKEN)


def test_the_token_is_shown_nowhere(hub, out, caplog, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    for name in (None, "huggingface_hub", "httpx2", "httpcore2", "llm_pruner"):
        caplog.set_level(logging.DEBUG, logger=name)
    shown = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for endpoint in ("put", "commit"):
            hub.fail(endpoint, 403, body={"error": f"{TOKEN} may not"}, times=1)
            with pytest.raises(HubError) as caught:
                push_to_hub(out, "me/small")
            shown.append("".join(traceback.format_exception(caught.value)))
        push_to_hub(out, "me/small")
    assert "***" in shown[1]
    assert "<TOKEN>" in caplog.text  # the client logs its requests with their headers
    shown += [f"{record.__dict__} {record.getMessage()}" for record in caplog.records]
    shown += [*capsys.readouterr(), *(str(warning.message) for warning in warned)]
    assert not [text for text in shown if TOKEN in text]
    kept = {**contents(tmp_path), **hub.repos["models/me/small"].files}
    assert not [name for name, content in kept.items() if TOKEN.encode() in content]


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(saved, tmp_path, monkeypatch, capsys):
    """Run the command on the tiny model; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    texts = [" ".join(WORDS[i % 9 : i % 9 + 9]) + WORDS[i] for i in range(12)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))

    def run(*words, to="me/small"):
        words = ["--model", str(saved), "--device", "cpu", *words, "--push-to-hub", to]
        return main([*words, "--output", "o"]), *capsys.readouterr()

    level = logger.level
    yield run
    logger.setLevel(level)


def test_the_command_prunes_on_disk_and_pushes(hub, command, tmp_path):
    code, text, err = command("--layers", "2,4")
    assert code == 0, err
    assert text.endswith(f"Uploaded: {hub.url}/me/small\n")
    assert arrived(hub) == contents(tmp_path / "o")
    assert hub.repos["models/me/small"].private
    code, text, err = command("--layers", "2,4", "--json", "--overwrite")
    assert (code, text[0], "Uploaded" in text) == (0, "{", False)
    assert f"Uploaded: {hub.url}/me/small" in err


def test_the_command_searches_and_pushes_and_shows_no_token(hub, command, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    words = ["--strategy", "ablation", "--n-layers", "2", "--eval-dataset", "texts.txt"]
    code, text, err = command(*words, "--n-samples", "4")
    assert code == 0, err
    assert arrived(hub) == contents(tmp_path / "o")
    written = contents(tmp_path)
    assert {"o/pruning_report.json", "o/pruning_plan.json", "o.journal.jsonl"} <= set(written)
    assert not [name for name, content in written.items() if TOKEN.encode() in content]
    assert TOKEN not in f"{text}{err}{caplog.text}"


def test_a_failed_push_keeps_the_result_and_says_how_to_repeat_it(hub, command, tmp_path):
    hub.fail("commit", 403)
    code, text, err = command("--layers", "2,4")
    assert (code, "Uploaded" in text, "Traceback" in err) == (5, False, False)
    assert "error: Cannot upload to model 'me/small'" in err
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
    code, _, err = command("--layers", "2,4")
    assert code == 130
    assert how_to_repeat("o", "me/small") in err
    assert (tmp_path / "o" / "config.json").exists()


def test_the_command_checks_before_it_works(hub, command, tmp_path, monkeypatch):
    before = contents(tmp_path)
    code, _, err = command("--layers", "2,4", to="a/b/c")
    assert (code, "A repository id is" in err) == (5, True)
    for idle in (["--dry-run", "--layers", "2"], ["--sweep", "2"]):
        code, _, err = command(*idle)
        assert (code, f"--push-to-hub has no effect with {idle[0]}" in err) == (2, True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = command("--layers", "2,4")
    assert (code, "hf auth login" in err, "upload alone" in err) == (5, True, False)
    assert not hub.asked
    assert contents(tmp_path) == before


def test_only_the_first_process_pushes(hub, command, monkeypatch):
    monkeypatch.setattr("llm_pruner.cli.rank", lambda: 1)
    assert command("--layers", "2,4")[0] == 0
    assert not hub.asked
