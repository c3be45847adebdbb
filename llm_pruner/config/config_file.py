"""config.json without some layers, in its own spelling: only what a removal changes is changed.

The decoder is described by the file as a whole, or by a part of it (`decoder_path`). Nothing here
imports torch or transformers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from ..errors import LoadError, UnsupportedModelError
from ..results import MOST_LAYERS
from .layer_names import LayerNames
from .outer_rules import prune_outer
from .rules import (
    COUNT_FIELDS,
    FIELD_RULES,
    MTP_COUNTS,
    OTHER_TOWERS,
    Removal,
    extra_layers,
    prune_config,
)

# Parts of a config that describe the decoder of a composite model, the likeliest first.
PART_NAMES = (
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config",
    "decoder",
    "decoder_config",
    "global_config",
)
# Words in the names of tensors that tell a wrapper's decoder from its other stacks.
DECODER_WORDS = ("language_model", "text_model", "llm", "thinker", "decoder")
# Model types whose config.json says everything about the layers, provided it has these lists: it
# can be rewritten without the class of transformers. All others need theirs.
SPELLED_OUT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        "apertus arcee bloom codegen cohere deepseek_v3 ernie4_5 falcon gemma glm glm4 glm4_moe "
        "gpt_bigcode gpt_neox gptj granite granitemoe helium hunyuan_v1_dense kimi_k2 llama "
        "minimax_m2 mistral mixtral mpt nemotron olmo olmo2 olmoe opt persimmon phi phi3 phimoe "
        "qwen3_moe seed_oss stablelm starcoder2".split(),
        (),
    ),
    **dict.fromkeys(
        "cohere2 exaone4 gemma2 gemma3_text gpt_oss mimo ministral olmo3 qwen2 qwen2_moe "
        "qwen3".split(),
        ("layer_types",),
    ),
    "smollm3": ("layer_types", "no_rope_layers"),
}
# If this is off, all layers are alike, and the lists of `SPELLED_OUT` may be missing.
KINDS_BY = dict.fromkeys(("mimo", "qwen2", "qwen2_moe", "qwen3"), "use_sliding_window")
# Steps over the index: unless they are 1, every layer has a kind that its class works out.
STEPS = ("decoder_sparse_step", "moe_layer_freq", "moe_layer_interval")
# Fields that say how many blocks for multi-token prediction come with the weights, and whether.
MTP_SWITCHES = ("use_mtp",)
MTP_TENSORS = re.compile(r"(?:^|.*\.)(?:mtp|mtp_\w+|nextn)\.")


# What the values of fields have to be, wherever they stand; None is allowed everywhere.
TEXTS = ("model_type", "hybrid_override_pattern")
LISTS_OF_TEXTS = ("architectures", "layer_types", "layers_block_type", "indexer_types")
OBJECTS = (*PART_NAMES, "quantization_config", "compression_config", "auto_map")
SIZES = (
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
LARGEST = 10**9  # of a size or an index


class NeedsMemoryError(UnsupportedModelError):
    """The removal changes weights, so that byte ranges alone do not make the pruned model."""


def decoder_path(values: dict[str, Any]) -> tuple[str, ...]:
    """The names that lead to the part of a config.json that describes the decoder; () for all."""
    for name in PART_NAMES:
        part = values.get(name)
        if isinstance(part, dict):
            return (name, *decoder_path(part))
    return ()


def decoder_part(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the decoder."""
    for name in decoder_path(values):
        values = values[name]
    return values


def layer_count(values: dict[str, Any]) -> int | None:
    """How many layers a config.json says its decoder has; None where it leaves it to a class."""
    part = decoder_part(values)
    for name in COUNT_FIELDS:
        count = part.get(name)
        if isinstance(count, int) and not isinstance(count, bool):
            return count
    kinds = [part.get(name) for name in ("layer_types", "layers_block_type")]
    return next((len(kind) for kind in kinds if isinstance(kind, list) and kind), None)


