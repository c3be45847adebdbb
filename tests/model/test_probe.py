"""Inputs that models are compared on: images and audio are among them, and matter."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from published_configs import CONFIGS
from published_layout import built_model
from published_wrappers import WRAPPERS

from llm_pruner.checkpoint.verify import verify_removal
from llm_pruner.errors import VerificationError
from llm_pruner.model import probe
from llm_pruner.model.layer_stack import LayerStack

IMAGES = "gemma3 llama4 qwen3_5 mistral3 llava internvl qwen2_5_vl qwen3_vl mllama idefics3".split()
AUDIO = "voxtral qwen2_audio".split()
VIDEO = {"qwen3_5", "qwen2_5_vl", "qwen3_vl"}
ALL = CONFIGS | WRAPPERS


@pytest.mark.parametrize("name", [*IMAGES, *AUDIO])
def test_what_a_model_takes_is_given_to_it_and_matters(name, tmp_path):
    model = built_model(ALL[name], tmp_path)
    found = probe.probe_inputs(model)
    expected = {"audio"} if name in AUDIO else {"image"}
    assert found.keys() == {"text"} | expected | ({"video"} if name in VIDEO else set())
    placeholders = {
        value
        for key, value in vars(model.config).items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    assert not placeholders & set(found["text"]["input_ids"].flatten().tolist())
    for modality in found.keys() - {"text"}:
        inputs = found[modality]
        argument = probe.MODALITIES[modality][0]
        with torch.no_grad():
            logits = model(**inputs).logits
            other = model(**{**inputs, argument: torch.randn_like(inputs[argument])}).logits
        assert logits.isfinite().all()
        assert (logits - other).abs().max() > 1e-4
    assert probe.probe_inputs(model) is found


def test_the_image_finds_what_text_does_not(tmp_path):
    """Image features that are added after other layers are found out by an image alone."""
    model = built_model(WRAPPERS["qwen3_vl"], tmp_path)
    stack = LayerStack(model)
    pruned = stack.remove([4, 5])
    verify_removal(stack, [4, 5], pruned)
    visual = pruned.model.visual
    visual.deepstack_merger_list = visual.deepstack_merger_list[::-1]
    with pytest.raises(VerificationError, match="given image, compute something else"):
        verify_removal(stack, [4, 5], pruned)


def test_an_image_leaves_no_trace_on_the_model(tmp_path):
    """Some classes keep the positions of the last image for the tokens that follow."""
    model = built_model(WRAPPERS["qwen3_vl"], tmp_path)
    assert model.model.rope_deltas is None
    stack = LayerStack(model)
    pruned = stack.remove([4])
    verify_removal(stack, [4], pruned)
    assert model.model.rope_deltas is pruned.model.rope_deltas is None


def test_a_modality_without_a_known_layout_is_named(tmp_path, monkeypatch, caplog):
    model = built_model(WRAPPERS["llava"], tmp_path)
    monkeypatch.setattr(probe, "_layouts", lambda model, modality: iter(()))
    assert probe.probe_inputs(model).keys() == {"text"}
    assert "LlavaForConditionalGeneration is not compared given image" in caplog.text


def test_text_alone_is_enough_for_a_language_model():
    assert probe.probe_inputs(tiny_llama()).keys() == {"text"}
