"""What a config says of the decoder's layers outside the part that describes the decoder.

Image models may add features of their vision part to the hidden state at several layers of the
decoder (deepstack), by the layers' indices. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UnsupportedModelError

# Lists with as many entries as there are features, of which the first is added after layer 0, the
# second after layer 1, and so on.
FEATURES_IN_ORDER = ("deepstack_visual_indexes",)
TOWER_DEPTHS = ("depth", "num_hidden_layers")  # where such a list stands beside one
# Lists of decoder layers before which features are added, or of pairs that end with one.
FEATURES_BEFORE = ("deepstack_layer_map", "spatial_target_layers")


def injected_layers(config: Any) -> int:
    """After how many of the first layers image features are added, by their order: these stay."""
    if not hasattr(config, "__dict__"):
        return 0
    counts = [0]
    depth = next((vars(config)[name] for name in TOWER_DEPTHS if vars(config).get(name)), None)
    for name, value in vars(config).items():
        if name in FEATURES_IN_ORDER and isinstance(value, list | tuple):
            # The tower makes no feature at a layer that it does not have.
            counts.append(sum(depth is None or index < depth for index in value))
        elif name.endswith("_config") and not name.startswith("_"):
            counts.append(injected_layers(value))
    return max(counts)


def refuse_injected(config: Any, kept: Sequence[int]) -> None:
    """Raise UnsupportedModelError if a layer is removed after which image features are added."""
    count = injected_layers(config)
    lost = sorted(set(range(count)) - set(kept))
    if lost:
        raise UnsupportedModelError(
            f"These layers cannot be removed: image features are added after each of the first "
            f"{count} layers, by their order, so layers 0 to {count - 1} have to stay, {lost} "
            "among them."
        )


def prune_outer(config: Any, kept: Sequence[int]) -> None:
    """Let the fields of `FEATURES_BEFORE` follow: features are added before the next kept layer.

    Raises:
        UnsupportedModelError: features of two layers, or of none, would be added before one.
    """
    targets: dict[int, int] = {}  # old -> new
    for name in FEATURES_BEFORE:
        value = vars(config).get(name)
        if not value:
            continue
        new = []
        for entry in value:
            pair = isinstance(entry, list | tuple)
            old = entry[-1] if pair else entry
            targets[old] = _next_kept(old, kept, name)
            new.append(type(entry)([*entry[:-1], targets[old]]) if pair else targets[old])
        setattr(config, name, type(value)(new))
    twice = {new for new in targets.values() if [*targets.values()].count(new) > 1}
    if twice:
        raise UnsupportedModelError(
            "These layers cannot be removed: image features of several layers would be added "
            f"before one layer, {kept[min(twice)]}. Keep another layer before it."
        )


def _next_kept(layer: int, kept: Sequence[int], name: str) -> int:
    """The new index of the first kept layer from `layer` on."""
    following = [new for new, old in enumerate(kept) if old >= layer]
    if not following:
        raise UnsupportedModelError(
            f"These layers cannot be removed: image features are added before layer {layer} "
            f"({name}), and no layer from there on is kept. Keep one of them."
        )
    return following[0]
