"""GGUF from end to end: loaded, scored with any strategy, cut, reported."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import gguf
import pytest
import torch
from gguf_twin import write_demo_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_pruner import BlockInfluencePruner, check_manifest, load_model
from llm_pruner.checkpoint.gguf import read_gguf_model
from llm_pruner.cli import main
from llm_pruner.errors import InvalidPlanError, LoadError, UnsupportedModelError
from llm_pruner.goals.budget import serving_of
from llm_pruner.results import PruningPlan, PruningReport
from llm_pruner.storage.safetensors_files import read_checkpoint
from llm_pruner.storage.sources import LocalFolder

pytestmark = pytest.mark.slow
LAYERS = [2, 7, 8]


@pytest.fixture(scope="session")
def file(tmp_path_factory):
    return write_demo_gguf(tmp_path_factory.mktemp("gguf") / "demo.Q8_0.gguf")


@pytest.fixture(scope="session")
def loaded(file):
    return load_model(str(file), device="cpu")


def logits(model):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[1, 40, 50, 60, 70, 80]]), use_cache=False).logits


def tensors(path):
    return {tensor.name: bytes(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def assert_is_cut(path, original, removed):
    kept = [index for index in range(12) if index not in removed]
    whole, cut = tensors(original), tensors(path)
    wanted = {}
    for name, data in whole.items():
        if name.startswith("blk."):
            _, index, rest = name.split(".", 2)
            if int(index) in removed:
                continue
            name = f"blk.{kept.index(int(index))}.{rest}"
        wanted[name] = data
    assert cut == wanted


def test_it_is_the_model_that_was_converted(loaded):
    model, tokenizer = loaded
    demo, words = load_model("demo", device="cpu")
    torch.testing.assert_close(logits(model), logits(demo))
    assert tokenizer.chat_template == words.chat_template


def test_the_command_chooses_cuts_and_reports(file, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", str(file), "--strategy", "bi", "--n-layers", "3", "--device", "cpu"]
    words += ["--eval-dataset", "demo", "--n-samples", "10", "--output", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    report = PruningReport.load(out / "pruning_report.json")
    path = out / "demo.Q8_0-pruned.gguf"
    assert_is_cut(path, file, report.plan.remove)
    assert report["weights"].after * 1e6 == check_manifest(out).bytes_after
    assert "cache per token" not in report
    assert not [row for row in report.comparisons if row.group == "speed"]
    assert report["perplexity"].after > report["perplexity"].before
    assert "Serving: right in llama.cpp." in printed
    assert f"Checkpoint, in GGUF, re-read: {out}" in printed
    card = (out / "README.md").read_text()
    assert "llama-cli -m path/to/demo.Q8_0-pruned.gguf" in card
    assert "library_name: gguf" in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.S)
    names: dict = {}
    exec(code.replace("path/to", str(out)), names)
    torch.testing.assert_close(logits(names["model"]), logits(load_model(str(path))[0]))
    assert "Speed was not measured: transformers computes" in " ".join(printed.split())
    assert "Speed was not measured" in (out / "report.html").read_text()
    assert (out / "report.html").exists()
    again, _ = load_model(str(path), device="cpu")
    model, tokenizer = load_model(str(file), device="cpu")
    pruned = BlockInfluencePruner(model, tokenizer).layers.remove(report.plan.remove)
    torch.testing.assert_close(logits(again), logits(pruned))


def test_a_plan_travels_from_scoring_to_the_cut(file, tmp_path, capsys):
    words = ["--model", str(file), "--strategy", "pruneme", "--n-layers", "3", "--dry-run"]
    words += ["--eval-dataset", "demo", "--n-samples", "6", "--device", "cpu", "--json"]
    assert main(words) == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert {"tensors", "weights"} <= plan.model.keys()
    out = tmp_path / "out"
    words = ["--model", str(file), "--plan", str(tmp_path / "plan.json"), "--output", str(out)]
    assert main([*words, "--verify"]) == 0
    assert_is_cut(out / "demo.Q8_0-pruned.gguf", file, plan.remove)
    assert "every byte compared, re-read" in capsys.readouterr().out


def test_in_a_script(file, loaded, tmp_path):
    model, tokenizer = loaded
    pruner = BlockInfluencePruner(model, tokenizer)
    out = tmp_path / "out"
    pruned, _ = pruner.prune_and_save(LAYERS, out, str(file))
    assert_is_cut(out / "demo.Q8_0-pruned.gguf", file, LAYERS)
    assert len(pruned.model.layers) == 9
    with pytest.raises(UnsupportedModelError, match="MergeKit does not read GGUF"):
        pruner.export_mergekit_yaml(LAYERS, tmp_path / "recipe.yaml", str(file))
    with pytest.raises(InvalidPlanError, match=r"a model in GGUF is for llama\.cpp"):
        BlockInfluencePruner(model, tokenizer, serve_with=["vllm"])
    assert BlockInfluencePruner(model, tokenizer, serve_with=["llama.cpp"]).removable.most == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_healed_it_is_a_folder_of_safetensors(file, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", str(file), "--eval-dataset", "demo", "--strategy", "bi", "--n-layers", "3"]
    words += ["--n-samples", "12", "--heal", "linear", "--output", str(out)]
    assert main(words) == 0
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "pruning_plan.json"} <= names
    assert not any(name.endswith(".gguf") for name in names)
    assert json.loads((out / "pruning_plan.json").read_text())["healing"]["accepted"]
    model, tokenizer = load_model(str(out), device="cpu")
    assert len(model.model.layers) == 9
    assert (
        tokenizer("Where does Ida live?")["input_ids"]
        == (load_model(str(file), device="cpu")[1]("Where does Ida live?")["input_ids"])
    )
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    card = (out / "README.md").read_text()
    assert "AutoModelForCausalLM" in card
    assert "llama-cli" not in card
    weights = PruningReport.load(out / "pruning_report.json")["weights"]
    assert 1e6 * weights.before == read_gguf_model([file]).checkpoint.bytes
    assert 1e6 * weights.after == read_checkpoint(LocalFolder(out)).bytes


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--n-layers 3 --max-memory 4GiB", 3, "Leave --max-memory out"),
        ("--target-size 2MB --heal linear", 3, "Leave --target-size out"),
        ("--n-layers 3 --export-yaml recipe.yaml", 3, "MergeKit does not read it"),
        ("--layers 2,3 --output pruned.gguf", 4, "must be a folder, into which a pruned GGUF"),
        ("--layers 2,3 --link", 2, "is for safetensors"),
        ("--layers 2,99", 2, "99"),
        ("--n-layers 3 --strategy bi --serve-with mlx", 2, "is for llama.cpp"),
    ],
)
def test_what_cannot_be_is_refused(file, tmp_path, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(tmp_path)
    data = [] if "--layers" in words else ["--eval-dataset", "demo", "--n-samples", "4"]
    assert main(["--model", str(file), "--device", "cpu", *data, *words.split()]) == code
    assert message in (told := capsys.readouterr().err)
    assert "serve-with" in words or "Loading" not in told
    assert not any(tmp_path.iterdir())


def test_a_model_that_a_script_loaded_with_transformers_is_one_in_gguf_too(file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    BlockInfluencePruner(model, tokenizer).prune_and_save(LAYERS, tmp_path / "out", str(file))
    assert_is_cut(tmp_path / "out" / "demo.Q8_0-pruned.gguf", file, LAYERS)


def test_layers_that_transformers_takes_for_others_are_not_scored(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_block_count(4)
    for index in range(4):
        writer.add_tensor(f"blk.{index}.attn_norm.weight", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kinds = ["sliding_attention", "full_attention"]
    values = {"model_type": "gpt_oss", "num_hidden_layers": 4, "layer_types": kinds * 2}
    config = SimpleNamespace(_name_or_path=str(path), to_dict=lambda: values)
    assert serving_of(SimpleNamespace(config=config), []) is not None
    values["layer_types"] = kinds[::-1] * 2
    with pytest.raises(LoadError, match=r"reads sliding-window attention .* otherwise than llama"):
        serving_of(SimpleNamespace(config=config), [])


def test_an_architecture_that_transformers_does_not_read_can_still_be_cut(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "smollm3")
    writer.add_block_count(2)
    for index in range(2):
        writer.add_tensor(f"blk.{index}.attn_norm.weight", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoadError, match=r"'smollm3', so it cannot be scored.*--layers"):
        load_model(str(path))


def test_a_split_model_is_scored_as_one(file, loaded, tmp_path):
    whole = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(tmp_path / "demo.gguf", "llama", split_max_tensors=40)
    for key, entry in whole.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind, *rest = entry.types
            writer.add_key_value(key, entry.contents(), kind, rest[0] if rest else None)
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 2
    model, _ = load_model(str(parts[1]), device="cpu")
    torch.testing.assert_close(logits(model), logits(loaded[0]), rtol=0, atol=0)


def test_json_of_the_fix(file, tmp_path, capsys):
    """A Llama model needs no fixing."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 12, "architectures": []}
    (folder / "config.json").write_text(json.dumps(config))
    before = file.read_bytes()
    assert main(["--model", str(folder), "--fix-gguf", str(file)]) == 0
    assert "says everything already" in capsys.readouterr().out
    assert main(["--model", str(folder), "--fix-gguf", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == []
    assert file.read_bytes() == before
