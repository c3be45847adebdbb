"""What was loaded from a checkpoint is written as that checkpoint without the layers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import items, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

from llm_pruner import AVSSPruner, SmartPruner, load_model, prune_checkpoint
from llm_pruner.checkpoint.save import check_saveable
from llm_pruner.errors import LoadError, UnsupportedModelError
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.storage.manifest import Manifest

REMOVED = [2, 5]
OWN = {"README.md", "pruning_manifest.json", "pruning_plan.json"}


def published(folder: Path, model, tokenizer, **fields) -> Path:
    """A checkpoint in the spelling of its time, with files around it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    if rope := values.pop("rope_parameters", None):
        values["rope_theta"], values["rope_scaling"] = rope["rope_theta"], None
    (folder / "config.json").write_text(json.dumps({**values, **fields}))
    (folder / "1_Pooling").mkdir()
    for name in ("LICENSE", "1_Pooling/config.json", "vocab.txt"):
        (folder / name).write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in found.items() if name not in OWN}


def values(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def source(tokenizer, tmp_path) -> Path:
    return published(tmp_path / "source", tiny_llama().bfloat16(), tokenizer)


@pytest.fixture
def on_disk(source, tmp_path) -> Path:
    prune_checkpoint(source, REMOVED, tmp_path / "disk")
    return tmp_path / "disk"


def save(source: Path, out: Path, change=lambda model: None, **options) -> Manifest:
    model, tokenizer = load_model(str(source), device="cpu", **options)
    change(model)
    SmartPruner(model, tokenizer).prune_and_save(REMOVED, out, "m")
    return Manifest.load(out / "pruning_manifest.json")


def test_both_roads_write_the_same_bytes(source, on_disk, tmp_path):
    manifest = save(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(on_disk)
    assert manifest.from_memory == ()
    assert values(on_disk)["rope_theta"] == 10000.0
    assert "rope_parameters" not in values(on_disk)


def test_names_of_an_older_layout_are_kept(tokenizer, tmp_path):
    """The published GPT-2 names its tensors without the prefix that transformers adds."""
    config = GPT2Config(n_embd=32, n_layer=8, n_head=4, n_positions=64, vocab_size=64)
    source = published(tmp_path / "source", GPT2LMHeadModel(config), tokenizer, n_ctx=64)
    weights = load_file(source / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # which nobody loads any more
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(source, REMOVED, tmp_path / "disk")
    manifest = save(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "disk")
    assert manifest.from_memory == ()
    assert values(tmp_path / "out")["n_ctx"] == 64


def test_a_tensor_in_a_wider_type_than_the_model_is_kept_as_it_is(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    wide = "model.layers.3.mlp.up_proj.weight"
    weights[wide] = weights[wide].float() + 1e-6
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    manifest = save(source, tmp_path / "out")
    assert manifest.from_memory == ()
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], weights[wide])


def test_what_has_changed_since_it_was_loaded_comes_from_memory(source, on_disk, tmp_path):
    def change(model):
        with torch.no_grad():
            model.model.layers[3].mlp.down_proj.weight[0, 0] += 1

    manifest = save(source, tmp_path / "out", change)
    changed = "model.layers.2.mlp.down_proj.weight"
    assert manifest.from_memory == (changed,)
    got, want = (load_file(one / "model.safetensors") for one in (tmp_path / "out", on_disk))
    assert {name for name in want if not torch.equal(got[name], want[name])} == {changed}
    assert got.keys() == want.keys()
    assert values(tmp_path / "out") == values(on_disk)


def test_healed_weights_come_from_memory_and_the_rest_from_the_source(source, on_disk, tmp_path):
    model, tokenizer = load_model(str(source), device="cpu", dtype="float32")
    out = tmp_path / "out"
    SmartPruner(model, tokenizer).prune_and_save(
        REMOVED, out, "m", heal="linear", heal_data=items(40)
    )
    assert values(out) == {**values(on_disk), "torch_dtype": "float32"}
    assert contents(out).keys() == contents(on_disk).keys()


def test_another_type_of_weights_is_written_and_named(source, on_disk, tmp_path):
    manifest = save(source, tmp_path / "out", dtype="float32")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert set(manifest.from_memory) == weights.keys()
    assert values(tmp_path / "out") == {**values(on_disk), "torch_dtype": "float32"}


def test_new_words_bring_their_tokenizer_and_their_count(source, tmp_path):
    model, tokenizer = load_model(str(source), device="cpu")
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(70)
    SmartPruner(model, tokenizer).prune_and_save(REMOVED, tmp_path / "out", "m")
    assert values(tmp_path / "out")["vocab_size"] == 70
    assert "<new>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    prune_checkpoint(source, REMOVED, tmp_path / "disk")
    mine, theirs = ((tmp_path / one / "LICENSE").read_bytes() for one in ("out", "disk"))
    assert mine == theirs


def test_pickled_weights_get_the_files_around_them(source, on_disk, tmp_path):
    state = load_file(source / "model.safetensors")
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    model, tokenizer = load_model(str(source), device="cpu")
    SmartPruner(model, tokenizer).prune_and_save(REMOVED, tmp_path / "out", "m")
    assert values(tmp_path / "out") == values(on_disk)
    mine, theirs = contents(tmp_path / "out"), contents(on_disk)
    assert mine.keys() == theirs.keys()
    same = {name for name in mine if mine[name] == theirs[name]}
    assert mine.keys() - same <= {"model.safetensors", "config.json"}


def test_a_model_of_another_class_than_its_checkpoint_is_written_as_what_it_is(source, tmp_path):
    model = AutoModel.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    AVSSPruner(model, tokenizer).prune_and_save(REMOVED, tmp_path / "out", "m")
    assert values(tmp_path / "out")["architectures"] == ["LlamaModel"]


HEADS = {
    "reward": (LlamaForSequenceClassification, AutoModelForSequenceClassification),
    "embedding": (LlamaModel, AutoModel),
}


@pytest.mark.parametrize("kind", HEADS)
def test_other_heads_are_cut_on_both_roads(kind, tokenizer, tmp_path):
    cls, auto = HEADS[kind]
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=1,
        initializer_range=0.2,
    )
    source = published(tmp_path / "source", cls(config), tokenizer)
    prune_checkpoint(source, REMOVED, tmp_path / "disk", verify=True)
    model, own = load_model(str(source), device="cpu")
    assert type(model) is cls
    AVSSPruner(model, own).prune_and_save(REMOVED, tmp_path / "out", "m")
    assert contents(tmp_path / "out") == contents(tmp_path / "disk")
    ids = torch.arange(3, 15)[None]
    reloaded = auto.from_pretrained(tmp_path / "out")
    with torch.no_grad(), LayerStack(model).bypass(REMOVED):
        assert torch.equal(reloaded(ids)[0], model(ids)[0])
    plan = AVSSPruner(model, own).plan(items(), n_layers=2)
    assert len(plan.remove) == 2
    for refused in (
        lambda: SmartPruner(model, own).plan(items(), n_layers=2),
        lambda: AVSSPruner(model, own).plan(items(), n_layers=2, held_out=items(8)[6:]),
    ):
        with pytest.raises(UnsupportedModelError, match="has no language model's head"):
            refused()


def test_adapters_have_to_be_merged_first(tokenizer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        SmartPruner(model, tokenizer)
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        LayerStack(model)
    SmartPruner(model.merge_and_unload(), tokenizer)


def quantised(model, method="fancy"):
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    return model


def test_a_quantised_model_is_written_from_the_bytes_of_its_checkpoint_or_not_at_all(
    source, on_disk, tokenizer, tmp_path
):
    model, _ = load_model(str(source), device="cpu")
    assert check_saveable(quantised(model), 8) is not None
    with pytest.raises(UnsupportedModelError, match="quantised with fancy cannot be healed"):
        check_saveable(model, 8, heals=True)
    with pytest.raises(UnsupportedModelError, match="holds none in safetensors format"):
        check_saveable(quantised(tiny_llama()), 8)
    del model.hf_quantizer
    check_saveable(model, 8, heals=True)
    fields = {**values(source), "quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModelError, match="quantised with fp8 cannot be healed"):
        check_saveable(model, 8, heals=True)


def test_a_model_that_is_not_a_decoder_is_refused_in_plain_words(tmp_path):
    for model_type, words in (("t5", "an encoder-decoder model"), ("vit", "a vit model")):
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(UnsupportedModelError, match=f"is {words}: only decoder-only"):
            load_model(str(folder))
    with pytest.raises(LoadError):
        load_model(str(tmp_path / "nothing"))


def test_the_reloaded_output_is_the_pruned_model(source, tmp_path):
    save(source, tmp_path / "out")
    model, ids = AutoModelForCausalLM.from_pretrained(source), torch.arange(3, 15)[None]
    with torch.no_grad(), LayerStack(model).bypass(REMOVED):
        want = model(ids).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert torch.equal(got, want)


def test_blocks_for_further_tokens_stay_or_go_on_both_roads(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    weights |= {"model.layers.8.eh_proj.weight": torch.ones(3), "mtp.fc.weight": torch.ones(2)}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    fields = {**values(source), "num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(fields))
    model, tokenizer = load_model(str(source), device="cpu")
    pruner = SmartPruner(model, tokenizer)
    plan = pruner.manual_plan(REMOVED, "m")
    for drop in (False, True):
        disk, out = tmp_path / f"disk{drop}", tmp_path / f"out{drop}"
        prune_checkpoint(source, REMOVED, disk, drop_mtp=drop, verify=True)
        pruner.prune_and_save(REMOVED, out, "m", plan=replace(plan, drop_mtp=drop))
        assert contents(out) == contents(disk)
        names = load_file(out / "model.safetensors").keys()
        blocks = {"model.layers.6.eh_proj.weight", "mtp.fc.weight"}
        assert names & blocks == (set() if drop else blocks)
        assert values(out)["num_nextn_predict_layers"] == (0 if drop else 1)


def test_an_output_that_this_machine_cannot_load_is_kept(source, tmp_path, caplog):
    """Where the library that runs quantised weights is missing."""
    fields = {**values(source), "quantization_config": {"quant_method": "compressed-tensors"}}
    (source / "config.json").write_text(json.dumps(fields))
    with patch.dict(sys.modules, {"compressed_tensors": None}):
        prune_checkpoint(source, REMOVED, tmp_path / "out", verify=True)
    assert "could not be reloaded on this machine, and is kept" in caplog.text
    assert Manifest.load(tmp_path / "out" / "pruning_manifest.json").sha256
