"""Tiny random causal language models of every architecture that transformers knows.

Models have a handful of layers, hidden size 32 and random weights that make every layer matter,
so that any rule a removal needs can be tried on a CPU in a second. `reference_logits` says what a
model without some of its layers has to compute; it shares no code with the package.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import copy
import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
transformers.logging.disable_progress_bar()

N_LAYERS = 6
ENCODER_LAYERS = 7  # of models with an encoder: unlike the decoder, so that counts do not mix
TOWER_LAYERS = 2
VOCAB = 97
TOKENS = 12
POSITIONS = 128


def _reasons(table: dict[str, str]) -> dict[str, str]:
    """Name -> reason, from reason -> names."""
    return {name: why for why, names in table.items() for name in names.split()}


CANNOT_BUILD = _reasons(
    {
        "its vision tower needs timm; the text decoder is covered by gemma3n_text": "gemma3n",
        "a drafter that needs another model's states; its config raises": (
            "gemma4_assistant gemma4_unified_assistant"
        ),
        "AutoModelForCausalLM passes the composite config to a decoder class": (
            "musicgen musicgen_melody"
        ),
    }
)

CAUSAL: list[str] = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(CANNOT_BUILD))

COUNT_FIELDS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks "
    "layers"
).split()
ENCODER_COUNT_FIELDS = ("encoder_layers", "num_encoder_layers")

# The size of every integer field, by name. Fields that are None by default stay None.
SIZES: dict[str, int] = {}
for _value, _names in {
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    POSITIONS: (
        "max_position_embeddings n_positions max_seq_len context_length n_ctx "
        "max_source_positions max_target_positions position_bias_max_distance "
    ),
    64: "original_max_position_embeddings index_topk log_scaling_n_floor floor_scale",
    48: (
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dff dim_ff "
        "feed_forward_size ffn_hidden_size dense_intermediate_size intermediate_size_mlp "
        ""
    ),
    32: (
        "hidden_size d_model n_embd emb_dim embedding_size projection_dim "
        "prompt_mid_dim out_hidden_size rel_extent "
        "input_embedding_size output_embedding_size embed_dim hidden_size_global"
    ),
    16: (
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size "
        "kv_lora_rank q_lora_rank o_lora_rank pronunciation_embed_dim shape_embed_dim "
        "router_hidden_size position_bias_num_buckets hc_lowrank depth"
    ),
    8: (
        "head_dim v_head_dim qk_nope_head_dim swa_head_dim index_head_dim mamba_d_state "
        "state_size ssm_state_size mamba_head_dim linear_key_head_dim linear_value_head_dim "
        "linear_head_dim dim_head kv_channels attention_head_size hidden_size_per_layer_input "
        "chunk_size mamba_chunk_size laurel_rank adapter_rank gated_norm_rank d_rel "
        "prompt_length num_buckets"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
        "qk_rope_head_dim rotary_dim mamba_n_heads mamba_num_heads n_mamba_heads "
        "linear_num_value_heads linear_num_heads image_seq_length mm_tokens_per_image "
        "index_block_size block_multiple_of index_topk_blocks "
        # windows: shorter than the input, so that a wrong kind of attention shows
        "sliding_window sliding_window_size window_size local_attention_window_len "
        "attention_window_size attention_chunk_size local_attention"
    ),
    2: (
        "num_key_value_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k "
        "linear_num_key_heads index_n_heads n_groups o_groups segment_types "
        "type_vocab_size max_window_layers hc_mult hc_count zero_expert_num num_codebooks"
    ),
    1: "n_group topk_group",
}.items():
    SIZES |= dict.fromkeys(_names.split(), _value)

# Kinds of layers never alternate regularly: a regular pattern hides wrong ones.
PATTERN = "abaabbabbbaa"
MLP_PATTERN = "aababbbaabab"


class Mix:
    """An override that depends on the number of layers: one kind per layer, by a pattern."""

    def __init__(self, *kinds: Any, pattern: str = PATTERN) -> None:
        self.kinds, self.pattern = kinds, pattern

    def __call__(self, n_layers: int) -> list[Any]:
        """`kinds[0]` where the pattern says a, `kinds[1]` for b and so on."""
        letters = islice(cycle(self.pattern), n_layers)
        return [self.kinds["abcd".index(letter)] for letter in letters]


SLIDING = Mix("sliding_attention", "full_attention")
FULL_FIRST = Mix("full_attention", "sliding_attention")
DENSE_SPARSE = Mix("dense", "sparse", pattern=MLP_PATTERN)
NO_ROPE = Mix(1, 0)
INDEXERS = Mix("full", "shared")

# What sizes by name cannot know.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 4, 5]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "cohere2_moe": {"mlp_layer_types": DENSE_SPARSE},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_theta": 10000.0},
            "full_attention": {"rope_theta": 100.0},
        },
    },
    "cpmant": {"prompt_types": 4, "segment_types": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "layer_types": Mix(
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
            pattern="abcabb",
        ),
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "layer_types": FULL_FIRST,
    },
    "dots3_note": {
        "vision_config": {
            "pyramid_num_routed": [-1, 4],
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {
        "sliding_window": 4,
        "head_dim": 12,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "ernie4_5_moe": {"moe_layer_start_index": 2, "moe_layer_end_index": 4},
    "flint": {"mlp_only_layers": [0, 3]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": Mix(48, 32),
        "activation_sparsity_pattern": Mix(0.5, 0.0, pattern=MLP_PATTERN),
    },
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm_moe_dsa": {"indexer_types": INDEXERS},
    "gpt_neo": {"attention_types": lambda n_layers: [[Mix("local", "global")(n_layers), 1]]},
    "granite_swa": {"layer_rope_theta": Mix(10000.0, 100.0, pattern=MLP_PATTERN)},
    "granitemoe_swa": {"layer_rope_theta": Mix(10000.0, 100.0, pattern=MLP_PATTERN)},
    "granitemoehybrid": {"layer_types": Mix("linear_attention", "full_attention")},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hy_v4": {"indexer_types": INDEXERS},
    "inkling_text": {"mlp_layer_types": DENSE_SPARSE},
    "jamba": {
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "expert_layer_period": 3,
        "expert_layer_offset": 0,
    },
    "laguna": {
        "layer_types": SLIDING,
        "num_attention_heads_per_layer": Mix(4, 2, pattern="abbaba"),
    },
    "lfm2": {"full_attn_idxs": [1, 4, 5]},
    "lfm2_moe": {"layer_types": Mix("conv", "full_attention")},
    "lfm3": {"layer_types": Mix("conv", "full_attention", "sliding_attention", pattern="abcacb")},
    "llama4_text": {"no_rope_layers": NO_ROPE, "moe_layers": [1, 3, 4]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"head_dim": 16},
    "mellum": {"layer_types": SLIDING, "mlp_layer_types": DENSE_SPARSE},
    "minimax_m3_vl_text": {
        "layer_types": Mix("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": DENSE_SPARSE,
    },
    "ministral": {"head_dim": 8, "layer_types": SLIDING},
    "mllama_text_model": {"cross_attention_layers": [2, 4]},
    "moshi": {"sliding_window": 64},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": Mix(
            "linear_attention", "full_attention", "mlp", "moe", pattern="abcdab"
        )
    },
    "qwen2": {"use_sliding_window": True, "layer_types": SLIDING},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": SLIDING, "mlp_only_layers": [1, 3]},
    "qwen3": {"use_sliding_window": True, "layer_types": SLIDING},
    "qwen3_moe": {"mlp_only_layers": [1, 3]},
    "qwen3_next": {"mlp_only_layers": [1, 3]},
    "qwen4_exp_text": {
        "eos_token_id": 2,
        "ple_layer_ids": [1, 4],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": Mix("recurrent", "attention")},
    "reformer": {
        "attn_layers": Mix("local", "lsh"),
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 32,
        "lsh_attn_chunk_length": 32,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "rwkv": {"rescale_every": 2},
    "smollm3": {"no_rope_layers": NO_ROPE, "use_sliding_window": True, "sliding_window": 4},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": Mix("linear_attention", "hybrid", pattern="abbabb")},
    "zamba2": {"layers_block_type": Mix("linear_attention", "hybrid", pattern="abbabb")},
    "zaya": {"layer_types": Mix("hybrid_sliding", "hybrid"), "sliding_window": 4},
}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **more}}


# The same for the parts of vision-language models.
OVERRIDES |= {
    "chameleon": {"vocabulary_map": {"<image>": VOCAB - 1}, "vq_config": {"base_channels": 32}},
    "deepseek_ocr2_text": {"mlp_layer_types": DENSE_SPARSE, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": VOCAB - 1}, "vq_config": {"base_channels": 32}},
    "ernie4_5_vl_moe_text": _rope(mrope_section=[1, 1, 2]),
    "glm4v_moe_text": _rope(mrope_section=[1, 1, 0], partial_rotary_factor=0.5),
    "hunyuan_vl_text": {"head_dim": 8, **_rope(xdrope_section=[1, 1, 1, 1])},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1, 0, 3, 0, 5]}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "step3p5": {"sliding_window": 4, "layer_types": SLIDING},
}
OVERRIDES |= dict.fromkeys(
    "cosmos3_edge_text glm4v_text glm_ocr_text paddleocr_vl_text qwen2_5_omni_text "
    "qwen2_5_vl_text qwen2_vl_text".split(),
    _rope(mrope_section=[2, 1, 1]),
)


def _merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _shrunk(config_class: Any, n_layers: int, tower: bool = False) -> dict[str, Any]:
    """Arguments for a tiny config of a class: every size by its name, kinds of layers mixed."""
    values: dict[str, Any] = {}
    specials = iter(range(VOCAB - 1, 0, -1))
    for field in dataclasses.fields(config_class):
        name, default = field.name, field.default
        if name.endswith(("_token_id", "_token_index")) and isinstance(default, int):
            if default >= VOCAB:
                values[name] = next(specials)
        elif name in COUNT_FIELDS:
            if isinstance(default, int):
                values[name] = TOWER_LAYERS if tower else n_layers
        elif name in ENCODER_COUNT_FIELDS:
            values[name] = TOWER_LAYERS if tower else max(ENCODER_LAYERS, n_layers + 1)
        elif name in SIZES and isinstance(default, int) and default > 1:
            values[name] = SIZES[name]
        elif name == "deepstack_visual_indexes":
            values[name] = [0, 1]
        elif name in ("first_k_dense_replace", "num_dense_layers"):
            values[name] = 2
        elif name == "is_decoder":
            values[name] = True
        elif name in ("initializer_range", "init_std"):
            values[name] = 0.2
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values


def _kinds(config_class: Any, whole: Any, n_layers: int) -> dict[str, Any]:
    """Irregular mixes for the per-layer lists of kinds that the default config has."""
    patterns = {
        "layer_types": PATTERN,
        "layers_block_type": PATTERN,
        "mlp_layer_types": MLP_PATTERN,
    }
    names = {field.name for field in dataclasses.fields(config_class)}
    kinds = {
        name: tuple(dict.fromkeys(getattr(whole, name, None) or ())) for name in names & {*patterns}
    }
    return {
        name: Mix(*mixed, pattern=patterns[name])(n_layers)
        for name, mixed in kinds.items()
        if len(mixed) > 1
    }


def tiny_config(model_type: str, n_layers: int = N_LAYERS, **overrides: Any) -> Any:
    """A tiny config of a model type."""
    more = _merge(OVERRIDES.get(model_type, {}), overrides)
    return _tiny(CONFIG_MAPPING[model_type], n_layers, more)


def _tiny(config_class: Any, n_layers: int, more: dict[str, Any], tower: bool = False) -> Any:
    values = _shrunk(config_class, n_layers, tower)
    whole = config_class()
    if not tower:
        values |= _kinds(config_class, whole, n_layers)
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(whole, name, None)
        if part is None:
            continue
        is_text = part is whole.get_text_config(decoder=True) or name == "global_config"
        inner = _merge(OVERRIDES.get(part.model_type, {}), more.get(name) or {})
        values[name] = _tiny(type(part), n_layers, inner, tower=tower or not is_text)
        more = {key: value for key, value in more.items() if key != name}
    values = _merge(values, more)
    for name, value in values.items():
        if callable(value):
            values[name] = value(n_layers)
    return config_class(**values)


def build(model_type: str, n_layers: int = N_LAYERS, **overrides: Any) -> Any:
    """A tiny random causal language model in which every layer matters."""
    config = tiny_config(model_type, n_layers, **overrides)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return randomized(model).eval()


# Parameters with a meaning of their own keep the values their class gives them.
KEEP = (
    "A_log dt_bias D time_decay time_first time_mix_key time_mix_value time_mix_receptance "
    "recurrent_param balancing_biases"
).split()


def randomized(model: nn.Module) -> nn.Module:
    """Give every weight a size that matters, the same in every architecture."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in KEEP or not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model


