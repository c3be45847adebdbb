"""The command line as a request: what is read, refused, and needs no model to be told."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from llm_pruner.cli_arguments import parse_request
from llm_pruner.cli_checks import check_request
from llm_pruner.errors import (
    HubError,
    InvalidPlanError,
    LoadError,
    MissingDependencyError,
    OutputError,
    UnknownNameError,
)
from llm_pruner.goals.budget import Budget


def parsed(words: str, model: str = "nobody/no-such-model"):
    return parse_request(["--model", model, *words.split()])


def test_a_request_is_typed_and_frozen():
    request = parsed(
        "--layers 7,2 --protect 1,0 --max-memory 4GiB --option contiguous=false --option name=x"
    )
    assert request.layers == (7, 2)
    assert parsed("--layers 9,2-4,-1").layers == (9, 2, 3, 4, -1)
    assert request.protect == (1, 0)
    assert request.max_memory == 4 * 2**30
    assert request.option == {"contiguous": False, "name": "x"}
    assert request.words[-1] == "name=x"
    with pytest.raises(FrozenInstanceError):
        request.layers = ()


def test_the_defaults():
    request = parsed("")
    assert (request.strategy, request.output, request.n_samples) == (
        "smart",
        "./pruned_model",
        None,
    )
    assert (request.n_samples, request.n_tokens, request.max_length) == (None, None, 512)
    assert request.time is None
    assert request.budget == Budget()
    assert request.needs_model
    assert request.writes_model
    assert str(request.beside("journal.jsonl")) == "pruned_model.journal.jsonl"


def test_amounts_are_one_budget():
    assert parsed("--ratio 0.25").budget == Budget(ratio=0.25)
    both = parsed("--n-layers 3 --tolerance 0.1").budget
    assert both == Budget(n_layers=3, tolerance=0.1)


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        ("--layers 3", False),
        ("--plan p.json --verify --link", False),
        ("--layers 3 --eval-dataset x", True),
        ("--layers 3 --heal linear", True),
        ("--layers 3 --visualize", True),
        ("--layers 3 --export-yaml x.yaml", True),
        ("--layers 3 --dtype float32", True),
        ("--layers 3 --dry-run", True),
        ("--layers 3 --layers-path tower.blocks", True),
        ("--n-layers 3", True),
    ],
)
def test_what_needs_the_model_in_memory(words, needs):
    assert parsed(words).needs_model == needs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ratio 0", "ratio=0.0 must lie between 0 and 1, e.g. 0.25"),
        ("--ratio 1.5", "ratio=1.5 must lie between 0 and 1"),
        ("--n-layers 0", "--n-layers: '0' must be a whole number of at least 1"),
        ("--n-samples 0", "--n-samples: '0' must be a whole number of at least 1"),
        ("--batch-size x", "--batch-size: 'x' must be a whole number of at least 1"),
        ("--threshold nan", "threshold=nan must be a number"),
        ("--tolerance -1", "tolerance=-1.0 must be a number from 0, e.g. 0.015"),
        ("--seed -1", "--seed: '-1' must be a whole number from 0 to 4294967295"),
        ("--protect 1", "--protect: '1' must be two whole numbers, A,B"),
        (
            "--layers 5-3",
            "--layers: '5-3' must be layers separated by commas, e.g. 3,7,11 or 3,7-11",
        ),
        ("--layers 3-", "--layers: '3-' must be layers separated by commas"),
        ("--layers 0-999999999999", "--layers: '0-999999999999' must be layers"),
        ("--max-memory 4pies", "--max-memory: '4pies' must be a size of memory, e.g. 4GiB, 500MB"),
        ("--option contiguous", "--option: 'contiguous' must be NAME=VALUE"),
        ("--heal twice", "--heal: invalid choice: 'twice'"),
        ("--modle x", "unrecognized arguments: --modle x. Did you mean --model? See llm-pruner"),
        ("--outptu=x --zzz", "--outptu=x --zzz. Did you mean --output? See"),
        ("lonely", "unrecognized arguments: lonely. See llm-pruner --help-all"),
        ("--layers 3 --ratio 0.2", "--layers and --ratio exclude each other: give one"),
        ("--n-layers 3 --threshold 0.2", "n_layers and threshold exclude each other: give one"),
        ("--sweep 3 --heal linear --heal-every 2", "--heal-every and --sweep exclude each other"),
        ("--device auto --max-memory 1GiB", "--max-memory and --device auto exclude each other"),
        ("--layers 3 --heal-steps 9", "--heal-steps has no effect without --heal lora"),
        ("--layers 3 --heal linear --heal-steps 9", "no effect without --heal lora"),
        ("--layers 3 --heal-data x.jsonl", "--heal-data has no effect without --heal linear"),
        ("--layers 3 --heal-time 9m", "--heal-time has no effect without --heal linear"),
        ("--layers 3 --heal-tokens 9", "--heal-tokens has no effect without --heal linear"),
        ("--layers 3 --heal linear --heal-time 9x", "--heal-time: '9x' must be a time, e.g. 90s"),
        ("--layers 3 --heal linear --heal-time 0s", "--heal-time: '0s' must be a time"),
        ("--n-layers 3 --heal-every 2", "--heal-every has no effect without --heal linear"),
        ("--layers 3 --heal linear --heal-every 2", "for layers that --strategy smart chooses"),
        ("--strategy avss --ratio 0.25 --heal linear --heal-every 2", "--strategy smart chooses"),
        ("--sweep 2 --tolerance 0.1", "--tolerance has no effect with --sweep"),
        ("--sweep 2 --heal linear", "--heal has no effect with --sweep"),
        ("--sweep 2 --export-yaml x.yaml", "--export-yaml has no effect with --sweep"),
        ("--sweep 2 --push-to-hub a/b", "--push-to-hub has no effect with --sweep"),
        ("--dry-run --push-to-hub a/b", "--push-to-hub has no effect with --dry-run"),
        ("--layers 3 --tolerance 0.1", "--tolerance has no effect with --layers"),
        ("--plan p.json --objective kl", "--objective has no effect with --plan"),
        ("--layers 3 --eval-dataset x --verify", "--verify is for pruning on disk"),
        ("--n-layers 3 --link", "--link is for pruning on disk"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(words, message):
    with pytest.raises(InvalidPlanError) as caught:
        parsed(words)
    assert message in str(caught.value)


def test_a_model_is_required():
    with pytest.raises(InvalidPlanError, match=r"--model is required: .* see llm-pruner --help"):
        parse_request([])


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("--strategy smrt", UnknownNameError, "Unknown strategy 'smrt'. Did you mean 'smart'?"),
        ("--strategy none.py:X", LoadError, "Strategy file 'none.py' does not exist"),
        ("--output /proc/x/y", OutputError, "Output folder '/proc/x/y' cannot be written"),
        ("--output here", OutputError, "--output here is the model itself"),
        ("--push-to-hub a/b/c", HubError, "a/b/c"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(words, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    (tmp_path / "here").mkdir()
    with pytest.raises(error) as caught:
        check_request(parsed(words, model=str(tmp_path / "here")))
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_a_path_of_which_there_is_nothing_is_no_model(tmp_path):
    with pytest.raises(LoadError, match=r"There is no folder or file '.*gone': name one"):
        check_request(parsed("--n-layers 2", model=str(tmp_path / "gone")))


def test_training_needs_peft(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llm_pruner\[heal\]'"):
        check_request(parsed("--heal lora"))


def test_the_short_help_names_what_most_people_need_and_where_the_rest_is(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_request(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 80
    found = {word.strip(",") for word in text.split("examples:")[0].split() if word[:2] == "--"}
    assert {"--model", "--n-layers", "--target-size", "--output", "--heal", "--show"} <= found
    assert not found & {"--drop-mtp", "--layers-path", "--timeout", "--option", "--link"}
    assert "All options: llm-pruner --help-all" in text


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        ("--ratio 25%", {"ratio": 0.25}),
        ("--ratio 0.3 --ratio-of bytes", {"ratio": 0.3, "ratio_of": "bytes"}),
        ("--target-size 400MB", {"target_size": 400_000_000}),
        ("--target-params 1.1B", {"target_params": 1_100_000_000}),
        ("--target-params 250k", {"target_params": 250_000}),
        ("--target-speedup 1.3", {"target_speedup": 1.3}),
        ("--target-speedup prefill=2", {"target_speedup": 2.0, "speedup_of": "prefill"}),
        ("--target-memory 6GiB --context 8192", {"target_memory": 6 * 2**30, "context": 8192}),
        (
            "--max-drop arc_easy=0.02,perplexity=10% --confident",
            {"max_drop": {"arc_easy": "0.02", "perplexity": "10%"}, "confident": True},
        ),
        (
            "--target-size 1GB --tolerance 0.1 --n-layers 3",
            {"target_size": 10**9, "tolerance": 0.1, "n_layers": 3},
        ),
    ],
)
def test_goals_are_read(words, budget):
    assert parsed(words).budget.given == Budget(**budget).given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ratio 0.3x", "--ratio: '0.3x' must be a share, e.g. 0.25 or 25%"),
        ("--target-params many", "'many' must be a number, e.g. 100M"),
        ("--target-speedup write=2", "'write=2' must be a factor"),
        ("--max-drop arc_easy", "must be figures and drops"),
        ("--max-drop arc_easy=-1", "'arc_easy=-1' must be figures and drops"),
        ("--target-size 1MB --threshold 0.1", "threshold and target_size exclude each other"),
        ("--target-size 1MB --layers 3", "--target-size has no effect with --layers"),
        ("--target-size 1MB --sweep 3", "--target-size has no effect with --sweep"),
        ("--ratio-of bytes --n-layers 2", "--ratio-of has no effect without --ratio"),
        ("--context 8 --n-layers 2", "--context has no effect without --target-memory"),
        ("--confident --n-layers 2", "--confident has no effect without --max-drop"),
        ("--fields prompt", "must be fields and their names"),
        ("--fields prompt=q", "--fields has no effect without --eval-dataset"),
        ("--objective tasks", "--objective tasks needs --tasks"),
        ("--tasks arc_easy --dry-run", "--tasks has no effect with --dry-run"),
    ],
)
def test_goals_and_data_that_cannot_be_asked_for_are_refused(words, message):
    with pytest.raises(InvalidPlanError) as caught:
        parsed(words)
    assert message in str(caught.value)


def test_what_is_shown_needs_no_model():
    assert parse_request(["--show", "out", "--json"]).show == "out"
    with pytest.raises(InvalidPlanError, match="--show goes alone, or with --json: leave"):
        parse_request(["--show", "out", "--output", "x"])


def test_files_of_objectives_and_tasks_are_looked_for_before_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ("--objective none.py:f", "--objective nll=1,none.py:f=1"):
        with pytest.raises(LoadError, match=r"Objective file 'none.py' does not exist"):
            check_request(parsed(words))
    with pytest.raises(LoadError, match=r"--tasks rows/arc_easy.jsonl: there is no such file"):
        check_request(parsed("--tasks rows/arc_easy.jsonl,hellaswag"))


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_request(["--help-all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    contract = """--model --strategy --output --eval-dataset --n-samples --ratio --threshold
    --tolerance --export-yaml --visualize --device --n-layers --layers --protect --objective
    --heal --plan --dry-run --resume --json --overwrite --seed --dtype --trust-remote-code
    --quiet"""
    assert all(option in text for option in contract.split())
    assert "./pruned_model" in text


def test_engines_add_up_and_a_dry_run_fixes_nothing():
    request = parsed("--serve-with llama.cpp --serve-with vllm,llama.cpp")
    assert request.serve_with == ("llama.cpp", "vllm")
    assert parsed("").serve_with == ()
    with pytest.raises(InvalidPlanError, match="--dry-run has no effect with --fix-gguf"):
        parsed("--fix-gguf model.gguf --dry-run")
