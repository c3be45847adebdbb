"""Checkpoints: complete and plain, verified by reloading; MergeKit recipes."""

from __future__ import annotations

import copy
import json
import resource
from collections import namedtuple
from functools import partial

import pytest
import torch
import yaml
import zoo
from conftest import N_LAYERS, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from llm_pruner import SmartPruner, load_model
from llm_pruner.checkpoint import save, verify
from llm_pruner.checkpoint.mergekit import write_mergekit_yaml
from llm_pruner.checkpoint.verify import verify_checkpoint, verify_removal
from llm_pruner.errors import InvalidPlanError, LoadError, OutputError, VerificationError
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.output_rules import PLAN_FILE
from llm_pruner.results import PruningPlan
from llm_pruner.utils import count_bytes

IDS = torch.arange(3, 15).reshape(1, 12)


@pytest.fixture
def pruner(llama, tokenizer):
    return SmartPruner(llama, tokenizer)


def assert_same_logits(model, other):
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, other(IDS).logits)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_output_is_a_complete_plain_checkpoint(pruner, tokenizer, tmp_path):
    out = tmp_path / "out"
    pruned, same = pruner.prune_and_save([2, 5], out, "some/model")
    assert same is tokenizer
    names = "config generation_config tokenizer tokenizer_config".split()
    assert {*(f"{name}.json" for name in names), "model.safetensors", PLAN_FILE} <= {*tree(out)}
    assert_same_logits(AutoModelForCausalLM.from_pretrained(out), pruned)
    assert AutoTokenizer.from_pretrained(out)("the cat sat") == tokenizer("the cat sat")
    plan = PruningPlan.load(out / PLAN_FILE)
    assert (plan.remove, plan.model_id) == ((2, 5), "some/model")
    assert list(tmp_path.iterdir()) == [out], "no staging folder is left"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_tied_weights_are_kept(tokenizer, tmp_path, dtype):
    model = tiny_llama(tie_word_embeddings=True).to(dtype)
    pruned, _ = SmartPruner(model, tokenizer).prune_and_save([3], tmp_path / "out", "m")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert reloaded.dtype == dtype
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert pruned.lm_head.weight is model.lm_head.weight


def test_an_earlier_output_is_replaced_when_asked(pruner, tmp_path):
    out = tmp_path / "out"
    pruner.prune_and_save([2], out, "m")
    with pytest.raises(OutputError, match="not empty"):
        pruner.prune_and_save([3, 4], out, "m")
    assert PruningPlan.load(out / PLAN_FILE).remove == (2,)
    pruner.prune_and_save([3, 4], out, "m", overwrite=True)
    assert PruningPlan.load(out / PLAN_FILE).remove == (3, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("room", [1_500, 100_000], ids=["tokenizer", "weights"])
def test_a_failure_in_the_middle_leaves_the_old_output(pruner, tmp_path, monkeypatch, room):
    """tokenizers and safetensors have errors of their own for a write that is refused."""
    out = tmp_path / "out"
    pruner.prune_and_save([2], out, "m")
    before = {path: (out / path).read_bytes() for path in tree(out)}
    assert 1_500 < len(before["tokenizer.json"]) < 100_000
    assert len(before["model.safetensors"]) > 100_000
    if room == 1_500:  # which comes after the weights
        monkeypatch.setattr(save, "write_model", lambda model, folder: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OutputError, match=r"Writing .*out' failed: .*too large.*Nothing was"):
            pruner.prune_and_save([3], out, "m", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: (out / path).read_bytes() for path in tree(out)} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_room_on_the_disk_is_looked_at_before_anything_is_written(pruner, tmp_path, monkeypatch):
    need = count_bytes(pruner.layers.remove([2]))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(0, 0, need - 1))
    monkeypatch.setattr(save, "write_model", lambda model, folder: pytest.fail("written"))
    with pytest.raises(OutputError, match=f"needs {need:,} bytes, and {need - 1:,} are free"):
        pruner.prune_and_save([2], tmp_path / "out", "m")
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(0, 0, need))
    pruner.prune_and_save([2], tmp_path / "out", "m")


WEIGHT = "model.layers.1.mlp.down_proj.weight"


def damage_weights(folder, factor=1.01):
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop(WEIGHT)
    if factor:
        tensors[WEIGHT] = weight * factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def set_in_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, "compute something else"),
        (partial(damage_weights, factor=None), f"1 missing_keys, such as {WEIGHT}"),
        (partial(set_in_config, num_hidden_layers=N_LAYERS - 1), "unexpected_keys"),
        (partial(set_in_config, model_type="nothing-known"), "does not load: ValueError"),
    ],
)
def test_verification_finds_damage(llama, tmp_path, damage, message):
    assert verify.TOLERANCE[torch.float32] <= 2e-5
    llama.save_pretrained(tmp_path)
    verify_checkpoint(tmp_path, llama)
    damage(tmp_path)
    with pytest.raises(VerificationError, match=message):
        verify_checkpoint(tmp_path, llama)


def test_a_failed_verification_leaves_no_output(pruner, tmp_path, monkeypatch):
    write = type(pruner.model).save_pretrained

    def write_and_damage(self, folder, **options):
        write(self, folder, **options)
        damage_weights(folder)

    monkeypatch.setattr(type(pruner.model), "save_pretrained", write_and_damage)
    with pytest.raises(VerificationError, match="compute something else"):
        pruner.prune_and_save([3], tmp_path / "out", "m")
    assert list(tmp_path.iterdir()) == []