PATHS = {
    "blt": "model.global_transformer.layers",
    "cpmant": "cpmant.encoder.layers",
    "prophetnet": "prophetnet.decoder.layers",
    "reformer": "reformer.encoder.layers",
    "rwkv": "rwkv.blocks",
    "xlnet": "transformer.layer",
    "xlstm": "backbone.blocks",
}
USUAL_PATHS = (
    "model.language_model.layers model.decoder.layers model.text_model.layers model.layers "
    "language_model.model.layers text_model.model.layers transformer.h transformer.blocks "
    "backbone.layers"
).split()


def stack_path(model: Any) -> str:
    """Where the layers are."""
    prefix = model.base_model_prefix
    first = PATHS.get(model.config.model_type, "")
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in (first, *USUAL_PATHS, f"{prefix}.encoder.layer", f"{prefix}.layers"):
        if isinstance(modules.get(path), nn.ModuleList):
            return path
    raise LookupError(f"no layers in {type(model).__name__}")


def inputs(model: nn.Module) -> dict[str, Any]:
    """Twelve tokens, the same for every model."""
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(5, 80, (1, TOKENS), generator=generator)}


def logits(model: nn.Module, use_cache: bool = False) -> torch.Tensor:
    """The model's logits for `inputs`."""
    with torch.inference_mode():
        result: torch.Tensor = model(**inputs(model), use_cache=use_cache).logits
    return result


