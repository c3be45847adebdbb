"""GGUF in, GGUF out: the tensors' own bytes, and metadata that says what is left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest
from ggufs import contents, llama_tensors, make_gguf, metadata
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_pruner import PruningPlan
from llm_pruner.checkpoint.gguf import fix_gguf, read_gguf_model
from llm_pruner.checkpoint.on_disk import MANIFEST_FILE, check_manifest, prune_checkpoint
from llm_pruner.engines.llama_cpp import ARCHITECTURES
from llm_pruner.engines.rules import PATTERN as WINDOWS
from llm_pruner.engines.rules import RECURRENT
from llm_pruner.errors import (
    InvalidPlanError,
    LLMPrunerError,
    LoadError,
    OutputError,
    UnsupportedModelError,
    VerificationError,
)
from llm_pruner.storage.gguf_models import find_gguf
from llm_pruner.storage.manifest import Manifest, tensor_origin

LAYERS, REMOVED = 8, (1, 3)
PATTERN = "attention.sliding_window_pattern"
OUTPUT = {"README.md", "pruning_manifest.json", "pruning_plan.json"}


@pytest.fixture
def source(tmp_path):
    return make_gguf(tmp_path / "source" / "m.gguf", layers=LAYERS)


def renamed(tensors, removed=REMOVED, layers=LAYERS):
    """The tensors of a model without some layers, the slow way."""
    kept = [index for index in range(layers) if index not in removed]
    new = {f"blk.{old}": f"blk.{new}" for new, old in enumerate(kept)}
    new |= {f"blk.{layers + i}": f"blk.{len(kept) + i}" for i in range(3)}
    found = {}
    for name, tensor in tensors.items():
        match = re.match(r"blk\.\d+", name)
        if not match or match[0] in new:
            found[new[match[0]] + name[match.end() :] if match else name] = tensor
    return found


def files(folder):
    return sorted(folder.glob("*.gguf"))


def test_kept_tensors_are_the_same_bytes_and_so_is_all_other_metadata(source, tmp_path):
    manifest = prune_checkpoint(source, REMOVED, tmp_path / "out")
    out = tmp_path / "out" / "m-pruned.gguf"
    assert contents(out) == renamed(contents(source))
    assert list(contents(out)) == list(renamed(contents(source)))
    assert metadata(out) == metadata(source) | {"llama.block_count": LAYERS - len(REMOVED)}
    assert set(os.listdir(tmp_path / "out")) == OUTPUT | {out.name}
    assert manifest.tensors == len(contents(out))


def test_the_output_says_what_it_is(source, tmp_path):
    out = tmp_path / "out"
    manifest = prune_checkpoint(source, REMOVED, out)
    plan = PruningPlan.load(out / "pruning_plan.json")
    assert (plan.remove, plan.num_layers, plan.engines) == (REMOVED, LAYERS, {"llama.cpp": "right"})
    assert plan.model == read_gguf_model([source]).checkpoint.identity()
    assert manifest == Manifest.load(out / MANIFEST_FILE) == check_manifest(out)
    assert (manifest.source, manifest.prefixes) == (str(source), ("blk.",))
    assert manifest.files["m-pruned.gguf"]["from"] == ["m.gguf"]
    before, after = contents(source), contents(*files(out))
    assert all(after[name] == before[tensor_origin(manifest, name)] for name in after)
    sizes = [sum(len(raw) for _, _, raw in tensors.values()) for tensors in (before, after)]
    assert [manifest.bytes_before, manifest.bytes_after] == sizes
    card = (out / "README.md").read_text()
    for text in ("library_name: gguf", "llama-cli -m path/to/m-pruned.gguf", "2 of 8 layers"):
        assert text in card


def test_a_plan_that_was_saved_is_carried_out(source, tmp_path):
    prune_checkpoint(source, REMOVED, tmp_path / "first")
    plan = PruningPlan.load(tmp_path / "first" / "pruning_plan.json")
    prune_checkpoint(source, plan, tmp_path / "second")
    first, second = (tmp_path / name / "m-pruned.gguf" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_a_pruned_model_can_be_pruned_again(source, tmp_path):
    prune_checkpoint(source, (1, 3), tmp_path / "first")
    prune_checkpoint(tmp_path / "first", (0, 5), tmp_path / "second")
    prune_checkpoint(source, (0, 1, 3, 7), tmp_path / "once")
    second, once = (files(tmp_path / name)[0] for name in ("second", "once"))
    assert second.name == "m-pruned-pruned.gguf"
    assert second.read_bytes() == once.read_bytes()


def test_verification_records_a_hash_of_every_tensor_and_finds_a_flipped_bit(source, tmp_path):
    manifest = prune_checkpoint(source, REMOVED, tmp_path / "out", verify=True)
    file = tmp_path / "out" / "m-pruned.gguf"
    assert manifest.sha256.keys() == contents(file).keys()
    raw = bytearray(file.read_bytes())
    raw[read_gguf_model([file]).checkpoint.tensors["blk.5.ffn_up.weight"].start] ^= 1
    file.write_bytes(raw)
    with pytest.raises(VerificationError, match=r"'blk\.5\.ffn_up\.weight' in .* is not what"):
        check_manifest(tmp_path / "out")


def test_an_alignment_is_kept(tmp_path):
    source = make_gguf(tmp_path / "m.gguf", {"general.alignment": 256}, layers=LAYERS)
    prune_checkpoint(source, REMOVED, tmp_path / "out")
    assert contents(*files(tmp_path / "out")) == renamed(contents(source))
    assert metadata(*files(tmp_path / "out"))["general.alignment"] == 256


def test_neither_torch_nor_transformers_is_loaded(source, tmp_path):
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None); "
        "from llm_pruner.checkpoint.on_disk import prune_checkpoint; "
        f"prune_checkpoint({str(source)!r}, [1, 3], {str(tmp_path / 'out')!r}, verify=True); "
        "from llm_pruner.checkpoint.gguf import fix_gguf; "
        "assert fix_gguf(sys.argv[1], {'model_type': 'llama', 'num_hidden_layers': 6}) == []"
    )
    written = tmp_path / "out" / "m-pruned.gguf"
    subprocess.run([sys.executable, "-c", code, str(written)], check=True)


def test_a_kernel_that_cannot_copy(source, tmp_path, monkeypatch):
    def unable(*args):
        raise OSError(95, "Operation not supported")

    def written(name):
        prune_checkpoint(source, REMOVED, tmp_path / name)
        return (tmp_path / name / "m-pruned.gguf").read_bytes()

    copied = written("kernel")
    for number, call in enumerate(("copy_file_range", "sendfile")):
        monkeypatch.setattr(os, call, unable, raising=False)
        assert written(f"other{number}") == copied


# --- what is refused ---------------------------------------------------------------------------
@pytest.mark.parametrize("layers", [[8], [-1], [], [1, 1], range(8)])
def test_impossible_layers_are_refused(source, tmp_path, layers):
    with pytest.raises(InvalidPlanError):
        prune_checkpoint(source, layers, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_a_plan_of_another_model_is_refused(source, tmp_path):
    prune_checkpoint(source, REMOVED, tmp_path / "first")
    plan = PruningPlan.load(tmp_path / "first" / "pruning_plan.json")
    raw = bytearray(source.read_bytes())
    raw[read_gguf_model([source]).checkpoint.tensors["blk.2.attn_q.weight"].start + 72] ^= 1
    source.write_bytes(raw)
    with pytest.raises(InvalidPlanError, match="weights"):
        prune_checkpoint(source, plan, tmp_path / "out")
    with pytest.raises(InvalidPlanError):
        prune_checkpoint(make_gguf(tmp_path / "short.gguf"), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_are_refused(source, tmp_path):
    with pytest.raises(InvalidPlanError, match=r"link \(--link\) is for safetensors"):
        prune_checkpoint(source, REMOVED, tmp_path / "out", link=True)


def test_an_output_is_replaced_only_if_asked(source, tmp_path):
    prune_checkpoint(source, REMOVED, tmp_path / "out")
    with pytest.raises(OutputError, match="is not empty"):
        prune_checkpoint(source, (0,), tmp_path / "out")
    assert metadata(*files(tmp_path / "out"))["llama.block_count"] == 6
    prune_checkpoint(source, (0,), tmp_path / "out", overwrite=True)
    assert metadata(*files(tmp_path / "out"))["llama.block_count"] == 7


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_after_an_error(source, tmp_path, overwrite, monkeypatch):
    if overwrite:
        prune_checkpoint(source, REMOVED, tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def damaged(stage):
        raise VerificationError("no")

    monkeypatch.setattr("llm_pruner.checkpoint.on_disk.check_manifest", damaged)
    with pytest.raises(VerificationError):
        prune_checkpoint(source, (0,), tmp_path / "out", overwrite=overwrite)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_damaged_file_is_refused_and_nothing_is_written(source, tmp_path):
    source.write_bytes(source.read_bytes()[:-50])
    with pytest.raises(LoadError, match=r"'m\.gguf' of checkpoint"):
        prune_checkpoint(source, REMOVED, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_names_that_become_one_are_refused(tmp_path):
    """Two names of a layer, of which the new one is the same."""
    tensors = llama_tensors(range(4)) | {"blk.01.attn_norm.weight": ("F32", 1, 32)}
    source = make_gguf(tmp_path / "source" / "m.gguf", tensors=tensors)
    with pytest.raises(LoadError, match=r"tensor 'blk\.0\.attn_norm\.weight' is there twice"):
        prune_checkpoint(source, (0,), tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


@given(st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_metadata_is_pruned_or_refused_and_nothing_else(source, tmp_path, data):
    """No other error, and whatever is written can be read."""
    raw = bytearray(source.read_bytes())
    end = min(x.start for x in read_gguf_model([source]).checkpoint.tensors.values())
    places = st.tuples(st.integers(0, end - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, min_size=1, max_size=4)):
        raw[place] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    with suppress(LLMPrunerError):
        prune_checkpoint(path, REMOVED, tmp_path / "out", overwrite=True)
        check_manifest(tmp_path / "out")


# --- split models ------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"small_first_shard": True}])
@pytest.mark.parametrize("given", ["folder", "first", "last"])
def test_a_split_model_stays_split(tmp_path, options, given):
    folder = tmp_path / "source"
    make_gguf(folder / "m.gguf", layers=LAYERS, split_max_tensors=9, **options)
    parts = files(folder)
    path = {"folder": folder, "first": parts[0], "last": parts[-1]}[given]
    manifest = prune_checkpoint(path, REMOVED, tmp_path / "out")
    out = files(tmp_path / "out")
    count = len(out)
    assert out[-1].name == f"m-pruned-{count:05d}-of-{count:05d}.gguf"
    assert find_gguf(tmp_path / "out") == out
    assert contents(*out) == renamed(contents(*parts))
    for number, file in enumerate(out):
        said = metadata(file)
        assert (said["split.no"], said["split.count"]) == (number, count)
        assert said["split.tensors.count"] == len(contents(*out)) == manifest.tensors
    assert f"llama-cli -m path/to/{out[0].name}" in (tmp_path / "out" / "README.md").read_text()
    assert manifest.files.keys() == {file.name for file in out}


def test_a_part_whose_tensors_all_go_is_left_out(tmp_path):
    make_gguf(tmp_path / "source" / "m.gguf", layers=LAYERS, split_max_tensors=5)
    parts = files(tmp_path / "source")
    removed = range(1, LAYERS)
    prune_checkpoint(parts[0], removed, tmp_path / "out")
    out = files(tmp_path / "out")
    assert len(out) < len(parts)
    assert contents(*out) == renamed(contents(*parts), removed)
    assert metadata(*out)["split.count"] == len(out)


# --- what lies around --------------------------------------------------------------------------
@pytest.fixture
def surrounded(source):
    """A folder with a model, its projector, its importance matrix, and other files."""
    folder = source.parent
    statistics = {
        f"{name}.{kind}": ("F32", 1, 8)
        for name in llama_tensors(range(LAYERS))
        if name.endswith("attn_q.weight")
        for kind in ("in_sum2", "counts")
    }
    make_gguf(
        folder / "m.imatrix.gguf",
        {"general.type": "imatrix", "imatrix.chunk_count": 7},
        tensors=statistics,
    )
    layers = {f"v.blk.{i}.attn_q.weight": ("F16", 2, 32) for i in range(4)}
    values = {"general.type": "mmproj"}
    make_gguf(folder / "mmproj-m.gguf", values, architecture="clip", tensors=layers)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nThe whole model.\n")
    (folder / "LICENSE").write_text("free")
    (folder / "config.json").write_text("{}")
    (folder / "m.imatrix.dat").write_bytes(b"old")
    (folder / "mmproj").mkdir()
    (folder / "mmproj" / "other.gguf").write_bytes(b"another")
    return folder


def test_what_lies_around_a_model_follows_it(surrounded, tmp_path):
    manifest = prune_checkpoint(surrounded, REMOVED, tmp_path / "out")
    out = tmp_path / "out"
    others = {"LICENSE", "m.imatrix.gguf", "m-pruned.gguf", "mmproj-m.gguf"}
    assert set(os.listdir(out)) == OUTPUT | others
    assert (out / "mmproj-m.gguf").read_bytes() == (surrounded / "mmproj-m.gguf").read_bytes()
    matrices = surrounded / "m.imatrix.gguf", out / "m.imatrix.gguf"
    assert contents(matrices[1]) == renamed(contents(matrices[0]))
    assert metadata(matrices[1]) == metadata(matrices[0])
    assert manifest.left_behind == ["m.imatrix.dat", "mmproj/other.gguf"]
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "The whole model" not in card


def test_what_lies_beside_a_file_is_left_alone_and_named(surrounded, tmp_path):
    manifest = prune_checkpoint(surrounded / "m.gguf", REMOVED, tmp_path / "out")
    assert set(os.listdir(tmp_path / "out")) == OUTPUT | {"m-pruned.gguf"}
    assert {"m.imatrix.dat", "m.imatrix.gguf", "mmproj-m.gguf"} <= set(manifest.left_behind)
    assert "m.gguf" not in manifest.left_behind


def test_a_projector_need_not_say_its_type(source, tmp_path):
    tensors = {"v.blk.1.attn_q.weight": ("F16", 2, 32)}
    old = source.parent / "mmproj-old.gguf"
    make_gguf(old, architecture="clip", tensors=tensors)
    prune_checkpoint(source.parent, REMOVED, tmp_path / "out")
    assert (tmp_path / "out" / old.name).read_bytes() == old.read_bytes()


def test_a_companion_by_name_alone_stays_behind(source, tmp_path):
    make_gguf(source.parent / "m-imatrix-Q4_K.gguf", layers=LAYERS)
    make_gguf(source.parent / "imatrix.gguf", {"general.architecture": 4}, layers=LAYERS)
    manifest = prune_checkpoint(source.parent, REMOVED, tmp_path / "out")
    assert files(tmp_path / "out") == [tmp_path / "out" / "m-pruned.gguf"]
    assert manifest.left_behind == ["imatrix.gguf", "m-imatrix-Q4_K.gguf"]


def test_a_model_that_is_called_like_a_companion_is_pruned(tmp_path):
    source = make_gguf(tmp_path / "source" / "m-imatrix.gguf", layers=LAYERS)
    for number, path in enumerate((source, source.parent)):
        manifest = prune_checkpoint(path, REMOVED, tmp_path / f"out{number}")
        assert contents(*files(tmp_path / f"out{number}")) == renamed(contents(source))
        assert manifest.left_behind == []


def test_a_damaged_companion_is_named_and_nothing_is_written(surrounded, tmp_path):
    file = surrounded / "m.imatrix.gguf"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(LoadError, match=r"'m\.imatrix\.gguf' of checkpoint"):
        prune_checkpoint(surrounded, REMOVED, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("name", ["mmproj-m.gguf", "m.imatrix.gguf"])
def test_a_companion_has_no_layers(surrounded, tmp_path, name):
    with pytest.raises(UnsupportedModelError, match=rf"{re.escape(name)}' is (an?|a) .*: give the"):
        prune_checkpoint(surrounded / name, REMOVED, tmp_path / "out")


# --- multi-token prediction --------------------------------------------------------------------
@pytest.fixture
def predicting(tmp_path):
    """A model with a block for multi-token prediction, a list by block and an importance matrix."""
    values = {
        "glm4moe.nextn_predict_layers": 1,
        "glm4moe.leading_dense_block_count": 2,
        "glm4moe.attention.head_count_kv": [*range(LAYERS), 99],
        "glm4moe.block_count": LAYERS + 1,
    }
    folder = tmp_path / "source"
    make_gguf(folder / "m.gguf", values, architecture="glm4moe", layers=LAYERS + 1)
    statistics = {f"blk.{i}.attn_q.weight.counts": ("F32", 1, 8) for i in range(LAYERS + 1)}
    make_gguf(folder / "imatrix.gguf", {"general.type": "imatrix"}, tensors=statistics)
    return folder


@pytest.mark.parametrize("drop_mtp", [False, True])
def test_blocks_for_multi_token_prediction_follow_or_go(predicting, tmp_path, drop_mtp):
    manifest = prune_checkpoint(predicting, REMOVED, tmp_path / "out", drop_mtp=drop_mtp)
    for name, new in (("m", "m-pruned"), ("imatrix", "imatrix")):
        want = renamed(contents(predicting / f"{name}.gguf"))
        if drop_mtp:
            want = {key: x for key, x in want.items() if not key.startswith("blk.6.")}
        assert contents(tmp_path / "out" / f"{new}.gguf") == want
    said = metadata(tmp_path / "out" / "m-pruned.gguf")
    assert said["glm4moe.block_count"] == (6 if drop_mtp else 7)
    assert said["glm4moe.nextn_predict_layers"] == (0 if drop_mtp else 1)
    assert said["glm4moe.leading_dense_block_count"] == 1
    left = [] if drop_mtp else [99]
    assert said["glm4moe.attention.head_count_kv"] == [0, 2, 4, 5, 6, 7, *left]
    assert manifest.mtp_tensors == (0 if drop_mtp else 5)


# --- lists that go along with names of tensors -------------------------------------------------
NAMED = "general.tensor_extra.name"


def test_lists_along_with_names_of_tensors_follow(tmp_path):
    names = ["output_norm.weight", "blk.1.attn_q.weight", "blk.2.attn_q.weight"]
    values = {NAMED: names, "general.tensor_extra.prec_a4": [1, 2, 3]}
    source = make_gguf(tmp_path / "m.gguf", values, layers=LAYERS)
    prune_checkpoint(source, REMOVED, tmp_path / "out")
    said = metadata(*files(tmp_path / "out"))
    assert said[NAMED] == [names[0], "blk.1.attn_q.weight"]
    assert said["general.tensor_extra.prec_a4"] == [1, 3]


@pytest.mark.parametrize(
    "values",
    [
        {NAMED: "blk.0"},
        {NAMED: ["blk.0"], "general.tensor_extra.prec_a4": [1, 2]},
        {NAMED: ["blk.0"], "general.tensor_extra.prec_a4": 1},
        {NAMED: ["x" * 2**20]},
    ],
)
def test_lists_that_do_not_go_along_are_refused(tmp_path, values):
    source = make_gguf(tmp_path / "m.gguf", values, layers=LAYERS)
    with pytest.raises(LoadError, match=r"general\.tensor_extra\.\w+ of '.*m\.gguf' is not a list"):
        prune_checkpoint(source, REMOVED, tmp_path / "out")


# --- what llama.cpp would work out otherwise ---------------------------------------------------
def gemma(path, layers=13, **more):
    values = {"gemma3.attention.sliding_window": 512, "gemma3.attention.key_length": 8} | more
    return make_gguf(path, values, architecture="gemma3", layers=layers)


def windows(count, period=6):
    return [(index + 1) % period != 0 for index in range(count)]


@pytest.mark.parametrize(
    ("removed", "written"),
    [((0,), True), ((5,), True), (range(6), False), (range(6, 12), False), ((12,), False)],
)
def test_windows_are_listed_where_the_default_no_longer_holds(tmp_path, removed, written):
    source = gemma(tmp_path / "m.gguf")
    prune_checkpoint(source, removed, tmp_path / "out")
    said = metadata(*files(tmp_path / "out"))
    want = [kind for i, kind in enumerate(windows(13)) if i not in removed]
    assert said.get(f"gemma3.{PATTERN}") == (want if written else None)
    assert contents(*files(tmp_path / "out")) == renamed(contents(source), removed, 13)


def test_a_list_of_windows_follows(tmp_path):
    kinds = [True, True, False] * 4 + [True]
    source = gemma(tmp_path / "m.gguf", **{f"gemma3.{PATTERN}": kinds})
    prune_checkpoint(source, (0, 5), tmp_path / "out")
    want = [kind for i, kind in enumerate(kinds) if i not in (0, 5)]
    assert metadata(*files(tmp_path / "out"))[f"gemma3.{PATTERN}"] == want


@pytest.mark.parametrize(("removed", "listed"), [((0,), True), ((0, 1, 2), False), ((12,), False)])
def test_a_period_becomes_a_list_where_it_no_longer_holds(tmp_path, removed, listed):
    source = gemma(tmp_path / "m.gguf", **{f"gemma3.{PATTERN}": 3})
    prune_checkpoint(source, removed, tmp_path / "out")
    want = [kind for i, kind in enumerate(windows(13, 3)) if i not in removed]
    said = metadata(*files(tmp_path / "out"))
    assert said[f"gemma3.{PATTERN}"] == (want if listed else 3)
    assert list(said) == list(metadata(source))


def test_a_model_without_windows_needs_no_list(tmp_path):
    source = gemma(tmp_path / "m.gguf", **{"gemma3.attention.sliding_window": None})
    prune_checkpoint(source, (0,), tmp_path / "out")
    assert f"gemma3.{PATTERN}" not in metadata(*files(tmp_path / "out"))


@pytest.mark.parametrize("said", [None, 6, windows(13)])
def test_a_model_with_windows_keeps_one(tmp_path, said):
    source = gemma(tmp_path / "m.gguf", **{f"gemma3.{PATTERN}": said})
    with pytest.raises(UnsupportedModelError, match=r"without any layer that has sliding-window"):
        prune_checkpoint(source, [i for i in range(13) if i not in (5, 11)], tmp_path / "out")


def test_what_no_key_can_say_is_refused_with_sets_that_work(tmp_path):
    source = make_gguf(tmp_path / "m.gguf", architecture="smollm3", layers=12)
    with pytest.raises(InvalidPlanError, match=r"rotary position .*: \[\[") as caught:
        prune_checkpoint(source, (2,), tmp_path / "out")
    sets = json.loads(str(caught.value).rsplit("would be: ", 1)[1].rstrip("."))
    assert [len(removed) for removed in sets] == [1, 2]
    for number, removed in enumerate(sets):
        prune_checkpoint(source, removed, tmp_path / f"out{number}")
        plan = PruningPlan.load(tmp_path / f"out{number}" / "pruning_plan.json")
        assert plan.engines == {"llama.cpp": "right"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [26, 27])
def test_the_small_deepseek_says_that_its_queries_are_whole(tmp_path, count):
    values = {"deepseek2.expert_gating_func": 1}
    tensors = {f"blk.{i}.attn_norm.weight": ("F32", 1, 4) for i in range(count)}
    options = {"architecture": "deepseek2", "layers": count, "tensors": tensors}
    source = make_gguf(tmp_path / "m.gguf", values, **options)
    prune_checkpoint(source, (4, 5), tmp_path / "out")
    said = metadata(*files(tmp_path / "out"))
    assert said["deepseek2.attention.q_lora_rank"] == 0
    assert said["deepseek2.block_count"] == count - 2


def test_an_architecture_that_is_not_known_is_pruned_with_a_warning(tmp_path, caplog):
    source = make_gguf(tmp_path / "m.gguf", architecture="brandnew", layers=LAYERS)
    prune_checkpoint(source, REMOVED, tmp_path / "out")
    assert "of a brandnew model: compare its output" in caplog.text
    assert PruningPlan.load(tmp_path / "out" / "pruning_plan.json").engines == {}


LISTED = sorted(
    architecture
    for architecture, (_, rules) in ARCHITECTURES.items()
    if rules and all(rule.said in (WINDOWS, RECURRENT) for rule in rules)
)


@pytest.mark.parametrize("architecture", LISTED)
@pytest.mark.parametrize("removed", [(0,), (2, 3, 9)])
@pytest.mark.parametrize("mtp", [0, 1])
def test_layers_stay_what_they_were_whatever_is_removed(tmp_path, architecture, removed, mtp):
    values = {
        f"{architecture}.attention.sliding_window": 512,
        f"{architecture}.nextn_predict_layers": mtp,
        f"{architecture}.block_count": 12 + mtp,
    }
    options = {"architecture": architecture, "layers": 12 + mtp}
    source = make_gguf(tmp_path / "m.gguf", values, **options)
    prune_checkpoint(source, removed, tmp_path / "out")
    before, after = (read_gguf_model([x]).layers for x in (source, *files(tmp_path / "out")))
    for (_, were), (_, are) in zip(before.rules, after.rules, strict=True):
        assert list(are) == [kind for index, kind in enumerate(were) if index not in removed]
        assert len(set(were)) == 2


# --- fix_gguf ----------------------------------------------------------------------------------
KINDS = [kind for index, kind in enumerate(windows(13)) if index not in (0, 5)]
CONFIG = {
    "model_type": "gemma3_text",
    "num_hidden_layers": len(KINDS),
    "layer_types": ["sliding_attention" if kind else "full_attention" for kind in KINDS],
    "query_pre_attn_scalar": 8,
}


@pytest.mark.parametrize("config", [CONFIG, {"model_type": "gemma3", "text_config": CONFIG}])
def test_what_a_converter_left_out_is_written(tmp_path, config):
    path = gemma(tmp_path / "m.gguf", len(KINDS))
    before, tensors = metadata(path), contents(path)
    assert fix_gguf(path, config) == [f"gemma3.{PATTERN}"]
    assert metadata(path) == before | {f"gemma3.{PATTERN}": KINDS}
    assert contents(path) == tensors
    written = path.read_bytes(), path.stat().st_mtime_ns
    assert fix_gguf(path, config) == []
    assert (path.read_bytes(), path.stat().st_mtime_ns) == written
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_a_write_protected_file_is_left_alone(tmp_path):
    path = gemma(tmp_path / "m.gguf", len(KINDS))
    path.chmod(0o444)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="write-protected: allow writing, or fix a copy"):
        fix_gguf(path, CONFIG)
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o444


def test_a_wrong_list_and_a_period_are_replaced(tmp_path):
    for number, value in enumerate(([True] * len(KINDS), 3)):
        path = gemma(tmp_path / f"{number}.gguf", len(KINDS), **{f"gemma3.{PATTERN}": value})
        assert fix_gguf(path, CONFIG) == [f"gemma3.{PATTERN}"]
        assert metadata(path)[f"gemma3.{PATTERN}"] == KINDS


@pytest.mark.parametrize("given", [0, 1, -1])
def test_the_first_part_of_a_split_model_is_what_is_written(tmp_path, given):
    values = {"gemma3.attention.sliding_window": 512, "gemma3.attention.key_length": 8}
    options = {"architecture": "gemma3", "layers": len(KINDS), "split_max_tensors": 9}
    make_gguf(tmp_path / "m.gguf", values, **options)
    parts = files(tmp_path)
    tensors, others = contents(*parts), [part.read_bytes() for part in parts[1:]]
    assert fix_gguf(parts[given], CONFIG) == [f"gemma3.{PATTERN}"]
    assert metadata(*parts)[f"gemma3.{PATTERN}"] == KINDS
    assert contents(*parts) == tensors
    assert [part.read_bytes() for part in parts[1:]] == others


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (CONFIG | {"num_hidden_layers": 13}, LoadError, "gemma3 of 11 layers, not .* of 13"),
        (CONFIG | {"model_type": "llama"}, LoadError, "is not what this config.json describes"),
        ({}, LoadError, "is not what this config.json describes"),
        (CONFIG | {"query_pre_attn_scalar": 99}, UnsupportedModelError, "attention scale"),
        (
            CONFIG | {"layer_types": ["full_attention"] * 11},
            UnsupportedModelError,
            "No metadata makes this model right|keep one",
        ),
    ],
)
def test_a_file_that_cannot_be_made_right_is_left_alone(tmp_path, config, error, message):
    path = gemma(tmp_path / "m.gguf", len(KINDS))
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        fix_gguf(path, config)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_an_error_while_it_is_written_leaves_the_file_alone(tmp_path, monkeypatch):
    path = gemma(tmp_path / "m.gguf", len(KINDS))
    before = path.read_bytes()

    def full(*args):
        args[-1].write(b"GGUF")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm_pruner.checkpoint.gguf.write_gguf", full)
    with pytest.raises(OutputError, match="No space left"):
        fix_gguf(path, CONFIG)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_bytes(b"GGUF")])
def test_what_is_no_gguf_file_cannot_be_made_right(tmp_path, make):
    make(tmp_path / "m.gguf")
    with pytest.raises(LoadError):
        fix_gguf(tmp_path / "m.gguf", CONFIG)


def test_a_list_of_another_length_is_not_replaced(tmp_path):
    path = gemma(tmp_path / "m.gguf", len(KINDS), **{f"gemma3.{PATTERN}": [True] * 5})
    with pytest.raises(LoadError, match="has 5 entries, and the model 11 layers"):
        fix_gguf(path, CONFIG)
