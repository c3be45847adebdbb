"""One architecture per rule, judged as in `benchmarks/architectures.py`; that runs all of them."""

from __future__ import annotations

import json

import architectures as matrix
import pytest
import torch
import zoo
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from llm_pruner.config import rules
from llm_pruner.errors import UnsupportedModelError
from llm_pruner.model import layer_stack, removal
from llm_pruner.model.layer_stack import LayerStack

# Name -> the rule that it stands for.
CAUSAL = {
    "llama": "count",
    "gpt2": "count under another name",
    "gpt_neox": "layers elsewhere in the tree",
    "falcon": "cache slot in self_attention",
    "bloom": "position bias made outside the layers",
    "opt": "projections around the layers",
    "phi": "biases and a shared norm",
    "mixtral": "experts",
    "gemma2": "layer_types that alternate",
    "bart": "decoder inside an encoder-decoder's config",
    "qwen3": "layer_types",
    "gemma3_text": "layer_types on the layers",
    "smollm3": "no_rope_layers",
    "granite_swa": "layer_rope_theta",
    "laguna": "heads per layer",
    "glm_moe_dsa": "indexer types; top-k passed on",
    "qwen3_moe": "mlp_only_layers",
    "llama4_text": "moe_layers",
    "lfm2": "full_attn_idxs",
    "bamba": "attn_layer_indices",
    "deepseek_v3": "leading dense layers",
    "jamba": "periods",
    "ernie4_5_moe": "interval, start and end",
    "qwen4_exp_text": "indices from 1",
    "gemma3n_text": "tensors with one block per layer",
    "gemma4_text": "overrides by layer index",
    "nemotron_h": "count that follows from a list",
    "blt": "decoder described by another part",
    "hrm_text": "two stacks",
    "xlm": "layers in parallel lists",
    "longcat_flash": "two slots per layer",
    "zamba2": "adapters of a shared block",
    "diffllama": "index in the arithmetic",
    "beam": "index in the residual sum",
    "minicpm3": "count in the arithmetic",
    "zaya": "router state passed on",
    "rwkv": "weights rescaled in place",
    "emu3": "text class of a composite config",
    "openai-gpt": "layers that return lists",
    "reformer": "layers that return named tuples",
    "big_bird": "training seed",
}
ENDS = ["gpt_neox_japanese", "minimax", "modernbert-decoder", "rwkv", "glm_moe_dsa", "zaya"]
VARIANTS = [
    "gpt2-inverse-layer-scale",
    "qwen2_moe-sparse-step-2",
    "recurrent_gemma-period-3",
    "gemma4_text-shared-kv",
    "inkling2_text-blocks-of-2",
    "lfm2-last-attention",
    "olmo_hybrid-last-of-a-kind",
]
WRAPPERS = ["gemma3", "mistral_large4", "llava", "qwen2_5_vl", "qwen3_vl"]
CASES = [
    *(("causal", name) for name in CAUSAL),
    *(("ends", name) for name in ENDS),
    *(("variants", name) for name in VARIANTS),
    *(("wrappers", name) for name in WRAPPERS),
]


