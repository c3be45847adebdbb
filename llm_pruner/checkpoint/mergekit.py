"""MergeKit passthrough recipes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from ..atomic_output import write_atomically
from ..config.rules import COUNT_FIELDS, text_config
from ..errors import InvalidPlanError, UnsupportedModelError
from ..model.layer_stack import LayerStack
from ..output_rules import RECIPE_HEAD, check_file, is_recipe
from ..results import check_layers
from ..storage.gguf_models import find_gguf
from ..utils import logger


def write_mergekit_yaml(
    stack: LayerStack, layers: Sequence[int], yaml_path: str | Path, model_id: str
) -> None:
    """Write a MergeKit passthrough recipe that keeps all layers of `model_id` but `layers`.

    ``layer_range`` is half open: [0, 3] keeps layers 0, 1, 2. The dtype is the model's own.

    Raises:
        InvalidPlanError: indices that do not fit the model, or none.
        OutputError: the file cannot be written, or another file stands there.
        UnsupportedModelError: the model is one in GGUF.
    """
    removed = check_layers(layers, len(stack))
    if find_gguf(model_id):
        raise UnsupportedModelError("MergeKit does not read GGUF: leave the recipe out.")
    if not removed:
        raise InvalidPlanError("layers=[]: the recipe removes nothing. Name at least one layer.")
    _warn_of_mergekit(stack, removed)
    edges = [-1, *removed, len(stack)]
    slices = [
        {"sources": [{"model": str(model_id), "layer_range": [left + 1, right]}]}
        for left, right in pairwise(edges)
        if right - left > 1
    ]
    dtype = str(next(stack.model.parameters()).dtype).removeprefix("torch.")
    recipe = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    check_file(yaml_path, is_recipe, reads=[model_id])
    write_atomically(yaml_path, f"{RECIPE_HEAD}\n{yaml.safe_dump(recipe, sort_keys=False)}")


def _warn_of_mergekit(stack: LayerStack, removed: Sequence[int]) -> None:
    """Warn if more of the config has to change than the layer count, which is all MergeKit sets."""
    old, new = (
        text_config(model.config).to_dict() for model in (stack.model, stack.remove(removed))
    )
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    beyond = [name for name in changed if name not in COUNT_FIELDS]
    if beyond:
        logger.warning(
            "MergeKit will write a wrong config for this recipe, or stop before it writes one: it "
            "sets only the layer count, and %s must change too. Use the config.json of the pruned "
            "checkpoint, and its tokenizer if MergeKit stopped.",
            ", ".join(beyond),
        )
