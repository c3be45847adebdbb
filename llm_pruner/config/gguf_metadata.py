"""The metadata of a GGUF file without some layers: which keys follow a removal, and how.

Keys are those of llama.cpp (``src/llama-arch.cpp``), without the architecture's name before them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import LoadError, UnsupportedModelError
from .layer_names import LayerNames
from .rules import Removal, Rule

UINT16, UINT32, INT32, FLOAT32, BOOL = 2, 4, 5, 6, 7  # numbers of types of values
BLOCKS = "blk."  # begins the names of tensors of layers
COUNT = "block_count"
MTP_COUNT = "nextn_predict_layers"  # of the blocks at the end, for multi-token prediction
# Lists with an entry per layer; those for multi-token prediction may have entries too.
PER_LAYER = frozenset(
    "feed_forward_length expert_feed_forward_length expert_used_count swiglu_clamp_exp "
    "swiglu_clamp_shexp deepstack_mapping attention.head_count attention.head_count_kv "
    "attention.sliding_window_pattern attention.recurrent_layers attention.rope_pattern "
    "attention.indexer.types attention.compress_ratios xielu.alpha_n xielu.alpha_p xielu.beta "
    "xielu.eps".split()
)
LONGER = ("attention.compress_ratios",)  # lists that may go on after the last layer
BARE = "xielu."  # begins keys that lack the architecture's name
# Lists that are not per layer, even if they happen to have as many entries as there are layers.
NOT_PER_LAYER = ("rope.", "adapters.", "ple.", "classifier.", "target_layers")
# Counts of leading or trailing layers, and lists of indices.
RULES: dict[str, Rule] = {
    "leading_dense_block_count": Removal.prefix,
    "hash_layer_count": Removal.prefix,
    "attention.shared_kv_layers": Removal.suffix,
    "ple.layers": partial(Removal.renumber, first=0),
}
INDICES = ("ple.layers",)  # which of them are lists
# Where features of images are added: at so many leading layers, or, of a list that may end before
# the last layer, at those whose number is not negative.
IMAGE_LAYERS, IMAGE_STREAMS = "n_deepstack_layers", "deepstack_mapping"
# What has to be a whole number, and a number.
WHOLE = (
    *(name for name in RULES if name not in INDICES),
    IMAGE_LAYERS,
    "attention.key_length",
    "embedding_length",
    "expert_gating_func",
)
NUMBERS = ("residual_scale",)
# What divides the layers by their index in a way that no other value of the key expresses.
BOUND_TO_INDEX = (
    "attn_res.block_size",
    "hrm.layers_per_stack",
    "moe_every_n_layers",
    "rescale_every_n_layers",
)
NOT_READ = (("step35", "moe_every_n_layers"),)  # though the converter writes it
MOST_BLOCKS = 999  # llama.cpp runs 512
OWN_INDEXERS = ("dots3note",)  # whose layers never use the indexer of one before them
ONE_FOR_ALL = "per_layer_"  # begins the names of tensors that hold a part for every layer
TWO_STACKS = ("enc.", "dec.")  # begin the names of tensors of encoder-decoder models
ENCODERS = ("gemma-embedding", "wavtokenizer-dec")  # and all whose names have "bert" in them
# What a file is, where it is no language model, and what to do with it.
OTHER_FILES = {
    "mmproj": "a projector of images or sound, which has no decoder layers: give the model it "
    "goes with, and use the projector with the pruned model as it is",
    "clip": "a projector of images or sound, which has no decoder layers: give the model it goes "
    "with, and use the projector with the pruned model as it is",
    "imatrix": "an importance matrix, not a model: give the folder that holds it and the model",
    "adapter": "an adapter, whose weights belong to single layers: merge it into the model first "
    "(llama-export-lora)",
}


def find_blocks(
    values: Mapping[str, Any], tensors: Collection[str], name: str
) -> tuple[LayerNames, int]:
    """The decoder layers of a GGUF file, and how many blocks for multi-token prediction follow.

    Args:
        values: the metadata by key.
        tensors: names of all tensors.
        name: the file, for messages.

    Raises:
        UnsupportedModelError: it is no decoder-only language model.
        LoadError: tensors and metadata contradict each other, or the metadata itself.
    """
    architecture = values.get("general.architecture")
    kind = next(
        (
            OTHER_FILES[str(one)]
            for one in (values.get("general.type"), architecture)
            if str(one) in OTHER_FILES
        ),
        None,
    )
    if kind is not None:
        raise UnsupportedModelError(f"{name!r} is {kind}.")
    count, extra = (
        values.get(f"{architecture}.{key}", missing)
        for key, missing in ((COUNT, None), (MTP_COUNT, 0))
    )
    if "bert" in str(architecture) or architecture in ENCODERS:
        raise UnsupportedModelError(
            f"{name!r} ({architecture}) is an encoder; only decoder-only language models are "
            "supported."
        )
    if any(tensor.startswith(TWO_STACKS) for tensor in tensors):
        raise UnsupportedModelError(
            f"{name!r} ({architecture}) is an encoder-decoder model; only decoder-only language "
            "models are supported."
        )
    whole = type(count) is int and type(extra) is int
    if not whole or not 0 <= extra < count <= MOST_BLOCKS:
        raise LoadError(
            f"{name!r} does not say how many layers it has: {architecture}.{COUNT} is {count!r}, "
            f"{architecture}.{MTP_COUNT} is {extra!r}. Convert the model again."
        )
    found = _indices(tensors)
    last = max(found, default=-1)
    if last >= count or last < count - extra - 1:
        raise LoadError(
            f"{name!r} contradicts itself: its metadata counts {count} blocks, and the last one "
            f"that has tensors is number {last} (0-based). Convert the model again."
        )
    shared = min((tensor for tensor in tensors if tensor.startswith(ONE_FOR_ALL)), default=None)
    if shared is not None:
        raise UnsupportedModelError(
            f"{name!r} ({architecture}) keeps a part for every layer in one tensor ({shared}), "
            "whose bytes cannot be divided: prune the original model, and convert the result."
        )
    for key, value in values.items():
        _check(key, key.removeprefix(f"{architecture}."), value, count - extra, extra)
    return LayerNames((BLOCKS,), count - extra), extra


def _indices(tensors: Iterable[str]) -> set[int]:
    parts = (tensor.split(".", 2)[1] for tensor in tensors if tensor.startswith(BLOCKS))
    return {int(part) for part in parts if part.isdecimal() and len(part) <= len(str(MOST_BLOCKS))}


def _check(key: str, name: str, value: Any, num_layers: int, extra: int) -> None:
    """Raise LoadError if it is no number where one has to be, or a list of a wrong length."""
    if value is None:
        return
    listed = isinstance(value, list)
    entries = value if listed else [value]
    wanted = ""
    if name in INDICES and not (listed and all(type(entry) is int for entry in entries)):
        wanted = "list of whole numbers"
    elif name in WHOLE and type(value) is not int:
        wanted = "whole number"
    elif name in NUMBERS and not isinstance(value, int | float):
        wanted = "number"
    elif name in PER_LAYER and not all(isinstance(entry, int | float) for entry in entries):
        wanted = "number or list of numbers"
    if wanted:
        raise LoadError(f"{key} is no {wanted}: convert the model again.")
    if name not in PER_LAYER or name == IMAGE_STREAMS or not listed:
        return
    fits = len(value) in {num_layers, num_layers + extra}
    if not fits and not (name in LONGER and len(value) > num_layers):
        raise LoadError(
            f"{key} has {len(value)} entries, and the model {num_layers} layers: convert the model "
            "again."
        )


def prune_metadata(
    values: Mapping[str, Any], kept: Sequence[int], num_layers: int, *, drop_mtp: bool = False
) -> dict[str, Any]:
    """The entries of a GGUF file's metadata that are others for the layers `kept`, by key.

    Args:
        values: the metadata by key, in which `find_blocks` has found the layers.
        kept: 0-based indices of the layers that stay, ascending.
        num_layers: how many there are, without those for multi-token prediction.
        drop_mtp: the blocks for multi-token prediction go.

    Raises:
        UnsupportedModelError: the kept layers cannot work without the removed ones, or it is not
            known whether a list follows them.
    """
    removal = Removal(tuple(kept), num_layers)
    architecture = values.get("general.architecture")
    before = f"{architecture}."
    extra = values.get(before + MTP_COUNT, 0)
    stay = 0 if drop_mtp else extra
    changed: dict[str, Any] = {}
    for key, value in values.items():
        name = key.removeprefix(before)
        if name == key and not name.startswith(BARE):
            continue
        if name == COUNT:
            changed[key] = len(kept) + stay
        elif name == MTP_COUNT:
            changed[key] = stay
        elif name in BOUND_TO_INDEX and value and (architecture, name) not in NOT_READ:
            raise UnsupportedModelError(
                f"{architecture} divides its layers by their index ({key} = {value}), so none can "
                "be removed."
            )
        elif name == IMAGE_LAYERS and value is not None:
            _refuse_image_layers(name, range(min(value, num_layers)), kept)
        elif name == IMAGE_STREAMS and isinstance(value, list):
            at = [index for index, stream in enumerate(value[:num_layers]) if stream >= 0]
            _refuse_image_layers(name, at, kept)
            after = value[num_layers:] if stay else []
            changed[key] = [*(value[index] for index in kept if index < len(value)), *after]
        elif name in RULES and value is not None:
            changed[key] = RULES[name](removal, value)
            if name in INDICES and len(changed[key]) < len(value):
                raise UnsupportedModelError(f"Layers {value} have to stay ({key}).")
        elif isinstance(value, list) and _is_per_layer(key, name, value, num_layers, extra):
            after = value[num_layers:] if stay else []
            changed[key] = [*(value[index] for index in kept), *after]
    _refuse_lost_producers(values, before, removal)
    _refuse_lost_kinds(values, before, removal)
    _refuse_bare_end(values, before, removal)
    return {key: value for key, value in changed.items() if value != values[key]}


def _refuse_image_layers(name: str, at: Sequence[int], kept: Sequence[int]) -> None:
    lost = sorted({*at} - {*kept})
    if lost:
        raise UnsupportedModelError(
            f"Image features are added at layers {list(at)} ({name}): {lost} have to stay."
        )


def _is_per_layer(key: str, name: str, value: list[Any], num_layers: int, extra: int) -> bool:
    """Whether a list has an entry per layer, and perhaps more for what follows the last one."""
    if name in PER_LAYER:
        return True
    fits = len(value) in {num_layers, num_layers + extra}
    if fits and not name.startswith(NOT_PER_LAYER):
        raise UnsupportedModelError(
            f"{key} has as many entries as the model has layers, and is not known to llm_pruner, "
            "so that it may have to follow them: prune the original model, and convert the result."
        )
    return False


def _refuse_lost_producers(values: Mapping[str, Any], before: str, removal: Removal) -> None:
    """Trailing layers use the keys and values of the two layers before them."""
    shared = values.get(f"{before}attention.shared_kv_layers") or 0
    first = removal.num_layers - shared
    users = [index for index in removal.kept if index >= first]
    lost = sorted({first - 2, first - 1} - {*removal.kept})
    if shared and users and lost:
        raise UnsupportedModelError(
            f"Layers {users} use the keys and values of layers {first - 2} and {first - 1}: keep "
            f"{lost}."
        )


def _refuse_lost_kinds(values: Mapping[str, Any], before: str, removal: Removal) -> None:
    """llama.cpp stops without a window where it expects some, or an indexer before its users."""
    architecture = before.removesuffix(".")
    windows = values.get(f"{before}attention.sliding_window_pattern")
    if isinstance(windows, list) and values.get(f"{before}attention.sliding_window", True):
        having = [index for index, window in enumerate(windows[: removal.num_layers]) if window]
        if having and not {*having} & {*removal.kept}:
            raise UnsupportedModelError(
                f"llama.cpp cannot run {architecture} without any layer that has sliding-window "
                f"attention: keep one of {having}."
            )
    indexers = values.get(f"{before}attention.indexer.types")
    if not isinstance(indexers, list) or architecture in OWN_INDEXERS:
        return
    if indexers[0] and not indexers[removal.kept[0]]:
        own = [index for index, kind in enumerate(indexers[: removal.num_layers]) if kind]
        raise UnsupportedModelError(
            f"The first kept layer must have an indexer of its own, one of {own}."
        )


def _refuse_bare_end(values: Mapping[str, Any], before: str, removal: Removal) -> None:
    """In DeciLM, llama.cpp reads off the results in the network of the last layer."""
    widths = values.get(f"{before}feed_forward_length")
    last = removal.kept[-1]
    if before == "deci." and isinstance(widths, list) and not widths[last]:
        raise UnsupportedModelError(
            f"Layer {last} has no feed-forward network ({before}feed_forward_length), and "
            "llama.cpp cannot run a model whose last layer has none: keep a later layer."
        )