@pytest.mark.parametrize(("suite", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_removal_is_exact_or_refused(suite, name):
    for case in matrix.run_model(suite, name):
        assert case.outcome in ("PASS", "MUST REFUSE"), case


def test_every_listed_refusal_is_one():
    """The zoo's list of what cannot be expressed names sets that exist."""
    assert {name for name, _ in zoo.INEXPRESSIBLE} <= {
        *zoo.CAUSAL,
        *zoo.VARIANTS,
        *zoo.WRAPPERS,
    }


def outcomes(suite: str, name: str) -> set[str]:
    return {case.outcome for case in matrix.run_model(suite, name)}


def test_without_renumbering_the_matrix_turns_red(monkeypatch):
    monkeypatch.setattr(removal, "SLOT_NAMES", ())
    assert outcomes("causal", "llama") == {"REFUSED"}
    monkeypatch.setattr(removal, "_copy_attributes", lambda *args: None)
    assert outcomes("causal", "llama") & {"CRASH", "WRONG"}


def test_without_slicing_the_matrix_turns_red(monkeypatch):
    monkeypatch.setattr(rules, "_is_per_layer", lambda *args: False)
    for name in ("qwen3", "smollm3"):
        assert "PASS" not in outcomes("causal", name)


TABLES = {
    "FIELD_RULES": ["deepseek_v3", "qwen3_moe"],
    "PATTERNS": ["jamba"],
    "SCALED_FIELDS": ["minicpm3"],
    "DECODER_PARTS": ["blt"],
    "COMPENSATIONS": ["beam", "diffllama", "zamba2", "rwkv"],
}


@pytest.mark.parametrize(("table", "name"), [(t, name) for t in TABLES for name in TABLES[t]])
def test_without_its_rule_the_matrix_turns_red(monkeypatch, table, name):
    monkeypatch.setattr(removal if table == "COMPENSATIONS" else rules, table, {})
    assert outcomes("causal", name) != {"PASS"}


def test_a_refusal_names_sets_that_work():
    model = zoo.build("minimax")
    with pytest.raises(UnsupportedModelError, match="must be full attention") as refused:
        LayerStack(model).remove([0])
    _, _, named = str(refused.value).partition(" Sets close to this one that can be removed: ")
    alternatives = json.loads(named.removesuffix("."))
    assert alternatives[0] == [0, 1]
    for layers in alternatives:
        assert len(LayerStack(LayerStack(model).remove(layers))) == zoo.N_LAYERS - len(layers)


def test_a_refusal_says_if_nothing_close_works_and_tries_little(monkeypatch):
    built: list[object] = []
    skeleton = removal.skeleton
    monkeypatch.setattr(removal, "skeleton", lambda model: built.append(0) or skeleton(model))
    with pytest.raises(UnsupportedModelError, match=r"Nor can the sets closest to it: \[\[1, 2"):
        LayerStack(zoo.build("inkling2_text", 32)).remove([2])
    assert len(built) == 1 + layer_stack.TRIALS


def test_a_kept_layer_may_not_lose_what_it_uses():
    variant = zoo.VARIANTS["gemma3n_text-shared-kv"]
    model = zoo.build(variant.model_type, **variant.overrides)
    with pytest.raises(UnsupportedModelError, match="uses the keys and values of layer 3"):
        LayerStack(model).remove([3])


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "qwen3", "openai-gpt"])
def test_replay_is_the_rest_of_the_pass(name):
    """From every stored state the model's own forward gives the same logits, at less cost."""
    model = zoo.build(name)
    stack, given = LayerStack(model), zoo.inputs(model)
    states: list[torch.Tensor] = []
    with torch.no_grad(), stack.observe(lambda index, entering, leaving: states.append(entering)):
        full = model(**given, use_cache=False).logits
    for start, state in enumerate(states):
        ran: list[int] = []
        watch = stack.observe(lambda index, entering, leaving, ran=ran: ran.append(index))
        with stack.replay(start, state), watch, torch.no_grad():
            again = model(**given, use_cache=False).logits
        assert torch.equal(again, full)
        assert ran == list(range(start, len(stack)))
    assert torch.equal(zoo.logits(model), full)


def test_replay_refuses_what_it_cannot_do():
    with pytest.raises(UnsupportedModelError, match="pass on more than the hidden state"):
        LayerStack(zoo.build("zaya")).replay(2, torch.zeros(1, 12, 32)).__enter__()
    with pytest.raises(ValueError, match="start=6 must be from 0 to 5"):
        LayerStack(zoo.build("llama")).replay(6, torch.zeros(1)).__enter__()


class OddConfig(PreTrainedConfig):
    model_type = "odd-for-tests"

    def __init__(self, depth=6, width=16, vocab_size=64, **options):
        self.depth, self.width, self.vocab_size = depth, width, vocab_size
        super().__init__(**options)


class OddLayer(nn.Module):
    def __init__(self, width, index):
        super().__init__()
        self.mix, self.layer_idx = nn.Linear(width, width), index

    def forward(self, hidden_states):
        return hidden_states + self.mix(hidden_states).tanh()


class OddModel(PreTrainedModel):
    """A custom class: its depth is called `depth`, its layers are a `tower`."""

    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.tower = nn.ModuleList(OddLayer(config.width, i) for i in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.embed(input_ids)
        for layer in self.tower:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.head(hidden))


def test_a_custom_class_works_by_naming_the_path(tmp_path):
    model = OddModel(OddConfig()).eval()
    with pytest.raises(UnsupportedModelError, match=r"LayerStack\(model, path="):
        LayerStack(model)
    stack = LayerStack(model, path="tower")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        with stack.bypass([1, 4]):
            want = model(ids).logits
        states = []
        with stack.observe(lambda index, entering, leaving: states.append(leaving)):
            assert not torch.equal(model(ids).logits, want)
        pruned = stack.remove([1, 4])
        pruned.save_pretrained(tmp_path)
        assert torch.equal(pruned(ids).logits, want)
        assert torch.equal(OddModel.from_pretrained(tmp_path)(ids).logits, want)
    assert len(states) == 6
    assert pruned.config.depth == 4
    assert [layer.layer_idx for layer in pruned.tower] == [0, 1, 2, 3]
