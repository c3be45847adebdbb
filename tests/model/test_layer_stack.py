"""LayerStack: find, observe, bypass, remove."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import zoo
from conftest import N_LAYERS
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, T5Config, T5ForConditionalGeneration

from llm_pruner.config.rules import prune_config
from llm_pruner.errors import InvalidPlanError, UnsupportedModelError
from llm_pruner.model.layer_stack import LayerStack

IDS = torch.arange(3, 15).reshape(1, 12)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def generate(model: nn.Module, use_cache: bool) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    return model.generate(IDS, use_cache=use_cache, **options)


@pytest.mark.parametrize("removed", [[3], [1, 4], [2, 3, 4], [0], [7], [0, 7]])
def test_removal_is_exact(model, removed, tmp_path):
    """Pruned, bypassed and reloaded models compute the same, and the original stays whole."""
    stack = LayerStack(model)
    before = logits(model)
    with stack.bypass(removed):
        bypassed = logits(model)
    pruned = stack.remove(removed)
    torch.testing.assert_close(logits(pruned), bypassed, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(bypassed, before, atol=1e-4), "the layers must matter in this test"
    assert torch.equal(generate(pruned, True), generate(pruned, False))
    pruned.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(reloaded), bypassed, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(model), before)
    assert len(LayerStack(model)) == len(stack) == N_LAYERS


def test_weights_are_shared_and_cache_slots_renumbered(model):
    pruned = LayerStack(model).remove([0, 3])
    assert {id(p) for p in pruned.parameters()} < {id(p) for p in model.parameters()}
    assert pruned.config.num_hidden_layers == N_LAYERS - 2
    assert model.config.num_hidden_layers == N_LAYERS
    slots = [m.layer_idx for m in pruned.modules() if hasattr(m, "layer_idx")]
    assert sorted(set(slots)) == list(range(N_LAYERS - 2))
    own = [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")]
    assert sorted(set(own)) == list(range(N_LAYERS))


def test_bypass_gives_the_layers_back_after_an_error(llama):
    stack = LayerStack(llama)
    before = list(stack)
    heads = stack[1].self_attn
    with stack.bypass([1, 2]):
        assert stack[1] is not before[1]
        assert stack[1].self_attn is heads, "a bypass answers for its layer"
    assert list(stack) == before
    with pytest.raises(RuntimeError, match="in the middle"), stack.bypass([1, 2]):
        raise RuntimeError("in the middle")
    assert list(stack) == before


def test_observe_sees_every_layer_and_leaves_no_hook(model):
    stack = LayerStack(model)
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    with stack.observe(lambda *entry: seen.append(entry)):
        full = logits(model)
    assert [index for index, _, _ in seen] == list(range(N_LAYERS))
    for (_, _, leaving), (_, entering, _) in pairwise(seen):
        assert torch.equal(leaving, entering)
    final_norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    with torch.inference_mode():
        head = model.lm_head(final_norm(seen[-1][2]))
    torch.testing.assert_close(head, full)
    assert not any(layer._forward_hooks for layer in stack)

    def fail(index, entering, leaving):
        raise RuntimeError("observer")

    with pytest.raises(RuntimeError, match="observer"), stack.observe(fail):
        logits(model)
    assert not any(layer._forward_hooks for layer in stack)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([8], "Layer 8 is out of range: indices are whole numbers from 0 to 7"),
        ([-1], "Layer -1 is out of range"),
        ([2, 2], r"Layers \[2\] are listed more than once"),
        ([1.5], "Layer 1.5 is not an index"),
        ([True], "Layer True is not an index"),
        (list(range(8)), "All 8 layers would be removed"),
    ],
)
def test_impossible_layers_are_refused(llama, layers, message):
    with pytest.raises(InvalidPlanError, match=message):
        LayerStack(llama).remove(layers)


def test_encoder_decoder_is_refused():
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        LayerStack(T5ForConditionalGeneration(config))


def test_a_model_without_config_needs_a_path():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    with pytest.raises(UnsupportedModelError, match=r"LayerStack\(model, path="):
        LayerStack(Odd())
    stack = LayerStack(Odd(), path="tower")
    assert len(stack) == 3
    assert len(LayerStack(stack.remove([1]), path="tower")) == 2
    with pytest.raises(UnsupportedModelError, match="no module 'nothing'"):
        LayerStack(Odd(), path="nothing")


def test_a_layer_that_depends_on_its_index_is_refused():
    """Inkling2's layers form blocks of a fixed length: half a block cannot go."""
    variant = zoo.VARIANTS["inkling2_text-blocks-of-2"]
    stack = LayerStack(zoo.build(variant.model_type, **variant.overrides))
    with pytest.raises(UnsupportedModelError, match="change with their index") as refused:
        stack.remove([2])
    assert "Sets close to this one that can be removed: [[1, 2], [2, 3]]" in str(refused.value)


def test_config_rules():
    config = Qwen2MoeConfig(num_hidden_layers=6, mlp_only_layers=[1, 3, 5])
    prune_config(config, [0, 2, 3, 5], 6)
    assert config.num_hidden_layers == 4
    assert config.mlp_only_layers == [2, 3]
    assert len(config.layer_types) == 4