def test_verification_in_memory_finds_a_wrong_layer_and_a_wrong_slot(llama):
    stack = LayerStack(llama)
    verify_removal(stack, [3], stack.remove([3]))
    with pytest.raises(VerificationError, match="bypassed original, given text, compute"):
        verify_removal(stack, [3], stack.remove([4]))
    stale = stack.remove([3])
    for layer in stale.model.layers[3:]:
        layer.self_attn.layer_idx -= 1
    with pytest.raises(VerificationError, match="with and without cache"):
        verify_removal(stack, [3], stale)


def test_nan_weights_do_not_pass(llama):
    with torch.no_grad():
        llama.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    stack = LayerStack(llama)
    with pytest.raises(VerificationError, match="relative difference nan"):
        verify_removal(stack, [5], stack.remove([5]))


@pytest.mark.parametrize(
    ("removed", "ranges"),
    [
        ([3, 4], [[0, 3], [5, 8]]),
        ([0], [[1, 8]]),
        ([7], [[0, 7]]),
        ([1, 3], [[0, 1], [2, 3], [4, 8]]),
        ([0, 1, 6, 7], [[2, 6]]),
    ],
)
def test_mergekit_recipe(llama, tmp_path, removed, ranges):
    path = tmp_path / "deep" / "recipe.yaml"
    write_mergekit_yaml(LayerStack(llama.half()), removed, path, "some/model")
    slices = [{"sources": [{"model": "some/model", "layer_range": pair}]} for pair in ranges]
    recipe = {"slices": slices, "merge_method": "passthrough", "dtype": "float16"}
    assert yaml.safe_load(path.read_text()) == recipe


def test_mergekit_refusals(llama, tmp_path):
    with pytest.raises(InvalidPlanError, match="removes nothing"):
        write_mergekit_yaml(LayerStack(llama), [], tmp_path / "r.yaml", "m")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"Cannot write .*Not a directory"):
        write_mergekit_yaml(LayerStack(llama), [2], tmp_path / "file" / "r.yaml", "m")


def test_a_wrapper_is_loaded_pruned_and_written_with_its_processor(tokenizer, tmp_path):
    """A vision-language model: its text decoder is pruned, everything else carried along."""
    model = zoo.build_wrapper("llava")
    model.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "preprocessor_config.json").write_text('{"image_processor_type": "X"}')
    loaded, own = load_model(str(tmp_path / "in"), device="cpu")
    pruned, _ = SmartPruner(loaded, own).prune_and_save([2, 3], tmp_path / "out", "m")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text().endswith('"X"}')
    assert_same_logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "out"), pruned)


def test_mergekit_users_are_warned_of_configs_it_does_not_adapt(tmp_path, caplog):
    write_mergekit_yaml(LayerStack(zoo.build("llama")), [2], tmp_path / "r.yaml", "m")
    assert not caplog.text
    write_mergekit_yaml(LayerStack(zoo.build("qwen3")), [2], tmp_path / "r.yaml", "m")
    assert "MergeKit will write a wrong config" in caplog.text
    assert "layer_types must change too" in caplog.text


CUSTOM_CODE = {
    "configuration_tiny.py": """
from transformers import LlamaConfig

class TinyConfig(LlamaConfig):
    model_type = "tinycustom"
""",
    "modeling_tiny.py": """
from transformers import LlamaForCausalLM
from .configuration_tiny import TinyConfig

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
""",
}


def test_custom_code_travels_with_the_checkpoint(llama, tokenizer, tmp_path, monkeypatch):
    """The output loads without the folder it was made from; code runs only when asked for."""
    source = tmp_path / "custom"
    llama.save_pretrained(source)
    tokenizer.save_pretrained(source)
    for name, code in CUSTOM_CODE.items():
        (source / name).write_text(code)
    names = {"AutoConfig": "configuration_tiny.TinyConfig"}
    names["AutoModelForCausalLM"] = "modeling_tiny.TinyForCausalLM"
    architectures = ["TinyForCausalLM"]
    set_in_config(source, model_type="tinycustom", auto_map=names, architectures=architectures)

    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(LoadError, match=r"code of its own.*--trust-remote-code"):
        load_model(str(source), device="cpu")
    model, own = load_model(str(source), device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "TinyForCausalLM"
    pruned, _ = SmartPruner(model, own).prune_and_save([2, 5], tmp_path / "out", "m")
    source.rename(tmp_path / "away")
    again, _ = load_model(str(tmp_path / "out"), device="cpu", trust_remote_code=True)
    assert type(again).__name__ == "TinyForCausalLM"
    assert len(again.model.layers) == 6
    assert_same_logits(again, pruned)


def test_code_nobody_trusted_is_not_referred_to(pruner, tmp_path):
    """The class of transformers was used, so the output must load as such, trusted or not."""
    pruner.model.config.auto_map = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    pruner.prune_and_save([3], tmp_path / "out", "m")
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


def test_masked_logits_do_not_hide_a_difference(llama):
    """Some models give tokens that may not be generated the lowest number there is."""
    stack = LayerStack(llama)
    right, wrong = stack.remove([3]), stack.remove([4])
    for model in (llama, right, wrong):
        head = model.lm_head = copy.deepcopy(model.lm_head)
        head.register_forward_hook(lambda module, args, output: mask(output, slice(5, 9)))
    verify_removal(stack, [3], right)
    with pytest.raises(VerificationError, match="given text, compute something else"):
        verify_removal(stack, [3], wrong)
    right.lm_head.register_forward_hook(lambda module, args, output: mask(output, slice(9, 10)))
    with pytest.raises(VerificationError, match="relative difference inf"):
        verify_removal(stack, [3], right)


def mask(logits, tokens):
    logits = logits.clone()
    logits[..., tokens] = torch.finfo(logits.dtype).min
    return logits