# A second stream that a layer is given, changes and hands on: where it arrives.
CARRIED: dict[str, int | str] = {
    "zaya": 1,
    "xlnet": 1,
    "glm_moe_dsa": "prev_topk_indices",
    "hy_v4": "prev_topk_indices",
}


def reference_logits(model: Any, removed: Iterable[int]) -> torch.Tensor:
    """What the model has to compute without the layers `removed`: the truth.

    A copy of the model runs with each of these layers returning what it is given.
    """
    copied = copy.deepcopy(model)
    model_type = copied.config.model_type
    if model_type == "xlm":
        _silence_xlm(copied.transformer, removed)
        return logits(copied)
    if model_type == "hrm_text":
        stacks = [copied.model.L_module.layers, copied.model.H_module.layers]
    else:
        stacks = [copied.get_submodule(stack_path(copied))]
    for stack in stacks:
        returned = _outputs(copied, stack)
        for index in removed:
            layer = stack[index]
            layer.forward = _identity(returned.get(index), CARRIED.get(model_type))
            if getattr(layer, "is_block_boundary", False):  # a removed layer starts no block
                layer.is_block_boundary = False
    return logits(copied)


def _outputs(model: nn.Module, stack: nn.ModuleList) -> dict[int, Any]:
    """What each layer of a stack returns in an ordinary forward."""
    found: dict[int, Any] = {}
    handles = [
        layer.register_forward_hook(partial(lambda i, m, args, out: found.update({i: out}), index))
        for index, layer in enumerate(stack)
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return found


def _identity(example: Any, carried: int | str | None) -> Callable[..., Any]:
    """A forward that returns its input in the form of `example`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if type(example).__name__ == "ReformerOutput":
            return type(example)(
                attn_output=kwargs["prev_attn_output"],
                hidden_states=hidden,
                attention_probs=None,
                buckets=None,
            )
        if not isinstance(example, tuple | list):
            return hidden
        extra = [None] * (len(example) - 1)
        if isinstance(carried, int) and len(args) > carried:
            extra[0] = args[carried]
        elif isinstance(carried, str):
            extra[0] = kwargs[carried]
        return type(example)([hidden, *extra])

    return forward


def _silence_xlm(transformer: Any, removed: Iterable[int]) -> None:
    """XLM has no layer modules: its layers are rows of four parallel lists."""
    for index in removed:
        transformer.attentions[index].forward = lambda x, *args, **kwargs: (torch.zeros_like(x),)
        transformer.ffns[index].forward = torch.zeros_like
        transformer.layer_norm1[index] = nn.Identity()
        transformer.layer_norm2[index] = nn.Identity()


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model type with unusual settings, and the layer sets to try if not the usual ones."""

    model_type: str
    overrides: dict[str, Any]
    sets: tuple[tuple[int, ...], ...] = ()


_SHARED_KV = {
    "layer_types": Mix("sliding_attention", "full_attention", pattern="ababab"),
    "num_kv_shared_layers": 2,
}

# Unusual settings: a model type, and what is unusual.
_UNUSUAL: dict[str, dict[str, Any]] = {
    "afmoe-dense-prefix": {"num_dense_layers": 4},
    "axk1-dense-prefix": {"mlp_layer_types": Mix("dense", "sparse", pattern="aaaabb")},
    "bamba-attention-first": {"attn_layer_indices": [0, 2, 3]},
    "bloom-post-norm-residual": {"apply_residual_connection_post_layernorm": True},
    "cohere-qk-norm": {"use_qk_norm": True},
    "cohere2-period-2": {
        "layer_types": Mix("sliding_attention", "full_attention", pattern="ababab")
    },
    "deepseek_v2-dense-prefix-4": {"first_k_dense_replace": 4},
    "deepseek_v2-all-sparse": {"first_k_dense_replace": 0},
    "deepseek_v3-dense-prefix-3": {"first_k_dense_replace": 3},
    "dots1-windows-from-3": {
        "layer_types": None,
        "max_window_layers": 3,
        "first_k_dense_replace": 3,
    },
    "electra-narrow-embedding": {"embedding_size": 16},
    "ernie4_5_moe-interval-2": {
        "moe_layer_interval": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 5,
    },
    "ernie4_5_moe-to-the-end": {"moe_layer_start_index": 1, "moe_layer_end_index": -1},
    "falcon-alibi": {"alibi": True},
    "falcon-new-architecture": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-sequential": {"parallel_attn": False, "bias": True},
    "gemma-untied": {"tie_word_embeddings": False},
    "gemma3-tower-as-deep": {"vision_config": {"num_hidden_layers": N_LAYERS}},
    "gemma3n_text-shared-kv": _SHARED_KV,
    "gemma4_text-experts": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "gemma4_text-no-layer-embeddings": {"hidden_size_per_layer_input": 0},
    "gemma4_text-shared-kv": _SHARED_KV,
    "glm4_moe-dense-prefix-5": {"first_k_dense_replace": 5},
    "glm_moe_dsa-all-full": {"indexer_types": None},
    "gpt2-inverse-layer-scale": {"scale_attn_by_inverse_layer_idx": True},
    "gpt2-upcast-scale": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "gpt2-untied": {"tie_word_embeddings": False},
    "gpt_neo-period-2": {"attention_types": [[["global", "local"], 3]]},
    "gpt_neo-two-blocks": {"attention_types": [[["global"], 2], [["local", "global"], 2]]},
    "gpt_neox-sequential": {"use_parallel_residual": False},
    "granite-multipliers": {
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    },
    "inkling2_text-blocks-of-2": {"n_layers_per_attn_res_block": 2},
    "jamba-period-2": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2-last-attention": {"full_attn_idxs": [2]},
    "lfm2_moe-dense-prefix-4": {"num_dense_layers": 4},
    "llama-tied": {"tie_word_embeddings": True, "attention_bias": True},
    "llama4_text-derived": {
        "no_rope_layers": None,
        "moe_layers": None,
        "interleave_moe_layer_step": 2,
        "attn_temperature_tuning": True,
        "floor_scale": 8,
    },
    "minicpm3-scale-depth": {"scale_depth": 3.0},
    "mistral-window": {"sliding_window": 4},
    "mixtral-window": {"sliding_window": 4},
    "mllama-cross-layers": {"text_config": {"cross_attention_layers": [0, 3, 5]}},
    "olmo_hybrid-last-of-a-kind": {
        "layer_types": Mix("linear_attention", "full_attention", pattern="aabaaa")
    },
    "opt-projected": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "qwen2-windows-from-3": {"layer_types": None, "max_window_layers": 3},
    "qwen2_moe-sparse-step-2": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "qwen2_moe-sparse-step-3": {"decoder_sparse_step": 3, "mlp_only_layers": [2]},
    "qwen3_5_text-last-attention": {
        "layer_types": Mix("linear_attention", "full_attention", pattern="aabaaa")
    },
    "qwen3_moe-dense-layers": {"mlp_only_layers": [0, 2, 3]},
    "qwen3_moe-sparse-step-2": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "qwen3_next-sparse-step-2": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "recurrent_gemma-period-3": {"block_types": ["recurrent", "recurrent", "attention"]},
    "rwkv-rescale-never": {"rescale_every": 0},
    "smollm3-full-attention": {"use_sliding_window": False, "sliding_window": None},
    "stablelm-parallel": {"use_parallel_residual": True, "qk_layernorm": True},
    "zamba-two-hybrids": {"layers_block_type": Mix("linear_attention", "hybrid", pattern="abaaba")},
    "zamba2-adapters": {"use_shared_attention_adapter": True, "use_mem_rope": True},
    "zamba2-two-blocks": {"num_mem_blocks": 2},
}
# The layer sets to try where they are not the usual ones.
_SETS: dict[str, tuple[tuple[int, ...], ...]] = {
    "ernie4_5_moe-interval-2": ((2, 3), (1, 4), (2,)),
    "gemma3n_text-shared-kv": ((0, 1), (1, 4), (5,), (0,), (3,), (2, 4)),
    "gemma4_text-shared-kv": ((0, 1), (1, 4), (0,), (4,), (3,), (5,)),
    "glm_moe_dsa-all-full": ((2, 3), (0,)),
    "inkling2_text-blocks-of-2": ((2, 3), (4, 5), (5,), (2, 3, 4, 5), (1, 4), (2,)),
    "jamba-period-2": ((2, 3), (0, 1), (0,), (1, 4)),
    "lfm2-last-attention": ((0, 4), (2,)),
    "minicpm3-scale-depth": ((2, 3), (5,)),
    "olmo_hybrid-last-of-a-kind": ((0, 4), (2,)),
    "qwen3_5_text-last-attention": ((0, 4), (2,)),
    "zamba-two-hybrids": ((2, 3), (0, 5), (1,)),
    "zamba2-two-blocks": ((0, 3), (1, 2), (4, 5), (2,), (1, 5)),
}
VARIANTS = {
    name: Variant(name.split("-")[0], overrides, _SETS.get(name, ()))
    for name, overrides in _UNUSUAL.items()
}


# Sets of layers that no config of the architecture can do without: they have to be refused.
INEXPRESSIBLE: dict[tuple[str, tuple[int, ...]], str] = {
    ("glm_moe_dsa", (0,)): "the new first layer would share the indexer of a removed one",
    ("hy_v4", (0,)): "the new first layer would share the indexer of a removed one",
    ("inkling2_text", (0,)): "the new first layer has an input the first may not have",
    ("minimax", (0,)): "the cache reads its length from layer 0, which must be full attention",
    ("modernbert-decoder", (0,)): "the first layer's norm is an identity",
    ("qwen4_exp", (0,)): "the hash tables of a later layer depend on the rank of this one",
    ("qwen4_exp_text", (0,)): "the hash tables of a later layer depend on the rank of this one",
    ("rwkv", (0,)): "only block 0 has the norm of the embedding",
    ("ernie4_5_moe-interval-2", (2,)): "no interval gives dense, MoE, MoE, dense, MoE",
    ("gemma3n_text-shared-kv", (3,)): "a kept layer uses its keys and values",
    ("gemma4_text-shared-kv", (3,)): "a kept layer uses its keys and values",
    ("gemma4_text-shared-kv", (5,)): "the last layer has to be full attention",
    ("inkling2_text-blocks-of-2", (1, 4)): "kept layers would begin other blocks",
    ("inkling2_text-blocks-of-2", (2,)): "kept layers would begin other blocks",
    ("jamba-period-2", (1, 4)): "no period gives mamba, mamba, attention, attention",
    ("lfm2-last-attention", (2,)): "no attention layer would be left to tell the cache's length",
    ("olmo_hybrid-last-of-a-kind", (2,)): "the config demands one layer of each kind",
    ("qwen3_5_text-last-attention", (2,)): "no attention layer would be left for the cache",
    ("zamba-two-hybrids", (1,)): "the class cannot be built with one hybrid layer",
    ("zamba2-two-blocks", (2,)): "the two blocks would not alternate",
    ("zamba2-two-blocks", (1, 5)): "the two blocks would change places",
}

# Wrappers that add image features after their first two layers, by index.
INEXPRESSIBLE |= {
    (name, (1, 4)): "image features are added after one of these layers"
    for name in (
        "cohere_compass cosmos3_omni granite_docling qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe"
    ).split()
}

CANNOT_WRAP = _reasons(
    {
        "cannot run on text alone": (
            "blip blip-2 evolla idefics instructblip instructblipvideo kosmos-2 pi0 pix2struct "
            "pp_formulanet udop vision-encoder-decoder"
        ),
        "does not reload, pruned or not": "shieldgemma2",
        "an encoder-decoder": "florence2 t5gemma2",
        "its vision tower needs timm": "fast_vlm gemma3n perception_lm",
        "a diffusion model": "diffusion_gemma",
        "its vision tower has no tiny configuration here": "granite4_vision muse_spark",
    }
)

WRAPPERS: list[str] = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(CANNOT_WRAP))


def build_wrapper(model_type: str, n_layers: int = N_LAYERS) -> Any:
    """A tiny random vision-language model; its `inputs` are text alone."""
    config = tiny_config(model_type, n_layers)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return randomized(model).eval()


def loader(model: Any) -> Any:
    """The Auto class that reads a saved model back."""
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model.config.model_type)
    is_causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.config.model_type) == name
    is_wrapper = type(model).__name__ == name and not is_causal
    return AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM
