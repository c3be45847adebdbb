"""Probe inputs of every modality, on tiny models of many architectures."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import zoo
from published_layout import built_model
from published_wrappers import WRAPPERS
from transformers import AutoModelForMultimodalLM

from llm_pruner.checkpoint.verify import verify_removal
from llm_pruner.errors import VerificationError
from llm_pruner.model import probe
from llm_pruner.model.layer_stack import LayerStack

SMALL = {"image_size": 32, "patch_size": 8}
OMNI_AUDIO = {"output_dim": 32, "downsample_hidden_size": 16}

# What the sizes by name of `zoo` do not know of towers.
OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"vision_config": SMALL, "projector_patch_to_query_dict": {16: 4}},
    "aya_vision": {"vision_config": SMALL},
    "cohere2_vision": {"vision_config": SMALL},
    "gemma3": {"vision_config": SMALL},
    "gemma4": {
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "position_embedding_size": 64,
            "pooling_kernel_size": 2,
        },
        "audio_config": {
            "model_type": "gemma4_audio",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "subsampling_conv_channels": [128, 4],
            "output_proj_dims": 32,
        },
    },
    "granite4_vision": {
        "vision_config": {**SMALL, "hidden_size": 64},
        "image_grid_pinpoints": [[64, 32], [32, 64]],
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[1, 0], [0, 1]],
        "spatial_target_layers": [0, 1, 2, 1],
    },
    "granite_speech": {
        "encoder_config": {
            "input_dim": 16,
            "hidden_dim": 32,
            "num_heads": 4,
            "dim_head": 8,
            "context_size": 16,
        },
        "projector_config": {"encoder_hidden_size": 32},
        "window_size": 15,
    },
    "kimi_k25": {
        "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8},
        "projection_hidden_size": 32,
    },
    "llama4": {
        "vision_config": {
            **SMALL,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        }
    },
    "llava": {"vision_config": SMALL},
    "llava_next": {"vision_config": SMALL, "image_grid_pinpoints": [[64, 32], [32, 64]]},
    "llava_onevision": {"vision_config": SMALL, "image_grid_pinpoints": [[64, 32], [32, 64]]},
    "llava_next_video": {"vision_config": SMALL, "image_grid_pinpoints": [[64, 32], [32, 64]]},
    "mllama": {
        "vision_config": {
            **SMALL,
            "intermediate_layers_indices": [1],
            "vision_output_dim": 64,
            "num_global_layers": 1,
        }
    },
    "paligemma": {"vision_config": SMALL},
    "qwen2_5_omni_thinker": {
        "vision_config": {"window_size": 112},
        "audio_config": OMNI_AUDIO,
        "vision_start_token_id": 80,
    },
    "qwen2_5_vl": {"vision_config": {"window_size": 112}},
    "qwen3_omni_moe_thinker": {
        "audio_config": OMNI_AUDIO,
        "vision_start_token_id": 80,
    },
    "vipllava": {"vision_config": SMALL, "vision_feature_layers": [-1, 1]},
    "voxtral": {"audio_config": {"intermediate_size": 128}, "audio_token_id": 90},
}


def build(model_type: str) -> Any:
    config = zoo.tiny_config(model_type, 3, **OVERRIDES.get(model_type, {}))
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    return zoo.randomized(model).eval()


_IMAGE, _VIDEO, _AUDIO = ("image",), ("image", "video"), ("audio",)
EXPECTED: dict[str, tuple[str, ...]] = {
    "aria": _IMAGE,
    "aya_vision": _IMAGE,
    "cohere2_vision": _IMAGE,
    "ernie4_5_vl_moe": _VIDEO,
    "gemma3": _IMAGE,
    "gemma4": ("image", "audio", "video"),
    "glm4v": _VIDEO,
    "granite4_vision": _IMAGE,
    "granite_speech": _AUDIO,
    "idefics3": _IMAGE,
    "internvl": _IMAGE,
    "kimi_k25": _VIDEO,
    "lfm2_vl": _IMAGE,
    "llama4": _IMAGE,
    "llava": _IMAGE,
    "llava_next": _IMAGE,
    "llava_next_video": _VIDEO,
    "llava_onevision": _VIDEO,
    "mistral3": _IMAGE,
    "mllama": _IMAGE,
    "paligemma": _IMAGE,
    "qwen2_5_omni_thinker": ("image", "audio", "video"),
    "qwen2_5_vl": _VIDEO,
    "qwen2_audio": _AUDIO,
    "qwen2_vl": _VIDEO,
    "qwen3_5": _VIDEO,
    "qwen3_omni_moe_thinker": ("image", "audio", "video"),
    "qwen3_vl": _VIDEO,
    "qwen3_vl_moe": _VIDEO,
    "smolvlm": _IMAGE,
    "video_llama_3": _VIDEO,
    "vipllava": _IMAGE,
    "voxtral": _AUDIO,
}
MEDIA = {name for names in probe.MEDIA.values() for name in names}


@pytest.fixture(autouse=True)
def no_warnings_yet() -> None:
    probe._warn.cache_clear()


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**inputs).logits
    return result.float()


@pytest.mark.parametrize("model_type", sorted(EXPECTED))
def test_media_of_every_modality_matter(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(model_type)
    found = probe.probe_inputs(model)
    assert tuple(found) == ("text", *EXPECTED[model_type])
    assert not caplog.records
    special = probe._special_tokens(model.config)
    assert not special & set(found["text"]["input_ids"].flatten().tolist())
    assert logits(model, found["text"]).isfinite().all()
    for modality in EXPECTED[model_type]:
        inputs = found[modality]
        (name,) = MEDIA & inputs.keys()
        want = logits(model, inputs)
        assert want.shape[1] == inputs["input_ids"].shape[1]
        got = logits(model, inputs | {name: inputs[name].flip(-1)})
        assert not torch.allclose(got, want, rtol=1e-3, atol=1e-3), modality


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        one[key].keys() == other[key].keys()
        and all(torch.equal(one[key][name], other[key][name]) for name in one[key])
        for key in one
    )


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "qwen2_5_vl", "qwen3_5"])
def test_the_model_is_left_as_it_was(model_type: str) -> None:
    model = build(model_type).train()
    config, state = model.config.to_dict(), copy.deepcopy(model.state_dict())
    deltas = [m.rope_deltas for m in model.modules() if hasattr(m, "rope_deltas")]
    first = probe.probe_inputs(model)
    assert model.training
    assert model.config.to_dict() == config
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert [m.rope_deltas for m in model.modules() if hasattr(m, "rope_deltas")] == deltas
    assert same(first, probe.probe_inputs(model))


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl", "mllama", "voxtral", "lfm2_vl"])
def test_half_precision(model_type: str) -> None:
    found = probe.probe_inputs(build(model_type).to(torch.bfloat16))
    assert tuple(found) == ("text", *EXPECTED[model_type])
    for modality in EXPECTED[model_type]:
        assert next(found[modality][n] for n in MEDIA & found[modality].keys()).dtype == (
            torch.bfloat16
        )


def test_text_models_have_text_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = zoo.build("llama", 3)
    found = probe.probe_inputs(model)
    assert list(found) == ["text"]
    assert list(found["text"]) == ["input_ids"]
    assert found["text"]["input_ids"].shape == (1, 16)
    assert not caplog.records


def test_text_is_no_longer_than_the_model_allows() -> None:
    model = zoo.build("llama", 3, max_position_embeddings=8)
    assert probe.probe_inputs(model)["text"]["input_ids"].shape == (1, 8)


def test_a_pruned_model_takes_the_same_inputs() -> None:
    model = build("qwen3_vl")
    found = probe.probe_inputs(model)
    smaller = copy.deepcopy(model)
    del smaller.model.language_model.layers[1]
    assert same(found, probe.probe_inputs(smaller))


def test_a_class_without_a_recipe_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build("fuyu")
    with caplog.at_level(logging.WARNING, "llm_pruner"):
        assert list(probe.probe_inputs(model)) == ["text"]
        probe.probe_inputs(model)
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("FuyuForCausalLM takes pixel_values, image_patches, ")
    assert message.endswith("is not compared with an image.")


def test_media_that_do_not_matter_are_no_comparison(caplog: pytest.LogCaptureFixture) -> None:
    model = build("gemma3")
    torch.nn.init.zeros_(model.model.multi_modal_projector.mm_input_projection_weight)
    assert list(probe.probe_inputs(model)) == ["text"]
    assert "is not compared with an image" in caplog.text


def test_a_model_without_its_tower_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    model = zoo.build("gemma4", 3)  # its config has no vision and no audio
    assert list(probe.probe_inputs(model)) == ["text"]
    assert not caplog.records


def test_an_image_finds_what_text_does_not(tmp_path: Any) -> None:
    """Image features that are added after other layers are found out by an image alone."""
    model = built_model(WRAPPERS["qwen3_vl"], tmp_path)
    stack = LayerStack(model)
    pruned = stack.remove([4, 5])
    verify_removal(stack, [4, 5], pruned)
    assert model.model.rope_deltas is pruned.model.rope_deltas is None, "no image leaves a trace"
    visual = pruned.model.visual
    visual.deepstack_merger_list = visual.deepstack_merger_list[::-1]
    with pytest.raises(VerificationError, match="given image, compute something else"):
        verify_removal(stack, [4, 5], pruned)


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_published_layouts_are_probed(name: str, tmp_path: Any) -> None:
    found = probe.probe_inputs(built_model(WRAPPERS[name], tmp_path))
    media = {"audio"} if name in ("voxtral", "qwen2_audio") else {"image"}
    assert media <= found.keys()


def test_a_tower_as_deep_as_the_decoder_is_told_from_it() -> None:
    """Whatever it is called: the decoder's modules have the config of the decoder."""
    config = zoo.tiny_config("granite_speech", 6, encoder_config={"num_layers": 6})
    stack = LayerStack(AutoModelForMultimodalLM.from_config(config))
    assert stack.paths == ("model.language_model.layers",)
