"""Whether the tensors of a checkpoint fit each other and its config, by arithmetic alone.

A misfit is a reason to ask the model's class, which takes torch; without one there is no need to.
Nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .config_file import decoder_part, stored_quantization
from .layer_names import LayerNames
from .rules import FIELD_RULES, Removal

Shape = tuple[int, ...]
# Modules outside the layers, by the last part of their names.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embed")
NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "layernorm", "norm_f")
OTHERS = ("lm_head", "embed_out", "wpe", "rotary_emb", "word_embeddings_layernorm")
# Settings whose values are of one type, by what their names are, begin or end with.
FLOATS = ("_eps", "_epsilon", "initializer_range", "_dropout")
TEXTS = ("hidden_act", "activation_function", "hidden_activation")
WHOLE = ("max_position_embeddings", "pretraining_tp", "bos_token_id", "head_dim", "vocab_size")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# What comes before the number of a layer where tensors are named as transformers writes them.
PREFIXES = tuple(
    f"{base}{layers}."
    for base in ("", "model.", "transformer.", "gpt_neox.", "model.decoder.", "decoder.")
    for layers in ("layers", "h", "blocks")
)
SWITCHES = ("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias")
# Weights that a layer has all of, or none.
TOGETHER = (
    tuple(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    ("mlp.up_proj.weight", "mlp.down_proj.weight"),
)


def find_misfit(
    shapes: Mapping[str, Shape], values: dict[str, Any], names: LayerNames
) -> str | None:
    """What looks wrong about the tensors of a checkpoint; None if nothing does.

    Layers of one kind have to hold the same tensors, and the weights that most models have have to
    be of the sizes that config.json names. Blocks past the last layer are not looked at.

    Args:
        shapes: of all tensors, by name.
        values: the contents of config.json.
        names: the layers.
    """
    layers: list[dict[str, Shape]] = [{} for _ in range(names.num_layers)]
    outer: dict[str, Shape] = {}
    for name, shape in shapes.items():
        parts = names.split(name)
        if parts is None:
            outer[name] = shape
        elif parts[1] < names.num_layers:
            layers[parts[1]][parts[2].lstrip(".")] = shape
    if strange := set(names.prefixes) - set(PREFIXES):
        return f"its layers are named {min(strange)}0"
    part = decoder_part(values)
    sizes = {} if stored_quantization(values) else _sizes(part)
    return (
        _odd(part)
        or _unlike(layers, part)
        or _unsized(layers, sizes)
        or _unusual(outer, sizes, part)
    )


def _odd(part: dict[str, Any]) -> str | None:
    """A setting of a type that its class may refuse."""
    for name, value in part.items():
        if value is None:
            continue
        if name.endswith(FLOATS) and type(value) is not float and value not in (0, 1):
            return f"{name} is {value!r:.80}"
        if name in TEXTS and not isinstance(value, str):
            return f"{name} is {value!r:.80}"
        if name.endswith(WHOLE) and type(value) is not int and name != "eos_token_id":
            return f"{name} is {value!r:.80}"
        if name.startswith(SWITCHES) and type(value) is not bool:
            return f"{name} is {value!r:.80}"
        if name == "initializer_range" and not 0 <= value <= 1:
            return f"{name} is {value!r:.80}"
        if name in ("dtype", "torch_dtype") and str(value).removeprefix("torch.") not in DTYPES:
            return f"{name} is {value!r:.80}"
        if name == "id2label" and not (isinstance(value, dict) and all(map(str.isdigit, value))):
            return f"{name} is {value!r:.80}"
        if name in ("rope_scaling", "rope_parameters"):
            kind = isinstance(value, dict) and value.get("rope_type", value.get("type"))
            if kind is not False and kind not in (None, "default") and "factor" not in value:
                return f"{name} is {value!r:.80}"
            if not isinstance(value, dict):
                return f"{name} is {value!r:.80}"
    return None


def _unlike(layers: list[dict[str, Shape]], part: dict[str, Any]) -> str | None:
    """Layers of one kind that do not hold the same tensors."""
    kinds: dict[Any, list[int]] = {}
    for index in range(len(layers)):
        kinds.setdefault(_kind(index, len(layers), part), []).append(index)
    for members in kinds.values():
        contents = Counter(frozenset(layers[index].items()) for index in members)
        usual = contents.most_common(1)[0][0]
        for index in members:
            differing = usual ^ layers[index].items()
            if differing:
                return f"layer {index} differs from others of its kind in {min(differing)[0]!r}"
    return None


def _kind(index: int, num_layers: int, part: dict[str, Any]) -> tuple[Any, ...]:
    """What a config says of one layer."""
    said: list[Any] = []
    for name, value in part.items():
        rule = FIELD_RULES.get(name)
        if isinstance(value, list) and len(value) == num_layers:
            said.append(str(value[index]))
        elif isinstance(value, str) and len(value) == num_layers and "pattern" in name:
            said.append(value[index])
        elif isinstance(value, list) and rule is not None:
            said.append(index in value)
        elif type(value) is int and rule in (Removal.prefix, Removal.suffix):
            said.append(index < value if rule is Removal.prefix else index >= num_layers - value)
    return tuple(said)


def _sizes(part: dict[str, Any]) -> dict[str, Shape]:
    """The shapes of common weights, by the ends of their names."""
    hidden, heads, inner, vocabulary = (
        part.get(name)
        for name in ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    )
    if not (type(hidden) is int and type(heads) is int and type(vocabulary) is int):
        return {}
    width = part.get("head_dim") or hidden // heads
    pairs = part.get("num_key_value_heads") or heads
    found: dict[str, Shape] = {"embed_tokens.weight": (vocabulary, hidden)}
    found |= {"lm_head.weight": (vocabulary, hidden), "input_layernorm.weight": (hidden,)}
    if type(width) is int and type(pairs) is int:
        found |= {
            "self_attn.q_proj.weight": (heads * width, hidden),
            "self_attn.k_proj.weight": (pairs * width, hidden),
            "self_attn.v_proj.weight": (pairs * width, hidden),
            "self_attn.o_proj.weight": (hidden, heads * width),
        }
    if type(inner) is int:
        found |= dict.fromkeys(("mlp.gate_proj.weight", "mlp.up_proj.weight"), (inner, hidden))
        found["mlp.down_proj.weight"] = (hidden, inner)
    return found


def _unsized(layers: list[dict[str, Shape]], sizes: dict[str, Shape]) -> str | None:
    """Weights in the layers that are not of the size that the config says, or lack others."""
    for index, layer in enumerate(layers):
        for name in sizes.keys() & layer.keys():
            if layer[name] != sizes[name]:
                return f"{name!r} of layer {index} is of shape {list(layer[name])}"
        for group in TOGETHER if sizes else ():
            lacking = set(group) - layer.keys()
            if 0 < len(lacking) < len(group):
                return f"layer {index} lacks {min(lacking)!r}"
    return None


def _unusual(outer: dict[str, Shape], sizes: dict[str, Shape], part: dict[str, Any]) -> str | None:
    """Tensors outside the layers that have other names or sizes than usual, or are not there."""
    modules = {name: name.split(".")[-2] if "." in name else name for name in outer}
    for name, module in modules.items():
        if module not in (*EMBEDDINGS, *NORMS, *OTHERS):
            return f"{name!r} is no usual name"
        size = sizes.get(f"{module}.weight")
        if size and name.endswith(".weight") and outer[name] != size:
            return f"{name!r} is of shape {list(outer[name])}"
    there = set(modules.values())
    if not there & set(EMBEDDINGS) or not there & set(NORMS):
        return "there is no embedding, or no last norm"
    if part.get("tie_word_embeddings") is False and not there & {"lm_head", "embed_out"}:
        return "there is no head"
    return None
