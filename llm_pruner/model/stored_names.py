"""Under which names transformers loads the tensors of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from .loading import stored_tensors

INNER_NUMBER = re.compile(r"(\.\d+\..*?)\.\d+\.")  # after that of the layer: an expert's, say


def loading_keys(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """Names of tensors in a checkpoint -> the keys that transformers looks for in the model.

    Those among its `stored_tensors` are loaded, the others are not. Many tensors may have one key,
    such as the experts of a layer.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    converters = [entry for entry in transforms if isinstance(entry, loading.WeightConverter)]
    renamings = [entry for entry in transforms if isinstance(entry, loading.WeightRenaming)]
    prefix, there = model.base_model_prefix, stored_tensors(model)
    found = {}
    for name in tensors:
        key, _ = loading.rename_source_key(name, renamings, converters, prefix, there)
        if key not in there and name in there:
            key, _ = loading.rename_source_key(name, [], [], prefix, there)
        found[name] = key
    return found


def one_of_each(tensors: Collection[str]) -> list[str]:
    """Of tensors whose names differ only in a number after the layer's, the first."""
    alike = {alike_name(name): name for name in reversed([*tensors])}
    return [*alike.values()]


def alike_name(name: str) -> str:
    """The name with every number after the layer's left out."""
    return INNER_NUMBER.sub(r"\1.0.", name)


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """A key to sort names by, in which numbers count as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
