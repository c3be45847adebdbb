"""Damaged and hostile checkpoints: pruned rightly, or refused; nothing else, and nothing left."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from conftest import tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llm_pruner import load_model, prune_checkpoint
from llm_pruner.config.rules import COUNT_FIELDS
from llm_pruner.errors import LLMPrunerError, LoadError, NonFiniteError

REMOVED = [1, 4]
FOR_FILES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=9,
)
ODD = ["[" * 3000, "9" * 5000, '"\\ud800"', "NaN", "1e999", '{"a": 1, "a": 2}', "[[8]]", "-0"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "original"
    tiny_llama().save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def source(original, tmp_path):
    shutil.copytree(original, tmp_path / "source")
    return tmp_path / "source"


def weights(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def prune(source, *, right=None):
    """Prune; an output has to be that of the intact checkpoint, and a refusal leaves none."""
    out = source.parent / "out"
    try:
        prune_checkpoint(source, REMOVED, out, overwrite=True)
    except LLMPrunerError:
        assert sorted(os.listdir(source.parent)) == ["source"]
        return False
    if right is not None:
        found = weights(out)
        assert found.keys() == right.keys()
        assert all(torch.equal(found[name], right[name]) for name in right)
    shutil.rmtree(out)
    return True


@pytest.fixture(scope="module")
def right(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("right") / "out"
    prune_checkpoint(original, REMOVED, out)
    return weights(out)


FIELDS = [*COUNT_FIELDS, "model_type", "architectures", "hidden_size", "vocab_size", "text_config"]
FIELDS += ["layer_types", "mlp_only_layers", "quantization_config", "rope_parameters", "auto_map"]
FIELDS += ["first_k_dense_replace", "num_nextn_predict_layers", "rms_norm_eps", "hidden_act"]


@FOR_FILES
@given(field=st.sampled_from(FIELDS), value=VALUES.map(json.dumps) | st.sampled_from(ODD))
def test_any_value_in_config_json(source, right, field, value):
    config = json.loads((source / "config.json").read_bytes())
    config.pop(field, None)
    before = (source / "config.json").read_bytes()
    text = json.dumps(config).replace("{", f'{{"{field}": {value}, ', 1)
    (source / "config.json").write_text(text)
    prune(source, right=right)
    (source / "config.json").write_bytes(before)


@pytest.mark.parametrize("count", [9, 9_999, 10_001, 10**9, 0, -8, 8.0, "8", [8], True])
@pytest.mark.parametrize("field", ["num_hidden_layers", "n_layers"])
def test_a_count_of_layers_that_is_not_theirs_is_refused_at_once(source, field, count):
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps({**config, field: count}))
    assert not prune(source)
    with pytest.raises(LoadError, match=r"config"):
        load_model(str(source))


@FOR_FILES
@given(data=st.data())
def test_flipped_and_lost_bytes_of_a_header_or_the_index(source, right, data):
    files = [*sorted(source.glob("*.safetensors")), source / "model.safetensors.index.json"]
    file = data.draw(st.sampled_from(files))
    before = file.read_bytes()
    end = min(len(before), 1500)
    changed = bytearray(before)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, end - 1))
        del changed[start : start + data.draw(st.integers(1, 40))]
    file.write_bytes(bytes(changed))
    try:
        prune(source, right=right if file.suffix == ".json" else None)
    finally:
        file.write_bytes(before)


@FOR_FILES
@given(name=st.sampled_from(["weight_map", "metadata", "x"]), value=VALUES.map(json.dumps))
def test_any_value_in_the_index(source, right, name, value):
    index = source / "model.safetensors.index.json"
    before = index.read_bytes()
    values = json.loads(before)
    values.pop(name, None)
    index.write_text(json.dumps(values).replace("{", f'{{"{name}": {value}, ', 1))
    prune(source, right=right)
    index.write_bytes(before)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file_is_not_waited_for(source, file, kind):
    (source / file).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(source / file)
    elif kind == "device":
        (source / file).symlink_to("/dev/zero")
    elif kind == "loop":
        (source / file).symlink_to(file)
    else:
        (source / file).mkdir()
    prune(source)
    with pytest.raises(LLMPrunerError):
        load_model(str(source))


def test_nan_weights_are_refused_by_what_measures_and_carried_by_what_copies(tokenizer):
    from llm_pruner import get_strategy

    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.fill_(float("nan"))
    for strategy in ("ablation", "smart", "bi", "pruneme", "avss"):
        with pytest.raises(NonFiniteError, match="NaN or"):
            get_strategy(strategy)(model, tokenizer).compute_layer_scores(["the cat sat on a mat"])
