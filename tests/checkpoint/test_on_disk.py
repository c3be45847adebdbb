"""Pruning on disk: the checkpoint that pruning in memory writes, from bytes alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import slicing
import torch
import zoo
from conftest import tiny_llama
from fakehub import running_hub
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llm_pruner import LayerStack, PruningPlan, SmartPruner
from llm_pruner.checkpoint import on_disk
from llm_pruner.checkpoint.on_disk import (
    MANIFEST_FILE,
    check_manifest,
    prune_checkpoint,
)
from llm_pruner.checkpoint.save import write_model
from llm_pruner.config.config_file import (
    SPELLED_OUT,
    NeedsMemoryError,
    is_spelled_out,
    prune_config_file,
)
from llm_pruner.errors import (
    InvalidPlanError,
    LoadError,
    OutputError,
    UnsupportedModelError,
    VerificationError,
)
from llm_pruner.report.console import manifest_text
from llm_pruner.storage import content_hash
from llm_pruner.storage.manifest import Manifest, tensor_origin
from llm_pruner.storage.safetensors_files import header_bytes, read_checkpoint, tensor_hashes
from llm_pruner.storage.sources import (
    INDEX_FILE,
    SINGLE_FILE,
    LocalFolder,
    open_source,
    with_all_files,
)

REMOVED = (1, 3)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(*folders: Path) -> Set[str]:
    """That two checkpoints hold the same tensors; their names."""
    got, want = map(tensors, folders)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    return got.keys()


@contextmanager
def last_file(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of the last file, which the block changes; the index follows."""
    file = sorted(folder.glob("*.safetensors"))[-1]
    stored = load_file(file)
    yield stored
    save_file(stored, file)
    index = json.loads((folder / INDEX_FILE).read_text())
    others = {name: where for name, where in index["weight_map"].items() if where != file.name}
    index["weight_map"] = others | dict.fromkeys(stored, file.name)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def config(folder: Path) -> dict[str, object]:
    found = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in found.items() if key != "transformers_version"}


@pytest.fixture
def source(tokenizer, tmp_path):
    """A tiny Llama in several shards, with tokenizer and files of other kinds."""
    folder = tmp_path / "source"
    tiny_llama().save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    (folder / "more").mkdir()
    for name in ("LICENSE", "more/notes.txt", "pytorch_model.bin"):
        (folder / name).write_text("read by nobody")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize(
    "model_type",
    "llama gpt2 gemma3_text mixtral qwen3 deepseek_v3 jamba granitemoehybrid xlm bart".split(),
)
def test_the_result_is_that_of_pruning_in_memory(model_type, tmp_path):
    model = zoo.build(model_type)
    write_model(model, tmp_path / "source")
    write_model(LayerStack(model).remove(REMOVED), tmp_path / "memory")
    manifest = prune_checkpoint(tmp_path / "source", REMOVED, tmp_path / "disk")
    assert len(assert_same(tmp_path / "memory", tmp_path / "disk")) == manifest.tensors
    assert config(tmp_path / "memory") == config(tmp_path / "disk")


@pytest.mark.parametrize("model_type", ["beam", "zamba2", "inkling2_text"])
def test_what_needs_other_weights_is_left_to_memory(model_type, tmp_path):
    write_model(zoo.build(model_type), tmp_path / "source")
    with pytest.raises(NeedsMemoryError, match=r"prune_and_save, which loads the model"):
        prune_checkpoint(tmp_path / "source", REMOVED, tmp_path / "disk")
    assert os.listdir(tmp_path) == ["source"]


def test_what_no_config_can_express_is_refused(tmp_path):
    write_model(zoo.build("gemma3n_text"), tmp_path / "source")
    with pytest.raises(UnsupportedModelError):
        prune_checkpoint(tmp_path / "source", (3,), tmp_path / "disk")


