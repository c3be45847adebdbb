"""Model configs: which field counts layers, and how each per-layer field follows a removal.

Rules are data. A field that no rule names and that depends on the position of a layer is caught
by the comparison with a freshly built model in `layers.py`, which then refuses the removal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

COUNT_FIELDS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)

# Lists as long as the stack that do not have one entry per layer.
NOT_PER_LAYER = ("architectures", "token_id", "token_ids", "factor", "factors", "multipliers")


def _renumber(value: list[int], kept: Sequence[int]) -> list[int]:
    """Values are layer indices: drop the removed ones, renumber the others."""
    new = {old: position for position, old in enumerate(kept)}
    return [new[index] for index in value if index in new]


def _prefix(value: int, kept: Sequence[int]) -> int:
    """The first `value` layers are special: count those that are kept."""
    return sum(index < value for index in kept)


# Fields that hold layer indices or counts of leading layers. One line per field.
SPECIAL_RULES: dict[str, Callable[[Any, Sequence[int]], Any]] = {
    "mlp_only_layers": _renumber,
    "moe_layers": _renumber,
    "full_attn_idxs": _renumber,
    "attn_layer_indices": _renumber,
    "cross_attention_layers": _renumber,
    "rope_scaling_layers": _renumber,
    "local_layer_ids": _renumber,
    "first_k_dense_replace": _prefix,
    "num_dense_layers": _prefix,
    "moe_layer_start_index": _prefix,
}


def text_config(config: Any) -> Any:
    """The config that describes the decoder: `config` itself, or the text part of a composite."""
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if get else config


def layer_counts(config: Any) -> set[int]:
    """Every value of a layer-counting field of `config`."""
    values = {vars(config).get(name) for name in COUNT_FIELDS}
    return {value for value in values if isinstance(value, int) and not isinstance(value, bool)}


def prune_config(config: Any, kept: Sequence[int], num_layers: int) -> None:
    """Rewrite `config` in place for the layers `kept` out of `num_layers`.

    Layer counts become ``len(kept)``, lists with one entry per layer are sliced, and fields of
    layer indices or leading-layer counts follow `SPECIAL_RULES`. A count field with another
    value (an encoder's) is left alone.
    """
    for name, value in list(vars(config).items()):
        if name in SPECIAL_RULES:
            if value is not None:
                setattr(config, name, SPECIAL_RULES[name](value, kept))
        elif name in COUNT_FIELDS:
            if value == num_layers:
                setattr(config, name, len(kept))
        elif _is_per_layer(name, value, num_layers):
            setattr(config, name, type(value)(value[index] for index in kept))


def _is_per_layer(name: str, value: Any, num_layers: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == num_layers
        and not name.endswith(NOT_PER_LAYER)
    )
