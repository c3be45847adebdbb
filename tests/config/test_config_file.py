"""What config.json and the tensors' names say of the decoder, and the file without some layers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llm_pruner.config.config_file import (
    NeedsMemoryError,
    decoder_path,
    find_layers,
    layer_count,
    prune_config_file,
    stored_quantization,
)
from llm_pruner.config.outer_rules import injected_layers, prune_outer, refuse_injected
from llm_pruner.errors import LoadError, UnsupportedModelError


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{index}.mlp.weight" for index in range(count)]


# Depth of the decoder and of the other tower, as published models have them.
DEPTHS = [(34, 27), (62, 27), (40, 24), (32, 32), (28, 24), (24, 27), (100, 32), (27, 27), (4, 80)]
TOWERS = [
    ("vision_config", "num_hidden_layers", "vision_tower.vision_model.encoder.layers."),
    ("vision_config", "depth", "model.visual.blocks."),
    ("audio_config", "num_hidden_layers", "audio_tower.layers."),
    ("encoder_config", "num_layers", "encoder.layers."),
    ("perceiver_config", "depth", "model.connector.perceiver_resampler.layers."),
]
DECODERS = ["language_model.model.layers.", "model.language_model.layers.", "model.text_model.h."]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("part", "field", "tower"), TOWERS)
@pytest.mark.parametrize("depths", DEPTHS)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_depth_is_that_of_the_decoder(decoder, part, field, tower, depths, reverse):
    """Whatever the other tower has, and whichever comes first in the file."""
    depth, other = depths
    parts = {"text_config": {"num_hidden_layers": depth}, part: {field: other}}
    names = numbered(decoder, depth) + numbered(tower, other)
    if reverse:
        parts, names = dict(reversed(parts.items())), names[::-1]
    found = find_layers(names, {"model_type": "wrapper", **parts}, "here")
    assert (found.prefixes, found.num_layers) == ((decoder,), depth)


def test_a_stray_count_is_not_the_depth():
    values = {"model_type": "llama", "num_hidden_layers": 8, "n_layers": 3}
    assert find_layers(numbered("model.layers.", 8), values, "here").num_layers == 8
    pruned = prune_config_file(values, [0, 1], 8)
    assert pruned == {"model_type": "llama", "num_hidden_layers": 2, "n_layers": 3}


@pytest.mark.parametrize("stored", [3, 7, 9, 12])
def test_a_config_that_contradicts_its_tensors_is_an_error(stored):
    values = {"num_hidden_layers": 8}
    words = rf"its config counts 8 layers, and {stored} are numbered, model.layers.0 to "
    with pytest.raises(LoadError, match=words):
        find_layers(numbered("model.layers.", stored), values, "here")


@pytest.mark.parametrize("name", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_blocks_that_are_announced_may_follow_the_last_layer(name):
    values = {"num_hidden_layers": 8, name: 2}
    for stored in (8, 10):  # or are not there, in a copy without them
        assert find_layers(numbered("model.layers.", stored), values, "x").num_layers == 8
    with pytest.raises(LoadError):
        find_layers(numbered("model.layers.", 9), values, "x")
    names = numbered("model.layers.", 8) + numbered("mtp.layers.", 8)
    assert find_layers(names, values, "x").prefixes == ("model.layers.",)


@pytest.mark.parametrize("kinds", ["layer_types", "layers_block_type"])
def test_a_list_of_kinds_counts_layers_too(kinds):
    values = {"model_type": "nemotron_h", kinds: ["mamba", "moe"] * 4, "other": 8}
    assert layer_count(values) == 8
    assert find_layers(numbered("backbone.layers.", 8), values, "x").num_layers == 8
    pruned = prune_config_file(values, [1, 2], 8)
    assert pruned == {"model_type": "nemotron_h", kinds: ["moe", "mamba"], "other": 8}


def test_without_any_count_the_tensors_tell():
    names = numbered("language_model.model.layers.", 6) + numbered("vision_tower.layers.", 9)
    found = find_layers(names, {"text_config": {"model_type": "llama"}, "vision_config": {}}, "x")
    assert (found.prefixes, found.num_layers) == (("language_model.model.layers.",), 6)
    with pytest.raises(NeedsMemoryError, match="its config counts none, and no tensors"):
        find_layers(["model.embed.weight"], {"model_type": "llama"}, "x")


def test_every_spelling_and_all_else_stays_as_it_is():
    values = {
        "architectures": ["NewForCausalLM"],
        "torch_dtype": "bfloat16",
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "short_factor": [1.0] * 4},
        "n_layer": 4,
        "layer_types": ["a", "b", "c", "d"],
        "compress_ratios": [0, 4, 8, 16, 0],
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 2,
        "moe_layer_freq": [0, 0, 1, 1],
        "hybrid_override_pattern": "M-*E",
        "linear_attn_config": {"full_attn_layers": [2, 4], "kda_layers": [1, 3], "heads": 4},
        "sparse_attention_config": {"freq": [0, 1, 0, 1]},
        "eos_token_id": [1, 2, 3, 4],
        "tie_word_embeddings": False,
    }
    pruned = prune_config_file(values, [1, 3], 4)
    assert list(pruned) == list(values)
    assert {name: value for name, value in pruned.items() if value != values[name]} == {
        "n_layer": 2,
        "layer_types": ["b", "d"],
        "compress_ratios": [4, 16, 0],
        "first_k_dense_replace": 1,
        "moe_layer_freq": [0, 1],
        "hybrid_override_pattern": "-E",
        "linear_attn_config": {"full_attn_layers": [1, 2], "kda_layers": [], "heads": 4},
        "sparse_attention_config": {"freq": [1, 1]},
    }


def test_parts_of_a_composite_config_are_left_alone_but_for_the_decoder():
    values = {
        "num_hidden_layers": 4,
        "text_config": {"num_hidden_layers": 4, "layer_types": ["a", "b", "a", "b"]},
        "vision_config": {"num_hidden_layers": 4, "layer_types": ["v"] * 4},
    }
    assert decoder_path(values) == ("text_config",)
    assert decoder_path({"thinker_config": {"text_config": {}}}) == (
        "thinker_config",
        "text_config",
    )
    assert prune_config_file(values, [0, 3], 4) == {
        "num_hidden_layers": 2,
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]},
        "vision_config": {"num_hidden_layers": 4, "layer_types": ["v"] * 4},
    }


def test_no_blocks_are_announced_where_none_are_left():
    values = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "use_mtp": True}
    kept = prune_config_file(values, [0, 1], 4)
    assert kept["num_nextn_predict_layers"] == 1
    dropped = prune_config_file(values, [0, 1], 4, drop_mtp=True)
    assert dropped == {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "use_mtp": False}


def test_the_way_that_weights_are_quantised_is_found_in_every_part():
    assert stored_quantization({"quantization_config": {"quant_method": "awq"}}) == "awq"
    assert stored_quantization({"quantization": {"bits": 4}}) == "quantization"
    assert stored_quantization({"text_config": {"compression_config": {}}}) == "compression_config"
    assert stored_quantization({"text_config": {"num_hidden_layers": 2}}) is None


def test_layers_after_which_image_features_are_added_have_to_stay():
    vision = SimpleNamespace(deepstack_visual_indexes=[8, 16, 24])
    config = SimpleNamespace(vision_config=vision, text_config=SimpleNamespace())
    assert injected_layers(config) == 3
    vision.depth = 17  # which has no layer 24
    assert injected_layers(config) == 2
    vision.depth = 27
    refuse_injected(config, [0, 1, 2, 5])
    with pytest.raises(
        UnsupportedModelError, match=r"each of the first 3 layers.*\[1\] among them"
    ):
        refuse_injected(config, [0, 2, 3])
    assert injected_layers(SimpleNamespace(text_config=SimpleNamespace())) == 0


def test_features_that_are_added_before_a_layer_follow_the_next_kept_one():
    config = SimpleNamespace(deepstack_layer_map=[(-5, 2), (-3, 4)], spatial_target_layers=[6])
    prune_outer(config, [0, 1, 3, 4, 7])
    assert config.deepstack_layer_map == [(-5, 2), (-3, 3)]
    assert config.spatial_target_layers == [4]
    same = SimpleNamespace(deepstack_layer_map=[(0, 2)], spatial_target_layers=[2, 2, 5])
    prune_outer(same, [0, 1, 3, 5])  # of one layer: they were one before
    assert (same.deepstack_layer_map, same.spatial_target_layers) == ([(0, 2)], [2, 2, 3])
    with pytest.raises(UnsupportedModelError, match="would be added before one layer, 4"):
        prune_outer(SimpleNamespace(spatial_target_layers=[3, 4]), [0, 4, 5])
    with pytest.raises(UnsupportedModelError, match="no layer from there on is kept"):
        prune_outer(SimpleNamespace(spatial_target_layers=[3]), [0, 1])