@pytest.mark.parametrize("model_type", sorted(SPELLED_OUT.keys() & CONFIG_MAPPING.keys()))
@pytest.mark.parametrize("removed", [(1, 3), (0, 4, 5)])
def test_a_config_without_its_class_is_that_of_its_class(model_type, removed, tmp_path):
    """The slow road builds the model from the pruned config and compares every attribute."""
    model = zoo.build(model_type)
    model.config.save_pretrained(tmp_path)
    values = LocalFolder(tmp_path).read_json("config.json")
    kept = [index for index in range(zoo.N_LAYERS) if index not in removed]
    assert is_spelled_out(values, zoo.N_LAYERS)
    got = prune_config_file(values, kept, zoo.N_LAYERS)
    want = LayerStack(model).remove(removed).config
    found, wanted = type(want).from_dict(got).to_dict(), want.to_dict()
    differing = {name for name in wanted if wanted[name] != found.get(name)}
    assert differing <= {"transformers_version", "_name_or_path", "dtype"}


def test_the_card_is_ours_with_the_metadata_of_the_sources(source, tmp_path):
    """And no report of the source is taken for one of the output."""
    folder = shutil.copytree(source, tmp_path / "carded")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [chat]\n---\nThe whole model.\n")
    for name in ("report.html", "pruning_report.json"):
        (folder / name).write_text("old")
    prune_checkpoint(folder, REMOVED, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("license: mit", "- llm_pruner", "- chat", f"{len(REMOVED)} of"):
        assert text in card
    assert "The whole model" not in card
    assert not {"report.html", "pruning_report.json"} & set(os.listdir(tmp_path / "out"))


def test_lists_that_a_class_makes_up_are_left_to_the_class():
    values = {"model_type": "qwen3", "num_hidden_layers": 4, "use_sliding_window": True}
    assert not is_spelled_out(values, 4)
    steps = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "decoder_sparse_step": 1}
    assert is_spelled_out(steps, 4)
    assert not is_spelled_out({**steps, "decoder_sparse_step": 2}, 4)
    for more, left in [
        ({"use_sliding_window": False}, {"use_sliding_window": False}),
        ({"layer_types": ["a", "b", "c", "d"]}, {"layer_types": ["a", "d"]}),
    ]:
        assert is_spelled_out({**values, **more}, 4)
        pruned = prune_config_file({**values, **more}, [0, 3], 4)
        assert pruned == {**values, **left, "num_hidden_layers": 2}


def test_the_output_is_complete(source, tmp_path):
    out = tmp_path / "out"
    manifest = prune_checkpoint(source, REMOVED, out, verify=True)
    there = set(LocalFolder(out).files())
    assert {"LICENSE", "more/notes.txt", "tokenizer.json", "generation_config.json"} <= there
    assert "pytorch_model.bin" not in there
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    plan = PruningPlan.load(out / "pruning_plan.json")
    assert plan.remove == REMOVED
    assert plan.model == read_checkpoint(LocalFolder(source)).identity()
    assert manifest == Manifest.load(out / "pruning_manifest.json")
    removed = [x for name, x in tensors(source).items() if re.match(r"model\.layers\.[13]\.", name)]
    assert manifest.bytes_before - manifest.bytes_after == sum(x.nbytes for x in removed) > 0
    index = json.loads((out / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == manifest.bytes_after
    assert set(index["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}


def test_neither_torch_nor_the_model_is_loaded(source, tmp_path):
    code = (
        "import sys; from llm_pruner.checkpoint.on_disk import prune_checkpoint; "
        f"prune_checkpoint({str(source)!r}, [1, 3], {str(tmp_path / 'out')!r}); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_that_stay_can_be_linked(source, tmp_path):
    def stats(folder):
        return [path.stat() for path in sorted(folder.glob("*.safetensors"))]

    modes = [stat.st_mode for stat in stats(source)]
    prune_checkpoint(source, (7,), tmp_path / "linked", link=True)
    prune_checkpoint(source, (7,), tmp_path / "copied")
    assert_same(tmp_path / "linked", tmp_path / "copied")
    links = [stat.st_nlink for stat in stats(tmp_path / "linked")]
    assert (links[0], links[-1]) == (2, 1)
    assert {stat.st_nlink for stat in stats(tmp_path / "copied")} == {1}
    assert modes == [stat.st_mode for stat in stats(source)], "a linked file is the user's own"


def test_a_kernel_that_cannot_copy(source, tmp_path, monkeypatch):
    def unable(*args):
        raise OSError(95, "Operation not supported")

    def written(name):
        prune_checkpoint(source, REMOVED, tmp_path / name)
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}

    copied = written("kernel")
    monkeypatch.setattr(os, "copy_file_range", unable, raising=False)
    assert written("sent") == copied
    monkeypatch.setattr(os, "sendfile", unable, raising=False)
    assert written("written") == copied


def test_names_of_modules_in_a_quantization_follow(source, tmp_path):
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] = {
        "ignore": ["lm_head", "model.layers.1.mlp", "model.layers.2.mlp.up_proj", "re:.*gate"],
        "by_name": {"model.layers.3.mlp": 4, "model.layers.4.mlp": 8},
        "bits": 4,
    }
    (source / "config.json").write_text(json.dumps(values))
    prune_checkpoint(source, REMOVED, tmp_path / "out")
    assert config(tmp_path / "out")["quantization_config"] == {
        "ignore": ["lm_head", "model.layers.1.mlp.up_proj", "re:.*gate"],
        "by_name": {"model.layers.2.mlp": 8},
        "bits": 4,
    }


def test_blocks_past_the_last_layer_follow_it(source, tmp_path):
    """Blocks that predict further tokens are stored behind the last layer."""
    values = json.loads((source / "config.json").read_text())
    values["num_nextn_predict_layers"] = 1
    with last_file(source) as stored:
        stored["model.layers.8.shared_head.weight"] = torch.ones(3)
    with pytest.raises(LoadError, match=r"its config counts 8 layers, and 9 are numbered"):
        prune_checkpoint(source, REMOVED, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(values))
    manifest = prune_checkpoint(source, REMOVED, tmp_path / "out", verify=True)
    assert "model.layers.6.shared_head.weight" in tensors(tmp_path / "out")
    text = manifest_text(manifest, PruningPlan("m", 8, REMOVED), "out")
    assert "Kept behind the last layer, for multi-token prediction: 1 tensors." in text
    assert "Not carried along: pytorch_model.bin." in text
    assert config(tmp_path / "out")["num_nextn_predict_layers"] == 1
    prune_checkpoint(source, REMOVED, tmp_path / "none", drop_mtp=True, verify=True)
    assert not any("shared_head" in name for name in tensors(tmp_path / "none"))
    assert config(tmp_path / "none")["num_nextn_predict_layers"] == 0


# Plans


def test_a_plan_is_carried_out_on_the_model_it_was_made_for(source, tokenizer, eval_data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source)
    plan = SmartPruner(model, tokenizer).plan(eval_data, n_layers=2, model_id="here")
    assert set(plan.model) == {"tensors", "weights", "sha256"}
    plan.save(tmp_path / "plan.json")
    prune_checkpoint(source, PruningPlan.load(tmp_path / "plan.json"), tmp_path / "out")
    assert PruningPlan.load(tmp_path / "out" / "pruning_plan.json") == plan
    SmartPruner(model, tokenizer).prune_and_save(plan.remove, tmp_path / "m", "here", plan=plan)


def test_a_plan_for_another_model_is_refused(source, tokenizer, eval_data, tmp_path):
    other = tiny_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    other.save_pretrained(tmp_path / "other")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    plan = SmartPruner(other, tokenizer).plan(eval_data, n_layers=2, model_id="other")
    with pytest.raises(InvalidPlanError, match=r"made for another model, 'other' \(weights"):
        prune_checkpoint(source, plan, tmp_path / "out")
    pruner = SmartPruner(AutoModelForCausalLM.from_pretrained(source), tokenizer)
    with pytest.raises(InvalidPlanError, match=r"made for another model.*score this one, or name"):
        pruner.prune_and_save(plan.remove, tmp_path / "out", "here", plan=plan)
    assert not (tmp_path / "out").exists()


def test_the_identity_does_not_depend_on_the_division_into_files(source, tmp_path):
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "one")
    first, second = (read_checkpoint(LocalFolder(f)) for f in (source, tmp_path / "one"))
    assert len(first.source.weight_files()) > 1 == len(second.source.weight_files())
    assert first.identity() == second.identity()


def test_identities_compare_what_both_sides_know():
    plan = PruningPlan("x", 8, (1,), model={"tensors": "t", "weights": "w", "revision": "r"})
    plan.check_model(8, {})
    plan.check_model(8, {"tensors": "t", "weights": "w", "revision": "another"})
    with pytest.raises(InvalidPlanError, match=r"revision r\)"):
        plan.check_model(8, {"tensors": "t", "revision": "another"})
    with pytest.raises(InvalidPlanError, match="8 layers"):
        plan.check_model(9, {})


# Damage


def header_with(change):
    """Damage that changes the header of a safetensors file, and leaves its bytes."""

    def damage(raw):
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        entries = [value for name, value in header.items() if name != "__metadata__"]
        text = change(entries, header) or json.dumps(header)
        return len(text).to_bytes(8, "little") + text.encode() + raw[8 + length :]

    return damage


def first_entry(**values):
    """Damage to the header's entry of the first tensor."""
    return header_with(lambda entries, header: entries[0].update(values))


def same_name_twice(entries, header):
    name = next(name for name in header if name != "__metadata__")
    return json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], r"tensors end at byte [\d,]+ and the file at"),
        (first_entry(data_offsets=[0, 4]), r"needs [\d,]+ bytes, and its offsets give it"),
        (header_with(lambda x, header: x[1].update(x[0])), r"begins at byte \d+, not at"),
        (first_entry(shape=[3]), r"needs [\d,]+ bytes, and its offsets give it"),
        (first_entry(shape=[-1, -8]), r"is damaged \(a negative or fractional number"),
        (first_entry(dtype="F7"), r"is damaged \('F7'\)"),
        (header_with(same_name_twice), r"not valid JSON: the key '.*' is twice"),
        (lambda raw: (2**63).to_bytes(8, "little") + raw[8:], r"claims a header of"),
        (lambda raw: raw[:8] + b"<html>" + raw[14:], r"not valid JSON"),
        (lambda raw: b"", r"it has 0 bytes"),
    ],
)
def test_a_damaged_shard_is_refused(source, tmp_path, damage, message):
    file = sorted(source.glob("*.safetensors"))[1]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(LoadError, match=message) as caught:
        prune_checkpoint(source, REMOVED, tmp_path / "out")
    assert file.name in str(caught.value)
    assert "Fetch the checkpoint again" in str(caught.value)
    assert os.listdir(tmp_path) == ["source"]


