"""Checkpoints laid out as published ones: the output is the source minus layers, on both roads."""

from __future__ import annotations

import json

import published
import pytest
from published_configs import CONFIGS, QUANT_FILES
from published_wrappers import WRAPPERS

NAMES = [
    "llama",
    "qwen3-tied",
    "qwen3_moe-fp8",
    "gemma2",
    "gemma3",
    "deepseek_v3-side-file",
    "glm_moe_dsa-globs",
    "gpt_oss",
    "phi3",
    "gpt2",
    "qwen3_5",
    "nemotron_h-no-count",
    "llama4",
    "llama-mixed-bits",
    "llama-regexes",
    "nemotron-nas",
    *"mistral3 llava qwen2_5_vl qwen3_vl mllama voxtral".split(),
]
ALL = CONFIGS | WRAPPERS


@pytest.mark.parametrize("road", published.ROADS)
@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_the_source_minus_layers(name, road, tmp_path):
    *_, verdict = published.judge(
        ALL[name],
        name=name,
        work=tmp_path,
        quant_file=QUANT_FILES.get(name),
        roads=[road],
        small=True,
    )
    if name == "nemotron-nas":
        assert verdict.outcome == "NOT BUILT"
        assert "refused: " in verdict.detail
    else:
        assert verdict.outcome == "RIGHT", verdict.detail


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from published_layout import published as publish

    return publish(CONFIGS["llama-mixed-bits"], tmp_path_factory.mktemp("source"), small=True)


@pytest.fixture
def out(source, tmp_path):
    """The right output of removing layers 1 and 4, made by hand."""
    import shutil

    from published_layout import write_weights

    numbers = published.Renumbering(source.depth, (1, 4))
    for path in source.folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path / path.name)
    renamed = {numbers.name(name, source.prefix): each for name, each in source.tensors.items()}
    write_weights(tmp_path, {name: each for name, each in renamed.items() if name})
    config = json.loads(json.dumps(source.config)) | {"num_hidden_layers": 10}
    for key in ("quantization", "quantization_config"):
        del config[key]["model.layers.1.mlp.down_proj"], config[key]["model.layers.4.mlp.down_proj"]
        last = config[key].pop("model.layers.11.self_attn.v_proj")
        config[key]["model.layers.9.self_attn.v_proj"] = last
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def faults(source, out):
    return list(published._faults(source, None, out, (1, 4), out, ()))


def edit_config(out, **fields):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | fields))


def test_the_judge_accepts_what_is_right(source, out):
    assert faults(source, out) == []


def test_the_judge_sees_a_changed_config(source, out):
    edit_config(out, rope_theta=1e4, dtype="bfloat16", layer_types=["full_attention"] * 10)
    assert faults(source, out) == ['dtype added: "bfloat16"', "rope_theta: 500000.0 became 10000.0"]


def test_the_judge_sees_stale_names(source, out):
    edit_config(out, quantization=source.config["quantization"])
    found = "; ".join(faults(source, out))
    assert "quantization: 1 modules no longer matched, such as model.layers.9.self_attn" in found
    assert "quantization: 1 entries name layers past the end" in found


def test_the_judge_sees_side_files_and_tensors(source, out):
    (out / "tokenizer.json").write_text("{}")
    (out / "added_tokens.json").write_text("{}")
    (out / "LICENSE").unlink()
    (out / "model-00001-of-00003.safetensors").unlink()
    found = faults(source, out)
    for fault in ("tokenizer.json changed", "added_tokens.json is new", "LICENSE lost"):
        assert fault in found
    assert any("tensors lost" in each for each in found)
    assert "the index differs from the files" in found
