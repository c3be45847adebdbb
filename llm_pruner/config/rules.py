"""Model configs: which field counts layers, and how each per-layer field follows a removal.

Rules are data: one line per field. `model.removal` refuses a removal that needs a rule which is
missing here. Nothing here imports torch: pruning on disk uses it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from ..errors import UnsupportedModelError

COUNT_FIELDS = tuple(
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks "
    "num_layers_per_stack layers".split()
)
# Configs that describe the decoder in a part that get_text_config() does not know.
DECODER_PARTS = {"blt": "global_config"}
# Parts of a name that mark encoders of inputs other than text.
OTHER_TOWERS = ("vision", "visual", "audio", "image", "speech")
# Lists that are not per layer, even if they happen to have as many entries as there are layers.
NOT_PER_LAYER = ("architectures", "token_id", "token_ids", "factor", "factors", "multipliers")
# Fields that count blocks for multi-token prediction, which may follow the last layer.
MTP_COUNTS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "num_mtp_modules",
)
# Texts with one letter per layer.
PER_LAYER_TEXTS = ("hybrid_override_pattern",)
# Parts of a config that say nothing of single layers of the decoder.
NOT_OF_LAYERS = ("rope", "quantization", "compression_config", "id2label", "label2id")


@dataclass(frozen=True)
class Removal:
    """A removal as a config sees it: which 0-based layers are kept, and of how many."""

    kept: tuple[int, ...]
    num_layers: int

    @property
    def new_indices(self) -> dict[int, int]:
        """Old index -> new index of the layers that are kept."""
        return {old: new for new, old in enumerate(self.kept)}

    def renumber(self, value: Sequence[int], first: int = 0) -> list[int]:
        """Layer indices, counted from `first`: those of kept layers, renumbered."""
        new = self.new_indices
        return [new[index - first] + first for index in value if index - first in new]

    def prefix(self, value: int) -> int:
        """The first `value` layers are special: how many of them are kept."""
        return sum(index < value for index in self.kept)

    def suffix(self, value: int) -> int:
        """The last `value` layers are special: how many of them are kept."""
        return sum(index >= self.num_layers - value for index in self.kept)

    def follow(self, value: Sequence[int]) -> list[int]:
        """One layer index per layer: that of each kept layer, renumbered, if none is lost."""
        new = self.new_indices
        lost = sorted({value[index] for index in self.kept} - new.keys())
        if lost:
            users = [index for index in self.kept if value[index] in lost]
            raise UnsupportedModelError(
                f"Layers {lost} hold what kept layers {users} use: remove those too, or keep both."
            )
        return [new[value[index]] for index in self.kept]


Rule = Callable[[Removal, Any], Any]  # of a field's value
# Fields that hold layer indices or counts of leading or trailing layers.
FIELD_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "mlp_only_layers moe_layers full_attn_idxs attn_layer_indices cross_attention_layers "
        "hybrid_layer_ids rope_scaling_layers local_layer_ids".split(),
        Removal.renumber,
    ),
    **dict.fromkeys(
        ("ple_layer_ids", "full_attn_layers", "kda_layers"), partial(Removal.renumber, first=1)
    ),
    **dict.fromkeys(
        ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers"),
        Removal.prefix,
    ),
    "kv_source_layers": Removal.follow,
    "num_kv_shared_layers": Removal.suffix,
}
# Constants that contain the layer count, by model type.
SCALED_FIELDS: dict[tuple[str, str], Rule] = {
    # every branch is multiplied by scale_depth / sqrt(num_hidden_layers)
    ("minicpm3", "scale_depth"): lambda removal, value: (
        value * math.sqrt(len(removal.kept) / removal.num_layers)
    ),
}


@dataclass(frozen=True)
class Pattern:
    """A kind of layer that a config can only express as a rule over the index."""

    fields: tuple[str, ...]  # those that make up the rule
    is_special: Callable[[int, tuple[int, ...]], bool]  # of a layer, given the fields' values
    values: Callable[[int], Any]  # every setting worth trying for that many layers


def _periodic(period: str, offset: str) -> Pattern:
    return Pattern(
        (period, offset),
        lambda i, v: i % v[0] == v[1],
        lambda n: ((length, start) for length in range(1, n + 2) for start in range(length)),
    )


PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "jamba": (
        _periodic("attn_layer_period", "attn_layer_offset"),
        _periodic("expert_layer_period", "expert_layer_offset"),
    ),
    "ernie4_5_moe": (
        Pattern(
            ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"),
            lambda i, v: (i + 1) % v[0] == 0 and v[1] <= i <= v[2],
            lambda n: product(range(1, n + 2), range(n + 1), range(n)),
        ),
    ),
}


def _spell_out(config: Any) -> None:
    """Replace rules over the index by the explicit lists that the same class understands."""
    n_layers = max(layer_counts(config), default=0)
    step = vars(config).get("decoder_sparse_step")
    if step and step > 1 and "mlp_only_layers" in vars(config):
        dense = set(config.mlp_only_layers or ())
        dense.update(index for index in range(n_layers) if (index + 1) % step)
        config.mlp_only_layers, config.decoder_sparse_step = sorted(dense), 1
    kinds = vars(config).get("block_types")
    recurrent = vars(config).get("model_type", getattr(config, "model_type", ""))
    if recurrent == "recurrent_gemma" and kinds and len(kinds) < n_layers:
        config.block_types = [kinds[index % len(kinds)] for index in range(n_layers)]


def _illegal(config: Any, removal: Removal) -> str | None:
    """Why transformers could not run the kept layers, even though a config can describe them."""
    kinds = list(getattr(config, "layer_types", None) or ())
    if len(kinds) == removal.num_layers:
        with_cache = {i for i, k in enumerate(kinds) if "linear" not in k and "attention" in k}
        if with_cache and not with_cache & set(removal.kept):
            return f"no attention layer would be left: keep one of {sorted(with_cache)}"
        if getattr(config, "model_type", "") == "minimax" and removal.kept[0] not in with_cache:
            return f"the first kept layer must be full attention, one of {sorted(with_cache)}"
        lost = _lost_producers(config, kinds, removal)
        if lost:
            return lost
    indexers = vars(config).get("indexer_types") or ()
    if len(indexers) == removal.num_layers and indexers[removal.kept[0]] == "shared":
        full = [index for index, kind in enumerate(indexers) if kind == "full"]
        return f"the first kept layer must have an indexer of its own, one of {full}"
    return None


def _lost_producers(config: Any, kinds: list[str], removal: Removal) -> str | None:
    """Trailing layers may use the keys and values of the last layer of their kind before them."""
    shared = vars(config).get("num_kv_shared_layers") or 0
    first = removal.num_layers - shared
    for index in removal.kept:
        if shared and index >= first:
            producer = max((i for i in range(first) if kinds[i] == kinds[index]), default=None)
            if producer is not None and producer not in removal.kept:
                return f"kept layer {index} uses the keys and values of layer {producer}: keep it"
    return None


def text_config(config: Any) -> Any:
    """The config that describes the decoder: `config` itself, or the text part of a composite."""
    part = DECODER_PARTS.get(getattr(config, "model_type", ""))
    if part is not None:
        return getattr(config, part)
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if get else config


def layer_counts(config: Any) -> set[int]:
    """The values of all layer-counting fields of `config`, or else its derived layer count."""
    values = [vars(config).get(name) for name in COUNT_FIELDS]
    counts = {value for value in values if isinstance(value, int) and not isinstance(value, bool)}
    derived = getattr(config, "num_hidden_layers", None)
    return counts or ({derived} if isinstance(derived, int) else set())


def prune_config(
    config: Any, kept: Sequence[int], num_layers: int, *, guess_count: bool = True
) -> None:
    """Rewrite `config` in place for the layers `kept` out of `num_layers`.

    Layer counts become ``len(kept)``, except those with another value (an encoder's). Lists with
    one entry per layer are sliced, `FIELD_RULES` applied, and `PATTERNS` get another setting. With
    `guess_count` the count may have a name that is not among the known ones.

    Raises:
        UnsupportedModelError: the kept layers cannot work without the removed ones.
    """
    removal = Removal(tuple(kept), num_layers)
    reason = _illegal(config, removal)
    if reason is not None:
        raise UnsupportedModelError(f"These layers cannot be removed: {reason}.")
    _spell_out(config)
    model_type = getattr(config, "model_type", "")
    patterns = PATTERNS.get(model_type, ())
    in_patterns = {name for pattern in patterns for name in pattern.fields}
    settings: dict[str, int] = {}
    for pattern in patterns:
        settings |= _refit(config, pattern, removal)
    counts = {name for name in COUNT_FIELDS if vars(config).get(name) == num_layers}
    if guess_count and not counts:
        counts = _only_count(config, num_layers)
    spec = vars(config).get("_heterogeneity_spec")  # overrides of single layers, by index
    overrides = {} if spec is None else dict(spec.per_layer_overrides)
    if overrides:
        config.per_layer_config = None  # checked against the layer count, so restored at the end
    for name, value in list(vars(config).items()):
        if name in counts:
            setattr(config, name, len(kept))
        elif name not in in_patterns and not name.startswith("_"):
            rule = SCALED_FIELDS.get((model_type, name)) or FIELD_RULES.get(name)
            setattr(config, name, _follow(name, value, removal, rule, extra_layers(config)))
    for name, value in settings.items():
        setattr(config, name, value)
    if overrides:
        config.per_layer_config = {
            new: overrides[old] for new, old in enumerate(kept) if old in overrides
        }


def _only_count(config: Any, num_layers: int) -> set[str]:
    """The only field of a custom config whose value is the layer count, if exactly one is."""
    if hasattr(config, "num_hidden_layers"):  # a known name, derived from another field
        return set()
    equal = {name for name, x in vars(config).items() if type(x) is int and x == num_layers}
    return equal if len(equal) == 1 else set()


def _refit(config: Any, pattern: Pattern, removal: Removal) -> dict[str, int]:
    """Values of the pattern's fields that give every kept layer its kind.

    If there are none, the fields stay, and `model.removal` refuses the removal.
    """
    if not all(hasattr(config, name) for name in pattern.fields):
        return {}  # a file that leaves them to the class
    now = tuple(getattr(config, name) for name in pattern.fields)
    wanted = [pattern.is_special(index, now) for index in removal.kept]
    for values in pattern.values(len(wanted)):
        if [pattern.is_special(index, values) for index in range(len(wanted))] == wanted:
            return dict(zip(pattern.fields, values, strict=True))
    return {}


def extra_layers(config: Any) -> set[int]:
    """How many blocks for multi-token prediction may follow the last layer, by any count."""
    counts = [vars(config).get(name) for name in MTP_COUNTS]
    return {0} | {count for count in counts if type(count) is int and count > 0}


def _follow(name: str, value: Any, removal: Removal, rule: Rule | None, extra: set[int]) -> Any:
    """The value of a field without the removed layers; that of other fields stays."""
    if value is None or isinstance(value, bool):
        return value
    counts = rule in (Removal.prefix, Removal.suffix)
    if rule is not None and not (counts and isinstance(value, list | tuple)):
        return rule(removal, value)
    if isinstance(value, dict) and not any(map(name.__contains__, (*NOT_OF_LAYERS, *OTHER_TOWERS))):
        return {
            key: _follow(str(key), entry, removal, FIELD_RULES.get(str(key)), extra)
            for key, entry in value.items()
        }
    if name in PER_LAYER_TEXTS and isinstance(value, str) and len(value) == removal.num_layers:
        return "".join(value[index] for index in removal.kept)
    if _is_per_layer(name, value, removal.num_layers, extra):
        kept = [value[index] for index in removal.kept]
        return type(value)([*kept, *value[removal.num_layers :]])
    return value


def _is_per_layer(name: str, value: Any, num_layers: int, extra: set[int]) -> bool:
    """Whether `value` has one entry per layer, and perhaps more for what follows the last one."""
    per_layer = isinstance(value, list | tuple) and len(value) - num_layers in extra
    return per_layer and not name.endswith(NOT_PER_LAYER)