def check_config(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the contents of a config.json if they can be those of a model.

    Args:
        values: a JSON object.
        name: the checkpoint, for messages.

    Raises:
        LoadError: a field that says where the layers are, and of what kind, has another type or
            another range than it needs, or two fields count different numbers of layers.
    """
    parts = [values]
    while parts:
        part = parts.pop()
        parts += [part[n] for n in PART_NAMES if isinstance(part.get(n), dict)]
        for field, value in part.items():
            wanted = None if value is None else _wanted(field, value)
            if wanted is not None:
                raise LoadError(
                    f"config.json of checkpoint {name!r} says {field}={value!r:.80}, which must be "
                    f"{wanted}. Correct it, or fetch the checkpoint again."
                )
        counts = {field: part[field] for field in COUNT_FIELDS if type(part.get(field)) is int}
        counts.pop("num_layers_per_stack", None)
        if len(set(counts.values())) > 1:
            said = " and ".join(f"{field}={count}" for field, count in counts.items())
            raise LoadError(
                f"config.json of checkpoint {name!r} counts its layers twice, {said}: delete the "
                "field that is not that of the model's class."
            )
    return values


def _wanted(field: str, value: Any) -> str | None:
    """What the value of a field would have to be; None where it is that."""
    if field in TEXTS:
        return None if isinstance(value, str) else "a text"
    if field in LISTS_OF_TEXTS:
        found = value if isinstance(value, list) else [None]
        return None if all(isinstance(one, str) for one in found) else "a list of texts"
    if field in OBJECTS:
        return None if isinstance(value, dict) else "an object"
    if field in COUNT_FIELDS:
        fits = type(value) is int and 0 < value <= MOST_LAYERS
        other = field in ("layers", "num_blocks") and isinstance(value, list)
        return None if fits or other else f"a whole number from 1 to {MOST_LAYERS:,}"
    numbers = value if isinstance(value, list) else [value]
    whole = all(type(one) is int for one in numbers)
    if field in SIZES and not (whole and all(0 < one <= LARGEST for one in numbers)):
        return f"a whole number from 1 to {LARGEST:,}"
    fits = whole and all(0 <= one <= LARGEST for one in numbers)
    if field in FIELD_RULES and FIELD_RULES[field] not in (Removal.prefix, Removal.suffix):
        return None if fits and isinstance(value, list) else "a list of whole numbers from 0"
    if field in (*FIELD_RULES, *MTP_COUNTS) and not (fits or isinstance(value, bool)):
        return "whole numbers from 0"
    return None


def find_layers(tensors: Iterable[str], values: dict[str, Any], name: str) -> LayerNames:
    """The decoder layers of a checkpoint, by the names of its tensors and its config.json.

    Blocks for multi-token prediction may follow the last layer.

    Args:
        tensors: names of all tensors.
        values: the contents of config.json.
        name: the checkpoint, for messages.

    Raises:
        LoadError: tensors and config contradict each other.
        NeedsMemoryError: no tensors are numbered as layers are.
    """
    stacks = _numbered(tensors)
    count = layer_count(values)
    if not stacks:
        raise NeedsMemoryError(
            f"No layers were found in checkpoint {name!r}: its config counts {count or 'none'}, "
            "and no tensors are numbered so. Use BasePruner.prune_and_save, which loads the model."
        )
    named = {
        prefix: found
        for prefix, found in stacks.items()
        if set(DECODER_WORDS) & set(prefix.split("."))
    }
    if decoder_path(values) and named:
        stacks = named
    extra = extra_layers(SimpleNamespace(**values))
    extra |= extra_layers(SimpleNamespace(**decoder_part(values)))
    length = {prefix: _length(found) for prefix, found in stacks.items()}
    count = max(length.values()) if count is None else count
    fitting = tuple(prefix for prefix, found in length.items() if found - count in extra)
    if not fitting:
        prefix = max(length, key=length.__getitem__)
        raise LoadError(
            f"Checkpoint {name!r} contradicts itself: its config counts {count} layers, and "
            f"{length[prefix]} are numbered, {prefix}0 to {prefix}{length[prefix] - 1}. Correct "
            "config.json, or fetch the checkpoint again."
        )
    return LayerNames(fitting, count)


def refuse_lacking_layers(tensors: Iterable[str], values: dict[str, Any], name: str) -> None:
    """Raise LoadError if a config.json counts more layers than there are tensors of any.

    transformers would build the others, however many, with random weights.
    """
    part, stacks = decoder_part(values), _numbered(tensors)
    counts = [part[field] for field in COUNT_FIELDS if type(part.get(field)) is int]
    count = min(counts, default=0)
    numbered = max((max(found) + 1 for found in stacks.values()), default=0)
    if stacks and numbered < count:
        raise LoadError(
            f"Checkpoint {name!r} contradicts itself: its config counts {count} layers, and there "
            f"are tensors of {numbered}. Correct config.json, or fetch the checkpoint again."
        )


def _numbered(tensors: Iterable[str]) -> dict[str, set[int]]:
    """The indices of layers by what comes before them in the names of tensors.

    Only those that begin with 0, and not heads beside the decoder.
    """
    indices: dict[str, set[int]] = {}
    for tensor in tensors:
        match = re.match(r"((?:[^.]*\.)*?)([0-9]{1,9})\.", tensor)
        if match and not any(tower in match[1] for tower in OTHER_TOWERS):
            indices.setdefault(match[1], set()).add(int(match[2]))
    return {
        prefix: found
        for prefix, found in indices.items()
        if 0 in found and not MTP_TENSORS.match(prefix)
    }


def stored_quantization(values: dict[str, Any]) -> str | None:
    """How a config.json says that the weights are quantised; None if they are not."""
    for part in (values, decoder_part(values)):
        for name in ("quantization_config", "compression_config", "quantization"):
            if isinstance(part.get(name), dict):
                return str(part[name].get("quant_method", name))
    return None


def is_mtp(tensor: str, names: LayerNames) -> bool:
    """Whether a tensor belongs to a block for multi-token prediction."""
    index = names.index(tensor)
    return index >= names.num_layers if index is not None else bool(MTP_TENSORS.match(tensor))


def _length(indices: set[int]) -> int:
    """How many of the indices follow one another from 0 on."""
    return next(index for index in range(len(indices) + 1) if index not in indices)


def is_spelled_out(values: dict[str, Any], num_layers: int) -> bool:
    """Whether `prune_config_file` alone gives a config that every reader understands."""
    model_type = str(values.get("model_type"))
    if model_type not in SPELLED_OUT or layer_count(values) != num_layers:
        return False
    if any(values.get(name, 1) != 1 for name in STEPS):
        return False
    alike = model_type in KINDS_BY and not values.get(KINDS_BY[model_type])
    for name in SPELLED_OUT[model_type]:
        there = values.get(name)
        if len(there or ()) != num_layers and not (alike and there is None):
            return False
    return not (values.get("per_layer_config") or values.get("is_encoder_decoder"))


def prune_config_file(
    values: dict[str, Any], kept: Sequence[int], num_layers: int, *, drop_mtp: bool = False
) -> dict[str, Any]:
    """The contents of a config.json for the layers `kept`; see `prune_config`.

    Every other field stays as it is, and so do the order and the spelling of all. With `drop_mtp`
    it announces no blocks for multi-token prediction.

    Raises:
        UnsupportedModelError: the kept layers cannot work without the removed ones.
    """
    pruned = copy.deepcopy(values)
    whole, outer = pruned, []
    for name in decoder_path(pruned):
        outer.append(whole)
        whole = whole[name]
    part = SimpleNamespace(**whole)
    prune_config(part, kept, num_layers, guess_count=False)
    whole.update(vars(part))
    for name in whole.keys() - vars(part).keys():
        del whole[name]
    for config in outer:  # some repeat the decoder's depth
        for name in COUNT_FIELDS:
            if config.get(name) == num_layers:
                config[name] = len(kept)
        around = SimpleNamespace(**config)
        prune_outer(around, kept)
        config.update(vars(around))
    if drop_mtp:
        for config in (*outer, whole):
            _announce_no_mtp(config)
    return pruned


def _announce_no_mtp(config: dict[str, Any]) -> None:
    for name in MTP_COUNTS:
        if config.get(name):
            config[name] = 0
    for name in MTP_SWITCHES:
        if config.get(name):
            config[name] = False