NOT_BESIDE = ["../source/model.safetensors", "/etc/passwd", "sub\\x.safetensors", "x.bin", 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda files, x=x: {**files, "x": x}, "not the name of a file") for x in NOT_BESIDE),
        (lambda files: {**files, "x": "x.safetensors"}, "'x.safetensors', which is not there"),
        (lambda files: dict(list(files.items())[1:]), "index says 'none'"),
        (lambda files: {**files, "more": min(files.values())}, "'more' is in no file"),
        (lambda files: None, "no 'weight_map'"),
    ],
)
def test_a_wrong_index_is_refused(source, tmp_path, change, message):
    index = json.loads((source / INDEX_FILE).read_text())
    index["weight_map"] = change(index["weight_map"])
    (source / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(LoadError, match=message):
        prune_checkpoint(source, REMOVED, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_a_tensor_in_two_files_is_refused(source, tmp_path):
    first, second = sorted(source.glob("*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)
    with pytest.raises(LoadError, match=rf"stands in '{first.name}' too"):
        prune_checkpoint(source, REMOVED, tmp_path / "out")


def test_a_file_that_shrinks_while_it_is_copied(source, tmp_path):
    checkpoint = read_checkpoint(LocalFolder(source))
    tensor = next(iter(checkpoint.tensors.values()))
    with open(source / tensor.file, "r+b") as file:
        file.truncate(tensor.end - 1)
    with (
        (tmp_path / "copy").open("wb") as target,
        pytest.raises(LoadError, match="it ends at byte"),
    ):
        checkpoint.source.copy(tensor.file, tensor.start, tensor.end, target)


def test_pickles_and_adapters_are_refused(source, tmp_path):
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match="merge it into the model first"):
        prune_checkpoint(source, REMOVED, tmp_path / "out")
    for file in (INDEX_FILE, *(path.name for path in source.glob("*.safetensors"))):
        (source / file).unlink()
    with pytest.raises(LoadError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        prune_checkpoint(source, REMOVED, tmp_path / "out")


def test_impossible_layers_and_folders_are_refused(source, tmp_path):
    for layers in ([8], [], [1, 1], range(8)):
        with pytest.raises(InvalidPlanError):
            prune_checkpoint(source, layers, tmp_path / "out")
    with pytest.raises(LoadError, match="There is no folder or file"):
        prune_checkpoint(tmp_path / "nothing", REMOVED, tmp_path / "out")
    with pytest.raises(OutputError, match="is not empty"):
        prune_checkpoint(source, REMOVED, source)


def test_a_manifest_finds_a_flipped_bit(source, tmp_path):
    prune_checkpoint(source, REMOVED, tmp_path / "out", verify=True)
    manifest = check_manifest(tmp_path / "out")
    assert len(manifest.sha256) == manifest.tensors
    file = tmp_path / "out" / min(manifest.files)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    last = list(load_file(file))[-1]
    with pytest.raises(VerificationError, match=r"Tensor '.*' in .* is not what its manifest"):
        check_manifest(tmp_path / "out")
    with pytest.raises(VerificationError, match=re.escape(last)):
        check_manifest(tmp_path / "out")


NORM = "model.norm.weight"


def _lost(stored):
    del stored[NORM]


def _added(stored):
    stored["more"] = torch.ones(3)


def _renamed(stored):
    stored["more"] = stored.pop(NORM)


def _of_another_dtype(stored):
    stored[NORM] = stored[NORM].bfloat16()


def _of_another_shape(stored):
    stored[NORM] = stored[NORM].reshape(2, -1)


@pytest.mark.parametrize("change", [_lost, _added, _renamed, _of_another_dtype, _of_another_shape])
def test_a_manifest_finds_another_tensor(source, tmp_path, change):
    """It names the file; the tensor, if it has hashes and its name or its bytes are others."""
    for name, verify in (("plain", False), ("hashed", True)):
        out = tmp_path / name
        prune_checkpoint(source, REMOVED, out, verify=verify)
        with last_file(out) as stored:
            change(stored)
        file = sorted(out.glob("*.safetensors"))[-1].name
        want = rf"File '{file}' in .* by their names, dtypes and shapes: prune again"
        if verify and change is not _of_another_shape:
            changed = "more" if change is _added else NORM
            want = rf"Tensor '{changed}' (is not in the|in .* is not what its) .*: prune again"
        with pytest.raises(VerificationError, match=want):
            check_manifest(out)


def test_a_manifest_finds_another_file(source, tmp_path):
    prune_checkpoint(source, REMOVED, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "one")
    shutil.copy(tmp_path / "out" / MANIFEST_FILE, tmp_path / "one")
    with pytest.raises(VerificationError, match=r"File 'model-0.*' is not in the checkpoint of"):
        check_manifest(tmp_path / "one")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "bart"])
def test_the_rule_of_a_manifest_says_where_every_tensor_came_from(model_type, tmp_path):
    """The slow road: the tensor of the source that has the same bytes."""
    model = zoo.build(model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # no two are alike, as norms may be
    write_model(model, tmp_path / "source")
    manifest = prune_checkpoint(tmp_path / "source", REMOVED, tmp_path / "out")
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "out")
    for name, tensor in after.items():
        same = {old for old, x in before.items() if x.shape == tensor.shape and x.equal(tensor)}
        assert same == {tensor_origin(manifest, name)}
    assert manifest.tensors == len(after)
    assert sum(entry["tensors"] for entry in manifest.files.values()) == len(after)
    healed = replace(manifest, from_memory=(name,))
    assert tensor_origin(Manifest.from_json(healed.to_json()), name) is None


def test_a_manifest_names_the_files_of_the_source(source, tmp_path):
    manifest = prune_checkpoint(source, REMOVED, tmp_path / "out")
    for file, entry in manifest.files.items():
        names = {tensor_origin(manifest, name) for name in load_file(tmp_path / "out" / file)}
        assert [names <= load_file(source / old).keys() for old in entry["from"]] == [True]


@pytest.mark.parametrize("removed", [REMOVED, (6, 7)])
def test_a_manifest_of_format_1_is_read(source, tmp_path, removed):
    """It had an entry for every tensor; made here by a road of its own."""
    out = tmp_path / "out"
    manifest = prune_checkpoint(source, removed, out, verify=True)
    old_files = {
        tensor: path.name for path in source.glob("*.safetensors") for tensor in load_file(path)
    }
    kept = [index for index in range(8) if index not in removed]
    entries = {}
    for name, file in json.loads((out / INDEX_FILE).read_text())["weight_map"].items():
        tensor = load_file(out / file)[name]
        parts = [kept[int(part)] if part.isdecimal() else part for part in name.split(".")]
        origin = ".".join(map(str, parts))
        entries[name] = {
            "file": file,
            "dtype": "F32",
            "shape": list(tensor.shape),
            "from": origin,
            "from_file": old_files[origin],
            "sha256": hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
        }
    body = json.loads(manifest.to_json())
    for new in ("prefixes", "files", "from_memory", "sha256"):
        del body[new]
    body |= {"format": "llm_pruner.manifest/1", "tensors": entries}
    (out / MANIFEST_FILE).write_text(json.dumps(body))
    read = check_manifest(out)
    assert replace(read, prefixes=manifest.prefixes) == manifest
    for name, entry in entries.items():
        assert tensor_origin(read, name) == tensor_origin(manifest, name) == entry["from"]


@pytest.mark.parametrize("field", ["from", "tensors", "layout"])
def test_a_damaged_manifest_is_refused(source, tmp_path, field):
    prune_checkpoint(source, REMOVED, tmp_path / "out")
    body = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    del next(iter(body["files"].values()))[field]
    (tmp_path / "out" / MANIFEST_FILE).write_text(json.dumps(body))
    with pytest.raises(InvalidPlanError, match=f"Damaged .* is listed without '{field}'"):
        check_manifest(tmp_path / "out")


# Many tensors


N_FILES = 12
FACTS_OF_A_TENSOR = 800  # bytes in memory: its name and its new name, an object, three tables


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A checkpoint of thousands of tensors of a few bytes."""
    folder = tmp_path_factory.mktemp("many") / "source"
    slicing.write_experts(folder, 5000, N_FILES)
    return folder


def test_files_are_opened_once_and_not_for_every_tensor(experts, monkeypatch):
    opened: Counter[str] = Counter()
    real = Path.open

    def counted(self, *args, **kwargs):
        opened[self.name] += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)
    checkpoint = read_checkpoint(LocalFolder(experts))
    weights = [file for file in opened if file.endswith(".safetensors")]
    assert len(weights) == N_FILES
    assert all(opened[file] <= 2 for file in weights), "the length of the header, and the header"
    assert opened[INDEX_FILE] == 1
    opened.clear()
    checkpoint.identity()
    assert opened == dict.fromkeys(weights, 1)
    opened.clear()
    assert len(list(tensor_hashes(checkpoint.source, checkpoint.tensors.values()))) > 4000
    assert opened == dict.fromkeys(weights, 1)


def test_an_identity_is_what_it_was_when_each_tensor_was_read_alone(experts):
    """Plans and journals hold it."""
    checkpoint = read_checkpoint(LocalFolder(experts))
    names, weights = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        names.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        middle = tensor.start + max(0, tensor.end - tensor.start - 64) // 2
        raw = (experts / tensor.file).read_bytes()
        weights.update(raw[middle : min(tensor.end, middle + 64)])
    found = {"tensors": names.hexdigest()[:16], "weights": weights.hexdigest()[:16]}
    assert checkpoint.identity() == found
    demo = read_checkpoint(open_source("demo")).identity()
    assert demo == {"tensors": "32cb70ab71d62a93", "weights": "31030b70a318aad0"}


def test_what_is_known_of_a_tensor_is_small(experts, tmp_path):
    checkpoint = read_checkpoint(LocalFolder(experts))
    stored = checkpoint.tensors.values()
    for part in ("file", "dtype", "shape"):
        values = [getattr(tensor, part) for tensor in stored]
        assert len({id(value) for value in values}) == len(set(values)), f"each {part} is shared"
    number, folder = len(stored), checkpoint.source.folder
    del checkpoint, stored, values
    prune_checkpoint(folder, [5], tmp_path / "warm")  # imports, caches
    tracemalloc.start()
    try:
        prune_checkpoint(folder, [5], tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / number < FACTS_OF_A_TENSOR
    manifest = (tmp_path / "out" / MANIFEST_FILE).stat().st_size
    assert manifest < 300 * (N_FILES + 3), "it grows with the files, not with the tensors"


def _turn(stored, end):
    name = next(name for name in stored if name.endswith(end))
    stored[name] = stored[name].reshape(stored[name].shape[::-1])


def _rename(stored, end, new=""):
    tensor = stored.pop(next(name for name in stored if name.endswith(end)))
    if new:
        stored[new] = tensor


UP = "mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda s: s.pop("model.norm.weight"), "'model.norm.weight' is not there"),
        (lambda s: _rename(s, UP), f"{UP}' is not there"),
        (lambda s: _turn(s, UP), f"{UP}' is of shape .*would have to be"),
        (lambda s: _rename(s, UP, "model.layers.7.mlp.upp.weight"), f"{UP}' is not there"),
    ],
    ids=["outside", "in a layer", "turned", "renamed"],
)
@pytest.mark.parametrize("verify", [False, True])
def test_what_nothing_could_load_is_not_pruned(source, tmp_path, spoil, reason, verify):
    with last_file(source) as stored:
        spoil(stored)
    with pytest.raises(LoadError, match=f"does not fit LlamaForCausalLM.*{reason}"):
        prune_checkpoint(source, REMOVED, tmp_path / "out", verify=verify)
    assert os.listdir(tmp_path) == ["source"]


def test_weights_of_a_folder_are_those_that_transformers_loads(source, tmp_path):
    """Of a single file beside an index, the single file."""
    both = tmp_path / "both"
    shutil.copytree(source, both)
    stored = {}
    for file in source.glob("*.safetensors"):
        stored |= load_file(file)
    changed = {name: tensor + 1 for name, tensor in stored.items()}
    save_file(changed, both / SINGLE_FILE, {"format": "pt"})
    prune_checkpoint(both, REMOVED, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(both)
    assert torch.equal(model.state_dict()["model.norm.weight"], changed["model.norm.weight"])
    written = load_file(tmp_path / "out" / SINGLE_FILE)
    assert torch.equal(written["model.norm.weight"], changed["model.norm.weight"])


def test_headers_are_those_of_the_library(source):
    """What is written here is what safetensors itself would read and write."""
    checkpoint = read_checkpoint(LocalFolder(source))
    for file, metadata in checkpoint.metadata.items():
        stored = [t for t in checkpoint.tensors.values() if t.file == file]
        base = stored[0].start
        pairs = [(t, t.name) for t in stored]
        header, aligned = header_bytes(pairs, metadata), header_bytes(pairs, metadata, base)
        raw = json.loads((source / file).read_bytes()[8:base])
        assert json.loads(header[8:]) == json.loads(aligned[8:]) == raw
        assert len(header) % 8 == 0
        assert (len(aligned) - base) % 4096 == 0


# The hub, played by a server of our own


SHA = "5" * 40


@pytest.fixture
def hub(source, monkeypatch, tmp_path):
    with running_hub(monkeypatch, tmp_path / "cache") as server:
        server.add("me/model", source, SHA)
        yield server


def test_from_the_hub_only_what_stays_is_fetched(hub, source, tmp_path):
    here = prune_checkpoint(source, REMOVED, tmp_path / "here")
    there = prune_checkpoint("me/model", REMOVED, tmp_path / "there")
    assert there.revision == SHA
    assert replace(there, source=here.source, revision=None) == here
    assert_same(tmp_path / "there", tmp_path / "here")
    listed = LocalFolder(source)
    rest = sum(listed.size(f) for f in listed.files() if not f.endswith((".safetensors", ".bin")))
    headers = read_checkpoint(listed)
    begins = {t.file: t.start for t in reversed(list(headers.tensors.values()))}
    again = listed.size("config.json")
    assert hub.sent <= there.bytes_after + rest + sum(begins.values()) + again
    assert hub.sent < there.bytes_before


def test_files_that_the_cache_lacks_come_from_the_hub(hub, source, tmp_path, caplog):
    """transformers fetches only what it reads: not the licence, nor the pooling of an embedder."""
    snapshot = shutil.copytree(source, tmp_path / "snapshot")
    (snapshot / "LICENSE").unlink()
    cached = LocalFolder(snapshot, "me/model", SHA)
    files = with_all_files(cached)
    assert "LICENSE" in files.files()
    assert files.read("LICENSE", 0, 4) == b"read"
    sent = hub.sent
    assert files.read("config.json", 0, 1) == b"{"
    assert hub.sent == sent, "what is in the cache is not fetched again"
    hub.fail("info", 404, times=99)
    assert with_all_files(cached) is cached
    assert "Only the files of me/model in the cache are carried along" in caplog.text
    here = LocalFolder(source)
    assert with_all_files(here) is here


def test_a_hub_that_fails_once_is_asked_again(hub, tmp_path):
    hub.fail("resolve", 503, after=8, times=1)
    prune_checkpoint("me/model", REMOVED, tmp_path / "out")
    assert check_manifest(tmp_path / "out").revision == SHA


def test_a_hub_that_refuses_leaves_nothing(hub, tmp_path):
    hub.fail("resolve", 403, after=11, times=1)
    with pytest.raises(LoadError, match="Cannot load model 'me/model'"):
        prune_checkpoint("me/model", REMOVED, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_a_server_without_ranges_is_refused(hub, tmp_path):
    hub.knows_ranges = False
    with pytest.raises(LoadError, match="does not send parts of files"):
        prune_checkpoint("me/model", REMOVED, tmp_path / "out")


def test_a_plan_for_another_revision_is_refused(hub, tmp_path):
    plan = PruningPlan("me/model", 8, (1,), model={"revision": "6" * 40})
    with pytest.raises(InvalidPlanError, match="revision"):
        prune_checkpoint("me/model", plan, tmp_path / "out")


def test_the_cached_copy_is_used_if_it_is_complete(hub, source, tmp_path):
    snapshot = tmp_path / "cache" / "models--me--model" / "snapshots" / SHA
    shutil.copytree(source, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(SHA)
    manifest = prune_checkpoint("me/model", REMOVED, tmp_path / "out")
    assert hub.sent == 0
    assert manifest.revision == SHA
    sorted(snapshot.glob("*.safetensors"))[-1].unlink()
    prune_checkpoint("me/model", REMOVED, tmp_path / "again")
    assert hub.sent > 0


@pytest.mark.parametrize("file", ["model-00002-of", "config.json", "LICENSE"])
def test_a_source_that_changes_while_it_is_read_is_refused(source, tmp_path, monkeypatch, file):
    """Another run saves into the folder, while this one copies."""
    path = next(path for path in source.iterdir() if path.name.startswith(file))
    written = on_disk.write_checkpoint

    def changed_meanwhile(*args, **options):
        manifest = written(*args, **options)
        path.write_bytes(path.read_bytes())
        return manifest

    monkeypatch.setattr(on_disk, "write_checkpoint", changed_meanwhile)
    with pytest.raises(LoadError, match=f"'{file}.*' of .* it was changed while it was read"):
        prune_checkpoint(source, REMOVED, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_a_whole_hash_sees_every_byte_and_is_remembered(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content_hash, "WORTH_REMEMBERING", 0)
    monkeypatch.setattr(content_hash, "SETTLED", -1.0)
    read, blocks = [], LocalFolder.blocks
    monkeypatch.setattr(
        LocalFolder, "blocks", lambda self, file, *a: read.append(file) or blocks(self, file, *a)
    )

    def identity():
        read.clear()
        return read_checkpoint(LocalFolder(source)).identity(whole=True)

    first = identity()
    assert set(read) == {path.name for path in source.glob("*.safetensors")}
    assert identity() == first
    assert not read, "nothing is read twice"
    with last_file(source) as stored:
        next(iter(stored.values())).view(-1)[-1] += 1e-3  # a value that no sample looks at
    changed = identity()
    assert changed["sha256"] != first["sha256"]
    assert set(read) == {sorted(source.glob("*.safetensors"))[-1].name}
    for damage in (b"[]", b"{", b'{"a": 7}', b"\xff"):
        (tmp_path / "cache" / "llm_pruner" / "weights.json").write_bytes(damage)
        assert identity() == changed


def test_a_whole_hash_needs_no_place_to_remember(source, monkeypatch):
    monkeypatch.setattr(content_hash, "WORTH_REMEMBERING", 0)
    wanted = read_checkpoint(LocalFolder(source)).identity(whole=True)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert read_checkpoint(LocalFolder(source)).identity(whole=True) == wanted
