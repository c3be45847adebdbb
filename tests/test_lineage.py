"""Pruning a pruned model: the numbers of the original's layers, on both roads, and `--show`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_llama, word_tokenizer

from llm_pruner import cli, get_strategy, prune_checkpoint
from llm_pruner.errors import InvalidPlanError
from llm_pruner.report.summary import lineage_text, runs_text
from llm_pruner.results import PruningPlan
from llm_pruner.storage.manifest import Manifest


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """A model of 8 layers, without 2 and 5, and that without 1 and 3 (which are 1 and 4)."""
    folder = tmp_path_factory.mktemp("cuts")
    model, tokenizer = tiny_llama(), word_tokenizer()
    model.save_pretrained(folder / "full")
    tokenizer.save_pretrained(folder / "full")
    prune_checkpoint(folder / "full", [2, 5], folder / "once")
    prune_checkpoint(folder / "once", [1, 3], folder / "twice")
    return folder


def plan_of(folder: Path) -> PruningPlan:
    return PruningPlan.load(folder / "pruning_plan.json")


def test_the_layers_of_the_original_are_known_after_two_cuts(cuts):
    plan = plan_of(cuts / "twice")
    assert plan.origin == (0, 1, 3, 4, 6, 7)
    assert [plan.origin[layer] for layer in plan.remove] == [1, 4]
    assert [cut["remove"] for cut in plan.lineage] == [[2, 5]]
    full = str(cuts / "full")
    assert plan.lineage[0]["model_id"] == full
    assert lineage_text(plan) == (
        f"That is layers 1 and 4 of the original 8 ({full}), of which 1-2 and 4-5 are gone now."
    )
    assert plan_of(cuts / "once").lineage == []
    assert Manifest.load(cuts / "twice" / "pruning_manifest.json").origin == plan.origin
    assert Manifest.load(cuts / "once" / "pruning_manifest.json").origin == ()
    card = (cuts / "twice" / "README.md").read_text()
    assert "layers 1 and 4 of the original 8" in card


def test_a_model_in_memory_knows_where_it_comes_from(cuts):
    from llm_pruner import load_model

    model, tokenizer = load_model(str(cuts / "twice"), device="cpu")
    pruner = get_strategy("bi")(model, tokenizer)
    plan = pruner.manual_plan([1], "third")
    assert plan.origin == (0, 3, 6, 7)
    assert [cut["remove"] for cut in plan.lineage] == [[2, 5], [1, 3]]
    chosen = pruner.plan(["the cat sat on a mat", "one red bird"], n_layers=1)
    assert chosen.lineage == plan.lineage
    again = PruningPlan.from_json(chosen.to_json())
    assert again == chosen
    assert "these are layers" in str(chosen)


def test_a_plan_beside_another_model_is_not_its_lineage(cuts, tmp_path, caplog):
    shutil.copytree(cuts / "full", tmp_path / "full")
    shutil.copy(cuts / "twice" / "pruning_plan.json", tmp_path / "full")
    prune_checkpoint(tmp_path / "full", [1], tmp_path / "out")
    assert plan_of(tmp_path / "out").lineage == []
    (tmp_path / "full" / "pruning_plan.json").write_text("{}")
    prune_checkpoint(tmp_path / "full", [1], tmp_path / "other")
    assert "was pruned from" in caplog.text
    assert plan_of(tmp_path / "other").lineage == []


@pytest.mark.parametrize(
    "lineage",
    [
        [{"model_id": "x", "num_layers": 8, "remove": [1]}],
        [{"model_id": "x", "num_layers": 8, "remove": [9, 1]}],
        [{"model_id": "x", "num_layers": "8", "remove": [1, 2]}],
        [{"model_id": 5, "num_layers": 8, "remove": [1, 2]}],
        [{"num_layers": 8}],
        [5],
    ],
)
def test_a_damaged_lineage_is_refused(lineage):
    data = json.loads(PruningPlan("x", 6, (1,)).to_json()) | {"lineage": lineage}
    with pytest.raises(InvalidPlanError):
        PruningPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("layers", "text"),
    [([3], "3"), ([3, 4], "3-4"), ([20, 21, 22, 25, 27], "20-22, 25 and 27"), ([1, 3], "1 and 3")],
)
def test_neighbours_are_said_together(layers, text):
    assert runs_text(layers) == text


def test_what_was_done_to_a_folder_is_shown(cuts, capsys):
    assert cli.main(["--show", str(cuts / "twice")]) == 0
    text = capsys.readouterr().out
    assert "Removed 2 of 6 layers (0-based): [1, 3]  [manual]" in text
    assert "layers 1 and 4 of the original 8" in text
    assert f"Made from {cuts / 'once'} (6 layers)." in text
    command = text.splitlines()[-1].split()
    assert command[:3] == ["llm-pruner", "--model", str(cuts / "once")]
    assert command[3:5] == ["--plan", str(cuts / "twice" / "pruning_plan.json")]
    assert cli.main(["--show", str(cuts / "twice"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["remove"] == [1, 3]
    assert cli.main(["--show", str(cuts)]) == 3
    assert "llm-pruner has not made it" in capsys.readouterr().err.replace(
        "llm_pruner", "llm-pruner"
    )


def test_the_command_that_is_shown_makes_the_same_again(cuts, capsys, tmp_path):
    assert cli.main(["--show", str(cuts / "once")]) == 0
    command = capsys.readouterr().out.splitlines()[-1].split()
    output = tmp_path / "again"
    assert cli.main([*command[1:-1], str(output)]) == 0
    same = [(folder / "model.safetensors").read_bytes() for folder in (output, cuts / "once")]
    assert same[0] == same[1]
