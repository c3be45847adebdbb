"""Small checkpoints in the layout of published ones: real depth and lists, narrow widths.

A published config is shrunk field by field: widths become small; depth, per-layer lists, rope
settings, architectures and spelling stay. Weights are random, under the names that
`save_pretrained` writes, in several shards, with the blocks for multi-token prediction that the
config announces and the files that publishers put beside the weights. Nothing here uses the
package.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]

VOCABULARY = 320
HIDDEN = 64
MEDIA_TOKENS = 300  # ids from here on stand for images and the like: no text has them
SHARDS = 3
QUANTISATION = ("quantization_config", "quantization", "compression_config")
QUANT_FILE = "hf_quant_config.json"
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
TOWERS = ("vision_config", "visual_config", "audio_config")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LISTS_OF_DEPTH = ("layers_block_type", "layer_types", "hybrid_override_pattern")


def _by_name(table: dict[int, str]) -> dict[str, int]:
    return {name: value for value, names in table.items() for name in names.split()}


# Every width by its field's name: exactly this (where the field is not 0 or null) ...
WIDTHS = _by_name(
    {
        VOCABULARY: "vocab_size vocab_size_per_layer_input",
        512: "max_position_embeddings n_positions n_ctx max_seq_len",
        128: "original_max_position_embeddings initial_context_length",
        96: "intermediate_size intermediate_size_mlp dense_intermediate_size n_inner ffn_dim",
        HIDDEN: "hidden_size n_embd d_model text_hidden_size",
        32: (
            "moe_intermediate_size shared_expert_intermediate_size q_lora_rank moe_latent_size "
            "moe_shared_expert_intermediate_size shared_intermediate_size global_head_dim"
        ),
        24: "qk_head_dim",
        16: (
            "head_dim attention_head_dim v_head_dim qk_nope_head_dim kv_lora_rank swa_head_dim "
            "swa_v_head_dim linear_key_head_dim linear_value_head_dim index_head_dim "
            "ssm_state_size mamba_head_dim mamba_d_head mamba_d_state o_lora_rank time_step_rank "
            "chunk_size sparse_index_dim mamba_chunk_size query_pre_attn_scalar"
        ),
        8: (
            "qk_rope_head_dim rotary_dim mamba_num_heads mamba_n_heads sliding_window "
            "sliding_window_size attention_chunk_size index_topk"
        ),
        4: (
            "num_attention_heads n_head n_heads swa_num_attention_heads linear_num_value_heads "
            "index_n_heads sparse_num_index_heads mm_tokens_per_image"
        ),
        2: "linear_num_key_heads o_groups n_groups mamba_n_groups",
    }
)
# ... and at most this.
LIMITS = _by_name(
    {
        4: "num_experts n_routed_experts num_local_experts moe_num_experts",
        2: (
            "num_key_value_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
            "experts_per_token top_k_experts moe_topk num_attention_groups sparse_topk_blocks "
            "moe_k num_global_key_value_heads"
        ),
        1: "n_group topk_group n_shared_experts",
    }
)
# Of the towers beside the text: their depth stays too.
TOWER_WIDTHS = _by_name(
    {
        HIDDEN: "out_hidden_size text_hidden_size",
        56: "image_size",
        48: "intermediate_size vt_intermediate_size encoder_ffn_dim",
        32: (
            "hidden_size mm_hidden_size vt_hidden_size width embed_dim d_model vision_output_dim "
            "projector_input_dim projector_output_dim"
        ),
        16: "head_dim global_head_dim num_position_embeddings position_embedding_size",
        4: "init_pos_emb_height init_pos_emb_width",
        2: (
            "num_attention_heads num_heads heads num_key_value_heads vt_num_attention_heads "
            "encoder_attention_heads attention_heads"
        ),
    }
)
# A wrapper's file may leave out a part whose defaults are of full size.
SMALL_PARTS: dict[str, Config] = {
    "llama4": {
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_hidden_layers": 5,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        }
    },
    "kimi_k25": {  # transformers reads other names than the published ones
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    },
}
# Where `save_pretrained` does not write the published names.
RELEASE_NAMES: dict[str, list[tuple[str, str]]] = {
    "kimi_k25": [
        (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
        (r"^model\.mm_projector\.", "mm_projector."),
    ],
    "deepseek_v4": [
        (r"^model\.hc_head\.hc_", "hc_head_"),
        (r"^model\.embed_tokens\.", "embed."),
        (r"^model\.", ""),
    ],
}
# Types that transformers does not know, and what computes the same or has tensors alike.
STAND_INS: dict[str, Config] = {
    "kimi_k2": {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]},
    "mimo": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "minimax_m3": {
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        "hidden_act": "silu",
    },
}
# Stored in float32 beside bfloat16 weights.
WIDE = re.compile(r"e_score_correction_bias$|\.A_log$")


def text_part(config: Config) -> Config:
    """The part of a config that describes the language model."""
    return next((config[name] for name in TEXT_PARTS if isinstance(config.get(name), dict)), config)


def depth_of(config: Config) -> int:
    """The number of decoder layers that a config states or lists, or leaves to its class."""
    text = text_part(config)
    if stated := depths_in(text):
        return stated[0]
    depth: int = CONFIG_MAPPING[text["model_type"]]().num_hidden_layers
    return depth


def depths_in(text: Config) -> list[int]:
    """The depths that a config states, or else lists."""
    counts = [text[name] for name in COUNTS if isinstance(text.get(name), int)]
    return counts or [len(text[name]) for name in LISTS_OF_DEPTH if text.get(name)]


def stripped(config: Config) -> Config:
    """The config without what plain weights and the installed classes cannot follow."""
    unwanted = (*QUANTISATION, "auto_map")
    plain = {key: value for key, value in config.items() if key not in unwanted}
    for name in TEXT_PARTS:
        if isinstance(plain.get(name), dict):
            plain[name] = {k: v for k, v in plain[name].items() if k not in unwanted}
    return plain


def shrunk(config: Config) -> Config:
    """The config with narrow widths; depth, lists, rope and spelling are those of the original."""
    small = copy.deepcopy(config)
    for name, part in SMALL_PARTS.get(small.get("model_type", ""), {}).items():
        small[name] = small.get(name) or {}
        small[name] = part | small[name]
    _shrink(small, tower=False)
    text = text_part(small)
    if text.get("kv_lora_rank") and "num_key_value_heads" in text:
        text["num_key_value_heads"] = text["num_attention_heads"]
    if "mamba_num_heads" in text and "expand" in text:
        text["expand"] = text["mamba_num_heads"] * text["mamba_head_dim"] // text["hidden_size"]
    return small


def _shrink(config: Config, *, tower: bool) -> None:
    media = 0
    for key, value in config.items():
        if isinstance(value, dict):
            if key not in QUANTISATION:
                _shrink_part(key, value, tower)
        elif isinstance(value, bool) or value is None:
            continue
        elif tower:
            if isinstance(value, int) and key in TOWER_WIDTHS:
                config[key] = TOWER_WIDTHS[key]
        elif re.search(r"_token_(id|index|ids)$", key):
            if re.match(r"bos|eos|pad|sep|decoder_start", key):
                config[key] = _small_id(value)
            else:
                config[key] = MEDIA_TOKENS + media
                media += 1
        elif key in WIDTHS and isinstance(value, (int, float)) and value:
            config[key] = WIDTHS[key]
        elif key in LIMITS and isinstance(value, int):
            config[key] = min(value, LIMITS[key])


def _shrink_part(key: str, part: Config, tower: bool) -> None:
    if key not in ("rope_scaling", "rope_parameters"):
        _shrink(part, tower=tower or key in TOWERS)
        return
    for name, value in part.items():
        if isinstance(value, dict):
            _shrink_part(key, value, tower)
        elif name == "original_max_position_embeddings":
            part[name] = WIDTHS[name]
        elif name in ("long_factor", "short_factor"):
            part[name] = value[: WIDTHS["head_dim"] // 2]
        elif name == "mrope_section" and not tower:
            part[name] = [2, 3, 3]


def _small_id(value: Any) -> Any:
    if isinstance(value, list):
        return [_small_id(each) for each in value]
    return value if value < 256 else value % 256


# Building


def model_class(config: Config) -> Any:
    """The class that `architectures` names, or the one that transformers has for the type."""
    named = getattr(transformers, (config.get("architectures") or [""])[0], None)
    if named is not None:
        return named
    mappings = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM")
    for mapping in mappings:
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        if config.get("model_type") in names:
            return getattr(transformers, names[config["model_type"]])
    raise ValueError(f"transformers has no class for {config.get('model_type')}")


def computed_as(config: Config) -> Config:
    """The plain config under which transformers can build the model: stand-ins included."""
    plain = stripped(config)
    kind = plain.get("model_type")
    if kind not in CONFIG_MAPPING and kind in STAND_INS:
        plain |= STAND_INS[kind]
        plain.setdefault("attention_bias", kind == "mimo")
    return plain


def built_model(config: Config, folder: Path, seed: int = 0) -> PreTrainedModel:
    """A random model in which every layer matters; the config is read from `folder`."""
    plain = computed_as(config)
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
    torch.manual_seed(seed)
    kind = model_class(plain)
    model: PreTrainedModel = kind._from_config(AutoConfig.from_pretrained(folder)).float().eval()
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=drawn)
            if weight.ndim >= 2:
                weight.copy_(0.08 * noise)
            elif weight.numel() and "norm" in name and weight.mean() > 0.5:
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.copy_(0.1 * noise)
            weight.copy_(weight.bfloat16())
    return model


def released(model: PreTrainedModel, folder: Path) -> Tensors:
    """The tensors under the names of the published file, in half precision."""
    half = torch.float16 if model.config.dtype == torch.float16 else torch.bfloat16
    model.save_pretrained(folder, max_shard_size="100GB")
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                found[name] = tensors.get_tensor(name)
        file.unlink()
    tensors = {}
    for name, tensor in found.items():
        for pattern, published_name in RELEASE_NAMES.get(model.config.model_type, ()):
            name = re.sub(pattern, published_name, name)
        narrow = tensor.dtype == torch.float32 and not WIDE.search(name)
        tensors[name] = tensor.to(half) if narrow else tensor
    return tensors


def layer_prefix(names: Iterator[str] | Tensors, depth: int) -> str:
    """What stands before the layer number in the decoder's tensor names."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if match := re.match(r"(.*?)(\d+)\.", name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    fitting = [
        prefix
        for prefix, seen in numbers.items()
        if set(range(depth)) <= seen and not re.search(r"vision|visual|audio|tower", prefix)
    ]
    if len(fitting) != 1:
        raise ValueError(f"tensors of {depth} layers stand under {fitting or list(numbers)}")
    return fitting[0]


# Blocks for multi-token prediction

MTP_COUNTS = (
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "num_mtp_layers",
    "num_mtp_modules",
)
UNANNOUNCED_MTP = {"mimo_v2_flash": 3}


def mtp_count(config: Config) -> int:
    """How many blocks for multi-token prediction the config announces."""
    text = text_part(config)
    for part in (text, config):
        for name in MTP_COUNTS:
            if part.get(name):
                return int(part[name])
    return UNANNOUNCED_MTP.get(config.get("model_type", ""), 0)


class _Blocks:
    """Writes tensors of a new block: copies of a layer's shapes, and projections."""

    def __init__(self, tensors: Tensors, prefix: str) -> None:
        self.tensors, self.prefix = tensors, prefix
        self.new: Tensors = {}
        self.drawn = torch.Generator().manual_seed(7)

    def random(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        """A tensor of this shape."""
        self.new[name] = (0.1 * torch.randn(shape, generator=self.drawn)).to(dtype)

    def like_layer(self, target: str, layer: int, part: str = "") -> None:
        """Tensors named and shaped as those of a layer."""
        start = f"{self.prefix}{layer}."
        for name, tensor in self.tensors.items():
            if name.startswith(start + part):
                self.random(target + name[len(start) :], *tensor.shape, dtype=tensor.dtype)


def _mtp_after_layers(blocks: _Blocks, config: Config, depth: int, count: int) -> None:
    for index in range(depth, depth + count):
        start = f"{blocks.prefix}{index}."
        blocks.like_layer(start, depth - 1)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            blocks.random(f"{start}{norm}.weight", HIDDEN)
        blocks.random(f"{start}eh_proj.weight", HIDDEN, 2 * HIDDEN)
        for table in ("shared_head.head", "embed_tokens"):
            blocks.random(f"{start}{table}.weight", VOCABULARY, HIDDEN)


def _mtp_apart(blocks: _Blocks, config: Config, depth: int, count: int) -> None:
    for index in range(count):
        blocks.like_layer(f"mtp.layers.{index}.", depth - 1)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        blocks.random(f"mtp.{norm}.weight", HIDDEN)
    blocks.random("mtp.fc.weight", HIDDEN, 2 * HIDDEN)


def _mtp_nemotron(blocks: _Blocks, config: Config, depth: int, count: int) -> None:
    kinds = text_part(config)["layers_block_type"]
    wanted = text_part(config)["mtp_layers_block_type"]
    for index, kind in enumerate(wanted * count):
        blocks.like_layer(f"mtp.layers.{index}.", kinds.index(kind))
    for norm in ("enorm", "hnorm"):
        blocks.random(f"mtp.layers.0.{norm}.weight", HIDDEN)
    blocks.random("mtp.layers.0.eh_proj.weight", HIDDEN, 2 * HIDDEN)
    last = len(wanted) * count - 1
    blocks.random(f"mtp.layers.{last}.final_layernorm.weight", HIDDEN)


def _mtp_numbered(root: str) -> Callable[[_Blocks, Config, int, int], None]:
    def write(blocks: _Blocks, config: Config, depth: int, count: int) -> None:
        for index in range(count):
            start = f"{root}{index}."
            blocks.like_layer(start, depth - 1)
            for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
                blocks.random(f"{start}{norm}.weight", HIDDEN)
            blocks.random(f"{start}input_proj.weight", HIDDEN, 2 * HIDDEN)

    return write


MTP_LAYOUTS: dict[str, Callable[[_Blocks, Config, int, int], None]] = {
    "nemotron_h": _mtp_nemotron,
    "mimo": _mtp_numbered("model.mtp_layers."),
    "mimo_v2_flash": _mtp_numbered("model.mtp.layers."),
    "deepseek_v4": _mtp_numbered("mtp."),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_next"), _mtp_apart),
}


def mtp_tensors(config: Config, tensors: Tensors, prefix: str, depth: int) -> Tensors:
    """The tensors of the announced blocks, under the names that the family gives them."""
    blocks = _Blocks(tensors, prefix)
    if count := mtp_count(config):
        write = MTP_LAYOUTS.get(config.get("model_type", ""), _mtp_after_layers)
        write(blocks, config, depth, count)
    return blocks.new


def nas_tensors(config: Config) -> Tensors:
    """Tensors of a model whose blocks each have another shape, or no attention at all."""
    drawn = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return (0.08 * torch.randn(shape, generator=drawn)).bfloat16()

    named: Tensors = {
        "model.embed_tokens.weight": draw(VOCABULARY, HIDDEN),
        "model.norm.weight": draw(HIDDEN),
        "lm_head.weight": draw(VOCABULARY, HIDDEN),
    }
    for index, block in enumerate(config["block_configs"]):
        start = f"model.layers.{index}."
        attention, feed_forward = block["attention"], block["ffn"]
        if not attention.get("no_op"):
            named[f"{start}input_layernorm.weight"] = draw(HIDDEN)
            for name, width in (("q", HIDDEN), ("k", 32), ("v", 32), ("o", HIDDEN)):
                shape = (HIDDEN, width) if name == "o" else (width, HIDDEN)
                named[f"{start}self_attn.{name}_proj.weight"] = draw(*shape)
        if not feed_forward.get("no_op"):
            width = max(8, int(32 * (feed_forward.get("ffn_mult") or 1)))
            named[f"{start}post_attention_layernorm.weight"] = draw(HIDDEN)
            for name in ("gate", "up"):
                named[f"{start}mlp.{name}_proj.weight"] = draw(width, HIDDEN)
            named[f"{start}mlp.down_proj.weight"] = draw(HIDDEN, width)
    return named


# The folder


@dataclass
class Published:
    """A checkpoint as published, and what a judge needs to know of it."""

    folder: Path
    config: Config
    tensors: Tensors
    prefix: str
    depth: int
    mtp: list[str] = field(default_factory=list)
    not_built: str = ""  # why transformers cannot build it
    computes: bool = True  # whether `computed_as` computes it


def published(
    config: Config, folder: Path, *, quant_file: Config | None = None, small: bool = False
) -> Published:
    """Write a checkpoint with random weights from a published config.

    Args:
        config: as it is published.
        folder: where to write it.
        quant_file: what ``hf_quant_config.json`` says, if it is there.
        small: the config is narrow already.
    """
    config = copy.deepcopy(config) if small else shrunk(config)
    kind = config.get("model_type", "")
    not_built = "" if kind in CONFIG_MAPPING else f"transformers does not know {kind}"
    computes = True
    folder.mkdir(parents=True, exist_ok=True)
    if "block_configs" in config:
        tensors, computes = nas_tensors(config), False
    else:
        model = built_model(config, folder)
        tensors = released(model, folder)
        computes = kind != "minimax_m3"
    depth = depth_of(config)
    prefix = layer_prefix(tensors, depth)
    extra = mtp_tensors(config, tensors, prefix, depth)
    for file in folder.iterdir():
        file.unlink()
    write_weights(folder, tensors | extra)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_side_files(folder, config, quant_file)
    return Published(
        folder, config, tensors | extra, prefix, depth, sorted(extra), not_built, computes
    )


def write_weights(folder: Path, tensors: Tensors) -> None:
    """Several shards and their index."""
    names = list(tensors)
    size = -(-len(names) // SHARDS)
    weight_map = {}
    for number in range(SHARDS):
        part = names[number * size : (number + 1) * size]
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_side_files(folder: Path, config: Config, quant_file: Config | None = None) -> None:
    """What publishers put beside the weights: tokenizer, template, licence, card and so on."""
    _tokenizer().save(str(folder / "tokenizer.json"))
    texts = {
        "tokenizer_config.json": json.dumps(
            {
                "add_bos_token": False,
                "clean_up_tokenization_spaces": False,
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "model_max_length": 512,
                "tokenizer_class": "PreTrainedTokenizerFast",
            },
            indent=4,
        ),
        "generation_config.json": '{"do_sample": true, "temperature": 0.6, "top_p": 0.95}\n',
        "chat_template.jinja": "{% for m in messages %}{{ m['content'] }}{% endfor %}\n",
        "LICENSE": "A licence.\n",
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": "---\nlicense: apache-2.0\ntags:\n- base\n---\n# A model\n\nIts card.\n",
    }
    if any(isinstance(config.get(tower), dict) for tower in TOWERS):
        texts["preprocessor_config.json"] = '{"image_processor_type": "none", "size": 28}\n'
    for target in config.get("auto_map", {}).values():
        texts[target.split(".")[0].split("--")[-1] + ".py"] = '"""Code of the model."""\n'
    if quant_file is not None:
        texts[QUANT_FILE] = json.dumps(quant_file, indent=4) + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _tokenizer() -> Tokenizer:
    """Byte-level BPE without merges."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer
